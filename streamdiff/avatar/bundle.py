"""Identity bundle (``.avatar``): one person's looks in one verified safetensors file.

A frame is always a warp of the reference picture (`streamdiff.avatar.render`); nothing generated ever comes back in
here, so that the face of minute thirty is that of second one. The content is hashed: two bundles with the same
``sha256`` draw the same pixels.

    H, W pixels   G cells along a side of the flow grid (128)   J landmarks   K drivers (1 + shapes)
    S slits (mouth, right eye, left eye)
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from streamdiff.avatar.kinematics import ARKIT_NAMES, arkit64
from streamdiff.avatar.mouth import NUM_SHAPES, LowerFaceDecoder, MouthLook
from streamdiff.avatar.style import MAX_STYLE, STYLE_NAMES
from streamdiff.errors import CheckpointError
from streamdiff.facts import Facts, parse_json
from streamdiff.tensorfile import TensorFile, Wanted, like, save_tensors
from streamdiff.trust.consent import MOST_STATEMENTS, describe
from streamdiff.trust.keys import MOST_ENVELOPE, PublicKey

FORMAT = "streamdiff.identity"
ENGINE_SUFFIX = ".engine"
"""Of a format that was removed; see `refuse_engine`."""
VERSION = 1
GRID = 128
"""Cells along a side of the flow grid."""
BUNDLE_SUFFIX = ".avatar"
SIZES = (256, 512)
"""Sides of a frame, in pixels."""
Slit: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Landmarks along the opening of a mouth or an eye, from the picture's left to its right: upper side, lower side."""
MOUTH: Slit = (
    (78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308),
    (78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308),
)
RIGHT_EYE: Slit = ((33, 246, 161, 160, 159, 158, 157, 173, 133), (33, 7, 163, 144, 145, 153, 154, 155, 133))
LEFT_EYE: Slit = ((362, 398, 384, 385, 386, 387, 388, 466, 263), (362, 382, 381, 380, 374, 373, 390, 249, 263))
SLITS = (MOUTH, RIGHT_EYE, LEFT_EYE)
HOLD = (0.4, 0.2)
"""How far past its edge the upper, and the lower, side of a slit is carried on, in widths of the slit."""
SIDES_DIFFER = (1.2, 0.65, 0.65)
"""How far below mouth and eyes a frame has to ask for the lower side: the hold, and how far the skin there drops."""
NUM_LANDMARKS = 478
IRISES = (468, 473)
"""Centres of the right and of the left iris; the four that follow lie on its rim."""


@dataclass(frozen=True)
class Placement:
    """How the 3D head lies in the picture, and how its mouth is lit."""

    pixels_per_cm: float
    stomion: tuple[float, float]
    """Middle of the closed lip line, pixels."""
    roll: float
    yaw: float
    pitch: float
    """The photo's own head pose, radians (signs of `kinematics`)."""
    pivot: tuple[float, float, float]
    """What the head turns about: pixels, and depth in pixels."""
    eye_distance: float
    """Between the outer eye corners, pixels: the unit of translation."""
    gain: tuple[float, float, float]
    """What a white thing in the mouth would measure, of 1, in sRGB."""
    look: MouthLook = field(default_factory=MouthLook)


def refuse_engine(path: str | Path) -> None:
    """Raise `CheckpointError` for a file of the removed format ``.engine``, known by its name; nothing is opened."""
    if Path(path).suffix.lower() == ENGINE_SUFFIX:
        raise CheckpointError(
            f"{path}: the format {ENGINE_SUFFIX} was removed, because opening such a file could run code from it; "
            "make the .avatar from the photo again: streamdiff avatar create --photo PHOTO"
        )


