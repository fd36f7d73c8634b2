"""Who is to blame when the stream falls: every rank watches every other, and all of them name the same one.

Each rank writes a heartbeat that says what it is doing, on which chunk, for how long, and reads those of the
others from a store that all can reach. A verdict (`Failure`) is reached by whoever sees it first and written
once; the rest read it. A rank that merely waits is never blamed.

    silent for half the deadline                 killed, stopped, or cut off
    working on one chunk for the whole deadline  hung in its step
    closed its connection, and is not done       died
    failed with an error of its own              says so itself, before it leaves
    all wait for each other                      nobody: a packet was lost, or the schedule is wrong

The main thread only ever sleeps in short naps and asks `Watch.check` in between, so an error, Ctrl-C or
SIGTERM ends it at once. If it is stuck in a step instead, the guard thread interrupts it, and at last ends
the process.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import NoReturn, Protocol

from streamdiff import signals
from streamdiff.errors import ConfigError, RankFailed
from streamdiff.facts import Facts, parse_json, printable
from streamdiff.pipeline.link import POLL_S, Activity, Doing
from streamdiff.pipeline.meeting import NOTHING

logger = logging.getLogger(__name__)

_FAILURE = "failure"
_STARTING_SILENCE_S = 10.0
"""Loading weights can hold the interpreter for seconds; a rank that starts may be silent for this long."""
_SETTLE_S = 0.3
"""A lost connection may be the echo of an older failure, whose verdict is on its way."""
_LINGER_S = 2.0
"""How long the host of the store stays after the end for a rank that has not read the verdict."""
_INTERRUPT_S = 0.25
"""From the failure to the interrupt of a busy main thread, and from one that was lost to the next."""
_STUCK_S = 3.0
"""How long a busy main thread may at least take to hear of the failure; other work may keep the machine from it."""
_CLEANUP_S = 20.0
"""How long a rank that knows of the failure may take to close its files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Timeouts of a stream, in seconds."""

    deadline_s: float = 30.0
    """Longest work on one chunk. A dead or stopped rank is found in about half of it."""
    startup_s: float = 1800.0
    """Until every rank has loaded its models and joined."""
    outside_s: float = 3600.0
    """Longest wait for the outside: the source to speak, the delivery to take."""

    def __post_init__(self) -> None:
        if not all(0 < s < float("inf") for s in (self.deadline_s, self.startup_s, self.outside_s)):
            raise ConfigError(f"limits are positive seconds, got {self}")

    @property
    def poll_s(self) -> float:
        """Between two heartbeats."""
        return min(0.1, self.deadline_s / 20)

    @property
    def silence_s(self) -> float:
        """Silence that counts as death."""
        return max(10 * self.poll_s, self.deadline_s / 2)


class Store(Protocol):
    """What a watch needs of the place where ranks meet. Calls raise when its host is gone."""

    def set(self, key: str, value: str) -> None: ...

    def get_many(self, keys: list[str]) -> list[str]:
        """Values of keys that exist."""
        ...

    def compare_set(self, key: str, expected: str, value: str) -> str:
        """Write ``value`` if the key holds ``expected`` (empty: if it does not exist); what it holds then."""
        ...


@dataclass(frozen=True, slots=True)
class Failure:
    """The failure that ends a stream: ``rank`` (None: nobody in particular) did ``what`` while at ``chunk``."""

    rank: int | None
    chunk: int
    what: str
    was_stopped: bool = False
    """It was told to stop from outside."""

    def __str__(self) -> str:
        return self.what if self.rank is None else f"rank {self.rank} {self.what}"

    @classmethod
    def read(cls, text: str) -> Failure:
        """What another rank wrote. Raises ValueError."""
        facts = Facts(parse_json(text), _refuse)
        rank = facts.whole("rank", -1, 1 << 20) if facts.present("rank") else None
        what = printable(facts.words("what", 100_000), 2000)
        return cls(rank, facts.whole("chunk", -1, 1 << 60), what, facts.truth("was_stopped"))


@dataclass(frozen=True, slots=True)
class Beat:
    """One heartbeat, as its rank wrote it."""

    count: int
    doing: Doing
    chunk: int
    for_s: float
    gone: bool = False
    """The last beat of a rank that leaves."""

    @classmethod
    def read(cls, text: str) -> Beat:
        """What another rank wrote. Raises ValueError."""
        facts = Facts(parse_json(text), _refuse)
        return cls(
            count=facts.whole("count", 0, 1 << 60),
            doing=Doing(facts.words("doing")),
            chunk=facts.whole("chunk", -1, 1 << 60),
            for_s=facts.number("for_s", 0, 1e12),
            gone=facts.truth("gone"),
        )


def _refuse(why: str) -> NoReturn:
    raise ValueError(why)


@dataclass(frozen=True, slots=True)
class Report:
    """What is known of a rank: its last beat (None: it never joined), and how long ago that one was new."""

    beat: Beat | None
    age_s: float


def diagnose(reports: Mapping[int, Report], limits: Limits, *, silence_s: float) -> Failure | None:
    """The verdict over a set of heartbeats, or None when all is well. Pure, so that it can be tested."""
    silent: list[tuple[float, int, Beat]] = []
    stuck: list[tuple[float, int, Beat]] = []
    waiting: list[str] = []
    all_wait = True
    for rank, report in reports.items():
        beat = report.beat
        if beat is None:
            all_wait = False
            continue
        if beat.doing is Doing.DONE:
            continue
        patience_s = max(silence_s, _STARTING_SILENCE_S) if beat.doing is Doing.STARTING else silence_s
        if report.age_s > patience_s:
            silent.append((report.age_s, rank, beat))
        for_s = beat.for_s + report.age_s
        limit_s = {
            Doing.WORKING: limits.deadline_s,
            Doing.SOURCING: limits.outside_s,
            Doing.DELIVERING: limits.outside_s,
        }.get(beat.doing)
        if limit_s is not None and for_s > limit_s:
            stuck.append((for_s, rank, beat))
        if beat.doing in (Doing.WAITING, Doing.SENDING) and for_s > limits.deadline_s:
            waiting.append(f"rank {rank} {beat.doing.value} at chunk {beat.chunk}")
        else:
            all_wait = False
    if silent:
        age_s, rank, beat = max(silent, key=lambda entry: entry[0])
        return Failure(
            rank,
            beat.chunk,
            f"gave no sign of life for {age_s:.1f} s, last seen {beat.doing.value}: it was killed, stopped "
            f"or cut off; look at its output and its machine",
        )
    if stuck:
        for_s, rank, beat = max(stuck, key=lambda entry: entry[0])
        return Failure(
            rank,
            beat.chunk,
            f"has been {beat.doing.value} for {for_s:.1f} s without an end; find what holds it, or raise the limit",
        )
    if all_wait and waiting:
        return Failure(
            None,
            -1,
            f"all ranks wait for each other ({'; '.join(waiting)}): a packet was lost; start again",
        )
    return None


def lost_at_start(reports: Mapping[int, Report], *, silence_s: float) -> Failure | None:
    """Who may have died, when a launcher stops all ranks and some were still starting; None when all were heard.

    Loading can be silent too, so silence alone is no verdict: this is asked when somebody is likely to be dead.
    """
    lost: dict[int, str] = {}
    for rank, report in reports.items():
        beat = report.beat
        if beat is None:
            lost[rank] = "never joined"
        elif beat.doing is Doing.STARTING and not beat.gone and report.age_s > silence_s:
            lost[rank] = f"gave no sign of life for {report.age_s:.1f} s while it was starting"
    if len(lost) == 1:
        ((rank, what),) = lost.items()
        return Failure(rank, -1, f"{what} when all were told to stop: it had died, or was stopped first; look there")
    if lost:
        words = ", ".join(f"rank {rank} {what}" for rank, what in lost.items())
        return Failure(None, -1, f"all were told to stop while starting ({words}): one of these died; see their output")
    return None


class Watch:
    """Failure detector: one rank's heartbeats, and its view of the others'. Start it before models load, stop it last.

    ``activity`` says what this rank is doing; assign it when that changes hands. ``host`` is the rank in
    whose process the store lives, None when a launcher hosts it. ``picture`` draws (rank, chunk).
    ``on_abort`` is called before the process is ended from outside its main thread, to save what can be
    saved.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        store: Store,
        *,
        limits: Limits,
        host: int | None,
        picture: Callable[[int, int], str],
        on_abort: Callable[[RankFailed], None] | None = None,
    ) -> None:
        self._rank, self._size, self._store, self._limits = rank, size, store, limits
        self._host, self._picture, self._on_abort = host, picture, on_abort
        started = Activity(Doing.STARTING, -1, time.monotonic())
        self.activity: Callable[[], Activity] = lambda: started
        self._lock = threading.Lock()
        self._failure: Failure | None = None
        self._proposed: Failure | None = None
        self._suspects: dict[int, tuple[float, str]] = {}
        self._silence_s = limits.silence_s
        self._reports = {other: Report(None, 0.0) for other in range(size)}
        self._stop = threading.Event()
        self._hurry = threading.Event()
        self._round = threading.Condition()
        self._num_rounds = 0
        self._noticed = False
        self._owner = threading.current_thread()
        self._threads = [
            threading.Thread(target=target, name=target.__name__, daemon=True) for target in (self._pulse, self._guard)
        ]

    @property
    def failure(self) -> Failure | None:
        return self._failure

    def check(self) -> None:
        """Raise RankFailed when the stream has fallen."""
        if self._failure is not None:
            self._noticed = True
            raise self.error()

    def notice(self) -> None:
        """The main thread is on its way out: leave it the time to close its files."""
        self._noticed = True

    def error(self) -> RankFailed:
        """The verdict as an exception, with the schedule and the cell it concerns."""
        failure = self._failure
        assert failure is not None
        picture = f"\n{self._picture(failure.rank, max(0, failure.chunk))}" if failure.rank is not None else ""
        return RankFailed(f"{failure}{picture}", rank=failure.rank, was_stopped=failure.was_stopped)

    def reports(self) -> dict[int, Report]:
        """What was known of each rank in the last round."""
        return dict(self._reports)

    def suspect(self, rank: int, why: str) -> None:
        """A connection to ``rank`` broke. It is blamed unless it is done, or another verdict explains it."""
        with self._lock:
            self._suspects.setdefault(rank, (time.monotonic(), why))

    def propose(self, failure: Failure) -> None:
        """Put a verdict forward; the first one to reach the store is everyone's."""
        with self._lock:
            if self._proposed is None:
                self._proposed = failure
        self._hurry.set()

    def wait_for_verdict(self, timeout_s: float) -> Failure | None:
        """Wait until a verdict is known."""
        end_s = time.monotonic() + timeout_s
        while self._failure is None and time.monotonic() < end_s:
            time.sleep(POLL_S / 5)
        return self._failure

    def look_for_the_dead(self, timeout_s: float, *, silence_s: float) -> Failure | None:
        """This rank was told to stop, perhaps because another died: wait for the verdict that names it.

        The wait ends early when all others say that they were told as well. ``silence_s`` counts as death by now.
        """
        self._silence_s = min(self._silence_s, silence_s)
        stopping = Activity(Doing.STOPPING, self.activity().chunk, time.monotonic())
        self.activity = lambda: stopping
        self._hurry.set()
        end_s = time.monotonic() + timeout_s
        while self._failure is None and time.monotonic() < end_s and not self._all_others_leave():
            time.sleep(POLL_S / 5)
        return self._failure

    def _all_others_leave(self) -> bool:
        others = [report.beat for rank, report in self._reports.items() if rank != self._rank]
        return all(beat is not None and (beat.doing in (Doing.STOPPING, Doing.DONE) or beat.gone) for beat in others)

    def wait_until(self, holds: Callable[[dict[int, Report]], bool], timeout_s: float) -> bool:
        """Wait until ``holds`` of the reports; False when time ran out, RankFailed when the stream fell."""
        end_s = time.monotonic() + timeout_s
        while True:
            self.check()
            with self._round:
                if self._num_rounds > 0 and holds(self._reports):
                    return True
                self._round.wait(POLL_S)
            if time.monotonic() > end_s:
                return False

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def leave(self) -> None:
        """Stop watching. The host of the store stays until all others have read the verdict and gone."""
        self._noticed = True
        blamed = None if self._failure is None else self._failure.rank

        start_s = time.monotonic()

        def may_come() -> bool:
            """Whether a rank may still ask the store: one that has not joined yet gets more time than the others."""
            waited_s = time.monotonic() - start_s
            return any(
                waited_s < (_STARTING_SILENCE_S if report.beat is None else _LINGER_S)
                and not (report.beat is not None and report.beat.gone)
                and report.age_s < 10 * self._limits.poll_s
                for rank, report in self._reports.items()
                if rank not in (self._rank, blamed)
            )

        if self._host == self._rank:
            with self._round:
                while may_come():
                    self._round.wait(POLL_S)
        self._stop.set()
        self._hurry.set()
        self._threads[0].join(_LINGER_S)

    def _pulse(self) -> None:
        keys = [_FAILURE, *(f"beat/{rank}" for rank in range(self._size))]
        seen: dict[int, tuple[int, float]] = {}
        count = 0
        try:
            for key in keys:
                self._store.compare_set(key, "", NOTHING)
            while not self._stop.is_set():
                count += 1
                self._beat(count)
                verdict, *beats = self._store.get_many(keys)
                reports = {rank: self._report(rank, text, seen) for rank, text in enumerate(beats)}
                if verdict != NOTHING:
                    self._fall(self._verdict(verdict))
                elif (failure := self._judge(reports)) is not None:
                    text = self._store.compare_set(_FAILURE, NOTHING, json.dumps(asdict(failure)))
                    self._fall(self._verdict(text))
                with self._round:
                    self._reports = reports
                    self._num_rounds += 1
                    self._round.notify_all()
                self._hurry.wait(self._limits.poll_s)
                self._hurry.clear()
            # Nothing is asked of the store after this: its host may leave as soon as it has read it.
            self._beat(count + 1, gone=True)
        except RuntimeError as error:
            if not self._stop.is_set():
                self._lose_store(f"is gone ({first_line(error)})")

    def _verdict(self, text: str) -> Failure:
        try:
            failure = Failure.read(text)
            if failure.rank is None or failure.rank < self._size:
                return failure
            why = f"there is no rank {failure.rank}"
        except ValueError as error:
            why = str(error)
        return Failure(None, -1, f"the verdict in the store cannot be read ({why}); somebody else writes there")

    def _beat(self, count: int, *, gone: bool = False) -> None:
        now = self.activity()
        beat = Beat(count, now.doing, now.chunk, time.monotonic() - now.since_s, gone)
        self._store.set(f"beat/{self._rank}", json.dumps(asdict(beat)))

    def _report(self, rank: int, text: str, seen: dict[int, tuple[int, float]]) -> Report:
        if text == NOTHING:
            return Report(None, 0.0)
        try:
            beat = Beat.read(text)
        except ValueError:
            return Report(None, 0.0)
        now_s = time.monotonic()
        if seen.get(rank, (-1, 0.0))[0] != beat.count:
            seen[rank] = (beat.count, now_s)
        return Report(beat, now_s - seen[rank][1])

    def _judge(self, reports: Mapping[int, Report]) -> Failure | None:
        if self._failure is not None:
            return None
        with self._lock:
            if self._proposed is not None:
                return self._proposed
            suspects = dict(self._suspects)
        for rank, (since_s, why) in suspects.items():
            beat = reports[rank].beat
            is_done = beat is not None and beat.doing is Doing.DONE
            if not is_done and time.monotonic() - since_s > _SETTLE_S:
                chunk, doing = (-1, Doing.STARTING) if beat is None else (beat.chunk, beat.doing)
                return Failure(
                    rank,
                    chunk,
                    f"died, last seen {doing.value}: its connection broke ({why}); its own output says more",
                )
        return diagnose(reports, self._limits, silence_s=self._silence_s)

    def _fall(self, failure: Failure) -> None:
        with self._lock:
            if self._failure is None:
                self._failure = failure

    def _lose_store(self, what: str) -> None:
        with self._lock:
            suspects = sorted(self._suspects)
        if self._host is not None and self._host != self._rank:
            report = self._reports.get(self._host)
            chunk = report.beat.chunk if report is not None and report.beat is not None else -1
            doing = f", last seen {report.beat.doing.value}" if report is not None and report.beat else ""
            self._fall(
                Failure(
                    self._host,
                    chunk,
                    f"died or hangs{doing}: it hosts the store at which ranks meet, and that {what}; "
                    f"look at its output",
                )
            )
        elif suspects:
            self._fall(Failure(suspects[0], -1, f"died: its connection broke, and the store {what}"))
        else:
            self._fall(Failure(None, -1, f"the store at which ranks meet {what}; look at its host's output"))

    def _guard(self) -> None:
        """Time only, no store: finds a store that does not answer, and a main thread that does not leave."""
        nap_s = POLL_S
        idle_s = fallen_s = 0.0
        next_s = _INTERRUPT_S
        rounds = -1
        while not self._stop.wait(nap_s):
            if self._failure is None:
                # Naps are counted, not read off the clock: a process that was itself stopped has not waited.
                idle_s = idle_s + nap_s if rounds == self._num_rounds else 0.0
                rounds = self._num_rounds
                if idle_s > self._limits.silence_s and rounds > 0:
                    self._lose_store(f"does not answer for {idle_s:.1f} s")
                continue
            fallen_s += nap_s
            if self._noticed:
                if fallen_s > _CLEANUP_S:
                    self._abort("cannot close its files")
            elif fallen_s > max(_STUCK_S, self._limits.deadline_s / 4):
                self._abort("is stuck")
            elif fallen_s > next_s:
                next_s += _INTERRUPT_S if self._interrupt() else math.inf

    def _interrupt(self) -> bool:
        """Raise KeyboardInterrupt in a busy main thread, so that its files are closed on the way out.

        Returns whether it may be raised again: finalisers and callbacks of libraries lose exceptions.
        """
        return self._owner is threading.main_thread() and signals.interrupt_main() and signals.handles()

    def _abort(self, why: str) -> None:
        error = self.error()
        logger.critical("rank %d %s and is ended: %s", self._rank, why, error)
        try:
            if self._on_abort is not None:
                self._on_abort(error)
        finally:
            os._exit(error.exit_code)


def first_line(error: BaseException) -> str:
    """The part of a message that fits into another message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
