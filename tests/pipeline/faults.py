"""Jobs for real ranks in which something goes wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from streamdiff import signals
from streamdiff.errors import RankFailed
from streamdiff.pipeline.group import Group, World
from streamdiff.pipeline.packet import Packet, RefreshSink, ReturnLatent
from streamdiff.pipeline.run import run_rank
from streamdiff.pipeline.schedule import Schedule
from streamdiff.pipeline.watch import Limits
from tests.pipeline.line import SHAPE, SleepingStage


def endless_source(num_chunks: int = 10**9) -> Iterator[Packet]:
    for chunk in range(num_chunks):
        command = {0: (ReturnLatent(),), 2: (RefreshSink(0),)}.get(chunk, ())
        yield Packet(chunk=chunk, epoch=0, lead=4, latent_BCTHW=torch.ones(SHAPE), commands=command)


class Log:
    """Where a rank writes down what the parent waits for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, packet: Packet) -> None:
        with self.path.open("a") as file:
            file.write(f"{packet.chunk}\n")


def stop_by_exception(_number: int, _frame: object) -> None:
    """What the command line does with SIGTERM."""
    raise SystemExit(143)


def layout(size: int) -> Schedule:
    return Schedule(partition=(1,) * (size - 1), decode_alone=True, refresh_chunk=2)


def stream_forever(world: World, log: Path, deadline_s: float) -> None:
    signal.signal(signal.SIGTERM, stop_by_exception)
    with Group(world, layout(world.size), limits=Limits(deadline_s=deadline_s)) as group:
        run_rank(SleepingStage(0.02), group.link(source=endless_source(), deliver=Log(log)))


def load_forever(world: World, log: Path) -> None:
    signal.signal(signal.SIGTERM, stop_by_exception)
    with Group(world, layout(world.size), limits=Limits(deadline_s=20)):
        time.sleep(0.5)  # for a first sign of life
        with log.open("a") as file:
            file.write(f"{world.rank}\n")
        time.sleep(1000)


class Trouble:
    """Does ``what`` when it is given ``chunk``."""

    def __init__(self, chunk: int, what: Callable[[], None]) -> None:
        self.chunk, self.what = chunk, what

    def step(self, packet: Packet) -> Packet:
        if packet.chunk == self.chunk:
            self.what()
        return packet


def boom() -> None:
    raise ValueError("boom")


def hang() -> None:
    time.sleep(1000)


def hang_and_lose_an_interrupt() -> None:
    """As in a callback of a library, which drops what is raised in it."""
    signals.handle()
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(1000)
    time.sleep(1000)


def hang_deaf() -> None:
    """As a stuck GPU would: no signal is heard."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
    time.sleep(1000)


def vanish() -> None:
    os._exit(0)


def stream_with_trouble(
    world: World, culprit: int, what: Callable[[], None], deadline_s: float, saved: Path | None = None
) -> None:
    def save(error: RankFailed) -> None:
        assert saved is not None
        saved.with_suffix(f".{world.rank}").write_text(str(error))

    group = Group(
        world,
        layout(world.size),
        limits=Limits(deadline_s=deadline_s),
        on_abort=save if saved is not None else None,
    )
    with group:
        stage = Trouble(5, what) if world.rank == culprit else SleepingStage(0.01)
        run_rank(stage, group.link(source=endless_source(), deliver=lambda packet: None))


def load_with_trouble(world: World, culprit: int, kind: str, startup_s: float) -> None:
    if kind == "absent" and world.rank == culprit:
        time.sleep(1000)
    if kind == "raises" and world.rank == 2:
        time.sleep(1.5)  # joins when the verdict has long been reached
    limits = Limits(deadline_s=4, startup_s=startup_s)
    schedule = layout(world.size)
    if kind == "other schedule" and world.rank == culprit:
        schedule = replace(schedule, refresh_chunk=3)
    with Group(world, schedule, limits=limits) as group:
        if world.rank == culprit:
            {"raises": boom, "slow": hang, "other schedule": lambda: None}[kind]()
        elif kind == "raises":
            time.sleep(1000)  # still loading when the news comes
        run_rank(SleepingStage(0), group.link(source=endless_source(3), deliver=lambda packet: None))


def leave_early(world: World, culprit: int) -> None:
    with Group(world, layout(world.size), limits=Limits(deadline_s=4)) as group:
        link = group.link(source=endless_source(), deliver=lambda packet: None)
        if world.rank == culprit:
            link.recv()
            return
        run_rank(SleepingStage(0.01), link)


def lose_a_message(world: World, culprit: int) -> None:
    from streamdiff.pipeline import transport

    send = transport.EdgeEnd.send

    def forgetful(self, packet, ready) -> None:
        if world.rank == culprit and packet is not None and packet.chunk == 4:
            self._seq += 1
        else:
            send(self, packet, ready)

    transport.EdgeEnd.send = forgetful
    with Group(world, layout(world.size), limits=Limits(deadline_s=4)) as group:
        run_rank(SleepingStage(0.01), group.link(source=endless_source(), deliver=lambda packet: None))


def swallow_a_message(world: World, culprit: int) -> None:
    """Nothing is wrong with anybody, and yet nothing moves: the end of the stream never arrives."""
    from streamdiff.pipeline import transport

    send = transport.EdgeEnd.send

    def deaf(self, packet, ready) -> None:
        if world.rank == culprit and packet is None:
            time.sleep(1000)
        send(self, packet, ready)

    transport.EdgeEnd.send = deaf
    with Group(world, layout(world.size), limits=Limits(deadline_s=2)) as group:
        run_rank(SleepingStage(0.01), group.link(source=endless_source(3), deliver=lambda packet: None))