@dataclass(frozen=True, eq=False)
class IdentityBundle:
    """All that is needed to draw one person: picture, landmarks, flow fields, placement, style.

    Pixels count from the top left corner, their centres at +0.5.
    """

    reference_3HW: Tensor
    """The picture, sRGB, uint8."""
    eyes_3HW: Tensor
    """The picture with the eyelids taken away (filled from the eyeballs), uint8."""
    mask_HW: Tensor
    """How much of the head's movement each pixel follows, uint8, 255: all of it."""
    landmarks_J3: Tensor
    """Pixels; x right, y down, z away."""
    motion_KJ2: Tensor
    """How far each driver moves each landmark, pixels. Driver 0 is always on: it shuts parted lips."""
    upper_K2GG: Tensor
    """The same for every cell: what lies above the slits, and all that is far from them; float16 pixels."""
    lower_K2GG: Tensor
    """What lies below the slits."""
    pose_2GG: Tensor
    """Share in the head's movement, and that share times the depth behind the pivot, pixels."""
    placement: Placement
    name: str = "avatar"
    source_sha256: str = ""
    """Of the photo or clip this was made from."""
    decoder: dict[str, Tensor] = field(default_factory=dict)
    """Learned weights of this person, by name; empty for a bundle made from a photo."""
    idle_AE: Tensor | None = None
    """Motion of the person at rest (`arkit64`, 25 a second), when a clip was given."""
    style: dict[str, float] = field(default_factory=dict)
    """How the person moves (`motion.measure_style`), when a clip was given."""
    statements: tuple[str, ...] = ()
    """Signed envelopes about this bundle: signatures and consent (`trust.consent`). They are beside the content, not in
    its hash, and nothing about them is verified by `load`.
    """

    @property
    def size(self) -> int:
        """Side of a frame, pixels."""
        return self.reference_3HW.shape[-1]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by the names they have in the file."""
        named = {
            name: getattr(self, name)
            for name in IdentityBundle.__dataclass_fields__
            if name.rpartition("_")[2] in ("3HW", "HW", "J3", "KJ2", "K2GG", "2GG")
        }
        named |= {f"decoder.{name}": value for name, value in self.decoder.items()}
        if self.idle_AE is not None:
            named["idle_AE"] = self.idle_AE
        return named

    def _facts(self) -> str:
        facts = {
            "name": self.name,
            "source_sha256": self.source_sha256,
            "placement": asdict(self.placement),
            "style": self.style,
        }
        return json.dumps(facts, sort_keys=True)

    @property
    def sha256(self) -> str:
        """Of all content: every tensor's name, shape, type and bytes, and every fact."""
        digest = hashlib.sha256(self._facts().encode())
        for name, tensor in sorted(self.tensors().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> Path:
        """Write the bundle to one file, atomically (a partial file, then a rename)."""
        metadata = {"format": FORMAT, "version": str(VERSION), "facts": self._facts(), "sha256": self.sha256}
        if self.statements:
            metadata["statements"] = json.dumps(self.statements)
        return save_tensors(self.tensors(), path, metadata)

    @staticmethod
    def load(path: str | Path) -> IdentityBundle:
        """Read and verify a bundle.

        Nothing in it is trusted: sizes are bounded before it is read, names, kinds and shapes before tensors are made,
        then facts, hash and values.

        Raises:
            CheckpointError: it is none, is newer, was altered, or holds what no bundle can.
        """
        refuse_engine(path)
        file = TensorFile(path, what="an identity bundle", hint=_HINT, most_bytes=_MAX_BYTES)
        if file.metadata.get("format") != FORMAT or file.metadata.get("version") != str(VERSION):
            file.fail(f"its format is not {FORMAT!r} of version {VERSION}")
        wanted = _wanted_tensors(file)
        tensors = file.tensors(wanted)
        facts = _read_facts(file, tensors["reference_3HW"].shape[-1])
        plain = {name: value for name, value in tensors.items() if not name.startswith(_DECODER)}
        decoder = {n.removeprefix(_DECODER): value for n, value in tensors.items() if n.startswith(_DECODER)}
        bundle = IdentityBundle(**plain, **facts, decoder=decoder, statements=_read_statements(file))
        if bundle.sha256 != file.metadata.get("sha256"):
            file.fail("it was altered after it was made: its hash differs")
        file.check_values(tensors, wanted)
        if fault := geometry_fault(bundle):
            file.fail(fault)
        return bundle

    def inspect(self, trusted: Iterable[PublicKey] = ()) -> dict[str, Any]:
        """What the bundle holds, for people: sizes, pose, light, hash, and who signed what about it."""
        place = self.placement
        tensors = self.tensors()
        return {
            "name": self.name,
            "sha256": self.sha256,
            "source_sha256": self.source_sha256,
            "size": self.size,
            "bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
            "eye_distance_px": round(place.eye_distance, 1),
            "pose_degrees": {k: round(math.degrees(getattr(place, k)), 1) for k in ("yaw", "pitch", "roll")},
            "light": {"x": round(place.look.light_x, 2), "y": round(place.look.light_y, 2)},
            "fitted": bool(self.decoder),
            "style": {name: round(value, 2) for name, value in self.style.items()},
            "idle_frames": 0 if self.idle_AE is None else len(self.idle_AE),
            "statements": describe(self.statements, self.sha256, trusted=trusted),
            "tensors": {name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in tensors.items()},
        }


_HINT = "make one from a photo: streamdiff avatar create, or create_bundle()"
_DECODER = "decoder."
_MAX_BYTES = 64 << 20
_MAX_IDLE_FRAMES = 25 * 3600
_BUSY_PX = 0.02


def _wanted_tensors(file: TensorFile) -> dict[str, Wanted]:
    """What the tensors of a bundle must be, for the size that its reference says."""
    size = file.shape_of("reference_3HW")[-1:]
    if size not in {(side,) for side in SIZES}:
        file.fail(f"its reference is no square of {' or '.join(map(str, SIZES))} pixels")
    (side,) = size
    byte, half, single = (torch.uint8,), (torch.float16,), (torch.float32,)
    drivers, far = 1 + len(ARKIT_NAMES), 8.0 * side
    wanted = {
        "reference_3HW": Wanted((3, side, side), byte),
        "eyes_3HW": Wanted((3, side, side), byte),
        "mask_HW": Wanted((side, side), byte),
        "landmarks_J3": Wanted((NUM_LANDMARKS, 3), single, -far, far),
        "motion_KJ2": Wanted((drivers, NUM_LANDMARKS, 2), single, -far, far),
        "upper_K2GG": Wanted((drivers, 2, GRID, GRID), half, -far, far),
        "lower_K2GG": Wanted((drivers, 2, GRID, GRID), half, -far, far),
        "pose_2GG": Wanted((2, GRID, GRID), half, -far, far),
        "idle_AE": Wanted((None, arkit64().num_coefs), single, -10.0, 10.0, required=False),
    }
    if any(name.startswith(_DECODER) for name in file.names):
        with torch.device("meta"):
            weights = LowerFaceDecoder().state_dict()
        wanted |= {_DECODER + name: want for name, want in like(weights).items()}
    return wanted


def _read_facts(file: TensorFile, side: int) -> dict[str, Any]:
    """Name, origin, placement and style from the metadata, typed and within their ranges."""
    try:
        values = parse_json(file.metadata.get("facts", ""))
    except ValueError as error:
        file.fail(f"its facts are no JSON ({error})")
    facts = Facts(values, file.fail)
    facts.only(("name", "source_sha256", "placement", "style"))
    style = facts.section("style")
    style.only(STYLE_NAMES)
    return {
        "name": facts.words("name", 300),
        "source_sha256": facts.words("source_sha256", 64),
        "placement": _read_placement(facts.section("placement"), side),
        "style": {name: style.number(name, -MAX_STYLE, MAX_STYLE) for name in style.names},
    }


def _read_statements(file: TensorFile) -> tuple[str, ...]:
    """The envelopes in a file, unverified: a list of a bounded number of bounded texts."""
    try:
        values = parse_json(file.metadata.get("statements", "[]"))
    except ValueError as error:
        file.fail(f"its statements are no JSON ({error})")
    short = isinstance(values, list) and len(values) <= MOST_STATEMENTS
    if not short or not all(isinstance(value, str) and len(value) <= MOST_ENVELOPE for value in values):
        file.fail("its statements are no list of a few signed texts")
    return tuple(values)


def _read_placement(facts: Facts, side: int) -> Placement:
    facts.only([f.name for f in fields(Placement)])
    look = facts.section("look")
    look.only([f.name for f in fields(MouthLook)])
    x, y = facts.numbers("stomion", 0, side, count=2)
    px, py, pz = facts.numbers("pivot", -8 * side, 8 * side, count=3)
    return Placement(
        pixels_per_cm=facts.number("pixels_per_cm", side / 1000, side),
        stomion=(x, y),
        roll=facts.number("roll", -math.pi, math.pi),
        yaw=facts.number("yaw", -1.6, 1.6),
        pitch=facts.number("pitch", -1.6, 1.6),
        pivot=(px, py, pz),
        eye_distance=facts.number("eye_distance", side / 100, side),
        gain=_colour(facts, "gain", 4.0),
        look=MouthLook(
            light_x=look.number("light_x", -4, 4),
            light_y=look.number("light_y", -4, 4),
            ambient=look.number("ambient", 0, 1),
            shape=look.numbers("shape", -10, 10, count=NUM_SHAPES),
            gloss=look.number("gloss", 0, 4),
            teeth=_colour(look, "teeth", 1.0),
            flesh=_colour(look, "flesh", 1.0),
        ),
    )


def _colour(facts: Facts, name: str, most: float) -> tuple[float, float, float]:
    red, green, blue = facts.numbers(name, 0, most, count=3)
    return red, green, blue


def geometry_fault(bundle: IdentityBundle) -> str:
    """Why this face cannot be drawn, or nothing: eyes and mouth lie in the picture, and something moves."""
    for slit in SLITS:
        points = bundle.landmarks_J3[list(slit[0] + slit[1]), :2]
        wide = float(points[:, 0].max() - points[:, 0].min())
        if float(points.min()) < 0 or float(points.max()) > bundle.size or wide < 1:
            return "its eyes or its mouth do not lie in the picture"
    if not any(bool((field.abs() > _BUSY_PX).any()) for field in (bundle.upper_K2GG, bundle.lower_K2GG)):
        return "nothing in it moves"
    return ""


def with_look(bundle: IdentityBundle, **changes: Any) -> IdentityBundle:
    """The same person with another mouth: `MouthLook` fields by name, or ``gain``."""
    place = bundle.placement
    if "gain" in changes:
        place = replace(place, gain=changes.pop("gain"))
    return replace(bundle, placement=replace(place, look=replace(place.look, **changes)))
