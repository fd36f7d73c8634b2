"""A rank's place in the line: packets come in on one side and go out on the other.

The ends of the line and the way back are hidden here, so that the rank loop (`run_rank`) needs to know of
neither: the head's link draws packets from a source and fills returned latents into them, the link of the
last DiT rank returns latents that are asked for, the tail's link delivers. What an edge is made of, a queue
between threads or a process group, is the business of whoever makes the link.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from streamdiff.errors import MemoryOrderError, ScheduleError
from streamdiff.pipeline.packet import Packet, RefreshSink, ReturnLatent, Rewind, SetReference

POLL_S = 0.05
"""Longest sleep between two looks at whether the stream still stands."""

NUM_RETURNED_KEPT = 8
"""Returned latents that the head remembers; a rewind may ask for one again."""

T = TypeVar("T")
Check = Callable[[], None]
"""Returns while the stream stands, raises when it has fallen. Asked at least every ``POLL_S`` of any wait."""


class Link(Protocol):
    """All that a rank sees of the others."""

    def recv(self) -> Packet | None:
        """Next packet, or None when the stream has ended."""
        ...

    def send(self, packet: Packet | None) -> None:
        """Hand a packet on; None ends the stream."""
        ...

    def close(self) -> None: ...


class Doing(StrEnum):
    """What a rank can be doing."""

    STARTING = "starting"
    READY = "ready"
    SOURCING = "waiting for its source"
    WAITING = "waiting for another rank"
    WORKING = "working"
    SENDING = "handing on"
    DELIVERING = "delivering"
    STOPPING = "stopping, as it was told"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Activity:
    """What a rank does, on which chunk (-1: none yet), since when on its monotonic clock."""

    doing: Doing
    chunk: int
    since_s: float


class Mailbox(Generic[T]):
    """A bounded queue whose waits give up when the stream falls."""

    def __init__(self, depth: int, check: Check) -> None:
        self._queue: queue.Queue[T] = queue.Queue(depth)
        self._check = check

    def put(self, item: T) -> None:
        while True:
            self._check()
            try:
                return self._queue.put(item, timeout=POLL_S)
            except queue.Full:
                continue

    def get(self, check: Check | None = None) -> T:
        while True:
            (check or self._check)()
            try:
                return self._queue.get(timeout=POLL_S)
            except queue.Empty:
                continue


class Returned:
    """Latents that came back to the head. Bounded by forgetting the oldest, so returning one never waits.

    ``taken`` is told of every packet handed out, by the thread that will use it.
    """

    def __init__(self, check: Check, taken: Callable[[Packet], None] | None = None) -> None:
        self._taken = taken
        self._packets: dict[tuple[int, int], Packet] = {}
        self._changed = threading.Condition()
        self._check = check

    def put(self, packet: Packet | None) -> None:
        if packet is None:
            return
        with self._changed:
            self._packets[packet.chunk, packet.epoch] = packet
            while len(self._packets) > NUM_RETURNED_KEPT:
                del self._packets[next(iter(self._packets))]
            self._changed.notify_all()

    def get(self, chunk: int, epoch: int) -> Packet:
        while True:
            self._check()
            with self._changed:
                packet = self._packets.get((chunk, epoch))
                if packet is None:
                    self._changed.wait(POLL_S)
                    continue
            if self._taken is not None:
                self._taken(packet)
            return packet


class Order:
    """Chunks come one after the other; only a new stream or a rewind may step back.

    Raises MemoryOrderError for a packet out of turn.
    """

    def __init__(self) -> None:
        self._last: Packet | None = None

    def check(self, packet: Packet) -> None:
        last, self._last = self._last, packet
        if last is None:
            return
        rewind = next((command for command in packet.commands if isinstance(command, Rewind)), None)
        if any(isinstance(command, SetReference) for command in packet.commands):
            is_next = packet.epoch >= last.epoch
        elif rewind is not None:
            is_next = packet.epoch > last.epoch and rewind.chunk == packet.chunk <= last.chunk + 1
        else:
            is_next = packet.epoch == last.epoch and packet.chunk == last.chunk + 1
        if not is_next:
            raise MemoryOrderError(
                f"chunk {packet.chunk} of epoch {packet.epoch} cannot follow chunk {last.chunk} of epoch "
                f"{last.epoch}: chunks count up by one, only SetReference or a Rewind to that very chunk in "
                f"a new epoch steps back; send the missing packet or the command"
            )


class LineLink:
    """One rank's link. Give it an inlet or a source, and an outlet or a delivery; feedback where there is
    one.

    ``inlet`` and ``outlet`` are the near ends of the forward edges. ``give_back`` (last DiT rank) takes a
    packet that holds a returned latent; ``returned`` (head) is where those arrive.
    """

    def __init__(
        self,
        *,
        inlet: Callable[[], Packet | None] | None = None,
        outlet: Callable[[Packet | None], None] | None = None,
        source: Iterator[Packet] | None = None,
        deliver: Callable[[Packet], None] | None = None,
        give_back: Callable[[Packet | None], None] | None = None,
        returned: Returned | None = None,
    ) -> None:
        if (inlet is None) == (source is None) or (outlet is None) == (deliver is None):
            raise ScheduleError(
                "a link has one way in and one way out: the head needs a source, the tail a deliver, all "
                "others neither; check which rank was given which"
            )
        self._inlet, self._source = inlet, source
        self._outlet, self._deliver = outlet, deliver
        self._give_back, self._returned = give_back, returned
        self._order = Order()
        self._will_return: dict[int, int] = {}  # chunk -> epoch in which it was last made
        self._chunk = -1
        self.activity = Activity(Doing.READY, -1, time.monotonic())

    def recv(self) -> Packet | None:
        if self._inlet is not None:
            self._now(Doing.WAITING)
            packet = self._inlet()
        else:
            assert self._source is not None
            self._now(Doing.SOURCING)
            packet = next(self._source, None)
        if packet is not None:
            self._order.check(packet)
            self._chunk = packet.chunk
            if self._source is not None:
                packet = self._fill(packet)
            self._now(Doing.WORKING)
        return packet

    def send(self, packet: Packet | None) -> None:
        if self._give_back is not None:
            if packet is None:
                self._give_back(None)
            elif any(isinstance(command, ReturnLatent) for command in packet.commands):
                # A copy: a view would keep the whole chunk alive for as long as the head remembers its first
                # frame.
                first_BCTHW = packet.latent_BCTHW[:, :, :1].clone()
                self._give_back(
                    Packet(chunk=packet.chunk, epoch=packet.epoch, lead=packet.lead, latent_BCTHW=first_BCTHW)
                )
        if self._outlet is not None:
            self._now(Doing.SENDING)
            self._outlet(packet)
        elif packet is not None:
            assert self._deliver is not None
            self._now(Doing.DELIVERING)
            self._deliver(packet)
        if packet is None:
            self._now(Doing.DONE)

    def close(self) -> None:
        """Let go of the source, which may hold files open."""
        close = getattr(self._source, "close", None)
        if close is not None:
            close()

    def _now(self, doing: Doing) -> None:
        self.activity = Activity(doing, self._chunk, time.monotonic())

    def _fill(self, packet: Packet) -> Packet:
        """Put returned latents into the commands that wait for them."""
        for command in packet.commands:
            if isinstance(command, Rewind):
                self._will_return = {c: e for c, e in self._will_return.items() if c < command.chunk}
            elif isinstance(command, SetReference):
                self._will_return = {}
        if any(isinstance(command, RefreshSink) for command in packet.commands):
            self._now(Doing.WAITING)
            commands = tuple(
                replace(command, latent_BCTHW=self._wait_for(command.source_chunk, packet))
                if isinstance(command, RefreshSink) and command.latent_BCTHW is None
                else command
                for command in packet.commands
            )
            packet = replace(packet, commands=commands)
        if any(isinstance(command, ReturnLatent) for command in packet.commands):
            self._will_return[packet.chunk] = packet.epoch
            while len(self._will_return) > NUM_RETURNED_KEPT:
                del self._will_return[next(iter(self._will_return))]
        return packet

    def _wait_for(self, source_chunk: int, packet: Packet) -> Tensor:
        if source_chunk not in self._will_return or self._returned is None:
            raise ScheduleError(
                f"chunk {packet.chunk} asks for the first latent of chunk {source_chunk}, which nobody "
                f"will return; put ReturnLatent on that chunk (the last {NUM_RETURNED_KEPT} are kept)"
            )
        return self._returned.get(source_chunk, self._will_return[source_chunk]).latent_BCTHW


def local_links(
    num_ranks: int,
    *,
    last_dit_rank: int,
    source: Iterator[Packet] | None,
    deliver: Callable[[Packet], None] | None,
    check: Check,
    queue_depth: int,
) -> list[LineLink]:
    """Links for ranks that are threads of one process, or one rank alone; packets are handed over by
    reference.

    A stage must therefore not write into the tensors of a packet it was given or has sent.
    """
    edges: list[Mailbox[Packet | None]] = [Mailbox(queue_depth, check) for _ in range(num_ranks - 1)]
    returned = Returned(check)
    return [
        LineLink(
            inlet=edges[rank - 1].get if rank > 0 else None,
            source=source if rank == 0 else None,
            outlet=edges[rank].put if rank < num_ranks - 1 else None,
            deliver=deliver if rank == num_ranks - 1 else None,
            give_back=returned.put if rank == last_dit_rank else None,
            returned=returned if rank == 0 else None,
        )
        for rank in range(num_ranks)
    ]
