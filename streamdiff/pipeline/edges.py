"""Edges between processes that outlive the processes at their ends.

Everything that enters a line is numbered, and every rank makes one entry of one entry, under the same number; so a
number says on both ends of an edge what has come and what has not. An `Outbox` keeps what it sent until the receiver
says that it will never ask for it again. An edge is a pair of connected sockets that a third process makes and hands to
both; when an end is replaced, both get a new pair, the `Inbox` says what it has, and the rest is sent again. What comes
twice is dropped: a rank makes the same bits of the same entry.

Nobody else can connect to such a pair, it has no address. A thread that waits for one is waited for by nobody; it ends
when its process closes its end or the other end is closed, which the system does when a process dies.
"""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import struct
import threading
from collections import deque
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from streamdiff.errors import RankFailed
from streamdiff.pipeline import wire
from streamdiff.pipeline.link import POLL_S, Check
from streamdiff.pipeline.packet import Packet

_HEAD = struct.Struct("<qIQ")
"""Number, bytes of words, bytes of tensors."""
_NUMBER = struct.Struct("<q")
_MOST_WORDS, _MOST_PAYLOAD = 1 << 22, 1 << 32


class What(StrEnum):
    """What an entry is."""

    PACKET = "packet"
    END = "end"
    """Its stream has ended."""
    FAILED = "failed"
    """A rank could not make it, and will make nothing of its stream any more."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Entry:
    """What walks along a line of processes."""

    number: int
    """Counts what enters a line, of all streams, from 0."""
    seat: int
    what: What
    key: tuple[int, int] | None = None
    """Seed and number of a stream that begins here."""
    packet: Packet | None = None
    rank: int = -1
    why: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Sealed:
    """An entry as it travels and is kept."""

    number: int
    words: bytes
    payload_S: Tensor

    def open(self) -> Entry:
        """The entry; its tensors are views of the payload. Raises RankFailed for another version's."""
        words, _, manifest = self.words.partition(b"\n")
        try:
            facts = json.loads(words)
            key = None if facts["key"] is None else (int(facts["key"][0]), int(facts["key"][1]))
            what, seat = What(facts["what"]), int(facts["seat"])
            rank, why = int(facts["rank"]), str(facts["why"])
        except (KeyError, TypeError, ValueError) as error:
            raise RankFailed(f"cannot read an entry ({error}); run the same streamdiff on every rank") from error
        packet = wire.put_together(manifest, {"cpu": self.payload_S}) if what is What.PACKET else None
        return Entry(number=self.number, seat=seat, what=what, key=key, packet=packet, rank=rank, why=why)


def seal(entry: Entry) -> Sealed:
    """Bring an entry into the form in which it travels; tensors on a device are copied to the host, and waited for."""
    facts = {"seat": entry.seat, "what": entry.what, "key": entry.key, "rank": entry.rank, "why": entry.why}
    words, payload_S = json.dumps(facts).encode(), torch.empty(0, dtype=torch.uint8)
    if entry.packet is not None:
        message = wire.take_apart(_on_host(entry.packet))
        payload_S = torch.empty(message.num_bytes["cpu"], dtype=torch.uint8)
        wire.fill_payload(payload_S, message, "cpu")
        words += b"\n" + message.manifest
    return Sealed(entry.number, words, payload_S)


def _on_host(packet: Packet) -> Packet:
    """A stage leaves its latent where it computes; everything else came from the host."""
    return replace(packet, latent_BCTHW=packet.latent_BCTHW.cpu())


