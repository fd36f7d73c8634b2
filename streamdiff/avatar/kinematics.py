"""Layouts of motion coefficients: names, ranges, conversions; JSON lines and OSC messages.

A frame is a vector of E numbers, a clip is ``motion_AE``. A `KinematicSpec` gives every number a name and
every group of numbers a slice, so that nobody writes an index:

    spec = arkit64()
    jaw_A = motion_AE[:, spec.index("jawOpen")]
    motion_AE[:, spec.part("rotation")]          # rotation vector, radians

Conventions of `arkit64` (the wider `full256` begins with the same 64):

* ``face``: 52 ARKit shapes, 0 (at rest) .. 1 (full). Left and right are the person's own. The order is that
  of MediaPipe's list without ``_neutral``; MediaPipe has no ``tongueOut``, which therefore comes last.
* ``rotation``: rotation vector of the head, radians, in camera axes (x right, y down, z away from the
  camera), relative to the reference picture. Positive x nods down, positive y turns the face towards the
  left edge of the picture, positive z rolls it clockwise as seen.
* ``translation``: of the head in the picture, x right and y down, in distances between the outer eye corners.
* ``scale``: size of the head over its size in the reference picture; 1 at rest.
* ``gaze``: yaw and pitch of each eyeball in its socket, radians; positive yaw looks to the right edge of the
  picture, positive pitch looks down. The ``eyeLook*`` shapes describe the same movement for rigs that know
  no gaze: a renderer turns the eyeball by ``gaze`` and may move the lids by ``eyeLook*``.
* ``reserved``: zero.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from streamdiff.arrays import Floats
from streamdiff.errors import ConfigError, InputError
from streamdiff.facts import Facts, parse_json, printable

FPS = 25
"""Frames of motion, and of picture, in a second of an avatar."""


def _both(*stems: str) -> tuple[str, ...]:
    return tuple(stem + side for stem in stems for side in ("Left", "Right"))


ARKIT_NAMES: tuple[str, ...] = (
    *_both("browDown"),
    "browInnerUp",
    *_both("browOuterUp"),
    "cheekPuff",
    *_both(
        "cheekSquint",
        "eyeBlink",
        "eyeLookDown",
        "eyeLookIn",
        "eyeLookOut",
        "eyeLookUp",
        "eyeSquint",
        "eyeWide",
    ),
    "jawForward",
    "jawLeft",
    "jawOpen",
    "jawRight",
    "mouthClose",
    *_both("mouthDimple", "mouthFrown"),
    "mouthFunnel",
    "mouthLeft",
    *_both("mouthLowerDown", "mouthPress"),
    "mouthPucker",
    "mouthRight",
    "mouthRollLower",
    "mouthRollUpper",
    "mouthShrugLower",
    "mouthShrugUpper",
    *_both("mouthSmile", "mouthStretch", "mouthUpperUp", "noseSneer"),
    "tongueOut",
)
"""The 52 shapes of ARKit (``ARFaceAnchor.BlendShapeLocation``), in the order of MediaPipe's landmarker."""


@dataclass(frozen=True, slots=True)
class Part:
    """Neighbouring coefficients of one kind: same range, same value at rest."""

    name: str
    names: tuple[str, ...]
    low: float
    high: float
    rest: float = 0.0

    def __post_init__(self) -> None:
        if not self.names:
            raise ConfigError(f"part {self.name!r} has no coefficients; leave it out")
        if not self.low <= self.rest <= self.high:
            raise ConfigError(f"rest of part {self.name!r} must lie in {self.low}..{self.high}, got {self.rest}")


