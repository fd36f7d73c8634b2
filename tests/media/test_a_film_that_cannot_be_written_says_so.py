"""Names, places and sizes that cannot become a film are refused before a frame is made."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from streamdiff.errors import ConfigError, InputError, SessionClosed
from streamdiff.media import VideoWriter

GOOD = {"width": 64, "height": 64, "fps": 25, "rate_hz": 16_000}


def test_places(tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(InputError, match="no directory"):
        VideoWriter(tmp_path / "none" / "film.mp4", **GOOD)
    with pytest.raises(InputError, match=r"ends in \.mp4"):
        VideoWriter(tmp_path / "film.avi", **GOOD)
    with pytest.raises(InputError, match="it is a directory"):
        VideoWriter(tmp_path / "folder.mp4", **GOOD)
    with pytest.raises(InputError, match="cannot write /proc"):
        VideoWriter("/proc/film.mp4", **GOOD)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"width": 0}, "1 to 8192 pixels"),
        ({"height": 9000}, "1 to 8192 pixels"),
        ({"fps": 0}, "fps must be"),
        ({"rate_hz": 17_000}, "AAC has no rate of 17000 Hz"),
    ],
)
def test_sizes_and_rates(tmp_path: Path, change: dict[str, int], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        VideoWriter(tmp_path / "film.mp4", **{**GOOD, **change})
    assert not (tmp_path / "film.mp4").exists()


def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_fd: int, _data: bytes, _position: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = VideoWriter(tmp_path / "film.mp4", **GOOD)
    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(InputError, match="No space left on device; free some space"):
        writer.write(torch.zeros(1, 64, 64, 3, dtype=torch.uint8), torch.zeros(640))
    with pytest.raises(SessionClosed, match="was lost"):
        writer.write(torch.zeros(1, 64, 64, 3, dtype=torch.uint8), torch.zeros(640))


def test_an_existing_film_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    path.write_bytes(b"x" * 1_000_000)
    with VideoWriter(path, **GOOD) as writer:
        writer.write(torch.zeros(1, 64, 64, 3, dtype=torch.uint8), torch.zeros(640))
    assert path.stat().st_size < 100_000
