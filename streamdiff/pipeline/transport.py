"""Ranks that are processes: the only module that knows ``torch.distributed``.

    with Group(world, schedule) as group:
        stage = ...                                    # load this rank's models; the others see it loading
        serve(stage, group.link(source=..., deliver=...))  # source: used by the head; deliver: by the tail

Every edge of the schedule, the feedback edge included, is a two-rank process group of its own, opened and
warmed before the stream starts. Headers and manifests (`wire`) always travel over gloo, in which a send waits
until the receiver is ready for it; tensors in GPU memory follow over NCCL, or over gloo through pinned
memory. An inbox thread receives the next chunk and an outbox thread sends the last one while the main thread
computes. The main thread itself never waits inside the communication library: it sleeps on queues in short
naps and asks the `watch` in between.
"""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from streamdiff.errors import BackendError, ConfigError, RankFailed, ScheduleError
from streamdiff.pipeline import wire
from streamdiff.pipeline.link import POLL_S, Activity, Check, Doing, LineLink, Returned, local_links
from streamdiff.pipeline.packet import Packet
from streamdiff.pipeline.schedule import QUEUE_DEPTH, Edge, Schedule, render_around
from streamdiff.pipeline.watch import Failure, Limits, Report, Watch, first_line, lost_at_start

T = TypeVar("T")
Payload = Literal["gloo", "nccl"]

_FRAME_BYTES = 4096
"""Header and, as a rule, the whole manifest travel in one message of this size."""
_FOREVER = timedelta(days=365)
"""Timeout of the gloo groups. A timeout closes every connection of the group for good, and a stream may pause
for hours between two sentences; broken connections show at once, and the watch ends all other waits."""
_STOPPED_FROM_OUTSIDE_S = 2.5
"""A launcher stops all ranks when one dies: how long to look for that one before leaving."""
_DEAD_AFTER_S = 1.0
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

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ConfigError(f"rank {self.rank} does not exist in a world of {self.size}; ranks count from 0")


