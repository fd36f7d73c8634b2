"""Where the listener is: what has been sent, and how much of it has been heard.

Positions are seconds since the first frame of the stream (`stream.Shown.pts`). What was sent cannot be called back;
what was *heard* is less, by the way to the loudspeaker and the jitter buffer there, which the browser reports.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

BLOCK_S = 0.020
"""Sound leaves in blocks of 20 ms: longer ones give two Opus packets one timestamp, and half of the sound is lost."""


class Playhead:
    """How far a stream has been sent, and about how far it has been heard.

    >>> now = 100.0
    >>> head = Playhead(clock=lambda: now)
    >>> head.sent(2.0, 0.04)
    >>> now += 0.02
    >>> round(head.sent_s, 3), round(head.heard_s(), 3), round(head.heard_s(delay_s=0.1), 3)
    (2.04, 2.02, 1.92)
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pts_s = 0.0
        self._duration_s = 0.0
        self._at_s = clock()

    def sent(self, pts_s: float, duration_s: float) -> None:
        """A frame that begins at ``pts_s`` leaves now."""
        self._pts_s, self._duration_s, self._at_s = pts_s, duration_s, self._clock()

    @property
    def sent_s(self) -> float:
        """Position up to which frames have left."""
        return self._pts_s + self._duration_s

    def heard_s(self, delay_s: float = 0.0) -> float:
        """Position that is heard now by somebody who hears what is sent ``delay_s`` later."""
        since_s = self._clock() - self._at_s - delay_s
        return max(0.0, self._pts_s + min(since_s, self._duration_s))


class Blocks:
    """Cuts a waveform that comes in frames of any length into int16 blocks of 20 ms.

    >>> blocks = Blocks(rate_hz=24_000)
    >>> [(first, len(block_S)) for first, block_S in blocks.push(np.zeros(960, np.float32))]
    [(0, 480), (480, 480)]

    A stream that goes on elsewhere (``at``: the number of its next sample) is followed there; half a block is dropped.
    """

    def __init__(self, rate_hz: int) -> None:
        self.size = round(rate_hz * BLOCK_S)
        self._held_S = np.zeros(0, np.int16)
        self._next = 0

    def push(self, sound_S: NDArray[np.float32], at: int | None = None) -> Iterator[tuple[int, NDArray[np.int16]]]:
        """Blocks that are complete now, each with the number of its first sample."""
        if at is not None and at != self._next + len(self._held_S):
            self._next, self._held_S = at, self._held_S[:0]
        block_S = np.rint(np.clip(sound_S, -1.0, 1.0) * 32767).astype(np.int16)
        if len(self._held_S):
            block_S = np.concatenate([self._held_S, block_S])
        whole = len(block_S) // self.size * self.size
        self._held_S = block_S[whole:]
        for start in range(0, whole, self.size):
            yield self._next, block_S[start : start + self.size]
            self._next += self.size
