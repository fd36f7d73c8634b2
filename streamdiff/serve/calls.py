"""Calls: sessions on the air. Every door begins and ends here.

    call = await calls.open("ann", avatar="demo")     # leases a seat first, or raises Refused
    viewer = Viewer(call.pump)                        # pictures and sound; see `pump`
    call.subscribe(listener)                          # events: captions, states, latencies, the end
    call.do(Say("Hello."))                            # commands
    await calls.end(call, Ending.LEFT)

A call outlives its viewers: one that lost its connection attaches again, with the same id, for `Terms.linger_s`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from streamdiff.errors import InputError, SessionClosed, StreamdiffError, Unsupported
from streamdiff.serve.encoder import Codec
from streamdiff.serve.leases import Lease, Leases, Refused
from streamdiff.serve.metrics import Meters
from streamdiff.serve.permits import Permits
from streamdiff.serve.protocol import (
    APPEND_HZ,
    Append,
    Bye,
    Caption,
    Command,
    Doing,
    Ended,
    Ending,
    Event,
    Interrupt,
    Latency,
    Listen,
    Problem,
    Prompt,
    Ready,
    Report,
    Say,
    Status,
    Stopped,
)
from streamdiff.serve.pump import Beat, Pump, Source
from streamdiff.serve.register import Register
from streamdiff.stream import Can, Interrupted, Segment, State
from streamdiff.trust.audit import AuditError
from streamdiff.trust.consent import ConsentError

logger = logging.getLogger(__name__)

Opener: TypeAlias = Callable[[str], AbstractAsyncContextManager[Source]]
"""From the name of an avatar to its session, not opened yet. Called in a thread; InputError for no such avatar."""
Listener: TypeAlias = Callable[[Event], None]

_SWEEP_S = 0.5
_KEPT_SEGMENTS = 32


class Talk(Protocol):
    """Who answers in a call. `conversation` makes one of an ear and a mind; `Reader` only reads aloud."""

    @property
    def hears(self) -> bool:
        """Whether `hear` does anything."""
        ...

    @property
    def mind(self) -> str:
        """Who answers; empty: nobody, texts are spoken as they are."""
        ...

    def text(self, text: str) -> None:
        """Somebody typed this."""
        ...

    def hear(self, samples_S: NDArray[np.float32], rate_hz: int) -> None:
        """Sound from the microphone, mono; any thread."""
        ...

    def stop(self, heard_s: float | None) -> None:
        """Somebody wants silence; ``heard_s`` as in `Call.interrupt`, which this calls."""
        ...

    async def aclose(self) -> None:
        """The call ends."""
        ...


TalkFactory: TypeAlias = "Callable[[Call], Talk]"


class Reader:
    """Reads aloud what is typed, and hears nothing."""

    hears = False
    mind = ""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._turn = 0

    def text(self, text: str) -> None:
        self._turn += 1
        self._call.emit(Caption("avatar", text, self._turn))
        self._call.expect(self._call.session.say(text), self._turn)

    def hear(self, samples_S: NDArray[np.float32], rate_hz: int) -> None:
        del samples_S, rate_hz

    def stop(self, heard_s: float | None) -> None:
        self._call.interrupt(heard_s)

    async def aclose(self) -> None:
        pass


class Call:
    """One session on the air, with its lease, its pump, and whoever listens to its events.

    Made by `Calls.open`. All methods belong to the event loop's thread, but `hear`.
    """

    is_encoded = False  # a sink of its own pump: it watches what leaves

    def __init__(
        self, lease: Lease, session: Source, pump: Pump, leases: Leases, meters: Meters, *, avatar: str = ""
    ) -> None:
        self.avatar = avatar
        self.lease, self.session, self.pump, self.meters = lease, session, pump, meters
        self.id = lease.id
        self.log_id = _log_id(lease)
        """What the logs call it: the id itself opens the session."""
        self.talk: Talk = Reader(self)
        self.is_recorded = False
        """Whether a `record.Recorder` films it."""
        self.wants_end: Ending | None = None
        """Set when the client said goodbye; `Calls` ends the call then."""
        self._leases = leases
        self._listeners: list[Listener] = []
        self._segments: dict[int, tuple[Segment, int]] = {}
        self._doing: Doing = "idle"
        self._thinking = False
        self._heard_delay_s = 0.0
        self._last_report = Report()
        self._stopped_s: float | None = None
        self._num_late = self._num_dropped = self._num_keys = 0
        pump.attach(self)

    @property
    def ready(self) -> Ready:
        """The first event for anybody who joins."""
        height, width = self.session.size
        can = tuple(sorted(self.session.can))
        return Ready(
            self.id,
            self.session.fps,
            self.session.rate_hz,
            width,
            height,
            can,
            self.talk.hears,
            self.talk.mind,
            self.is_recorded,
        )

    def subscribe(self, listener: Listener) -> None:
        """Tell this listener every event from now on, beginning with `Ready` and the present `Status`."""
        self._listeners.append(listener)
        listener(self.ready)
        listener(self._status)

    def unsubscribe(self, listener: Listener) -> None:
        """Tell it nothing more; idempotent."""
        self._listeners = [other for other in self._listeners if other is not listener]

    def emit(self, event: Event) -> None:
        """Tell all listeners."""
        if isinstance(event, Latency):
            self.meters.stage(event.stage, event.ms)
        for listener in tuple(self._listeners):
            listener(event)

    def watched(self) -> None:
        """A viewer came or went: `Pump.attach` and `Pump.detach` of an encoded sink are followed by this."""
        self._leases.watch(self.lease, self.pump.num_viewers)

    def touch(self) -> None:
        """Somebody does something: the call is not idle."""
        self._leases.touch(self.lease)

    def expect(self, segment: Segment, turn: int) -> None:
        """This utterance belongs to that turn: its latencies are told when its first frame leaves."""
        self._segments[segment.id] = (segment, turn)
        while len(self._segments) > _KEPT_SEGMENTS:
            self._segments.pop(next(iter(self._segments)))

    def thinking(self, thinking: bool) -> None:
        """Whether an answer is being thought of."""
        self._tell(self._doing, thinking)

    def do(self, command: Command) -> None:
        """Obey a command. What cannot be done is told as a `Problem`; never raises for what a client sent."""
        try:
            self._obey(command)
        except (InputError, Unsupported) as error:
            self.problem("refused", str(error))
        except SessionClosed as error:
            self.problem("closed", str(error))

    def problem(self, code: str, text: str) -> None:
        """Tell the client that something did not work."""
        self.meters.problems.labels(code).inc()
        self.emit(Problem(code, text))

    def interrupt(self, heard_s: float | None = None) -> Interrupted:
        """Stop speaking, and tell everybody how much of the utterance was heard: ``played_s`` of what is returned.

        ``heard_s``: position in the stream that the listener has reached; None: estimated from what was sent and the
        delay that the browser last reported.
        """
        sent_s = self.pump.head.sent_s
        if heard_s is None:
            heard_s = self.pump.head.heard_s(self._heard_delay_s)
        done = self.pump.interrupt()
        heard_of_it_s = max(0.0, done.played_s - max(0.0, sent_s - heard_s))
        if done.segment:
            self._stopped_s = time.monotonic()
        self.emit(Stopped(done.segment, round(heard_of_it_s, 3), done.dropped))
        return dataclasses.replace(done, played_s=heard_of_it_s)

    def hear(self, samples_S: NDArray[np.float32], rate_hz: int) -> None:
        """Sound from the client's microphone, mono -1..1; any thread."""
        self.talk.hear(samples_S, rate_hz)

    def put(self, beat: Beat) -> None:
        """Of `Sink`: watch what leaves."""
        self.meters.beats.inc()
        if beat.segment in self._segments:
            segment, turn = self._segments.pop(beat.segment)
            for stage, ms in (("voice", segment.voice_ms), ("face", segment.video_ms), ("encode", self.pump.encode_ms)):
                if ms is not None:
                    self.emit(Latency(stage, round(ms, 1), turn))
        if self._stopped_s is not None and not beat.segment:
            self.emit(Latency("interrupt", round((time.monotonic() - self._stopped_s) * 1e3, 1), 0))
            self._stopped_s = None
        doing = "speaking" if beat.segment else "listening" if beat.state is State.LISTENING else "idle"
        self._tell(doing, self._thinking and not beat.segment)
        if beat.index % 25 == 0:
            self._count()

    def end(self, reason: Ending) -> None:
        """Of `Sink`: the last event."""
        self._count()
        self.emit(Ended(reason))
        self._listeners.clear()

    def _obey(self, command: Command) -> None:
        if not isinstance(command, Report | Append):
            self.touch()
        match command:
            case Say(text):
                self.talk.text(text)
            case Interrupt(heard_s):
                self.talk.stop(heard_s)
            case Listen(listening):
                if Can.LISTEN in self.session.can:
                    self.session.listen(listening)
            case Prompt(text):
                self._prompt(text)
            case Report():
                self._report(command)
            case Append(audio):
                self.hear(_samples(audio), APPEND_HZ)
            case Bye():
                self.wants_end = Ending.LEFT

    def _prompt(self, text: str) -> None:
        if Can.PROMPT not in self.session.can:
            raise Unsupported("this face follows no prompts; it is spoken to with say")
        task = asyncio.ensure_future(self.session.prompt(text))
        task.add_done_callback(self._prompted)

    def _prompted(self, done: asyncio.Future[None]) -> None:
        if not done.cancelled() and (error := done.exception()) is not None:
            self.problem("refused", str(error))

    def _report(self, report: Report) -> None:
        before, self._last_report = self._last_report, report
        self._heard_delay_s = min(2.0, (report.jitter_buffer_ms + report.round_trip_ms / 2) / 1e3)
        self.meters.freezes.inc(max(0, report.freezes - before.freezes))
        self.meters.concealed.inc(max(0, report.concealed_samples - before.concealed_samples))
        self.meters.jitter_ms.observe(report.jitter_buffer_ms)
        self.meters.round_trip_ms.observe(report.round_trip_ms)

    @property
    def _status(self) -> Status:
        return Status("thinking" if self._thinking and self._doing != "speaking" else self._doing)

    def _tell(self, doing: Doing, thinking: bool) -> None:
        before = self._status
        self._doing, self._thinking = doing, thinking
        if self._status != before:
            self.emit(self._status)

    def _count(self) -> None:
        """Carry over to the counters what the stream has counted since."""
        metrics = self.session.metrics
        self.meters.late.inc(max(0, metrics.late_frames - self._num_late))
        self.meters.dropped.inc(max(0, metrics.dropped_frames - self._num_dropped))
        self.meters.keys.inc(max(0, self.pump.num_keys - self._num_keys))
        self._num_late, self._num_dropped, self._num_keys = (
            metrics.late_frames,
            metrics.dropped_frames,
            self.pump.num_keys,
        )


