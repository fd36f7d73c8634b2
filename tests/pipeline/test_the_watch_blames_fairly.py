"""The verdict over a set of heartbeats: who hangs or is gone is named, who merely waits never is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamdiff.errors import ConfigError
from streamdiff.pipeline.link import Doing
from streamdiff.pipeline.watch import Beat, Limits, Report, diagnose, lost_at_start

LIMITS = Limits(deadline_s=4.0, startup_s=60.0, outside_s=30.0)
WAITS = [Doing.WAITING, Doing.SENDING, Doing.READY, Doing.DONE]


def report(doing: Doing, for_s: float = 0.0, *, age_s: float = 0.0, chunk: int = 7) -> Report:
    return Report(Beat(count=1, doing=doing, chunk=chunk, for_s=for_s), age_s)


def verdict(*reports: Report):
    return diagnose(dict(enumerate(reports)), LIMITS, silence_s=LIMITS.silence_s)


fresh_s = st.floats(0, LIMITS.silence_s - 0.01)
waiting = st.builds(report, st.sampled_from(WAITS), st.floats(0, 1e6), age_s=fresh_s)
working = st.builds(report, st.just(Doing.WORKING), st.floats(0, 1.9), age_s=fresh_s)
loading = st.builds(report, st.just(Doing.STARTING), st.floats(0, 1e4), age_s=st.floats(0, 9.9))
outside = st.builds(report, st.sampled_from([Doing.SOURCING, Doing.DELIVERING]), st.floats(0, 27), age_s=fresh_s)
moving = st.one_of(working, loading, outside)
stuck = st.one_of(
    st.builds(report, st.just(Doing.WORKING), st.floats(4.01, 1e4), age_s=fresh_s),
    st.builds(report, st.sampled_from([Doing.SOURCING, Doing.DELIVERING]), st.floats(30.1, 1e4), age_s=fresh_s),
    st.builds(
        report,
        st.sampled_from([Doing.WORKING, Doing.WAITING, Doing.SENDING, Doing.READY, Doing.SOURCING]),
        st.floats(0, 1),
        age_s=st.floats(LIMITS.silence_s + 0.01, 1e4),
    ),
    st.builds(report, st.just(Doing.STARTING), st.floats(0, 1), age_s=st.floats(10.1, 1e4)),
)


@given(st.lists(st.one_of(waiting, moving), min_size=1, max_size=8), moving, st.data())
def test_nobody_is_blamed_while_somebody_moves(others: list[Report], mover: Report, data: st.DataObject) -> None:
    others.insert(data.draw(st.integers(0, len(others))), mover)
    assert verdict(*others) is None


@given(st.lists(st.one_of(waiting, moving), min_size=1, max_size=8), stuck, st.data())
def test_the_one_that_hangs_or_is_silent_is_blamed(others: list[Report], culprit: Report, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, len(others)))
    others.insert(rank, culprit)
    failure = verdict(*others)
    assert failure is not None
    assert failure.rank == rank
    assert failure.chunk == 7


def test_the_one_silent_for_longest_is_blamed() -> None:
    failure = verdict(report(Doing.WORKING, age_s=2.5), report(Doing.WAITING, age_s=3.5), report(Doing.WAITING))
    assert failure is not None
    assert failure.rank == 1


def test_a_stall_of_all_blames_nobody() -> None:
    stalled = [report(Doing.WAITING, 5.0), report(Doing.SENDING, 6.0), report(Doing.DONE, 9.0)]
    failure = verdict(*stalled)
    assert failure is not None
    assert failure.rank is None
    assert "all ranks wait for each other" in str(failure)
    assert verdict(*stalled, report(Doing.WAITING, 1.0)) is None, "the last one has only begun to wait"


def test_a_rank_that_is_done_may_fall_silent() -> None:
    assert verdict(report(Doing.DONE, age_s=1e6), report(Doing.WORKING)) is None
    assert verdict(report(Doing.DONE, age_s=1e6), report(Doing.DONE)) is None


def test_a_rank_that_has_not_joined_is_not_blamed_by_heartbeats() -> None:
    assert verdict(Report(None, 0.0), report(Doing.READY, 1e6)) is None


@given(st.floats(0.1, 1e4))
def test_silence_is_noticed_within_the_deadline(deadline_s: float) -> None:
    limits = Limits(deadline_s=deadline_s)
    assert limits.silence_s + 2 * limits.poll_s <= deadline_s
    assert limits.silence_s >= 5 * limits.poll_s, "a few late heartbeats are not a death"


def test_the_one_silent_rank_that_was_starting_is_named_when_all_are_stopped() -> None:
    reports = {0: report(Doing.STARTING, age_s=0.2), 1: report(Doing.READY), 2: report(Doing.STARTING, age_s=3.0)}
    found = lost_at_start(reports, silence_s=1.0)
    assert found is not None
    assert found.rank == 2
    assert "3.0 s while it was starting" in found.what
    absent = lost_at_start({0: report(Doing.STARTING), 1: Report(None, 0.0)}, silence_s=1.0)
    assert absent is not None
    assert absent.rank == 1
    assert "never joined" in absent.what


def test_of_several_silent_ones_none_is_picked() -> None:
    found = lost_at_start({0: Report(None, 0.0), 1: report(Doing.STARTING, age_s=3.0)}, silence_s=1.0)
    assert found is not None
    assert found.rank is None
    assert "rank 0 never joined, rank 1 gave no sign of life" in found.what


@given(st.lists(st.one_of(waiting, working, outside, stuck), max_size=8))
def test_once_all_have_started_nobody_is_guessed(reports: list[Report]) -> None:
    started = [one for one in reports if one.beat is not None and one.beat.doing is not Doing.STARTING]
    assert lost_at_start(dict(enumerate(started)), silence_s=1.0) is None


@pytest.mark.parametrize("name", ["deadline_s", "startup_s", "outside_s"])
def test_limits_are_positive(name: str) -> None:
    with pytest.raises(ConfigError, match="positive"):
        Limits(**{name: 0.0})
