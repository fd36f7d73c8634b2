"""Echo detection: is what the microphone hears only what the loudspeaker plays?

A normalised cross-correlation between the last 0.26 s of the microphone and what was played before, on whitened sound
at 8 kHz. The delay of a room hardly changes: once it has been seen several times only its neighbourhood counts, less
agreement will do, and the loudness of the echo is known as well; nothing louder than it is an echo.

Axes: S waveform samples at 16 kHz.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from streamdiff.arrays import Floats
from streamdiff.conversation.vad import HOP, RATE_HZ

_STEP = 2
"""The correlation looks at means of two samples: 8 kHz."""
_WINDOW = 2048
_REACH = 5600
"""Delays searched, in samples of 8 kHz: 0.7 s. A Bluetooth loudspeaker has 0.3 s."""
_EARLY = 800
"""How much earlier than expected a sound may be heard, since frames are taken before they are played."""
_LOW_HOP = HOP // _STEP
_KEPT = _WINDOW + _REACH + 2 * _EARLY
_NEAR = 24
_TRUSTED = 4
"""Times that a delay must be seen before it is believed."""
_QUIET = 3e-4
_TAIL = 1600
"""A room goes on sounding for 0.2 s."""
_LOUDER = 2.0
"""Amplitude over the loudest echo so far that no echo has: 6 dB."""


class EchoGate:
    """Compares what is heard with what is played.

    Both are counted in samples, not by the clock of the machine: a block that is handed over late moves nothing.

    Args:
        free: agreement (0..1) that makes an echo while the delay is not known.
        known: agreement that does at the delay that was seen before.
    """

    def __init__(self, *, free: float = 0.42, known: float = 0.25) -> None:
        self._free, self._known, self._sure = free, known, (1 + free) / 2
        self._mic_S = np.zeros(_WINDOW, np.float32)
        self._played_S = np.zeros(_KEPT, np.float32)
        self._end = 0
        """Position, in samples of 8 kHz that were played, of the end of what is kept."""
        self._heard = 0
        self._offset: int | None = None
        self._lags: deque[int] = deque(maxlen=12)
        self._gains: deque[float] = deque(maxlen=64)
        self._last_in, self._last_out = 0.0, 0.0
        self._last_at = -_REACH

    def played(self, sound_S: Floats, position_s: float) -> None:
        """This sound, 16 kHz, is played from this position of the stream on; it may overwrite what was taken back."""
        low_S, self._last_out = _whitened(sound_S, self._last_out)
        at = round(position_s * RATE_HZ / _STEP)
        end = at + len(low_S)
        if end > self._end:
            shift = min(end - self._end, _KEPT)
            self._played_S = np.concatenate([self._played_S[shift:], np.zeros(shift, np.float32)])
            self._end = end
        start = at - (self._end - _KEPT)
        skip = max(0, -start)
        self._played_S[max(0, start) : max(0, start + len(low_S))] = low_S[skip:]

    def is_echo(self, hop_S: Floats, *, unlikely: bool = False) -> bool:
        """Whether the last 0.26 s, which end with these 512 samples, are an echo.

        ``unlikely``: nobody is heard anyway; saves the work and says no.
        """
        low_S, self._last_in = _whitened(hop_S, self._last_in)
        self._mic_S = np.concatenate([self._mic_S[_LOW_HOP:], low_S])
        self._heard += _LOW_HOP
        if unlikely:
            return False
        reference_S = self._reference()
        if float(np.abs(reference_S).max()) < _QUIET:
            return False
        lag = self._delay()
        score, at = (0.0, 0) if lag is None else self._agreement(reference_S, max(0, lag - _NEAR), lag + _NEAR)
        if lag is None or score < self._known:
            furthest, where = self._agreement(reference_S, 0, _REACH)
            # Any short sound agrees with something somewhere; an echo does so at the same place as 32 ms before.
            is_steady, self._last_at = abs(where - self._last_at) <= _NEAR, where
            furthest *= is_steady
            if furthest >= self._free:
                self._lags.append(where)
            # A microphone that was off for a moment hears the echo elsewhere.
            score, at = (furthest, where) if lag is None or furthest >= self._sure else (score, at)
        elif score >= self._free:
            self._lags.append(at)
        if score >= self._free:
            self._gains.append(_rms(low_S) / max(_source(reference_S, at), 1e-6))
        enough = self._free if lag is None else self._known
        return score >= enough or (lag is not None and _rms(low_S) <= _LOUDER * self._loudest(reference_S, at))

    def restart(self) -> None:
        """The microphone has lost count of its samples: the delay must be found anew."""
        self._offset = None

    def _reference(self) -> Floats:
        """What was played in the time that may be heard now, ``[_WINDOW + _REACH]``; zeros where nothing is known."""
        if self._offset is None or abs(self._end - (self._heard + self._offset)) > _REACH:
            self._offset = self._end - self._heard
            self._lags.clear()
        stop = self._heard + self._offset + _EARLY - (self._end - _KEPT)
        start = stop - _WINDOW - _REACH
        out_S = np.zeros(_WINDOW + _REACH, np.float32)
        known_S = self._played_S[max(0, start) : max(0, min(stop, _KEPT))]
        skip = max(0, -start)
        out_S[skip : skip + len(known_S)] = known_S
        return out_S

    def _agreement(self, reference_S: Floats, first: int, last: int) -> tuple[float, int]:
        """Largest correlation of the microphone with the reference, begun at ``first`` to ``last``; and where."""
        last = min(last, _REACH)
        part_S = reference_S[first : last + _WINDOW]
        across = _correlation(part_S, self._mic_S)
        power = np.concatenate([[0.0], np.cumsum(np.square(part_S, dtype=np.float64))])
        energy = power[_WINDOW:] - power[:-_WINDOW]
        floor = 1e-3 * float(energy.max()) + 1e-12
        own = float(np.square(self._mic_S, dtype=np.float64).sum()) + 1e-12
        scores = np.abs(across) / np.sqrt((energy + floor) * own)
        best = int(np.argmax(scores))
        return float(scores[best]), first + best

    def _loudest(self, reference_S: Floats, start: int) -> float:
        """How loud the echo of what was played may be now; 0.0 while its loudness is not known."""
        if len(self._gains) < _TRUSTED:
            return 0.0
        return float(np.percentile(self._gains, 90)) * _source(reference_S, start)

    def _delay(self) -> int | None:
        """The start at which the echo was found most often of late; None while there is none to trust."""
        if len(self._lags) < _TRUSTED:
            return None
        middle = int(np.median(self._lags))
        agreeing = sum(abs(lag - middle) <= _NEAR for lag in self._lags)
        return middle if agreeing >= max(_TRUSTED, len(self._lags) // 2) else None


def _whitened(sound_S: Floats, before: float) -> tuple[Floats, float]:
    """Pre-emphasis and every second sample; and the sample before the next block."""
    sound_S = np.asarray(sound_S, np.float32)
    if len(sound_S) == 0:
        return sound_S, before
    sharp_S = sound_S - 0.95 * np.concatenate([[np.float32(before)], sound_S[:-1]])
    even = len(sharp_S) // _STEP * _STEP
    return sharp_S[:even].reshape(-1, _STEP).mean(axis=1).astype(np.float32), float(sound_S[-1])


def _correlation(long_S: Floats, short_S: Floats) -> Floats:
    """Products of the short signal with the long one, at every place where it lies within it."""
    places = len(long_S) - len(short_S) + 1
    if places <= 4 * _NEAR:
        return np.correlate(long_S, short_S, "valid")
    size = 1 << (len(long_S) - 1).bit_length()
    spectrum = np.fft.rfft(long_S, size) * np.conj(np.fft.rfft(short_S, size))
    return np.fft.irfft(spectrum, size)[:places]


def _rms(sound_S: Floats) -> float:
    return float(np.sqrt(np.mean(np.square(sound_S, dtype=np.float64))))


def _source(reference_S: Floats, start: int) -> float:
    """Loudest 32 ms that were played in the last 0.2 s before what is heard now."""
    stop = start + _WINDOW
    part_S = reference_S[max(0, stop - _TAIL - _LOW_HOP) : stop]
    blocks = part_S[len(part_S) % _LOW_HOP :].reshape(-1, _LOW_HOP)
    return float(np.sqrt(np.square(blocks, dtype=np.float64).mean(axis=1).max())) if len(blocks) else 0.0
