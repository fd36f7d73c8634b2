"""Change the sample rate of a mono stream (windowed sinc).

Axes: S waveform samples.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamdiff.arrays import Floats
from streamdiff.errors import InputError
from streamdiff.voice.speech import RATE_HZ


class Resampler:
    """Change the rate of a mono stream; the result does not depend on how the stream was cut into blocks.

    Every output sample is a fixed sum over its neighbours (windowed sinc, phases by integer arithmetic), in
    float64, so that nothing drifts and equal streams give equal bits. The filter has no delay; it looks
    ahead 16 samples of the lower rate, less than 2 ms.
    """

    _ZERO_CROSSINGS = 16

    def __init__(self, source_hz: int, rate_hz: int = RATE_HZ) -> None:
        if not 8_000 <= source_hz <= 192_000:
            raise InputError(f"sound must come at 8000..192000 Hz, got {source_hz}; resample it first")
        common = math.gcd(source_hz, rate_hz)
        self._up, self._down = rate_hz // common, source_hz // common
        cutoff = min(1.0, rate_hz / source_hz) * 0.95
        self._half = math.ceil(self._ZERO_CROSSINGS * max(1.0, source_hz / rate_hz))
        offsets = np.arange(-self._half + 1, self._half + 1, dtype=np.float64)
        shifts = np.arange(self._up, dtype=np.float64)[:, None] / self._up
        at = offsets[None, :] - shifts
        window = np.where(np.abs(at) < self._half, 0.5 + 0.5 * np.cos(np.pi * at / self._half), 0.0)
        taps = cutoff * np.sinc(cutoff * at) * window
        self._taps = taps / taps.sum(axis=1, keepdims=True)
        self._held_S = np.zeros(self._half - 1, np.float64)
        self._position = 0

    def push(self, samples_S: NDArray[np.floating[Any]]) -> Floats:
        """The output samples that these input samples complete."""
        if self._up == self._down:
            return np.asarray(samples_S, np.float32)
        held_S = np.concatenate([self._held_S, samples_S.astype(np.float64)])
        # Output m sits at input position m * down / up; its first tap lies half - 1 samples earlier, where
        # held begins.
        reach = len(held_S) - 2 * self._half + 1
        num_out = max(0, -(-(reach * self._up - self._position) // self._down))
        at = self._position + self._down * np.arange(num_out, dtype=np.int64)
        start, phase = at // self._up, at % self._up
        view = np.lib.stride_tricks.sliding_window_view(held_S, 2 * self._half) if num_out else None
        out_S = np.zeros(0) if view is None else (view[start] * self._taps[phase]).sum(axis=1)
        self._position += self._down * num_out
        drop = min(self._position // self._up, len(held_S))
        self._held_S = held_S[drop:]
        self._position -= drop * self._up
        return out_S.astype(np.float32)

    def finish(self) -> Floats:
        """The rest, as if silence followed; the stream begins anew afterwards."""
        if self._up == self._down:
            return np.zeros(0, np.float32)
        out_S = self.push(np.zeros(self._half, np.float64))
        self._held_S = np.zeros(self._half - 1, np.float64)
        self._position = 0
        return out_S
