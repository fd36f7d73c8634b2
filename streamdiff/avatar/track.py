"""The sound that comes next, cut into the frames it is heard with; and what a frame is on its way to the viewer."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from streamdiff.arrays import Floats
from streamdiff.avatar.cues import FRAME_SAMPLES, Cues
from streamdiff.avatar.kinematics import FPS
from streamdiff.stream import Segment, State
from streamdiff.voice import RATE_HZ, Phoneme, SpeechChunk

_HUSHED = 0.01
"""Peak of a frame of sound that nobody misses: -40 dBFS."""


@dataclass(slots=True)
class Sounding:
    """A frame's worth of sound, before and after it has a face."""

    audio_S: Floats
    segment: Segment | None
    end: bool = False


@dataclass(slots=True)
class Made:
    """A frame on its way."""

    index: int
    take: int
    epoch: int
    motion_E: Tensor
    sounding: Sounding
    state: State
    video_HW3: NDArray[np.uint8] | None = None


QUIET_S = np.zeros(FRAME_SAMPLES, np.float32)
QUIET_S.flags.writeable = False


class Track:
    """The sound that comes next, cut into frames. Belongs to the motion thread."""

    def __init__(self) -> None:
        self.frames: deque[Sounding] = deque()
        self._pending_S = np.zeros(0, np.float32)
        self._before_S = np.zeros(FRAME_SAMPLES, np.float32)
        self._phonemes: list[Phoneme] | None = None
        self._segment: Segment | None = None

    @property
    def is_open(self) -> bool:
        """Whether the sound that was begun has not ended yet."""
        return self._segment is not None

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to be heard."""
        return not self.frames and not self.is_open

    def absorb(self, chunk: SpeechChunk, segment: Segment) -> Cues:
        """Take in a chunk; the cues of the frames it completes. The end of a segment is padded to a frame."""
        if segment is not self._segment:
            self._segment, self._phonemes = segment, []
        if chunk.phonemes is None:
            self._phonemes = None
        elif self._phonemes is not None:
            shift_s = len(self._pending_S) / RATE_HZ
            self._phonemes += [Phoneme(p.symbol, p.start_s + shift_s, p.end_s + shift_s) for p in chunk.phonemes]
        self._pending_S = np.concatenate([self._pending_S, chunk.samples_S])
        if chunk.last and (len(self._pending_S) or not self.frames or self.frames[-1].segment is not segment):
            # The end is told once, and on a frame: if all others are gone, on one more.
            missing = -len(self._pending_S) % FRAME_SAMPLES if len(self._pending_S) else FRAME_SAMPLES
            self._pending_S = np.pad(self._pending_S, (0, missing))
        cues = self._cut()
        if chunk.last:
            self.frames[-1].end = True
            self._segment = None
        return cues

    def pad(self) -> Cues:
        """Complete the frame that has begun: nothing followed in time."""
        self._pending_S = np.pad(self._pending_S, (0, -len(self._pending_S) % FRAME_SAMPLES))
        return self._cut()

    def _cut(self) -> Cues:
        count = len(self._pending_S) // FRAME_SAMPLES
        samples_S, self._pending_S = np.split(self._pending_S, [count * FRAME_SAMPLES])
        cues = Cues.sound(samples_S, self._phonemes, before_S=self._before_S)
        if count:
            self._before_S = samples_S[-FRAME_SAMPLES:]
            self.frames += [Sounding(audio_S, self._segment) for audio_S in samples_S.reshape(count, FRAME_SAMPLES)]
        if self._phonemes is not None:
            gone_s = count / FPS
            self._phonemes = [
                Phoneme(p.symbol, p.start_s - gone_s, p.end_s - gone_s) for p in self._phonemes if p.end_s > gone_s
            ]
        return cues

    @property
    def is_hushed(self) -> bool:
        """Whether the next frame and the one after it are silent parts of live sound that still goes on."""
        if self._segment is None or not self._segment.live or len(self.frames) < 2:
            return False
        first, second = self.frames[0], self.frames[1]
        return not first.end and bool(max(np.abs(first.audio_S).max(), np.abs(second.audio_S).max()) < _HUSHED)

    def after_silence(self) -> None:
        """Frames without sound were shown: the next sound begins in silence."""
        if not self.frames and not len(self._pending_S):
            self._before_S = np.zeros(FRAME_SAMPLES, np.float32)
