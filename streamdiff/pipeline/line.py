"""A line of ranks that many streams share: threads of this process, loaded once, that outlive their streams.

A rank holds *seats*: for each stream that may be on the line at once, the stages that remember it (sink, histories,
keys of the prompt, decoder state), made when the line is made, at addresses that stay. A stream that joins takes a free
seat on every rank and gives it back when it leaves; its first packet carries `SetReference`, which clears what was
there.

Packets of all streams pass the ranks in one order, which rank 0 decides (`turns`). Everything that a chunk depends on
comes with its packet or lies in its seat, so a stream's bits do not depend on who else is on the line. Nobody waits for
anybody's consumer: a stream has a fixed number of chunks under way, and what leaves the last rank waits for its own
reader. An error of one stream's source or stage ends that stream; a rank that hangs ends them all.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

from streamdiff.config import EngineConfig
from streamdiff.errors import LineFull, RankFailed, ScheduleError, SessionClosed
from streamdiff.pipeline.link import POLL_S, LineLink, Mailbox, Returned
from streamdiff.pipeline.packet import Packet
from streamdiff.pipeline.schedule import QUEUE_DEPTH, Schedule, chunks_under_way, render_around
from streamdiff.pipeline.stage import SeatedStage
from streamdiff.pipeline.turns import Turns

STOP_S = 10.0
"""How long closing waits for threads to finish the step they are in."""
_SMOOTHING = 8
"""Chunks over which the time of a rank is averaged."""


class _Fallen(Exception):  # noqa: N818  not an error
    """Ends a wait of a line or of a stream that is over; never leaves this module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a line carries now."""

    streams: int
    live: int
    """Of these, the ones that keep to the clock."""
    seats: int
    period_us: int
    """Time in which a live stream shows one chunk."""
    busy_us: tuple[int, ...]
    """Per rank, time that a chunk takes; 0 before the first one."""
    worst_wait_us: int = 0
    """Longest that a chunk which might have entered has waited for its turn."""

    @property
    def fits(self) -> int:
        """Live streams that the slowest rank can keep up with; one, and be it late, on a line that is slower still.

        >>> Load(streams=0, live=0, seats=8, period_us=480_000, busy_us=(90_000, 100_000)).fits
        4
        """
        return max(1, self.period_us // max(self.busy_us)) if any(self.busy_us) else self.seats

    def refusal(self, *, live: bool) -> str | None:
        """Why one more stream finds no place, or None."""
        if self.streams >= self.seats:
            return f"all {self.seats} seats are taken"
        if live and self.live >= self.fits:
            return (
                f"the slowest rank takes {max(self.busy_us) / 1e3:.0f} ms for a chunk that is shown in "
                f"{self.period_us / 1e3:.0f} ms, so {self.fits} live streams fit, and {self.live} are here"
            )
        return None


class Seat:
    """One stream's place on a line, from joining to leaving: chunks are taken from it with `get`.

    Made by `Line.join`. A `Ranks` of `streamdiff.pipeline.stream`, once it was started.
    """

    def __init__(self, line: Line, number: int, *, seed: int, stream: int, live: bool) -> None:
        self.number, self.live, self.key = number, live, (seed, stream)
        self._line = line
        self._lock = threading.Condition()
        # Everything from here to the blank line is guarded by this one condition.
        self._finished: deque[Packet] = deque()
        self._under_way = 0
        self._ended = False
        self._left = False
        self._error: BaseException | None = None

        self._links: tuple[LineLink, ...] = ()
        self._begun = [False] * line.schedule.num_ranks
        """Per rank, whether it has seen this stream; each rank's thread has its own entry."""
        self._feeder: threading.Thread | None = None

    def start(self, source: Iterator[Packet]) -> Seat:
        """Let the stream's packets enter, from a thread of their own. Once. Returns itself."""
        self._links = self._line.links(self, source)
        self._feeder = threading.Thread(target=self._feed, name=f"seat{self.number}", daemon=True)
        self._feeder.start()
        return self

    def get(self, timeout_s: float | None = None) -> Packet | None:
        """The next finished packet; None at the end of the stream, and from then on.

        Raises TimeoutError when none comes in time (None: there is no such time); what this stream failed with, and
        RankFailed for a rank that has been at one chunk for longer than the line's deadline, at every call.
        """
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with self._lock:
                if self._finished:
                    self._under_way -= 1
                    self._lock.notify_all()
                    return self._finished.popleft()
                if self._error is not None:
                    raise self._error
                if self._ended:
                    return None
                if self._left:
                    raise SessionClosed("the stream has left the line; join again")
                self._lock.wait(POLL_S)
            self._line.check_ranks()
            if until_s is not None and time.monotonic() > until_s:
                raise TimeoutError("no chunk left the line in time; ask again")

    def close(self) -> None:
        """Leave the line; what is under way is dropped. Idempotent; waits for the source for a bounded time."""
        self._leave()
        if self._feeder is not None and self._feeder is not threading.current_thread():
            self._feeder.join(timeout=STOP_S)

    @property
    def has_left(self) -> bool:
        """Whether nothing of it is wanted any more."""
        return self._left

    def begins(self, rank: int) -> bool:
        """Whether this is the first packet of the stream on a rank; asked once per packet, by the rank's thread."""
        begun, self._begun[rank] = self._begun[rank], True
        return not begun

    def hand_on(self, rank: int, packet: Packet | None) -> None:
        """Send what a rank has done on its way; None ends the stream."""
        if self._left:
            return
        self._links[rank].send(packet)
        if packet is None and rank == self._line.schedule.num_ranks - 1:
            with self._lock:
                self._ended = True
                self._lock.notify_all()
            self._line.leave(self)

    def fail(self, error: BaseException) -> None:
        """End the stream with an error, which is raised where its packets are taken; the first one counts."""
        with self._lock:
            if self._error is None and not self._left:
                self._error = error
        self._leave()

    def wake(self) -> None:
        """Something that this stream waits for may have happened on the line."""
        with self._lock:
            self._lock.notify_all()

    def check(self) -> None:
        """Returns while the stream is on the line."""
        if self._left:
            raise _Fallen
        self._line.check()

    def deliver(self, packet: Packet) -> None:
        """Take what left the last rank."""
        with self._lock:
            self._finished.append(packet)
            self._lock.notify_all()

    def _leave(self) -> None:
        with self._lock:
            self._left = True
            self._lock.notify_all()
        self._line.leave(self)

    def _feed(self) -> None:
        link = self._links[0]
        try:
            packet: Packet | None
            while True:
                self._wait_for_room()
                packet = link.recv()
                self._line.offer(self, packet)
                if packet is None:
                    return
        except _Fallen:
            pass
        except BaseException as error:  # noqa: BLE001  raised where the packets are taken
            self.fail(error)
        finally:
            link.close()

    def _wait_for_room(self) -> None:
        """Wait until another chunk of this stream may be under way, and count it."""
        while True:
            self.check()
            with self._lock:
                if self._under_way < self._line.depth:
                    self._under_way += 1
                    return
                self._lock.wait(POLL_S)


