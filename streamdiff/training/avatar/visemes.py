"""What a mouth does for phonemes: targets for every shape, blended by dominance functions (Cohen and Massaro 1993).

Axes: A frames, T visits of the clock of 100 Hz, S samples.
"""

# The phonetic alphabet is meant.
# ruff: noqa: RUF001

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from streamdiff.arrays import Floats
from streamdiff.avatar.kinematics import FPS
from streamdiff.voice import PAUSES, RATE_HZ, Phoneme

CLOCK_HZ = 100
"""Mouths are computed at this rate, and averaged over frames."""

PAIRED = {
    "smile": "mouthSmile",
    "stretch": "mouthStretch",
    "dimple": "mouthDimple",
    "press": "mouthPress",
    "lower": "mouthLowerDown",
    "upper": "mouthUpperUp",
}

SINGLE = {
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
SHAPES = (*SINGLE, *PAIRED)

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


def articulate(phonemes: Sequence[Phoneme], num_frames: int, loudness_T: Floats) -> dict[str, Floats]:
    """The mouth that says these phonemes: every shape ``[A]``, 0..1.

    Each phoneme pulls towards its targets with a strength that is constant inside it and falls exponentially around
    it; a shape is the mean of all targets, weighted by the pulls (Cohen and Massaro 1993). Computed at 100 Hz.

    Args:
        phonemes: with times from the start of frame 0.
        loudness_T: about 1 where the speech is as loud as it usually is, at 100 Hz.
    """
    num_visits = num_frames * CLOCK_HZ // FPS
    at_T = (np.arange(num_visits) + 0.5) / CLOCK_HZ
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


def loudness(samples_S: Floats) -> Floats:
    """Loudness at 100 Hz over its usual value in this sound: 0 silent, 1 usual, at most 1.5."""
    hop = RATE_HZ // CLOCK_HZ
    power = (samples_S[: len(samples_S) // hop * hop].reshape(-1, hop) ** 2).mean(axis=1)
    kernel = np.hanning(15)
    power = np.convolve(power, kernel / kernel.sum(), mode="same")
    usual = np.percentile(power[power > power.max(initial=0.0) * 1e-3], 75) if power.max(initial=0.0) > 0 else 1.0
    decibel = 10 * np.log10(power / usual + 1e-6)
    return np.clip(1.0 + decibel / 25.0, 0.0, 1.5).astype(np.float32)
