"""From landmarks to flow fields: how each shape, and the head's pose, move every cell of the picture.

G cells along a side of the flow grid (128)   J landmarks   K drivers (1 + shapes)   C channels
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from streamdiff.arrays import Floats
from streamdiff.avatar.bundle import GRID, HOLD, SLITS, Slit
from streamdiff.avatar.head3d import rasterize
from streamdiff.avatar.kinematics import ARKIT_NAMES

NUM_MESH = 468
_OVAL = [
    *(10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377),
    *(152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109),
]
LASHES = 0.09
"""Height of the band of lashes above a lid, which moves without stretching, in widths of the eye."""
BLINKS = ("", "eyeBlinkRight", "eyeBlinkLeft")
"""The shape that shuts each slit."""


def _oval_radius(landmarks: Floats, size: int) -> tuple[Tensor, Tensor]:
    """For each cell its distance from the middle of the face, in radii of the oval, and its direction's y."""
    oval = landmarks[_OVAL, :2].astype(np.float64)
    centre = (oval.min(0) + oval.max(0)) / 2
    spokes = oval - centre
    angle = np.arctan2(spokes[:, 1], spokes[:, 0])
    order = angle.argsort()
    axis = (np.arange(GRID) + 0.5) * (size / GRID)
    v, u = np.meshgrid(axis - centre[1], axis - centre[0], indexing="ij")
    radius = np.interp(np.arctan2(v, u), angle[order], np.hypot(*spokes.T)[order], period=2 * math.pi)
    distance = np.hypot(u, v)
    return torch.from_numpy(distance / radius), torch.from_numpy(v / np.maximum(distance, 1e-6))


