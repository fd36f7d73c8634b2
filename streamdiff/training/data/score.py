"""The score of a clip: what a drawn face does, frame by frame, to a sound and an action.

Axes: T frames, E columns of truth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from streamdiff.arrays import Floats
from streamdiff.avatar.head3d import HeadModel
from streamdiff.training.data.articulation import articulation, mouth_weights, opening_cm
from streamdiff.training.data.clip import FPS, FRAME_SAMPLES, PROMPTS, TRUTH
from streamdiff.training.faces import Pose

_PLAIN_SHARE = 0.4


@dataclass(frozen=True, slots=True)
class Score:
    """What a face does during a clip, and in the photograph that goes with it."""

    poses: tuple[Pose, ...]
    photo: Pose
    action: str
    truth_TE: Floats


def compose(head: HeadModel, sound_S: Floats, generator: np.random.Generator, *, action: str | None = None,
            calm: bool = False) -> Score:  # fmt: skip
    """Move a head to a sound, calmly: it stays within two or three degrees, unless the action turns it.

    ``action``: a key of `PROMPTS`, or None to draw one; the clip may begin in another. ``calm``: the action holds from
    the first frame on.
    """
    num_frames = len(sound_S) // FRAME_SAMPLES
    weights = mouth_weights(articulation(sound_S))
    opening = opening_cm(head, weights)
    action, amount = _course(num_frames, generator, action, calm)
    tracks = _tracks(weights["jawOpen"], amount, generator)
    tracks |= {"opening_cm": opening, "round": weights["mouthPucker"], "badge": np.zeros(num_frames)}
    poses = tuple(_pose(weights, tracks, t) for t in range(num_frames))
    photo = Pose({}, np.array(generator.normal(0, 0.015, 3), np.float32), (0.0, 0.0))
    truth_TE = np.stack([tracks[name] for name in TRUTH], 1).astype(np.float32)
    return Score(poses, photo, action, truth_TE)


def _course(
    num_frames: int, generator: np.random.Generator, action: str | None, calm: bool
) -> tuple[str, Callable[[str], Floats]]:
    """The action of a clip, and how much of each action every frame shows."""
    names = tuple(PROMPTS)
    often = [_PLAIN_SHARE if name == "plain" else (1 - _PLAIN_SHARE) / (len(names) - 1) for name in names]
    action = names[int(generator.choice(len(names), p=often))] if action is None else action
    before = action if calm or generator.random() < 0.7 else names[int(generator.integers(len(names)))]
    change = _ramp(num_frames, float(generator.uniform(0.0, 36.0))) if before != action else np.ones(num_frames)

    def amount(name: str) -> Floats:
        return ((before == name) * (1 - change) + (action == name) * change).astype(np.float32)

    return action, amount


def _tracks(jaw_T: Floats, amount: Callable[[str], Floats], generator: np.random.Generator) -> dict[str, Floats]:
    """What head, eyes and brows do beside a mouth: most columns of the truth, and ``brows``, ``sway_x``, ``sway_y``."""
    num_frames = len(jaw_T)
    clock = np.arange(num_frames) / FPS
    beat = 2 * math.pi * (clock * float(generator.uniform(0.7, 0.9)) + float(generator.random()))
    stress = np.convolve(jaw_T, np.hanning(9) / np.hanning(9).sum(), mode="same")
    pitch = 0.02 * _wander(generator, num_frames, 0.3) + 0.05 * stress + 0.13 * np.sin(beat) * amount("nod")
    yaw = 0.035 * _wander(generator, num_frames, 0.2) + 0.20 * np.sin(beat) * amount("shake")
    yaw = yaw + 0.32 * amount("aside")
    return {
        "pitch": pitch,
        "yaw": yaw,
        "roll": 0.02 * _wander(generator, num_frames, 0.2),
        "gaze_x": np.round(0.7 * _wander(generator, num_frames, 0.4)) * 0.35 + 0.4 * amount("aside"),
        "gaze_y": np.round(0.5 * _wander(generator, num_frames, 0.3)) * 0.2,
        "blink": _blinks(generator, num_frames),
        "smile": 0.85 * amount("smile"),
        "hand": amount("hand"),
        "brows": np.clip(0.25 * stress / 0.3 + 0.15 * _wander(generator, num_frames, 0.4), 0, 0.8),
        "sway_x": 0.08 * _wander(generator, num_frames, 0.15),
        "sway_y": 0.08 * _wander(generator, num_frames, 0.15),
    }


def _pose(weights: Mapping[str, Floats], tracks: Mapping[str, Floats], t: int) -> Pose:
    """What is drawn in frame ``t``."""
    at = {name: float(track[t]) for name, track in tracks.items()}
    shapes = {name: float(track[t]) for name, track in weights.items()}
    shapes |= _eyes(at["gaze_x"], at["gaze_y"], at["blink"])
    shapes["browInnerUp"] = at["brows"]
    shapes["browOuterUpLeft"] = shapes["browOuterUpRight"] = 0.7 * at["brows"]
    for eye in ("Left", "Right"):
        shapes["mouthSmile" + eye] = at["smile"]
        shapes["cheekSquint" + eye] = 0.5 * at["smile"]
    turn = np.array([tracks[name][t] for name in ("pitch", "yaw", "roll")], np.float32)
    return Pose(shapes, turn, (at["sway_x"], at["sway_y"]), at["hand"])


def _eyes(x: float, y: float, blink: float) -> dict[str, float]:
    """Gaze to the right of the picture and up, in shapes; the head's left eye lies on the picture's right."""
    looks = {"eyeBlinkLeft": blink, "eyeBlinkRight": blink}
    toward, away = ("eyeLookOutLeft", "eyeLookInRight"), ("eyeLookInLeft", "eyeLookOutRight")
    for name in toward if x > 0 else away:
        looks[name] = abs(x)
    for name in ("eyeLookUpLeft", "eyeLookUpRight") if y > 0 else ("eyeLookDownLeft", "eyeLookDownRight"):
        looks[name] = abs(y)
    return looks


def _wander(generator: np.random.Generator, num_frames: int, corner_hz: float) -> Floats:
    """A smooth random walk around zero with unit spread."""
    keep = math.exp(-2 * math.pi * corner_hz / FPS)
    value = generator.standard_normal(2)
    track = np.empty(num_frames, np.float32)
    push = math.sqrt(1 - keep * keep)
    for t in range(num_frames):
        # Twice filtered, so that it has a speed.
        value[0] = keep * value[0] + push * generator.standard_normal()
        value[1] = keep * value[1] + (1 - keep**2) / math.sqrt(1 + keep**2) * value[0]
        track[t] = value[1]
    return track


def _blinks(generator: np.random.Generator, num_frames: int) -> Floats:
    track = np.zeros(num_frames + 8, np.float32)
    at = float(generator.exponential(60.0))
    while at < num_frames:
        first = int(at)
        for offset, amount in enumerate((0.4, 1.0, 1.0, 0.6, 0.2)):
            if first + offset < len(track):
                track[first + offset] = max(track[first + offset], amount)
        at += 25.0 + float(generator.exponential(65.0))
    return track[:num_frames]


def _ramp(num_frames: int, at: float, length: float = 12.0) -> Floats:
    """0 before ``at``, 1 from ``length`` frames later on, smooth between."""
    share = np.clip((np.arange(num_frames) - at) / length, 0, 1)
    return (share * share * (3 - 2 * share)).astype(np.float32)
