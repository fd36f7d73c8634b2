"""A face that nobody owns: skin, eyes and lips drawn where the rig has its landmarks."""

from __future__ import annotations

import functools

import numpy as np

from streamdiff.avatar.bundle import LEFT_EYE, MOUTH, RIGHT_EYE, IdentityBundle
from streamdiff.avatar.identity import bundle_from_landmarks
from streamdiff.avatar.rig import load_rig

_LIPS = [61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291, 375, 321, 405, 314, 17, 84, 181, 91, 146]
_OVAL = [10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152]
_OVAL += [148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109]


def inside(polygon: np.ndarray, size: int) -> np.ndarray:
    """Which pixel centres of a square picture lie in a polygon, ``[size, size]``."""
    y, x = np.mgrid[:size, :size] + 0.5
    out = np.zeros((size, size), bool)
    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, 0), strict=True):
        with np.errstate(divide="ignore", invalid="ignore"):
            out ^= ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return out


def drawn_face(size: int = 320) -> tuple[np.ndarray, np.ndarray]:
    """Pixels ``[size, size, 3]`` and landmarks ``[478, 3]`` of a face in the middle of a picture."""
    rest = load_rig().rest_J3.astype(np.float64)
    scale = size * 0.5 / np.ptp(rest[:, 1])
    landmarks = np.zeros((478, 3), np.float32)
    landmarks[:468] = (rest - [0, rest[:, 1].mean(), rest[:, 2].mean()]) * scale + [size / 2, size / 2, 0]
    for first, eye in ((468, RIGHT_EYE), (473, LEFT_EYE)):
        landmarks[first : first + 5] = landmarks[[j for side in eye for j in side]].mean(0)
    y, x = np.mgrid[:size, :size]
    grain = np.random.default_rng(0).normal(0, 4, (size, size, 1))
    # A wall whose every pixel differs, so that any movement of it is seen.
    picture = np.stack([90 + 60 * np.sin(x / 9), 90 + 60 * np.sin(y / 7), 120 + 0 * x], -1)
    picture[inside(landmarks[_OVAL, :2], size)] = (196, 150, 126)
    picture[inside(landmarks[_LIPS, :2], size)] = (160, 84, 80)
    for first, (upper, lower) in ((468, RIGHT_EYE), (473, LEFT_EYE)):
        opening = inside(landmarks[[*upper, *lower[::-1]], :2], size)
        picture[opening] = (225, 222, 218)
        centre = landmarks[first, :2]
        iris = (x + 0.5 - centre[0]) ** 2 + (y + 0.5 - centre[1]) ** 2 < (0.55 * scale) ** 2
        picture[opening & iris] = (60, 45, 35)
    gap = inside(landmarks[[*MOUTH[0], *MOUTH[1][::-1]], :2], size)
    picture[gap] = (60, 25, 25)
    return np.clip(picture + grain, 0, 255).astype(np.uint8), landmarks


@functools.cache
def drawn_bundle(size: int = 256) -> IdentityBundle:
    """The bundle of the drawn face; the same object for every test of a run."""
    return bundle_from_landmarks(*drawn_face(), size, name="drawn")
