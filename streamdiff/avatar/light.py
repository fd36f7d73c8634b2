"""Estimate the light of a photo from the skin of its face, so that teeth are lit like the face.

H, W pixels   J landmarks   R triangles
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from streamdiff.arrays import Floats
from streamdiff.avatar.fields import NUM_MESH, blurred
from streamdiff.avatar.mouth import MouthLook

SKIN = (
    50,
    280,
    101,
    330,
    118,
    347,
    205,
    425,
    151,
    9,
    69,
    299,
    104,
    333,
    36,
    266,
    147,
    376,
    187,
    411,
    192,
    416,
)


def light_of(
    crop: NDArray[np.uint8], landmarks: Floats, triangles: NDArray[np.int64]
) -> tuple[tuple[float, float, float], MouthLook]:
    """Gain of the light and its direction, by least squares on the skin (Lambert): what white would measure here."""
    size = crop.shape[0]
    points = landmarks[:NUM_MESH].astype(np.float64)
    normals = np.zeros_like(points)
    a, b, c = (points[triangles[:, n]] for n in range(3))
    for n in range(3):
        np.add.at(normals, triangles[:, n], np.cross(b - a, c - a))
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
    normals *= -np.sign(np.median(normals[:, 2]))
    linear = (crop.astype(np.float64) / 255) ** 2.2
    soft = blurred(torch.from_numpy(linear).permute(2, 0, 1), size / 128).permute(1, 2, 0).numpy()
    chosen = np.array(SKIN)
    x, y = (points[chosen, :2].astype(int).clip(0, size - 1)).T
    colours = soft[y, x]
    bright = colours.mean(1)
    # On skin alone; the ridge keeps a flatly lit face from inventing a direction.
    terms = np.concatenate([np.ones((len(chosen), 1)), normals[chosen]], 1)
    ridge = np.diag([1e-3, 0.5, 0.5, 0.5]) * len(chosen) * 0.05
    fit = np.linalg.solve(terms.T @ terms + ridge, terms.T @ bright)
    direct = fit[1:]
    strength = float(np.linalg.norm(direct))
    towards = direct / max(strength, 1e-9)
    depth = max(-towards[2], 0.35)
    light_x, light_y = (float(np.clip(v / depth, -0.8, 0.8)) for v in towards[:2])
    skin = np.median(colours, axis=0)
    # Skin reflects between a tenth (very dark) and a half (very light) of the light: guess the light
    # between the two, and take its colour half from the skin, whose own tint is a mean human one.
    level = float(np.clip(skin.mean() / 0.42, 0.25, 0.95)) ** 0.75
    tint = skin / np.array([0.52, 0.33, 0.25])
    tint = ((tint / tint.mean()) ** 0.6).clip(0.82, 1.15)
    # Light may be warmer than white, seldom greener or bluer: pale skin only looks so.
    tint = np.minimum.accumulate(tint)
    gain = tuple(round(float(v), 4) for v in (level * tint) ** (1 / 2.2))
    look = MouthLook(
        light_x=round(light_x, 3),
        light_y=round(float(np.clip(light_y, -0.45, 0.1)), 3),
        ambient=round(float(np.clip(1 - strength / max(float(bright.mean()), 1e-6), 0.5, 0.8)), 3),
    )
    return (gain[0], gain[1], gain[2]), look