class Outbox:
    """The sending end: entries in order, each kept until the other end has settled it.

    ``depth``: entries that may be kept; then `put` waits. ``log``: what another process had kept.
    """

    def __init__(self, depth: int, log: list[Sealed] | None = None) -> None:
        self._depth = depth
        self._changed = threading.Condition()
        self._log: deque[Sealed] = deque(log or [])
        self._socket: socket.socket | None = None

    def wait_for_room(self, check: Check) -> None:
        """Wait until one more may be put; there is one who puts."""
        while True:
            check()
            with self._changed:
                if len(self._log) < self._depth:
                    return
                self._changed.wait(POLL_S)

    def put(self, sealed: Sealed, check: Check) -> None:
        """Send it, now or when there is a connection; waits for room."""
        self.wait_for_room(check)
        with self._changed:
            self._log.append(sealed)
            self._changed.notify_all()

    def kept(self) -> list[Sealed]:
        """What the other end may still ask for."""
        with self._changed:
            return list(self._log)

    def connect(self, end: socket.socket) -> None:
        """Go on over another pair of sockets; takes the socket over."""
        with self._changed:
            before, self._socket = self._socket, end
            self._changed.notify_all()
        _wake(before)
        threading.Thread(target=self._talk, args=(end,), name="outbox", daemon=True).start()

    def close(self) -> None:
        with self._changed:
            before, self._socket = self._socket, None
            self._changed.notify_all()
        _wake(before)

    def _talk(self, end: socket.socket) -> None:
        """Learn what the other end has, then send the rest, while another thread hears what it has settled."""
        listener = threading.Thread(target=self._listen, args=(end,), name="outbox-settled", daemon=True)
        with contextlib.suppress(OSError):
            has = _read_number(end)
            listener.start()
            while (sealed := self._after(has, end)) is not None:
                end.sendall(_HEAD.pack(sealed.number, len(sealed.words), sealed.payload_S.numel()))
                end.sendall(sealed.words)
                if sealed.payload_S.numel():
                    end.sendall(memory_of(sealed.payload_S))
                has = sealed.number
        _wake(end)
        if listener.ident is not None:
            listener.join()
        end.close()

    def _after(self, number: int, end: socket.socket) -> Sealed | None:
        """The entry after one, when there is one; None when the connection is not the one that counts any more."""
        while True:
            with self._changed:
                if self._socket is not end:
                    return None
                for sealed in self._log:
                    if sealed.number > number:
                        return sealed
                self._changed.wait(POLL_S)

    def _listen(self, end: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                settled = _read_number(end)
                with self._changed:
                    while self._log and self._log[0].number <= settled:
                        self._log.popleft()
                    self._changed.notify_all()


class Inbox:
    """The receiving end: every entry once, in order, whatever happens to the sender.

    ``settled``: the last entry that will never be asked for again.
    """

    def __init__(self, settled: int = -1) -> None:
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[Sealed] = queue.SimpleQueue()
        self._last = self._settled = settled
        self._gap = False
        self._socket: socket.socket | None = None

    def connect(self, end: socket.socket) -> None:
        """Go on over another pair of sockets; takes the socket over."""
        with self._lock:
            before, self._socket = self._socket, end
            with contextlib.suppress(OSError):
                end.sendall(_NUMBER.pack(self._last) + _NUMBER.pack(self._settled))
        _wake(before)
        threading.Thread(target=self._hear, args=(end,), name="inbox", daemon=True).start()

    def get(self, check: Check) -> Sealed:
        """The next entry. Raises RankFailed when one was lost: the sender had not kept it."""
        while True:
            check()
            if self._gap:
                raise RankFailed("an entry of the line was lost; this should not happen, please report it")
            try:
                return self._queue.get(timeout=POLL_S)
            except queue.Empty:
                continue

    def settle(self, number: int) -> None:
        """Never ask for this entry again: what became of it is safe."""
        with self._lock:
            self._settled = number
            if self._socket is not None:
                with contextlib.suppress(OSError):  # a new connection begins with it
                    self._socket.sendall(_NUMBER.pack(number))

    def close(self) -> None:
        with self._lock:
            before, self._socket = self._socket, None
        _wake(before)

    def _hear(self, end: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                number, num_words, num_payload = _HEAD.unpack(_read(end, _HEAD.size))
                if num_words > _MOST_WORDS or num_payload > _MOST_PAYLOAD:
                    raise OSError("no entry is that long")
                words, payload_S = bytes(_read(end, num_words)), torch.empty(num_payload, dtype=torch.uint8)
                if num_payload:
                    read_into(end, memory_of(payload_S))
                with self._lock:
                    if self._socket is not end:
                        break
                    if number > self._last:
                        self._gap = self._gap or number != self._last + 1
                        self._last = number
                        self._queue.put(Sealed(number, words, payload_S))
        with self._lock:
            if self._socket is end:
                self._socket = None
            end.close()


class Channel:
    """Words in JSON both ways between a driver and a rank, and file descriptors from the driver."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._speaking = threading.Lock()

    def say(self, words: dict[str, Any], fd: int | None = None) -> None:
        """Returns when the system has it. Raises OSError when nobody is there."""
        text = json.dumps(words).encode()
        with self._speaking:
            # A descriptor comes with the first byte of what it was sent with.
            head = struct.pack("<I", len(text))
            sent = socket.send_fds(self._end, [head], [] if fd is None else [fd])
            self._end.sendall(head[sent:] + text)

    def hear(self) -> tuple[dict[str, Any], int | None]:
        """What comes next, and the descriptor that came with it. Raises OSError when the other end is closed."""
        head, fds, _, _ = socket.recv_fds(self._end, 4, 1)
        if not head:
            raise OSError("the connection has ended")
        (length,) = struct.unpack("<I", head + _read(self._end, 4 - len(head)))
        return json.loads(bytes(_read(self._end, length))), fds[0] if fds else None

    def close(self) -> None:
        """End it: `hear` raises, in the other process as well."""
        _wake(self._end)

    def release(self) -> None:
        """Close the socket itself; called by whoever hears, when it hears no more."""
        _wake(self._end)
        with self._speaking:
            self._end.close()


def _read_number(end: socket.socket) -> int:
    (number,) = _NUMBER.unpack(_read(end, _NUMBER.size))
    return number


def _read(end: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    read_into(end, memoryview(data))
    return data


def read_into(end: socket.socket, view: memoryview) -> None:
    """Fill a buffer. Raises OSError when the connection ends before."""
    done = 0
    while done < len(view):
        count = end.recv_into(view[done:])
        if count == 0:
            raise OSError("the connection has ended")
        done += count


def memory_of(bytes_S: Tensor) -> memoryview:
    """A tensor of bytes as the system reads and writes it."""
    array: Any = bytes_S.numpy()
    return memoryview(array)


def _wake(end: socket.socket | None) -> None:
    """End a connection for the threads at both ends of it. They close the socket: a descriptor that is closed while a
    thread is about to wait for it may by then be another one's.
    """
    if end is not None:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
