"""A stream that costs nothing, for tests of everything that stands above a session.

Pictures are flat grey, brighter while something is said; sound is a tone while something is said. One word takes
``word_s``. Interruptions and positions follow `streamdiff.stream.Stream`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from fractions import Fraction

import numpy as np

from streamdiff.errors import InputError, SessionClosed
from streamdiff.session import Session
from streamdiff.stream import Can, Interrupted, Metrics, PlayClock, Samples, Segment, Shown, State

FPS = 25


class ScriptedStream:
    """Says texts as tones. ``frames_per_chunk``: more than one, as the video model makes them."""

    fps = FPS
    can = frozenset({Can.SAY, Can.LISTEN})

    def __init__(
        self,
        *,
        word_s: float = 0.2,
        frames_per_chunk: int = 1,
        rate_hz: int = 24_000,
        side: int = 32,
        live: bool = True,
    ) -> None:
        self.rate_hz, self.size = rate_hz, (side, side)
        self.metrics = Metrics()
        self.fails_with: Exception | None = None
        self.closed = False
        self.stall_s = 0.0
        """Sleep so long before the next frame, once."""
        self._word_s, self._chunk, self._live = word_s, frames_per_chunk, live
        self._clock = PlayClock(FPS)
        self._lock = threading.Lock()
        self._queue: deque[tuple[Segment, int]] = deque()
        self._index = self._epoch = self._num = 0
        self._listening = self._finished = False
        self._heard: Segment | None = None

    def say(self, text: str | Iterable[str]) -> Segment:
        """Of `Stream`."""
        if isinstance(text, str) and not text.split():
            raise InputError("nothing to say; give words")
        with self._lock:
            segment = self._begin(live=False)
        if isinstance(text, str):
            self._speak(segment, text)
        else:  # it may still be growing, and nobody may be kept waiting for that
            threading.Thread(target=lambda: self._speak(segment, "".join(text)), daemon=True).start()
        return segment

    def push_audio(self, samples: Samples, rate_hz: int | None = None, *, last: bool = False) -> Segment:
        """Of `Stream`."""
        del last
        with self._lock:
            segment = self._begin(live=True)
            self._enqueue(segment, max(1, round(len(samples) / (rate_hz or self.rate_hz) * FPS)))
            return segment

    def end(self) -> None:
        """Of `Stream`."""

    def finish(self) -> None:
        """Of `Stream`."""
        self._finished = True

    def listen(self, listening: bool = True) -> None:
        """Of `Stream`."""
        self._listening = listening

    def prompt(self, text: str) -> None:
        """Of `Stream`."""
        raise NotImplementedError(text)

    def played(self, position_s: float) -> None:
        """Of `Stream`."""
        del position_s

    def interrupt(self, played_s: float | None = None) -> Interrupted:
        """Of `Stream`."""
        with self._lock:
            resumes = self._index if played_s is None else min(self._index, round(played_s * FPS))
            dropped, heard = self._index - resumes, self._heard
            if heard is None and not self._queue:
                return Interrupted(
                    epoch=self._epoch,
                    segment=0,
                    played_s=0.0,
                    dropped=0,
                    cut_s=Fraction(self._index, FPS),
                    resumes_s=Fraction(self._index, FPS),
                )
            self._epoch += 1
            self._index = resumes
            for segment, _ in self._queue:
                segment.finish(interrupted=True)
            self._queue.clear()
            self._heard = None
            self.metrics.interruptions += 1
            self.metrics.dropped_frames += dropped
            played = (heard.num_shown - dropped) / FPS if heard else 0.0
            return Interrupted(
                epoch=self._epoch,
                segment=heard.id if heard else 0,
                played_s=max(0.0, played),
                dropped=dropped,
                cut_s=Fraction(resumes, FPS),
                resumes_s=Fraction(resumes, FPS),
            )

    def next(self, timeout_s: float = 30.0) -> Shown | None:
        """Of `Stream`."""
        del timeout_s
        while self._live and not self.closed and (wait_s := self._clock.due_s(self._index) - time.monotonic()) > 0:
            time.sleep(min(wait_s, 0.05))
        stall_s, self.stall_s = self.stall_s, 0.0
        time.sleep(stall_s)
        with self._lock:
            if self.closed:
                raise SessionClosed("next() after close(); open a new stream")
            if self.fails_with is not None:
                raise self.fails_with
            if self._finished and not self._queue:
                return None
            late_s = self._clock.lateness_s(self._index) if self._live else 0.0
            return self._make(late_s)

    def close(self) -> None:
        """Of `Stream`."""
        self.closed = True

    def __enter__(self) -> ScriptedStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _speak(self, segment: Segment, text: str) -> None:
        with self._lock:
            self._enqueue(segment, max(1, round(len(text.split()) * self._word_s * FPS)))

    def _begin(self, *, live: bool) -> Segment:
        if self.closed:
            raise SessionClosed("say() after close(); open a new stream")
        self._num += 1
        segment = Segment(self._num, live=live, epoch=self._epoch)
        self.metrics.segments += 1
        return segment

    def _enqueue(self, segment: Segment, frames: int) -> None:
        if segment.epoch != self._epoch:
            segment.finish(interrupted=True)
            return
        segment.voiced_s = time.monotonic()
        self._queue.append((segment, frames))

    def _make(self, late_s: float) -> Shown:
        segment, ends = None, False
        if self._queue:
            segment, left = self._queue.popleft()
            segment.shown_s = segment.shown_s or time.monotonic()
            segment.num_shown += self._chunk
            if left > self._chunk:
                self._queue.appendleft((segment, left - self._chunk))
            else:
                ends = True
                segment.finish()
        self._heard = None if ends else segment
        index, self._index = self._index, self._index + self._chunk
        self.metrics.frames += self._chunk
        self.metrics.late_frames += late_s > 0
        size = round(self._chunk * self.rate_hz / FPS)
        first = round(index * self.rate_hz / FPS)
        tone_S = 0.3 * np.sin(2 * np.pi * 440 * (first + np.arange(size)) / self.rate_hz) * (segment is not None)
        grey = 60 if segment is None else 180 + index % 25
        return Shown(
            frames_THWC=np.full((self._chunk, *self.size, 3), grey, np.uint8),
            sound_S=tone_S.astype(np.float32),
            index=index,
            pts=Fraction(index, FPS),
            epoch=self._epoch,
            segment=segment.id if segment else 0,
            ends_segment=ends,
            state=State.SPEAKING if segment else State.LISTENING if self._listening else State.IDLE,
            late_s=late_s,
        )


class Stage:
    """An opener of scripted sessions that remembers them."""

    def __init__(self, **options: float) -> None:
        self.streams: list[ScriptedStream] = []
        self._options = options

    def __call__(self, avatar: str) -> Session:
        if avatar == "nobody":
            raise InputError("there is no avatar 'nobody'; known: demo")
        self.streams.append(ScriptedStream(**self._options))  # type: ignore[arg-type]
        return Session(self.streams[-1])