class Calls:
    """All calls of one server. Use as an async context manager: leaving it ends every call.

    Args:
        leases: the seats.
        opener: makes the session of an avatar.
        talk: who answers; None: nobody, what is typed is read aloud.
        permits: whom may be shown to whom; None: everybody.
        register: where sessions are recorded; None: nowhere.
        mark: words on every frame of every session; empty: none.
        watch: told of every call that begins; None: nobody.
        executor: threads that encode; None: two of its own.
    """

    def __init__(
        self,
        leases: Leases,
        opener: Opener,
        *,
        talk: TalkFactory | None = None,
        codec: Codec = "vp8",
        meters: Meters | None = None,
        permits: Permits | None = None,
        register: Register | None = None,
        mark: str = "",
        watch: Callable[[Call], None] | None = None,
        executor: Executor | None = None,
    ) -> None:
        self._permits, self._register, self._mark, self._watch = permits, register, mark, watch
        self.leases, self.meters = leases, meters or Meters()
        self.meters.capacity.set(leases.terms.capacity)
        self._opener, self._talk = opener, talk
        self._codec: Codec = codec
        self._own_pool = None if executor else ThreadPoolExecutor(2, thread_name_prefix="encode")
        self._executor = executor or self._own_pool
        # A thread waits for each session's next frame: the loop's own pool is too small for that.
        self._blocking = ThreadPoolExecutor(2 * leases.terms.capacity + 8, thread_name_prefix="session")
        self._calls: dict[str, Call] = {}
        self._closers: dict[str, AsyncExitStack] = {}
        self._tasks: dict[str, asyncio.Task[Ending]] = {}
        self._ends: set[asyncio.Task[None]] = set()
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def all(self) -> tuple[Call, ...]:
        """Calls that stand, oldest first."""
        return tuple(self._calls.values())

    def find(self, call_id: str) -> Call | None:
        """The call with this id, if it stands."""
        return self._calls.get(call_id)

    async def open(self, user: str, *, avatar: str = "", priority: int = 0, wait_s: float = 0.0) -> Call:
        """Lease a seat, then put a session on the air.

        Raises:
            Refused: no seat (`NoCapacity`, `UserLimit`, `Draining`); nothing was allocated.
            InputError: no such avatar, or what opening it failed with; the seat is given back.
            ConsentError: this avatar may not be shown to this user; nothing was allocated.
        """
        if self._permits is not None:
            await self._permit(self._permits, avatar, user)
        try:
            lease = await self.leases.wait(user, priority=priority, timeout_s=wait_s)
        except Refused as error:
            self.meters.refused.labels(error.code).inc()
            raise
        try:
            if self._register is not None:
                await asyncio.to_thread(self._register.opened, _log_id(lease), user, avatar)
            call = await self._start(lease, avatar)
        except BaseException as error:
            self.leases.release(lease, Ending.FAILED)
            if isinstance(error, Refused):
                self.meters.refused.labels(error.code).inc()
            else:
                self._record(lease, Ending.FAILED)
            raise
        self.meters.opened.inc()
        self.meters.sessions.set(len(self._calls))
        logger.info("session %s: opened, %d of %d", call.log_id, len(self._calls), self.leases.terms.capacity)
        return call

    async def end(self, call: Call, reason: Ending) -> None:
        """End a call: tell everybody why, stop the stream, give the seat back. Idempotent."""
        if self._calls.pop(call.id, None) is None:
            return
        call.pump.stop(reason)
        reason = call.pump.ending or reason
        task, closer = self._tasks.pop(call.id), self._closers.pop(call.id)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(10.0):
                    await call.talk.aclose()
                    await closer.aclose()
                    await asyncio.wait([task], timeout=5.0)
        except StreamdiffError:
            logger.exception("session %s: closing it failed", call.log_id)
        finally:
            task.cancel()
            self.leases.release(call.lease, reason)
            self._record(call.lease, reason)
            self.meters.ended.labels(reason.value).inc()
            self.meters.sessions.set(len(self._calls))
            lasted_s = time.monotonic() - call.lease.since_s
            logger.info("session %s: ended, %s, after %.1f s", call.log_id, reason.value, lasted_s)

    async def drain(self, timeout_s: float) -> None:
        """Take nobody in; let every face finish what it is saying, for at most ``timeout_s``; end all calls."""
        self.leases.drain()
        until_s = time.monotonic() + timeout_s
        await asyncio.gather(*(self._finish(call, until_s) for call in self.all))

    async def __aenter__(self) -> Calls:
        asyncio.get_running_loop().set_default_executor(self._blocking)
        self._sweeper = asyncio.create_task(self._sweep())
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.drain(0.0)
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._ends:
            await asyncio.wait(self._ends, timeout=10.0)
        if self._own_pool is not None:
            self._own_pool.shutdown(wait=False)

    async def _permit(self, permits: Permits, avatar: str, user: str) -> None:
        try:
            await asyncio.to_thread(permits.check, avatar, user)
        except ConsentError:
            self.meters.refused.labels("consent").inc()
            raise

    async def _start(self, lease: Lease, avatar: str) -> Call:
        async with AsyncExitStack() as stack:
            opened = await asyncio.to_thread(self._opener, avatar)
            session = await stack.enter_async_context(opened)
            pump = Pump(session, codec=self._codec, executor=self._executor, mark=self._mark)
            call = Call(lease, session, pump, self.leases, self.meters, avatar=avatar)
            if self._talk is not None:
                call.talk = self._talk(call)
            self._closers[call.id] = stack.pop_all()
        if self._watch is not None:
            self._watch(call)
        self._calls[call.id] = call
        self._tasks[call.id] = task = asyncio.create_task(pump.run())
        task.add_done_callback(lambda _: self._end_soon(call, Ending.FINISHED))
        return call

    def _end_soon(self, call: Call, reason: Ending) -> None:
        if call.id in self._calls:
            task = asyncio.get_running_loop().create_task(self.end(call, reason))
            self._ends.add(task)
            task.add_done_callback(self._ends.discard)

    async def _finish(self, call: Call, until_s: float) -> None:
        """Let a call come to the end of what it says."""
        watch = _Quiet(call)
        call.pump.attach(watch)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, until_s - time.monotonic())):
                await watch.quiet.wait()
        await self.end(call, Ending.DRAINED)

    async def _sweep(self) -> None:
        """End calls whose time is up, and those whose clients said goodbye."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            if self._permits is not None:
                await self._revoke(self._permits)
            for lease, reason in self.leases.expired():
                if (call := self._calls.get(lease.id)) is not None:
                    self._end_soon(call, reason)
            for call in self.all:
                if call.wants_end is not None:
                    self._end_soon(call, call.wants_end)
            self.meters.viewers.set(sum(call.pump.num_viewers for call in self.all))

    async def _revoke(self, permits: Permits) -> None:
        """End calls whose consent does not hold any more."""
        asked = {(call.avatar, call.lease.user) for call in self.all}
        doubts = await asyncio.to_thread(permits.doubts, asked)
        for call in self.all:
            if why := doubts.get((call.avatar, call.lease.user)):
                logger.info("session %s: %s", call.log_id, why)
                self._end_soon(call, Ending.REVOKED)

    def _record(self, lease: Lease, reason: Ending) -> None:
        """Write into the audit log that a session has ended, in a thread."""
        if self._register is not None:
            lasted_s = time.monotonic() - lease.since_s
            task = asyncio.get_running_loop().create_task(self._write_end(self._register, lease, reason, lasted_s))
            self._ends.add(task)
            task.add_done_callback(self._ends.discard)

    async def _write_end(self, register: Register, lease: Lease, reason: Ending, lasted_s: float) -> None:
        try:
            await asyncio.to_thread(register.ended, _log_id(lease), reason, lasted_s)
        except AuditError as error:
            logger.error("session %s: its end is not recorded: %s", _log_id(lease), error)


def _samples(audio: str) -> NDArray[np.float32]:
    """The sound in an `Append`, -1..1. InputError: there is none."""
    try:
        samples_S = np.frombuffer(base64.b64decode(audio, validate=True), "<i2")
    except ValueError:
        raise InputError("audio must be base64 of little-endian int16 samples") from None
    return samples_S.astype(np.float32) / np.float32(32_768)


def _log_id(lease: Lease) -> str:
    """What logs call a session: its id itself opens it."""
    where, dot, token = lease.id.rpartition(".")
    return where + dot + token[:6]


class _Quiet:
    """A sink that waits for the first beat in which nothing is said."""

    is_encoded = False

    def __init__(self, call: Call) -> None:
        self._call = call
        self.quiet = asyncio.Event()

    def put(self, beat: Beat) -> None:
        if beat.segment == 0 or beat.ends_segment:
            self.quiet.set()

    def end(self, reason: Ending) -> None:
        del reason
        self.quiet.set()
