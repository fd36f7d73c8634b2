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
from numpy.typing import NDArray

from streamdiff.arrays import Floats
from streamdiff.errors import CheckpointError, ConfigError, InputError
from streamdiff.facts import printable
from streamdiff.tensorfile import listed, read_bytes, read_npz
from streamdiff.voice.onnx import onnx_session, onnx_with_outputs, read_model, run_within
from streamdiff.voice.phonemes import Reader, timed_phonemes
from streamdiff.voice.speaker import Speaker, without_lead
from streamdiff.voice.speech import RATE_HZ, Phoneme, SpeechChunk

logger = logging.getLogger(__name__)

_MAX_STYLES_BYTES, _MAX_STYLE = 256 << 20, 100.0
_MAX_CANDIDATES = 8
"""Values of a graph that are tried as durations."""
_RUN_S = 120.0
"""A network that runs longer than this on one sentence is stopped."""
_MAX_SOUND_S = 240


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
        if not 0.5 <= speed <= 2.0:
            raise ConfigError(f"speed of a voice must lie in 0.5..2, got {speed}")
        super().__init__(Reader(british=british))
        self.speed = speed
        self.styles_P256 = kokoro_styles(voices_path, voice)
        self.timbre = None if timbre is None else _checked_timbre(timbre)
        model = read_model(model_path)
        self._session, self._has_durations = _kokoro_session(model, num_threads)
        inputs = {value.name: value for value in self._session.get_inputs()}
        self._tokens = next((name for name in ("tokens", "input_ids") if name in inputs), "")
        if not self._tokens or not {"style", "speed"} <= set(inputs):
            read = printable(sorted(inputs))
            raise CheckpointError(f"{model_path} is no Kokoro export: it reads {read}, not tokens, style and speed")
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
        samples, *rest = self._run({self._tokens: ids, "style": style_1D, "speed": speed})
        samples_S = _checked_sound(samples)
        if not self._has_durations:
            return samples_S, ()
        timed = timed_phonemes(phonemes, _checked_durations(rest[-1], ids.size))
        samples_S, timed = without_lead(samples_S, timed, RATE_HZ)
        return np.ascontiguousarray(samples_S), tuple(timed)

    def _run(self, feed: dict[str, Any]) -> list[Any]:
        try:
            return run_within(self._session, feed, _RUN_S)
        except Exception as error:
            raise CheckpointError(f"the Kokoro model does not run: {printable(error, 300)}; export it again") from error

    def _chunks(self, text: str | Iterable[str], segment: int) -> Iterator[SpeechChunk]:
        for chunk in super()._chunks(text, segment):
            unknown = not self._has_durations and len(chunk.samples_S) > 0
            yield SpeechChunk(chunk.samples_S, chunk.rate_hz, None, segment) if unknown else chunk


def _kokoro_session(model: bytes, num_threads: int) -> tuple[Any, bool]:
    """A session that also gives the durations: a rounded value with one number per token."""
    for name in _rounded_values(model)[:_MAX_CANDIDATES]:
        try:
            session = onnx_session(onnx_with_outputs(model, [name]), num_threads)
            if _gives_one_number_per_token(session):
                return session, True
        except Exception as error:  # noqa: BLE001  onnxruntime has no error class of its own for a bad graph
            logger.debug("no output %s: %s", name, error)
    try:
        return onnx_session(model, num_threads), False
    except Exception as error:
        raise CheckpointError(f"the Kokoro model cannot be loaded: {printable(error, 300)}; export it again") from error


def _rounded_values(model: bytes) -> list[str]:
    """Names of a graph's values that may be durations, likely ones first."""
    found: set[str] = set()
    # From the end of a name back to its start: a row of slashes is not searched from each of its slashes.
    for match in re.finditer(rb"(?:Round|Clip)(?:_\d{1,6})?_output_0", model):
        before = model[max(0, match.start() - 200) : match.end()]
        if name := re.search(rb"/[\w/.]*+\Z", before):
            found.add(name.group().decode())
    return sorted(found, key=lambda n: ("Round" not in n, len(n)))


