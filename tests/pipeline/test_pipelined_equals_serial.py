"""However the steps are laid out, over threads or processes, the stream is the same to the last bit."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from streamdiff.pipeline.group import Group, World
from streamdiff.pipeline.run import run_local, run_rank
from streamdiff.pipeline.schedule import Schedule, check
from streamdiff.pipeline.watch import Limits
from tests.pipeline.line import (
    assert_equal_streams,
    counting_stage,
    eventful_source,
    serial,
    summary,
)
from tests.pipeline.ranks import free_port, run_ranks, values

NUM_CHUNKS = 14


def partitions(num_steps: int) -> list[tuple[int, ...]]:
    """Every way to cut the steps into neighbours.

    >>> partitions(3)
    [(3,), (1, 2), (2, 1), (1, 1, 1)]
    """
    cuts = itertools.chain.from_iterable(
        itertools.combinations(range(1, num_steps), count) for count in range(num_steps)
    )
    return [tuple(b - a for a, b in zip((0, *cut), (*cut, num_steps), strict=True)) for cut in cuts]


LAYOUTS = [
    Schedule(partition=partition, decode_alone=alone)
    for num_steps in range(1, 5)
    for partition in partitions(num_steps)
    for alone in (False, True)
]


def name(schedule: Schedule) -> str:
    return "+".join(map(str, schedule.partition)) + ("|d" if schedule.decode_alone else "d")


def expected(schedule: Schedule, refresh_chunk: int | None, rewind: tuple[int, int] | None):
    """Computed with all steps on one rank, by a loop that knows no links."""
    alone = Schedule(partition=(schedule.num_steps,), decode_alone=False)
    source = eventful_source(NUM_CHUNKS, refresh_chunk=refresh_chunk, rewind=rewind)
    return [summary(packet) for packet in serial(alone, source)]


@pytest.mark.heavy
@pytest.mark.parametrize("schedule", LAYOUTS, ids=name)
@pytest.mark.parametrize("refresh_chunk", [None, 1, 2, 5])
@pytest.mark.parametrize("rewind", [None, (6, 4), (7, 2), (1, 0)])
def test_threads_equal_the_plain_loop(
    schedule: Schedule, refresh_chunk: int | None, rewind: tuple[int, int] | None
) -> None:
    schedule = replace(schedule, refresh_chunk=refresh_chunk)
    check(schedule)
    stages = [counting_stage(role) for role in schedule.roles]
    source = eventful_source(NUM_CHUNKS, refresh_chunk=refresh_chunk, rewind=rewind)
    packets = [summary(packet) for packet in run_local(schedule, stages, source)]
    assert_equal_streams(packets, expected(schedule, refresh_chunk, rewind))


def stream_one(world: World, schedule: Schedule, refresh: int, rewind: tuple[int, int]):
    delivered = []
    with Group(world, schedule, limits=Limits(deadline_s=20)) as group:
        stage = counting_stage(schedule.roles[world.rank])
        source = eventful_source(NUM_CHUNKS, refresh_chunk=refresh, rewind=rewind)
        run_rank(stage, group.link(source=source, deliver=lambda packet: delivered.append(summary(packet))))
    # As arrays: tensors would travel to the parent through shared memory that dies with this process.
    return [(chunk, epoch, latent.numpy(), frames.numpy()) for chunk, epoch, latent, frames in delivered]


def stream(world: World, schedules: list[Schedule], ports: list[int], refresh: int, rewind: tuple[int, int]):
    """One rank of every schedule in turn; the tail returns what it was delivered."""
    return [
        stream_one(replace(world, port=port), schedule, refresh, rewind)
        for schedule, port in zip(schedules, ports, strict=True)
    ]


def uneven(schedule: Schedule) -> bool:
    """The layouts of four steps in which early ranks own most: one with and one without a rank for decoding."""
    return schedule.num_steps == 4 and list(schedule.partition) == sorted(
        [1] * (schedule.num_dit_ranks - 1) + [5 - schedule.num_dit_ranks], reverse=True
    )


@pytest.mark.processes
@pytest.mark.parametrize(
    "num_ranks",
    [
        pytest.param(2, marks=pytest.mark.slow),
        3,
        pytest.param(4, marks=pytest.mark.slow),
        pytest.param(5, marks=pytest.mark.slow),
    ],
)
def test_processes_equal_the_plain_loop(num_ranks: int) -> None:
    assert_processes_equal([layout for layout in LAYOUTS if layout.num_ranks == num_ranks and uneven(layout)])


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3, 4, 5])
def test_processes_of_every_layout_equal_the_plain_loop(num_ranks: int) -> None:
    assert_processes_equal([layout for layout in LAYOUTS if layout.num_ranks == num_ranks])


def assert_processes_equal(layouts: list[Schedule]) -> None:
    refresh, rewind = 5, (6, 4)
    schedules = [replace(layout, refresh_chunk=refresh) for layout in layouts]
    (num_ranks,) = {schedule.num_ranks for schedule in schedules}
    ports = [free_port() for _ in schedules]
    outcomes = run_ranks(stream, num_ranks, schedules, ports, refresh, rewind, timeout_s=120)
    *others, tail = values(outcomes)
    assert all(delivered == [] for streams in others for delivered in streams)
    for schedule, delivered in zip(schedules, tail, strict=True):
        packets = [
            (chunk, epoch, torch.from_numpy(latent), torch.from_numpy(frames))
            for chunk, epoch, latent, frames in delivered
        ]
        assert_equal_streams(packets, expected(schedule, refresh, rewind))


def test_the_plain_loop_feels_every_event() -> None:
    """Otherwise the tests above would pass with commands lost on the way."""
    schedule = LAYOUTS[0]
    plain = expected(schedule, None, None)
    refreshed = expected(schedule, 5, None)
    rewound = expected(schedule, None, (6, 4))
    assert all(torch.equal(a[2], b[2]) for a, b in zip(plain[:5], refreshed[:5], strict=True))
    assert not torch.equal(plain[5][2], refreshed[5][2])
    assert [head[:2] for head in rewound[5:9]] == [(5, 0), (6, 0), (4, 1), (5, 1)]
    assert not torch.equal(plain[4][2], rewound[7][2])
