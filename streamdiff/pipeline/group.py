"""Ranks that are processes: how they meet, are watched, and end together.

    with Group(world, schedule) as group:
        stage = ...                                    # load this rank's models; the others see it loading
        run_rank(stage, group.link(source=..., deliver=...))  # source: used by the head; deliver: by the tail

Every edge of the schedule, the feedback edge included, is a two-rank process group of its own (`transport`), opened and
warmed before the stream starts.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from streamdiff.errors import ConfigError, RankFailed, ScheduleError
from streamdiff.facts import printable
from streamdiff.pipeline.device import use_device
from streamdiff.pipeline.link import POLL_S, Activity, Check, Doing, LineLink, Returned, local_links
from streamdiff.pipeline.meeting import LEAST_SECRET, Meeting, Place, is_loopback, listening
from streamdiff.pipeline.packet import Packet
from streamdiff.pipeline.schedule import QUEUE_DEPTH, Edge, Schedule, render_around
from streamdiff.pipeline.transport import (
    Broken,
    EdgeEnd,
    Inbox,
    Outbox,
    Payload,
    mark_used,
    reason,
    require_backends,
)
from streamdiff.pipeline.watch import Failure, Limits, Report, Watch, first_line, lost_at_start

T = TypeVar("T")

_STOPPED_FROM_OUTSIDE_S = 1.2
"""A launcher stops all ranks when one dies: how long to look for that one before leaving."""
_DEAD_AFTER_S = 0.7
"""Silence that counts as death by then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Which of how many ranks this process is, and where they meet."""

    rank: int
    size: int
    local_rank: int = 0
    host: str = "127.0.0.1"
    port: int = 29500
    agent_store: bool = False
    """Whether the launcher hosts the store (torchrun does); otherwise rank 0 hosts it."""
    attempt: int = 0
    """Counts restarts by the launcher, whose store still holds the keys of earlier attempts."""
    run: str = ""
    """Name of the run, so that nothing signed in another one counts in this."""
    is_local: bool | None = None
    """Whether all ranks are on this machine; None: as ``host`` says."""
    place: Path | None = None
    """File in which rank 0 tells ranks of one machine where it listens, instead of ``host`` and ``port``."""
    secret: bytes | None = field(default=None, repr=False)
    """Signs what ranks say where others can speak as well: wherever they are not on one machine."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ConfigError(f"rank {self.rank} does not exist in a world of {self.size}; ranks count from 0")
        if self.is_local is None:
            object.__setattr__(self, "is_local", is_loopback(self.host))
        if self.secret is not None and len(self.secret) < LEAST_SECRET:
            raise ConfigError(f"the secret of the ranks has {len(self.secret)} bytes; give {LEAST_SECRET} or more")
        if not self.is_local and self.size > 1 and self.secret is None:
            raise ConfigError(
                "ranks on several machines meet in a store to which anybody can write who reaches it; give all of them "
                "one secret (STREAMDIFF_SECRET_FILE), and a private network"
            )


