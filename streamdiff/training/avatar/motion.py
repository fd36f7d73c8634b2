"""Train the motion model: data made and read here, flow matching, then consistency to two steps.

    python -m streamdiff.training.avatar.motion --out motion.safetensors [--data facegood_audio2rig.npz] [--minutes 45]

What is learned from:

* speech of `HibariVoice` with known phoneme times, in many pitches and throats; the mouth by dominance functions
  (Cohen and Massaro 1993) over viseme targets, opened by loudness;
* with ``--data``: 656 s of real speech with the face that spoke it (FACEGOOD-Audio2Face, MIT), mapped to ARKit names;
* head, brows, lids and eyes as random processes with the spreads, speeds, correlations and intervals that were
  measured on 200 s of a person in conversation (`streamdiff.avatar.intent.HEAD_STD`), tied to stress, state and gaze.

One thread; a checkpoint every two minutes; started again with the same ``--out`` it goes on. The clips are kept there.
Axes as in `streamdiff.avatar.window`; T visits of the clock of 100 Hz.
"""

# The phonetic alphabet is meant, and lists of sentences read best as text.
# ruff: noqa: RUF001, SIM905

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamdiff import rng
from streamdiff.arrays import Floats
from streamdiff.avatar.cues import FRAME_SAMPLES, NUM_MEL, Cues, State
from streamdiff.avatar.intent import HEAD_STD, Intent
from streamdiff.avatar.kinematics import FPS, KinematicSpec, arkit64, gaze_to_looks
from streamdiff.avatar.motion import MotionStream
from streamdiff.avatar.style import STYLE_NAMES, measure_style, style_vector
from streamdiff.avatar.window import MotionConfig, MotionModel, save_motion
from streamdiff.errors import CheckpointError, InputError
from streamdiff.voice import PAUSES, RATE_HZ, HibariVoice, Phoneme, Resampler

logger = logging.getLogger(__name__)

_CLOCK_HZ = 100

_CALM = 0.5
"""A portrait moves less than a person in a chair: the ordinary style halves the measured spread."""


# --- what the mouth does

_PAIRED = {
    "smile": "mouthSmile",
    "stretch": "mouthStretch",
    "dimple": "mouthDimple",
    "press": "mouthPress",
    "lower": "mouthLowerDown",
    "upper": "mouthUpperUp",
}
_SINGLE = {
    "jaw": "jawOpen",
    "forward": "jawForward",
    "pucker": "mouthPucker",
    "funnel": "mouthFunnel",
    "close": "mouthClose",
    "roll_lower": "mouthRollLower",
    "roll_upper": "mouthRollUpper",
    "shrug_upper": "mouthShrugUpper",
    "shrug_lower": "mouthShrugLower",
    "tongue": "tongueOut",
}
_SHAPES = (*_SINGLE, *_PAIRED)
_GROUPS: Mapping[str, tuple[str, ...]] = {
    "jaw": ("jaw", "forward"),
    "round": ("pucker", "funnel"),
    "spread": ("smile", "stretch", "dimple"),
    "seal": ("sealed", "press", "roll_lower", "roll_upper"),
    "lift": ("lower", "upper", "shrug_upper", "shrug_lower"),
    "tongue": ("tongue",),
}
_REACH_S: Mapping[str, tuple[float, float]] = {
    "jaw": (0.045, 0.050),
    "round": (0.100, 0.075),
    "spread": (0.075, 0.065),
    "seal": (0.022, 0.024),
    "lift": (0.040, 0.045),
    "tongue": (0.035, 0.035),
}
"""How far a phoneme's pull reaches before and after it, per group: rounding is prepared early, a seal is sudden."""


@dataclass(frozen=True)
class Viseme:
    """Target of each shape and how strongly each group insists on its target."""

    targets: Mapping[str, float]
    insists: Mapping[str, float]


def _v(insists: Mapping[str, float], **targets: float) -> Viseme:
    return Viseme(targets, insists)


_VOWEL = {"jaw": 1.0, "round": 1.0, "spread": 0.7, "seal": 1.0, "lift": 0.8, "tongue": 0.6}
_ROUND = {**_VOWEL, "round": 1.6}
_SEAL = {"jaw": 1.2, "round": 0.1, "spread": 0.2, "seal": 5.0, "lift": 3.0, "tongue": 1.0}
_LIP = {"jaw": 1.2, "round": 0.4, "spread": 0.3, "seal": 4.0, "lift": 4.0, "tongue": 1.0}
_HISS = {"jaw": 1.8, "round": 0.35, "spread": 0.6, "seal": 1.0, "lift": 0.9, "tongue": 0.8}
_HUSH = {"jaw": 1.6, "round": 1.6, "spread": 0.8, "seal": 1.0, "lift": 1.0, "tongue": 0.8}
_TIP = {"jaw": 0.7, "round": 0.12, "spread": 0.15, "seal": 0.8, "lift": 0.4, "tongue": 0.8}
_BACK = {"jaw": 0.5, "round": 0.08, "spread": 0.1, "seal": 0.7, "lift": 0.25, "tongue": 0.6}
_GLIDE = {"jaw": 1.0, "round": 2.2, "spread": 0.6, "seal": 1.0, "lift": 0.8, "tongue": 0.6}
_WEAK = {"jaw": 0.1, "round": 0.04, "spread": 0.04, "seal": 0.3, "lift": 0.08, "tongue": 0.3}
_REST = {"jaw": 0.7, "round": 0.5, "spread": 0.5, "seal": 0.5, "lift": 0.6, "tongue": 0.6}

