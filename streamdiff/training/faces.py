"""Draws talking heads of whom everything is known: the pictures that the video model learns from and is judged by.

A `Body` is one motion of one skull: which of the head's triangles every pixel sees, and the normals there. A `Look`
dresses it: skin, hair, eyes, clothes, light, wall. Drawing the body is slow and dressing it is quick, so one body is
shown in several looks. The head is that of `streamdiff.avatar.head3d`; hair is the scalp pushed outwards, and
shoulders, a badge and a hand that can hide it are flat shapes. No photograph and no person is in any of it.

    V vertices   P pixels that see the head   C classes of surface   H, W pixels   K identity modes
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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

HEIGHT_CM = 33.0
"""What the picture shows, from above the hair to the chest."""
TOP_CM = -16.9
SUPERSAMPLE = 2

CLASSES = ("skin", "lips", "brow", "hair", "beard", "white", "iris", "pupil", "teeth", "mouth", "tongue", "cloth")
_INDEX = {name: i for i, name in enumerate(CLASSES)}

# Landmarks of the light model's mean head: (x, y) in centimetres along the brow, and round the lips.
_BROW_XY = ((-5.9, -5.1), (-4.9, -5.9), (-3.8, -6.2), (-2.4, -6.15), (-1.2, -5.8))
_OUTER_LIP_XY = (
    (-2.55, 3.52),
    (-1.7, 2.78),
    (-0.73, 2.42),
    (0.0, 2.52),
    (0.73, 2.42),
    (1.7, 2.78),
    (2.55, 3.52),
    (1.8, 4.06),
    (1.03, 4.32),
    (0.0, 4.4),
    (-1.03, 4.32),
    (-1.8, 4.06),
)
_CORNEA_VERTICES = 770
_NECK_PIVOT_CM = np.array([0.0, 9.0, -1.0], np.float32)
_BADGE_CM = (6.4, 13.9)
_BADGE_RADIUS_CM = 1.4

Picture = NDArray[np.uint8]
_Array = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Build:
    """What does not change about a skull: shape and hair style."""

    identity_K: Floats
    """Standard deviations along the head's identity modes."""
    hairline_cm: float
    """How high above the brows hair begins; large: bald."""
    hair_cm: float
    """How thick hair is."""
    hair_long: float
    """Length of hair behind the neck, 0 (none) .. 1 (shoulders)."""
    beard: float
    glasses: float
    shoulders_cm: float

    @staticmethod
    def draw(generator: np.random.Generator, num_modes: int) -> Build:
        bald = generator.random() < 0.1
        return Build(
            identity_K=np.clip(generator.normal(0, 0.9, num_modes), -2.0, 2.0).astype(np.float32),
            hairline_cm=9.0 if bald else float(generator.uniform(3.2, 5.2)),
            hair_cm=0.0 if bald else float(generator.uniform(0.5, 2.0)),
            hair_long=0.0 if bald or generator.random() < 0.5 else float(generator.uniform(0.35, 1.0)),
            beard=float(generator.uniform(0.4, 1.0)) if generator.random() < 0.22 else 0.0,
            glasses=1.0 if generator.random() < 0.15 else 0.0,
            shoulders_cm=float(generator.uniform(12.5, 16.0)),
        )


