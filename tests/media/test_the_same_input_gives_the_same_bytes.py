"""Same frames and sound in, same file out; and memory and file state do not depend on the past."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import torch

from streamdiff.media import VideoWriter, read_audio, read_image
from tests.media.made_files import tone, write_sound


def _write(path: Path, seed: int) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    with VideoWriter(path, width=96, height=64, fps=25, rate_hz=16_000, metadata={"title": "noise"}) as writer:
        for _ in range(4):
            frames_THWC = torch.randint(0, 256, (12, 64, 96, 3), generator=generator, dtype=torch.uint8)
            writer.write(frames_THWC, torch.randn(7680, generator=generator) * 0.1)
    return path.read_bytes()


def test_two_films_of_the_same_frames_are_equal(tmp_path: Path) -> None:
    first = _write(tmp_path / "a.mp4", seed=0)
    assert first == _write(tmp_path / "b.mp4", seed=0)
    assert first != _write(tmp_path / "c.mp4", seed=1)


def test_a_voice_resampled_twice_is_equal(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "voice.wav", tone(1.0, 44_100), 44_100)
    first_S, second_S = (torch.cat(list(read_audio(path))) for _ in range(2))
    assert torch.equal(first_S, second_S)


def test_a_picture_read_twice_is_equal(tmp_path: Path) -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (100, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "face.png")
    assert torch.equal(read_image(tmp_path / "face.png", 64, 64), read_image(tmp_path / "face.png", 64, 64))


def test_the_writer_forgets_what_it_has_written(tmp_path: Path) -> None:
    frames_THWC = torch.zeros(12, 64, 96, 3, dtype=torch.uint8)
    sound_S = torch.zeros(7680)
    with VideoWriter(tmp_path / "film.mp4", width=96, height=64, fps=25, rate_hz=16_000) as writer:
        for _ in range(10):
            writer.write(frames_THWC, sound_S)
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(50):
            writer.write(frames_THWC, sound_S)
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert after - before < 50_000
