"""Blendshape rig: 52 ARKit shapes as shifts of the landmarks of a 3D head.

Axes: J landmarks (468), E shapes, R triangles.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file

from streamdiff.arrays import Floats
from streamdiff.packaged import packaged


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
    table = load_file(packaged("landmark_rig.safetensors"))
    return Rig(
        table["rest_J3"].float().numpy(),
        table["shapes_EJ3"].float().numpy(),
        table["triangles_R3"].long().numpy(),
    )
