"""Sound from outside: a microphone or another voice, at any rate and in blocks of any size.

Axes: S waveform samples.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamdiff.arrays import Floats
from streamdiff.errors import InputError
from streamdiff.voice.resample import Resampler
from streamdiff.voice.speech import RATE_HZ, SpeechChunk


class ExternalAudio:
    """Sound from a microphone or another voice: any rate, any block size, int16 or float, mono or not.

    `push` returns chunks at ``rate_hz`` as soon as they are complete; a change of rate in the middle finishes
    what came before. Not thread-safe: one producer.
    """

    def __init__(self, *, segment: int = 0, rate_hz: int = RATE_HZ) -> None:
        self.segment = segment
        self._out_hz = rate_hz
        self._source_hz: int | None = None
        self._resampler: Resampler | None = None

    @property
    def rate_hz(self) -> int:
        """Rate of what was pushed last."""
        return self._source_hz or self._out_hz

    def push(self, samples: NDArray[Any] | bytes, rate_hz: int, *, last: bool = False) -> SpeechChunk:
        """Accept ``[S]`` or ``[S, channels]`` (bytes: int16 little endian) and return what it completes.

        Raises:
            InputError: not a waveform, not finite, floats far outside -1..1, or a rate outside 8..192 kHz.
        """
        mono_S = waveform(samples)
        before_S = np.zeros(0, np.float32)
        if self._resampler is None or rate_hz != self._source_hz:
            fresh = Resampler(rate_hz, self._out_hz)
            if self._resampler is not None:
                before_S = self._resampler.finish()
            self._resampler, self._source_hz = fresh, rate_hz
        parts = [before_S, self._resampler.push(mono_S)]
        if last:
            parts.append(self._resampler.finish())
            self._resampler = None
        return SpeechChunk(np.concatenate(parts), self._out_hz, None, self.segment, last)


def waveform(samples: NDArray[Any] | bytes) -> Floats:
    """Mono float32 samples in -1..1 from integers or floats, ``[S]`` or ``[S, channels]``.

    Raises:
        InputError: see `ExternalAudio.push`.
    """
    if isinstance(samples, bytes | bytearray | memoryview):
        raw = bytes(samples)
        if len(raw) % 2:
            raise InputError(f"bytes of sound are int16, two to a sample, got {len(raw)} bytes; cut between samples")
        samples = np.frombuffer(raw, "<i2")
    samples = np.asarray(samples)
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and not 1 <= samples.shape[1] <= 32):
        raise InputError(f"sound is [samples] or [samples, channels], got shape {samples.shape}")
    if np.issubdtype(samples.dtype, np.signedinteger) and samples.dtype.itemsize <= 4:
        values = samples.astype(np.float64) / -float(np.iinfo(samples.dtype).min)
    elif samples.dtype == np.uint8:
        values = (samples.astype(np.float64) - 128) / 128
    elif np.issubdtype(samples.dtype, np.floating):
        values = samples.astype(np.float64)
    else:
        raise InputError(f"samples are int16, int32, uint8 or float, got {samples.dtype}; convert them")
    mono_S = values.mean(axis=1) if values.ndim == 2 else values
    if mono_S.size and not np.isfinite(mono_S).all():
        raise InputError("the sound holds NaN or infinity; check the microphone or the decoder")
    loudest = float(np.abs(mono_S).max(initial=0.0))
    if loudest > 16.0:
        raise InputError(f"floating samples lie in -1..1, got a peak of {loudest:.0f}; divide them (int16: by 32768)")
    return np.clip(mono_S, -1.0, 1.0).astype(np.float32)
