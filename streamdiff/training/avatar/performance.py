"""A performance: what a person hears and says in a minute, and the face that goes with it.

The mouth is given; head, brows, lids and eyes are random processes with the spreads, speeds, correlations and intervals
that were measured on 200 s of a person in conversation (`streamdiff.avatar.intent.HEAD_STD`), tied to stress, state and
gaze. Axes as in `streamdiff.avatar.window`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamdiff.arrays import Floats
from streamdiff.avatar.cues import Cues, State
from streamdiff.avatar.intent import HEAD_STD
from streamdiff.avatar.kinematics import FPS, KinematicSpec, gaze_to_looks
from streamdiff.avatar.style import measure_style, style_vector
from streamdiff.training.avatar.visemes import PAIRED, SHAPES, SINGLE

_CALM = 0.5
"""A portrait moves less than a person in a chair: the ordinary style halves the measured spread."""


@dataclass
class Performance:
    """A minute of one person: everything the model reads, and the face it should show."""

    cues: Cues
    intent_AI: Floats
    motion_AE: Floats
    style: Floats
    source: str


@dataclass
class Manner:
    """How the person of one performance moves; drawn once for it."""

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
    def draw(generator: np.random.Generator) -> Manner:
        def around(spread: float) -> float:
            return float(np.exp(spread * generator.standard_normal()))

        return Manner(
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


def perform(
    mouth: Mapping[str, Floats],
    state_A: NDArray[np.int8],
    stress_A: Floats,
    intent_AI: Floats,
    manner: Manner,
    generator: np.random.Generator,
    spec: KinematicSpec,
) -> Floats:
    """A whole face: the mouth as given, everything else drawn to go with it."""
    face = _Face(len(state_A), manner, spec)
    face.put_mouth(mouth)
    # Activity follows the state with a third of a second of inertia.
    wanted = np.array([0.45, 0.6, 1.0], np.float32)[state_A]
    kernel = _pulse(17)
    active_A = np.convolve(np.pad(wanted, 8, mode="edge"), kernel / kernel.sum(), mode="valid")
    posture_8A = intent_AI[:, 3:].T
    rotation_A3, shift_A2 = _posture(posture_8A, active_A, manner, generator)
    nods_A, raise_A = _gestures(state_A, stress_A, manner, generator)
    rotation_A3[:, 0] += nods_A
    face.put_head(rotation_A3, shift_A2, posture_8A[4])
    brow_A = face.put_brows(raise_A, posture_8A[5], active_A)
    face.put_eyes(intent_AI, rotation_A3)
    face.put_mood(mouth["upper"], intent_AI[:, 0] * manner.blink, posture_8A, brow_A)
    quiet_A = np.clip(1.6 - 1.6 * active_A, 0.0, 1.0)
    face.put_both("mouthPress", np.maximum(0.0, 0.03 * _process(generator, len(state_A), 0.3)) * quiet_A)
    face.put("mouthShrugLower", np.maximum(0.0, 0.02 * _process(generator, len(state_A), 0.3)))
    return spec.clamp(face.motion_AE.astype(np.float32))


def _posture(
    posture_8A: Floats, active_A: Floats, manner: Manner, generator: np.random.Generator
) -> tuple[Floats, Floats]:
    """Rotation ``[A, 3]`` and shift ``[A, 2]`` of a head: as intended, livelier while speaking, never still."""
    num_frames = len(active_A)
    restless = np.stack([_process(generator, num_frames, 0.8) for _ in HEAD_STD])
    head_5A = (posture_8A[:5] + 0.12 * restless) * np.array(HEAD_STD)[:, None]
    head_5A = head_5A * (0.55 + 0.45 * active_A)
    rotation_A3 = (head_5A[:3] * manner.head[:, None]).T.astype(np.float32)
    shift_A2 = (head_5A[3:] * manner.shift).T.astype(np.float32)
    breath = 0.006 * np.sin(2 * np.pi * (0.25 * np.arange(num_frames) / FPS + generator.random()))
    shift_A2[:, 1] += breath
    return rotation_A3, shift_A2


def _gestures(
    state_A: NDArray[np.int8], stress_A: Floats, manner: Manner, generator: np.random.Generator
) -> tuple[Floats, Floats]:
    """Nods and raised brows ``[A]``: at stressed vowels, and nods while listening."""
    num_frames = len(state_A)
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
    return nods_A, raise_A


class _Face:
    """Coefficients ``[A, E]`` from rest, to which the parts of a face add what they do."""

    def __init__(self, num_frames: int, manner: Manner, spec: KinematicSpec) -> None:
        self.motion_AE = np.tile(spec.rest_E, (num_frames, 1))
        self._manner, self._spec = manner, spec

    def put(self, name: str, value: Floats) -> None:
        self.motion_AE[:, self._spec.index(name)] += value

    def put_both(self, stem: str, value: Floats, lean: float = 0.0) -> None:
        self.put(stem + "Left", value * (1 + lean))
        self.put(stem + "Right", value * (1 - lean))

    def put_mouth(self, mouth: Mapping[str, Floats]) -> None:
        manner = self._manner
        gains = {"jaw": manner.jaw, "pucker": manner.round, "funnel": manner.round, "lower": manner.lips}
        gains |= {"upper": manner.lips, "smile": manner.spread, "stretch": manner.spread, "dimple": manner.spread}
        for shape in SHAPES:
            value_A = mouth[shape] * gains.get(shape, 1.0)
            if shape in PAIRED:
                self.put_both(PAIRED[shape], value_A, manner.asymmetry)
            else:
                self.put(SINGLE[shape], value_A)

    def put_head(self, rotation_A3: Floats, shift_A2: Floats, near_A: Floats) -> None:
        self.motion_AE[:, self._spec.part("rotation")] = rotation_A3
        self.motion_AE[:, self._spec.part("translation")] = shift_A2
        self.put("headScale", 0.012 * self._manner.shift * -near_A)

    def put_brows(self, raise_A: Floats, lifted_A: Floats, active_A: Floats) -> Floats:
        """How far the brows are up ``[A]``, as they are put."""
        manner = self._manner
        drift_A = 0.05 * manner.brow * lifted_A * (0.5 + 0.5 * active_A)
        brow_A = np.maximum(0.0, manner.brow_raise + drift_A) + raise_A
        self.put("browInnerUp", 0.8 * brow_A)
        self.put_both("browOuterUp", brow_A, 0.5 * manner.asymmetry)
        frown_A = np.maximum(0.0, 0.05 * manner.brow * (-lifted_A - 0.3))
        self.put_both("browDown", frown_A)
        return brow_A

    def put_eyes(self, intent_AI: Floats, rotation_A3: Floats) -> None:
        """Eyes stay fixed on the camera or on what the intent looks at, whatever the head does."""
        gaze_A2 = intent_AI[:, 1:3].copy()
        gaze_A2[:, 0] += 0.9 * rotation_A3[:, 1]
        gaze_A2[:, 1] -= 0.9 * rotation_A3[:, 0]
        # A saccade lasts about one frame.
        gaze_A2[1:] = 0.75 * gaze_A2[1:] + 0.25 * gaze_A2[:-1]
        gaze_A4 = np.concatenate([gaze_A2, gaze_A2], axis=1).astype(np.float32)
        self.motion_AE[:, self._spec.part("gaze")] = gaze_A4
        for name, value_A in gaze_to_looks(gaze_A4).items():
            self.put(name, value_A)
        closed_A = intent_AI[:, 0] * self._manner.blink
        lower_lid_A = 0.35 * np.clip(gaze_A2[:, 1] / 0.35, 0, 1)
        self.put_both("eyeBlink", np.maximum(closed_A, lower_lid_A))

    def put_mood(self, upper_A: Floats, closed_A: Floats, posture_8A: Floats, brow_A: Floats) -> None:
        """A smile and what goes with it; what lids and brows pull along."""
        manner = self._manner
        squint_A = np.maximum(0.0, manner.squint + 0.03 * posture_8A[6]) + 0.12 * closed_A
        smile_A = np.maximum(0.0, manner.smile + 0.03 * posture_8A[7])
        self.put_both("eyeSquint", squint_A + 0.25 * smile_A)
        self.put_both("cheekSquint", 0.5 * smile_A)
        self.put_both("mouthSmile", smile_A, manner.asymmetry)
        self.put_both("browDown", 0.06 * closed_A)
        self.put_both("eyeWide", 0.35 * np.maximum(0.0, brow_A - 0.08))
        self.put_both("noseSneer", 0.2 * upper_A)


def style_of(motion_AE: Floats, manner: Manner, spec: KinematicSpec) -> Floats:
    """The style ``[S]`` that this motion shows, as the model is told it."""
    measured = measure_style(motion_AE, spec)
    return style_vector({**measured, "nod": (manner.nod - 0.02) / 0.02, "head_tempo": (manner.tempo - 1.0) / 0.2})


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
