"""Blendshape rig: 52 ARKit shapes as shifts of the landmarks of a 3D head.

Axes: J landmarks (468), E shapes, R triangles.
"""

from __future__ import annotations

import functools
import importlib.resources
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file

from streamdiff.arrays import Floats


@dataclass(frozen=True)
class Rig:
    """Blendshapes on landmarks: made from a 3D head by `streamdiff.training.avatar.rig`; cm, camera axes."""

    rest_J3: Floats
    """The 468 landmarks of the mesh at rest."""
    shapes_EJ3: Floats
    """What each ARKit shape adds at weight 1."""
    triangles_R3: NDArray[np.int64]
    """The landmarker's mesh."""


@functools.cache
def load_rig() -> Rig:
    """The rig that comes with the library."""
    path = importlib.resources.files("streamdiff") / "weights" / "landmark_rig.safetensors"
    with importlib.resources.as_file(path) as file:
        table = load_file(file)
    return Rig(
        table["rest_J3"].float().numpy(),
        table["shapes_EJ3"].float().numpy(),
        table["triangles_R3"].long().numpy(),
    )