@dataclass(frozen=True)
class KinematicSpec:
    """The meaning of one vector of motion coefficients: parts in order, each a slice."""

    name: str
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        for kind, names in (("part", [p.name for p in self.parts]), ("coefficient", list(self.names))):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ConfigError(f"spec {self.name!r} names the {kind} {twice[0]!r} twice; names must be unique")

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Every coefficient's name, in order."""
        return tuple(itertools.chain.from_iterable(part.names for part in self.parts))

    @property
    def num_coefs(self) -> int:
        """E, the width of a frame."""
        return len(self.names)

    @functools.cached_property
    def _slices(self) -> dict[str, slice]:
        ends = list(itertools.accumulate(len(part.names) for part in self.parts))
        return {part.name: slice(end - len(part.names), end) for part, end in zip(self.parts, ends, strict=True)}

    @functools.cached_property
    def _indices(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def part(self, name: str) -> slice:
        """The slice of a part.

        >>> arkit64().part("rotation")
        slice(52, 55, None)
        """
        if name not in self._slices:
            raise ConfigError(f"spec {self.name!r} has no part {name!r}; it has {', '.join(self._slices)}")
        return self._slices[name]

    def has(self, name: str) -> bool:
        """Whether a coefficient of this name exists."""
        return name in self._indices

    def index(self, name: str) -> int:
        """The column of a coefficient.

        >>> arkit64().index("jawOpen")
        24
        """
        if name not in self._indices:
            raise ConfigError(f"spec {self.name!r} has no coefficient {name!r}; see KinematicSpec.names")
        return self._indices[name]

    def indices(self, names: Iterable[str]) -> list[int]:
        """The columns of several coefficients."""
        return [self.index(name) for name in names]

    def _spread(self, values: Iterable[float]) -> Floats:
        counts = [len(part.names) for part in self.parts]
        spread_E = np.repeat(np.asarray(list(values), np.float32), counts)
        spread_E.flags.writeable = False
        return spread_E

    @functools.cached_property
    def rest_E(self) -> Floats:  # noqa: N802
        """The face of the reference picture: no shape, no movement, scale 1. Read-only."""
        return self._spread(part.rest for part in self.parts)

    @functools.cached_property
    def low_E(self) -> Floats:  # noqa: N802
        """Least value of every coefficient. Read-only."""
        return self._spread(part.low for part in self.parts)

    @functools.cached_property
    def high_E(self) -> Floats:  # noqa: N802
        """Greatest value of every coefficient. Read-only."""
        return self._spread(part.high for part in self.parts)

    def clamp(self, motion: Floats) -> Floats:
        """The same motion, ``[..., E]``, inside its ranges."""
        self.check(motion)
        return np.clip(motion, self.low_E, self.high_E)

    def check(self, motion: Floats) -> None:
        """Raise `InputError` unless ``motion`` ends in E and is finite."""
        if motion.ndim == 0 or motion.shape[-1] != self.num_coefs:
            raise InputError(f"a frame of {self.name!r} has {self.num_coefs} coefficients, got shape {motion.shape}")
        if not np.isfinite(motion).all():
            raise InputError("motion holds values that are not finite; find the frame with numpy.isfinite")

    def frame(self, values: Mapping[str, float] | None = None) -> Floats:
        """A frame ``[E]`` at rest but for the named values.

        >>> arkit64().frame({"jawOpen": 0.5})[24]
        np.float32(0.5)
        """
        frame_E = self.rest_E.copy()
        for name, value in (values or {}).items():
            frame_E[self.index(name)] = value
        return frame_E

    def named(self, frame_E: Floats) -> dict[str, float]:
        """One frame as a dictionary by name."""
        self.check(frame_E)
        return {name: float(value) for name, value in zip(self.names, frame_E, strict=True)}


_HEAD = (
    Part("rotation", ("headRotationX", "headRotationY", "headRotationZ"), -math.pi / 2, math.pi / 2),
    Part("translation", ("headX", "headY"), -2.0, 2.0),
    Part("scale", ("headScale",), 0.5, 2.0, 1.0),
    Part("gaze", ("gazeYawLeft", "gazePitchLeft", "gazeYawRight", "gazePitchRight"), -0.8, 0.8),
    Part("reserved", ("reserved0", "reserved1"), 0.0, 0.0),
)


@functools.cache
def arkit64() -> KinematicSpec:
    """The default layout: 52 ARKit shapes, head pose, gaze."""
    return KinematicSpec("arkit64", (Part("face", ARKIT_NAMES, 0.0, 1.0), *_HEAD))


@functools.cache
def full256() -> KinematicSpec:
    """`arkit64`, then 192 ``dynamics`` that each avatar defines, in its own standard deviations."""
    dynamics = Part("dynamics", tuple(f"dynamics{i}" for i in range(192)), -6.0, 6.0)
    return KinematicSpec("full256", (*arkit64().parts, dynamics))


def _numbered(stem: str, count: int) -> tuple[str, ...]:
    return tuple(f"{stem}{i}" for i in range(count))


_LP_POINTS = tuple(f"exp{k}{axis}" for k in range(21) for axis in "XYZ")


@functools.cache
def lp265() -> KinematicSpec:
    """Ditto's LivePortrait layout: scale, 66 logits each for pitch, yaw, roll, translation, 21 points.

    Source: ditto-talkinghead, ``core/atomic_components/motion_stitch.py``.
    """
    return KinematicSpec(
        "lp265",
        (
            Part("scale", ("scale",), 0.0, 8.0, 1.0),
            *(Part(axis, _numbered(f"{axis}Bin", _LP_BINS), -1e3, 1e3) for axis in _LP_AXES),
            Part("translation", ("tX", "tY", "tZ"), -8.0, 8.0),
            Part("expression", _LP_POINTS, -1.0, 1.0),
        ),
    )


@functools.cache
def lp70() -> KinematicSpec:
    """JoyVASA's LivePortrait layout: 21 points, scale, translation, then pitch, yaw and roll in degrees."""
    return KinematicSpec(
        "lp70",
        (
            Part("expression", _LP_POINTS, -1.0, 1.0),
            Part("scale", ("scale",), 0.0, 8.0, 1.0),
            Part("translation", ("tX", "tY", "tZ"), -8.0, 8.0),
            Part("angles", _LP_AXES, -97.5, 97.5),
        ),
    )


_LP_AXES = ("pitch", "yaw", "roll")
_LP_BINS = 66
_LP_BIN_DEGREES = 3.0
_LP_FIRST_DEGREE = -97.5


def lp265_to_lp70(motion_AE: Floats) -> Floats:
    """Ditto's coefficients ``[A, 265]`` as JoyVASA's ``[A, 70]``: expected degrees of the angle logits."""
    source, target = lp265(), lp70()
    source.check(motion_AE)
    out_AE = np.zeros((motion_AE.shape[0], target.num_coefs), np.float32)
    for part in ("expression", "scale", "translation"):
        out_AE[:, target.part(part)] = motion_AE[:, source.part(part)]
    for axis in _LP_AXES:
        logits = motion_AE[:, source.part(axis)].astype(np.float64)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        expected = (weights @ np.arange(_LP_BINS)) / weights.sum(axis=-1)
        out_AE[:, target.index(axis)] = expected * _LP_BIN_DEGREES + _LP_FIRST_DEGREE
    return out_AE


def lp70_to_lp265(motion_AE: Floats) -> Floats:
    """JoyVASA's coefficients ``[A, 70]`` as Ditto's ``[A, 265]``: each angle split between its two bins."""
    source, target = lp70(), lp265()
    source.check(motion_AE)
    num_frames = motion_AE.shape[0]
    out_AE = np.zeros((num_frames, target.num_coefs), np.float32)
    for part in ("expression", "scale", "translation"):
        out_AE[:, target.part(part)] = motion_AE[:, source.part(part)]
    for axis in _LP_AXES:
        place = (motion_AE[:, source.index(axis)].astype(np.float64) - _LP_FIRST_DEGREE) / _LP_BIN_DEGREES
        place = np.clip(place, 0, _LP_BINS - 1)
        left = np.minimum(place.astype(np.int64), _LP_BINS - 2)
        # e^-30 is nothing beside a share of 1, and survives a trip through float16 logits.
        logits = np.full((num_frames, _LP_BINS), -30.0)
        rows = np.arange(num_frames)
        logits[rows, left] = np.log(np.maximum(left + 1 - place, 1e-13))
        logits[rows, left + 1] = np.log(np.maximum(place - left, 1e-13))
        out_AE[:, target.part(axis)] = logits
    return out_AE


def convert(motion_AE: Floats, source: KinematicSpec, target: KinematicSpec) -> Floats:
    """Copy what both layouts name; what only ``target`` names stays at rest.

    The two LivePortrait layouts convert fully into each other. Raises `ConfigError` when nothing is shared.
    """
    source.check(motion_AE)
    if (source.name, target.name) == ("lp265", "lp70"):
        return lp265_to_lp70(motion_AE)
    if (source.name, target.name) == ("lp70", "lp265"):
        return lp70_to_lp265(motion_AE)
    shared = [name for name in target.names if source.has(name)]
    if not shared:
        raise ConfigError(f"{source.name!r} and {target.name!r} share no coefficient; a mapping has to be learned")
    out_AE = np.tile(target.rest_E, (motion_AE.shape[0], 1))
    out_AE[:, target.indices(shared)] = motion_AE[:, source.indices(shared)]
    return out_AE


def json_lines(motion_AE: Floats, spec: KinematicSpec, *, fps: float = FPS) -> Iterator[str]:
    """A header, then a line per frame: ``{"frame": 0, "time_s": 0.0, "coefs": {"jawOpen": 0.1, ...}}``."""
    spec.check(motion_AE)
    yield json.dumps({"format": "streamdiff.motion", "version": 1, "spec": spec.name, "fps": fps, "names": spec.names})
    for frame, frame_E in enumerate(motion_AE):
        coefs = {name: round(value, 6) for name, value in spec.named(frame_E).items()}
        yield json.dumps({"frame": frame, "time_s": round(frame / fps, 6), "coefs": coefs})


_MAX_FRAMES, _MAX_LINE = 1 << 20, 1 << 16


def read_json_lines(lines: Iterable[str], spec: KinematicSpec) -> Floats:
    """The motion ``[A, E]`` written by `json_lines`.

    Raises:
        InputError: another kind of file, another layout, a name unknown to ``spec``, a value that is no finite number,
            or more than 2^20 frames.
    """
    frames: list[Floats] = []
    for number, line in enumerate(lines, start=1):

        def fail(why: str, number: int = number) -> NoReturn:
            raise InputError(f"line {number} of the motion file cannot be read: {why}")

        if len(line) > _MAX_LINE or len(frames) >= _MAX_FRAMES:
            fail(f"it is longer than {_MAX_LINE} characters, or there are more than {_MAX_FRAMES} frames")
        try:
            record = Facts(parse_json(line), fail)
            if number == 1:
                if record.words("format") != "streamdiff.motion" or record.words("spec") != spec.name:
                    fail(f"it does not begin a file of {spec.name!r}")
                continue
            coefs = record.section("coefs")
            frames.append(spec.frame({name: coefs.number(name, -_MAX_COEF, _MAX_COEF) for name in coefs.names}))
        except InputError:
            raise
        except ValueError as error:
            fail(printable(error, 200))
    return np.stack(frames) if frames else np.zeros((0, spec.num_coefs), np.float32)


_MAX_COEF = 1e6


def osc_message(address: str, *values: float | str) -> bytes:
    """One Open Sound Control 1.0 message; floats go as 32-bit, integers as int32.

    >>> osc_message("/jawOpen", 0.5)
    b'/jawOpen\\x00\\x00\\x00\\x00,f\\x00\\x00?\\x00\\x00\\x00'
    """
    if not address.startswith("/"):
        raise InputError(f"an OSC address starts with '/', got {address!r}")
    tags, body = ",", b""
    for value in values:
        if isinstance(value, str):
            tags += "s"
            body += _osc_string(value)
        elif isinstance(value, int):
            tags += "i"
            body += struct.pack(">i", value)
        else:
            tags += "f"
            body += struct.pack(">f", value)
    return _osc_string(address) + _osc_string(tags) + body


def osc_bundle(messages: Sequence[bytes], *, time_s: float | None = None) -> bytes:
    """Messages that take effect together; ``time_s`` in seconds since 1900 (NTP), None: at once."""
    tag = 1 if time_s is None else int(time_s * 2**32)
    elements = b"".join(struct.pack(">i", len(message)) + message for message in messages)
    return _osc_string("#bundle") + struct.pack(">Q", tag) + elements


def frame_to_osc(frame_E: Floats, spec: KinematicSpec, *, prefix: str = "/face") -> bytes:
    """One frame as an OSC bundle, a message per coefficient: ``/face/jawOpen 0.5``. Fits one UDP datagram."""
    coefs = spec.named(frame_E)
    return osc_bundle([osc_message(f"{prefix}/{name}", value) for name, value in coefs.items()])


def _osc_string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return raw + b"\0" * (4 - len(raw) % 4)


def gaze_to_looks(gaze_A4: Floats) -> dict[str, Floats]:
    """The ``eyeLook*`` shapes ``[A]`` that say the same as ``gaze [A, 4]``; a shape is full at 35 degrees."""
    full = math.radians(35.0)
    looks: dict[str, Floats] = {}
    for side, (yaw, pitch) in {"Left": (0, 1), "Right": (2, 3)}.items():
        # The right edge of the picture lies to the person's left.
        out = gaze_A4[:, yaw] if side == "Left" else -gaze_A4[:, yaw]
        looks["eyeLookOut" + side] = np.clip(out / full, 0, 1)
        looks["eyeLookIn" + side] = np.clip(-out / full, 0, 1)
        looks["eyeLookDown" + side] = np.clip(gaze_A4[:, pitch] / full, 0, 1)
        looks["eyeLookUp" + side] = np.clip(-gaze_A4[:, pitch] / full, 0, 1)
    return looks
