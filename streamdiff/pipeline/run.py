"""The loop that every rank runs, and all ranks of a stream run as threads of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import torch

from streamdiff.errors import RankFailed, ScheduleError, SessionClosed
from streamdiff.pipeline.link import Doing, LineLink, Link, Mailbox, local_links
from streamdiff.pipeline.packet import Packet
from streamdiff.pipeline.schedule import QUEUE_DEPTH, Schedule, render_around
from streamdiff.pipeline.stage import Stage
from streamdiff.trace import Observer, Silent, span

STOP_S = 10.0
"""How long the end of a stream waits for threads to finish the step they are in."""


def packets(link: Link, observer: Observer) -> Iterator[Packet]:
    """Packets until the stream ends."""
    while True:
        with span(observer, "wait"):
            packet = link.recv()
        if packet is None:
            return
        yield packet


def run_rank(stage: Stage, link: Link, observer: Observer | None = None) -> None:
    """Run one rank until its stream ends.

    Spans: ``wait`` for a packet, ``step`` on it, ``send`` until the next rank has room for it.
    """
    observer = Silent() if observer is None else observer
    for packet in packets(link, observer):
        with span(observer, "step", chunk=packet.chunk):
            done = stage.step(packet)
        with span(observer, "send", chunk=packet.chunk):
            link.send(done)
    link.send(None)


def run_local(
    schedule: Schedule,
    stages: Sequence[Stage],
    source: Iterator[Packet],
    *,
    observers: Sequence[Observer] | None = None,
    deadline_s: float = 600.0,
) -> Iterator[Packet]:
    """Run all ranks in this process, one thread each, and yield packets as they leave the tail.

    One rank alone runs in the caller's thread. Between two ranks rest at most ``QUEUE_DEPTH`` chunks, so a
    consumer that pauses makes the whole line pause. Closing the iterator early stops every thread after its
    current step. Threads inherit the caller's grad and inference mode.

    Raises what a stage or the source raised, with the schedule and the cell in its notes; RankFailed when a
    rank works on one chunk for longer than ``deadline_s``.
    """
    if schedule.num_ranks == 1:
        (observer,) = _checked(schedule, stages, observers)
        return _run_alone(schedule, stages[0], source, observer)
    _checked(schedule, stages, observers)
    return _run_threads(schedule, stages, source, observers, deadline_s)


def _checked(schedule: Schedule, stages: Sequence[Stage], observers: Sequence[Observer] | None) -> Sequence[Observer]:
    """One observer per rank, and one stage."""
    if len(stages) != schedule.num_ranks:
        raise ScheduleError(
            f"{len(stages)} stages do not fit a schedule of {schedule.num_ranks} ranks; make one per rank"
        )
    if observers is not None and len(observers) != schedule.num_ranks:
        raise ScheduleError(f"{len(observers)} observers do not fit {schedule.num_ranks} ranks; make one per rank")
    return [Silent()] * schedule.num_ranks if observers is None else observers


def _run_alone(schedule: Schedule, stage: Stage, source: Iterator[Packet], observer: Observer) -> Iterator[Packet]:
    delivered: list[Packet] = []
    (link,) = local_links(
        1,
        last_dit_rank=0,
        source=source,
        deliver=delivered.append,
        check=lambda: None,
        queue_depth=QUEUE_DEPTH,
    )
    try:
        for packet in packets(link, observer):
            with span(observer, "step", chunk=packet.chunk):
                done = stage.step(packet)
            link.send(done)
            yield delivered.pop()
    except Exception as error:
        _point_at(schedule, 0, link, error)
        raise
    finally:
        link.close()


class _Stopped(Exception):  # noqa: N818  not an error
    """Tells a rank's thread that the stream is over; never leaves this module."""


