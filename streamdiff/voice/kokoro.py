"""Kokoro-82M from files that the user brings: an ONNX export and a file of voice styles.

Axes: S waveform samples, P phonemes of a sentence.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from streamdiff.arrays import Floats
from streamdiff.errors import CheckpointError, ConfigError, InputError
from streamdiff.voice.onnx import onnx_session, onnx_with_outputs
from streamdiff.voice.phonemes import Reader, timed_phonemes
from streamdiff.voice.speaker import Speaker, without_lead
from streamdiff.voice.speech import RATE_HZ, Phoneme, SpeechChunk

logger = logging.getLogger(__name__)


class KokoroVoice(Speaker):
    """Kokoro-82M (StyleTTS 2 with an ISTFT decoder; Apache-2.0) from an ONNX export and a file of styles.

    One style vector of 256 numbers carries two halves: 0..127 timbre (read by the decoder), 128..255
    prosody (read by the predictor of durations, pitch and energy).

    Args:
        model_path: ``*.onnx`` with inputs ``tokens`` or ``input_ids``, ``style [1, 256]`` and ``speed``.
        voices_path: ``*.npz`` with one array ``[510, 1, 256]`` per voice, or a ``*.bin`` of one voice.
        voice: its name inside the ``npz``; None: the first.
        timbre: 128 numbers that replace the timbre half (see `fit_timbre`).

    Raises:
        InputError: a file that is not there.
        CheckpointError: a file that is not what it should be.
    """

    def __init__(
        self,
        model_path: str | Path,
        voices_path: str | Path,
        *,
        voice: str | None = None,
        speed: float = 1.0,
        timbre: Floats | None = None,
        british: bool = False,
        num_threads: int = 1,
    ) -> None:
        for path in (model_path, voices_path):
            if not Path(path).is_file():
                raise InputError(f"Kokoro needs {path}, and there is no such file; check the path")
        super().__init__(Reader(british=british))
        self.speed = speed
        self.styles_P256 = kokoro_styles(voices_path, voice)
        self.timbre = None if timbre is None else _checked_timbre(timbre)
        model = Path(model_path).read_bytes()
        self._session, self._has_durations = _kokoro_session(model, num_threads)
        inputs = {value.name: value for value in self._session.get_inputs()}
        self._tokens = next((name for name in ("tokens", "input_ids") if name in inputs), "")
        if not self._tokens or not {"style", "speed"} <= set(inputs):
            raise CheckpointError(
                f"{model_path} is not a Kokoro export: it reads {sorted(inputs)}, not tokens, style and speed"
            )
        self._speed_type = np.int32 if "int32" in inputs["speed"].type else np.float32
        self._reader.phonemes("Warm up with a zorbnik, please.")

    @property
    def has_durations(self) -> bool:
        """Whether the export lets the times of phonemes out."""
        return self._has_durations

    def say_phonemes(self, phonemes: str, *, breath: int = 0) -> tuple[Floats, tuple[Phoneme, ...]]:
        """The sound ``[S]`` of a phoneme string and its times; none when the export hides durations."""
        del breath
        vocabulary = self._reader.vocabulary
        ids = np.asarray([[0, *(vocabulary[c] for c in phonemes), 0]], np.int64)
        style_1D = self.styles_P256[min(len(phonemes), len(self.styles_P256) - 1)][None].copy()
        if self.timbre is not None:
            style_1D[0, :128] = self.timbre
        speed = np.full(1, self.speed, self._speed_type)
        samples, *rest = self._session.run(None, {self._tokens: ids, "style": style_1D, "speed": speed})
        samples_S = np.asarray(samples, np.float32).reshape(-1)
        if not self._has_durations:
            return samples_S, ()
        durations_P = np.rint(np.asarray(rest[-1], np.float64)).astype(np.int64).reshape(-1)
        timed = timed_phonemes(phonemes, durations_P)
        samples_S, timed = without_lead(samples_S, timed, RATE_HZ)
        return np.ascontiguousarray(samples_S), tuple(timed)

    def _chunks(self, text: str | Iterable[str], segment: int) -> Iterator[SpeechChunk]:
        for chunk in super()._chunks(text, segment):
            unknown = not self._has_durations and len(chunk.samples_S) > 0
            yield SpeechChunk(chunk.samples_S, chunk.rate_hz, None, segment) if unknown else chunk


def _kokoro_session(model: bytes, num_threads: int) -> tuple[Any, bool]:
    """A session that also gives the durations: a rounded value with one number per token."""
    found = {m.decode() for m in re.findall(rb"/[\w/.]*(?:Round|Clip)(?:_\d+)?_output_0", model)}
    for name in sorted(found, key=lambda n: ("Round" not in n, len(n))):
        try:
            session = onnx_session(onnx_with_outputs(model, [name]), num_threads)
        except Exception as error:  # noqa: BLE001  onnxruntime has no error class of its own for a bad graph
            logger.debug("no output %s: %s", name, error)
            continue
        if _gives_one_number_per_token(session):
            return session, True
    try:
        return onnx_session(model, num_threads), False
    except Exception as error:
        raise CheckpointError(f"the Kokoro model cannot be loaded: {error}; export it again") from error


def _gives_one_number_per_token(session: Any) -> bool:
    inputs = {value.name: value for value in session.get_inputs()}
    tokens = next((name for name in ("tokens", "input_ids") if name in inputs), None)
    if tokens is None or "speed" not in inputs:
        return False
    speed_type = np.int32 if "int32" in inputs["speed"].type else np.float32
    ids = np.asarray([[0, 50, 83, 54, 31, 0]], np.int64)
    feed = {tokens: ids, "style": np.zeros((1, 256), np.float32), "speed": np.ones(1, speed_type)}
    durations = np.asarray(session.run(None, feed)[-1]).reshape(-1)
    return durations.size == ids.size and float(durations.min()) >= 1


def kokoro_names(path: str | Path) -> list[str]:
    """The voices in a file of Kokoro styles; errors as `kokoro_styles`."""
    path = Path(path)
    if path.suffix != ".npz":
        return [path.stem]
    try:
        with np.load(path) as voices:
            return list(voices.files)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not a file of Kokoro styles: {error}") from error


def kokoro_styles(path: str | Path, voice: str | None = None) -> Floats:
    """The styles ``[P, 256]`` of one voice, by the number of its phonemes; None: the first voice.

    Raises:
        ConfigError: no such voice in the file.
        CheckpointError: no file of styles.
    """
    path = Path(path)
    try:
        if path.suffix == ".npz":
            with np.load(path) as voices:
                name = voice if voice is not None else voices.files[0]
                if name not in voices.files:
                    raise ConfigError(f"no voice {name!r} in {path}; it holds {', '.join(voices.files)}")
                styles = voices[name]
        else:
            styles = np.fromfile(path, np.float32)
        return np.ascontiguousarray(styles, np.float32).reshape(-1, 256)
    except ConfigError:
        raise
    except (ValueError, OSError, IndexError) as error:
        raise CheckpointError(f"{path} is not a file of Kokoro styles: {error}") from error


def _checked_timbre(timbre: Floats) -> Floats:
    if timbre.shape != (128,) or not np.isfinite(timbre).all():
        raise ConfigError(f"a timbre is 128 finite numbers, got shape {timbre.shape}")
    return timbre.astype(np.float32)
