"""Whatever ends one rank ends every other one with an error that names it, within the deadline."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.pipeline import faults
from tests.pipeline.ranks import Outcome, Ranks, run_ranks, wait_for_line

pytestmark = pytest.mark.processes

DEADLINE_S = 5.0


def assert_all_name(outcomes: Sequence[Outcome], culprit: int, words: str) -> None:
    for outcome in outcomes:
        assert outcome.exitcode == 1, outcome
        assert outcome.error.startswith(f"RankFailed: rank {culprit} "), outcome.error
        assert words in outcome.error, outcome.error
        assert outcome.blamed == culprit


def signalled(size: int, culprit: int, number: signal.Signals, log: Path) -> list[Outcome]:
    """Outcomes of all ranks but the culprit, which gets the signal in mid-stream."""
    with Ranks(faults.stream_forever, size, (log, DEADLINE_S)) as ranks:
        wait_for_line(log, 5)
        start_s = time.monotonic()
        ranks.signal(culprit, number)
        outcomes = ranks.wait(DEADLINE_S + 3, without=[culprit])
        took_s = time.monotonic() - start_s
    assert took_s < DEADLINE_S, f"took {took_s:.1f} s: {outcomes}"
    return outcomes


@pytest.mark.parametrize(
    "culprit", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_a_killed_rank(culprit: int, tmp_path: Path) -> None:
    assert_all_name(signalled(3, culprit, signal.SIGKILL, tmp_path / "log"), culprit, "died")


@pytest.mark.parametrize(
    "culprit", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_a_stopped_rank(culprit: int, tmp_path: Path) -> None:
    words = "gave no sign of life" if culprit else "hosts the store"
    assert_all_name(signalled(3, culprit, signal.SIGSTOP, tmp_path / "log"), culprit, words)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("culprit", range(5))
def test_five_ranks_lose_one(culprit: int, number: signal.Signals, tmp_path: Path) -> None:
    assert_all_name(signalled(5, culprit, number, tmp_path / "log"), culprit, "")


def test_a_launcher_that_stops_the_others_does_not_hide_the_dead_one(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Ranks(faults.stream_forever, 3, (log, 20.0)) as ranks:
        wait_for_line(log, 5)
        ranks.signal(2, signal.SIGKILL)
        for rank in (0, 1):
            ranks.signal(rank, signal.SIGTERM)
        assert_all_name(ranks.wait(10, without=[2]), 2, "")


@pytest.mark.slow
@pytest.mark.parametrize("culprit", [1, 2])
def test_a_launcher_that_stops_starting_ranks_does_not_hide_the_dead_one(culprit: int, tmp_path: Path) -> None:
    """Loading may be silent for long; told to stop, the others look who was."""
    log = tmp_path / "log"
    with Ranks(faults.load_forever, 3, (log,)) as ranks:
        wait_for_line(log, 3)
        ranks.signal(culprit, signal.SIGKILL)
        others = [rank for rank in range(3) if rank != culprit]
        for rank in others:
            ranks.signal(rank, signal.SIGTERM)
        assert_all_name(ranks.wait(15, without=[culprit]), culprit, "while it was starting")


def test_an_interrupted_rank(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Ranks(faults.stream_forever, 3, (log, DEADLINE_S)) as ranks:
        wait_for_line(log, 3)
        ranks.signal(1, signal.SIGINT)
        head, interrupted, tail = ranks.wait(DEADLINE_S)
    assert_all_name([head, tail], 1, "was told to stop")
    assert interrupted.error.startswith("KeyboardInterrupt")


def test_a_stage_that_raises() -> None:
    head, culprit, tail = run_ranks(faults.stream_with_trouble, 3, 1, faults.boom, DEADLINE_S)
    assert_all_name([head, tail], 1, "failed: ValueError: boom")
    assert culprit.error.startswith("ValueError: boom")
    for outcome in (head, culprit, tail):
        assert "!5" in outcome.error, "the schedule is printed with the cell marked"


@pytest.mark.slow
def test_a_stage_that_hangs() -> None:
    """It is in Python, so it can be interrupted, and its own process ends in order as well."""
    assert_all_name(run_ranks(faults.stream_with_trouble, 3, 2, faults.hang, 2.0), 2, "working for 2.")


@pytest.mark.slow
def test_an_interrupt_that_was_lost_comes_again(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    outcomes = run_ranks(faults.stream_with_trouble, 3, 2, faults.hang_and_lose_an_interrupt, 2.0, saved)
    assert_all_name(outcomes, 2, "working for 2.")
    assert list(tmp_path.iterdir()) == [], "nobody was ended by force"


@pytest.mark.slow
def test_a_stage_that_hears_no_signal_is_ended_by_force(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    head, culprit, tail = run_ranks(faults.stream_with_trouble, 3, 1, faults.hang_deaf, 2.0, saved)
    assert_all_name([head, tail], 1, "working for 2.")
    assert culprit.exitcode == 1
    assert culprit.error == "", "it could not say anything itself"
    assert [path.name for path in tmp_path.iterdir()] == ["saved.1"], "only the stuck rank needs saving"
    assert "rank 1 has been working" in (tmp_path / "saved.1").read_text()


def test_a_process_that_leaves_without_a_word() -> None:
    head, culprit, tail = run_ranks(faults.stream_with_trouble, 3, 2, faults.vanish, DEADLINE_S)
    assert_all_name([head, culprit], 2, "died")
    assert tail.exitcode == 0


def test_a_rank_that_leaves_the_group_early() -> None:
    assert_all_name(run_ranks(faults.leave_early, 3, 1), 1, "left")


def test_a_rank_that_fails_while_loading() -> None:
    head, culprit, tail = run_ranks(faults.load_with_trouble, 3, 1, "raises", 60.0, timeout_s=20)
    assert_all_name([head, tail], 1, "failed: ValueError: boom")
    assert culprit.error.startswith("ValueError: boom")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "words"), [("absent", "never joined"), ("slow", "still loading")])
def test_a_rank_that_is_never_ready(kind: str, words: str) -> None:
    with Ranks(faults.load_with_trouble, 3, (2, kind, 2.5)) as ranks:
        assert_all_name(ranks.wait(15, without=[2]), 2, words)


def test_ranks_that_follow_different_schedules() -> None:
    for outcome in run_ranks(faults.load_with_trouble, 3, 1, "other schedule", 60.0, timeout_s=20):
        assert outcome.exitcode == 1
        assert outcome.error.startswith(("ScheduleError: rank", "RankFailed: rank")), outcome.error
        assert "same arguments" in outcome.error


def test_a_lost_message_is_noticed() -> None:
    head, middle, tail = run_ranks(faults.lose_a_message, 3, 0)
    assert_all_name([head, middle, tail], 0, "one was lost or doubled")


@pytest.mark.slow
def test_a_stall_without_a_culprit_ends_too() -> None:
    for outcome in run_ranks(faults.swallow_a_message, 3, 1, timeout_s=20):
        assert outcome.exitcode == 1
        assert "all ranks wait for each other" in outcome.error
        assert outcome.blamed is None
