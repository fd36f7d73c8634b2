"""What an edge between two ranks is made of: a two-rank process group, and a thread that sends or receives.

Headers and manifests (`wire`) always travel over gloo, in which a send waits until the receiver is ready for it;
tensors in GPU memory follow over NCCL, or over gloo through pinned memory. An inbox thread receives the next chunk and
an outbox thread sends the last one while the main thread computes. The main thread itself never waits inside the
communication library: it sleeps on queues in short naps and asks the `watch` in between.

With `group`, the only module of the pipeline that knows ``torch.distributed``.
"""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]

from streamdiff.errors import BackendError, RankFailed
from streamdiff.pipeline import wire
from streamdiff.pipeline.link import POLL_S, Check
from streamdiff.pipeline.packet import Packet
from streamdiff.pipeline.watch import Limits, first_line

T = TypeVar("T")
Payload = Literal["gloo", "nccl"]

_FRAME_BYTES = 4096
"""Header and, as a rule, the whole manifest travel in one message of this size."""
_FOREVER = timedelta(days=365)
"""Timeout of the gloo groups. A timeout closes every connection of the group for good, and a stream may pause
for hours between two sentences; broken connections show at once, and the watch ends all other waits."""


class Broken(Exception):  # noqa: N818  names a state, not an error of ours
    """The connection to the other end is gone."""


class EdgeEnd:
    """One end of an edge: a two-rank group in which rank 0 sends to rank 1, and a count of messages.

    ``is_local``: both ends are on this machine, and talk over its loopback interface.
    """

    def __init__(
        self,
        store: Store,
        *,
        is_sender: bool,
        device: torch.device,
        payload: Payload,
        limits: Limits,
        check: Check,
        is_local: bool = False,
    ) -> None:
        me = 0 if is_sender else 1
        self._is_sender, self._peer = is_sender, 1 - me
        self._device, self._check = device, check
        self._seq = 0
        # Made directly rather than with `new_group`: only the two ends take part, and nothing global remains.
        self._gloo: Any = dist.ProcessGroupGloo(PrefixStore("gloo", store), me, 2, _gloo_options(is_local))
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
            self._finish_transfer(call([buffer_S], self._peer, 0))
        self._seq += 1

    def send(self, packet: Packet | None, ready: Sequence[torch.cuda.Event]) -> None:
        """Returns when the receiver has it. ``ready``: the packet's GPU tensors are written when all have happened."""
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
            raise Broken(reason(error)) from error

    def _get(self, buffer_S: Tensor) -> None:
        try:
            self._gloo.recv([buffer_S], self._peer, 0).wait()
        except RuntimeError as error:
            raise Broken(reason(error)) from error

    def _gather(self, message: wire.Message, ready: Sequence[torch.cuda.Event]) -> Tensor:
        """GPU tensors in one buffer, in the memory that the payload leaves from."""
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            for event in ready:
                self._stream.wait_event(event)
            num_bytes = message.num_bytes["cuda"]
            if self._nccl is None:
                buffer_S = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
            else:
                buffer_S = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
            wire.fill_payload(buffer_S, message, "cuda")
        self._finish_event(_recorded(self._stream))
        return buffer_S

    def _send_cuda(self, buffer_S: Tensor) -> None:
        if self._nccl is None:
            self._put(buffer_S)
            return
        with torch.cuda.stream(self._stream):
            work = self._nccl.send([buffer_S], self._peer, 0)
        self._finish_transfer(work)

    def _receive_cuda(self, num_bytes: int) -> Tensor:
        if self._stream is None:
            raise RankFailed("tensors in GPU memory arrived at a rank that has none; give every rank a GPU")
        with torch.cuda.stream(self._stream):
            if self._nccl is None:
                host_S = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
                self._get(host_S)
                buffer_S = host_S.to(self._device, non_blocking=True)
                self._finish_event(_recorded(self._stream))
            else:
                buffer_S = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
                self._finish_transfer(self._nccl.recv([buffer_S], self._peer, 0))
        return buffer_S

    def _finish_event(self, event: torch.cuda.Event) -> None:
        """Wait on the host, in naps: packets are handed over whole, and no kernel waits for a dead peer."""
        while not event.query():
            self._nap()

    def _finish_transfer(self, work: Any) -> None:
        """The same for a transfer between GPUs."""
        while not work.is_completed():
            self._nap()
        # One that failed counts as completed too. NCCL's work has no is_success; waiting for what is over costs nothing
        # and raises what went wrong.
        try:
            work.wait()
        except RuntimeError as error:
            raise Broken(f"the transfer between GPUs failed: {reason(error)}") from error

    def _nap(self) -> None:
        self._check()
        time.sleep(2e-4)


