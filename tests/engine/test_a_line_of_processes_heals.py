"""Ranks in processes of their own serve many streams, and one that is lost is replaced: every stream keeps its bits."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from streamdiff.errors import ConfigError, LineFull, RankFailed, SessionClosed
from streamdiff.line import Shape, spawn
from streamdiff.pipeline.line import Line
from streamdiff.pipeline.process_line import LineLimits, ProcessLine
from streamdiff.pipeline.schedule import plan
from tests.engine.line_case import (
    CASE,
    DIE,
    FAIL,
    HANG,
    LIFE,
    PATIENT,
    WAIT_S,
    Visit,
    adding_line,
    broken_build,
    case_of,
    has_made,
    kill,
    line_of,
    spawned,
    sums,
    values,
    wait_until,
    waiting_behind,
)
from tests.engine.oracle_case import played, script_of
from tests.engine.stream_case import same
from tests.session.faces import collect, open_video, run, tone, video_engine

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def alone(number: int) -> list[object]:
    case = case_of(number)
    return list(played(case, script_of(case, LIFE)))


def test_streams_that_come_and_go_are_what_they_are_alone_and_what_the_oracle_says() -> None:
    with line_of(CASE, seats=2) as line:
        first = [Visit(line, number) for number in range(2)]
        with pytest.raises(LineFull, match="all 2 seats"):
            line.join()
        seen = [visit.finished() for visit in first]
        seen += [Visit(line, 2).finished()]
        assert line.load.streams == 0
        assert all(busy_us > 0 for busy_us in line.load.busy_us)
    for number, packets in enumerate(seen):
        assert same(packets, alone(number)), f"stream {number} is not what it is alone"
        case = case_of(number)
        for packet, made in zip(packets, case.oracle().film(script_of(case, LIFE)), strict=True):
            assert packet.sound_S is not None
            assert torch.equal(packet.sound_S, made.sound_S)
            assert (packet.latent_BCTHW - made.latent_BCTHW).abs().max() <= 1e-5


def assert_as_alone(visits: list[Visit]) -> None:
    for number, visit in enumerate(visits):
        assert same(visit.finished(), alone(number)), f"stream {number} is not what it is alone"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_every_rank_in_turn_is_lost_in_mid_stream_and_four_streams_keep_their_bits(number: signal.Signals) -> None:
    limits = PATIENT if number == signal.SIGKILL else LineLimits(deadline_s=120, silence_s=2, startup_s=120)
    with line_of(CASE, seats=4, limits=limits) as line:
        visits = [Visit(line, stream, may_end=False) for stream in range(4)]
        for rank in range(3):
            wait_until(partial(has_made, line, rank, 10 + 15 * rank))
            kill(line, rank, number)
            wait_until(partial(is_replaced, line, rank, 1))
        assert_as_alone(visits)


def test_ten_kills_in_a_row_and_all_ranks_at_once_lose_nothing() -> None:
    with line_of(CASE, seats=2, limits=PATIENT) as line:
        visits = [Visit(line, stream, may_end=False) for stream in range(2)]
        wait_until(lambda: has_made(line, 2, 3))
        for losses in range(10):
            kill(line, losses % 3)
            wait_until(partial(is_replaced, line, losses % 3, 1 + losses // 3))
        for rank in range(3):
            kill(line, rank)
        assert_as_alone(visits)
        assert line.metrics.healed == 13


def is_replaced(line: ProcessLine, rank: int, losses: int) -> bool:
    return line.metrics.ranks[rank].losses >= losses and line.pids[rank] is not None


def test_a_line_that_does_not_heal_names_the_lost_rank_to_every_stream() -> None:
    with line_of(CASE, seats=2, heals=False, limits=PATIENT) as line:
        visits = [Visit(line, stream, may_end=False) for stream in range(2)]
        wait_until(lambda: has_made(line, 1, 2))
        pids = line.pids
        kill(line, 1)
        for visit in visits:
            with pytest.raises(RankFailed, match=r"rank 1 was ended by signal 9; this line does not heal") as caught:
                visit.finished()
            assert caught.value.rank == 1
        with pytest.raises(RankFailed, match="rank 1"):
            line.join()
        wait_until(lambda: not any(map(is_alive, pids)))


def test_a_stream_whose_stage_fails_ends_alone_and_its_seat_is_free_again() -> None:
    with adding_line(2, 2) as line:
        broken, other = line.join(), line.join()
        broken.start(values(1, FAIL, 1, 1))
        other.start(values(*[1] * 20))
        assert broken.get(WAIT_S) is not None
        for _ in range(2):
            with pytest.raises(RankFailed, match="rank 0 failed at chunk 1: ValueError: this is not added") as caught:
                broken.get(WAIT_S)
            assert caught.value.rank == 0
        # Rank 0 makes n of the n-th, rank 1 adds those.
        assert sums(other) == [k * (k + 1) / 2 for k in range(1, 21)]
        again = line.join(seed=2, stream=3).start(values(1, 1))
        assert sums(again) == [2003 + 2004, 2003 + 2004 + 2005]
        assert line.metrics.healed == 0


def test_a_rank_that_heals_remembers_that_a_stream_has_failed() -> None:
    with adding_line(1, 1, limits=PATIENT) as line:
        broken = line.join().start(values(1, FAIL, 1, 1, 1))
        assert broken.get(WAIT_S) is not None
        with pytest.raises(RankFailed, match="this is not added"):
            broken.get(WAIT_S)
        kill(line, 0)
        wait_until(lambda: is_replaced(line, 0, 1))
        assert sums(line.join(stream=5).start(values(1, 2))) == [6, 8]


def test_a_chunk_that_ends_every_process_that_makes_it_ends_the_line() -> None:
    with adding_line(2, 1, limits=PATIENT) as line:
        seat = line.join().start(values(1, DIE, 1))
        assert seat.get(WAIT_S) is not None
        with pytest.raises(RankFailed, match="rank 0 was ended by signal 9; it was replaced 12 times") as caught:
            seat.get(WAIT_S)
        assert caught.value.rank == 0


def test_what_a_rank_has_handed_on_and_nobody_has_kept_is_sent_again_by_its_heir(tmp_path: Path) -> None:
    """Both ranks are lost while three chunks are behind the first and none behind the second."""
    find = spawned(partial(waiting_behind, tmp_path / "go"))
    with ProcessLine(CASE.config, plan(num_steps=2, num_ranks=2), 1, find, limits=PATIENT) as line:
        seat = line.join().start(values(*[1] * 8))
        wait_until(lambda: has_made(line, 0, 3))
        kill(line, 1)
        kill(line, 0)
        wait_until(lambda: line.metrics.healed == 2)
        (tmp_path / "go").touch()
        assert sums(seat) == [k * (k + 1) / 2 for k in range(1, 9)]


def test_an_idle_rank_may_be_lost_as_often_as_it_happens() -> None:
    with adding_line(1, 1, limits=PATIENT) as line:
        for losses in range(14):
            kill(line, 0)
            wait_until(partial(is_replaced, line, 0, losses + 1))
        assert sums(line.join().start(values(1, 2))) == [1, 3]


def test_a_rank_that_works_for_too_long_is_lost() -> None:
    limits = LineLimits(deadline_s=3, silence_s=120, startup_s=120)
    with adding_line(2, 1, heals=False, limits=limits) as line:
        seat = line.join().start(values(1, HANG, 1))
        assert seat.get(WAIT_S) is not None
        with pytest.raises(RankFailed, match="rank 0 had been working on one chunk for more than 3 s") as caught:
            seat.get(WAIT_S)
        assert caught.value.rank == 0


def test_a_rank_that_cannot_be_made_says_why() -> None:
    with pytest.raises(RankFailed, match=r"rank \d failed: OSError: no weights for rank \d; it never got ready"):
        ProcessLine(CASE.config, plan(num_steps=2, num_ranks=2), 1, spawned(broken_build))


def test_a_closed_line_leaves_no_process_and_says_so() -> None:
    line = adding_line(2, 1)
    pids = line.pids
    seat = line.join().start(values(*[1] * 1000))
    assert seat.get(WAIT_S) is not None
    line.close()
    line.close()
    assert not any(map(is_alive, pids))
    with pytest.raises(SessionClosed):
        line.join()
    with pytest.raises(SessionClosed):
        sums(seat)


def test_ranks_end_when_their_driver_is_killed() -> None:
    code = (
        "from tests.engine.line_case import adding_line\n"
        "import time\n"
        "if __name__ == '__main__':\n"
        "    line = adding_line(2, 1)\n"
        "    print(*line.pids, flush=True)\n"
        "    time.sleep(600)\n"
    )
    script = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | paths()
    )
    try:
        assert script.stdout is not None
        pids = [int(word) for word in script.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(is_alive, pids))
    finally:
        script.kill()
        script.wait(WAIT_S)
        assert script.stdout is not None
        script.stdout.close()
    wait_until(lambda: not any(map(is_alive, pids)))


def test_limits_are_times_that_can_be_kept() -> None:
    with pytest.raises(ConfigError, match="too short"):
        LineLimits(silence_s=0.2)
    with pytest.raises(ConfigError, match="positive"):
        LineLimits(deadline_s=0)


def test_a_session_on_a_line_of_processes_is_what_it_is_alone() -> None:
    engine = video_engine()

    async def film(number: int, line: Line | None) -> np.ndarray:
        slack = None if line is not None else 9
        async with open_video(engine, slack=slack, stream=number, line=line) as session:
            session.push_audio(tone(0.7, number))
            session.finish()
            return np.concatenate([shown.frames_THWC for shown in await collect(session)])

    async def scene() -> None:
        with spawn(engine, Shape(seats=2, num_ranks=2, slack_chunks=9)) as line:
            together = await asyncio.gather(film(0, line), film(1, line))
        for number, found in enumerate(together):
            assert np.array_equal(found, await film(number, None))

    run(scene())


def is_alive(pid: int | None) -> bool:
    """Whether there is such a process that has not ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def paths() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
