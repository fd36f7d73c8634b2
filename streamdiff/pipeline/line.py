"""A line of ranks that many streams share: loaded once, they outlive their streams.

Ranks are threads of this process (`thread_line`) or processes of their own (`process_line`). A rank holds *seats*:
for each stream that may be on the line at once, the stages that remember it (sink, histories, keys of the prompt,
decoder state), made when the line is made, at addresses that stay. A stream that joins takes a free seat on every rank
and gives it back when it leaves; its first packet carries `SetReference`, which clears what was there.

Packets of all streams pass the ranks in one order, which is decided where they enter (`turns`). Everything that a
chunk depends on comes with its packet or lies in its seat, so a stream's bits do not depend on who else is on the
line. Nobody waits for anybody's consumer: a stream has a fixed number of chunks under way, and what leaves the last
rank waits for its own reader. An error of one stream's source or stage ends that stream and no other.
"""

from __future__ import annotations

import abc
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType

from streamdiff.config import EngineConfig
from streamdiff.errors import LineFull, ScheduleError, SessionClosed
from streamdiff.pipeline.link import POLL_S, LineLink
from streamdiff.pipeline.packet import Packet
from streamdiff.pipeline.schedule import Schedule, chunks_under_way
from streamdiff.pipeline.turns import Turns

STOP_S = 10.0
"""How long closing waits for threads to finish the step they are in."""
_SMOOTHING = 8
"""Chunks over which the time of a rank is averaged."""


class Fallen(Exception):  # noqa: N818  not an error
    """Ends a wait of a line or of a stream that is over; never leaves the line."""


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
            raise Fallen
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
        except Fallen:
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


class Line(abc.ABC):
    """Ranks that many streams share: who is on the line, and whose chunk enters next.

    Args:
        config: of every stream.
        schedule: which rank does what.
        seats: streams that may be on the line at once.
        clock: seconds, rising.
    """

    def __init__(
        self,
        config: EngineConfig,
        schedule: Schedule,
        seats: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if seats < 1:
            raise ScheduleError(f"a line needs a seat for at least one stream, got seats={seats}")
        self.config, self.schedule = config, schedule
        self.depth = chunks_under_way(schedule.num_ranks)
        """Chunks that a stream has under way at most, from its source to its reader."""
        self._num_seats, self._clock = seats, clock
        self._period_us = round(config.chunk_s * 1e6)
        self._stopped = threading.Event()

        self._wake = threading.Condition()
        # Everything from here to the blank line is guarded by this one condition.
        self._error: BaseException | None = None
        self._free = deque(range(seats))
        self._seats: dict[Seat, bool] = {}
        """Streams on the line -> whether they keep to the clock."""
        self._turns = Turns[Seat](self._period_us)
        self._offered: dict[Seat, tuple[Packet | None, int]] = {}
        """What each stream offers, and since when."""
        self._worst_wait_us = 0

        self._busy_us = [0] * schedule.num_ranks
        """Per rank, time that a chunk takes."""
        self._timed = [False] * schedule.num_ranks

    @abc.abstractmethod
    def links(self, seat: Seat, source: Iterator[Packet]) -> tuple[LineLink, ...]:
        """One link per rank for one stream: its own ends and its own way back, over what all share."""

    @abc.abstractmethod
    def check_ranks(self) -> None:
        """Raise what made the line fall, or makes it fall now."""

    @abc.abstractmethod
    def _end_ranks(self) -> None:
        """End every rank of a line that has fallen; waits for a bounded time. Idempotent."""

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
        self._end_ranks()

    def __enter__(self) -> Line:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def offer(self, seat: Seat, packet: Packet | None) -> None:
        """Let a stream's next packet enter when its turn comes; waits until the one before has entered."""
        with self._wake:
            while seat in self._offered:
                self._wake.wait(POLL_S)
                seat.check()
            if seat not in self._seats:
                raise Fallen
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
            raise Fallen

    def _check_open(self) -> None:
        if self._error is not None:
            raise self._error
        if self._stopped.is_set():
            raise SessionClosed("the line was closed; make a new one")

    def _load(self) -> Load:
        return Load(
            streams=len(self._seats),
            live=sum(self._seats.values()),
            seats=self._num_seats,
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
