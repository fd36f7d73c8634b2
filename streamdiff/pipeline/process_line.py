"""A line whose ranks are processes, seen from the program that uses it: the driver.

    driver --- entries --> rank 0 --> rank 1 --> ... --> last rank --- finished packets --> driver
       \\------ one channel per rank: what it does, what it has kept; descriptors of its edges ------/

The driver makes the packets (sources, encoders, whose turn it is) and takes the finished ones. It computes nothing on a
device, sets no signal handlers, and ends no process but the ranks, which it starts; they end when it ends, however it
does. A rank that is lost, because it died, gave no sign of life or took too long, is replaced: the new process is told
what the old one had kept, its neighbours send again what it has not seen, and every stream goes on with the same bits
(`edges`, `album`). ``heals=False`` keeps nothing, and a lost rank ends all streams with its name.

What is kept: after every entry a rank copies what it wrote for that stream (keys and values of one chunk, a state of
the decoder) and what it sent, into memory that the driver holds as well, and then tells the driver where it lies. Only
then does it tell its neighbour that the entry will not be asked for again. So at any moment each rank can be made anew
from what the driver was told last, and all that came after is still kept by whoever sent it; that holds for any number
of ranks that are lost at once.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from streamdiff.config import EngineConfig
from streamdiff.errors import ConfigError, RankFailed
from streamdiff.facts import printable
from streamdiff.pipeline.album import shared_memory
from streamdiff.pipeline.edges import Channel, Entry, Inbox, Outbox, What, seal
from streamdiff.pipeline.line import STOP_S, Fallen, Line, Seat
from streamdiff.pipeline.link import POLL_S, LineLink, Returned
from streamdiff.pipeline.packet import Packet
from streamdiff.pipeline.process_rank import BEAT_S, EDGE_DEPTH, Job, run
from streamdiff.pipeline.schedule import Schedule, render_around

_PROCESSES = multiprocessing.get_context("forkserver")
_PRELOAD = ["streamdiff.engine", "torch._dynamo"]
"""What ranks need anyway: the second takes over a second of a core to import, and the first model asks for it."""
_MOST_LOSSES = 12
"""Times in a row that a rank may be lost without having made anything; then the cause comes back with every process."""
_KILL_S = 10.0
"""How long the system may take to end a process that was killed."""
_STARTING_SILENCE_S = 10.0
"""Loading weights can hold the interpreter for seconds; a rank that starts may be silent for this long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LineLimits:
    """Timeouts of a line of processes, in seconds."""

    deadline_s: float = 60.0
    """A rank that works longer on one chunk is lost."""
    silence_s: float = 1.5
    """A rank that gives no sign of life for so long is lost."""
    startup_s: float = 1800.0
    """Until a rank has loaded its models."""

    def __post_init__(self) -> None:
        if not all(0 < s < float("inf") for s in (self.deadline_s, self.silence_s, self.startup_s)):
            raise ConfigError(f"limits are positive seconds, got {self}")
        if self.silence_s < 4 * BEAT_S:
            raise ConfigError(f"ranks give a sign of life every {BEAT_S} s; silence_s={self.silence_s} is too short")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMetrics:
    """What one rank of a line has done so far."""

    chunks: int = 0
    step_s: float = 0.0
    """Time in its stages, of all chunks."""
    wait_s: float = 0.0
    """Time without anything to do."""
    keeping_s: float = 0.0
    """Time that snapshots took."""
    kept_bytes: int = 0
    """What was copied for them."""
    losses: int = 0
    """How often it was replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LineMetrics:
    """What a line of processes has done so far."""

    ranks: tuple[RankMetrics, ...]
    under_way: int
    """Entries on the line now."""
    healed: int
    """Ranks that were lost and replaced."""
    healing_s: float
    """Longest time from finding a rank lost to its replacement taking entries."""
    worst_gap_s: float
    """Longest time in which nothing left a line that had something under way."""


class RankProcess(Protocol):
    """The process that is a rank at the moment."""

    @property
    def pid(self) -> int: ...

    def end(self) -> str:
        """See that it has ended, where it is the driver's to end; what became of it, where that is known."""
        ...


