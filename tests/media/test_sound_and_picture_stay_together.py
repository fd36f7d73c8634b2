"""A flash and a click that are written together are seen and heard together, however long the film."""

from __future__ import annotations

import itertools
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from streamdiff.errors import ConfigError, InputError, SessionClosed
from streamdiff.media import VideoWriter, frame_boundary
from tests.media.made_files import play, write_film


@pytest.mark.parametrize(
    ("fps", "rate_hz", "flash_frame"),
    [
        (25, 16_000, 0),
        (25, 16_000, 40),
        (25, 48_000, 59),
        (24, 16_000, 31),
        (30, 44_100, 47),
        (25, 22_050, 26),
    ],
)
def test_flash_and_click_coincide(tmp_path: Path, fps: int, rate_hz: int, flash_frame: int) -> None:
    path = tmp_path / "film.mp4"
    write_film(path, num_chunks=5, fps=fps, rate_hz=rate_hz, flash_frame=flash_frame)
    film = play(path)
    assert [i for i, luma in enumerate(film.luma_T) if luma > 128] == [flash_frame]
    loud = np.flatnonzero(np.abs(film.sound_S) > 0.3)
    click_s = loud[0] / rate_hz
    assert click_s == pytest.approx(flash_frame / fps, abs=0.002)
    assert film.frame_times_s == pytest.approx([i / fps for i in range(60)], abs=1e-6)


@pytest.mark.parametrize(("fps", "rate_hz"), [(25, 16_000), (24, 16_000), (30, 44_100)])
@pytest.mark.parametrize("num_chunks", [1, 4])
def test_sound_lasts_as_long_as_the_picture(tmp_path: Path, fps: int, rate_hz: int, num_chunks: int) -> None:
    path = tmp_path / "film.mp4"
    write_film(path, num_chunks=num_chunks, fps=fps, rate_hz=rate_hz)
    film = play(path)
    num_frames = 12 * num_chunks
    assert len(film.luma_T) == num_frames
    assert film.sound_ends_s == pytest.approx(frame_boundary(num_frames, fps, rate_hz) / rate_hz, abs=1e-9)
    assert len(film.sound_S) >= frame_boundary(num_frames, fps, rate_hz)


def test_samples_due_add_up_without_drift() -> None:
    boundaries = [frame_boundary(i, 24, 16_000) for i in range(24 * 3600 + 1)]
    assert boundaries[-1] == 3600 * 16_000
    steps = {after - before for before, after in itertools.pairwise(boundaries)}
    assert steps == {666, 667}


def test_sound_that_does_not_last_as_long_as_its_frames_is_refused(tmp_path: Path) -> None:
    frames_THWC = torch.zeros(12, 64, 96, 3, dtype=torch.uint8)
    with VideoWriter(tmp_path / "film.mp4", width=96, height=64, fps=25, rate_hz=16_000) as writer:
        with pytest.raises(ConfigError, match="7680 samples"):
            writer.write(frames_THWC, torch.zeros(7679))
        with pytest.raises(ConfigError, match="got 0"):
            writer.write(frames_THWC)
        with pytest.raises(ConfigError, match="uint8"):
            writer.write(frames_THWC.float(), torch.zeros(7680))
        with pytest.raises(ConfigError, match="at least one frame"):
            writer.write(frames_THWC[:0], torch.zeros(0))
        with pytest.raises(InputError, match="NaN"):
            writer.write(frames_THWC, torch.full((7680,), float("nan")))
        assert writer.num_frames == 0
    with pytest.raises(SessionClosed, match="closed"):
        writer.write(frames_THWC, torch.zeros(7680))


def test_odd_sizes_gain_one_pixel_of_edge(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    write_film(path, num_chunks=1, size_hw=(63, 95))
    assert play(path).sizes == {(96, 64)}


def test_colours_survive(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    colours = [(230, 40, 40), (40, 200, 60), (30, 60, 220), (255, 255, 255), (0, 0, 0), (128, 128, 128)]
    frames_THWC = torch.stack([torch.tensor(colour, dtype=torch.uint8).expand(64, 96, 3) for colour in colours])
    with VideoWriter(path, width=96, height=64, fps=25, rate_hz=None, crf=4) as writer:
        writer.write(frames_THWC)
    with av.open(str(path)) as container:
        decoded = list(container.decode(video=0))
        assert not container.streams.audio
    reformatter = av.video.reformatter.VideoReformatter()
    for frame, colour in zip(decoded, colours, strict=True):
        assert int(frame.colorspace) == 1, "tagged BT.709"
        rgb = reformatter.reformat(frame, format="rgb24", src_colorspace=1).to_ndarray()
        assert np.abs(rgb.mean(axis=(0, 1)) - colour).max() < 4


def test_a_film_can_be_entered_at_every_key_frame(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    write_film(path, num_chunks=13)
    with av.open(str(path)) as container:
        keys = [
            packet.pts * packet.time_base
            for packet in container.demux(video=0)
            if packet.pts is not None and packet.is_keyframe
        ]
    assert [float(key) for key in keys] == pytest.approx([0.0, 2.4, 4.8])
