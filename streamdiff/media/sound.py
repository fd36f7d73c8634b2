"""A voice from any file, as a stream of mono blocks: memory does not grow with its length.

Axes: S waveform samples.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import numpy.typing as npt
import torch
from av.container import InputContainer
from av.error import FFmpegError
from torch import Tensor

from streamdiff.errors import InputError
from streamdiff.facts import printable
from streamdiff.media.source import open_media, reason

logger = logging.getLogger(__name__)

_MIN_RATE_HZ = 8_000
_MAX_RATE_HZ = 192_000
_LOUDEST = 16.0
# PyAV (18.1) reads a plane too many from frames of eight planar channels or more, and crashes.
_UNSAFE_PLANES = 8
_LONGEST_S = 4 * 3600.0
_SLACK_S = 1.0
"""By which a container may be wrong without a word: coding frames, priming, a rounded length."""
_GIVE_SPEECH = "give a file with speech in it"


def frame_boundary(frame: int, fps: int, rate_hz: int) -> int:
    """First waveform sample of a video frame, in integers so that it never drifts.

    >>> [frame_boundary(i, 24, 16000) for i in range(4)]
    [0, 666, 1333, 2000]
    """
    return frame * rate_hz // fps


def read_audio(source: str | Path | BinaryIO, rate_hz: int = 16_000) -> Iterator[Tensor]:
    """Blocks of a sound file's first audio track, float32 mono at ``rate_hz``, in order.

    Channels are averaged, the rate is changed by a linear-phase filter without delay. The file is opened and
    its first samples decoded at once: what is wrong with it is said by the call, not by the first ``next``.

    Args:
        source: a path or a binary file open for reading, in any usual container of sound or film.
        rate_hz: rate of the result.

    Raises:
        InputError: no such file, not audio, no samples, NaN, rates outside 8..192 kHz; damage further on is
            said while iterating.
    """
    blocks = _resampled(source, rate_hz)
    first_S = next(blocks, None)
    if first_S is None:
        raise InputError(f"{_name(source)} holds no sound: its audio track is empty; give a file with speech in it")

    def stream() -> Iterator[Tensor]:
        yield first_S
        yield from blocks

    return stream()


def audio_duration_s(source: str | Path | BinaryIO) -> float:
    """Seconds of sound in a file, decoded and counted; containers have been seen to claim centuries.

    Raises what `read_audio` raises, and `InputError` beyond 4 hours.
    """
    num_samples, rate_hz = 0, 16_000
    for block_S, rate_hz in _decode(source):
        num_samples += len(block_S)
        if num_samples > _LONGEST_S * rate_hz:
            raise InputError(f"{_name(source)} holds more than {_LONGEST_S / 3600:.0f} hours of sound; say --seconds")
    return num_samples / rate_hz


def _name(source: str | Path | BinaryIO) -> str:
    return str(source) if isinstance(source, str | Path) else str(getattr(source, "name", "the sound"))


@contextmanager
def _open(source: str | Path | BinaryIO) -> Generator[tuple[InputContainer, av.AudioStream]]:
    name = _name(source)
    with ExitStack() as stack:
        try:
            container = stack.enter_context(open_media(source))
        except InputError as error:
            raise InputError(f"cannot read sound from {name}: {error}") from error
        if not container.streams.audio:
            raise InputError(f"cannot read sound from {name}: it holds no audio track; {_GIVE_SPEECH}")
        stream = container.streams.audio[0]
        rate_hz = getattr(stream, "rate", None)  # there is none without a decoder
        if rate_hz is None:
            raise InputError(f"cannot use the sound of {name}: nothing here decodes it; convert it to WAV")
        if not _MIN_RATE_HZ <= rate_hz <= _MAX_RATE_HZ:
            raise InputError(
                f"cannot use the sound of {name}: its rate is {rate_hz} Hz, outside "
                f"{_MIN_RATE_HZ}..{_MAX_RATE_HZ}; convert it to 16000 Hz"
            )
        yield container, stream


def _claimed_s(container: InputContainer, stream: av.AudioStream) -> float:
    """How long a container says that its sound is; 0: it does not say."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return 0.0 if container.duration is None else container.duration / av.time_base