class Line:
    """Ranks of this process that many streams share.

    Args:
        config: of every stream.
        schedule: which rank does what.
        seats: for each stream that may be on the line at once, one stage per rank.
        deadline_s: a rank may work this long on one chunk.
        clock: seconds, rising.
    """

    def __init__(
        self,
        config: EngineConfig,
        schedule: Schedule,
        seats: Sequence[Sequence[SeatedStage]],
        *,
        deadline_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not seats or any(len(stages) != schedule.num_ranks for stages in seats):
            raise ScheduleError(
                f"a line of {schedule.num_ranks} ranks needs at least one seat of as many stages, "
                f"got {[len(stages) for stages in seats]}"
            )
        self.config, self.schedule = config, schedule
        self.depth = chunks_under_way(schedule.num_ranks)
        """Chunks that a stream has under way at most, from its source to its reader."""
        self._stages, self._deadline_s, self._clock = [tuple(stages) for stages in seats], deadline_s, clock
        self._period_us = round(config.chunk_s * 1e6)
        self._stopped = threading.Event()

        self._wake = threading.Condition()
        # Everything from here to the blank line is guarded by this one condition.
        self._error: BaseException | None = None
        self._free = deque(range(len(seats)))
        self._seats: dict[Seat, bool] = {}
        """Streams on the line -> whether they keep to the clock."""
        self._turns = Turns[Seat](self._period_us)
        self._offered: dict[Seat, tuple[Packet | None, int]] = {}
        """What each stream offers, and since when."""
        self._worst_wait_us = 0

        self._working: list[tuple[int, float] | None] = [None] * schedule.num_ranks
        """Per rank, the chunk it works on and since when; each rank's thread has its own entry."""
        self._busy_us = [0] * schedule.num_ranks
        self._timed = [False] * schedule.num_ranks
        self._edges = [Mailbox[tuple[Seat, Packet | None]](QUEUE_DEPTH, self.check) for _ in schedule.forward_edges]
        self._threads = [
            threading.Thread(target=self._run, args=(rank,), name=f"line-rank{rank}", daemon=True)
            for rank in range(schedule.num_ranks)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def load(self) -> Load:
        """What it carries now, and how long its ranks take."""
        with self._wake:
            return self._load()

    def join(self, *, seed: int = 0, stream: int = 0, live: bool = True) -> Seat:
        """Take a seat; returns at once.

        Args:
            seed, stream: key the noise that is drawn between steps, as in `DenoiseStage`.
            live: whether the stream keeps to the clock, and so needs its share of every rank's time.

        Raises:
            LineFull: there is no seat, or no time, for one more.
            SessionClosed: the line was closed. What made it fall, if it fell.
        """
        with self._wake:
            self._check_open()
            why = self._load().refusal(live=live)
            if why is not None:
                raise LineFull(
                    f"{why}; ask again when a stream has left, in {self._period_us / 1e6:g} s at the earliest",
                    retry_after_s=self._period_us / 1e6,
                )
            seat = Seat(self, self._free.popleft(), seed=seed, stream=stream, live=live)
            self._seats[seat] = live
            self._turns.join(seat, self._now_us(), live=live)
            return seat

    def close(self) -> None:
        """End every stream and every rank; waits for a bounded time. Idempotent."""
        self._fall(None)
        hung = isinstance(self._error, RankFailed)
        end_s = time.monotonic() + (0.0 if hung else STOP_S)
        for thread in self._threads:
            thread.join(max(0.0, end_s - time.monotonic()))

    def __enter__(self) -> Line:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def links(self, seat: Seat, source: Iterator[Packet]) -> tuple[LineLink, ...]:
        """One link per rank for one stream: its own ends and its own way back, over the edges that all share."""
        last, last_dit = self.schedule.num_ranks - 1, self.schedule.last_dit_rank
        returned = Returned(seat.check)

        def outlet(rank: int) -> Callable[[Packet | None], None]:
            return lambda packet: self._edges[rank].put((seat, packet))

        return tuple(
            LineLink(
                inlet=_never if rank > 0 else None,
                source=source if rank == 0 else None,
                outlet=outlet(rank) if rank < last else None,
                deliver=seat.deliver if rank == last else None,
                give_back=returned.put if rank == last_dit else None,
                returned=returned if rank == 0 else None,
            )
            for rank in range(self.schedule.num_ranks)
        )

    def offer(self, seat: Seat, packet: Packet | None) -> None:
        """Let a stream's next packet enter when its turn comes; waits until the one before has entered."""
        with self._wake:
            while seat in self._offered:
                self._wake.wait(POLL_S)
                seat.check()
            if seat not in self._seats:
                raise _Fallen
            now_us = self._now_us()
            self._offered[seat] = packet, now_us
            self._turns.offer(seat, now_us)
            self._wake.notify_all()

    def leave(self, seat: Seat) -> None:
        """Free a stream's seat; idempotent. What it has under way is dropped by the ranks as they come to it."""
        with self._wake:
            if self._seats.pop(seat, None) is not None:
                self._free.append(seat.number)
            self._offered.pop(seat, None)
            self._turns.leave(seat)
            self._wake.notify_all()

    def check(self) -> None:
        """Returns while the line stands."""
        if self._stopped.is_set():
            raise _Fallen

    def check_ranks(self) -> None:
        """Raise what made the line fall; RankFailed for a rank that works for longer than its deadline."""
        with self._wake:
            self._check_open()
        for rank, working in enumerate(self._working):
            if working is None or self._clock() - working[1] <= self._deadline_s:
                continue
            error = RankFailed(
                f"rank {rank} has been working (chunk {working[0]}) for more than {self._deadline_s:g} s; "
                f"find what it waits for, or raise the deadline\n"
                f"{render_around(self.schedule, rank, max(0, working[0]))}",
                rank=rank,
            )
            self._fall(error)
            raise error

    def _check_open(self) -> None:
        if self._error is not None:
            raise self._error
        if self._stopped.is_set():
            raise SessionClosed("the line was closed; make a new one")

    def _load(self) -> Load:
        return Load(
            streams=len(self._seats),
            live=sum(self._seats.values()),
            seats=len(self._stages),
            period_us=self._period_us,
            busy_us=tuple(self._busy_us),
            worst_wait_us=self._worst_wait_us,
        )

    def _now_us(self) -> int:
        return round(self._clock() * 1e6)

    def _fall(self, error: BaseException | None) -> None:
        with self._wake:
            if not self._stopped.is_set():
                self._error = error
            self._stopped.set()
            seats = list(self._seats)
            self._wake.notify_all()
        for seat in seats:
            seat.wake()

    def _run(self, rank: int) -> None:
        """The body of a rank's thread."""
        try:
            while True:
                seat, packet = self._next() if rank == 0 else self._edges[rank - 1].get()
                self._work(rank, seat, packet)
        except _Fallen:
            pass
        except BaseException as error:  # noqa: BLE001  raised where packets are taken
            self._fall(error)

    def _work(self, rank: int, seat: Seat, packet: Packet | None) -> None:
        if packet is None:
            seat.hand_on(rank, None)
        elif not seat.has_left and (done := self._step(rank, seat, packet)) is not None:
            seat.hand_on(rank, done)

    def _step(self, rank: int, seat: Seat, packet: Packet) -> Packet | None:
        """A rank's part of a packet, timed and watched; None when it failed, and the stream with it."""
        stage, began_s = self._stages[seat.number][rank], self._clock()
        self._working[rank] = (packet.chunk, began_s)
        try:
            if seat.begins(rank):
                stage.begin(seed=seat.key[0], stream=seat.key[1])
            done = stage.step(packet)
        except Exception as error:  # noqa: BLE001  raised where this stream's packets are taken
            picture = render_around(self.schedule, rank, max(0, packet.chunk))
            error.add_note(f"on rank {rank} at chunk {packet.chunk}:\n{picture}")
            seat.fail(error)
            return None
        finally:
            self._working[rank] = None
        self._count(rank, packet.chunk, round((self._clock() - began_s) * 1e6))
        return done

    def _count(self, rank: int, chunk: int, took_us: int) -> None:
        """Keep a rank's mean time per chunk. A stream's first chunk computes the sink and opens the decoder as well: it
        counts only while there is no other.
        """
        if chunk == 0:
            self._busy_us[rank] = self._busy_us[rank] or took_us
            return
        mean_us, self._timed[rank] = (self._busy_us[rank] if self._timed[rank] else took_us), True
        self._busy_us[rank] = mean_us + (took_us - mean_us) // _SMOOTHING

    def _next(self) -> tuple[Seat, Packet | None]:
        """The packet that enters now."""
        with self._wake:
            while (seat := self._turns.take()) is None:
                self.check()
                self._wake.wait(POLL_S)
            self.check()
            self._wake.notify_all()
            packet, since_us = self._offered.pop(seat)
            if packet is not None:
                self._worst_wait_us = max(self._worst_wait_us, self._now_us() - since_us)
            return seat, packet


def _never() -> Packet | None:
    raise AssertionError("packets of a line come in through its edges")
