"""Pictures of mouths to learn from: teeth, gums, tongue and the walls of the mouth without the lips, on a 3D head.

Drawn by `streamdiff.avatar.head3d`, seen through an opening that only shades them; same seed, same pictures.

    N pictures   C conditions   P pixels along a side   V vertices   K identity modes
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamdiff.arrays import Floats
from streamdiff.avatar import head3d
from streamdiff.avatar.head3d import GUMS, SOCKET, TEETH, HeadModel
from streamdiff.avatar.mouth import EXTENT_CM, GAMMA, LEFT_CM, NUM_SHAPES, PATCH, TOP_CM

_SUPERSAMPLE = 2
# Vertices of the light model: middle of the inner lips, above and below, and their corners.
_LIP_TOP, _LIP_BOTTOM, _LIP_RIGHT, _LIP_LEFT = 5533, 5517, 5702, 6207

_LIP_SHAPES = (
    "mouthFunnel",
    "mouthPucker",
    "mouthRollLower",
    "mouthShrugUpper",
    "mouthClose",
)
_PAIRED_LIP_SHAPES = ("mouthUpperUp", "mouthLowerDown", "mouthSmile", "mouthStretch", "mouthFrown")


@dataclass(frozen=True)
class Scene:
    """One picture to draw: the condition of the decoder and the head that shows it."""

    conditions_C: Floats
    weights: dict[str, float]


class MouthPainter:
    """Draws mouths: `scene` draws a random condition, `picture` the pixels that belong to it."""

    def __init__(self, head: HeadModel) -> None:
        self.head = head
        self.triangles = head.triangles(SOCKET, GUMS, TEETH)
        self.shapes_KV3 = _principal_shapes(head)
        self.tongue_V = _tongue_weights(head.neutral_V3)
        self.paint_V3 = _paint(head.neutral_V3, self.tongue_V)

    def scene(self, rng: np.random.Generator) -> Scene:
        """A random jaw, tongue, view, opening, light and head."""
        weights, side, tongue = _random_weights(rng)
        yaw, pitch = (float(v) for v in np.clip(rng.normal(0, 0.14, 2), -0.4, 0.4))
        opening = self._opening(weights, rng)
        light = [float(rng.uniform(-0.8, 0.8)), float(rng.uniform(-1.0, 0.2)), float(rng.uniform(0.2, 0.9))]
        shape = [float(v) for v in np.clip(rng.normal(0, 1, NUM_SHAPES), -2.5, 2.5)]
        motion = [weights["jawOpen"], weights["jawForward"], side, tongue, yaw, pitch]
        conditions = np.array(motion + opening + light + shape, np.float32)
        jaw_only = {name: weights[name] for name in ("jawOpen", "jawForward", "jawLeft", "jawRight")}
        return Scene(conditions, jaw_only)

    def _opening(self, weights: dict[str, float], rng: np.random.Generator) -> list[float]:
        """Top, bottom, half width and place of the opening between the lips, cm from where they meet."""
        lips = self.head.vertices(weights)[[_LIP_TOP, _LIP_BOTTOM, _LIP_RIGHT, _LIP_LEFT]]
        origin = self._stomion(self.head.neutral_V3)
        top, bottom = (float(v) for v in lips[:2, 1] - origin[1])
        middle, half = (top + bottom) / 2, max(bottom - top, 0.05) / 2
        # Real lips open otherwise than the 3D head's: the decoder is to follow the opening it is told.
        middle += float(rng.normal(0, 0.12))
        half = max(half * float(np.exp(rng.normal(0, 0.25))), 0.03)
        half_width = float(lips[3, 0] - lips[2, 0]) / 2 * float(np.exp(rng.normal(0, 0.12)))
        return [middle - half, middle + half, half_width, float(rng.normal(0, 0.1))]

    def _stomion(self, vertices_V3: Floats) -> Floats:
        return (vertices_V3[_LIP_TOP] + vertices_V3[_LIP_BOTTOM]) / 2

    def picture(self, scene: Scene) -> NDArray[np.uint8]:
        """What the decoder is to answer, ``[P, P, 4]``: see `streamdiff.avatar.mouth.MouthDecoder`."""
        c = scene.conditions_C
        top, bottom, half_width, opening_x = (float(v) for v in c[6:10])
        light_x, light_y, ambient = (float(v) for v in c[10:13])
        pixels = self._surfaces(scene)
        teeth, tone, shine = pixels[..., 0], pixels[..., 1], pixels[..., 2]
        normal, place, over = pixels[..., 3:6], pixels[..., 6:9], pixels[..., 9]
        normal = normal / np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-6)
        light = np.array([light_x, light_y, -1.0])
        light /= np.linalg.norm(light)
        half_way = light + np.array([0, 0, -1.0])
        half_way /= np.linalg.norm(half_way)
        sky, sun = _through_opening(place, light, top=top, bottom=bottom, half_width=half_width, x=opening_x)
        facing = np.clip(normal @ light, 0, 1)
        lit = ambient * sky * (0.65 + 0.35 * np.clip(-normal[..., 2], 0, 1)) + (1 - ambient) * sun * facing
        light_out = np.clip(tone * (lit + 0.012), 0, 1) ** (1 / GAMMA)
        mirrored = np.sqrt(np.clip(normal @ half_way, 0, 1) ** 36 * shine * sun)
        parts = np.stack([teeth, light_out, mirrored, over], -1)
        parts = parts.reshape(PATCH, _SUPERSAMPLE, PATCH, _SUPERSAMPLE, 4).mean((1, 3))
        return np.round(np.clip(parts, 0, 1) * 255).astype(np.uint8)

    def _surfaces(self, scene: Scene) -> Floats:
        """What is seen at every pixel: paint (3), normal (3), place (3, cm), how far it is out over the lips (1)."""
        c = scene.conditions_C
        tongue, yaw, pitch = (float(v) for v in c[3:6])
        vertices = self.head.vertices(scene.weights) + np.tensordot(c[13:], self.shapes_KV3, 1)
        vertices = vertices + self.tongue_V[:, None] * _tongue_reach(vertices, tongue)
        local = vertices - self._stomion(self.head.neutral_V3)
        # The view turns; the square keeps its origin on the lips.
        seen = local @ head3d.rotation_matrix(np.array([pitch, yaw, 0], np.float32)).T
        size = PATCH * _SUPERSAMPLE
        screen = np.array(seen, np.float32)
        screen[:, 0] = (seen[:, 0] - LEFT_CM) * (size / EXTENT_CM)
        screen[:, 1] = (seen[:, 1] - TOP_CM) * (size / EXTENT_CM)
        fragments = head3d.rasterize(screen, self.triangles, size, size)
        normals = head3d.vertex_normals(seen, self.triangles)
        # Lips are thick: what lies this far before the line where they meet has left the mouth.
        depth = local[:, 2:] + _lip_depth(local[:, :1])
        over = np.clip(self.tongue_V[:, None] * 4, 0, 1) * np.clip(-depth / 0.25, 0, 1)
        values = np.concatenate([self.paint_V3, normals, seen, over], 1).astype(np.float32)
        return head3d.interpolate(fragments, self.triangles, values)

    def weights(self, scene: Scene) -> Floats:
        """How much each pixel ``[P, P]`` matters: what the opening may show, and a little of the rest."""
        top, bottom, half_width, x = (float(v) for v in scene.conditions_C[6:10])
        axis = (np.arange(PATCH) + 0.5) * (EXTENT_CM / PATCH)
        dx = (axis + LEFT_CM - x)[None, :] / (half_width + 0.3)
        dy = (axis + TOP_CM - (top + bottom) / 2)[:, None] / ((bottom - top) / 2 + 0.4)
        return (0.08 + np.clip(2.5 - 2 * np.sqrt(dx**2 + dy**2), 0, 1)).astype(np.float32)


def _random_weights(rng: np.random.Generator) -> tuple[dict[str, float], float, float]:
    """ARKit weights of jaw and lips; how far the jaw is aside (-1..1), and how far the tongue is out."""
    jaw = float(rng.beta(1.1, 2.2))
    weights: dict[str, float] = {"jawOpen": jaw}
    weights["jawForward"] = float(rng.uniform(0, 0.6) if rng.random() < 0.3 else 0.0)
    side = float(rng.uniform(-0.7, 0.7) if rng.random() < 0.3 else 0.0)
    weights["jawLeft"], weights["jawRight"] = max(side, 0.0), max(-side, 0.0)
    tongue = float(rng.uniform(0, 1) if rng.random() < 0.4 else 0.0)
    for name in _LIP_SHAPES:
        weights[name] = float(rng.uniform(0, 0.7) if rng.random() < 0.2 else 0.0)
    weights["mouthClose"] *= jaw
    for name in _PAIRED_LIP_SHAPES:
        weight = float(rng.uniform(0, 0.9) if rng.random() < 0.3 else 0.0)
        weights[name + "Left"] = weights[name + "Right"] = weight
    return weights, side, tongue


def _lip_depth(x: Floats) -> Floats:
    # Lips follow the arch of the teeth: at the corners they lie 1.1 cm behind the middle (measured, 2.4 cm
    # out).
    return -0.19 * x**2


def _through_opening(
    place: Floats, light: NDArray[np.float64], *, top: float, bottom: float, half_width: float, x: float
) -> tuple[Floats, Floats]:
    """How much of the sky, and of a lamp, a point sees through the opening between the lips (both 0..1)."""
    half_height, middle = max((bottom - top) / 2, 0.02), (top + bottom) / 2
    depth = np.maximum(place[..., 2] + _lip_depth(place[..., 0]), 0.03)
    area = np.pi * half_height * half_width

    def outside(px: Floats, py: Floats) -> Floats:
        return np.sqrt(((px - x) / half_width) ** 2 + ((py - middle) / half_height) ** 2)

    # Solid angle of a disc of this area seen from this far, softened by how far aside the point lies.
    aside = np.maximum(np.abs(place[..., 1] - middle) - half_height, 0)
    sky = area / (area + np.pi * (depth**2 + 0.6 * aside**2))
    slope_x, slope_y = light[0] / -light[2], light[1] / -light[2]
    reach = outside(place[..., 0] + slope_x * depth, place[..., 1] + slope_y * depth)
    softness = (0.15 + 0.35 * depth) / half_height
    sun = 1 / (1 + np.exp(np.clip((reach - 1) * 4 / softness, -30, 30)))
    return sky.astype(np.float32), (sun * np.sqrt(sky)).astype(np.float32)


def _principal_shapes(head: HeadModel) -> Floats:
    """The main ways ``[K, V, 3]`` in which mouths differ, relative to the lips, per standard deviation."""
    origin = (head.identity_KV3[:, _LIP_TOP] + head.identity_KV3[:, _LIP_BOTTOM]) / 2
    local = head.identity_KV3 - origin[:, None]
    inside = np.concatenate([local[:, GUMS], local[:, TEETH]], 1).reshape(len(local), -1)
    modes, _, _ = np.linalg.svd(inside, full_matrices=False)
    modes = modes[:, :NUM_SHAPES]
    # A sign that does not depend on the linear algebra library.
    modes = modes * np.sign(modes[np.abs(modes).argmax(0), np.arange(NUM_SHAPES)])
    return np.tensordot(modes.T, local, 1).astype(np.float32)


def _tongue_weights(neutral_V3: Floats) -> Floats:
    """How freely each vertex moves with the tip of the tongue, 0..1 (measured on the mean head, cm)."""
    x, y, z = neutral_V3.T
    upper = np.clip((4.75 - y) / 0.7, 0, 1)
    forward = np.clip((-z - 5.5) / 4.2, 0, 1) ** 1.5
    # An ellipse that leaves out the gums between the lower front teeth.
    aside = np.clip((1 - (x / 1.8) ** 2 - ((z + 6.0) / 4.4) ** 2) / 0.2, 0, 1)
    weights = np.where((z > -9.79) & (y > 2.9), upper * forward * aside, 0)
    keep = np.zeros(len(x), bool)
    keep[GUMS] = True
    return np.where(keep, weights, 0).astype(np.float32)


def _tongue_reach(vertices_V3: Floats, tongue: float) -> Floats:
    """How far the tip moves: first up to the teeth, then out over the lower lip."""
    reach = np.zeros_like(vertices_V3)
    reach[:, 0] = -0.15 * tongue * vertices_V3[:, 0]  # the tip narrows
    reach[:, 1] = -0.85 * min(tongue / 0.4, 1.0) + 0.4 * max(tongue - 0.4, 0.0)
    reach[:, 2] = -3.6 * tongue
    return reach


def _paint(neutral_V3: Floats, tongue_V: Floats) -> Floats:
    """Per vertex: whether it is a tooth, how bright it is beside others of its kind, how it shines."""
    x, y, _ = neutral_V3.T
    teeth, tone, shine = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    teeth[TEETH] = 1
    # Teeth darken towards the gum; the walls are darker than gums; tongues are paler and furrowed.
    tone[TEETH] = 1 - 0.25 * np.clip(np.abs(y - 3.45) / 1.0 - 0.3, 0, 1)[TEETH]
    tone[SOCKET] = 0.6
    tongue = 1.1 - 0.3 * np.exp(-((x / 0.16) ** 2))
    blend = np.clip(tongue_V * 4, 0, 1)
    tone[GUMS] = (1 - blend + tongue * blend)[GUMS]
    shine[TEETH], shine[GUMS] = 0.35, 0.16
    return np.stack([teeth, tone, shine], 1).astype(np.float32)
