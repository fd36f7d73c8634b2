"""Performances of real speech: FACEGOOD-Audio2Face (MIT), 656 s with the mouth that spoke it, in ARKit names.

Axes: A frames, R controls of FACEGOOD's rig, E coefficients, S samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streamdiff import rng
from streamdiff.arrays import Floats
from streamdiff.avatar.cues import FRAME_SAMPLES, Cues
from streamdiff.avatar.intent import Intent
from streamdiff.avatar.kinematics import FPS, KinematicSpec, arkit64
from streamdiff.errors import InputError
from streamdiff.training.avatar.performance import Manner, Performance, perform, style_of
from streamdiff.training.avatar.visemes import PAIRED, SHAPES, SINGLE, loudness
from streamdiff.voice import Resampler

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


def recorded(path: str | Path, *, seed: int, num_manners: int = 4) -> list[Performance]:
    """FACEGOOD takes at 25 frames per second, each with several upper faces drawn to go with it.

    Raises:
        InputError: a file without FACEGOOD's arrays.
    """
    try:
        data = np.load(path)
        rig_names = [str(name) for name in data["rig_names"]]
        takes = sorted(name[len("audio_") :] for name in data.files if name.startswith("audio_"))
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path} is not the packed FACEGOOD data: {error}") from error
    made: list[Performance] = []
    for number, name in enumerate(takes):
        take = _read(data[f"audio_{name}"], data[f"weights_{name}"].astype(np.float32), rig_names)
        for variant in range(num_manners):
            stream = 10_000 + number * num_manners + variant
            generator = np.random.default_rng(rng.seed_of("take", seed, number, variant))
            made.append(_perform(take, generator, (rng.seed_of("take-intent", seed), stream), f"take {name}"))
    return made


@dataclass(frozen=True)
class _Take:
    """A stretch of real speech and the mouth that spoke it."""

    heard: Cues
    mouth_AE: Floats
    stress_A: Floats


def _read(audio_S: NDArray[np.int16], weights_AR: Floats, rig_names: Sequence[str]) -> _Take:
    """A take at 16 kHz and 30 controls a second, brought to the rates of voices and faces."""
    resampler = Resampler(16_000)
    samples_S = np.concatenate([resampler.push(audio_S.astype(np.float32) / 32768), resampler.finish()])
    samples_S *= 0.35 / max(1e-3, float(np.percentile(np.abs(samples_S), 99.9)))
    num_frames = min(len(samples_S) // FRAME_SAMPLES, int(len(weights_AR) / 30 * FPS))
    samples_S = samples_S[: num_frames * FRAME_SAMPLES]
    rig_AE = rig_to_arkit(weights_AR, rig_names, arkit64())
    # The rig's frame k stands for the middle of its own thirtieth of a second.
    source_s = (np.arange(len(rig_AE)) + 0.5) / 30
    at_s = (np.arange(num_frames) + 0.5) / FPS
    mouth_AE = np.stack([np.interp(at_s, source_s, column) for column in rig_AE.T], axis=1).astype(np.float32)
    heard = Cues.sound(samples_S, None, before_S=np.zeros(FRAME_SAMPLES, np.float32))
    loud_A = loudness(samples_S).reshape(num_frames, -1).mean(axis=1)
    rising_A = (loud_A[1:-1] > 1.0) & (loud_A[1:-1] >= loud_A[:-2]) & (loud_A[1:-1] > loud_A[2:])
    stress_A = np.pad(np.where(rising_A, loud_A[1:-1], 0.0), 1).astype(np.float32)
    return _Take(heard, mouth_AE, stress_A)


def _perform(take: _Take, generator: np.random.Generator, intent: tuple[int, int], source: str) -> Performance:
    """The mouth of a take with an upper face drawn to go with it; ``intent``: seed and stream."""
    spec, mouth_AE = arkit64(), take.mouth_AE
    manner = Manner.draw(generator)
    manner.smile, manner.asymmetry = 0.0, 0.0
    silent = {shape: np.zeros(len(mouth_AE), np.float32) for shape in SHAPES}
    silent["upper"] = mouth_AE[:, spec.index("mouthUpperUpLeft")]
    intent_AI = Intent(*intent, tempo=manner.tempo).rows(0, len(mouth_AE))
    motion_AE = perform(silent, take.heard.state_A, take.stress_A, intent_AI, manner, generator, spec)
    for name in (*SINGLE.values(), *(v + s for v in PAIRED.values() for s in ("Left", "Right"))):
        # `perform` has put small quiet movements of its own around the mouth; the real ones replace them.
        motion_AE[:, spec.index(name)] = mouth_AE[:, spec.index(name)]
    return Performance(take.heard, intent_AI, motion_AE, style_of(motion_AE, manner, spec), source)
