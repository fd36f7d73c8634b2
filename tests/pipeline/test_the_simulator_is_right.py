"""The simulator follows the schedule tick by tick, and predicts what real ranks do within 6 %."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamdiff.errors import ScheduleError
from streamdiff.pipeline.schedule import Costs, Schedule, plan, rank_costs_us
from streamdiff.pipeline.simulate import Hop, Loss, Playback, render_timeline, simulate
from tests.pipeline.line import timed_stream
from tests.pipeline.ranks import free_port, run_ranks, values

TOLERANCE = 0.06

milliseconds = st.integers(1, 300).map(lambda ms: ms / 1000)


@st.composite
def lines(draw: st.DrawFn) -> tuple[Schedule, Costs]:
    partition = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=4)))
    schedule = Schedule(
        partition=partition,
        decode_alone=draw(st.booleans()),
        refresh_chunk=draw(st.none() | st.integers(1, 8)),
    )
    costs = Costs(
        step_s=tuple(draw(milliseconds) for _ in range(schedule.num_steps)),
        decode_s=draw(milliseconds),
        encode_s=draw(st.just(0.0) | milliseconds),
    )
    return schedule, costs


hops = st.builds(Hop, latency_s=st.sampled_from([0.0, 0.001, 0.05, 0.4]))


@pytest.mark.heavy
@given(lines(), hops)
def test_the_period_is_the_longest_rank_or_the_slowest_hop(line: tuple[Schedule, Costs], hop: Hop) -> None:
    schedule, costs = line
    result = simulate(schedule, costs, num_chunks=120, hop=hop)
    slowest_hop_s = hop.seconds if schedule.num_ranks > 1 else 0.0
    longest_s = max(*rank_costs_us(schedule, costs), 1e6 * slowest_hop_s) / 1e6
    assert result.period_s == pytest.approx(longest_s, rel=1e-6)


@given(lines(), hops)
def test_the_first_frame_takes_all_work_and_all_hops_once(line: tuple[Schedule, Costs], hop: Hop) -> None:
    schedule, costs = line
    result = simulate(schedule, costs, num_chunks=4, hop=hop)
    work_s = sum(costs.step_s) + costs.decode_s + costs.encode_s
    assert result.first_frame_s == pytest.approx(work_s + (schedule.num_ranks - 1) * hop.seconds)


@given(lines(), hops, st.floats(0, 1), st.integers(0, 2**32))
def test_order_and_bounds_hold_under_jitter(line: tuple[Schedule, Costs], hop: Hop, jitter: float, seed: int) -> None:
    schedule, costs = line
    result = simulate(schedule, costs, num_chunks=40, hop=hop, jitter=jitter, seed=seed)
    assert result == simulate(schedule, costs, num_chunks=40, hop=hop, jitter=jitter, seed=seed)
    assert len(result.delivered_s) == 40
    assert list(result.delivered_s) == sorted(result.delivered_s)
    own = [[cell for cell in result.cells if cell.rank == rank] for rank in range(schedule.num_ranks)]
    for cells in own:
        assert [cell.chunk for cell in cells] == list(range(40))
        assert all(one.end_s <= other.start_s for one, other in pairwise(cells))
    for cells, following in pairwise(own):
        for cell, later in zip(cells, following, strict=True):
            assert later.start_s >= cell.end_s + hop.seconds - 1e-9
        for cell, late in zip(following, cells[3:], strict=False):
            assert late.start_s >= cell.start_s - 1e-9, "never more than two chunks rest between two ranks"
    if schedule.refresh_chunk is not None:
        returned_s = own[schedule.last_dit_rank][0].end_s
        assert own[0][schedule.refresh_chunk].end_s >= returned_s


@given(
    st.lists(st.just(1), min_size=1, max_size=5).map(tuple),
    st.booleans(),
    st.none() | st.integers(1, 8),
)
def test_with_equal_ranks_it_is_the_picture_of_the_schedule(
    partition: tuple[int, ...], decode_alone: bool, refresh_chunk: int | None
) -> None:
    schedule = Schedule(partition=partition, decode_alone=decode_alone, refresh_chunk=refresh_chunk)
    costs = Costs(step_s=(1.0,) * len(partition), decode_s=1.0 if decode_alone else 0.0)
    result = simulate(schedule, costs, num_chunks=10)
    for cell in result.cells:
        # The cell in which the head waits for the latent starts with the wait.
        assert cell.end_s == schedule.start_tick(cell.rank, cell.chunk) + 1
    assert result.bubble_s[0] == schedule.bubble_ticks
    assert result.busy_s == (10.0,) * schedule.num_ranks


@given(lines(), st.data())
def test_a_lost_rank_ends_the_stream_and_changes_nothing_before(
    line: tuple[Schedule, Costs], data: st.DataObject
) -> None:
    schedule, costs = line
    whole = simulate(schedule, costs, num_chunks=30)
    loss = Loss(
        rank=data.draw(st.integers(0, schedule.num_ranks - 1)),
        at_s=data.draw(st.floats(0, whole.wall_s)),
        noticed_after_s=data.draw(st.floats(0, 2)),
    )
    cut = simulate(schedule, costs, num_chunks=30, loss=loss)
    assert cut.delivered_s == whole.delivered_s[: len(cut.delivered_s)]
    assert cut.num_lost == 30 - len(cut.delivered_s)
    assert all(cell.end_s <= loss.at_s for cell in cut.cells if cell.rank == loss.rank)
    assert all(cell.end_s <= loss.at_s + loss.noticed_after_s for cell in cut.cells)
    tail = schedule.num_ranks - 1
    if loss.rank == tail and cut.num_lost:
        assert all(at_s <= loss.at_s for at_s in cut.delivered_s)
        assert whole.delivered_s[len(cut.delivered_s)] > loss.at_s


def test_a_slow_line_is_late_and_a_buffer_forgives_a_hiccup() -> None:
    schedule = plan(num_steps=1, num_ranks=2)
    playback = Playback(frames_per_chunk=12, fps=25)  # 0.48 s
    slow = simulate(schedule, Costs(step_s=(0.5,), decode_s=0.1), num_chunks=11, playback=playback)
    assert slow.num_late == 10
    assert slow.stall_s == pytest.approx(10 * 0.02)
    assert slow.fps == pytest.approx(24)
    quick = Costs(step_s=(0.4,), decode_s=0.1)
    hiccup = {(0, 5): 0.5}
    for buffer_chunks, num_late in ((0, 2), (1, 0)):
        playback = Playback(frames_per_chunk=12, fps=25, buffer_chunks=buffer_chunks)
        result = simulate(schedule, quick, num_chunks=40, playback=playback, extra_s=hiccup)
        # 0.5 s late, 0.08 s made good with every chunk: chunk 5 is 0.1 s late, 6 is 0.02 s, 7 is not.
        assert result.num_late == num_late
        assert (result.stall_s > 0) == (num_late > 0)


def test_a_live_source_sets_the_pace() -> None:
    schedule = plan(num_steps=2, num_ranks=3)
    costs = Costs(step_s=(0.1, 0.1), decode_s=0.1)
    result = simulate(schedule, costs, num_chunks=20, source_period_s=0.48)
    assert result.period_s == pytest.approx(0.48)
    assert result.first_frame_s == pytest.approx(0.48 + 0.3)


def test_energy_counts_work_and_idling() -> None:
    schedule = plan(num_steps=1, num_ranks=2)
    result = simulate(schedule, Costs(step_s=(1.0,), decode_s=0.5), num_chunks=2)
    # Head 2 s of work, tail 1 s, both on for 2.5 s; 24 frames.
    assert result.wall_s == pytest.approx(2.5)
    assert result.joules_per_frame(busy_w=700, idle_w=100) == pytest.approx((700 * 3 + 100 * 2) / 24)


def test_jitter_keeps_the_mean_work() -> None:
    schedule = plan(num_steps=1, num_ranks=1)
    costs = Costs(step_s=(0.1,), decode_s=0.0)
    result = simulate(schedule, costs, num_chunks=20_000, jitter=0.3, seed=1)
    assert result.period_s == pytest.approx(0.1, rel=0.01)
    lengths = [cell.end_s - cell.start_s for cell in result.cells]
    spread = math.sqrt(sum((length - 0.1) ** 2 for length in lengths) / len(lengths))
    assert spread == pytest.approx(0.03, rel=0.05)


def test_the_timeline_shows_the_bubble() -> None:
    schedule = plan(num_steps=2, num_ranks=2, decode_alone=False, refresh_chunk=1)
    result = simulate(schedule, Costs(step_s=(1.0, 1.0), decode_s=0.0), num_chunks=3)
    assert render_timeline(result, tick_s=1.0, num_ticks=5) == (
        "s     0.00 1.00 2.00 3.00 4.00\nrank0    0    1    1    2    .\nrank1    .    0    .    1    2"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_chunks": 1}, "at least 2"),
        ({"jitter": -0.1}, "jitter"),
        ({"source_period_s": -1.0}, "source"),
        ({"loss": Loss(rank=2, at_s=1.0)}, "cannot be lost"),
    ],
)
def test_nonsense_is_refused(arguments: dict, words: str) -> None:
    costs = Costs(step_s=(1.0,), decode_s=1.0)
    with pytest.raises(ScheduleError, match=words):
        simulate(plan(num_steps=1, num_ranks=2), costs, **{"num_chunks": 5, **arguments})
    for make in (lambda: Hop(bytes_per_s=0), lambda: Playback(fps=0), lambda: Playback(buffer_chunks=-1)):
        with pytest.raises(ScheduleError):
            make()


def measured(schedule: Schedule, costs: Costs, num_chunks: int) -> tuple[float, float]:
    """Time to first frame and period of real processes that sleep."""
    outcomes = run_ranks(timed_stream, schedule.num_ranks, schedule, costs, num_chunks, free_port())
    (asked_s, _), *_, (_, delivered_s) = values(outcomes)
    gaps = [later - sooner for sooner, later in pairwise(delivered_s[num_chunks // 2 :])]
    return delivered_s[0] - asked_s, median(gaps)


def assert_predicted(schedule: Schedule, costs: Costs, num_chunks: int) -> None:
    """The fastest of up to three runs agrees: a busy machine only ever adds to the time."""
    result = simulate(schedule, costs, num_chunks=num_chunks, hop=Hop(latency_s=0.001))
    predicted = result.first_frame_s, result.period_s
    fastest = (math.inf, math.inf)
    for _ in range(3):
        run = measured(schedule, costs, num_chunks)
        fastest = min(fastest[0], run[0]), min(fastest[1], run[1])
        assert run[0] > predicted[0] * (1 - TOLERANCE)
        assert run[1] > predicted[1] * (1 - TOLERANCE)
        if fastest == pytest.approx(predicted, rel=TOLERANCE):
            return
    pytest.fail(f"first frame and period were predicted as {predicted} s, measured as {fastest} s")


@pytest.mark.slow
@pytest.mark.processes
def test_real_ranks_take_as_long_as_predicted() -> None:
    # Long naps, so that a busy machine's late wake-ups (a few ms) stay within the tolerance.
    costs = Costs(step_s=(0.12, 0.12), decode_s=0.18, encode_s=0.03)
    assert_predicted(plan(num_steps=2, num_ranks=3, refresh_chunk=1), costs, num_chunks=10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "costs"),
    [
        (plan(num_steps=4, num_ranks=5), Costs(step_s=(0.10,) * 4, decode_s=0.06)),
        (plan(num_steps=4, partition=(2, 1, 1)), Costs(step_s=(0.06,) * 4, decode_s=0.09, encode_s=0.02)),
        (plan(num_steps=3, partition=(1, 2), num_ranks=2), Costs(step_s=(0.05, 0.07, 0.03), decode_s=0.05)),
        (plan(num_steps=4, num_ranks=4, refresh_chunk=1), Costs(step_s=(0.09,) * 4, decode_s=0.09)),
        (plan(num_steps=1, num_ranks=2), Costs(step_s=(0.05,), decode_s=0.15)),
    ],
    ids=["one each", "uneven", "shared decode", "refresh with a bubble", "slow tail"],
)
def test_more_layouts_of_real_ranks(schedule: Schedule, costs: Costs) -> None:
    assert_predicted(schedule, costs, num_chunks=24)


@pytest.mark.processes
def test_the_command_says_what_was_published() -> None:
    """From a step of 265.5 ms and a decode of 148 ms follow the 45.2 FPS and 1.21 s of Live Avatar on five GPUs."""
    command = Path(__file__).parents[2] / "perf" / "simulate.py"
    done = subprocess.run(
        [sys.executable, str(command)],
        env={"PYTHONPATH": str(command.parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["gpus"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[-1]["fps"] == pytest.approx(45.2, rel=0.005)
    assert rows[-1]["first_frame_s"] == pytest.approx(1.21, rel=0.005)
