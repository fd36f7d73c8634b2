"""Every layout that `plan` makes can stream and is the best of its kind; one that cannot is refused."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamdiff.errors import ScheduleError
from streamdiff.pipeline.schedule import (
    Costs,
    Schedule,
    check,
    plan,
    rank_costs_us,
    render,
    render_around,
)

partitions = st.lists(st.integers(1, 3), min_size=1, max_size=5).map(tuple)
seconds = st.floats(0, 2, allow_nan=False).map(lambda x: round(x, 3))


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    refresh = draw(st.none() | st.integers(1, 12))
    return Schedule(
        partition=draw(partitions),
        decode_alone=draw(st.booleans()),
        refresh_chunk=refresh,
        source_chunk=draw(st.integers(0, refresh - 1)) if refresh else 0,
    )


@given(schedules(), st.integers(0, 4), st.integers(1, 3))
def test_a_line_with_a_buffered_feedback_edge_is_free_of_deadlock(
    schedule: Schedule, queue_depth: int, feedback_depth: int
) -> None:
    check(schedule, queue_depth=queue_depth, feedback_depth=feedback_depth)


@given(schedules(), st.integers(0, 3), st.integers(0, 1))
def test_the_check_agrees_with_a_run_of_the_line(schedule: Schedule, queue_depth: int, feedback_depth: int) -> None:
    """The check reasons over a graph; this plays the same rules move by move until nothing moves."""
    try:
        check(schedule, num_chunks=30, queue_depth=queue_depth, feedback_depth=feedback_depth)
        claims_free = True
    except ScheduleError:
        claims_free = False
    assert played_to_the_end(schedule, 30, queue_depth, feedback_depth) == claims_free


def played_to_the_end(schedule: Schedule, num_chunks: int, queue_depth: int, feedback_depth: int) -> bool:
    """Every rank as a program of moves; a move is made when the other side allows it."""
    last_dit, tail = schedule.last_dit_rank, schedule.num_ranks - 1
    buffered = feedback_depth > 0 or schedule.feedback_edge is None
    programs: list[list[tuple[str, int]]] = []
    for rank in range(schedule.num_ranks):
        moves: list[tuple[str, int]] = []
        for chunk in range(num_chunks):
            if rank > 0:
                moves.append(("take", chunk))
            if rank == 0 and chunk == schedule.refresh_chunk:
                moves.append(("fill", chunk))
            if rank == last_dit and chunk == schedule.source_chunk and schedule.refresh_chunk is not None:
                moves.append(("return", chunk))
            if rank < tail:
                moves.append(("give", chunk))
        programs.append(moves)
    at = [0] * schedule.num_ranks
    queued = [0] * schedule.num_ranks  # packets between rank and rank + 1
    returned = 0

    def move(rank: int) -> str:
        return programs[rank][at[rank]][0] if at[rank] < len(programs[rank]) else "end"

    moved = True
    while moved:
        moved = False
        for rank in range(schedule.num_ranks):
            what = move(rank)
            if what == "give" and queue_depth == 0 and move(rank + 1) == "take":
                at[rank], at[rank + 1], moved = at[rank] + 1, at[rank + 1] + 1, True
            elif what == "give" and queued[rank] < queue_depth:
                queued[rank], at[rank], moved = queued[rank] + 1, at[rank] + 1, True
            elif what == "take" and queue_depth > 0 and queued[rank - 1] > 0:
                queued[rank - 1], at[rank], moved = queued[rank - 1] - 1, at[rank] + 1, True
            elif what == "return" and buffered:
                returned, at[rank], moved = returned + 1, at[rank] + 1, True
            elif what == "return" and move(0) == "fill":
                at[rank], at[0], moved = at[rank] + 1, at[0] + 1, True
            elif what == "fill" and buffered and returned > 0:
                at[rank], moved = at[rank] + 1, True
    return all(place == len(program) for place, program in zip(at, programs, strict=True))


def test_an_unbuffered_feedback_edge_locks_up_and_the_error_says_who_waits_for_whom() -> None:
    schedule = plan(num_steps=4, num_ranks=5, refresh_chunk=20)
    with pytest.raises(ScheduleError, match=r"rank 0 at chunk 20 waits for .* waits for rank 0 at chunk 20"):
        check(schedule, feedback_depth=0)


@given(schedules())
def test_the_bubble_is_what_the_picture_shows(schedule: Schedule) -> None:
    """Counted from the rules alone: one chunk per rank and tick, and the head waits for the latent."""
    num_chunks = 16
    starts = [[0] * num_chunks for _ in range(schedule.num_ranks)]
    for chunk, rank in itertools.product(range(num_chunks), range(schedule.num_ranks)):
        before = [starts[rank][chunk - 1] + 1] if chunk else [0]
        if rank:
            before.append(starts[rank - 1][chunk] + 1)
        if rank == 0 and chunk == schedule.refresh_chunk:
            before.append(starts[schedule.last_dit_rank][schedule.source_chunk] + 1)
        starts[rank][chunk] = max(before)
    ticks = [[schedule.start_tick(rank, chunk) for chunk in range(num_chunks)] for rank in range(schedule.num_ranks)]
    assert ticks == starts
    idle = starts[0][-1] - (num_chunks - 1)
    assert schedule.bubble_ticks == idle


@pytest.mark.parametrize(("refresh_chunk", "bubble"), [(1, 3), (2, 2), (3, 1), (4, 0), (5, 0)])
def test_a_refresh_before_the_line_is_full_costs_ticks(refresh_chunk: int, bubble: int) -> None:
    assert plan(num_steps=4, num_ranks=5, refresh_chunk=refresh_chunk).bubble_ticks == bubble


@given(
    st.lists(seconds, min_size=1, max_size=6),
    seconds,
    seconds,
    st.integers(1, 7),
)
def test_no_layout_is_faster_than_the_planned_one(
    step_s: list[float], decode_s: float, encode_s: float, num_ranks: int
) -> None:
    num_steps = len(step_s)
    num_ranks = min(num_ranks, num_steps + 1)
    costs = Costs(step_s=tuple(step_s), decode_s=decode_s, encode_s=encode_s)
    planned = plan(num_steps=num_steps, num_ranks=num_ranks, costs=costs)
    assert planned.num_ranks == num_ranks
    check(planned)
    every = [
        Schedule(partition=shares, decode_alone=alone)
        for alone in (False, True)
        for shares in itertools.product(range(1, num_steps + 1), repeat=num_ranks - alone)
        if shares and sum(shares) == num_steps
    ]
    longest = [max(rank_costs_us(schedule, costs)) for schedule in every]
    assert max(rank_costs_us(planned, costs)) == min(longest)


@given(schedules())
def test_every_step_has_one_owner_and_neighbours_follow_each_other(schedule: Schedule) -> None:
    roles = schedule.roles
    assert [role.rank for role in roles] == list(range(schedule.num_ranks))
    assert list(itertools.chain(*(role.steps for role in roles))) == list(range(schedule.num_steps))
    assert [role.rank for role in roles if role.encodes] == [0]
    assert [role.rank for role in roles if role.decodes] == [schedule.num_ranks - 1]
    assert [(edge.src, edge.dst) for edge in schedule.forward_edges] == list(
        itertools.pairwise(range(schedule.num_ranks))
    )
    if schedule.feedback_edge is not None:
        assert (schedule.feedback_edge.src, schedule.feedback_edge.dst) == (schedule.last_dit_rank, 0)


def test_ties_go_to_a_decode_of_its_own_and_to_early_ranks() -> None:
    even = Costs(step_s=(1, 1, 1, 1), decode_s=0.5)
    assert plan(num_steps=4, num_ranks=3, costs=even) == Schedule(partition=(2, 2), decode_alone=True)
    assert plan(num_steps=4, num_ranks=4, costs=even).decode_alone is False
    dear = Costs(step_s=(1, 1, 1, 1), decode_s=2)
    assert plan(num_steps=4, num_ranks=4, costs=dear) == Schedule(partition=(2, 1, 1), decode_alone=True)
    assert plan(num_steps=4, num_ranks=2).partition == (2, 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_ranks": 6}, "6 ranks are too many for 4 steps.*start 5 or fewer"),
        ({"num_ranks": 0}, "at least one rank"),
        ({}, "neither num_ranks nor partition"),
        ({"partition": (2, 1)}, "holds 3 steps but there are 4"),
        ({"partition": (2, 0, 2)}, "owns at least one step"),
        ({"partition": ()}, "owns at least one step"),
        ({"partition": (2, 1, 1), "num_ranks": 2}, "fills 3 ranks but there are 2"),
        ({"partition": (2, 1, 1), "num_ranks": 3, "decode_alone": True}, "fills 4 ranks"),
        ({"num_ranks": 1, "decode_alone": True}, "use 2 to 5 ranks"),
        ({"num_ranks": 5, "decode_alone": False}, "use 1 to 4 ranks"),
        ({"num_ranks": 5, "refresh_chunk": 0}, "use refresh_chunk=1 or later"),
        ({"num_ranks": 5, "costs": Costs(step_s=(1, 1), decode_s=1)}, "2 step costs do not fit 4 steps"),
    ],
)
def test_a_layout_that_cannot_work_is_refused_in_one_line(arguments: dict, words: str) -> None:
    with pytest.raises(ScheduleError, match=words) as caught:
        plan(num_steps=4, **arguments)
    assert "\n" not in str(caught.value)


def test_costs_must_be_finite() -> None:
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ScheduleError, match="finite"):
            Costs(step_s=(1.0, bad), decode_s=1.0)


def test_the_picture() -> None:
    schedule = plan(num_steps=2, num_ranks=3, refresh_chunk=1)
    assert render(schedule, num_chunks=3, mark=(1, 1)) == (
        "tick   0  1  2  3  4  5\nrank0  0  .  1  2  .  .\nrank1  .  0  . !1  2  .\nrank2  .  .  0  .  1  2"
    )


def test_a_picture_far_into_the_stream_is_small_and_keeps_its_columns() -> None:
    schedule = plan(num_steps=4, num_ranks=5, refresh_chunk=3)
    picture = render_around(schedule, 2, 1_000_000)
    assert "!1000000" in picture
    lines = picture.splitlines()
    assert len(lines) == 6
    assert len({len(line) for line in lines}) == 1
    assert all(len(line) < 200 for line in lines)