_VISEMES: Mapping[str, Viseme] = {
    "ɑ": _v(_VOWEL, jaw=0.64, lower=0.30, upper=0.08),
    "a": _v(_VOWEL, jaw=0.62, lower=0.32, upper=0.10),
    "æ": _v(_VOWEL, jaw=0.54, lower=0.38, upper=0.18, stretch=0.22, smile=0.14),
    "ʌ": _v(_VOWEL, jaw=0.44, lower=0.24, upper=0.06),
    "ɔ": _v(_ROUND, jaw=0.50, lower=0.18, funnel=0.42, pucker=0.18),
    "ɒ": _v(_ROUND, jaw=0.54, lower=0.18, funnel=0.32, pucker=0.10),
    "o": _v(_ROUND, jaw=0.38, lower=0.14, funnel=0.42, pucker=0.35),
    "ɛ": _v(_VOWEL, jaw=0.40, lower=0.32, upper=0.13, stretch=0.18, smile=0.12),
    "e": _v(_VOWEL, jaw=0.30, lower=0.28, upper=0.12, stretch=0.22, smile=0.18),
    "ɪ": _v(_VOWEL, jaw=0.25, lower=0.24, upper=0.10, stretch=0.16, smile=0.16),
    "i": _v(_VOWEL, jaw=0.17, lower=0.24, upper=0.12, stretch=0.30, smile=0.28, dimple=0.10),
    "ʊ": _v(_ROUND, jaw=0.22, lower=0.10, funnel=0.34, pucker=0.42),
    "u": _v(_ROUND, jaw=0.14, lower=0.06, funnel=0.30, pucker=0.72),
    "ə": _v({**_VOWEL, "jaw": 0.6, "lift": 0.5, "round": 0.3, "spread": 0.3}, jaw=0.24, lower=0.16, upper=0.04),
    "ɜ": _v(_ROUND, jaw=0.26, lower=0.16, funnel=0.32, pucker=0.20),
    "p": _v(_SEAL, jaw=0.05, sealed=1.0, press=0.42, roll_lower=0.28, roll_upper=0.18),
    "m": _v(_SEAL, jaw=0.06, sealed=1.0, press=0.34, roll_lower=0.22, roll_upper=0.14),
    "f": _v(_LIP, jaw=0.09, sealed=0.5, roll_lower=0.55, upper=0.24, shrug_lower=0.12, lower=0.04),
    "w": _v(_GLIDE, jaw=0.10, funnel=0.22, pucker=0.78, lower=0.03),
    "ɹ": _v({**_GLIDE, "round": 1.1}, jaw=0.18, funnel=0.38, pucker=0.28, lower=0.14),
    "ʃ": _v(_HUSH, jaw=0.10, forward=0.14, funnel=0.58, pucker=0.22, lower=0.24, upper=0.16),
    "s": _v(_HISS, jaw=0.06, forward=0.08, lower=0.28, upper=0.12, stretch=0.20, smile=0.12),
    "t": _v(_TIP, jaw=0.12, lower=0.20, upper=0.06, stretch=0.06),
    "l": _v(_TIP, jaw=0.22, lower=0.20, upper=0.06, tongue=0.06),
    "θ": _v({**_TIP, "tongue": 3.0, "jaw": 1.2, "lift": 1.0}, jaw=0.16, lower=0.24, upper=0.08, tongue=0.32),
    "k": _v(_BACK, jaw=0.22, lower=0.16),
    "h": _v(_WEAK, jaw=0.25, lower=0.14),
    "pause": _v(_REST, jaw=0.01, press=0.03),
    "": _v(dict.fromkeys(_GROUPS, 1.0), jaw=0.0),
}
_LIKE = {
    "ɐ": "ʌ", "ᵊ": "ə", "ᵻ": "ɪ", "ɚ": "ɜ", "b": "p", "v": "f", "ʒ": "ʃ", "ʧ": "ʃ", "ʤ": "ʃ", "z": "s", "ʦ": "s",
    "d": "t", "n": "t", "T": "t", "ɾ": "t", "ð": "θ", "ɡ": "k", "ŋ": "k", "x": "k", "j": "i", "ʔ": "h",
}  # fmt: skip
_GLIDES = {
    "A": ("e", "ɪ"),
    "I": ("a", "ɪ"),
    "O": ("o", "u"),
    "Q": ("ə", "u"),
    "W": ("a", "ʊ"),
    "Y": ("ɔ", "ɪ"),
}


def _elementary(phonemes: Sequence[Phoneme]) -> Iterator[tuple[Viseme, float, float]]:
    for symbol, start_s, end_s in phonemes:
        if symbol in _GLIDES:
            middle_s = start_s + 0.55 * (end_s - start_s)
            first, second = _GLIDES[symbol]
            yield _VISEMES[first], start_s, middle_s
            yield _VISEMES[second], middle_s, end_s
        elif symbol and symbol in PAUSES:
            yield _VISEMES["pause"], start_s, end_s
        else:
            symbol = _LIKE.get(symbol, symbol)
            yield _VISEMES.get(symbol, _VISEMES["h"]), start_s, end_s


def articulate(phonemes: Sequence[Phoneme], num_frames: int, loudness_T: Floats) -> dict[str, Floats]:
    """The mouth that says these phonemes: every shape ``[A]``, 0..1.

    Each phoneme pulls towards its targets with a strength that is constant inside it and falls exponentially around
    it; a shape is the mean of all targets, weighted by the pulls (Cohen and Massaro 1993). Computed at 100 Hz.

    Args:
        phonemes: with times from the start of frame 0.
        loudness_T: about 1 where the speech is as loud as it usually is, at 100 Hz.
    """
    num_visits = num_frames * _CLOCK_HZ // FPS
    at_T = (np.arange(num_visits) + 0.5) / _CLOCK_HZ
    parts = list(_elementary(phonemes))
    starts = np.array([start for _, start, _ in parts])[:, None]
    ends = np.array([end for _, _, end in parts])[:, None]
    inset = 0.2 * (ends - starts)
    before = np.maximum(0.0, starts + inset - at_T)
    after = np.maximum(0.0, at_T - (ends - inset))
    shapes: dict[str, Floats] = {}
    for group, members in _GROUPS.items():
        reach_before, reach_after = _REACH_S[group]
        insists = np.array([viseme.insists[group] for viseme, _, _ in parts])[:, None]
        pull = insists * np.exp(-before / reach_before - after / reach_after)
        total_T = pull.sum(axis=0) + 0.02
        for shape in members:
            targets = np.array([viseme.targets.get(shape, 0.0) for viseme, _, _ in parts])
            shapes[shape] = (targets @ pull / total_T).astype(np.float32)
    open_T = np.clip(0.55 + 0.45 * loudness_T, 0.5, 1.2)
    for shape in ("jaw", "lower", "upper"):
        shapes[shape] *= open_T
    # The jaw hardly rises for a closure between vowels: it is the lips that meet, however low it hangs.
    sealed_T = shapes.pop("sealed")
    shapes["close"] = sealed_T * shapes["jaw"]
    for shape in ("lower", "upper"):
        shapes[shape] *= 1.0 - 0.9 * sealed_T
    return {name: shape.reshape(num_frames, -1).mean(axis=1) for name, shape in shapes.items()}


