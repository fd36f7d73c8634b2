"""A rank of a line in a process of its own: what runs there.

A rank works for a driver (`process_line`), which holds the other end of one connection: over it come the descriptors
of its edges, over it goes what the rank does. A process that the driver has started ends with that connection; one that
somebody else has started waits for the next driver, models loaded. Streams may be replayed here from any snapshot on;
nothing that a rank does depends on when.
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
from pathlib import Path
from typing import Any, NoReturn

import torch

from streamdiff.errors import ConfigError
from streamdiff.memory import Kept
from streamdiff.pipeline.album import Album
from streamdiff.pipeline.edges import Channel, Entry, Inbox, Outbox, Sealed, What, seal
from streamdiff.pipeline.link import POLL_S
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
    plan: str = ""
    """What the driver and all ranks must agree on."""


def run(job: Job, end: socket.socket) -> None:
    """The whole life of a process that a driver has started. ``end``: of the connection to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's, which ends its ranks
    torch.set_num_threads(job.threads)
    _Rank(Channel(end), lambda: os._exit(0)).serve(job, lambda: job.build(job.rank))


def wait_for_drivers(job: Job, place: Path) -> NoReturn:
    """Load models once, then work for one driver after the other, which find this rank at ``place``: a socket that only
    this user's processes can open. Ends by a signal, or with what a rank fails with.

    Raises ConfigError when another rank is there.
    """
    torch.set_num_threads(job.threads)
    server = _listening(place)
    stages = job.build(job.rank)
    with server:
        while True:
            with contextlib.suppress(TimeoutError):
                end, _ = server.accept()
                end.settimeout(None)
                _Rank(Channel(end), lambda: None).serve(job, lambda: stages)


def _listening(place: Path) -> socket.socket:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if place.is_socket():
            if _answers(place):
                raise ConfigError(f"a rank waits at {place} already; end it, or give this line another name")
            place.unlink()  # of one that has died
        server.bind(str(place))
    except OSError as error:
        server.close()
        raise ConfigError(f"cannot wait at {place} ({error.strerror or error}); choose another name") from error
    except BaseException:
        server.close()
        raise
    server.settimeout(POLL_S)
    server.listen(1)
    return server


def _answers(place: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(ConnectionRefusedError):
        probe.connect(str(place))
        return True
    return False


class _Ended(Exception):  # noqa: N818  not an error
    """The driver has gone."""


class _Rank:
    """What a rank is for one driver. ``leave`` is called, from another thread, when that has gone."""

    def __init__(self, channel: Channel, leave: Callable[[], None]) -> None:
        self._channel, self._leave = channel, leave
        self._ended = threading.Event()
        self._place: queue.SimpleQueue[tuple[dict[str, Any], int | None]] = queue.SimpleQueue()
        self._inbox: Inbox | None = None
        self._outbox: Outbox | None = None
        self._is_placed = threading.Event()
        self._album: Album | None = None
        self._broken: set[int] = set()
        """Seats whose stream has failed here."""
        self._working: tuple[int, float] | None = None
        """Number of the entry that it works on, and since when."""

    def serve(self, job: Job, stages: Callable[[], Sequence[KeptStage]]) -> None:
        """Work until the driver has gone. What fails is told to it, and ends the process."""
        for target in (self.listen, self.beat):
            threading.Thread(target=target, daemon=True).start()
        try:
            made = stages()
            self._channel.say({"say": "ready", "plan": job.plan})
            self.work(job.rank, made)
        except _Ended:
            pass
        except BaseException as error:
            if self._ended.is_set() and isinstance(error, OSError):
                return
            with contextlib.suppress(OSError):  # the driver may have gone
                self._channel.say({"say": "failed", "why": f"failed: {type(error).__name__}: {error}"})
            raise SystemExit(1) from error
        finally:
            self._close()

    def _close(self) -> None:
        self._channel.close()
        for box in (self._inbox, self._outbox):
            if box is not None:
                box.close()
        if self._album is not None:
            self._album.close()

    def _check(self) -> None:
        """Returns while the driver is there."""
        if self._ended.is_set():
            raise _Ended

    def listen(self) -> None:
        """Obey the driver, until its end of the connection is closed, or it has died."""
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
        except OSError:
            pass  # it has gone
        finally:
            self._ended.set()
            self._leave()
            self._channel.release()

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
        inbox, outbox = self._resume(stages, *self._told())
        self._is_placed.set()
        while True:
            waited_s = time.monotonic()
            sealed = inbox.get(self._check)
            began_s = time.monotonic()
            self._working = sealed.number, began_s
            entry = sealed.open()
            done = seal(self._step(rank, stages[entry.seat], entry))
            self._working, took_s = None, time.monotonic() - began_s
            outbox.put(done, self._check)
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

    def _told(self) -> tuple[dict[str, Any], int | None]:
        """Where this rank stands, when the driver says so."""
        while True:
            self._check()
            with contextlib.suppress(queue.Empty):
                return self._place.get(timeout=POLL_S)

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
