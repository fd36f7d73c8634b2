"""Train the mouth decoder on a 3D head: ``python -m streamdiff.training.avatar.mouth --data ict_facekit.npz``.

Every picture is drawn by our own rasteriser: teeth, gums, tongue and the walls of the mouth without the lips,
seen through an opening that only shades them. One CPU thread draws 16 000 pictures in about ten minutes and
trains in under an hour; the same seed gives the same pictures.

    N pictures   C conditions   P pixels along a side   V vertices   K identity modes
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from streamdiff.arrays import Floats
from streamdiff.avatar import head3d
from streamdiff.avatar.head3d import GUMS, SOCKET, TEETH, HeadModel
from streamdiff.avatar.mouth import (
    EXTENT_CM,
    GAMMA,
    LEFT_CM,
    NUM_CONDITIONS,
    NUM_SHAPES,
    PATCH,
    TOP_CM,
    MouthDecoder,
)

logger = logging.getLogger(__name__)

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
        yaw, pitch = (float(v) for v in np.clip(rng.normal(0, 0.14, 2), -0.4, 0.4))
        lips = self.head.vertices(weights)[[_LIP_TOP, _LIP_BOTTOM, _LIP_RIGHT, _LIP_LEFT]]
        origin = self._stomion(self.head.neutral_V3)
        top, bottom = (float(v) for v in lips[:2, 1] - origin[1])
        middle, half = (top + bottom) / 2, max(bottom - top, 0.05) / 2
        # Real lips open otherwise than the 3D head's: the decoder is to follow the opening it is told.
        middle += float(rng.normal(0, 0.12))
        half = max(half * float(np.exp(rng.normal(0, 0.25))), 0.03)
        half_width = float(lips[3, 0] - lips[2, 0]) / 2 * float(np.exp(rng.normal(0, 0.12)))
        x = float(rng.normal(0, 0.1))
        light = [float(rng.uniform(-0.8, 0.8)), float(rng.uniform(-1.0, 0.2)), float(rng.uniform(0.2, 0.9))]
        shape = [float(v) for v in np.clip(rng.normal(0, 1, NUM_SHAPES), -2.5, 2.5)]
        motion = [jaw, weights["jawForward"], side, tongue, yaw, pitch]
        opening = [middle - half, middle + half, half_width, x]
        conditions = np.array(motion + opening + light + shape, np.float32)
        jaw_only = {name: weights[name] for name in ("jawOpen", "jawForward", "jawLeft", "jawRight")}
        return Scene(conditions, jaw_only)

    def _stomion(self, vertices_V3: Floats) -> Floats:
        return (vertices_V3[_LIP_TOP] + vertices_V3[_LIP_BOTTOM]) / 2

    def picture(self, scene: Scene) -> NDArray[np.uint8]:
        """What the decoder is to answer, ``[P, P, 4]``: see `streamdiff.avatar.mouth.MouthDecoder`."""
        c = scene.conditions_C
        tongue, yaw, pitch = (float(v) for v in c[3:6])
        top, bottom, half_width, opening_x = (float(v) for v in c[6:10])
        light_x, light_y, ambient = (float(v) for v in c[10:13])
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
        pixels = head3d.interpolate(fragments, self.triangles, values)
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

    def weights(self, scene: Scene) -> Floats:
        """How much each pixel ``[P, P]`` matters: what the opening may show, and a little of the rest."""
        top, bottom, half_width, x = (float(v) for v in scene.conditions_C[6:10])
        axis = (np.arange(PATCH) + 0.5) * (EXTENT_CM / PATCH)
        dx = (axis + LEFT_CM - x)[None, :] / (half_width + 0.3)
        dy = (axis + TOP_CM - (top + bottom) / 2)[:, None] / ((bottom - top) / 2 + 0.4)
        return (0.08 + np.clip(2.5 - 2 * np.sqrt(dx**2 + dy**2), 0, 1)).astype(np.float32)


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


def draw(head: HeadModel, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Conditions ``[N, C]``, pictures ``[N, 4, P, P]`` (uint8) and pixel weights ``[N, P, P]`` (float16)."""
    painter = MouthPainter(head)
    conditions = torch.empty(count, NUM_CONDITIONS)
    pictures = torch.empty(count, 4, PATCH, PATCH, dtype=torch.uint8)
    weights = torch.empty(count, PATCH, PATCH, dtype=torch.float16)
    started = time.perf_counter()
    for n in range(count):
        # One generator per picture: picture n is the same in a set of any size.
        scene = painter.scene(np.random.default_rng([seed, n]))
        conditions[n] = torch.from_numpy(scene.conditions_C)
        pictures[n] = torch.from_numpy(painter.picture(scene)).permute(2, 0, 1)
        weights[n] = torch.from_numpy(painter.weights(scene))
        if n % 1000 == 999:
            logger.info("drew %d pictures in %.0f s", n + 1, time.perf_counter() - started)
    return conditions, pictures, weights