def _gives_one_number_per_token(session: Any) -> bool:
    inputs = {value.name: value for value in session.get_inputs()}
    tokens = next((name for name in ("tokens", "input_ids") if name in inputs), None)
    if tokens is None or "speed" not in inputs:
        return False
    speed_type = np.int32 if "int32" in inputs["speed"].type else np.float32
    ids = np.asarray([[0, 50, 83, 54, 31, 0]], np.int64)
    feed = {tokens: ids, "style": np.zeros((1, 256), np.float32), "speed": np.ones(1, speed_type)}
    durations = np.asarray(run_within(session, feed, _RUN_S)[-1]).reshape(-1)
    return durations.size == ids.size and float(durations.min()) >= 1


def _checked_sound(samples: object) -> Floats:
    samples_S = np.asarray(samples, np.float32).reshape(-1)
    if not 0 < samples_S.size <= _MAX_SOUND_S * RATE_HZ or not (np.abs(samples_S) <= 16).all():
        raise CheckpointError("the Kokoro model gives no sound (too long, or not finite); export it again")
    return samples_S


def _checked_durations(durations: object, num_tokens: int) -> NDArray[np.int64]:
    durations_P = np.asarray(durations, np.float64).reshape(-1)
    if durations_P.size != num_tokens or not ((durations_P >= 0) & (durations_P <= 1e6)).all():
        raise CheckpointError("the Kokoro model gives no durations of its phonemes; export it again")
    return np.rint(durations_P).astype(np.int64)


def kokoro_names(path: str | Path) -> list[str]:
    """The voices in a file of Kokoro styles; errors as `kokoro_styles`."""
    path = Path(path)
    return [path.stem] if path.suffix != ".npz" else list(_styles_by_name(path))


def kokoro_styles(path: str | Path, voice: str | None = None) -> Floats:
    """The styles ``[P, 256]`` of one voice, by the number of its phonemes; None: the first voice.

    Raises:
        ConfigError: no such voice in the file.
        CheckpointError: no file of styles.
    """
    voices = _styles_by_name(Path(path))
    name = next(iter(voices)) if voice is None or Path(path).suffix != ".npz" else voice
    if name not in voices:
        known = listed([printable(known) for known in voices], 20)
        raise ConfigError(f"no voice {printable(name)!r} in {path}; it holds {known}")
    return voices[name]


def _styles_by_name(path: Path) -> dict[str, Floats]:
    """Every voice of a file as finite ``[P, 256]``."""
    try:
        if path.suffix == ".npz":
            voices = read_npz(path, most_bytes=_MAX_STYLES_BYTES)
        else:
            data = read_bytes(path, _MAX_STYLES_BYTES)
            if len(data) % 1024:
                raise CheckpointError("its size is no multiple of 256 numbers of 4 bytes")
            voices = {path.stem: np.frombuffer(data, "<f4")}
        if not voices:
            raise CheckpointError("it holds no voice")
        return {name: _style_table(name, values) for name, values in voices.items()}
    except CheckpointError as error:
        hint = "an .npz holds one [510, 1, 256] per voice, a .bin the float32 numbers of one voice"
        raise CheckpointError(f"{path} is not a file of Kokoro styles: {error}; {hint}") from error


def _style_table(name: str, values: NDArray[Any]) -> Floats:
    fits = values.ndim in (1, 2, 3) and values.size > 0 and values.shape[-1] % 256 == 0
    if not fits or not np.issubdtype(values.dtype, np.floating):
        raise CheckpointError(f"{printable(name)} is {values.dtype} {list(values.shape)}, not float [P, 1, 256]")
    styles_P256 = np.ascontiguousarray(values, np.float32).reshape(-1, 256)
    if not (np.abs(styles_P256) <= _MAX_STYLE).all():
        raise CheckpointError(f"{printable(name)} holds values beyond {_MAX_STYLE:g}, or that are not finite")
    return styles_P256


def _checked_timbre(timbre: Floats) -> Floats:
    if timbre.shape != (128,) or not np.isfinite(timbre).all():
        raise ConfigError(f"a timbre is 128 finite numbers, got shape {timbre.shape}")
    return timbre.astype(np.float32)
