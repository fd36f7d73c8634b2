"""Ranks that `streamdiff line` has started serve one program after the other, and a lost one is waited for."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from streamdiff import presets
from streamdiff.engine import Engine
from streamdiff.errors import ConfigError, RankFailed
from streamdiff.line import LineLimits, Shape, join
from streamdiff.models.audio import AudioChunk
from streamdiff.pipeline.intake import Intake
from streamdiff.pipeline.line import Seat
from streamdiff.pipeline.meeting import line_folder
from streamdiff.pipeline.packet import Packet
from streamdiff.pipeline.run import run_local
from streamdiff.pipeline.schedule import plan
from tests.engine.line_case import WAIT_S, kill, wait_until
from tests.engine.stream_case import same
from tests.generate.processes import Command, environment

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(600)]
RANKS, SLACK, CHUNKS = 2, 3, 8
PATIENT = LineLimits(deadline_s=120, silence_s=120, startup_s=120)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files lie; names of sockets are short."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="sd") as name:

        def found(line: str) -> Path:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tempfile, "tempdir", name)
                return line_folder(line)

        monkeypatch.setattr("streamdiff.line.line_folder", found)
        yield Path(name)


class House:
    """Ranks of one line, started one by one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.ranks = [self.started(rank) for rank in range(RANKS)]

    def started(self, rank: int) -> Command:
        world = {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
        arguments = ["line", "--preset", "portrait", "--seats", "2", "--slack", str(SLACK), "--device", "cpu"]
        return Command(arguments, environment(TMPDIR=str(self._folder), **world))

    def __enter__(self) -> House:
        return self

    def __exit__(self, *exc: object) -> None:
        for rank in self.ranks:
            rank.kill()


def engine() -> Engine:
    return Engine(presets.portrait())


def shape(**other: int) -> Shape:
    return dataclasses.replace(Shape(seats=2, num_ranks=RANKS, slack_chunks=SLACK), **other)


def packets(number: int) -> Iterator[Packet]:
    """One stream with a prompt that switches and an interruption."""
    found = engine().with_slack(RANKS, SLACK)
    config, generator = found.config, torch.Generator().manual_seed(number)
    assert config.dit.audio is not None
    face = torch.randint(0, 255, (config.height, config.width, 3), generator=generator, dtype=torch.uint8)
    intake = Intake(config, found.encode_reference(face), found.encode_prompt("one"), stream=number)
    sound = (1, config.dit.audio.num_features, config.dit.audio.feature_dim, config.video_frames_per_chunk)
    for entry in range(CHUNKS):
        if entry == 3:
            intake.switch_prompt(found.encode_prompt("two"))
        if entry == 5 + number:
            intake.take_back(intake.next_chunk - 2)
        yield intake.packet(AudioChunk(torch.randn(sound, generator=generator), torch.zeros(1)))


@functools.cache
def alone(number: int) -> list[Packet]:
    config = engine().with_slack(RANKS, SLACK)
    schedule = plan(num_steps=config.config.num_steps, num_ranks=1, refresh_chunk=config.config.refresh_chunk)
    return list(run_local(schedule, [config.stage(role, stream=number) for role in schedule.roles], packets(number)))


def taken(seat: Seat) -> list[Packet]:
    return list(iter(lambda: seat.get(WAIT_S), None))


def assert_as_alone(found: Sequence[list[Packet]]) -> None:
    assert all(same(packets, alone(number)) for number, packets in enumerate(found))


def test_one_program_after_the_other_with_the_ranks_that_were_there(folder: Path) -> None:
    with House(folder):
        pids: list[tuple[int | None, ...]] = []
        for _ in range(2):
            with join(engine(), shape(), limits=PATIENT) as line:
                seats = [line.join(stream=number, live=False).start(packets(number)) for number in range(2)]
                assert_as_alone([taken(seat) for seat in seats])
                pids.append(line.pids)
        assert pids[0] == pids[1]
        # A program that is closed in the middle leaves nothing behind that the next one sees.
        with join(engine(), shape(), limits=PATIENT) as line:
            assert line.join(stream=5, live=False).start(packets(1)).get(WAIT_S) is not None
        with join(engine(), shape(), limits=PATIENT) as line:
            assert_as_alone([taken(line.join(stream=0, live=False).start(packets(0)))])
            assert line.pids == pids[0]


def test_a_rank_that_is_started_again_goes_on_with_the_same_bits(folder: Path) -> None:
    with House(folder) as house, join(engine(), shape(), limits=PATIENT) as line:
        seats = [line.join(stream=number, live=False).start(packets(number)) for number in range(2)]
        first = [seat.get(WAIT_S) for seat in seats]
        for rank in range(RANKS):
            kill(line, rank)
            wait_until(lambda rank=rank: line.pids[rank] is None)
            house.ranks[rank].kill()
            house.ranks[rank] = house.started(rank)
            wait_until(lambda rank=rank: line.metrics.healed == rank + 1)
        found = [[packet, *taken(seat)] for packet, seat in zip(first, seats, strict=True) if packet is not None]
        assert len(found) == 2
        assert_as_alone(found)


def test_a_program_of_another_shape_is_told_so(folder: Path) -> None:
    with House(folder):
        with pytest.raises(RankFailed, match=r"rank \d was started for another line: it serves portrait .*, 2 seats"):
            join(engine(), shape(seats=1), limits=PATIENT)
        with join(engine(), shape(), limits=PATIENT) as line:
            assert line.load.seats == 2


def test_a_rank_ends_by_a_signal_and_a_second_one_is_refused(folder: Path) -> None:
    with House(folder) as house:
        with join(engine(), shape(), limits=PATIENT):
            pass
        second = house.started(1)
        ended = second.end(WAIT_S)
        assert ended.returncode == 2
        for rank in house.ranks:
            rank.send_signal(signal.SIGTERM)
        assert [rank.end(WAIT_S).returncode for rank in house.ranks] == [143, 143]


def test_a_line_that_nobody_has_started_is_said_to_be_missing(folder: Path) -> None:
    limits = LineLimits(startup_s=0.2)
    with pytest.raises(RankFailed, match=r"rank \d does not wait at .*; start it with `streamdiff line`"):
        join(engine(), shape(), limits=limits)
    with pytest.raises(ConfigError, match="a line is named by"):
        join(engine(), shape(), name="../elsewhere")
    assert os.listdir(folder / f"streamdiff-{os.geteuid()}") == ["line-line"]