def loss(drawn: torch.Tensor, target: torch.Tensor, weights_NPP: torch.Tensor) -> torch.Tensor:
    """Weighted L1 of channels and of their differences to the right and below: edges stay edges.

    Squares are added for the last channel: rarely anything but zero, under L1 alone it would stay there.
    """
    weights = weights_NPP[:, None]
    error = drawn - target
    across, down = error.diff(dim=3), error.diff(dim=2)
    return (
        (error.abs() * weights).mean()
        + (across.abs() * weights[..., 1:]).mean()
        + (down.abs() * weights[..., 1:, :]).mean()
        + 4 * error[:, 3].square().mean()
    )


def train(
    head: HeadModel,
    out: Path,
    *,
    pictures: int,
    minutes: float,
    batch: int = 24,
    seed: int = 0,
    cache: Path | None = None,
    device: str = "cpu",
) -> dict[str, float]:
    """Fit the decoder for ``minutes`` and write fp16 weights to ``out``; returns held-out errors.

    Checkpoints (weights and optimiser) lie beside ``out`` and are taken up again; ``cache`` keeps the
    pictures.
    """
    torch.manual_seed(seed)
    if cache is not None and cache.exists():
        data: dict[str, torch.Tensor] = torch.load(cache, weights_only=True)
    else:
        names = ("conditions", "pictures", "weights")
        data = dict(zip(names, draw(head, pictures, seed), strict=True))
        if cache is not None:
            torch.save(data, cache)
    held = max(len(data["conditions"]) // 32, 1)
    conditions = data["conditions"].to(device)
    model = MouthDecoder().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    checkpoint, step, spent_s = out.with_suffix(".checkpoint"), 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, step, spent_s = state["average"], state["step"], state["spent_s"]
    generator = torch.Generator().manual_seed(seed + step)
    started, last_save_s, total = time.perf_counter() - spent_s, spent_s, 0.0
    while (spent_s := time.perf_counter() - started) < minutes * 60:
        share = spent_s / (minutes * 60)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 200) * max(0.02, float(np.cos(share * np.pi / 2)) ** 2)
        chosen = torch.randint(held, len(conditions), (batch,), generator=generator)
        target = data["pictures"][chosen].to(device).float() / 255
        value = loss(model(conditions[chosen]), target, data["weights"][chosen].to(device).float())
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(0.999, step / (step + 100))
        for name, parameter in model.state_dict().items():
            average[name].lerp_(parameter, 1 - decay)
        total += float(value.detach())
        if step % 250 == 0:
            logger.info("step %d, %.0f s: loss %.4f", step, spent_s, total / 250)
            total = 0.0
        if spent_s - last_save_s > 120:
            last_save_s = spent_s
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "average": average,
                    "step": step,
                    "spent_s": spent_s,
                },
                checkpoint,
            )
    model.load_state_dict(average)
    save_file({name: value.half().contiguous() for name, value in average.items()}, out)
    checkpoint.unlink(missing_ok=True)
    model.eval()
    with torch.inference_mode():
        drawn = torch.cat([model(part) for part in conditions[:held].split(64)]).cpu()
    error = (drawn - data["pictures"][:held].float() / 255).abs()
    weights = data["weights"][:held, None].float()
    seen = float((error * weights).sum() / (weights.sum() * 4))
    return {"steps": step, "held_out": held, "l1": float(error.mean()), "l1_seen": seen}


def main() -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(description="Train the mouth decoder on pictures of a 3D head.")
    parser.add_argument("--data", type=Path, required=True, help="ict_facekit.npz")
    parser.add_argument("--out", type=Path, required=True, help="where the weights go (.safetensors)")
    parser.add_argument("--pictures", type=int, default=16000)
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--cache", type=Path, help="keep the drawn pictures here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    result = train(
        HeadModel.load(args.data),
        args.out,
        pictures=args.pictures,
        minutes=args.minutes,
        seed=args.seed,
        cache=args.cache,
        device=args.device,
    )
    logger.info("%s", result)


if __name__ == "__main__":
    main()