class Outbox:
    """Sends one packet while the next is made; room for one."""

    def __init__(self, end: EdgeEnd, check: Check) -> None:
        self._end, self._check = end, check
        self._room = threading.Semaphore(1)
        self._queue: queue.SimpleQueue[tuple[Packet | None, Sequence[torch.cuda.Event]]] = queue.SimpleQueue()

    def put(self, packet: Packet | None, check: Check) -> None:
        ready: list[torch.cuda.Event] = []
        if packet is not None:
            # On the stream that writes the tensors: that of their device, which need not be the current one.
            devices = {tensor.device for tensor in wire.tensors_of(packet) if tensor.is_cuda}
            ready = [_recorded(torch.cuda.current_stream(device)) for device in devices]
        _acquire(self._room, check)
        self._queue.put((packet, ready))

    def run(self) -> None:
        while True:
            packet, ready = _take(self._queue, self._check)
            self._end.send(packet, ready)
            self._room.release()
            if packet is None:
                return


class Inbox:
    """Receives one packet while the one before is worked on; room for one, unless ``sink`` takes all."""

    def __init__(self, end: EdgeEnd, check: Check, sink: Callable[[Packet | None], None] | None = None) -> None:
        self._end, self._check, self._sink = end, check, sink
        self._room = threading.Semaphore(1)
        self._queue: queue.SimpleQueue[Packet | None] = queue.SimpleQueue()

    def get(self, check: Check) -> Packet | None:
        packet = _take(self._queue, check)
        self._room.release()
        if packet is not None:
            mark_used(packet)
        return packet

    def run(self) -> None:
        while True:
            if self._sink is None:
                _acquire(self._room, self._check)
            packet = self._end.recv()
            (self._queue.put if self._sink is None else self._sink)(packet)
            if packet is None:
                return


def _gloo_options(is_local: bool) -> Any:
    """On one machine nobody else may connect; else GLOO_SOCKET_IFNAME, or the name of the machine, says where."""
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = _FOREVER
    options._devices = [gloo.create_device(hostname="127.0.0.1") if is_local else gloo.create_default_device()]
    return options


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """An event that happens when all that was launched on the stream so far is done."""
    event = torch.cuda.Event()
    event.record(stream)
    return event


def mark_used(packet: Packet) -> None:
    """Tell the allocator that this thread's stream uses a packet's tensors, which were born on the stream of an edge:
    their memory must not be used again before that stream is done with them.
    """
    for tensor in wire.tensors_of(packet):
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


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


def reason(error: Exception) -> str:
    """What the library says without saying where in its source, and without its advice."""
    return re.sub(r"^\[[^\]]*\.cc:\d+\]\s*", "", first_line(error)).split(". ")[0]


def require_backends(payload: Payload, device: torch.device) -> None:
    if not (dist.is_available() and dist.is_gloo_available()):
        raise BackendError(f"this torch ({torch.__version__}) has no gloo; install a build that has, or run one rank")
    if payload == "nccl" and not (dist.is_nccl_available() and device.type == "cuda"):
        raise BackendError(
            f"payload='nccl' needs a CUDA device and a torch built with NCCL, got device={device} and torch "
            f"{torch.__version__}; use payload='gloo'"
        )