class Group:
    """All ranks of one stream, seen from one of them: opened, watched and ended here. A context manager.

    An exception that leaves the ``with`` block ends every other rank with RankFailed naming this one.
    SystemExit and its like (not KeyboardInterrupt) are taken for a launcher that stops all ranks because one
    died, and become a RankFailed that names the dead one when it can be found. A clean end waits until every
    rank is done. With one rank there is nothing to watch, and the link is local.

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
            _require_backends(payload, self._device)

    def __enter__(self) -> Group:
        self._start_s = time.monotonic()
        world = self._world
        if world.size == 1:
            return self
        hosts = world.rank == 0 and not world.agent_store
        # Two clients: a call on one waits for the call before it, and heartbeats must not wait.
        beats = _patiently(lambda: _open_store(world, self._left_s(), host=hosts), self._left_s())
        self._store = _patiently(lambda: _open_store(world, self._left_s(), host=False), self._left_s())
        self._hosting = beats  # the server lives as long as this object
        self._watch = Watch(
            world.rank,
            world.size,
            _Meeting(PrefixStore(f"streamdiff/{world.attempt}/watch", beats)),
            limits=self._limits,
            host=None if world.agent_store else 0,
            picture=lambda rank, chunk: render_around(self._schedule, rank, chunk),
            on_abort=self._on_abort,
        )
        self._watch.start()
        return self

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
        rank, schedule = self._world.rank, self._schedule
        source = source if rank == 0 else None
        deliver = deliver if rank == schedule.num_ranks - 1 else None
        if self._watch is None:
            self._link = local_links(
                1,
                last_dit_rank=0,
                source=source,
                deliver=deliver,
                check=lambda: None,
                queue_depth=QUEUE_DEPTH,
            )[0]
            return self._link
        watch = self._watch
        self._meet(watch)
        ends = _patiently(lambda: self._open_edges(watch), self._left_s(), watch.check)
        inlet = outlet = give_back = returned = None
        for edge, end in ends:
            if edge.is_feedback and edge.dst == rank:
                returned = Returned(watch.check)
                self._spawn(_Inbox(end, self._glance, returned.put), edge.src)
            elif edge.dst == rank:
                inbox = _Inbox(end, self._glance)
                self._spawn(inbox, edge.src)
                inlet = _Taker(inbox, watch.check)
            else:
                outbox = _Outbox(end, self._glance)
                self._spawn(outbox, edge.dst)
                giver = _Giver(outbox, watch.check)
                outlet, give_back = (outlet, giver) if edge.is_feedback else (giver, give_back)
        if rank == 0 and returned is None:
            returned = Returned(watch.check)
            give_back = returned.put
        link = LineLink(
            inlet=inlet, outlet=outlet, source=source, deliver=deliver, give_back=give_back, returned=returned
        )
        watch.activity = lambda: link.activity
        self._link = link
        return link

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
            failure = watch.wait_for_verdict(_STOPPED_FROM_OUTSIDE_S, silence_s=_DEAD_AFTER_S)
            others = {rank: report for rank, report in watch.reports().items() if rank != self._world.rank}
            if failure is None and (lost := lost_at_start(others, silence_s=_DEAD_AFTER_S)) is not None:
                watch.propose(lost)
                failure = watch.wait_for_verdict(2.0)
        if failure is None:
            what = "was told to stop" if stopped else f"failed: {type(error).__name__}: {first_line(error)}"
            self._fail(watch, what)
            if not stopped:
                now = watch.activity()
                picture = render_around(self._schedule, self._world.rank, max(0, now.chunk))
                error.add_note(f"on rank {self._world.rank} at chunk {now.chunk}:\n{picture}")
        watch.leave()
        if failure is not None and stopped:
            raise watch.error() from error

    def _fail(self, watch: Watch, what: str) -> None:
        watch.propose(Failure(self._world.rank, watch.activity().chunk, what))
        watch.wait_for_verdict(2.0)

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
        meeting = _Meeting(PrefixStore(f"streamdiff/{self._world.attempt}/plan", self._store))
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
                    f"rank {other} follows '{theirs}', rank {rank} '{plan}'; give every rank the same arguments"
                )

    def _open_edges(self, watch: Watch) -> list[tuple[Edge, _End]]:
        """Connect and warm this rank's edges, in the one order that all ranks share."""
        rank = self._world.rank
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this thread
        ends: list[tuple[Edge, _End]] = []
        for edge in self._schedule.edges:
            if rank not in (edge.src, edge.dst):
                continue
            name = f"streamdiff/{self._world.attempt}/{'feedback' if edge.is_feedback else 'edge'}/{edge}"
            try:
                end = _End(
                    PrefixStore(name, self._store),
                    is_sender=edge.src == rank,
                    device=self._device,
                    payload=self._payload,
                    limits=self._limits,
                    check=self._glance,
                )
                end.greet()
            except (_Broken, RuntimeError) as error:
                watch.suspect(edge.dst if edge.src == rank else edge.src, _reason(error))
                watch.wait_for_verdict(self._limits.deadline_s)
                raise
            ends.append((edge, end))
        return ends

    def _spawn(self, box: _Inbox | _Outbox, peer: int) -> None:
        watch = self._watch
        assert watch is not None

        def run() -> None:
            try:
                if self._device.type == "cuda":
                    torch.cuda.set_device(self._device)
                box.run()
            except RankFailed as error:
                if watch.failure is None:
                    watch.propose(Failure(peer, -1, f"sent what cannot be read: {error}"))
            except _Broken as error:
                watch.suspect(peer, str(error))
            except BaseException as error:  # noqa: BLE001  becomes this rank's verdict on itself
                chunk = watch.activity().chunk
                what = f"failed: {type(error).__name__}: {first_line(error)}"
                watch.propose(Failure(self._world.rank, chunk, what))

        threading.Thread(target=run, name=f"{type(box).__name__}-{peer}", daemon=True).start()


class _Broken(Exception):  # noqa: N818  names a state, not an error of ours
    """The connection to the other end is gone."""


