"""Ranks in processes of their own that many streams share: started here, or waiting already.

    from streamdiff import Engine, line, presets

    engine = Engine(presets.portrait())
    with line.spawn(engine, line.Shape(seats=8, num_ranks=5)) as ranks:
        async with engine.open(face, "a person is talking", line=ranks) as session:
            ...

The program that does this is the *driver*. Its engine reads pictures, prompts and sound, and computes no chunk; with
``device="cpu"`` it leaves the devices to the ranks. See `streamdiff.pipeline.process_line`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch

from streamdiff.config import EngineConfig
from streamdiff.engine import Engine, Weights
from streamdiff.errors import ConfigError
from streamdiff.models.served.options import StepOptions
from streamdiff.pipeline.device import use_device
from streamdiff.pipeline.meeting import line_folder
from streamdiff.pipeline.process_line import Find, Joined, LineLimits, LineMetrics, ProcessLine, RankMetrics, Spawned
from streamdiff.pipeline.process_rank import Job, wait_for_drivers
from streamdiff.pipeline.schedule import Schedule, plan
from streamdiff.pipeline.stage import KeptStage

__all__ = ["LineLimits", "LineMetrics", "ProcessLine", "RankMetrics", "Shape", "join", "spawn", "wait_as_rank"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a driver and its ranks must agree on, beside the model.

    ``slack_chunks``: how many chunks an interruption can take back; None: all that can be under way and one more.
    """

    seats: int = 4
    """Streams that may be on the line at once; each has memory of its own on every rank."""
    num_ranks: int = 1
    slack_chunks: int | None = None

    def __post_init__(self) -> None:
        if self.seats < 1 or self.num_ranks < 1:
            raise ConfigError(f"a line has at least one seat and one rank, got {self.seats} and {self.num_ranks}")


def spawn(
    engine: Engine,
    shape: Shape,
    *,
    devices: Sequence[torch.device | str] | None = None,
    heals: bool = True,
    limits: LineLimits | None = None,
) -> ProcessLine:
    """A line of processes that are started here. Loads and warms them; close it when no stream needs it any more.

    Args:
        engine: whose model, and whose way of computing.
        shape: how many of what.
        devices: one per rank, such as ``["cuda:0", "cuda:1"]``; None: the engine's, for all.
        heals: whether a lost rank is replaced, and every stream goes on with the same bits. Costs time and memory of
            the host: `streamdiff.models.cost.snapshot_bytes` per chunk and step, kept for as many chunks as a history.
        limits: timeouts.

    Raises RankFailed when a rank does not start.
    """
    if devices is not None and len(devices) != shape.num_ranks:
        raise ConfigError(f"{shape.num_ranks} ranks need as many devices, got {len(devices)}; name one for each")
    # On devices of another kind than the engine's, ranks compute in the type that is usual there.
    names = [engine.device] * shape.num_ranks if devices is None else devices
    jobs = _jobs(engine, shape, names, engine.dtype if devices is None else None)
    return _driven(engine, shape, Spawned(jobs), jobs(0).plan, heals=heals, limits=limits)


def join(
    engine: Engine, shape: Shape, *, name: str = "line", heals: bool = True, limits: LineLimits | None = None
) -> ProcessLine:
    """A line of processes that ``streamdiff line`` has started on this machine, under this name and in this shape.

    They have loaded their models, and wait for the next driver when this line is closed. One that is lost is waited
    for: whoever started it starts it again (torchrun with ``--max-restarts``, which then restarts them all).
    """
    limits = limits or LineLimits()
    words = _jobs(engine, shape, [engine.device] * shape.num_ranks, None)(0).plan
    return _driven(engine, shape, Joined(line_folder(name), limits), words, heals=heals, limits=limits)


def wait_as_rank(engine: Engine, shape: Shape, rank: int, *, name: str = "line") -> NoReturn:
    """Be one rank of `join`, on this engine's device, for one driver after the other; ends by a signal."""
    jobs = _jobs(engine, shape, [engine.device] * shape.num_ranks, engine.dtype)
    wait_for_drivers(jobs(rank), line_folder(name) / f"rank{rank}.sock")


@dataclass(frozen=True, slots=True)
class _Stages:
    """Makes the stages of one rank in its own process; pickled on the way there."""

    config: EngineConfig
    weights: Weights
    devices: tuple[str, ...]
    dtype: torch.dtype | None
    options: StepOptions
    schedule: Schedule
    seats: int

    def __call__(self, rank: int) -> list[KeptStage]:
        device = torch.device(self.devices[rank])
        use_device(device)
        engine = Engine(self.config, weights=self.weights, device=device, dtype=self.dtype, options=self.options)
        return [engine.stage(self.schedule.roles[rank]) for _ in range(self.seats)]


def _jobs(
    engine: Engine, shape: Shape, devices: Sequence[torch.device | str], dtype: torch.dtype | None
) -> Callable[[int], Job]:
    """Rank to what its process is to be."""
    config, schedule = engine.with_slack(shape.num_ranks, shape.slack_chunks).config, _schedule(engine, shape)
    build = _Stages(config, engine.weights, tuple(map(str, devices)), dtype, engine.options, schedule, shape.seats)
    digest = hashlib.sha256(repr(config).encode()).hexdigest()[:8]
    words = f"{config.name} ({digest}), {shape.seats} seats, {schedule}"
    return lambda rank: Job(rank=rank, build=build, threads=torch.get_num_threads(), plan=words)


def _driven(
    engine: Engine, shape: Shape, find: Find, words: str, *, heals: bool, limits: LineLimits | None
) -> ProcessLine:
    engine = engine.with_slack(shape.num_ranks, shape.slack_chunks)
    made = ProcessLine(
        engine.config, _schedule(engine, shape), shape.seats, find, plan=words, heals=heals, limits=limits
    )
    return engine.rehearsed(made)


def _schedule(engine: Engine, shape: Shape) -> Schedule:
    config = engine.config
    return plan(num_steps=config.num_steps, num_ranks=shape.num_ranks, refresh_chunk=config.refresh_chunk)