class _Board:
    """What the threads of one stream share: whether it still stands, and who made it fall."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self.error: BaseException | None = None

    def check(self) -> None:
        if self._stopped.is_set():
            raise _Stopped

    def stop(self, error: BaseException | None = None) -> None:
        with self._lock:
            if self.error is None and not self._stopped.is_set():
                self.error = error
            self._stopped.set()


class LocalRanks:
    """All ranks of one stream as threads of this process; finished packets are taken from the tail with `get`.

    Args:
        schedule, stages, source, observers: see `run_local`.
        deadline_s: a rank may work this long on one chunk.
        patient: whether the source may wait longer than that, as one does that listens to a person.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Sequence[Stage],
        source: Iterator[Packet],
        *,
        observers: Sequence[Observer] | None = None,
        deadline_s: float = 600.0,
        patient: bool = False,
    ) -> None:
        self._schedule, self._stages, self._deadline_s = schedule, stages, deadline_s
        self._observers = _checked(schedule, stages, observers)
        self._watched = (Doing.WORKING,) if patient else (Doing.WORKING, Doing.SOURCING)
        self._board = board = _Board()
        self._finished: Mailbox[Packet | None] = Mailbox(1, board.check)
        self._ended = False
        self._links = local_links(
            schedule.num_ranks,
            last_dit_rank=schedule.last_dit_rank,
            source=source,
            deliver=self._finished.put,
            check=board.check,
            queue_depth=QUEUE_DEPTH,
        )
        # Both modes belong to a thread, not to the process: without this, ranks would record gradients.
        self._modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self._threads = [
            threading.Thread(target=self._run, args=(rank,), name=f"rank{rank}", daemon=True)
            for rank in range(schedule.num_ranks)
        ]
        for thread in self._threads:
            thread.start()

    def get(self, timeout_s: float | None = None) -> Packet | None:
        """The next finished packet; None at the end of the stream, and from then on.

        Raises TimeoutError when none comes in time (None: there is no such time), what a rank raised, and RankFailed
        for a rank that has been at one chunk for longer than the deadline; the last two at every call.
        """
        if self._ended:
            return None
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            packet = self._finished.get(lambda: self._check(until_s))
        except _Stopped:
            raise (self._board.error or SessionClosed("the ranks were stopped")) from None
        self._ended = packet is None
        return packet

    def close(self) -> None:
        """Stop every thread after the step it is in; waits for a bounded time. Idempotent."""
        self._board.stop()
        end_s = time.monotonic() + (0.0 if isinstance(self._board.error, RankFailed) else STOP_S)
        for thread in self._threads:
            thread.join(max(0.0, end_s - time.monotonic()))

    def _run(self, rank: int) -> None:
        link = self._links[rank]
        grad, inference = self._modes
        try:
            with torch.inference_mode(inference), torch.set_grad_enabled(grad):
                run_rank(self._stages[rank], link, self._observers[rank])
            if rank == self._schedule.num_ranks - 1:
                self._finished.put(None)
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001  raised again where the packets are consumed
            _point_at(self._schedule, rank, link, error)
            self._board.stop(error)
        finally:
            if rank == 0:
                link.close()

    def _check(self, until_s: float | None) -> None:
        self._board.check()
        for rank, link in enumerate(self._links):
            now = link.activity
            if now.doing in self._watched and time.monotonic() - now.since_s > self._deadline_s:
                error = RankFailed(
                    f"rank {rank} has been {now.doing.value} (chunk {now.chunk}) for more than "
                    f"{self._deadline_s:g} s; find what it waits for, or raise the deadline\n"
                    f"{render_around(self._schedule, rank, max(0, now.chunk))}",
                    rank=rank,
                )
                self._board.stop(error)
                raise _Stopped
        if until_s is not None and time.monotonic() > until_s:
            raise TimeoutError("no chunk left the line in time; ask again")


def _run_threads(
    schedule: Schedule,
    stages: Sequence[Stage],
    source: Iterator[Packet],
    observers: Sequence[Observer] | None,
    deadline_s: float,
) -> Iterator[Packet]:
    ranks = LocalRanks(schedule, stages, source, observers=observers, deadline_s=deadline_s)
    try:
        while (packet := ranks.get()) is not None:
            yield packet
    finally:
        ranks.close()


def _point_at(schedule: Schedule, rank: int, link: LineLink, error: BaseException) -> None:
    chunk = max(0, link.activity.chunk)
    error.add_note(f"on rank {rank} at chunk {chunk}:\n{render_around(schedule, rank, chunk)}")
