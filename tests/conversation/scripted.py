"""A face that speaks by the clock of the event loop, and a loop whose clock jumps: tests of talks take no time."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import AsyncIterable, AsyncIterator, Coroutine, Iterable
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np

from streamdiff.conversation.events import ConversationEvent
from streamdiff.conversation.loop import Conversation
from streamdiff.stream import Can, Interrupted, Segment, Shown

T = TypeVar("T")

RATE_HZ, FPS = 16_000, 25
LETTERS_PER_S = 20.0


class _Jumping(selectors.SelectSelector):
    """Waits for nothing: the clock is set to when the wait would have ended."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0 if timeout is not None else None)
        if not ready and timeout is not None:
            self.now_s += max(timeout, 1e-6)
        return ready


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop that takes no time for sleeping."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s


def run(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(work)


class ScriptedFace:
    """Speaks 20 letters a second from a quarter of a second after it was asked, a frame every 40 ms."""

    rate_hz = RATE_HZ
    can = frozenset({Can.SAY, Can.LISTEN})

    def __init__(self, *, delay_s: float = 0.25) -> None:
        self._delay_s = delay_s
        self._waiting: list[tuple[Segment, asyncio.Queue[str | None]]] = []
        self._feeders: set[asyncio.Task[None]] = set()
        self._text = ""
        self._letters = 0.0
        self._begins_s = 0.0
        self._is_written = False
        self._num = 0
        self._index = 0
        self.heard = ""
        """All that was heard of it."""
        self.listening: list[bool] = []
        self.num_interruptions = 0

    def say(self, text: str | Iterable[str] | AsyncIterable[str]) -> Segment:
        self._num += 1
        segment, pieces = Segment(self._num, live=False, epoch=0), asyncio.Queue[str | None]()
        assert isinstance(text, AsyncIterable)
        task = asyncio.get_running_loop().create_task(_feed(text, pieces))
        self._feeders.add(task)
        task.add_done_callback(self._feeders.discard)
        self._waiting.append((segment, pieces))
        if len(self._waiting) == 1:
            self._begin()
        return segment

    def _begin(self) -> None:
        self._text, self._letters, self._is_written = "", 0.0, False
        self._begins_s = asyncio.get_running_loop().time() + self._delay_s

    def listen(self, listening: bool = True) -> None:
        self.listening.append(listening)

    def interrupt(self, played_s: float | None = None) -> Interrupted:
        self.num_interruptions += 1
        segment = self._waiting[0][0].id if self._waiting and self._letters else 0
        played = self._letters / LETTERS_PER_S if segment else 0.0
        now_s = Fraction(self._index, FPS)
        self._end(interrupted=True)
        return Interrupted(epoch=1, segment=segment, played_s=played, dropped=0, resumes_s=now_s, cut_s=now_s)

    def _end(self, *, interrupted: bool) -> None:
        self.heard += self._text[: round(self._letters)]
        for segment, _ in self._waiting[: None if interrupted else 1]:
            segment.finish(interrupted=interrupted)
        del self._waiting[: None if interrupted else 1]
        self._text = ""
        if interrupted:
            for task in self._feeders:
                task.cancel()

    def _frame(self) -> Shown:
        sound_S, number, ends = np.zeros(RATE_HZ // FPS, np.float32), 0, False
        if self._waiting:
            segment, pieces = self._waiting[0]
            while not pieces.empty():
                piece = pieces.get_nowait()
                self._is_written |= piece is None
                self._text += piece or ""
            if asyncio.get_running_loop().time() >= self._begins_s and self._letters < len(self._text):
                self._letters = min(self._letters + LETTERS_PER_S / FPS, len(self._text))
                sound_S[:], number = 0.1, segment.id
                segment.num_shown += 1
            if self._is_written and self._letters >= len(self._text):
                ends = True
                self._end(interrupted=False)
                if self._waiting:
                    self._begin()
        frames = np.zeros((1, 8, 8, 3), np.uint8)
        self._index += 1
        pts = Fraction(self._index - 1, FPS)
        return Shown(
            frames_THWC=frames,
            sound_S=sound_S,
            index=self._index - 1,
            pts=pts,
            epoch=0,
            segment=number,
            ends_segment=ends,
        )

    async def __aiter__(self) -> AsyncIterator[Shown]:
        while True:
            await asyncio.sleep(1 / FPS)
            yield self._frame()

    async def aclose(self) -> None:
        for task in list(self._feeders):
            task.cancel()
        await asyncio.gather(*self._feeders, return_exceptions=True)


async def _feed(text: AsyncIterable[str], pieces: asyncio.Queue[str | None]) -> None:
    try:
        async for piece in text:
            pieces.put_nowait(piece)
    finally:
        pieces.put_nowait(None)


class Evening:
    """A conversation whose frames are taken and whose events are kept."""

    def __init__(self, talk: Conversation, *speakers: str) -> None:
        self.talk = talk
        self.events: list[ConversationEvent] = []
        self._speakers = speakers or ("",)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Evening:
        await self.talk.__aenter__()
        self._tasks = [asyncio.create_task(self._watch(name)) for name in self._speakers]
        self._tasks.append(asyncio.create_task(self._keep()))
        return self

    async def _watch(self, name: str) -> None:
        async for _ in self.talk.frames(name):
            pass

    async def _keep(self) -> None:
        async for event in self.talk.events():
            self.events.append(event)

    async def __aexit__(self, *exc: Any) -> None:
        await asyncio.sleep(0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.talk.__aexit__(None, None, None)

    async def hear(self, num: int = 1) -> None:
        """Let the ear take lines of its script, one every 32 ms."""
        for _ in range(num):
            self.talk.hear(np.zeros(512, np.float32), RATE_HZ)
            await asyncio.sleep(0.032)

    def of(self, kind: type[T]) -> list[T]:
        return [event for event in self.events if isinstance(event, kind)]