class _End:
    """One end of an edge: a two-rank group in which rank 0 sends to rank 1, and a count of messages."""

    def __init__(
        self,
        store: Store,
        *,
        is_sender: bool,
        device: torch.device,
        payload: Payload,
        limits: Limits,
        check: Check,
    ) -> None:
        me = 0 if is_sender else 1
        self._is_sender, self._peer = is_sender, 1 - me
        self._device, self._check = device, check
        self._seq = 0
        # Made directly rather than with `new_group`: only the two ends take part, and nothing global remains.
        self._gloo: Any = dist.ProcessGroupGloo(PrefixStore("gloo", store), me, 2, _FOREVER)
        self._nccl: Any = None
        if payload == "nccl":
            options: Any = dist.ProcessGroupNCCL.Options()
            # Both ends have agreed by header when this runs, so it cannot be long.
            options._timeout = timedelta(seconds=max(60.0, limits.deadline_s))
            self._nccl = dist.ProcessGroupNCCL(PrefixStore("nccl", store), me, 2, options)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def greet(self) -> None:
        """Open the connections by using them once: NCCL connects on first use, which takes up to a second."""
        if self._is_sender:
            self._send_frame(wire.Header(wire.Kind.HELLO, self._seq), b"")
        else:
            self._receive_frame()
        if self._nccl is not None:
            buffer_S = torch.zeros(1, dtype=torch.uint8, device=self._device)
            call = self._nccl.send if self._is_sender else self._nccl.recv
            self._finish(call([buffer_S], self._peer, 0))
        self._seq += 1

    def send(self, packet: Packet | None, ready: torch.cuda.Event | None) -> None:
        """Returns when the receiver has it. ``ready``: when the packet's GPU tensors are written."""
        if packet is None:
            self._send_frame(wire.Header(wire.Kind.END, self._seq), b"")
            return
        message = wire.take_apart(packet)
        cpu_bytes, cuda_bytes = message.num_bytes["cpu"], message.num_bytes["cuda"]
        cpu_S = torch.empty(cpu_bytes, dtype=torch.uint8)
        wire.fill_payload(cpu_S, message, "cpu")
        cuda_S = self._gather(message, ready) if cuda_bytes else None
        header = wire.Header(
            wire.Kind.PACKET,
            self._seq,
            packet.epoch,
            packet.chunk,
            len(message.manifest),
            cpu_bytes,
            cuda_bytes,
        )
        self._send_frame(header, message.manifest)
        if cpu_bytes:
            self._put(cpu_S)
        if cuda_S is not None:
            self._send_cuda(cuda_S)
        self._seq += 1

    def recv(self) -> Packet | None:
        """Next packet, all of it here; None when the stream has ended."""
        header, manifest = self._receive_frame()
        if header.kind is wire.Kind.END:
            return None
        payloads: dict[str, Tensor] = {}
        if header.cpu_bytes:
            # A new buffer each time: the packet's tensors are views of it, and a stage may keep them.
            payloads["cpu"] = torch.empty(header.cpu_bytes, dtype=torch.uint8)
            self._get(payloads["cpu"])
        if header.cuda_bytes:
            payloads["cuda"] = self._receive_cuda(header.cuda_bytes)
        packet = wire.put_together(manifest, payloads)
        if (packet.chunk, packet.epoch) != (header.chunk, header.epoch):
            raise RankFailed(f"the header says chunk {header.chunk}, the packet chunk {packet.chunk}")
        self._seq += 1
        return packet

    def _send_frame(self, header: wire.Header, manifest: bytes) -> None:
        frame = bytearray(header.pack() + manifest)
        head = frame[:_FRAME_BYTES].ljust(_FRAME_BYTES, b"\0")
        self._put(torch.frombuffer(head, dtype=torch.uint8))
        if len(frame) > _FRAME_BYTES:
            rest = frame[_FRAME_BYTES:]
            self._put(torch.frombuffer(rest, dtype=torch.uint8))

    def _receive_frame(self) -> tuple[wire.Header, bytes]:
        frame = bytearray(_FRAME_BYTES)
        self._get(torch.frombuffer(frame, dtype=torch.uint8))
        size = wire.HEADER.size
        header = wire.Header.unpack(bytes(frame[:size]))
        if header.seq != self._seq:
            raise RankFailed(f"message {header.seq} came where {self._seq} was due: one was lost or doubled")
        left = size + header.manifest_bytes - _FRAME_BYTES
        if left > 0:
            rest = bytearray(left)
            self._get(torch.frombuffer(rest, dtype=torch.uint8))
            frame += rest
        return header, bytes(frame[size : size + header.manifest_bytes])

    def _put(self, buffer_S: Tensor) -> None:
        """Returns when the receiver has asked for it and it is on its way."""
        try:
            self._gloo.send([buffer_S], self._peer, 0).wait()
        except RuntimeError as error:
            raise _Broken(_reason(error)) from error

    def _get(self, buffer_S: Tensor) -> None:
        try:
            self._gloo.recv([buffer_S], self._peer, 0).wait()
        except RuntimeError as error:
            raise _Broken(_reason(error)) from error

    def _gather(self, message: wire.Message, ready: torch.cuda.Event | None) -> Tensor:
        """GPU tensors in one buffer, in the memory that the payload leaves from."""
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            if ready is not None:
                self._stream.wait_event(ready)
            num_bytes = message.num_bytes["cuda"]
            if self._nccl is None:
                buffer_S = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
            else:
                buffer_S = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
            wire.fill_payload(buffer_S, message, "cuda")
        self._finish(self._stream.record_event())
        return buffer_S

    def _send_cuda(self, buffer_S: Tensor) -> None:
        if self._nccl is None:
            self._put(buffer_S)
            return
        with torch.cuda.stream(self._stream):
            work = self._nccl.send([buffer_S], self._peer, 0)
        self._finish(work)

    def _receive_cuda(self, num_bytes: int) -> Tensor:
        if self._stream is None:
            raise RankFailed("tensors in GPU memory arrived at a rank that has none; give every rank a GPU")
        with torch.cuda.stream(self._stream):
            if self._nccl is None:
                host_S = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
                self._get(host_S)
                buffer_S = host_S.to(self._device, non_blocking=True)
                done: Any = self._stream.record_event()
            else:
                buffer_S = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
                done = self._nccl.recv([buffer_S], self._peer, 0)
        self._finish(done)
        return buffer_S

    def _finish(self, work: Any) -> None:
        """Wait on the host, in naps: packets are handed over whole, and no kernel waits for a dead peer."""
        is_event = isinstance(work, torch.cuda.Event)
        while not (work.query() if is_event else work.is_completed()):
            self._check()
            time.sleep(2e-4)
        # A transfer that failed also counts as completed. The library warns once that this call may go; there
        # is no other that tells the two apart.
        if not is_event and not work.is_success():
            raise _Broken("the transfer between GPUs failed")