@dataclass(frozen=True, slots=True)
class Look:
    """Colours, in linear light 0..1, and where the light stands."""

    colours_C3: Floats
    badge_3: Floats
    has_badge: bool
    wall_23: Floats
    """Colour of the wall above and below."""
    blobs_N6: Floats
    """Soft spots on the wall: x, y, radius (shares of the picture), r, g, b."""
    light_3: Floats
    """Direction to the light, unit."""
    ambient: float
    tint_3: Floats

    @staticmethod
    def draw(generator: np.random.Generator) -> Look:
        def near(colour: tuple[float, float, float], spread: float) -> Floats:
            return np.clip(np.array(colour) * np.exp(generator.normal(0, spread, 3)), 0.01, 1.0).astype(np.float32)

        tone = float(generator.beta(1.6, 1.6))
        pale, dark = np.array([0.78, 0.53, 0.42]), np.array([0.17, 0.085, 0.05])
        skin = np.exp((1 - tone) * np.log(pale) + tone * np.log(dark)) * np.exp(generator.normal(0, 0.05, 3))
        hairs = ((0.02, 0.015, 0.012), (0.07, 0.035, 0.02), (0.22, 0.10, 0.04), (0.5, 0.33, 0.14), (0.45, 0.45, 0.45))
        hair = near(hairs[int(generator.choice(5, p=(0.35, 0.28, 0.15, 0.12, 0.1)))], 0.2)
        eyes = ((0.05, 0.025, 0.012), (0.09, 0.17, 0.3), (0.07, 0.16, 0.07), (0.14, 0.08, 0.03))
        colours = np.zeros((len(CLASSES), 3), np.float32)
        colours[_INDEX["skin"]] = skin
        colours[_INDEX["lips"]] = skin * np.array([0.86, 0.5, 0.52]) * np.exp(generator.normal(0, 0.12))
        colours[_INDEX["brow"]] = hair * 0.8
        colours[_INDEX["hair"]] = hair
        colours[_INDEX["beard"]] = hair
        colours[_INDEX["white"]] = (0.72, 0.70, 0.68)
        colours[_INDEX["iris"]] = near(eyes[int(generator.choice(4, p=(0.5, 0.2, 0.12, 0.18)))], 0.2)
        colours[_INDEX["pupil"]] = 0.008
        colours[_INDEX["teeth"]] = (0.72, 0.68, 0.60)
        colours[_INDEX["mouth"]] = (0.10, 0.022, 0.022)
        colours[_INDEX["tongue"]] = (0.40, 0.12, 0.12)

        def vivid(low: float, high: float) -> Floats:
            hue = generator.random() * 6
            ramp = np.clip(np.abs((hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
            saturation, value = generator.uniform(0.1, 0.8), generator.uniform(low, high)
            return (value * (1 - saturation * (1 - ramp))).astype(np.float32)

        azimuth, height = generator.uniform(-0.9, 0.9), generator.uniform(0.1, 0.7)
        light = np.array([np.sin(azimuth), -height, -np.cos(azimuth)])
        warm = float(generator.normal(0, 0.06))
        colours[_INDEX["cloth"]] = vivid(0.05, 0.6)
        blobs = [
            [*generator.uniform(0, 1, 2), generator.uniform(0.12, 0.4), *vivid(0.1, 0.7)]
            for _ in range(int(generator.integers(0, 4)))
        ]
        wall = vivid(0.08, 0.6)
        return Look(
            colours_C3=colours,
            badge_3=vivid(0.35, 0.9),
            has_badge=bool(generator.random() < 0.5),
            wall_23=np.stack([wall, wall * float(generator.uniform(0.5, 1.1))]),
            blobs_N6=np.array(blobs, np.float32).reshape(-1, 6),
            light_3=(light / np.linalg.norm(light)).astype(np.float32),
            ambient=float(generator.uniform(0.3, 0.6)),
            tint_3=np.array([1 + warm, 1.0, 1 - warm], np.float32) * float(generator.uniform(0.85, 1.1)),
        )


@dataclass(frozen=True, slots=True)
class Pose:
    """One moment: expression weights by ARKit name, head turn, place of the body, hand."""

    weights: Mapping[str, float]
    rotation_3: Floats
    """Rotation vector of the head: x nods, y turns, z tilts, radians."""
    sway_cm: tuple[float, float] = (0.0, 0.0)
    hand: float = 0.0
    """0 out of the picture .. 1 raised in front of the badge."""


@dataclass(frozen=True, slots=True)
class Body:
    """One pose as every pixel sees it, ``SUPERSAMPLE`` times finer than the picture."""

    pixel_P: NDArray[np.int64]
    classes_PC: Floats
    normals_P3: Floats
    shade_P: Floats
    """Darkening that no light undoes: inside the mouth, under the chin."""
    pose: Pose
    eyes_22: Floats
    """Middle of each eye in the finer picture, for glasses."""
    size: int


class Painter:
    """Draws heads of one `Build`."""

    def __init__(self, head: HeadModel, build: Build, *, size: int) -> None:
        self.size = size
        self._head = head
        self._build = build
        self._triangles = head.triangles(FACE, NECK, SOCKET, EYE_SOCKETS, GUMS, TEETH, EYEBALLS)
        rest = head.neutral_V3.copy()
        rest += np.tensordot(build.identity_K, head.identity_KV3[: len(build.identity_K)], 1)
        hair_V = _scalp(head.neutral_V3, build.hairline_cm)
        outwards = head3d.vertex_normals(rest, self._triangles)
        # Heads turn by half a radian at most: what looks further away than that is never seen.
        facing_R = outwards[self._triangles].mean(1)[:, 2]
        self._triangles = self._triangles[facing_R < 0.6]
        strand = 1 + 0.05 * np.sin(head.neutral_V3[:, 0] * 4.1 + head.neutral_V3[:, 2] * 2.3)
        self._rest_V3 = (rest + (hair_V * build.hair_cm * strand)[:, None] * outwards).astype(np.float32)
        self._classes_VC = _classes(head, hair_V, build.beard)
        y = head.neutral_V3[:, 1]
        loose = np.ones(len(y), np.float32)
        loose[NECK] = np.clip((13.0 - y[NECK]) / 6.0, 0, 1)
        loose[FACE] = np.clip((14.0 - y[FACE]) / 5.0, 0, 1)
        self._loose_V1 = loose[:, None]
        dark = np.ones(len(y), np.float32)
        dark[SOCKET] = 0.55
        dark[GUMS] = 0.85
        dark[NECK] = np.clip(1.0 - 0.09 * np.clip(11.0 - np.abs(y[NECK] - 9.0) * 4, 0, 6) * (y[NECK] > 6.5), 0.6, 1)
        self._dark_V = dark

    def body(self, pose: Pose) -> Body:
        """What every pixel sees of the head in this pose."""
        vertices = self._rest_V3.copy()
        for name, weight in pose.weights.items():
            if abs(weight) > 1e-3:
                vertices += np.float32(weight) * self._head.shapes[name]
        turned = (vertices - _NECK_PIVOT_CM) @ head3d.rotation_matrix(pose.rotation_3).T + _NECK_PIVOT_CM
        vertices += self._loose_V1 * (turned - vertices)
        fine = self.size * SUPERSAMPLE
        scale = fine / HEIGHT_CM
        screen = vertices.copy()
        screen[:, 0] = (vertices[:, 0] + pose.sway_cm[0]) * scale + fine / 2
        screen[:, 1] = (vertices[:, 1] + pose.sway_cm[1] - TOP_CM) * scale
        fragments = head3d.rasterize(screen, self._triangles, fine, fine)
        pixel_P = np.flatnonzero(fragments.triangle_HW.reshape(-1) >= 0)
        corners_P3 = self._triangles[fragments.triangle_HW.reshape(-1)[pixel_P]]
        weights_P31 = fragments.weights_HW3.reshape(-1, 3)[pixel_P][..., None]
        normals_V3 = head3d.vertex_normals(vertices, self._triangles)
        normals_P3 = (normals_V3[corners_P3] * weights_P31).sum(1)
        normals_P3 /= np.maximum(np.linalg.norm(normals_P3, axis=1, keepdims=True), 1e-6)
        values = np.concatenate([self._classes_VC, self._dark_V[:, None]], 1)
        values_P = (values[corners_P3] * weights_P31).sum(1)
        eyes = np.stack([screen[eye, :2].mean(0) for eye in IRISES])
        return Body(pixel_P, values_P[:, :-1], normals_P3, values_P[:, -1], pose, eyes, self.size)

    def dress(self, body: Body, look: Look) -> Picture:
        """The picture ``[H, W, 3]`` of this body in that look."""
        fine, size = body.size * SUPERSAMPLE, body.size
        lit_P = look.ambient + (1.15 - look.ambient) * np.clip(body.normals_P3 @ look.light_3, 0, 1)
        shine_P = np.clip(body.normals_P3 @ _half_way(look.light_3), 0, 1) ** 24
        glossy = np.zeros(len(CLASSES), np.float32)
        glossy[[_INDEX["skin"], _INDEX["hair"], _INDEX["lips"]]] = (0.05, 0.07, 0.10)
        glossy[[_INDEX["pupil"], _INDEX["iris"], _INDEX["white"]]] = (0.8, 0.5, 0.3)
        colour_P3 = body.classes_PC @ look.colours_C3 * (lit_P * body.shade_P)[:, None]
        colour_P3 += (shine_P * (body.classes_PC @ glossy))[:, None]
        layer = np.zeros((fine * fine, 4), np.float32)
        layer[body.pixel_P, :3] = colour_P3 * look.tint_3
        layer[body.pixel_P, 3] = 1.0
        layer = layer.reshape(size, SUPERSAMPLE, size, SUPERSAMPLE, 4).mean((1, 3))
        picture = self._backdrop(look, body.pose)
        picture = picture * (1 - layer[..., 3:]) + layer[..., :3]
        picture = self._foreground(picture, look, body)
        return np.round(np.clip(picture, 0, 1) ** (1 / 2.2) * 255).astype(np.uint8)

    def _grid(self) -> tuple[_Array, _Array]:
        """Centres of the pixels in centimetres."""
        axis = (np.arange(self.size, dtype=np.float32) + 0.5) * (HEIGHT_CM / self.size)
        return axis[None, :] - HEIGHT_CM / 2, axis[:, None] + TOP_CM

    def _cover(self, distance_cm: _Array) -> Floats:
        """How much of a pixel a shape covers, from its signed distance."""
        return np.clip(0.5 - distance_cm * (self.size / HEIGHT_CM), 0, 1).astype(np.float32)[..., None]

    def _backdrop(self, look: Look, pose: Pose) -> Floats:
        """The wall, hair that falls behind the neck, and the shoulders."""
        size = self.size
        down = ((np.arange(size, dtype=np.float32) + 0.5) / size)[:, None, None]
        picture = np.broadcast_to(look.wall_23[0] * (1 - down) + look.wall_23[1] * down, (size, size, 3)).astype(
            np.float32
        )
        axis = (np.arange(size, dtype=np.float32) + 0.5) / size
        for x, y, radius, *colour in look.blobs_N6:
            near = np.exp(-((axis[None, :] - x) ** 2 + (axis[:, None] - y) ** 2) / (2 * radius**2))[..., None]
            picture = picture * (1 - 0.6 * near) + 0.6 * near * np.array(colour, np.float32)
        x_cm, y_cm = self._grid()
        build = self._build
        sway_x, sway_y = pose.sway_cm
        if build.hair_long > 0:
            turn = 5.0 * float(pose.rotation_3[1])
            reach = 3.0 + 11.0 * build.hair_long
            across = np.abs(x_cm - sway_x + turn * 0.4) - 4.6 - build.hair_cm
            inside = np.hypot(np.maximum(across, 0), np.maximum(y_cm - sway_y - reach + 3.4, 0)) - 3.4
            inside = np.maximum(inside, -4.0 - (y_cm - sway_y))
            cover = self._cover(inside)
            picture = picture * (1 - cover) + cover * look.colours_C3[_INDEX["hair"]] * (look.ambient * 1.1)
        shoulder = build.shoulders_cm
        drop = 11.6 + 0.018 * (x_cm - sway_x) ** 2 + np.clip(np.abs(x_cm - sway_x) - shoulder, 0, 9) ** 2 * 0.8
        cover = self._cover(drop + sway_y - y_cm)
        fold = 1.0 - 0.25 * np.clip(np.abs(x_cm - sway_x) / 18, 0, 1)[..., None]
        side = 1.0 + 0.35 * look.light_3[0] * np.clip((x_cm - sway_x) / 18, -1, 1)[..., None]
        lit = (look.ambient + 0.5 * (1 - look.ambient)) * fold * side
        return (picture * (1 - cover) + cover * look.colours_C3[_INDEX["cloth"]] * lit * look.tint_3).astype(np.float32)

    def _foreground(self, picture: Floats, look: Look, body: Body) -> Floats:
        """Glasses, the badge, and the hand before it."""
        x_cm, y_cm = self._grid()
        pose = body.pose
        scale = HEIGHT_CM / (self.size * SUPERSAMPLE)
        if self._build.glasses:
            eyes_cm = body.eyes_22 * scale + np.array([-HEIGHT_CM / 2, TOP_CM])
            rims = [np.abs(np.hypot((x_cm - ex) * 0.9, y_cm - ey) - 2.0) - 0.16 for ex, ey in eyes_cm]
            (ax, ay), (bx, by) = sorted(eyes_cm.tolist())
            bridge = np.maximum(
                np.abs(y_cm - (ay + by) / 2) - 0.14, np.abs(x_cm - (ax + bx) / 2) - abs(bx - ax) / 2 + 2.2
            )
            cover = self._cover(np.minimum(np.minimum(rims[0], rims[1]), bridge)) * 0.9
            picture = picture * (1 - cover) + cover * 0.02
        lit = look.ambient + 0.6 * (1 - look.ambient)
        if look.has_badge:
            bx, by = _BADGE_CM[0] + pose.sway_cm[0], _BADGE_CM[1] + pose.sway_cm[1]
            cover = self._cover(np.hypot(x_cm - bx, y_cm - by) - _BADGE_RADIUS_CM)
            picture = picture * (1 - cover) + cover * look.badge_3 * lit
        if pose.hand > 0:
            picture = self._hand(picture, look, pose.hand, x_cm, y_cm)
        return picture

    def _hand(self, picture: Floats, look: Look, raised: float, x_cm: _Array, y_cm: _Array) -> Floats:
        """An open palm that rises from below until it hides the badge."""
        px, py = _BADGE_CM[0] + 0.6, TOP_CM + HEIGHT_CM + 6.0 - (6.0 + TOP_CM + HEIGHT_CM - _BADGE_CM[1]) * raised
        palm = np.maximum(np.abs(x_cm - px) - 1.7, np.abs(y_cm - py) - 1.6) - 0.7
        parts: list[_Array] = [palm]
        for lean, length in ((-1.75, 3.6), (-0.6, 4.2), (0.55, 4.0), (1.7, 3.2)):
            parts.append(_capsule(x_cm, y_cm, (px + lean, py - 1.5), (px + lean * 1.25, py - 1.5 - length), 0.55))
        parts.append(_capsule(x_cm, y_cm, (px - 2.0, py + 0.8), (px - 3.9, py - 1.4), 0.6))
        parts.append(_capsule(x_cm, y_cm, (px, py + 2.0), (px + 1.5, py + 9.0), 1.7))
        lit = look.ambient + 0.6 * (1 - look.ambient)
        skin = look.colours_C3[_INDEX["skin"]] * lit * look.tint_3
        cover = self._cover(np.minimum.reduce(parts))
        picture = picture * (1 - cover) + cover * skin
        gaps = [_capsule(x_cm, y_cm, (px + g, py - 1.6), (px + g * 1.25, py - 4.2), 0.1) for g in (-1.2, 0.0, 1.15)]
        cover = self._cover(np.minimum.reduce(gaps)) * 0.5
        return picture * (1 - cover) + cover * skin * 0.5


def badge_box(size: int) -> tuple[slice, slice]:
    """Rows and columns of the picture in which the badge lies when the body does not sway."""
    scale = size / HEIGHT_CM
    x, y = (_BADGE_CM[0] + HEIGHT_CM / 2) * scale, (_BADGE_CM[1] - TOP_CM) * scale
    half = max(1, int(_BADGE_RADIUS_CM * scale * 0.6))
    return slice(int(y) - half, int(y) + half + 1), slice(int(x) - half, int(x) + half + 1)


def _half_way(light_3: Floats) -> Floats:
    half = light_3 + np.array([0, 0, -1], np.float32)
    return half / np.linalg.norm(half)


def _capsule(x: _Array, y: _Array, a: tuple[float, float], b: tuple[float, float], radius: float) -> _Array:
    """Signed distance to a thick line."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    along = np.clip(((x - a[0]) * dx + (y - a[1]) * dy) / (dx * dx + dy * dy), 0, 1)
    return np.hypot(x - a[0] - along * dx, y - a[1] - along * dy) - radius


def _scalp(neutral_V3: Floats, hairline_cm: float) -> Floats:
    """How much each vertex grows hair, 0..1: above a line that falls from the forehead behind the ears."""
    x, y, z = neutral_V3.T
    # Over the forehead the line is `hairline_cm` above the brows; from the temples on it falls.
    back = np.clip((z + 7.5) / 4.5, 0, 1)
    temple = np.clip((np.abs(x) - 4.8) / 2.5, 0, 1) * np.clip((z + 8.5) / 2.5, 0, 1)
    line = -6.0 - hairline_cm + (hairline_cm - 1.0) * 0.55 * temple + back * (hairline_cm + 10.0)
    hair = np.clip((line - y) / 0.8, 0, 1)
    ear = (np.abs(x) > 7.3) & (y > -5.0) & (y < 4.0) & (z < 1.5)
    hair[ear] = 0.0
    only = np.zeros(len(x), np.float32)
    only[: NECK.stop] = 1.0
    if hairline_cm > 8.5:
        only[:] = 0.0
    return (hair * only).astype(np.float32)


def _along(line: tuple[tuple[float, float], ...], x: Floats, y: Floats) -> Floats:
    distance = np.full(len(x), np.inf, np.float32)
    for a, b in itertools.pairwise(line):
        distance = np.minimum(distance, _capsule(x, y, a, b, 0.0))
    return distance


def _inside(polygon: tuple[tuple[float, float], ...], x: Floats, y: Floats) -> Floats:
    inside = np.zeros(len(x), bool)
    for (x0, y0), (x1, y1) in zip(polygon, (*polygon[1:], polygon[0]), strict=True):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return inside.astype(np.float32)


def _classes(head: HeadModel, hair_V: Floats, beard: float) -> Floats:
    """What each vertex is made of, ``[V, C]``; rows add up to one."""
    x, y, z = head.neutral_V3.T
    classes = np.zeros((len(x), len(CLASSES)), np.float32)
    skin = np.zeros(len(x), bool)
    skin[FACE] = skin[NECK] = skin[EYE_SOCKETS] = True
    front = skin & (z < -6.0)
    brow = np.where(front, np.clip(1.6 - _along(_BROW_XY, -np.abs(x), y) / 0.32, 0, 1), 0)
    lips = np.where(skin & (z < -9.0), _inside(_OUTER_LIP_XY, x, y), 0)
    jaw = np.clip((y - 1.6) / 1.2, 0, 1) * np.clip((9.5 - y) / 1.5, 0, 1) * np.clip((-z - 2.0) / 2.0, 0, 1)
    cheek = np.clip(np.maximum((np.abs(x) - 3.4) / 1.6, (y - 4.4) / 0.9), 0, 1)
    moustache = np.clip(1 - np.abs(y - 1.95) / 0.55, 0, 1) * np.clip((2.6 - np.abs(x)) / 0.8, 0, 1)
    bearded = beard * np.where(skin, np.clip(jaw * cheek + moustache * (z < -9), 0, 1), 0)
    # The neckline of a shirt: deeper in front.
    collar = 11.2 + 1.6 * np.clip(1 - np.abs(x) / 5.0, 0, 1) * (z < 0)
    cloth = np.where(skin, np.clip((y - collar) / 0.3, 0, 1), 0)
    for name, share in (("cloth", cloth), ("hair", hair_V), ("brow", brow), ("lips", lips), ("beard", bearded)):
        left = 1 - classes.sum(1)
        classes[:, _INDEX[name]] = np.where(skin, np.clip(share, 0, 1) * left, 0)
    classes[skin, _INDEX["skin"]] = 1 - classes[skin].sum(1)
    classes[TEETH, _INDEX["teeth"]] = 1
    classes[SOCKET, _INDEX["mouth"]] = 1
    classes[GUMS, _INDEX["tongue"]] = 1
    classes[EYEBALLS, _INDEX["white"]] = 1
    for iris in IRISES:
        # The cornea covers the iris: it is the part before the iris that is seen.
        cornea = slice(iris.start - _CORNEA_VERTICES, iris.start)
        centred = head.neutral_V3[cornea] - head.neutral_V3[cornea].mean(0)
        radius = np.hypot(centred[:, 0], centred[:, 1])
        before = centred[:, 2] < 0
        part = classes[cornea]
        part[before & (radius < 0.62)] = np.eye(len(CLASSES), dtype=np.float32)[_INDEX["iris"]]
        part[before & (radius < 0.28)] = np.eye(len(CLASSES), dtype=np.float32)[_INDEX["pupil"]]
    return classes
