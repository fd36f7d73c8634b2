"""Voice activity detection: is somebody speaking in these 32 ms? Silero's network (MIT), read by onnxruntime.

The network's file comes with the package ``silero-vad`` (extra ``listen``); nothing of that package is imported.

Axes: S waveform samples at 16 kHz.
"""

from __future__ import annotations

import importlib.util
import threading
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np

from streamdiff.arrays import Floats
from streamdiff.errors import BackendError
from streamdiff.voice.onnx import onnx_session

RATE_HZ = 16_000
"""Rate of all sound inside an ear."""
HOP = 512
"""Samples of one decision: 32 ms."""
HOP_S = HOP / RATE_HZ
_CONTEXT = 64
_FILE = "silero_vad/data/silero_vad_16k_op15.onnx"


def open_network(path: str | Path, *, num_threads: int = 1) -> Any:
    """An onnxruntime session on the CPU whose threads sleep while they wait.

    Raises:
        BackendError: onnxruntime is not installed.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise BackendError("listening needs onnxruntime, which is not installed; pip install 'streamdiff[listen]'")
    return onnx_session(Path(path).read_bytes(), num_threads)


def _packaged() -> Path:
    try:
        path = Path(str(distribution("silero-vad").locate_file(_FILE)))
    except PackageNotFoundError as error:
        raise BackendError(
            "voice activity needs the package silero-vad, which is not installed; pip install 'streamdiff[listen]'"
        ) from error
    if not path.is_file():
        raise BackendError(f"this silero-vad has no {_FILE}; pip install 'streamdiff[listen]' brings one that has")
    return path


class Silero:
    """Probability of speech, hop by hop. One instance follows one microphone.

    Args:
        network: what `open_network` gave for another instance, to share its weights; None: the packaged file.
    """

    def __init__(self, network: Any = None) -> None:
        self.network: Any = network if network is not None else open_network(_packaged())
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forget what was heard."""
        self._state = np.zeros((2, 1, 128), np.float32)
        self._context_S = np.zeros(_CONTEXT, np.float32)

    def probability(self, hop_S: Floats) -> float:
        """Probability that somebody speaks in these 512 samples, which follow those of the last call."""
        assert hop_S.shape == (HOP,)
        with self._lock:
            heard_1S = np.concatenate([self._context_S, hop_S])[None].astype(np.float32)
            feed = {"input": heard_1S, "state": self._state, "sr": np.array(RATE_HZ, np.int64)}
            probability, self._state = self.network.run(None, feed)
            self._context_S = heard_1S[0, -_CONTEXT:]
        return float(np.asarray(probability).reshape(-1)[0])