class Group:
    """All ranks of one stream, seen from one of them: opened, watched and ended here. A context manager.

    An exception that leaves the ``with`` block ends every other rank with RankFailed naming this one.
    SystemExit and its like (not KeyboardInterrupt) are taken for a launcher that stops all ranks because one
    died, and become a RankFailed that names the dead one when it can be found. A clean end waits until every
    rank is done. With one rank there is nothing to watch, and the link is local.

    ``device`` becomes the current CUDA device of the thread that enters, and of every thread started here.
    ``on_abort`` is called, from another thread, before a process whose main thread is stuck is ended by
    force. After RankFailed, end the process with ``os._exit`` once files are closed: a thread may be stuck in
    a dead connection.

    Raises ScheduleError when world and schedule disagree, BackendError when this torch cannot carry
    ``payload``.
    """

    def __init__(
        self,
        world: World,
        schedule: Schedule,
        *,
        limits: Limits | None = None,
        device: torch.device | str = "cpu",
        payload: Payload = "gloo",
        on_abort: Callable[[RankFailed], None] | None = None,
    ) -> None:
        if world.size != schedule.num_ranks:
            raise ScheduleError(
                f"the schedule has {schedule.num_ranks} ranks but {world.size} were started; "
                f"start {schedule.num_ranks} (torchrun --nproc-per-node {schedule.num_ranks})"
            )
        self._world, self._schedule = world, schedule
        self._limits = Limits() if limits is None else limits
        self._device = torch.device(device)
        self._payload: Payload = payload
        self._on_abort = on_abort
        self._watch: Watch | None = None
        self._link: LineLink | None = None
        self._start_s = time.monotonic()
        if world.size > 1:
            require_backends(payload, self._device)

    def __enter__(self) -> Group:
        self._start_s = time.monotonic()
        use_device(self._device)
        world = self._world
        if world.size == 1:
            return self
        in_agent = world.agent_store and world.place is None
        hosts = world.rank == 0 and not in_agent
        server = listening(world.host, world.port) if hosts and world.is_local and world.place is None else None
        if world.place is not None:
            world, server = self._find_place(world, world.place)
        # Two clients: a call on one waits for the call before it, and heartbeats must not wait.
        beats = _patiently(lambda: _open_store(world, self._left_s(), host=hosts, server=server), self._left_s())
        self._store = _patiently(lambda: _open_store(world, self._left_s(), host=False), self._left_s())
        self._hosting = beats  # the server lives as long as this object
        self._world = world
        self._watch = Watch(
            world.rank,
            world.size,
            self._meeting("watch", beats),
            limits=self._limits,
            host=None if in_agent else 0,
            picture=lambda rank, chunk: render_around(self._schedule, rank, chunk),
            on_abort=self._on_abort,
        )
        self._watch.start()
        return self

    def _find_place(self, world: World, path: Path) -> tuple[World, socket.socket | None]:
        """Rank 0 listens where the system finds room, and the others are told; the world as it is then."""
        server = listening("127.0.0.1", 0) if world.rank == 0 else None
        if server is None:
            place = _patiently(lambda: Place.told_in(path, self._left_s()), self._left_s())
        else:
            place = Place.on_this_machine(server.getsockname()[1])
            place.tell(path)
        found = replace(world, host="127.0.0.1", port=place.port, secret=place.secret, agent_store=False)
        return found, server

    def _meeting(self, purpose: str, store: Store) -> Meeting:
        name = f"streamdiff/{self._world.attempt}/{purpose}"
        return Meeting(PrefixStore(name, store), self._world.secret, f"{self._world.run} {name}")

    def _forget_place(self) -> None:
        if self._world.place is not None and self._world.rank == 0:
            self._world.place.unlink(missing_ok=True)

    def link(
        self,
        *,
        source: Iterator[Packet] | None = None,
        deliver: Callable[[Packet], None] | None = None,
    ) -> LineLink:
        """Wait until every rank is ready, open the edges, and return this rank's link. Call it once, models
        loaded.

        The head needs ``source``, the tail ``deliver``; other ranks ignore both.

        Raises RankFailed naming the ranks that did not become ready within ``limits.startup_s``.
        """
        rank, num_ranks = self._world.rank, self._schedule.num_ranks
        source = source if rank == 0 else None
        deliver = deliver if rank == num_ranks - 1 else None
        if self._watch is None:
            self._link = _local_link(source, deliver)
            return self._link
        watch = self._watch
        self._meet(watch)
        ends = _patiently(lambda: self._open_edges(watch), self._left_s(), watch.check)
        self._link = link = self._joined(ends, watch, source, deliver)
        watch.activity = lambda: link.activity
        return link

    def _joined(
        self,
        ends: list[tuple[Edge, EdgeEnd]],
        watch: Watch,
        source: Iterator[Packet] | None,
        deliver: Callable[[Packet], None] | None,
    ) -> LineLink:
        """A link over open edges, each with a thread of its own."""
        rank = self._world.rank
        inlet = outlet = give_back = returned = None
        for edge, end in ends:
            if edge.is_feedback and edge.dst == rank:
                returned = Returned(watch.check, taken=mark_used)
                self._spawn(Inbox(end, self._glance, returned.put), edge.src)
            elif edge.dst == rank:
                inbox = Inbox(end, self._glance)
                self._spawn(inbox, edge.src)
                inlet = partial(inbox.get, watch.check)
            else:
                outbox = Outbox(end, self._glance)
                self._spawn(outbox, edge.dst)
                put = partial(outbox.put, check=watch.check)
                outlet, give_back = (outlet, put) if edge.is_feedback else (put, give_back)
        if rank == 0 and returned is None:
            returned = Returned(watch.check)
            give_back = returned.put
        return LineLink(
            inlet=inlet, outlet=outlet, source=source, deliver=deliver, give_back=give_back, returned=returned
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        watch = self._watch
        try:
            if watch is not None:
                self._end_well(watch) if error is None else self._end_badly(watch, error)
        except KeyboardInterrupt:  # the guard's, a moment late
            if watch is None or watch.failure is None:
                raise
            raise watch.error() from error
        finally:
            self._forget_place()
            if self._link is not None:
                self._link.close()

    def _end_well(self, watch: Watch) -> None:
        if watch.activity().doing is not Doing.DONE:
            self._fail(watch, "left before its stream had ended")
            watch.leave()
            raise RankFailed(
                f"rank {self._world.rank} left its group before the stream had ended; "
                f"serve until the link gives None, or raise",
                rank=self._world.rank,
            )
        try:
            # No limit of its own: a rank that takes too long over anything is found by the watch.
            watch.wait_until(_all_done, float("inf"))
        finally:
            watch.leave()

    def _end_badly(self, watch: Watch, error: BaseException) -> None:
        watch.notice()
        failure = watch.failure
        stopped = not isinstance(error, Exception)
        if failure is None and stopped and not isinstance(error, KeyboardInterrupt):
            failure = watch.look_for_the_dead(_STOPPED_FROM_OUTSIDE_S, silence_s=_DEAD_AFTER_S)
            others = {rank: report for rank, report in watch.reports().items() if rank != self._world.rank}
            if failure is None and (lost := lost_at_start(others, silence_s=_DEAD_AFTER_S)) is not None:
                watch.propose(lost)
                failure = watch.wait_for_verdict(2.0)
        if failure is None:
            what = "was told to stop" if stopped else f"failed: {type(error).__name__}: {first_line(error)}"
            self._fail(watch, what, was_stopped=stopped)
            if not stopped:
                now = watch.activity()
                picture = render_around(self._schedule, self._world.rank, max(0, now.chunk))
                error.add_note(f"on rank {self._world.rank} at chunk {now.chunk}:\n{picture}")
        watch.leave()
        if failure is not None and stopped:
            raise watch.error() from error

    def _fail(self, watch: Watch, what: str, *, was_stopped: bool = False) -> None:
        watch.propose(Failure(self._world.rank, watch.activity().chunk, what, was_stopped))
        watch.wait_for_verdict(0.5 if was_stopped else 2.0)

    def _left_s(self) -> float:
        return self._limits.startup_s - (time.monotonic() - self._start_s)

    def _glance(self) -> None:
        """What the threads of this rank ask: not the main thread's notice of a failure."""
        assert self._watch is not None
        if self._watch.failure is not None:
            raise self._watch.error()

    def _meet(self, watch: Watch) -> None:
        """Wait until every rank has loaded its models, and see that all follow one schedule."""
        rank, size = self._world.rank, self._world.size
        meeting = self._meeting("plan", self._store)
        plan = f"{self._schedule} over {self._payload}"
        _patiently(lambda: meeting.set(str(rank), plan), self._left_s(), watch.check)
        ready = Activity(Doing.READY, -1, time.monotonic())
        watch.activity = lambda: ready
        if not watch.wait_until(_all_ready, self._left_s()):
            absent = {
                other: "never joined" if report.beat is None else "is still loading"
                for other, report in watch.reports().items()
                if not _is_ready(report)
            }
            words = ", ".join(f"rank {other} {what}" for other, what in absent.items())
            watch.propose(
                Failure(
                    min(absent, default=None),
                    -1,
                    f"was not ready within {self._limits.startup_s:g} s ({words}); look at its output",
                )
            )
            watch.wait_for_verdict(2.0)
            watch.check()
        plans = _patiently(lambda: meeting.get_many([str(other) for other in range(size)]), self._left_s(), watch.check)
        for other, theirs in enumerate(plans):
            if theirs != plan:
                raise ScheduleError(
                    f"rank {other} follows '{printable(theirs, 1000)}', rank {rank} '{plan}'; give every rank the same "
                    "arguments"
                )

    def _open_edges(self, watch: Watch) -> list[tuple[Edge, EdgeEnd]]:
        """Connect and warm this rank's edges, in the one order that all ranks share."""
        rank = self._world.rank
        use_device(self._device)
        ends: list[tuple[Edge, EdgeEnd]] = []
        for edge in self._schedule.edges:
            if rank not in (edge.src, edge.dst):
                continue
            name = f"streamdiff/{self._world.attempt}/{'feedback' if edge.is_feedback else 'edge'}/{edge}"
            try:
                end = EdgeEnd(
                    PrefixStore(name, self._store),
                    is_sender=edge.src == rank,
                    device=self._device,
                    payload=self._payload,
                    limits=self._limits,
                    check=self._glance,
                    is_local=bool(self._world.is_local),
                )
                end.greet()
            except (Broken, RuntimeError) as error:
                watch.suspect(edge.dst if edge.src == rank else edge.src, reason(error))
                watch.wait_for_verdict(self._limits.deadline_s)
                raise
            ends.append((edge, end))
        return ends

    def _spawn(self, box: Inbox | Outbox, peer: int) -> None:
        watch = self._watch
        assert watch is not None

        def run() -> None:
            try:
                use_device(self._device)
                box.run()
            except RankFailed as error:
                if watch.failure is None:
                    watch.propose(Failure(peer, -1, f"sent what cannot be read: {error}"))
            except Broken as error:
                watch.suspect(peer, str(error))
            except BaseException as error:  # noqa: BLE001  becomes this rank's verdict on itself
                chunk = watch.activity().chunk
                what = f"failed: {type(error).__name__}: {first_line(error)}"
                watch.propose(Failure(self._world.rank, chunk, what))

        threading.Thread(target=run, name=f"{type(box).__name__}-{peer}", daemon=True).start()


def _local_link(source: Iterator[Packet] | None, deliver: Callable[[Packet], None] | None) -> LineLink:
    """The link of a rank that is alone."""
    (link,) = local_links(
        1, last_dit_rank=0, source=source, deliver=deliver, check=lambda: None, queue_depth=QUEUE_DEPTH
    )
    return link


def _is_ready(report: Report) -> bool:
    return report.beat is not None and report.beat.doing is not Doing.STARTING


def _all_ready(reports: dict[int, Report]) -> bool:
    return all(map(_is_ready, reports.values()))


def _all_done(reports: dict[int, Report]) -> bool:
    return all(report.beat is not None and report.beat.doing is Doing.DONE for report in reports.values())


def _await_launcher(world: World, patience_s: float = 10.0) -> None:
    """The launcher listens before it starts a rank: one that refuses connections for longer than a moment is dead."""
    end_s = time.monotonic() + patience_s
    while True:
        try:
            socket.create_connection((world.host, world.port), timeout=patience_s).close()
        except OSError as error:
            if time.monotonic() < end_s:
                time.sleep(POLL_S)
                continue
            raise RankFailed(
                f"the launcher does not answer at {world.host}:{world.port} ({error.strerror or error}): it died or "
                f"cannot be reached; look at its output"
            ) from error
        return


def _open_store(world: World, timeout_s: float, *, host: bool, server: socket.socket | None = None) -> TCPStore:
    """A client of the store, and the store itself where ``host``; ``server``: the socket at which it listens."""
    if world.agent_store:
        _await_launcher(world)
    try:
        return TCPStore(
            world.host,
            world.port,
            world.size,
            is_master=host,
            timeout=timedelta(seconds=max(1.0, timeout_s)),
            wait_for_workers=False,
            master_listen_fd=None if server is None else server.detach(),
        )
    except RuntimeError as error:
        if host:
            raise ConfigError(
                f"cannot listen on port {world.port} ({first_line(error)}); choose another port"
            ) from error
        where = f"{world.host}:{world.port}"
        raise RankFailed(
            f"nobody answers at {where} after {timeout_s:.0f} s, where the ranks are to meet "
            f"({first_line(error)}); see whether {'the launcher' if world.agent_store else 'rank 0'} runs",
            rank=None if world.agent_store else 0,
        ) from error


def _patiently(call: Callable[[], T], timeout_s: float, check: Check = lambda: None) -> T:
    """Run a call that may block inside the library in a thread, and wait for it in naps."""
    results: list[T] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001  raised again by the caller
            errors.append(error)
        done.set()

    threading.Thread(target=run, name="patience", daemon=True).start()
    end_s = time.monotonic() + timeout_s
    while not done.wait(POLL_S):
        check()
        if time.monotonic() > end_s:
            raise RankFailed(f"the ranks did not connect within {timeout_s:.0f} s; look at their output")
    if errors:
        check()
        raise errors[0]
    return results[0]
