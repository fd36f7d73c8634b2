"""Nobody can tell from the bits how many ranks made a stream: prompt switch, sink refresh and rewind included."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch

from streamdiff.engine import Engine
from streamdiff.pipeline.packet import Packet, RefreshSink, Rewind, SwitchPrompt
from streamdiff.pipeline.run import run_local
from streamdiff.pipeline.schedule import Schedule, plan
from tests.engine.stream_case import NUM_ENTRIES, REWIND_TO, eventful_packets, same, small_config
from tests.engine.stream_ranks import make_stream
from tests.pipeline.ranks import run_ranks


def run(engine: Engine, schedule: Schedule) -> list[Packet]:
    stages = [engine.stage(role, seed=7) for role in schedule.roles]
    return list(run_local(schedule, stages, eventful_packets(engine), deadline_s=60))


@functools.cache
def serial(num_steps: int, renoise: bool = False) -> list[Packet]:
    engine = Engine(small_config(num_steps, renoise=renoise))
    schedule = plan(num_steps=num_steps, num_ranks=1, refresh_chunk=engine.config.refresh_chunk)
    return run(engine, schedule)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("num_steps", "num_ranks"), [(steps, ranks) for steps in range(1, 5) for ranks in range(2, steps + 2)]
)
def test_on_any_number_of_ranks(num_steps: int, num_ranks: int) -> None:
    engine = Engine(small_config(num_steps))
    schedule = plan(num_steps=num_steps, num_ranks=num_ranks, refresh_chunk=engine.config.refresh_chunk)
    assert same(run(engine, schedule), serial(num_steps))


@pytest.mark.heavy
@pytest.mark.parametrize(("partition", "alone"), [((3, 1), False), ((1, 3), True), ((1, 2, 1), False), ((4,), True)])
def test_however_the_steps_are_shared_out(partition: tuple[int, ...], alone: bool) -> None:
    engine = Engine(small_config(4))
    schedule = Schedule(partition=partition, decode_alone=alone, refresh_chunk=engine.config.refresh_chunk)
    assert same(run(engine, schedule), serial(4))


@pytest.mark.heavy
def test_with_the_renoising_sampler() -> None:
    engine = Engine(small_config(3, renoise=True))
    schedule = plan(num_steps=3, num_ranks=4, refresh_chunk=engine.config.refresh_chunk)
    assert same(run(engine, schedule), serial(3, renoise=True))
    assert not same(serial(3, renoise=True), serial(3))


@pytest.mark.heavy
def test_an_early_refresh_waits_and_changes_nothing_else() -> None:
    """A refresh before the pipeline is full costs a bubble, not a bit."""
    config = small_config(4)
    config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, refresh_chunk=1))
    engine = Engine(config)
    one = plan(num_steps=4, num_ranks=1, refresh_chunk=1)
    five = plan(num_steps=4, num_ranks=5, refresh_chunk=1)
    assert five.bubble_ticks > 0
    assert same(run(engine, one), run(engine, five))


@pytest.mark.heavy
def test_the_stream_really_is_eventful() -> None:
    """The commands rode along, and each of them changed the picture."""
    packets = serial(4)
    kinds = [{type(c) for c in p.commands} for p in packets]
    assert sum(SwitchPrompt in k for k in kinds) == 2
    assert sum(RefreshSink in k for k in kinds) == 1
    assert sum(Rewind in k for k in kinds) == 1
    assert [p.chunk for p in packets][-3:] == [REWIND_TO, REWIND_TO + 1, REWIND_TO + 2]
    assert [p.epoch for p in packets] == [0] * (NUM_ENTRIES - 3) + [1] * 3
    first = {p.chunk: p for p in packets if p.epoch == 0}
    assert not torch.equal(first[REWIND_TO].latent_BCTHW, packets[-3].latent_BCTHW)  # other sound, made anew


@pytest.mark.processes
@pytest.mark.parametrize(
    ("partition", "alone"),
    [
        pytest.param((1,), True, marks=pytest.mark.slow),
        ((1, 1), False),
        pytest.param((2, 1, 1), True, marks=pytest.mark.slow),
        pytest.param((1, 1), True, marks=pytest.mark.slow),
        pytest.param((3,), True, marks=pytest.mark.slow),
        pytest.param((1, 1, 1), True, marks=pytest.mark.slow),
        pytest.param((1, 1, 1, 1), False, marks=pytest.mark.slow),
        pytest.param((1, 1, 1, 1), True, marks=pytest.mark.slow),
        pytest.param((1, 3), False, marks=pytest.mark.slow),
    ],
)
def test_in_processes_over_gloo(partition: tuple[int, ...], alone: bool) -> None:
    outcomes = run_ranks(make_stream, len(partition) + alone, partition, alone, timeout_s=200)
    assert [outcome.error for outcome in outcomes] == [""] * len(outcomes)
    expected = serial(sum(partition))
    made = outcomes[-1].value
    assert [(chunk, epoch) for chunk, epoch, _, _ in made] == [(p.chunk, p.epoch) for p in expected]
    for (_, _, latent, frames), packet in zip(made, expected, strict=True):
        assert np.array_equal(latent, packet.latent_BCTHW.numpy())
        assert packet.frames_THWC is not None
        assert np.array_equal(frames, packet.frames_THWC.numpy())
