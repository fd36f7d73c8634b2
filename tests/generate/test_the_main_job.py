"""A photo and a voice become a video; the file does not tell how many ranks made it."""

from __future__ import annotations

import re
from pathlib import Path

import av
import numpy as np
import pytest

from tests.generate.processes import run_alone, run_torchrun, write_inputs

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    folder = tmp_path_factory.mktemp("alone")
    arguments = [*write_inputs(folder), "--seed", "3"]
    result = run_alone([*arguments, "--out", str(folder / "alone.mp4")])
    assert result.returncode == 0, result.stderr
    return arguments, folder / "alone.mp4"


def test_the_video_plays_with_its_sound(alone: tuple[list[str], Path]) -> None:
    with av.open(str(alone[1])) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
        assert len(frames) == 50
        assert frames[0].shape == (128, 128, 3)
        assert film.streams.video[0].average_rate == 25
    with av.open(str(alone[1])) as film:
        sound = np.concatenate([frame.to_ndarray()[0] for frame in film.decode(audio=0)])
    assert abs(len(sound) / 16_000 - 2.0) < 0.13  # AAC rounds to its own frames
    assert float(np.sqrt(np.mean(sound**2))) == pytest.approx(0.3 / 2**0.5, rel=0.1)
    assert np.std(frames[-1]) > 1  # noise, but a picture


@pytest.mark.slow
def test_the_same_seed_gives_the_same_file_on_three_ranks(alone: tuple[list[str], Path], tmp_path: Path) -> None:
    result = run_torchrun(3, [*alone[0], "--out", str(tmp_path / "three.mp4")])
    assert result.returncode == 0, result.stderr
    assert "3 ranks" in result.stdout
    assert (tmp_path / "three.mp4").read_bytes() == alone[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 5])
def test_on_every_number_of_ranks(alone: tuple[list[str], Path], tmp_path: Path, num_ranks: int) -> None:
    result = run_torchrun(num_ranks, [*alone[0], "--out", str(tmp_path / "film.mp4")])
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "film.mp4").read_bytes() == alone[1].read_bytes()


def test_another_seed_gives_another_film(alone: tuple[list[str], Path], tmp_path: Path) -> None:
    arguments = [a if a != "3" else "4" for a in alone[0]]
    assert run_alone([*arguments, "--seconds", "0.5", "--out", str(tmp_path / "four.mp4")]).returncode == 0
    with av.open(str(tmp_path / "four.mp4")) as four, av.open(str(alone[1])) as three:
        first = [next(film.decode(video=0)).to_ndarray(format="rgb24") for film in (four, three)]
    assert not np.array_equal(*first)


@pytest.mark.parametrize(("seconds", "num_frames"), [("0.1", 2), ("3", 75)])
def test_the_length_is_what_was_asked_for(tmp_path: Path, seconds: str, num_frames: int) -> None:
    """Shorter than a chunk, and longer than the voice, which then ends in silence."""
    arguments = [*write_inputs(tmp_path, seconds=0.7), "--seconds", seconds, "--steps", "2"]
    result = run_alone([*arguments, "--out", str(tmp_path / "film.mp4")])
    assert result.returncode == 0, result.stderr
    with av.open(str(tmp_path / "film.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) == num_frames


def test_a_plan_is_printed_and_nothing_is_made(tmp_path: Path) -> None:
    arguments = [*write_inputs(tmp_path), "--preset", "live_avatar_14b", "--plan", "--ranks", "5"]
    result = run_alone([*arguments, "--out", str(tmp_path / "never.mp4")])
    assert result.returncode == 0, result.stderr
    assert "16.296 B parameters" in result.stdout
    assert len(re.findall(r"^rank\d  ", result.stdout, flags=re.MULTILINE)) == 5
    assert "frames/s" in result.stdout
    assert "basis: predicted" in result.stdout
    assert not (tmp_path / "never.mp4").exists()


def test_without_transformers_tiny_still_works() -> None:
    """The main job on the tiny preset imports nothing that is an extra."""
    import subprocess
    import sys

    from tests.generate.processes import environment

    script = (
        "import sys, streamdiff.cli.main; "
        "extras = {'transformers', 'diffusers', 'xformers', 'flash_attn', 'triton', 'matplotlib'} & set(sys.modules); "
        "sys.exit(f'imported {extras}' if extras else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