def _between(x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """0 below ``low``, 1 above ``high``, smooth in between."""
    t = ((x - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def _to_border() -> Tensor:
    """Distance of each cell from the border of the picture, in sides of it."""
    axis = (torch.arange(GRID) + 0.5) / GRID
    edge = torch.minimum(axis, 1 - axis)
    return torch.minimum(edge[:, None], edge[None, :])


def pose_fields(landmarks: Floats, pivot_z: float, size: int) -> tuple[Tensor, NDArray[np.uint8]]:
    """How the head's movement spreads: ``[2, G, G]``, and the share as a mask in pixels."""
    rho, down = _oval_radius(landmarks, size)
    up, below = (-down).clamp(min=0), down.clamp(min=0)
    inner = 1.25 + 0.25 * up - 0.2 * below
    outer = 2.4 + 0.5 * up + 0.1 * below
    share = 1 - _between(rho, inner, outer)
    share = share * _between(_to_border(), 0.004, 0.12)
    # Depth: from the landmarks over the face, smoothly on towards the ears and hair.
    cells = torch.from_numpy(landmarks[:NUM_MESH, :2] * (GRID / size)).long().clamp(0, GRID - 1)
    depth = torch.zeros(GRID, GRID, dtype=torch.float64)
    count = torch.zeros(GRID, GRID, dtype=torch.float64)
    z = torch.from_numpy(landmarks[:NUM_MESH, 2].astype(np.float64) - pivot_z)
    depth.index_put_((cells[:, 1], cells[:, 0]), z, accumulate=True)
    count.index_put_((cells[:, 1], cells[:, 0]), torch.ones_like(z), accumulate=True)
    known = count > 0
    depth = torch.where(known, depth / count.clamp(min=1), 0)
    # The head goes on behind the oval: its sides lie deeper than its rim.
    rim = float(z[torch.tensor(_OVAL)].mean())
    far = rho > 1.5
    depth = torch.where(far, torch.full_like(depth, rim * 0.6), depth)
    depth = fill_smoothly(depth[None], known | far)[0]
    depth = blurred(depth[None].float(), 2.0)[0].double()
    pose = torch.stack([share, share * depth])
    mask = functional.interpolate(share[None, None].float(), size=(size, size), mode="bilinear", align_corners=False)
    return pose.float(), (mask[0, 0] * 255).round().to(torch.uint8).numpy()


def fill_smoothly(values_CGG: Tensor, known_GG: Tensor, *, iterations: int = 400) -> Tensor:
    """Keep the known cells; make each other the mean of its neighbours (harmonic), free at the border.

    Conjugate gradients on the unknown cells, from a start that already carries the coarse shape.
    """
    values = values_CGG * known_GG
    x = torch.where(known_GG, values, _coarse_fill(values, known_GG.to(values.dtype)))
    free = (~known_GG).to(values.dtype)

    def residual_of(field_CGG: Tensor) -> Tensor:
        padded = functional.pad(field_CGG[None], (1, 1, 1, 1), mode="replicate")[0]
        around = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
        return (4 * field_CGG - around) * free

    r = -residual_of(x)
    p, rr = r.clone(), (r * r).sum((1, 2), keepdim=True)
    floor = 1e-7 * rr.amax() + 1e-30
    for _ in range(iterations):
        ap = residual_of(p)
        alpha = rr / (p * ap).sum((1, 2), keepdim=True).clamp(min=1e-30)
        x, r = x + alpha * p, r - alpha * ap
        rr_next = (r * r).sum((1, 2), keepdim=True)
        p, rr = r + rr_next / rr.clamp(min=1e-30) * p, rr_next
        if float(rr.amax()) < floor:
            break
    return x


def _coarse_fill(values: Tensor, known: Tensor) -> Tensor:
    """Unknown cells from an ever coarser picture of the known ones."""
    if float(known.min()) >= 1 or max(values.shape[-2:]) <= 2:
        return values / known.clamp(min=1e-12)
    small_values = functional.avg_pool2d(values[None], 2, ceil_mode=True)[0]
    small_known = functional.avg_pool2d(known[None, None], 2, ceil_mode=True)[0, 0]
    seen = small_known > 0
    small = torch.where(seen, small_values / small_known.clamp(min=1e-12), 0)
    small = _coarse_fill(small, seen.to(values.dtype))
    shape = values.shape[-2:]
    back = functional.interpolate(small[None], size=shape, mode="bilinear", align_corners=False)[0]
    return torch.where(known > 0, values, back)


def blurred(values_CGG: Tensor, sigma: float) -> Tensor:
    reach = math.ceil(3 * sigma)
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma).square())
    taps = (taps / taps.sum()).to(values_CGG.dtype)
    x = functional.pad(values_CGG[:, None], (reach, reach, reach, reach), mode="replicate")
    x = functional.conv2d(x, taps.view(1, 1, -1, 1))
    return functional.conv2d(x, taps.view(1, 1, 1, -1))[:, 0]


def spread(
    landmarks: Floats,
    motion_KJ2: Floats,
    triangles: NDArray[np.int64],
    size: int,
    lid_skin: tuple[float, ...],
) -> tuple[Tensor, Tensor]:
    """From landmarks to cells, above the slits and below: twice ``[K, 2, G, G]``, pixels."""
    motion = torch.from_numpy(motion_KJ2.astype(np.float64))
    face = _over_the_face(landmarks, motion, triangles, size)
    still = _between(_to_border(), 0.004, 0.03)
    K = len(face)
    out: list[Tensor] = []
    for side in (0, 1):
        values = face.clone()
        for slit, blink, skin_above in zip(SLITS, BLINKS, lid_skin, strict=True):
            values = _held_past(values, landmarks, motion, slit, side, size, blink, skin_above)
        out.append(blurred(values.flatten(0, 1), 0.7).view(K, 2, GRID, GRID) * still)
    return out[0], out[1]


def _over_the_face(landmarks: Floats, motion: Tensor, triangles: NDArray[np.int64], size: int) -> Tensor:
    """The landmarks' movement ``[K, 2, G, G]`` inside the mesh's triangles, fading out to where nothing moves."""
    screen = landmarks[:NUM_MESH].copy()
    screen[:, :2] /= size / GRID
    # The mesh closes mouth and eyes with triangles; those are the holes.
    holes = [np.isin(triangles, [j for side in slit for j in side]).all(1) for slit in SLITS]
    skin = triangles[~np.any(holes, axis=0)]
    found = rasterize(screen, skin, GRID, GRID, cull=False)
    covered = torch.from_numpy(found.triangle_HW >= 0)
    corners = skin[np.maximum(found.triangle_HW, 0)]
    weights = torch.from_numpy(found.weights_HW3.astype(np.float64))
    field_KGG2 = sum(motion[:, corners[..., n]] * weights[..., n, None] for n in range(3))
    assert isinstance(field_KGG2, Tensor)
    face = field_KGG2.permute(0, 3, 1, 2) * covered
    rho, down = _oval_radius(landmarks, size)
    far = rho > 1.35 + 0.35 * down.clamp(min=0)
    border = torch.zeros(GRID, GRID, dtype=torch.bool)
    border[[0, -1]] = border[:, [0, -1]] = True
    return fill_smoothly(face.flatten(0, 1).float(), covered | far | border).view(len(face), 2, GRID, GRID)


def _held_past(
    values: Tensor,
    landmarks: Floats,
    motion: Tensor,
    slit: Slit,
    side: int,
    size: int,
    blink: str,
    skin_above: float,
) -> Tensor:
    """The field with one side of a slit carried on past its edge: a warp that starts beyond still finds the lip."""
    axis = (np.arange(GRID) + 0.5) * (size / GRID)
    v, u = np.meshgrid(axis, axis, indexing="ij")
    edge = landmarks[list(slit[side]), :2].astype(np.float64)
    other = landmarks[list(slit[1 - side]), :2].astype(np.float64)
    order = edge[:, 0].argsort(kind="stable")
    x = edge[order, 0]
    height = np.interp(u, x, edge[order, 1])
    width = float(x[-1] - x[0])
    reach = HOLD[side] * width
    if side == 0 and blink:
        height = height - LASHES * width
    within = (u >= x[0]) & (u <= x[-1])
    below = (v > height) & (v < other[:, 1].max() + reach)
    beyond = below if side == 0 else (v < height) & (v > other[:, 1].min() - reach)
    cells = torch.from_numpy(within & beyond)
    rim = motion[:, list(slit[side])][:, order].numpy()
    held = np.stack([[np.interp(u[0], x, rim_k[:, axis_]) for axis_ in (0, 1)] for rim_k in rim])
    rims = torch.from_numpy(held.astype(np.float32))[:, :, None, :]
    values = torch.where(cells, rims, values)
    if side == 0 and blink:
        # Finer than the mesh: the skin stretches evenly from above the lashes.
        driver = 1 + ARKIT_NAMES.index(blink)
        share = torch.from_numpy(1 - (height - v) / skin_above).clamp(0, 1).float()
        over = torch.from_numpy(within & (v <= height))
        values[driver] = torch.where(cells, values[driver], rims[driver] * share * over)
    return values
