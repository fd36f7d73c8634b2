"""The async face of one stream, whichever path makes it.

    async with engine.open(image_HWC, "a person is talking") as session:
        session.push_audio(samples_S)     # from a microphone or a voice, whenever there is some
        async for shown in session:
            play(shown.frames_THWC, shown.sound_S)

Below this module everything is synchronous; here it crosses once, by one thread per session that asks the stream for
frames when somebody awaits them. Nothing is fetched ahead: what the caller has not been given counts as not played.
A wait that is cancelled loses nothing; the frames it waited for are what the next one returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import weakref
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Generator, Iterable, Iterator
from fractions import Fraction
from types import TracebackType
from typing import Any, TypeVar

from streamdiff.errors import SessionClosed
from streamdiff.stream import Can, Interrupted, Metrics, Samples, Segment, Shown, Stream

_NAP_S = 0.25
"""Longest sleep between two looks at whether the session still stands."""
_MAX_PIECES = 256
"""Pieces of a growing text that may wait for the voice."""

T = TypeVar("T")


class Session:
    """One stream on an event loop: an async context manager, and an async iterator of `Shown`.

    Everything but iterating, `prompt` and `aclose` takes no longer than a lock and may be called from any thread; see
    `Stream` for what the calls mean and raise. Errors of the stream are raised by every call that follows.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._reader = _Reader(stream)
        # Also ends the threads of a session that was dropped without being closed, and at the interpreter's exit.
        self._end = weakref.finalize(self, self._reader.stop)
        self._feeders: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()
        self._pending: asyncio.Future[Shown | None] | None = None
        self._closing: asyncio.Future[None] | None = None
        self._given_s = Fraction(0)
        self._cursor_s: float | None = None
        self._epoch = 0
        self._cut_s = Fraction(0)

    @property
    def fps(self) -> int:
        """Frames per second."""
        return self._stream.fps

    @property
    def rate_hz(self) -> int:
        """Samples per second of the sound that comes out."""
        return self._stream.rate_hz

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a frame."""
        return self._stream.size

    @property
    def can(self) -> frozenset[Can]:
        """What this session can do; calling anything else raises `Unsupported`."""
        return self._stream.can

    @property
    def metrics(self) -> Metrics:
        """What happened so far."""
        return self._stream.metrics

    @property
    def is_closed(self) -> bool:
        """Whether `aclose` was called."""
        return self._closing is not None

    def push_audio(self, samples: Samples, rate_hz: int | None = None, *, last: bool = False) -> Segment:
        """Speak this sound; see `Stream.push_audio`."""
        self._require_open("push_audio")
        return self._stream.push_audio(samples, rate_hz, last=last)

    def say(self, text: str | Iterable[str] | AsyncIterable[str]) -> Segment:
        """Speak this text, which may still be growing; see `Stream.say`. An async iterable needs a running loop."""
        self._require_open("say")
        if not isinstance(text, AsyncIterable):
            return self._stream.say(text)
        return self._say_growing(text)

    def end(self) -> None:
        """End the utterance that is being pushed; see `Stream.end`."""
        self._require_open("end")
        self._stream.end()

    def finish(self) -> None:
        """Nothing more will be said: the iteration ends when all has been shown; see `Stream.finish`."""
        self._require_open("finish")
        self._stream.finish()

    def listen(self, listening: bool = True) -> None:
        """Say whether somebody is speaking to the face; see `Stream.listen`."""
        self._require_open("listen")
        self._stream.listen(listening)

    async def prompt(self, text: str) -> None:
        """Follow another prompt; returns when it has been encoded. See `Stream.prompt`."""
        self._require_open("prompt")
        await _in_thread(lambda: self._stream.prompt(text), "prompt")

    def played(self, position_s: float) -> None:
        """Say how far a player with a buffer has come; without it, what the iteration gave counts as played."""
        self._require_open("played")
        self._cursor_s = position_s
        self._stream.played(position_s)

    def interrupt(self, played_s: float | None = None) -> Interrupted:
        """Stop speaking at once; see `Stream.interrupt`."""
        self._require_open("interrupt")
        given_s = float(self._given_s)
        cursor_s = self._cursor_s if played_s is None else played_s
        interrupted = self._stream.interrupt(given_s if cursor_s is None else min(cursor_s, given_s))
        self._epoch, self._cut_s = interrupted.epoch, interrupted.cut_s
        self._given_s = min(self._given_s, interrupted.cut_s)
        return interrupted

    def __aiter__(self) -> AsyncIterator[Shown]:
        self._require_open("iteration")
        return self

    async def __anext__(self) -> Shown:
        while True:
            shown = await self._fetch()
            if shown is None:
                raise StopAsyncIteration
            if shown.epoch >= self._epoch or shown.pts < self._cut_s:
                self._given_s = shown.pts + Fraction(len(shown.frames_THWC), self.fps)
                return shown

    async def _fetch(self) -> Shown | None:
        """The frames that were asked for last and given to nobody, or the next."""
        async with self._turn:
            if self._pending is None:
                if self.is_closed:
                    return None
                self._pending = self._reader.ask()
            try:
                # Shielded: whoever gives up waiting leaves the frames to the next one.
                shown = await asyncio.shield(self._pending)
            except asyncio.CancelledError:
                if not self._pending.cancelled():
                    raise
                shown = None
            except SessionClosed:
                if not self.is_closed:
                    self._pending = None
                    raise
                shown = None
            except BaseException:
                self._pending = None
                raise
            self._pending = None
            return shown

    async def aclose(self) -> None:
        """End the stream now, and wait until its threads have ended; idempotent, and whole even if cancelled."""
        for task in self._feeders:
            task.cancel()
        if self._closing is None:
            self._closing = _in_thread(self._end, "close")
        await asyncio.shield(self._closing)

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _require_open(self, what: str) -> None:
        if self.is_closed:
            raise SessionClosed(f"{what}() after the session ended; open a new one")

    def _say_growing(self, text: AsyncIterable[str]) -> Segment:
        pieces: queue.Queue[str | BaseException | None] = queue.Queue(_MAX_PIECES)
        segment: Segment | None = None

        def wanted() -> bool:
            return (segment is None or not segment.done) and not self.is_closed

        def arriving() -> Iterator[str]:
            while wanted():
                with contextlib.suppress(queue.Empty):
                    piece = pieces.get(timeout=_NAP_S)
                    if piece is None:
                        return
                    if isinstance(piece, BaseException):
                        raise piece
                    yield piece

        async def put(piece: str | BaseException | None) -> None:
            while wanted():
                try:
                    pieces.put_nowait(piece)
                except queue.Full:
                    await asyncio.sleep(_NAP_S / 10)
                else:
                    return

        async def feed() -> None:
            end: BaseException | None = None
            try:
                async for piece in text:
                    if not wanted():
                        return
                    await put(piece)
            except Exception as error:  # noqa: BLE001  told by the segment, where the speaker of the text can see it
                end = error
            finally:
                await put(end)

        segment = self._stream.say(arriving())
        task = asyncio.get_running_loop().create_task(feed())
        self._feeders.add(task)
        task.add_done_callback(self._feeders.discard)
        return segment


class Opening(Awaitable[Session]):
    """A session that is being made: await it, or enter it with ``async with``. Making it blocks no event loop."""

    def __init__(self, make: Callable[[], Stream]) -> None:
        self._make = make
        self._session: Session | None = None

    def __await__(self) -> Generator[Any, None, Session]:
        return self._open().__await__()

    async def _open(self) -> Session:
        return Session(await _in_thread(self._make, "open", unwanted=lambda stream: stream.close()))

    async def __aenter__(self) -> Session:
        self._session = await self._open()
        return self._session

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.aclose()


class _Reader:
    """Asks a stream for frames, one at a time, in a thread. Knows nothing of the session, which may be dropped."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._requests: queue.SimpleQueue[asyncio.Future[Shown | None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stopped = False

    def ask(self) -> asyncio.Future[Shown | None]:
        """The next frames, when they are there."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="session-reader", daemon=True)
            self._thread.start()
        future: asyncio.Future[Shown | None] = asyncio.get_running_loop().create_future()
        future.add_done_callback(_seen)
        self._requests.put(future)
        return future

    def stop(self) -> None:
        """Close the stream and end the thread; waits for a bounded time."""
        self._stopped = True
        self._requests.put(None)
        self._stream.close()
        if self._thread is not None:
            self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while (future := self._requests.get()) is not None:
            try:
                _settle(future, self._next(), None)
            except BaseException as error:  # noqa: BLE001  raised where the frames are awaited
                _settle(future, None, error)

    def _next(self) -> Shown | None:
        while True:
            try:
                return self._stream.next(_NAP_S)
            except TimeoutError:
                if self._stopped:
                    raise SessionClosed("the session was closed") from None


def _seen(future: asyncio.Future[Any]) -> None:
    """An error that nobody waits for any more is told by the next call, not by the loop's log."""
    if not future.cancelled():
        future.exception()


def _in_thread(work: Callable[[], T], name: str, unwanted: Callable[[T], None] | None = None) -> asyncio.Future[T]:
    """Do something slow in a thread of its own: the loop's few executor threads belong to the application.

    ``unwanted`` is called, in a thread, with a result that nobody waits for any more: the wait was cancelled, or the
    loop has ended.
    """
    future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

    def run() -> None:
        try:
            value = work()
        except BaseException as error:  # noqa: BLE001  raised where it is awaited
            _settle(future, None, error)
            return
        if not _settle(future, value, None) and unwanted is not None:
            unwanted(value)

    threading.Thread(target=run, name=f"session-{name}", daemon=True).start()
    return future


def _settle(future: asyncio.Future[Any], value: object, error: BaseException | None) -> bool:
    """Give a future its result from another thread; False when it is too late: cancelled, or its loop is gone."""

    def settle() -> None:
        if future.done():
            return
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)

    if future.cancelled():
        return False
    try:
        future.get_loop().call_soon_threadsafe(settle)
    except RuntimeError:  # the loop is closed
        return False
    return True
