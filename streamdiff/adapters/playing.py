"""A session that is played frame by frame, each at its time, and knows how far it has been played."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from fractions import Fraction

import numpy as np

from streamdiff.session import Session
from streamdiff.stream import Interrupted, Shown


class Playing:
    """The frames of a session on their way to somebody who plays them at once.

    Args:
        session: open. Its frames are taken here, and nowhere else.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._epoch = 0
        self._cut_s = Fraction(0)
        self._played_s = 0.0

    async def frames(self) -> AsyncGenerator[Shown]:
        """Single frames at their times, also where the session makes a chunk of them at once."""
        async for shown in self._session:
            came_s = time.monotonic()
            for k, frame in enumerate(shown.split(self._session.fps)):
                if k and (wait_s := came_s + k / self._session.fps - time.monotonic()) > 0:
                    await asyncio.sleep(wait_s)
                if not self.is_void(frame):
                    yield frame

    def is_void(self, frame: Shown) -> bool:
        """Whether an interruption has taken this frame back since it was given."""
        return frame.epoch < self._epoch and frame.pts >= self._cut_s

    def play(self, frame: Shown) -> None:
        """From now on this frame counts as played."""
        self._played_s = float(frame.pts + Fraction(1, self._session.fps))

    def interrupt(self) -> Interrupted:
        """Stop speaking: what counts as played stands, all else is dropped. As `Session.interrupt`."""
        done = self._session.interrupt(played_s=self._played_s)
        if done.epoch != self._epoch:
            self._epoch, self._cut_s = done.epoch, done.cut_s
        return done


def pcm(frame: Shown) -> bytes:
    """The sound of a frame as 16-bit little-endian samples."""
    return np.rint(np.clip(frame.sound_S, -1.0, 1.0) * 32767).astype("<i2").tobytes()
