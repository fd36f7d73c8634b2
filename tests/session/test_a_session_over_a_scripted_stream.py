"""What a session adds to a stream, frame by frame: what counts as played, and which frames are stale."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from fractions import Fraction

import numpy as np
import pytest

from streamdiff.session import Session
from streamdiff.stream import Can, Interrupted, Metrics, Samples, Segment, Shown
from tests.session.faces import run

FPS = 10


class Scripted:
    """A stream of single frames that shows what it was told to, and cuts where it was told to."""

    fps, rate_hz, size = FPS, 1000, (2, 2)
    can = frozenset[Can]()

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.frames: deque[Shown] = deque()
        self.cuts: deque[Fraction] = deque()
        self.told: list[float | None] = []
        self.said_played: list[float] = []
        self.ready = threading.Semaphore(0)
        self.taken = threading.Semaphore(0)

    def show(self, *indices: int, epoch: int = 0) -> None:
        for index in indices:
            frame_THWC, sound_S = np.zeros((1, 2, 2, 3), np.uint8), np.zeros(100, np.float32)
            self.frames.append(
                Shown(frames_THWC=frame_THWC, sound_S=sound_S, index=index, pts=Fraction(index, FPS), epoch=epoch)
            )
            self.ready.release()

    def next(self, timeout_s: float = 30.0) -> Shown | None:
        if not self.ready.acquire(timeout=timeout_s):
            raise TimeoutError
        shown = self.frames.popleft()
        self.taken.release()
        return shown

    def played(self, position_s: float) -> None:
        self.said_played.append(position_s)

    def interrupt(self, played_s: float | None = None) -> Interrupted:
        self.told.append(played_s)
        cut_s = self.cuts.popleft()
        return Interrupted(epoch=len(self.told), segment=1, played_s=0.0, dropped=0, cut_s=cut_s, resumes_s=cut_s)

    def close(self) -> None:
        pass

    def push_audio(self, samples: Samples, rate_hz: int | None = None, *, last: bool = False) -> Segment:
        raise NotImplementedError

    def say(self, text: object) -> Segment:
        raise NotImplementedError

    def end(self) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        raise NotImplementedError

    def listen(self, listening: bool = True) -> None:
        raise NotImplementedError

    def prompt(self, text: str) -> None:
        raise NotImplementedError

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def take(session: Session, count: int) -> list[int]:
    return [(await asyncio.wait_for(anext(session), 30)).index for _ in range(count)]


def test_what_was_given_counts_as_played_unless_the_player_says_less() -> None:
    async def scene() -> None:
        stream = Scripted()
        stream.show(*range(5))
        stream.cuts.extend([Fraction(5, FPS), Fraction(3, FPS), Fraction(3, FPS), Fraction(2, FPS), Fraction(2, FPS)])
        async with Session(stream) as session:
            assert await take(session, 5) == [0, 1, 2, 3, 4]
            session.interrupt()  # five frames were given
            session.interrupt(0.3)  # three of them were played
            session.interrupt(9.0)  # the stream goes on at the cut: nobody can have played more
            session.played(0.2)
            session.interrupt()
            session.interrupt(0.1)
        assert stream.told == pytest.approx([0.5, 0.3, 0.3, 0.2, 0.1])
        assert stream.said_played == [0.2]

    run(scene())


def test_frames_that_a_given_up_wait_left_are_shown_unless_they_are_stale() -> None:
    async def scene() -> None:
        stream = Scripted()
        async with Session(stream) as session:
            for cut, index in ((9, 0), (1, 1)):
                waiting = asyncio.ensure_future(anext(session))
                await asyncio.sleep(0)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
                stream.show(index)
                assert await asyncio.to_thread(stream.taken.acquire, timeout=30)
                if index:
                    stream.cuts.append(Fraction(cut, FPS))
                    session.interrupt()
                    stream.show(1, 2, epoch=1)
                else:
                    assert await take(session, 1) == [0]
            shown = [await asyncio.wait_for(anext(session), 30) for _ in range(2)]
            assert [(s.index, s.epoch) for s in shown] == [(1, 1), (2, 1)]

    run(scene())


def test_frames_of_before_the_cut_are_shown_after_an_interruption() -> None:
    async def scene() -> None:
        stream = Scripted()
        stream.cuts.append(Fraction(2, FPS))
        async with Session(stream) as session:
            session.interrupt()
            stream.show(0, 1, 2, 3)
            stream.show(2, 3, epoch=1)
            shown = [await asyncio.wait_for(anext(session), 30) for _ in range(4)]
            assert [(s.index, s.epoch) for s in shown] == [(0, 0), (1, 0), (2, 1), (3, 1)]

    run(scene())
