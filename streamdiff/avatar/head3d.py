"""A 3D head with a mouth inside, and the software rasteriser that draws it.

Used to make training pictures and to carry ARKit shapes onto the landmarks of a photo; nothing here runs
while a face talks. The head is ICT-FaceKit's light model (MIT; Li et al. 2020, "Learning Formation of
Physically-Based Face Attributes"): one mean head, identity modes, expression deltas under ARKit names. Axes
here are those of a camera: x to the right of the picture, y down, z away; centimetres.

    V vertices   R triangles   H, W pixels
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from streamdiff.arrays import Floats
from streamdiff.errors import CheckpointError, InputError
from streamdiff.tensorfile import read_npz

Ints = NDArray[np.int64]

# Vertex ranges of the light model, as its authors publish them.
FACE = slice(0, 9409)
NECK = slice(9409, 11248)
SOCKET = slice(11248, 13294)
EYE_SOCKETS = slice(13294, 14062)
GUMS = slice(14062, 17039)
TEETH = slice(17039, 21451)
EYEBALLS = slice(21451, 24591)
IRISES = (slice(22221, 23021), slice(23791, 24591))
# Thin shells around the eye that need a real renderer's transparency.
SHELLS = slice(24591, 26719)

_TO_CAMERA = np.array([1.0, -1.0, -1.0], np.float32)


_MAX_BYTES = 1 << 30


def _check_head(arrays: Mapping[str, NDArray[Any]]) -> None:
    """Raise `CheckpointError` unless these are the arrays of a head, finite, with faces that name its points."""
    wanted = {"neutral": "f", "faces": "iu", "expression_names": "U", "expression": "f", "identity": "f"}
    for name, kinds in wanted.items():
        if name not in arrays or arrays[name].dtype.kind not in kinds or not arrays[name].size:
            raise CheckpointError(f"{name} is missing or of another kind")
        if kinds == "f" and (arrays[name].shape[-1:] != (3,) or not np.isfinite(arrays[name]).all()):
            raise CheckpointError(f"{name} holds no finite points")
    V, faces = len(arrays["neutral"]), arrays["faces"]
    # A fourth corner of -1 is none: a triangle among the quads.
    quads = faces.ndim == 2 and faces.shape[1] == 4 and faces[:, :3].min() >= 0 and faces.min() >= -1
    if arrays["neutral"].shape != (V, 3) or not quads or faces.max() >= V:
        raise CheckpointError("its faces do not name its points")
    for name in ("expression", "identity"):
        if arrays[name].shape[1:] != (V, 3):
            raise CheckpointError(f"{name} has shape {list(arrays[name].shape)}, not [any, {V}, 3]")
    if arrays["expression_names"].shape != arrays["expression"].shape[:1]:
        raise CheckpointError("its shapes and their names differ in number")


@dataclass(frozen=True)
class HeadModel:
    """Vertices at rest and the linear modes that move them, in camera axes (x right, y down, z away), cm."""

    neutral_V3: Floats
    triangles_R3: Ints
    identity_KV3: Floats
    shapes: dict[str, Floats]
    """Deltas ``[V, 3]`` at weight 1, by ARKit name."""

    @staticmethod
    def load(path: str | Path) -> HeadModel:
        """Read ``ict_facekit.npz``.

        Arrays: ``neutral``, ``faces``, ``expression``, ``expression_names``, ``identity``.

        Raises `InputError` when the file is not there or holds other arrays.
        """
        try:
            arrays = read_npz(path, most_bytes=_MAX_BYTES)
            _check_head(arrays)
        except CheckpointError as error:
            raise InputError(
                f"{path} is not a packed ICT-FaceKit head ({error}); see the model card of the mouth"
            ) from error
        neutral, quads, identity = arrays["neutral"], arrays["faces"], arrays["identity"]
        shapes: dict[str, Floats] = {}
        for name, delta_V3 in zip(arrays["expression_names"].tolist(), arrays["expression"], strict=True):
            stem, _, side = str(name).partition("_")
            both = stem in ("browInnerUp", "cheekPuff")  # ARKit has one shape where the head has two halves
            key = stem if both else stem + {"L": "Left", "R": "Right"}.get(side, "")
            shapes[key] = shapes.get(key, 0) + delta_V3.astype(np.float32) * _TO_CAMERA
        return HeadModel(
            neutral_V3=neutral * _TO_CAMERA,
            triangles_R3=_triangulate(quads),
            identity_KV3=identity.astype(np.float32) * _TO_CAMERA,
            shapes=shapes,
        )

    def whole(self) -> HeadModel:
        """This head, if it has all points of ICT-FaceKit's light model: faces are drawn and measured by their numbers.

        Raises `InputError` when it does not.
        """
        if len(self.neutral_V3) < SHELLS.stop:
            raise InputError(
                f"the head has {len(self.neutral_V3)} points, not the {SHELLS.stop} of ICT-FaceKit's light model; "
                "see the model card of the mouth"
            )
        return self

    def vertices(self, weights: dict[str, float], identity_K: Floats | None = None) -> Floats:
        """The head ``[V, 3]`` under expression weights and, in standard deviations, identity modes."""
        vertices_V3 = self.neutral_V3.copy()
        if identity_K is not None:
            vertices_V3 += np.tensordot(identity_K, self.identity_KV3[: len(identity_K)], 1)
        for name, weight in weights.items():
            if weight:
                vertices_V3 += np.float32(weight) * self.shapes[name]
        return vertices_V3

    def triangles(self, *ranges: slice) -> Ints:
        """Triangles whose vertices all lie in the given ranges."""
        wanted_V = np.zeros(len(self.neutral_V3), bool)
        for part in ranges:
            wanted_V[part] = True
        return self.triangles_R3[wanted_V[self.triangles_R3].all(axis=1)]


def _triangulate(quads_R4: NDArray[np.int32]) -> Ints:
    quads = quads_R4.astype(np.int64)
    first, second = quads[:, [0, 1, 2]], quads[quads[:, 3] >= 0][:, [0, 2, 3]]
    # The camera's mirror of y and z is a rotation, so that the winding stays as it was.
    return np.concatenate([first, second])


@dataclass(frozen=True)
class Fragments:
    """What every pixel sees: a triangle (-1: nothing) and where on it."""

    triangle_HW: Ints
    weights_HW3: Floats


def rasterize(screen_V3: Floats, triangles_R3: Ints, height: int, width: int, *, cull: bool = True) -> Fragments:
    """Find the nearest triangle of each pixel centre, exactly and in the same way every time.

    ``screen_V3``: x and y in pixels, z growing away. ``cull`` drops triangles that show their back. Ties in
    depth go to the lower triangle index. No anti-aliasing: draw larger and average.
    """
    corners_R33 = screen_V3[triangles_R3].astype(np.float64)
    x_R3, y_R3 = corners_R33[..., 0], corners_R33[..., 1]
    area_R = (x_R3[:, 1] - x_R3[:, 0]) * (y_R3[:, 2] - y_R3[:, 0]) - (x_R3[:, 2] - x_R3[:, 0]) * (
        y_R3[:, 1] - y_R3[:, 0]
    )
    # Counter-clockwise outside faces turn clockwise when y points down: a front has negative area.
    seen_R = area_R < -1e-9 if cull else np.abs(area_R) > 1e-9
    left_R = np.clip(np.ceil(x_R3.min(1) - 0.5), 0, width).astype(np.int64)
    right_R = np.clip(np.floor(x_R3.max(1) - 0.5) + 1, 0, width).astype(np.int64)
    top_R = np.clip(np.ceil(y_R3.min(1) - 0.5), 0, height).astype(np.int64)
    bottom_R = np.clip(np.floor(y_R3.max(1) - 0.5) + 1, 0, height).astype(np.int64)
    columns_R, rows_R = right_R - left_R, bottom_R - top_R
    live = np.flatnonzero(seen_R & (columns_R > 0) & (rows_R > 0))
    counts = columns_R[live] * rows_R[live]
    owner = np.repeat(live, counts)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    px = left_R[owner] + within % columns_R[owner]
    py = top_R[owner] + within // columns_R[owner]
    fx, fy = px + 0.5, py + 0.5
    x, y, area = x_R3[owner], y_R3[owner], area_R[owner]
    w1 = ((fx - x[:, 0]) * (y[:, 2] - y[:, 0]) - (x[:, 2] - x[:, 0]) * (fy - y[:, 0])) / area
    w2 = ((x[:, 1] - x[:, 0]) * (fy - y[:, 0]) - (fx - x[:, 0]) * (y[:, 1] - y[:, 0])) / area
    w0 = 1.0 - w1 - w2
    inside = (w0 >= -1e-9) & (w1 >= -1e-9) & (w2 >= -1e-9)
    owner, w = owner[inside], np.stack([w0, w1, w2], 1)[inside]
    pixel = (py * width + px)[inside]
    depth = (corners_R33[owner, :, 2] * w).sum(1)
    # Order-preserving integers: depth above, triangle below, so that one minimum decides both.
    bits = depth.astype(np.float32).view(np.int32).astype(np.int64)
    ordered = np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    key = (ordered << 32) + owner
    far = torch.full((height * width,), torch.iinfo(torch.int64).max)
    nearest = far.scatter_reduce(0, torch.from_numpy(pixel), torch.from_numpy(key), "amin").numpy()
    won = nearest[pixel] == key
    triangle = np.full(height * width, -1, np.int64)
    weights = np.zeros((height * width, 3), np.float32)
    triangle[pixel[won]] = owner[won]
    weights[pixel[won]] = w[won]
    return Fragments(triangle.reshape(height, width), weights.reshape(height, width, 3))


def interpolate(fragments: Fragments, triangles_R3: Ints, values_VC: Floats) -> Floats:
    """Vertex values ``[V, C]`` at every pixel, ``[H, W, C]``; zero where nothing is seen."""
    seen_HW = fragments.triangle_HW >= 0
    corners = values_VC[triangles_R3[np.maximum(fragments.triangle_HW, 0)]]
    return (corners * fragments.weights_HW3[..., None]).sum(axis=2) * seen_HW[..., None]


def vertex_normals(vertices_V3: Floats, triangles_R3: Ints) -> Floats:
    """Unit normals ``[V, 3]`` that point out of the surface, area weighted."""
    a, b, c = (vertices_V3[triangles_R3[:, k]] for k in range(3))
    cross = torch.from_numpy(np.cross(b - a, c - a))
    total = torch.zeros(len(vertices_V3), 3, dtype=cross.dtype)
    for k in range(3):
        total.index_add_(0, torch.from_numpy(triangles_R3[:, k]), cross)
    normals = total.numpy()
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)


def rotation_matrix(rotation_3: Floats) -> Floats:
    """The matrix of a rotation vector (radians; Rodrigues)."""
    angle = float(np.linalg.norm(rotation_3))
    if angle < 1e-8:
        return np.eye(3, dtype=np.float32)
    x, y, z = (float(v) / angle for v in rotation_3)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    turn = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    return turn.astype(np.float32)