Find = Callable[[int, Callable[[], None]], tuple[socket.socket, RankProcess]]
"""A process for a rank, and this end of a connection to it; asks in its waits whether the line stands."""


class Spawned:
    """Processes that the driver starts: forked from a server that imports the engine once.

    As always with `multiprocessing`, the program's main module must be importable without starting anything
    (``if __name__ == "__main__":``). ``job``: what a rank is to be; it is pickled.
    """

    def __init__(self, job: Callable[[int], Job]) -> None:
        self._job = job
        _preload()

    def __call__(self, rank: int, check: Callable[[], None]) -> tuple[socket.socket, RankProcess]:
        ours, theirs = socket.socketpair()
        process = _PROCESSES.Process(target=run, args=(self._job(rank), theirs), name=f"line-rank{rank}", daemon=True)
        with theirs:
            process.start()
        return ours, _Child(process)


class _Child:
    def __init__(self, process: Any) -> None:
        self._process = process
        self.pid: int = process.pid

    def end(self) -> str:
        self._process.kill()
        self._process.join(_KILL_S)
        code = self._process.exitcode
        if code is None:
            return "cannot be ended"
        return f"was ended by signal {-code}" if code < 0 else f"ended with exit status {code}"


class Joined:
    """Processes that wait for a driver in a folder (`wait_for_drivers`), started and replaced by somebody else."""

    def __init__(self, folder: Path, limits: LineLimits) -> None:
        self._folder, self._limits = folder, limits

    def __call__(self, rank: int, check: Callable[[], None]) -> tuple[socket.socket, RankProcess]:
        place = self._folder / f"rank{rank}.sock"
        until_s = time.monotonic() + self._limits.startup_s
        while True:
            check()
            end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                end.connect(str(place))
                pid, _, _ = struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            except OSError as error:
                end.close()
                if time.monotonic() > until_s:
                    raise RankFailed(
                        f"rank {rank} does not wait at {place} ({error.strerror}); start it with `streamdiff line`",
                        rank=rank,
                    ) from error
                time.sleep(POLL_S)
            else:
                return end, _Elsewhere(pid)


@dataclass(frozen=True, slots=True)
class _Elsewhere:
    pid: int

    def end(self) -> str:
        return "has ended its connection; look at its output"


@dataclass(slots=True, eq=False)
class _Worker:
    """A rank, whichever process it is at the moment."""

    rank: int
    album: int | None
    process: RankProcess | None = None
    channel: Channel | None = None
    is_up: bool = False
    was_up: bool = False
    why: str = ""
    """What was found wrong with the process, before it was ended."""
    silent_s: float = 0.0
    began_s: float = 0.0
    lost_s: float | None = None
    """When the last process was found lost."""
    number: int = -1
    """The last entry that it has reported."""
    at: tuple[int, float] = (-1, 0.0)
    """The entry that it works on, and for how long."""
    seats: dict[int, dict[str, Any] | None] = field(default_factory=dict[int, "dict[str, Any] | None"])
    """Seat -> what was kept of it; None: its stream has failed here."""
    parts: dict[str, Any] = field(default_factory=dict[str, Any])
    """What lies where in the album."""
    losses_in_a_row: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_COUNTED, 0))
    losses: int = 0

    def kill(self, why: str = "") -> None:
        """End its process now."""
        self.why = self.why or why
        if (process := self.process) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)

    def note(self, words: dict[str, Any]) -> None:
        """Take a report down: what the rank did, and what it has kept."""
        self.number, self.losses_in_a_row = words["number"], 0
        self.counts["chunks"] += 1
        for name in _COUNTED[1:]:
            self.counts[name] += words.get(name, 0)
        if "parts" in words:
            self.seats[words["seat"]] = words["facts"]
            self.parts |= words["parts"]


_COUNTED = ("chunks", "took_us", "waited_us", "keeping_us", "copied_bytes")


