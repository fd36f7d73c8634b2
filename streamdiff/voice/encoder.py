"""Speaker encoder: a sound to a vector that is close for one speaker and far for another (GE2E).

Axes: S waveform samples, T spectra (100 per second), M mel bands, D embedding.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from streamdiff.arrays import Floats
from streamdiff.errors import CheckpointError, InputError
from streamdiff.media.mel import band_widths_hz, mel_bank
from streamdiff.tensorfile import like, listed, load_pickled, misfits
from streamdiff.voice.resample import Resampler

_RATE_HZ = 16_000
_FFT, _HOP, _BANDS = 400, 160, 40
_PART, _PART_HOP = 160, 77
"""Spectra in a partial utterance, and between two: 1.6 s every 0.77 s."""
_LEVEL_DBFS = -30.0
_MAX_BYTES = 256 << 20


class SpeakerEncoder(Protocol):
    """Tells who speaks: a vector that is close for one speaker and far for another."""

    def embed(self, samples_S: Floats, rate_hz: int) -> Floats:
        """A vector of length 1."""
        ...


class GE2EEncoder:
    """The speaker encoder of Resemblyzer (GE2E, Wan et al. 2018; Apache-2.0) from its ``pretrained.pt``.

    Three LSTM layers over 40 mel bands, a projection, averaged over overlapping parts of 1.6 s: 256 numbers.

    Raises:
        InputError: no such file.
        CheckpointError: a file of something else.
    """

    def __init__(self, path: str | Path) -> None:
        if not Path(path).is_file():
            raise InputError(f"no speaker encoder at {path}; it is pretrained.pt in the wheel of Resemblyzer 0.1.4")
        self._lstm = nn.LSTM(_BANDS, 256, 3, batch_first=True)
        self._linear = nn.Linear(256, 256)
        hint = "it is pretrained.pt in the wheel of Resemblyzer 0.1.4"
        found = load_pickled(path, what="Resemblyzer's speaker encoder", hint=hint, most_bytes=_MAX_BYTES)
        parts = {"lstm": self._lstm, "linear": self._linear}
        wanted = like({f"{part}.{name}": v for part, m in parts.items() for name, v in m.state_dict().items()})
        weights = found.get("model_state")
        if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
            raise CheckpointError(f"{path} is not Resemblyzer's speaker encoder: no model_state; {hint}")
        weights = {name: value for name, value in weights.items() if name.partition(".")[0] in parts}
        if wrong := misfits(weights, wanted):
            raise CheckpointError(f"{path} is not Resemblyzer's speaker encoder: {listed(wrong)}; {hint}")
        for part, module in parts.items():
            module.load_state_dict({n.partition(".")[2]: v for n, v in weights.items() if n.startswith(part + ".")})

    @torch.inference_mode()
    def embed(self, samples_S: Floats, rate_hz: int) -> Floats:
        """The speaker ``[256]`` of at least half a second of speech; length 1."""
        if len(samples_S) < rate_hz // 2:
            raise InputError(f"a speaker is told from at least 0.5 s of speech, got {len(samples_S) / rate_hz:.2f} s")
        resampler = Resampler(rate_hz, _RATE_HZ)
        sound_S = np.concatenate([resampler.push(samples_S), resampler.finish()])
        level_db = 10 * math.log10(float(np.mean(sound_S.astype(np.float64) ** 2)) + 1e-12)
        sound_S = sound_S * 10 ** (max(0.0, _LEVEL_DBFS - level_db) / 20)
        mel_TM = torch.from_numpy(mel_spectra(sound_S))
        if len(mel_TM) < _PART:
            mel_TM = torch.nn.functional.pad(mel_TM, (0, 0, 0, _PART - len(mel_TM)))
        starts = range(0, len(mel_TM) - _PART + 1, _PART_HOP)
        parts_BTM = torch.stack([mel_TM[start : start + _PART] for start in starts])
        _, (hidden, _) = self._lstm(parts_BTM)
        embeddings_BD = torch.nn.functional.normalize(torch.relu(self._linear(hidden[-1])), dim=1)
        return torch.nn.functional.normalize(embeddings_BD.mean(0), dim=0).numpy()


def mel_spectra(sound_S: Floats) -> Floats:
    """Power in 40 mel bands ``[T, 40]`` at 16 kHz, 100 per second, as librosa computes it by default.

    Slaney's scale (linear to 1 kHz) and area normalisation, periodic Hann window, zeros beyond the ends.
    """
    padded_S = np.pad(sound_S.astype(np.float32), _FFT // 2)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_FFT) / _FFT)
    views = np.lib.stride_tricks.sliding_window_view(padded_S, _FFT)[::_HOP]
    power = np.abs(np.fft.rfft(views * window)) ** 2
    widths_hz = band_widths_hz(_BANDS, low_hz=0.0, high_hz=_RATE_HZ / 2, scale="slaney")
    bank = mel_bank(_BANDS, _FFT, _RATE_HZ, low_hz=0.0, high_hz=_RATE_HZ / 2, scale="slaney") * (2.0 / widths_hz)
    return (power @ bank).astype(np.float32)
