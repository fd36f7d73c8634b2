"""A video of one person, with the landmarks of the face in every frame.

A frames   J landmarks
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from numpy.typing import NDArray

from streamdiff.arrays import Floats
from streamdiff.avatar.identity import find_face
from streamdiff.avatar.landmarks import Face, Landmarker
from streamdiff.errors import InputError
from streamdiff.facts import printable
from streamdiff.media.source import open_media, reason

Frames: TypeAlias = NDArray[np.uint8]
MIN_FRAMES = 100


@dataclass(frozen=True)
class Footage:
    """The frames of a video in which its one face was found."""

    frames_AHW3: Frames
    landmarks_AJ3: Floats
    fps: float
    sha256: str


def read_footage(path: str | Path, landmarker: Landmarker, *, max_frames: int = 1500) -> Footage:
    """Decode a video and find its face in every frame; at most ``max_frames``, evenly taken from its beginning.

    Raises `InputError` for what is no video, shows no face, several, or a tiny one, or is shorter than 100 frames.
    """
    frames: list[Frames] = []
    found: list[Face] = []
    last: Face | None = None
    fps, decoded = _open(path)
    for frame in decoded:
        face = landmarker.follow(frame, last) if last else None
        if not found:
            face = find_face(frame, landmarker, source=f"the first frame of {path}")
        face = face or next(iter(landmarker.faces(frame)), None)
        last = face
        if face is not None:
            frames.append(frame)
            found.append(face)
        if len(found) >= max_frames:
            break
    decoded.close()
    if len(found) < MIN_FRAMES:
        raise InputError(f"{path} shows a face in {len(found)} frames; fitting needs {MIN_FRAMES}, better 1500")
    with Path(path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Footage(np.stack(frames), np.stack([face.landmarks_J3 for face in found]), fps, digest)


def _open(path: str | Path) -> tuple[float, Generator[Frames, None, None]]:
    """Frames a second, and the frames."""
    with _opened(path) as container:
        fps = float(container.streams.video[0].average_rate or 25)
    return fps, _decode(path)


@contextmanager
def _opened(path: str | Path) -> Generator[InputContainer]:
    with ExitStack() as stack:
        try:
            container = stack.enter_context(open_media(path))
        except InputError as error:
            raise InputError(f"{path} cannot be read as a video: {error}") from error
        if not container.streams.video:
            raise InputError(f"{path} holds no video; give a clip of a talking face")
        yield container


def _decode(path: str | Path) -> Generator[Frames, None, None]:
    with _opened(path) as container:
        try:
            for frame in container.decode(video=0):
                yield np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
        except FFmpegError as error:
            why = printable(reason(error))
            raise InputError(f"{path} is damaged ({why}); convert it to MP4 or WebM again") from error


def neutral_frame(footage: Footage) -> int:
    """The frame that shows most of the face at rest: lips shut, eyes open, turned to the camera, nothing in the way."""
    landmarks_AJ3 = footage.landmarks_AJ3
    # A hand or a passer-by makes a frame unlike the others, even in a small picture.
    small = footage.frames_AHW3[:, 4::8, 4::8].astype(np.float32)
    unlike = np.abs(small - np.median(small, axis=0)).mean((1, 2, 3))
    points = landmarks_AJ3[..., :2]
    eyes = np.linalg.norm(points[:, 33] - points[:, 263], axis=-1)
    lips = np.linalg.norm(points[:, 13] - points[:, 14], axis=-1) / eyes
    wide = np.linalg.norm(points[:, 61] - points[:, 291], axis=-1) / eyes
    lids = sum(np.linalg.norm(points[:, a] - points[:, b], axis=-1) for a, b in ((159, 145), (386, 374))) / eyes
    turned = np.abs(points[:, 1, 0] - (points[:, 33, 0] + points[:, 263, 0]) / 2) / eyes
    shut = np.clip(lips - np.percentile(lips, 10), 0, None) / 0.05
    drowsy = np.clip(np.percentile(lids, 60) - lids, 0, None) / 0.03
    pulled = np.abs(wide - np.median(wide)) / 0.05
    strange = np.clip(unlike / max(float(np.median(unlike)), 1e-6) - 1, 0, None) * 3
    return int((shut + drowsy + pulled + np.abs(turned - np.median(turned)) / 0.04 + turned / 0.03 + strange).argmin())