class ProcessLine(Line):
    """Ranks in processes of their own that many streams share, and that are replaced when they are lost.

    Args:
        config: of every stream.
        schedule: which rank does what.
        seats: streams that may be on the line at once.
        find: how processes are come by: `Spawned`, `Joined`.
        plan: what the ranks must say of themselves, as `Job.plan`.
        heals: whether a lost rank is replaced.
        limits: timeouts.

    Raises RankFailed when a rank does not start.
    """

    def __init__(
        self,
        config: EngineConfig,
        schedule: Schedule,
        seats: int,
        find: Find,
        *,
        plan: str = "",
        heals: bool = True,
        limits: LineLimits | None = None,
    ) -> None:
        super().__init__(config, schedule, seats)
        self._find, self._plan, self._heals, self._limits = find, plan, heals, limits or LineLimits()
        last = schedule.num_ranks
        self._workers = [_Worker(rank, shared_memory() if heals else None) for rank in range(last)]
        self._placing = threading.Lock()
        """Edges are made one after the other, so that both ends of one hear of pairs in the same order."""
        self._outbox, self._inbox = Outbox(EDGE_DEPTH), Inbox()

        self._counting = threading.Lock()
        # Everything from here to the blank line is guarded by this lock.
        self._under_way: dict[int, Seat] = {}
        self._moved_s = 0.0
        """When something last left the line, or entered it while it was empty."""
        self._worst_gap_s = self._healing_s = 0.0
        self._healed = 0

        targets = [partial(self._keep_up, worker) for worker in self._workers]
        self._threads = [
            threading.Thread(target=self._guarded, args=(target,), name="line-driver", daemon=True)
            for target in (*targets, self._watch, self._enter, self._leave_line)
        ]
        for thread in self._threads:
            thread.start()
        try:
            self._wait_until_up()
        except BaseException:
            self.close()
            raise

    @property
    def metrics(self) -> LineMetrics:
        """What it has done so far."""
        with self._counting:
            return LineMetrics(
                ranks=tuple(_metrics_of(worker) for worker in self._workers),
                under_way=len(self._under_way),
                healed=self._healed,
                healing_s=self._healing_s,
                worst_gap_s=self._worst_gap_s,
            )

    @property
    def pids(self) -> tuple[int | None, ...]:
        """The ranks' processes as they are now; None for one that is being replaced."""
        found = [(worker.process, worker.is_up) for worker in self._workers]
        return tuple(None if process is None or not is_up else process.pid for process, is_up in found)

    def links(self, seat: Seat, source: Iterator[Packet]) -> tuple[LineLink, ...]:
        """See `Line.links`: the head's way in and the tail's way out are in this process, and there is no other."""
        returned = Returned(seat.check)
        head = LineLink(source=source, outlet=_nowhere, returned=returned)
        tail = LineLink(inlet=_never, deliver=seat.deliver, give_back=returned.put)
        if self.schedule.num_ranks == 1:
            return (LineLink(source=source, deliver=seat.deliver, give_back=returned.put, returned=returned),)
        return (head, *[tail] * (self.schedule.num_ranks - 1))

    def check_ranks(self) -> None:
        """Raise what made the line fall."""
        with self._wake:
            self._check_open()

    def _wait_until_up(self) -> None:
        until_s = time.monotonic() + self._limits.startup_s
        while not all(worker.was_up for worker in self._workers):
            self.check_ranks()
            if time.monotonic() > until_s:
                late = [worker.rank for worker in self._workers if not worker.was_up]
                raise RankFailed(
                    f"rank {late[0]} was not ready within {self._limits.startup_s:g} s; look at its output",
                    rank=late[0],
                )
            time.sleep(0.01)

    def _hang_up(self) -> None:
        """End all connections; a rank without one ends."""
        self._outbox.close()
        self._inbox.close()
        for worker in self._workers:
            if worker.channel is not None:
                worker.channel.close()

    def _end_ranks(self) -> None:
        self._hang_up()
        end_s = time.monotonic() + STOP_S
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, end_s - time.monotonic()))
        for worker in self._workers:
            if worker.album is not None:
                os.close(worker.album)
                worker.album = None

    def _guarded(self, work: Callable[[], None]) -> None:
        """The body of a thread of the driver: what it fails with ends the line, and is raised in every stream."""
        try:
            work()
        except Fallen:
            pass
        except BaseException as error:  # noqa: BLE001  raised where packets are taken
            self._fall(error)
            self._hang_up()

    def _enter(self) -> None:
        """Let entries in, in their turn."""
        number = 0
        while True:
            self._outbox.wait_for_room(self.check)
            seat, packet = self._next()
            what = What.END if packet is None else What.PACKET
            key = seat.key if packet is not None and seat.begins(0) else None
            with self._counting:
                if not self._under_way:
                    self._moved_s = time.monotonic()
                self._under_way[number] = seat
            entry = Entry(number=number, seat=seat.number, what=what, key=key, packet=packet)
            self._outbox.put(seal(entry), self.check)
            number += 1

    def _leave_line(self) -> None:
        """Take what left the last rank to its stream."""
        last = self.schedule.num_ranks - 1
        while True:
            sealed = self._inbox.get(self.check)
            entry = sealed.open()
            with self._counting:
                seat, now_s = self._under_way.pop(entry.number), time.monotonic()
                self._worst_gap_s = max(self._worst_gap_s, now_s - self._moved_s)
                self._moved_s = now_s
            if entry.what is What.FAILED:
                seat.fail(RankFailed(f"rank {entry.rank} {entry.why}", rank=entry.rank))
            else:
                seat.hand_on(last, entry.packet)
            self._inbox.settle(entry.number)

    def _keep_up(self, worker: _Worker) -> None:
        """One rank's thread: start a process, listen to it until it is lost, and again."""
        try:
            while True:
                self.check()
                self._start(worker)
                self._follow(worker)
                self._end(worker)
                self.check()
                self._judge(worker)
        finally:
            self._end(worker)

    def _start(self, worker: _Worker) -> None:
        worker.why, worker.at = "", (-1, 0.0)
        end, process = self._find(worker.rank, self.check)
        worker.channel = Channel(end)
        worker.silent_s, worker.began_s = 0.0, time.monotonic()
        worker.process = process

    def _follow(self, worker: _Worker) -> None:
        """Listen to a rank until its process ends, and put it in its place when it is ready."""
        channel = worker.channel
        assert channel is not None
        try:
            while True:
                words, _ = channel.hear()
                self.check()
                worker.silent_s = 0.0
                match words["say"]:
                    case "ready":
                        self._agree(worker.rank, words["plan"])
                        self._place(worker)
                    case "beat":
                        worker.at = words["number"], words["for_s"]
                    case "report":
                        with self._counting:
                            worker.note(words)
                        if words["chunk"] >= 0:
                            self._count(worker.rank, words["chunk"], words["took_us"])
                    case _:
                        worker.why = worker.why or words["why"]
        except OSError:
            pass
        finally:
            worker.is_up = False
            channel.release()

    def _agree(self, rank: int, plan: str) -> None:
        if plan != self._plan:
            raise RankFailed(
                f"rank {rank} was started for another line: it serves {printable(plan, 1000)}, this is {self._plan}; "
                "give both the same arguments",
                rank=rank,
            )

    def _place(self, worker: _Worker) -> None:
        """Tell a rank where it stands, and connect it with its neighbours."""
        assert worker.channel is not None
        seats = [[seat, facts] for seat, facts in worker.seats.items() if facts is None or facts]
        worker.channel.say(
            {"do": "resume", "number": worker.number, "seats": seats, "parts": worker.parts}, worker.album
        )
        with self._placing:
            worker.is_up = worker.was_up = True
            for edge in (worker.rank, worker.rank + 1):
                self._connect(edge)
        if worker.lost_s is not None:
            with self._counting:
                self._healed += 1
                self._healing_s = max(self._healing_s, time.monotonic() - worker.lost_s)
            worker.lost_s = None

    def _connect(self, edge: int) -> None:
        """Make a pair of sockets for the edge into a rank (from the last one: into the driver), where both are up."""
        sender = self._workers[edge - 1] if edge > 0 else None
        receiver = self._workers[edge] if edge < len(self._workers) else None
        if any(end is not None and not end.is_up for end in (sender, receiver)):
            return
        out, into = socket.socketpair()
        _give(out, "outlet", sender, self._outbox.connect)
        _give(into, "inlet", receiver, self._inbox.connect)

    def _end(self, worker: _Worker) -> None:
        """See that its process has ended."""
        process, worker.process = worker.process, None
        if process is not None:
            what = process.end()
            worker.why = worker.why or what

    def _judge(self, worker: _Worker) -> None:
        """Count a loss. Raises RankFailed when it is not made good.

        One that had nothing to do does not count: a line may stand idle for days, and lose a rank now and then.
        """
        with self._counting:
            had_work = any(number > worker.number for number in self._under_way)
        worker.losses += 1
        worker.losses_in_a_row = worker.losses_in_a_row + 1 if had_work or worker.lost_s is not None else 0
        worker.lost_s = time.monotonic() if worker.lost_s is None else worker.lost_s
        if self._heals and worker.was_up and worker.losses_in_a_row <= _MOST_LOSSES:
            return
        if not worker.was_up:
            reason = "it never got ready; look at its output"
        elif self._heals:
            reason = f"it was replaced {_MOST_LOSSES} times in a row without having made anything"
        else:
            reason = "this line does not heal (heals=False); make a new one"
        chunk = max(0, worker.number)
        raise RankFailed(
            f"rank {worker.rank} {worker.why}; {reason}\n{render_around(self.schedule, worker.rank, chunk)}",
            rank=worker.rank,
        )

    def _watch(self) -> None:
        """Find ranks that are silent or take too long. They are ended, which their own threads find.

        Naps are counted, not read off the clock: a driver that was itself stopped has not waited.
        """
        limits = self._limits
        while not self._stopped.wait(BEAT_S):
            for worker in self._workers:
                if worker.process is None:
                    continue
                worker.silent_s += BEAT_S
                number, for_s = worker.at
                patience_s = limits.silence_s if worker.is_up else max(limits.silence_s, _STARTING_SILENCE_S)
                if worker.silent_s > patience_s:
                    worker.kill(f"gave no sign of life for {worker.silent_s:.1f} s")
                elif worker.is_up and number >= 0 and for_s > limits.deadline_s:
                    worker.kill(f"had been working on one chunk for more than {limits.deadline_s:g} s")
                elif not worker.is_up and time.monotonic() - worker.began_s > limits.startup_s:
                    worker.kill(f"was not ready within {limits.startup_s:g} s")


def _give(end: socket.socket, do: str, worker: _Worker | None, connect: Callable[[socket.socket], None]) -> None:
    """Hand one end of an edge to a rank, or (None) to the driver's own box."""
    if worker is None:
        connect(end)
        return
    with end, contextlib.suppress(OSError):  # it has died, and is connected again when it is back
        assert worker.channel is not None
        worker.channel.say({"do": do}, end.fileno())


def _metrics_of(worker: _Worker) -> RankMetrics:
    counts = worker.counts
    return RankMetrics(
        chunks=counts["chunks"],
        step_s=counts["took_us"] / 1e6,
        wait_s=counts["waited_us"] / 1e6,
        keeping_s=counts["keeping_us"] / 1e6,
        kept_bytes=counts["copied_bytes"],
        losses=worker.losses,
    )


def _preload() -> None:
    """Let the server that ranks are forked from import the engine, unless the program has told it what to import."""
    server: Any = multiprocessing.forkserver
    if server._forkserver._preload_modules == ["__main__"]:
        _PROCESSES.set_forkserver_preload(_PRELOAD)


def _never() -> Packet | None:
    raise AssertionError("packets of this line do not come in here")


def _nowhere(packet: Packet | None) -> None:
    raise AssertionError("packets of this line do not go out here")
