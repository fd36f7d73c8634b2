"""A process that is killed without a chance to close its file leaves every chunk it has written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from streamdiff.media import VideoWriter
from streamdiff.output import Output, part_of
from tests.media.made_files import play, write_film

ROOT = Path(__file__).parents[2]

_WRITER = """
import sys
sys.path[:0] = [{root!r}]
from tests.media.made_files import film_chunk
from streamdiff.media import VideoWriter

writer = VideoWriter({path!r}, width=96, height=64, fps=25, rate_hz=16000)
for chunk in range(100_000):
    writer.write(*film_chunk(writer, chunk, 12, (64, 96), 25, 16000, 40))
    print(chunk, flush=True)
    if chunk == {pause_after}:
        sys.stdin.read()
"""


def _kill_after(path: Path, num_chunks: int, *, pause: bool) -> None:
    """Start a writer, kill it when it has reported its chunks: at rest, or while it writes the next ones."""
    program = _WRITER.format(
        root=str(ROOT),
        path=str(path),
        pause_after=num_chunks - 1 if pause else -1,
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process, process.stdin, process.stdout:
        for chunk in range(num_chunks):
            assert process.stdout.readline().strip() == str(chunk)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(timeout=30) == -signal.SIGKILL


@pytest.mark.processes
def test_sigkill_loses_no_chunk_that_write_returned_from(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    _kill_after(path, 5, pause=True)
    assert not path.exists()
    film = play(part_of(path))
    assert len(film.luma_T) == 60
    three_aac_frames_s = 3 * 1024 / 16_000
    assert 2.4 - three_aac_frames_s <= film.sound_ends_s <= 2.4
    assert [i for i, luma in enumerate(film.luma_T) if luma > 128] == [40]
    click = np.flatnonzero(np.abs(film.sound_S) > 0.3)[0]
    assert click / 16_000 == pytest.approx(40 / 25, abs=0.002)


@pytest.mark.processes
def test_sigkill_in_full_flow_leaves_whole_chunks(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    _kill_after(path, 40, pause=False)
    film = play(part_of(path))
    assert len(film.luma_T) >= 480
    assert len(film.luma_T) % 12 == 0
    assert film.sound_ends_s >= len(film.luma_T) / 25 - 3 * 1024 / 16_000


def test_a_kill_in_the_middle_of_a_write_costs_only_that_chunk(tmp_path: Path) -> None:
    """The states that a kill can leave behind: the body cut anywhere, the head of its box not yet written."""
    path = tmp_path / "film.mp4"
    writer = VideoWriter(path, width=96, height=64, fps=25, rate_hz=None)
    ends: list[int] = []
    for chunk in range(3):
        writer.write(torch.full((12, 64, 96, 3), 40 * chunk, dtype=torch.uint8))
        ends.append(part_of(path).stat().st_size)
    whole = part_of(path).read_bytes()
    writer.close()
    unfinished = whole[: ends[1]] + bytes(8) + whole[ends[1] + 8 :]
    for kept in [ends[1], *range(ends[1] + 9, ends[2], 37), ends[2]]:
        path.write_bytes(unfinished[:kept])
        assert len(play(path).luma_T) == 24


def test_the_head_of_a_fragment_is_written_last_and_never_straddles_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[tuple[int, int]] = []
    original = Output.write_at

    def recorded(self: Output, position: int, data: bytes) -> None:
        writes.append((position, len(data)))
        original(self, position, data)

    monkeypatch.setattr(Output, "write_at", recorded)
    write_film(tmp_path / "film.mp4", num_chunks=4)
    appended = writes[:-1]
    for (body_at, _), (head_at, head_bytes) in zip(appended[::2], appended[1::2], strict=True):
        assert head_bytes == 8
        assert head_at == body_at - 8
        assert head_at % 8 == 0


def test_a_closed_film_and_an_unclosed_one_hold_the_same_pictures(tmp_path: Path) -> None:
    closed = tmp_path / "closed.mp4"
    write_film(closed, num_chunks=3, flash_frame=17)
    film = play(closed)
    assert len(film.luma_T) == 36
    assert film.sound_ends_s == pytest.approx(36 / 25, abs=1e-9)
