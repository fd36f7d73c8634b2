"""How good a motion model is: lips, head and blinks of performances that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamdiff.arrays import Floats
from streamdiff.avatar.cues import Cues
from streamdiff.avatar.kinematics import FPS, KinematicSpec
from streamdiff.avatar.motion import MotionStream
from streamdiff.avatar.style import STYLE_NAMES
from streamdiff.avatar.window import MotionModel
from streamdiff.training.avatar.performance import Performance


def evaluate(
    model: MotionModel, performances: Sequence[Performance], *, sigmas: Sequence[float] | None = None
) -> dict[str, float]:
    """Quality on performances that were not trained on, moved as streams: text ahead of time, and live sound."""
    facts: dict[str, list[float]] = {}
    for number, performance in enumerate(performances):
        spoken = performance.source == "spoken"
        ways = {"text": _Way(hop=8, ahead=None, heard=True, said=True)} if spoken else {}
        ways["live" if spoken else "real live"] = _Way(hop=1, ahead=2, heard=True, said=False)
        for name, way in ways.items():
            moved_AE = _moved(model, performance, way, seed=number, sigmas=sigmas)
            truth_AE = performance.motion_AE[: len(moved_AE)]
            found = {**_lips(moved_AE, truth_AE, model.spec), **_head(moved_AE, truth_AE, model.spec)}
            if way.hop > 1:
                borders = range(way.hop, len(moved_AE), way.hop)
                found["seam jerk ratio"] = seam_ratio(moved_AE, borders, model.spec)
            for measure, value in found.items():
                facts.setdefault(f"{name} {measure}", []).append(value)
    return {name: round(float(np.mean(values)), 4) for name, values in sorted(facts.items())}


@dataclass(frozen=True)
class _Way:
    """How a stream is fed: ``ahead`` frames of look-ahead, None: all of them; with sound, with phonemes, or both."""

    hop: int
    ahead: int | None
    heard: bool
    said: bool


def _lips(moved_AE: Floats, truth_AE: Floats, spec: KinematicSpec) -> dict[str, float]:
    lips, target = aperture(moved_AE, spec), aperture(truth_AE, spec)
    r, late = lag(lips, target)
    found = {"lips r": r, "lips lag": float(abs(late)), "lips gain": float(lips.std() / target.std())}
    for column in ("jawOpen", "mouthPucker", "mouthFunnel", "mouthPressLeft"):
        a, b = moved_AE[:, spec.index(column)], truth_AE[:, spec.index(column)]
        if b.std() > 0.01:
            found[f"{column} r"] = float(np.corrcoef(a, b)[0, 1])
    return found


def _head(moved_AE: Floats, truth_AE: Floats, spec: KinematicSpec) -> dict[str, float]:
    """How far, how fast and how jerkily the head moves beside the truth; how often it blinks."""
    rotation, truth = moved_AE[:, spec.part("rotation")], truth_AE[:, spec.part("rotation")]
    closed = moved_AE[:, spec.index("eyeBlinkLeft")] > 0.5
    jerk = np.abs(np.diff(rotation, n=3, axis=0)).mean()
    return {
        "head spread ratio": float(rotation.std() / truth.std()),
        "head speed ratio": float(np.diff(rotation, axis=0).std() / np.diff(truth, axis=0).std()),
        "blinks per minute": float((closed[1:] & ~closed[:-1]).sum() / (len(closed) / FPS / 60)),
        "head jerk ratio": float(jerk / np.abs(np.diff(truth, n=3, axis=0)).mean()),
    }


def _moved(
    model: MotionModel, performance: Performance, way: _Way, *, seed: int, sigmas: Sequence[float] | None
) -> Floats:
    """The performance as a stream would move it."""
    style: dict[str, float] = dict(zip(STYLE_NAMES, performance.style.tolist(), strict=True))
    stream = MotionStream(model, seed=seed, hop=way.hop, style=style, seam=4 if way.hop > 3 else 1, sigmas=sigmas)
    cues = performance.cues
    yes_A = np.ones(len(cues), np.bool_)
    cues = Cues(cues.mel_AF, cues.phones_AP, yes_A & way.heard, cues.said_A & way.said, cues.state_A)
    num_frames = len(cues) - model.config.lengths[0]
    shown: list[Tensor] = []
    pushed = 0
    for frame in range(num_frames):
        reach = len(cues) if way.ahead is None else frame + 1 + way.ahead
        stream.push(cues[slice(pushed, reach)])
        pushed = reach
        shown.append(stream.emit())
    return torch.stack(shown).numpy()


def aperture(motion_AE: Floats, spec: KinematicSpec) -> NDArray[np.floating[Any]]:
    """How far the lips are apart, in shapes: jaw and lips, less what closes them."""

    def column(name: str) -> Floats:
        return motion_AE[:, spec.index(name)]

    lips = (column("mouthLowerDownLeft") + column("mouthLowerDownRight") + column("mouthUpperUpLeft")) / 3
    return column("jawOpen") + 0.5 * lips - column("mouthClose") - 0.3 * column("mouthPressLeft")


def lag(a: NDArray[Any], b: NDArray[Any], reach: int = 6) -> tuple[float, int]:
    """Correlation at lag 0 and the lag in frames at which it peaks; positive: ``a`` comes later."""
    scores: dict[int, float] = {}
    for lag in range(-reach, reach + 1):
        x = a[max(0, lag) : len(a) + min(0, lag)]
        y = b[max(0, -lag) : len(b) + min(0, -lag)]
        scores[lag] = float(np.corrcoef(x, y)[0, 1])
    return scores[0], max(scores, key=scores.__getitem__)


def seam_ratio(motion_AE: Floats, borders: Sequence[int], spec: KinematicSpec) -> float:
    """Median jerk (third difference, in spreads) within two frames of a border over the median elsewhere."""
    moving = [i for i, s in enumerate(motion_AE.std(axis=0)) if s > 1e-3 and spec.names[i] != "headScale"]
    normal = motion_AE[:, moving] / motion_AE[:, moving].std(axis=0)
    jerk_A = np.abs(np.diff(normal, n=3, axis=0)).mean(axis=1)
    near = np.zeros(len(jerk_A), np.bool_)
    for border in borders:
        # Third difference i covers frames i .. i + 3.
        near[max(0, border - 3) : max(0, min(len(jerk_A), border + 1))] = True
    return float(np.median(jerk_A[near]) / np.median(jerk_A[~near]))
