"""A rank of a line in a process of its own: what runs there.

The process belongs to the driver (`process_line`), which holds its other end of one connection: over it come the
descriptors of its edges, over it goes what the rank does, and when it ends, so does the process. Streams may be
replayed here from any snapshot on; nothing that a rank does depends on when.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from streamdiff.memory import Kept
from streamdiff.pipeline.album import Album
from streamdiff.pipeline.edges import Channel, Entry, Inbox, Outbox, Sealed, What, seal
from streamdiff.pipeline.schedule import QUEUE_DEPTH
from streamdiff.pipeline.stage import KeptStage

BEAT_S = 0.1
"""Between two signs of life."""
EDGE_DEPTH = QUEUE_DEPTH + 1
"""Entries between two ranks: those that rest there, and the one that the receiver works on."""
_LOG = "log"
_PATIENCE_S = 600.0
"""How long a rank that is ready waits to be told where it stands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a process is to be; it is pickled by the driver for a process that it starts."""

    rank: int
    build: Callable[[int], Sequence[KeptStage]]
    """Rank to its stages, one per seat."""
    threads: int
    """Of torch; bits may depend on it."""


def run(job: Job, end: socket.socket) -> None:
    """The whole life of the process. ``end``: of the connection to the driver."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's, which ends its ranks
    torch.set_num_threads(job.threads)
    channel = Channel(end)
    rank = _Rank(channel)
    for target in (rank.listen, rank.beat):
        threading.Thread(target=target, daemon=True).start()
    try:
        stages = job.build(job.rank)
        channel.say({"say": "ready"})
        rank.work(job.rank, stages)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the driver may have gone
            channel.say({"say": "failed", "why": f"failed: {type(error).__name__}: {error}"})
        raise SystemExit(1) from error


class _Rank:
    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._place: queue.SimpleQueue[tuple[dict[str, Any], int | None]] = queue.SimpleQueue()
        self._inbox: Inbox | None = None
        self._outbox: Outbox | None = None
        self._is_placed = threading.Event()
        self._album: Album | None = None
        self._broken: set[int] = set()
        """Seats whose stream has failed here."""
        self._working: tuple[int, float] | None = None
        """Number of the entry that it works on, and since when."""

    def listen(self) -> None:
        """Obey the driver. When its end of the connection is closed, or it has died, this process ends."""
        try:
            while True:
                words, fd = self._channel.hear()
                if words["do"] == "resume":
                    self._place.put((words, fd))
                    continue
                assert fd is not None
                self._is_placed.wait(_PATIENCE_S)
                box = self._inbox if words["do"] == "inlet" else self._outbox
                assert box is not None
                box.connect(socket.socket(fileno=fd))
        finally:
            os._exit(0)

    def beat(self) -> None:
        """Give signs of life, and say what this rank is at."""
        while True:
            working = self._working
            number, since_s = (-1, 0.0) if working is None else working
            for_s = 0.0 if working is None else time.monotonic() - since_s
            try:
                self._channel.say({"say": "beat", "number": number, "for_s": for_s})
            except OSError:
                return  # the driver has gone, which `listen` finds as well
            time.sleep(BEAT_S)

    def work(self, rank: int, stages: Sequence[KeptStage]) -> None:
        """Stand where the driver says, and make an entry of every entry from there on."""
        inbox, outbox = self._resume(stages, *self._place.get(timeout=_PATIENCE_S))
        self._is_placed.set()
        while True:
            waited_s = time.monotonic()
            sealed = inbox.get(_never_falls)
            began_s = time.monotonic()
            self._working = sealed.number, began_s
            entry = sealed.open()
            done = seal(self._step(rank, stages[entry.seat], entry))
            self._working, took_s = None, time.monotonic() - began_s
            outbox.put(done, _never_falls)
            report = {
                "say": "report",
                "number": entry.number,
                "chunk": -1 if entry.packet is None else entry.packet.chunk,
                "took_us": round(took_s * 1e6),
                "waited_us": round((began_s - waited_s) * 1e6),
            }
            if self._album is not None:
                report |= self._keep(self._album, entry.seat, stages[entry.seat], entry, outbox.kept())
            self._channel.say(report)
            inbox.settle(entry.number)

    def _resume(self, stages: Sequence[KeptStage], words: Mapping[str, Any], fd: int | None) -> tuple[Inbox, Outbox]:
        """Stand where the rank stood whose place this one takes, or at the beginning."""
        log: list[Sealed] = []
        if fd is not None:
            self._album = album = Album(fd, words["parts"])
            for seat, facts in words["seats"]:
                if facts is None:
                    self._broken.add(seat)
                else:
                    stages[seat].resume(Kept(facts, album.load(str(seat))))
            logged = album.load(_LOG)
            log = [
                Sealed(number, logged[f"{number}/words"].numpy().tobytes(), logged[f"{number}/payload"])
                for number in sorted({int(name.partition("/")[0]) for name in logged})
            ]
        self._inbox, self._outbox = Inbox(words["number"]), Outbox(EDGE_DEPTH, log)
        return self._inbox, self._outbox

    def _step(self, rank: int, stage: KeptStage, entry: Entry) -> Entry:
        """What it makes of an entry. A stream that fails is passed over until another one has its seat."""
        if entry.what is not What.PACKET:
            return entry
        assert entry.packet is not None
        try:
            if entry.key is not None:
                self._broken.discard(entry.seat)
                stage.begin(seed=entry.key[0], stream=entry.key[1])
            if entry.seat not in self._broken:
                return replace(entry, packet=stage.step(entry.packet))
            why = "its stream has failed before"
        except Exception as error:  # noqa: BLE001  raised where this stream's packets are taken
            self._broken.add(entry.seat)
            why = f"failed at chunk {entry.packet.chunk}: {type(error).__name__}: {error}"
        return Entry(number=entry.number, seat=entry.seat, what=What.FAILED, rank=rank, why=why)

    def _keep(self, album: Album, seat: int, stage: KeptStage, entry: Entry, log: Sequence[Sealed]) -> dict[str, Any]:
        """Snapshot the seat that the entry was for, and what was sent and may be asked for again; what to report."""
        began_s = time.monotonic()
        kept = Kept({}, {}) if entry.what is What.END or seat in self._broken else stage.kept()
        logged = {f"{sealed.number}/words": _as_tensor(sealed.words) for sealed in log}
        logged |= {f"{sealed.number}/payload": sealed.payload_S for sealed in log}
        copied = album.replace({str(seat): kept.tensors, _LOG: logged})
        return {
            "seat": seat,
            "facts": None if seat in self._broken else dict(kept.facts),
            "parts": {owner: album.where(owner) for owner in (str(seat), _LOG)},
            "copied_bytes": copied,
            "keeping_us": round((time.monotonic() - began_s) * 1e6),
        }


def _as_tensor(words: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(words), dtype=torch.uint8)


def _never_falls() -> None:
    """A rank's waits end with its process, which `_Rank.listen` ends."""