def _resampled(source: str | Path | BinaryIO, rate_hz: int) -> Iterator[Tensor]:
    resample: _Resampler | None = None
    for mono_S, source_rate_hz in _decode(source, warn=True):
        if source_rate_hz != rate_hz and resample is None:
            resample = _Resampler(source_rate_hz, rate_hz)
        block_S = mono_S if resample is None else resample.push(mono_S)
        if len(block_S):
            yield torch.from_numpy(block_S)
    if resample is not None:
        tail_S = resample.finish()
        if len(tail_S):
            yield torch.from_numpy(tail_S)


def _decode(source: str | Path | BinaryIO, *, warn: bool = False) -> Iterator[tuple[npt.NDArray[np.float32], int]]:
    """Mono blocks as they are stored, and their rate. With ``warn``, a file that ends early is logged."""
    name = _name(source)
    with _open(source) as (container, stream):
        rate_hz, claimed_s = stream.rate, _claimed_s(container, stream)
        interleave = av.AudioResampler(format="flt")
        num_samples = 0
        frames = container.decode(stream)
        while (frame := _next(frames, name, num_samples / rate_hz)) is not None:
            if frame.sample_rate != rate_hz:
                raise InputError(
                    f"the sound of {name} changes its rate from {rate_hz} to {frame.sample_rate} Hz "
                    f"after {num_samples / rate_hz:.2f} s; convert it to a single rate"
                )
            if frame.samples == 0:
                continue
            if frame.format.is_planar and frame.layout.nb_channels >= _UNSAFE_PLANES:
                (frame,) = interleave.resample(frame)
            mono_S = _mono(frame)
            _check_samples(mono_S, f"{name}, {num_samples / rate_hz:.2f} s into it,")
            num_samples += len(mono_S)
            yield mono_S, rate_hz
        if warn and num_samples and claimed_s > num_samples / rate_hz + _SLACK_S:
            logger.warning(
                "%s holds %.2f s of sound, not the %.4g s that it claims",
                printable(name),
                num_samples / rate_hz,
                claimed_s,
            )


def _next(frames: Iterator[av.AudioFrame], name: str, at_s: float) -> av.AudioFrame | None:
    try:
        return next(frames, None)
    except (FFmpegError, ValueError) as error:
        raise InputError(
            f"the sound of {name} breaks off after {at_s:.2f} s ({printable(reason(error))}); give an undamaged file"
        ) from error


def _check_samples(mono_S: npt.NDArray[np.float32], where: str) -> None:
    loudest = float(np.abs(mono_S).max())
    if not math.isfinite(loudest):
        raise InputError(f"the sound of {where} holds NaN or infinity; export it again")
    if loudest > _LOUDEST:
        raise InputError(
            f"the sound of {where} reaches {loudest:.0f}, but floating-point sound lies within -1..1; divide it first"
        )


def _mono(frame: av.AudioFrame) -> npt.NDArray[np.float32]:
    """Mean over the channels, whatever their number and names, on a scale of -1..1."""
    try:
        values: npt.NDArray[Any] = frame.to_ndarray()
    except ValueError as error:
        raise InputError(f"sound is not read as {frame.format.name}; convert it to WAV with 16 bits") from error
    num_channels = frame.layout.nb_channels
    if not frame.format.is_planar:
        values = values.reshape(-1, num_channels).T
    if values.dtype.kind == "u":
        values = (values.astype(np.float32) - 128) / 128
    elif values.dtype.kind == "i":
        values = values / 2.0 ** (8 * values.dtype.itemsize - 1)
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused
        return np.ascontiguousarray(values.astype(np.float32).mean(axis=0, dtype=np.float32))


class _Resampler:
    """FFmpeg's resampler on mono blocks."""

    def __init__(self, source_rate_hz: int, rate_hz: int) -> None:
        self._source_rate_hz = source_rate_hz
        self._resampler = av.AudioResampler(format="fltp", layout="mono", rate=rate_hz)

    def push(self, mono_S: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        frame = av.AudioFrame.from_ndarray(mono_S[None], format="fltp", layout="mono")
        frame.sample_rate = self._source_rate_hz
        return self._joined(self._resampler.resample(frame))

    def finish(self) -> npt.NDArray[np.float32]:
        return self._joined(self._resampler.resample(None))

    @staticmethod
    def _joined(frames: list[av.AudioFrame]) -> npt.NDArray[np.float32]:
        return np.concatenate([np.zeros(0, np.float32), *(frame.to_ndarray()[0] for frame in frames)])
