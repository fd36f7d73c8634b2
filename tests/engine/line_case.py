"""Lines of processes for tests: what their ranks make, and streams that visit them."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from streamdiff.memory import Kept
from streamdiff.pipeline.line import Seat
from streamdiff.pipeline.packet import Packet
from streamdiff.pipeline.process_line import LineLimits, ProcessLine, Spawned
from streamdiff.pipeline.process_rank import Job
from streamdiff.pipeline.schedule import plan
from streamdiff.pipeline.stage import KeptStage
from tests.engine.oracle_case import Case, Event, packets_of, script_of

WAIT_S = 180.0
QUIET = Event()
CASE = Case(num_steps=2, ranks=3, renoise=True, slack=3, window=2, refresh=3)
LIFE = [QUIET, Event(prompt=1), QUIET, Event(back=(2,)), QUIET, Event(back=(1,)), Event(prompt=2)] * 4


def case_of(number: int) -> Case:
    """One stream of several on a line of `CASE`."""
    return dataclasses.replace(CASE, seed=number % 2, stream=number)


def stages(case: Case, seats: int, rank: int) -> Sequence[KeptStage]:
    """What a rank of a case does; called in its process."""
    engine, role = case.engine, case.schedule.roles[rank]
    return [engine.stage(role) for _ in range(seats)]


def line_of(case: Case, seats: int, **how: object) -> ProcessLine:
    return ProcessLine(case.config, case.schedule, seats, spawned(functools.partial(stages, case, seats)), **how)  # type: ignore[arg-type]


def spawned(build: Callable[[int], Sequence[KeptStage]]) -> Spawned:
    """Ranks that are started where they are needed, with one thread each."""
    return Spawned(lambda rank: Job(rank=rank, build=build, threads=1))


FAIL, DIE, HANG = -1.0, -2.0, -3.0


class Adding:
    """Adds up what it is given, and does what negative values say."""

    def __init__(self) -> None:
        self.sum = 0.0

    def begin(self, *, seed: int, stream: int) -> None:
        self.sum = 1000.0 * seed + stream

    def step(self, packet: Packet) -> Packet:
        value = packet.latent_BCTHW.flatten()[0].item()
        if value == FAIL:
            raise ValueError("this is not added")
        if value == DIE:
            os.kill(os.getpid(), signal.SIGKILL)
        if value == HANG:
            time.sleep(WAIT_S)
        self.sum += value
        return dataclasses.replace(packet, latent_BCTHW=torch.full((1, 1, 1, 1, 1), self.sum))

    def kept(self) -> Kept:
        return Kept({"sum": self.sum}, {})

    def resume(self, kept: Kept) -> None:
        self.sum = kept.facts["sum"]


def adders(seats: int, rank: int) -> Sequence[KeptStage]:
    """Every rank adds."""
    del rank
    return [Adding() for _ in range(seats)]


class Waiting(Adding):
    """Waits with its first chunk until a file is there."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file

    def step(self, packet: Packet) -> Packet:
        wait_until(self._file.exists)
        return super().step(packet)


def waiting_behind(file: Path, rank: int) -> Sequence[KeptStage]:
    """Rank 0 adds, and rank 1 waits before it does."""
    return [Adding() if rank == 0 else Waiting(file)]


def broken_build(rank: int) -> Sequence[KeptStage]:
    """A rank that cannot be made."""
    raise OSError(f"no weights for rank {rank}")


def adding_line(ranks: int, seats: int, **how: object) -> ProcessLine:
    schedule = plan(num_steps=2, num_ranks=ranks)
    return ProcessLine(CASE.config, schedule, seats, spawned(functools.partial(adders, seats)), **how)  # type: ignore[arg-type]


def values(*numbers: float) -> Iterator[Packet]:
    """Packets that each hold a number."""
    for chunk, number in enumerate(numbers):
        yield Packet(chunk=chunk, epoch=0, lead=0, latent_BCTHW=torch.full((1, 1, 1, 1, 1), float(number)))


class Visit(threading.Thread):
    """A stream on a line, taken to its end by a thread. Its last packet waits until it `may_end`."""

    def __init__(self, line: ProcessLine, number: int, *, may_end: bool = True) -> None:
        super().__init__(daemon=True)
        self.case, self.seen = case_of(number), list[Packet]()
        self.may_end = threading.Event()
        if may_end:
            self.may_end.set()
        self.error: BaseException | None = None
        self._seat = line.join(seed=self.case.seed, stream=number, live=False)
        self.start()

    def run(self) -> None:
        try:
            self._seat.start(self._packets())
            while (packet := self._seat.get(WAIT_S)) is not None:
                self.seen.append(packet)
        except BaseException as error:  # noqa: BLE001  raised by the test
            self.error = error
        finally:
            self._seat.close()

    def _packets(self) -> Iterator[Packet]:
        for number, packet in enumerate(packets_of(self.case, script_of(self.case, LIFE)), 1):
            if number == len(LIFE):
                assert self.may_end.wait(WAIT_S)
            yield packet

    def finished(self) -> list[Packet]:
        """All of it."""
        self.may_end.set()
        self.join(WAIT_S)
        if self.error is not None:
            raise self.error
        assert not self.is_alive()
        return self.seen


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait for something that will come true."""
    until_s = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < until_s, "it has not come true in time"
        time.sleep(0.01)


PATIENT = LineLimits(deadline_s=120, silence_s=120, startup_s=120)
"""Only what dies is lost, however busy the machine is."""


def sums(seat: Seat) -> list[float]:
    """What `Adding` ranks made of a stream."""
    return [packet.latent_BCTHW.item() for packet in iter(lambda: seat.get(WAIT_S), None)]


def kill(line: ProcessLine, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Signal a rank's process, as soon as it has one."""
    wait_until(lambda: line.pids[rank] is not None)
    pid = line.pids[rank]
    assert pid is not None
    os.kill(pid, number)


def has_made(line: ProcessLine, rank: int, chunks: int) -> bool:
    return line.metrics.ranks[rank].chunks >= chunks
