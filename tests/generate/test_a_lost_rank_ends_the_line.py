"""A rank that dies or hangs ends every other rank in time, with an error that names it, and the film so far plays."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import av
import pytest

from streamdiff.output import part_of
from tests.generate.processes import Ranks, wait_for_bytes, write_inputs

NUM_RANKS = 3
DEADLINE_S = 10.0
SLACK_S = 5.0
"""For a busy machine to notice, write and leave, beyond the deadline."""


@pytest.fixture
def line(tmp_path: Path) -> Iterator[tuple[Ranks, Path]]:
    film = tmp_path / "film.mp4"
    arguments = [*write_inputs(tmp_path), "--seconds", "600", "--deadline", str(DEADLINE_S), "--out", str(film)]
    ranks = Ranks.start(NUM_RANKS, arguments)
    try:
        wait_for_bytes(part_of(film), 30_000)
        yield ranks, film
    finally:
        ranks.kill()


def frames_of(film: Path) -> int:
    with av.open(str(film)) as container:
        return sum(1 for _ in container.decode(video=0))


def check_the_others(ranks: Ranks, lost: int, film: Path) -> None:
    others = [rank for rank in range(NUM_RANKS) if rank != lost]
    for rank, (status, stderr) in ranks.end(others, within_s=DEADLINE_S + SLACK_S).items():
        assert status not in (0, None), f"rank {rank}"
        assert re.search(rf"error: .*rank {lost}\b", stderr), f"rank {rank} said: {stderr}"
        assert "Traceback" not in stderr
    assert not film.exists()
    num_frames = frames_of(part_of(film))
    assert num_frames > 0
    assert num_frames % 12 == 0


@pytest.mark.slow
@pytest.mark.parametrize("lost", range(NUM_RANKS))
def test_killed(line: tuple[Ranks, Path], lost: int) -> None:
    ranks, film = line
    ranks.processes[lost].send_signal(signal.SIGKILL)
    check_the_others(ranks, lost, film)


@pytest.mark.slow
@pytest.mark.parametrize("lost", range(NUM_RANKS))
def test_stopped(line: tuple[Ranks, Path], lost: int) -> None:
    ranks, film = line
    ranks.processes[lost].send_signal(signal.SIGSTOP)
    check_the_others(ranks, lost, film)


@pytest.mark.processes
def test_ctrl_c_is_clean(line: tuple[Ranks, Path]) -> None:
    ranks, film = line
    for process in ranks.processes:
        process.send_signal(signal.SIGINT)
    for status, stderr in ranks.end(range(NUM_RANKS), within_s=DEADLINE_S + SLACK_S).values():
        assert status in (130, 1)
        assert "Traceback" not in stderr
    assert frames_of(film) % 12 == 0