def loudness(samples_S: Floats) -> Floats:
    """Loudness at 100 Hz over its usual value in this sound: 0 silent, 1 usual, at most 1.5."""
    hop = RATE_HZ // _CLOCK_HZ
    power = (samples_S[: len(samples_S) // hop * hop].reshape(-1, hop) ** 2).mean(axis=1)
    kernel = np.hanning(15)
    power = np.convolve(power, kernel / kernel.sum(), mode="same")
    usual = np.percentile(power[power > power.max(initial=0.0) * 1e-3], 75) if power.max(initial=0.0) > 0 else 1.0
    decibel = 10 * np.log10(power / usual + 1e-6)
    return np.clip(1.0 + decibel / 25.0, 0.0, 1.5).astype(np.float32)


_RIG: Mapping[str, Mapping[str, float]] = {
    "jawOpen": {"mouth_stretch_c": 1.0, "mouth_oh_c": 0.35},
    "mouthFunnel": {"mouth_funnel": 0.9, "mouth_oh_c": 0.45},
    "mouthPucker": {"mouth_pucker": 0.9, "mouth_oo_c": 0.7},
    "mouthLowerDown": {"mouth_lowerLipDepress": 1.1},
    "mouthUpperUp": {"mouth_upperLipRaise": 1.1},
    "mouthSmile": {"mouth_lipCornerPull": 1.2},
    "mouthStretch": {"mouth_lipStretch": 1.0},
    "mouthPress": {"mouth_press": 1.0},
    "mouthRollLower": {"mouth_suck_d": 1.0},
    "mouthRollUpper": {"mouth_suck_u": 1.0},
    "mouthShrugUpper": {"mouth_chinRaise_u": 1.0},
}
"""FACEGOOD's rig in ARKit names; twins of the rig (left and right, upper and lower) are averaged or kept by side."""


def rig_to_arkit(weights_AR: Floats, rig_names: Sequence[str], spec: KinematicSpec) -> Floats:
    """FACEGOOD rig weights as coefficients; what the rig does not say stays at rest."""
    index = {name: i for i, name in enumerate(rig_names)}
    out_AE = np.tile(spec.rest_E, (len(weights_AR), 1))

    def value(stem: str, side: str) -> Floats:
        exact = [i for name, i in index.items() if name == stem]
        sided = [i for name, i in index.items() if name.startswith(stem + "_") and name.endswith(side)]
        either = [i for name, i in index.items() if name.startswith(stem)]
        chosen = exact or sided or either
        if not chosen:
            raise InputError(f"the rig has no column {stem!r}; is this FACEGOOD's rig?")
        return weights_AR[:, chosen].mean(axis=1)

    for shape, parts in _RIG.items():
        for side, ending in (("Left", "l"), ("Right", "r"), ("", "")):
            name = shape + side
            if spec.has(name):
                total = sum((gain * value(stem, ending) for stem, gain in parts.items()), np.zeros(len(weights_AR)))
                out_AE[:, spec.index(name)] = np.clip(total, 0.0, 1.0)
    return out_AE


# --- what the rest of the face does


def _process(generator: np.random.Generator, num_frames: int, corner_hz: float) -> Floats:
    """A smooth stationary Gaussian process of unit spread: white noise through a critically damped filter."""
    length = num_frames + 16 * FPS
    noise = np.fft.rfft(generator.standard_normal(length))
    hz = np.fft.rfftfreq(length, 1 / FPS)
    gain = 1.0 / (1.0 + (hz / corner_hz) ** 2)
    gain[0] = 0.0
    # The spread of the process, not of this piece of it: a quiet minute may be quiet.
    scale = math.sqrt(float(2 * (gain**2).sum()) / length)
    return (np.fft.irfft(noise * gain, length)[:num_frames] / scale).astype(np.float32)


def _pulse(length: int) -> Floats:
    return np.hanning(length + 2)[1:-1].astype(np.float32)


def _add(track_A: Floats, at: int, shape: Floats, size: float) -> None:
    stop = min(len(track_A), at + len(shape))
    if at < stop:
        track_A[at:stop] += size * shape[: stop - at]


@dataclass
class _Manner:
    """How the person of one clip moves; drawn once per clip."""

    jaw: float
    round: float
    spread: float
    lips: float
    smile: float
    head: Floats
    shift: float
    tempo: float
    brow: float
    brow_raise: float
    blink: float
    squint: float
    asymmetry: float
    nod: float

    @staticmethod
    def draw(generator: np.random.Generator) -> _Manner:
        def around(spread: float) -> float:
            return float(np.exp(spread * generator.standard_normal()))

        return _Manner(
            jaw=float(np.clip(around(0.25), 0.5, 1.6)),
            round=float(np.clip(around(0.2), 0.5, 1.5)),
            spread=float(np.clip(around(0.3), 0.4, 1.8)),
            lips=float(np.clip(around(0.25), 0.5, 1.6)),
            smile=float(abs(generator.normal(0.03, 0.09))),
            head=(_CALM * around(0.35) * np.exp(0.2 * generator.standard_normal(3))).astype(np.float32),
            shift=_CALM * around(0.4),
            tempo=float(np.clip(around(0.25), 0.5, 1.6)),
            brow=around(0.4),
            brow_raise=float(abs(generator.normal(0.02, 0.06))),
            blink=float(np.clip(generator.normal(0.93, 0.08), 0.6, 1.0)),
            squint=float(abs(generator.normal(0.05, 0.07))),
            asymmetry=float(generator.normal(0.0, 0.07)),
            nod=float(0.02 * around(0.5)),
        )


def _perform(
    mouth: Mapping[str, Floats],
    state_A: NDArray[np.int8],
    stress_A: Floats,
    intent_AI: Floats,
    manner: _Manner,
    generator: np.random.Generator,
    spec: KinematicSpec,
) -> Floats:
    """A whole face: the mouth as given, everything else drawn to go with it."""
    num_frames = len(state_A)
    motion_AE = np.tile(spec.rest_E, (num_frames, 1))

    def put(name: str, value: Floats) -> None:
        motion_AE[:, spec.index(name)] += value

    def put_both(stem: str, value: Floats, lean: float = 0.0) -> None:
        put(stem + "Left", value * (1 + lean))
        put(stem + "Right", value * (1 - lean))

    gains = {"jaw": manner.jaw, "pucker": manner.round, "funnel": manner.round, "lower": manner.lips}
    gains |= {"upper": manner.lips, "smile": manner.spread, "stretch": manner.spread, "dimple": manner.spread}
    for shape in _SHAPES:
        value_A = mouth[shape] * gains.get(shape, 1.0)
        if shape in _PAIRED:
            put_both(_PAIRED[shape], value_A, manner.asymmetry)
        else:
            put(_SINGLE[shape], value_A)

    # Activity follows the state with a third of a second of inertia.
    wanted = np.array([0.45, 0.6, 1.0], np.float32)[state_A]
    kernel = _pulse(17)
    active_A = np.convolve(np.pad(wanted, 8, mode="edge"), kernel / kernel.sum(), mode="valid")

    # Head: held as intended, livelier while speaking, and never quite still.
    posture_8A = intent_AI[:, 3:].T
    restless = np.stack([_process(generator, num_frames, 0.8) for _ in HEAD_STD])
    head_5A = (posture_8A[:5] + 0.12 * restless) * np.array(HEAD_STD)[:, None]
    head_5A = head_5A * (0.55 + 0.45 * active_A)
    rotation_A3 = (head_5A[:3] * manner.head[:, None]).T.astype(np.float32)
    shift_A2 = (head_5A[3:] * manner.shift).T.astype(np.float32)
    breath = 0.006 * np.sin(2 * np.pi * (0.25 * np.arange(num_frames) / FPS + generator.random()))
    shift_A2[:, 1] += breath
    nods_A = np.zeros(num_frames, np.float32)
    raise_A = np.zeros(num_frames, np.float32)
    for at in np.flatnonzero(stress_A > 0).tolist():
        chance = generator.random(2)
        size = float(stress_A[at])
        if chance[0] < 0.35:
            _add(nods_A, max(0, at - 2), _pulse(9), size * manner.nod * float(generator.uniform(0.5, 1.8)))
        if chance[1] < 0.16:
            _add(raise_A, max(0, at - 3), _pulse(14), size * float(generator.uniform(0.12, 0.34)) * manner.brow)
    at = 0
    while at < num_frames:
        at += int(generator.uniform(2.5, 8.0) * FPS)
        if at < num_frames and state_A[at] == State.LISTENING:
            cycles = int(generator.integers(1, 4))
            for i in range(cycles):
                size = manner.nod * float(generator.uniform(1.0, 2.2)) * 0.8**i
                _add(nods_A, at + 11 * i, _pulse(11), size)
    rotation_A3[:, 0] += nods_A
    motion_AE[:, spec.part("rotation")] = rotation_A3
    motion_AE[:, spec.part("translation")] = shift_A2
    put("headScale", 0.012 * manner.shift * -posture_8A[4])

    # Brows.
    drift_A = 0.05 * manner.brow * posture_8A[5] * (0.5 + 0.5 * active_A)
    brow_A = np.maximum(0.0, manner.brow_raise + drift_A) + raise_A
    put("browInnerUp", 0.8 * brow_A)
    put_both("browOuterUp", brow_A, 0.5 * manner.asymmetry)
    frown_A = np.maximum(0.0, 0.05 * manner.brow * (-posture_8A[5] - 0.3))
    put_both("browDown", frown_A)

    # Eyes: fixed on the camera or on what the intent looks at, whatever the head does.
    gaze_A2 = intent_AI[:, 1:3].copy()
    gaze_A2[:, 0] += 0.9 * rotation_A3[:, 1]
    gaze_A2[:, 1] -= 0.9 * rotation_A3[:, 0]
    # A saccade lasts about one frame.
    gaze_A2[1:] = 0.75 * gaze_A2[1:] + 0.25 * gaze_A2[:-1]
    gaze_A4 = np.concatenate([gaze_A2, gaze_A2], axis=1).astype(np.float32)
    motion_AE[:, spec.part("gaze")] = gaze_A4
    for name, value_A in gaze_to_looks(gaze_A4).items():
        put(name, value_A)
    closed_A = intent_AI[:, 0] * manner.blink
    lower_lid_A = 0.35 * np.clip(gaze_A2[:, 1] / 0.35, 0, 1)
    put_both("eyeBlink", np.maximum(closed_A, lower_lid_A))
    squint_A = np.maximum(0.0, manner.squint + 0.03 * posture_8A[6]) + 0.12 * closed_A
    smile_A = np.maximum(0.0, manner.smile + 0.03 * posture_8A[7])
    put_both("eyeSquint", squint_A + 0.25 * smile_A)
    put_both("cheekSquint", 0.5 * smile_A)
    put_both("mouthSmile", smile_A, manner.asymmetry)
    put_both("browDown", 0.06 * closed_A)
    put_both("eyeWide", 0.35 * np.maximum(0.0, brow_A - 0.08))
    put_both("noseSneer", 0.2 * mouth["upper"])
    quiet_A = np.clip(1.6 - 1.6 * active_A, 0.0, 1.0)
    put_both("mouthPress", np.maximum(0.0, 0.03 * _process(generator, num_frames, 0.3)) * quiet_A)
    put("mouthShrugLower", np.maximum(0.0, 0.02 * _process(generator, num_frames, 0.3)))
    return spec.clamp(motion_AE.astype(np.float32))


# --- clips


@dataclass
class Clip:
    """A minute of one person: everything the model reads, and the face it should show."""

    cues: Cues
    intent_AI: Floats
    motion_AE: Floats
    style: Floats
    source: str


_SUBJECTS = (
    "the old captain|my younger brother|our neighbour|a tall woman|the whole team|every student|nobody here|"
    "the small brown dog|her best friend|the engineer|a careful reader|the morning train|this machine|my voice|"
    "the weather|their garden|the blue boat|another customer|his father|the music"
).split("|")
_VERBS = (
    "found|watched|carried|painted|remembered|changed|followed|opened|described|forgot|measured|believed|pushed|"
    "borrowed|noticed|finished|brought|chose|heard|washed"
).split("|")
_OBJECTS = (
    "a box of fresh fish|the first page of the book|some very good coffee|the bridge over the river|"
    "five or six questions|a map of the village|the heavy wooden door|those purple flowers|a quiet song|"
    "the bottom shelf|three thousand miles|both of the pictures|an unusual shape|fifty pounds of sugar|"
    "the theory behind it|a warm pair of gloves|the judge and the jury|what you said before|"
    "the shape of the valley|a joke about Washington"
).split("|")
_ENDINGS = (
    "before lunch|in the middle of the night|without a word|because it was raining|and then went home|"
    "for the second time|with a big smile|as far as I know|at half past four|near the old mill|very slowly|"
    "on the way to school|after all these years|if nobody minds|in nineteen eighty seven|just above the water"
).split("|")
_PHRASES = (
    "Hello there!|Yes, of course.|I am not sure about that.|Thank you very much.|What do you think?|Well, let me see.|"
    "How are you today?|That sounds wonderful!|Oh no, not again.|Please wait a moment.|Could you say that once more?|"
    "Good morning, everybody.|Nice to meet you.|Let me show you how it works.|Why not?|Absolutely!"
).split("|")


def sentence(generator: np.random.Generator, words: Sequence[str]) -> str:
    """A sentence of a small grammar; some nouns are drawn from ``words`` for the sake of rare sounds."""

    def pick(options: Sequence[str]) -> str:
        return options[int(generator.integers(len(options)))]

    kind = generator.random()
    if kind < 0.2:
        return pick(_PHRASES)
    thing = pick(_OBJECTS) if generator.random() < 0.6 else f"the {pick(words)} {pick(words)}"
    body = f"{pick(_SUBJECTS)} {pick(_VERBS)} {thing}"
    if generator.random() < 0.6:
        body += ("," if generator.random() < 0.3 else "") + " " + pick(_ENDINGS)
    end = "." if kind < 0.75 else "!" if kind < 0.85 else "?"
    return body[0].upper() + body[1:] + end


def lexicon_words() -> list[str]:
    """Ordinary words that the voice knows how to read, sorted."""
    import gzip

    import hibari

    path = Path(str(hibari.__file__)).parent / "assets" / "lexicon_us_gold.json.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        entries = json.load(file)
    return sorted(w for w in entries if w.isascii() and w.isalpha() and w.islower() and 4 <= len(w) <= 10)


def _stress(phonemes: Sequence[Phoneme], num_frames: int, loud_T: Floats) -> Floats:
    """Emphasis of the frame in which a long vowel begins; 0 elsewhere."""
    stress_A = np.zeros(num_frames, np.float32)
    for symbol, start_s, end_s in phonemes:
        if symbol in "ɑæʌɔɛɪiʊuɜAIOQWY" and symbol and end_s - start_s >= 0.1:
            at = int(start_s * FPS)
            visit = min(len(loud_T) - 1, int((start_s + end_s) / 2 * _CLOCK_HZ))
            if 0 <= at < num_frames and visit >= 0:
                stress_A[at] = max(float(stress_A[at]), float(loud_T[visit]))
    return stress_A


def spoken_clip(voice: HibariVoice, number: int, *, seed: int, words: Sequence[str], seconds: float = 50.0) -> Clip:
    """A conversation of which we hear one side: idle, speaking and listening by turns."""
    spec = arkit64()
    generator = np.random.default_rng(rng.seed_of("clip", seed, number))
    manner = _Manner.draw(generator)
    voice.pitch = float(np.clip(np.exp(generator.normal(-0.1, 0.32)), 0.45, 1.8))
    voice.tract = float(np.clip(voice.pitch**0.25 * np.exp(0.06 * generator.standard_normal()), 0.78, 1.25))
    voice.speed = float(np.clip(np.exp(generator.normal(0.0, 0.15)), 0.7, 1.5))

    sound: list[Floats] = []
    phonemes: list[Phoneme] = []
    states: list[NDArray[np.int8]] = []
    said: list[tuple[int, int, list[Phoneme], Floats]] = []
    frames = 0
    while frames < seconds * FPS:
        quiet = int(generator.uniform(0.3, 3.5) * FPS)
        state = State.IDLE if generator.random() < 0.5 else State.LISTENING
        states.append(np.full(quiet, int(state), np.int8))
        sound.append(np.zeros(quiet * FRAME_SAMPLES, np.float32))
        frames += quiet
        text = " ".join(sentence(generator, words) for _ in range(int(generator.integers(1, 5))))
        start_s = frames / FPS
        parts: list[Floats] = []
        turn: list[Phoneme] = []
        offset_s = 0.0
        for chunk in voice.speak(text):
            turn += [Phoneme(s, offset_s + a, offset_s + b) for s, a, b in chunk.phonemes or ()]
            parts.append(chunk.samples_S)
            offset_s += chunk.duration_s
        samples_S = np.concatenate(parts)
        length = -(-len(samples_S) // FRAME_SAMPLES)
        samples_S = np.pad(samples_S, (0, length * FRAME_SAMPLES - len(samples_S)))
        phonemes += [Phoneme(s, start_s + a, start_s + b) for s, a, b in turn]
        said.append((frames, length, turn, loudness(samples_S)))
        sound.append(samples_S)
        states.append(np.full(length, int(State.SPEAKING), np.int8))
        frames += length
    state_A = np.concatenate(states)
    samples_S = np.concatenate(sound)
    loud_T = np.zeros(frames * _CLOCK_HZ // FPS, np.float32)
    stress_A = np.zeros(frames, np.float32)
    for first, length, turn, turn_T in said:
        loud_T[first * 4 : first * 4 + len(turn_T)] = turn_T
        stress_A[first : first + length] = _stress(turn, length, turn_T)
    # Silence between the turns pulls the mouth shut, as a pause does.
    gaps = [Phoneme("", a, b) for a, b in _between(phonemes, frames / FPS)]
    mouth = articulate(sorted([*phonemes, *gaps], key=lambda p: p.start_s), frames, loud_T)
    intent_AI = Intent(rng.seed_of("clip-intent", seed), number, tempo=manner.tempo).rows(0, frames)
    motion_AE = _perform(mouth, state_A, stress_A, intent_AI, manner, generator, spec)
    heard = Cues.sound(samples_S, phonemes, before_S=np.zeros(FRAME_SAMPLES, np.float32))
    cues = Cues(heard.mel_AF, heard.phones_AP, heard.heard_A, heard.said_A, state_A)
    return Clip(cues, intent_AI, motion_AE, _style(motion_AE, manner, spec), "spoken")


def _between(phonemes: Sequence[Phoneme], end_s: float) -> list[tuple[float, float]]:
    gaps, at = [], 0.0
    for phoneme in phonemes:
        if phoneme.start_s > at + 0.08:
            gaps.append((at, phoneme.start_s))
        at = max(at, phoneme.end_s)
    return [*gaps, (at, end_s)] if end_s > at + 0.08 else gaps


def _style(motion_AE: Floats, manner: _Manner, spec: KinematicSpec) -> Floats:
    measured = measure_style(motion_AE, spec)
    return style_vector({**measured, "nod": (manner.nod - 0.02) / 0.02, "head_tempo": (manner.tempo - 1.0) / 0.2})


def real_clips(path: str | Path, *, seed: int, num_manners: int = 4) -> list[Clip]:
    """FACEGOOD takes at 25 frames per second, each with several upper faces drawn to go with it.

    Raises:
        InputError: a file without FACEGOOD's arrays.
    """
    spec = arkit64()
    clips: list[Clip] = []
    try:
        data = np.load(path)
        rig_names = [str(name) for name in data["rig_names"]]
        takes = sorted(name[len("audio_") :] for name in data.files if name.startswith("audio_"))
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path} is not the packed FACEGOOD data: {error}") from error
    for number, take in enumerate(takes):
        sound_S = data[f"audio_{take}"].astype(np.float32) / 32768
        resampler = Resampler(16_000)
        samples_S = np.concatenate([resampler.push(sound_S), resampler.finish()])
        samples_S *= 0.35 / max(1e-3, float(np.percentile(np.abs(samples_S), 99.9)))
        weights_AR = data[f"weights_{take}"].astype(np.float32)
        frames = min(len(samples_S) // FRAME_SAMPLES, int(len(weights_AR) / 30 * FPS))
        samples_S = samples_S[: frames * FRAME_SAMPLES]
        rig_AE = rig_to_arkit(weights_AR, rig_names, spec)
        # The rig's frame k stands for the middle of its own thirtieth of a second.
        source_s = (np.arange(len(rig_AE)) + 0.5) / 30
        at_s = (np.arange(frames) + 0.5) / FPS
        mouth_AE = np.stack([np.interp(at_s, source_s, column) for column in rig_AE.T], axis=1).astype(np.float32)
        heard = Cues.sound(samples_S, None, before_S=np.zeros(FRAME_SAMPLES, np.float32))
        loud_A = loudness(samples_S).reshape(frames, -1).mean(axis=1)
        rising_A = (loud_A[1:-1] > 1.0) & (loud_A[1:-1] >= loud_A[:-2]) & (loud_A[1:-1] > loud_A[2:])
        stress_A = np.pad(np.where(rising_A, loud_A[1:-1], 0.0), 1).astype(np.float32)
        for variant in range(num_manners):
            generator = np.random.default_rng(rng.seed_of("take", seed, number, variant))
            manner = _Manner.draw(generator)
            manner.smile, manner.asymmetry = 0.0, 0.0
            silent = {shape: np.zeros(frames, np.float32) for shape in _SHAPES}
            silent["upper"] = mouth_AE[:, spec.index("mouthUpperUpLeft")]
            stream = 10_000 + number * num_manners + variant
            intent_AI = Intent(rng.seed_of("take-intent", seed), stream, tempo=manner.tempo).rows(0, frames)
            state_A = heard.state_A
            motion_AE = _perform({**silent}, state_A, stress_A, intent_AI, manner, generator, spec)
            for name in (*_SINGLE.values(), *(v + s for v in _PAIRED.values() for s in ("Left", "Right"))):
                # `_perform` has put small quiet movements of its own around the mouth; the real ones replace them.
                motion_AE[:, spec.index(name)] = mouth_AE[:, spec.index(name)]
            clips.append(Clip(heard, intent_AI, motion_AE, _style(motion_AE, manner, spec), f"take {take}"))
    return clips


# --- batches


class Dataset:
    """Clips laid end to end, and windows drawn from them."""

    def __init__(self, tensors: Mapping[str, Tensor], config: MotionConfig, *, real_share: float = 0.25) -> None:
        self.config = config
        self.tensors = dict(tensors)
        self.motion = tensors["motion"]
        lengths = tensors["lengths"].tolist()
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        usable = [np.arange(s, s + n - config.window) for s, n in zip(starts, lengths, strict=True)]
        self._clip_of = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
        real = tensors["real"].tolist()
        pools = [[u for u, r in zip(usable, real, strict=True) if r == kind] for kind in (False, True)]
        self._pools = [torch.from_numpy(np.concatenate(p)) for p in pools if p]
        self._real_share = real_share if len(self._pools) == 2 else 0.0

    @staticmethod
    def pack(clips: Sequence[Clip]) -> dict[str, Tensor]:
        """Clips as the tensors that a dataset, and its file, is made of."""
        columns = {
            "mel": np.concatenate([c.cues.mel_AF for c in clips]).astype(np.float16),
            "phones": np.concatenate([np.rint(c.cues.phones_AP * 255).astype(np.uint8) for c in clips]),
            "said": np.concatenate([c.cues.said_A for c in clips]),
            "state": np.concatenate([c.cues.state_A for c in clips]),
            "intent": np.concatenate([c.intent_AI for c in clips]),
            "motion": np.concatenate([c.motion_AE for c in clips]),
            "style": np.stack([c.style for c in clips]),
            "lengths": np.array([len(c.motion_AE) for c in clips]),
            "real": np.array([c.source != "spoken" for c in clips]),
        }
        return {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in columns.items()}

    def draw(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A batch of windows of one length: cues ``[B, A, C]``, motion ``[B, A, E]``, style ``[B, S]``."""
        config = self.config
        shares = torch.tensor([0.5, 0.15, 0.35][-len(config.lengths) :])
        length = config.lengths[int(torch.multinomial(shares, 1, generator=generator))]
        num_real = round(size * self._real_share)
        counts = [size - num_real, num_real]
        starts = torch.cat(
            [
                pool[torch.randint(len(pool), (n,), generator=generator)]
                for pool, n in zip(self._pools, counts, strict=False)
                if n
            ]
        )
        at = starts[:, None] + torch.arange(config.history + length)
        tensors = self.tensors
        mel = tensors["mel"][at].float()
        said = tensors["said"][at]
        heard = torch.ones_like(said)
        # Either voice alone must do: a text that has not been heard, a microphone that nobody transcribes.
        fate = torch.rand(size, generator=generator)
        has_phones = said.any(1)
        said = said & ((fate < 0.4) | ~has_phones)[:, None]
        heard = heard & ((fate < 0.33) | (fate > 0.4) | ~has_phones)[:, None]
        mel = _disturbed(mel, generator)
        state = F.one_hot(tensors["state"][at].long(), len(State)).float()
        cues = [
            mel * heard[..., None],
            tensors["phones"][at].float() / 255 * said[..., None],
            heard[..., None].float(),
            said[..., None].float(),
            state,
            tensors["intent"][at],
        ]
        style = tensors["style"][self._clip_of[starts]]
        style = style + 0.1 * torch.randn(style.shape, generator=generator)
        style = style * (torch.rand(size, 1, generator=generator) > 0.1)
        return {"cues": torch.cat(cues, -1), "motion": self.motion[at], "style": style}


def _disturbed(mel_BAF: Tensor, generator: torch.Generator) -> Tensor:
    """Another microphone in another room: gain, colour and a noise floor, in the log-mel domain."""
    B, A, _ = mel_BAF.shape
    power = torch.exp(mel_BAF * 4.0 - 8.0).view(B, A, -1, NUM_MEL // 4)
    num_bands = power.shape[-1]
    gain_db = torch.empty(B, 1, 1, 1).uniform_(-14.0, 8.0, generator=generator)
    bands = torch.linspace(-1.0, 1.0, num_bands)
    colour = torch.randn(B, 3, generator=generator) * torch.tensor([3.0, 2.0, 1.5])
    shape_db = (
        colour[:, :1] * bands + colour[:, 1:2] * torch.cos(math.pi * bands) + colour[:, 2:] * torch.sin(math.pi * bands)
    )
    power = power * 10 ** ((gain_db + shape_db[:, None, None]) / 10)
    level_db = torch.empty(B, 1, 1, 1).uniform_(-75.0, -32.0, generator=generator)
    tilt = torch.randn(B, 1, generator=generator) * 6.0 * bands
    floor = 10 ** ((level_db + tilt[:, None, None]) / 10)
    flicker = torch.empty_like(power).exponential_(generator=generator)
    noisy = torch.rand(B, 1, 1, 1, generator=generator) < 0.7
    power = power + floor * flicker * noisy
    return ((torch.log(power + 1e-7) + 8.0) / 4.0).view(B, A, -1)


# --- learning


def _weights(spec: KinematicSpec) -> Tensor:
    weight_E = torch.ones(spec.num_coefs)
    for name in spec.names:
        if name.startswith(("mouth", "jaw")):
            weight_E[spec.index(name)] = 1.5
    weight_E[spec.indices(["jawOpen", "mouthPucker", "mouthFunnel", "mouthPressLeft", "mouthPressRight"])] = 3.0
    weight_E[spec.part("reserved")] = 0.0
    return weight_E / weight_E.mean()


def _steadiness(spec: KinematicSpec) -> Tensor:
    """Weight of errors in the change from frame to frame: what moves slowly must not tremble."""
    steady_E = torch.full((spec.num_coefs,), 2.0)
    for part in ("rotation", "translation", "scale"):
        steady_E[spec.part(part)] = 12.0
    for name in spec.names:
        if name.startswith(("brow", "cheek", "eyeSquint", "eyeWide")):
            steady_E[spec.index(name)] = 4.0
    return steady_E


def fit_scale(model: MotionModel, motion_AE: Tensor) -> None:
    """Set the model's normalisation from data; coefficients that hardly move are not blown up."""
    model.mean_E.copy_(motion_AE.mean(0))
    model.std_E.copy_(motion_AE.std(0).clamp_min(0.01))


def _history(model: MotionModel, motion_BAE: Tensor, generator: torch.Generator) -> Tensor:
    """Clean frames as a stream would remember them: a little wrong, and at a start the face at rest."""
    config = model.config
    size = motion_BAE.shape[0]
    history_BAE = model.normal(motion_BAE[:, : config.history])
    noise = torch.randn(history_BAE.shape, generator=generator)
    steady = torch.randn(size, 1, history_BAE.shape[2], generator=generator)
    amount = torch.rand(size, 1, 1, generator=generator)
    history_BAE = history_BAE + amount * (0.08 * noise + 0.15 * steady)
    rest_E = model.normal(torch.from_numpy(model.spec.rest_E.copy()))
    at_rest = torch.rand(size, 1, 1, generator=generator) < 0.02
    return torch.where(at_rest, rest_E.expand_as(history_BAE), history_BAE)


def flow_loss(model: MotionModel, batch: Mapping[str, Tensor], weight_E: Tensor, generator: torch.Generator) -> Tensor:
    """Velocity matching, written as a weighted error of the data, and the error of its change from frame to frame."""
    config = model.config
    history_BAE = _history(model, batch["motion"], generator)
    data_BAE = model.normal(batch["motion"][:, config.history :])
    size = len(data_BAE)
    # Half the draws near pure noise: with few steps, the first decides most.
    uniform = torch.rand(size, generator=generator)
    sigma_B = torch.where(torch.rand(size, generator=generator) < 0.25, torch.ones(()), flow_shift(uniform))
    noise_BAE = torch.randn(data_BAE.shape, generator=generator)
    sigma = sigma_B[:, None, None]
    noisy_BAE = (1 - sigma) * data_BAE + sigma * noise_BAE
    tokens = model.cue_tokens(batch["cues"], batch["style"])
    guess_BAE = model(torch.cat([history_BAE, noisy_BAE], 1), sigma_B, tokens)[:, config.history :].float()
    error_BAE = guess_BAE - data_BAE
    share = 1.0 / sigma.clamp_min(0.25) ** 2
    change_BAE = F.pad(error_BAE, (0, 0, 1, 0)).diff(dim=1)
    steady_E = _steadiness(model.spec)
    return (weight_E * share * (error_BAE**2)).mean() + (steady_E * weight_E * share * change_BAE**2).mean()


def flow_shift(uniform: Tensor, shift: float = 2.0) -> Tensor:
    """Noise levels pushed towards noise, as `streamdiff.flow.shifted`, for a tensor."""
    return shift * uniform / (1 + (shift - 1) * uniform)


def consistency_loss(
    student: MotionModel,
    average: MotionModel,
    teacher: MotionModel,
    batch: Mapping[str, Tensor],
    weight_E: Tensor,
    generator: torch.Generator,
    *,
    num_levels: int = 16,
) -> Tensor:
    """Agree with oneself one teacher step further down (consistency distillation, Song et al. 2023).

    The averaged student judges the next point of the teacher's own path; at the lowest level the data do.
    """
    config = student.config
    history_BAE = _history(student, batch["motion"], generator)
    data_BAE = student.normal(batch["motion"][:, config.history :])
    size = len(data_BAE)
    level = torch.randint(num_levels, (size,), generator=generator)
    level = torch.where(torch.rand(size, generator=generator) < 0.3, torch.zeros_like(level), level)
    grid = flow_shift(torch.linspace(1.0, 0.0, num_levels + 1))
    sigma_B, next_B = grid[level], grid[level + 1]
    sigma, sigma_next = sigma_B[:, None, None], next_B[:, None, None]
    noise_BAE = torch.randn(data_BAE.shape, generator=generator)
    noisy_BAE = (1 - sigma) * data_BAE + sigma * noise_BAE
    cues, style = batch["cues"], batch["style"]
    with torch.no_grad():
        taught = teacher(torch.cat([history_BAE, noisy_BAE], 1), sigma_B, teacher.cue_tokens(cues, style))
        taught_BAE = taught[:, config.history :].float()
        next_BAE = noisy_BAE + (sigma_next - sigma) * (noisy_BAE - taught_BAE) / sigma
        judged = average(torch.cat([history_BAE, next_BAE], 1), next_B, average.cue_tokens(cues, style))
        target_BAE = torch.where(sigma_next > 0, judged[:, config.history :].float(), data_BAE)
    guess = student(torch.cat([history_BAE, noisy_BAE], 1), sigma_B, student.cue_tokens(cues, style))
    error_BAE = guess[:, config.history :].float() - target_BAE
    share = 1.0 / sigma.clamp_min(0.25)
    steady_E = _steadiness(student.spec)
    change = (steady_E * weight_E * share * F.pad(error_BAE, (0, 0, 1, 0)).diff(dim=1) ** 2).mean()
    return (weight_E * share * error_BAE**2).mean() + change


@dataclass
class Progress:
    """What a checkpoint keeps beside the weights."""

    phase: str = "flow"
    spent_s: float = 0.0
    step: int = 0


def train(
    dataset: Dataset,
    out: Path,
    *,
    config: MotionConfig,
    minutes: float,
    distil_minutes: float,
    batch: int = 64,
    rate: float = 1.2e-3,
    seed: int = 0,
) -> MotionModel:
    """Run both phases for the given minutes of CPU time, going on from the checkpoint beside ``out``."""
    torch.manual_seed(seed)
    model = MotionModel(config)
    fit_scale(model, dataset.motion)
    average = copy.deepcopy(model)
    progress = Progress()
    checkpoint = out.with_suffix(".training.pt")
    generator = torch.Generator().manual_seed(rng.seed_of("batches", seed))
    saved = torch.load(checkpoint, weights_only=True) if checkpoint.is_file() else None
    teacher: MotionModel | None = None
    if saved is not None:
        progress = Progress(saved["phase"], saved["spent_s"], saved["step"])
        try:
            model.load_state_dict(saved["model"])
            average.load_state_dict(saved["average"])
        except RuntimeError as error:
            raise CheckpointError(f"{checkpoint} is of another model: {error}; remove it to begin anew") from error
        generator.set_state(saved["generator"])
        logger.info("going on from %s, step %d, %.0f s", progress.phase, progress.step, progress.spent_s)
    budgets_s = {"flow": minutes * 60.0, "consistency": distil_minutes * 60.0}
    weight_E = _weights(model.spec)
    for phase in ("flow", "consistency"):
        if phase == "consistency" and progress.phase == "flow":
            progress = Progress("consistency")
            average.load_state_dict(average.state_dict())
            model.load_state_dict(average.state_dict())
            torch.save(average.state_dict(), out.with_suffix(".teacher.pt"))
            saved = None
        if progress.phase != phase:
            continue
        if phase == "consistency":
            teacher = copy.deepcopy(average)
            teacher.load_state_dict(torch.load(out.with_suffix(".teacher.pt"), weights_only=True))
            teacher.eval()
        top = rate if phase == "flow" else rate * 0.3
        optimiser = torch.optim.AdamW(model.parameters(), lr=top, betas=(0.9, 0.98), weight_decay=0.01)
        if saved is not None:
            optimiser.load_state_dict(saved["optimiser"])
        decay = 0.999 if phase == "flow" else 0.995
        clock, last_saved, mean_loss = time.process_time(), time.monotonic(), 0.0
        budget_s = budgets_s[phase]
        while progress.spent_s < budget_s:
            done = progress.spent_s / budget_s
            warm = min(1.0, (progress.step + 1) / 200)
            for group in optimiser.param_groups:
                group["lr"] = top * warm * (0.5 + 0.5 * math.cos(math.pi * done)) + 1e-6
            drawn = dataset.draw(batch, generator)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                if teacher is None:
                    loss = flow_loss(model, drawn, weight_E, generator)
                else:
                    loss = consistency_loss(model, average, teacher, drawn, weight_E, generator)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            keep = min(decay, (progress.step + 1) / (progress.step + 10))
            with torch.no_grad():
                for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                    slow.lerp_(fast, 1 - keep)
            progress.step += 1
            now = time.monotonic()
            spent = time.process_time()
            progress.spent_s += spent - clock
            clock = spent
            mean_loss = loss.item() if mean_loss == 0.0 else 0.98 * mean_loss + 0.02 * loss.item()
            if progress.step % 100 == 0:
                logger.info(
                    "%s step %d  %.0f/%.0f s  loss %.4f",
                    phase,
                    progress.step,
                    progress.spent_s,
                    budget_s,
                    mean_loss,
                )
            if now - last_saved > 120 or progress.spent_s >= budget_s:
                state = {
                    "phase": progress.phase,
                    "spent_s": progress.spent_s,
                    "step": progress.step,
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "generator": generator.get_state(),
                }
                torch.save(state, checkpoint.with_suffix(".tmp"))
                checkpoint.with_suffix(".tmp").replace(checkpoint)
                last_saved = now
        saved = None
    return average.eval()


# --- judging


def _moved(model: MotionModel, clip: Clip, *, hop: int, ahead: int | None, seed: int, sigmas: Sequence[float] | None,
           heard: bool, said: bool) -> Floats:  # fmt: skip
    """The clip as a stream would move it; ``ahead`` frames of look-ahead, None: all of them."""
    stream = MotionStream(model, seed=seed, hop=hop, style=dict(zip(STYLE_NAMES, clip.style.tolist(), strict=True)),
                          seam=4 if hop > 3 else 1, sigmas=sigmas)  # fmt: skip
    cues = clip.cues
    yes_A = np.ones(len(cues), np.bool_)
    cues = Cues(cues.mel_AF, cues.phones_AP, yes_A & heard, cues.said_A & said, cues.state_A)
    num_frames = len(cues) - model.config.lengths[0]
    shown: list[Tensor] = []
    pushed = 0
    for frame in range(num_frames):
        reach = len(cues) if ahead is None else frame + 1 + ahead
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


def _lag(a: NDArray[Any], b: NDArray[Any], reach: int = 6) -> tuple[float, int]:
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


def evaluate(model: MotionModel, clips: Sequence[Clip], *, sigmas: Sequence[float] | None = None) -> dict[str, float]:
    """Quality on clips that were not trained on, moved as streams: text ahead of time, and live sound."""
    spec = model.spec
    facts: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        facts.setdefault(name, []).append(value)

    for number, clip in enumerate(clips):
        spoken = clip.source == "spoken"
        runs = [("text", 8, None, True, True)] if spoken else []
        runs += [("live" if spoken else "real live", 1, 2, True, False)]
        target = aperture(clip.motion_AE, spec)
        for name, hop, ahead, heard, said in runs:
            moved_AE = _moved(model, clip, hop=hop, ahead=ahead, seed=number, sigmas=sigmas, heard=heard, said=said)
            lips = aperture(moved_AE, spec)
            r, lag = _lag(lips, target[: len(lips)])
            note(f"{name} lips r", r)
            note(f"{name} lips lag", abs(lag))
            note(f"{name} lips gain", float(lips.std() / target[: len(lips)].std()))
            for column in ("jawOpen", "mouthPucker", "mouthFunnel", "mouthPressLeft"):
                a, b = moved_AE[:, spec.index(column)], clip.motion_AE[: len(moved_AE), spec.index(column)]
                if b.std() > 0.01:
                    note(f"{name} {column} r", float(np.corrcoef(a, b)[0, 1]))
            rotation = moved_AE[:, spec.part("rotation")]
            truth = clip.motion_AE[: len(moved_AE), spec.part("rotation")]
            note(f"{name} head spread ratio", float(rotation.std() / truth.std()))
            note(
                f"{name} head speed ratio",
                float(np.diff(rotation, axis=0).std() / np.diff(truth, axis=0).std()),
            )
            closed = moved_AE[:, spec.index("eyeBlinkLeft")] > 0.5
            note(
                f"{name} blinks per minute",
                float((closed[1:] & ~closed[:-1]).sum() / (len(closed) / FPS / 60)),
            )
            if hop > 1:
                note(f"{name} seam jerk ratio", seam_ratio(moved_AE, range(hop, len(moved_AE), hop), spec))
            jerk = np.abs(np.diff(moved_AE[:, spec.part("rotation")], n=3, axis=0)).mean()
            note(f"{name} head jerk ratio", float(jerk / np.abs(np.diff(truth, n=3, axis=0)).mean()))
    return {name: round(float(np.mean(values)), 4) for name, values in sorted(facts.items())}


# --- the command


def make_clips(minutes: float, *, seed: int, first: int = 0) -> list[Clip]:
    """Spoken clips, ``minutes`` long together."""
    voice = HibariVoice()
    words = lexicon_words()
    clips: list[Clip] = []
    frames = 0
    while frames < minutes * 60 * FPS:
        clips.append(spoken_clip(voice, first + len(clips), seed=seed, words=words))
        frames += len(clips[-1].motion_AE)
    return clips


def main(argv: Sequence[str] | None = None) -> int:
    """Train, judge, write weights and say how good they are."""
    parser = argparse.ArgumentParser(prog="streamdiff.training.avatar.motion", description="Train the motion model.")
    parser.add_argument("--out", type=Path, required=True, help="where the weights go; checkpoints lie beside them")
    parser.add_argument("--data", type=Path, help="facegood_audio2rig.npz; without it, synthesised speech only")
    parser.add_argument("--minutes", type=float, default=45.0, help="CPU minutes of flow matching")
    parser.add_argument("--distil-minutes", type=float, default=15.0, help="CPU minutes of consistency distillation")
    parser.add_argument("--speech-minutes", type=float, default=180.0, help="minutes of speech to synthesise")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)

    started = time.monotonic()
    kept = args.out.with_suffix(".clips.safetensors")
    held_out = make_clips(3.0, seed=args.seed + 1, first=1_000_000)
    real = real_clips(args.data, seed=args.seed) if args.data is not None else []
    if real:
        # The last take is never trained on.
        held_out.append(next(clip for clip in real if clip.source == real[-1].source))
    if kept.is_file():
        packed = load_file(kept)
    else:
        clips = make_clips(args.speech_minutes, seed=args.seed)
        packed = Dataset.pack([*clips, *(clip for clip in real if clip.source != real[-1].source)])
        save_file(packed, kept)
    logger.info("%d clips after %.0f s", len(packed["lengths"]), time.monotonic() - started)
    config = MotionConfig()
    dataset = Dataset(packed, config)
    model = train(
        dataset,
        args.out,
        config=config,
        minutes=args.minutes,
        distil_minutes=args.distil_minutes,
        batch=args.batch,
        seed=args.seed,
    )
    quality = evaluate(model, held_out)
    facts = {"quality": quality, "seed": args.seed, "speech_minutes": args.speech_minutes}
    save_motion(model, args.out, facts=facts)
    logger.info("wrote %s, %d bytes", args.out, args.out.stat().st_size)
    logger.info("%s", json.dumps(quality, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
