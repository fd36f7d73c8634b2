"""How one person moves: a vector of named style values, and how it is measured on a clip.

Axes: A frames, E coefficients.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from streamdiff.arrays import Floats
from streamdiff.avatar.kinematics import FPS, KinematicSpec
from streamdiff.errors import ConfigError, InputError

STYLE_NAMES = (
    "articulation",
    "rounding",
    "spread",
    "lips",
    "smile",
    "head_x",
    "head_y",
    "head_z",
    "head_shift",
    "head_tempo",
    "brow",
    "brow_raise",
    "blink_depth",
    "squint",
    "asymmetry",
    "nod",
)
"""What a style vector says, in units in which 0 is ordinary and 1 is clearly more. See `measure_style`."""
MAX_STYLE = 3.0
"""How far a style value may lie from ordinary."""
_STYLE_ORDINARY: Mapping[str, tuple[float, float]] = {
    "articulation": (0.35, 0.1),
    "rounding": (0.33, 0.06),
    "spread": (0.2, 0.07),
    "lips": (0.25, 0.07),
    "smile": (0.09, 0.06),
    "head_x": (0.024, 0.012),
    "head_y": (0.042, 0.02),
    "head_z": (0.033, 0.015),
    "head_shift": (0.055, 0.025),
    "head_tempo": (1.9, 0.4),
    "brow": (0.05, 0.02),
    "brow_raise": (0.065, 0.05),
    "blink_depth": (0.93, 0.1),
    "squint": (0.1, 0.07),
    "asymmetry": (0.0, 0.08),
    "nod": (0.02, 0.02),
}
"""Ordinary value and unit of every style dimension, in the units of `style_statistics`."""


def style_vector(style: Mapping[str, float]) -> Floats:
    """Style values by name as the vector that the model reads.

    Raises:
        ConfigError: a name that is none of `STYLE_NAMES`, or a value outside -3..3.
    """
    unknown = sorted(set(style) - set(STYLE_NAMES))
    if unknown:
        raise ConfigError(f"no style {unknown[0]!r}; a style names {', '.join(STYLE_NAMES)}")
    for name, value in style.items():
        if not abs(value) <= MAX_STYLE:
            raise ConfigError(f"style {name} must lie in -{MAX_STYLE:g}..{MAX_STYLE:g}, got {value:g}")
    return np.array([style.get(name, 0.0) for name in STYLE_NAMES], np.float32)


def style_units(statistics: Mapping[str, float]) -> dict[str, float]:
    """Statistics of a clip in style units: 0 is ordinary."""
    return {
        name: (statistics[name] - ordinary) / unit
        for name, (ordinary, unit) in _STYLE_ORDINARY.items()
        if name in statistics
    }


def tempo_of(style: Mapping[str, float]) -> float:
    """How fast posture changes, as a factor."""
    return min(max(1.0 + 0.2 * style.get("head_tempo", 0.0), 0.5), 2.0)


def measure_style(motion_AE: Floats, spec: KinematicSpec) -> dict[str, float]:
    """The style of a clip of at least ten seconds, in the units of `STYLE_NAMES`: a person's motion profile.

    Nods cannot be told from other head movement afterwards and are left ordinary.
    """
    spec.check(motion_AE)
    if len(motion_AE) < 10 * FPS:
        raise InputError(f"a style is measured on at least 10 s of motion, got {len(motion_AE) / FPS:.1f} s")

    def column(name: str) -> Floats:
        return motion_AE[:, spec.index(name)]

    def pair(name: str) -> Floats:
        return motion_AE[:, spec.indices([name + "Left", name + "Right"])].mean(axis=1)

    def p95(values: Floats) -> float:
        return float(np.percentile(values, 95))

    rotation_A3 = motion_AE[:, spec.part("rotation")]
    moving = float(rotation_A3.std())
    tempo = float((np.diff(rotation_A3, axis=0) * FPS).std()) / moving if moving > 1e-4 else 1.5
    left, right = column("mouthLowerDownLeft"), column("mouthLowerDownRight")
    total = float((left + right).sum())
    shift_A2 = motion_AE[:, spec.part("translation")]
    brows = (column("browInnerUp") + pair("browOuterUp")) / 2
    blinks = np.sort(pair("eyeBlink"))[-max(4, len(motion_AE) // 100) :]
    statistics = {
        "articulation": p95(column("jawOpen")),
        "rounding": p95(motion_AE[:, spec.indices(["mouthPucker", "mouthFunnel"])].mean(axis=1)),
        "spread": p95(pair("mouthStretch")),
        "lips": p95(pair("mouthLowerDown")),
        "smile": float(np.median(pair("mouthSmile"))),
        "head_x": float(rotation_A3[:, 0].std()),
        "head_y": float(rotation_A3[:, 1].std()),
        "head_z": float(rotation_A3[:, 2].std()),
        "head_shift": float(np.sqrt(shift_A2.var(axis=0).mean())),
        "head_tempo": tempo,
        "brow": float(brows.std()),
        "brow_raise": float(np.median(brows)),
        "blink_depth": float(blinks.mean()),
        "squint": float(np.median(pair("eyeSquint"))),
        "asymmetry": float((left - right).sum() / total) if total > 1e-3 else 0.0,
    }
    return {name: float(np.clip(value, -3, 3)) for name, value in style_units(statistics).items()}