class _Outbox:
    """Sends one packet while the next is made; room for one."""

    def __init__(self, end: _End, check: Check) -> None:
        self._end, self._check = end, check
        self._room = threading.Semaphore(1)
        self._queue: queue.SimpleQueue[tuple[Packet | None, torch.cuda.Event | None]] = queue.SimpleQueue()

    def put(self, packet: Packet | None, check: Check) -> None:
        ready = None
        if packet is not None and any(tensor.is_cuda for tensor in wire.tensors_of(packet)):
            ready = torch.cuda.Event()
            ready.record()
        _acquire(self._room, check)
        self._queue.put((packet, ready))

    def run(self) -> None:
        while True:
            packet, ready = _take(self._queue, self._check)
            self._end.send(packet, ready)
            self._room.release()
            if packet is None:
                return


class _Inbox:
    """Receives one packet while the one before is worked on; room for one, unless ``sink`` takes all."""

    def __init__(self, end: _End, check: Check, sink: Callable[[Packet | None], None] | None = None) -> None:
        self._end, self._check, self._sink = end, check, sink
        self._room = threading.Semaphore(1)
        self._queue: queue.SimpleQueue[Packet | None] = queue.SimpleQueue()

    def get(self, check: Check) -> Packet | None:
        packet = _take(self._queue, check)
        self._room.release()
        if packet is not None:
            for tensor in wire.tensors_of(packet):
                if tensor.is_cuda:
                    # Born on the edge's stream, used on ours: the allocator must not reuse it before we are
                    # done.
                    tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return packet

    def run(self) -> None:
        while True:
            if self._sink is None:
                _acquire(self._room, self._check)
            packet = self._end.recv()
            (self._queue.put if self._sink is None else self._sink)(packet)
            if packet is None:
                return


@dataclass(frozen=True, slots=True)
class _Taker:
    inbox: _Inbox
    check: Check

    def __call__(self) -> Packet | None:
        return self.inbox.get(self.check)


@dataclass(frozen=True, slots=True)
class _Giver:
    outbox: _Outbox
    check: Check

    def __call__(self, packet: Packet | None) -> None:
        self.outbox.put(packet, self.check)


def _acquire(room: threading.Semaphore, check: Check) -> None:
    while True:
        check()
        if room.acquire(timeout=POLL_S):
            return


def _take(box: queue.SimpleQueue[T], check: Check) -> T:
    while True:
        check()
        try:
            return box.get(timeout=POLL_S)
        except queue.Empty:
            continue


def _reason(error: Exception) -> str:
    """What the library says without saying where in its source, and without its advice."""
    return re.sub(r"^\[[^\]]*\.cc:\d+\]\s*", "", first_line(error)).split(". ")[0]


def _is_ready(report: Report) -> bool:
    return report.beat is not None and report.beat.doing is not Doing.STARTING


def _all_ready(reports: dict[int, Report]) -> bool:
    return all(map(_is_ready, reports.values()))


def _all_done(reports: dict[int, Report]) -> bool:
    return all(report.beat is not None and report.beat.doing is Doing.DONE for report in reports.values())


class _Meeting:
    """The store at which ranks meet, as the watch knows it."""

    def __init__(self, store: Store) -> None:
        self._store: Any = store

    def set(self, key: str, value: str) -> None:
        self._store.set(key, value)

    def get_many(self, keys: list[str]) -> list[str]:
        return [value.decode() for value in self._store.multi_get(keys)]

    def compare_set(self, key: str, expected: str, value: str) -> str:
        return self._store.compare_set(key, expected, value).decode()


def _open_store(world: World, timeout_s: float, *, host: bool) -> TCPStore:
    try:
        return TCPStore(
            world.host,
            world.port,
            world.size,
            is_master=host,
            timeout=timedelta(seconds=max(1.0, timeout_s)),
            wait_for_workers=False,
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


def _require_backends(payload: Payload, device: torch.device) -> None:
    if not (dist.is_available() and dist.is_gloo_available()):
        raise BackendError(f"this torch ({torch.__version__}) has no gloo; install a build that has, or run one rank")
    if payload == "nccl" and not (dist.is_nccl_available() and device.type == "cuda"):
        raise BackendError(
            f"payload='nccl' needs a CUDA device and a torch built with NCCL, got device={device} and torch "
            f"{torch.__version__}; use payload='gloo'"
        )
