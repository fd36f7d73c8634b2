"""Who speaks: everything that is known of one person's looks, made once from a photo and then frozen.

A frame is always a warp of the reference picture (`streamdiff.avatar.render`); nothing generated ever comes
back in here, so that the face of minute thirty is that of second one. A bundle is one file (safetensors)
whose content is hashed: two bundles with the same ``sha256`` draw the same pixels.

How a photo becomes a bundle: find its landmarks; lay the 3D rig of ARKit shapes over them (similarity
transform); spread each shape from the landmarks over the picture; cut the picture open along lips and
eyelids, so that what lies above and below may part; estimate the light, so that teeth are lit like the
face.

    H, W pixels   G cells along a side of the flow grid (128)   J landmarks   K drivers (1 + shapes)
    S slits (mouth, right eye, left eye)
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from streamdiff.arrays import Floats
from streamdiff.avatar.head3d import rasterize
from streamdiff.avatar.kinematics import ARKIT_NAMES
from streamdiff.avatar.landmarks import NUM_LANDMARKS, Face, Landmarker, fetch_task
from streamdiff.avatar.mouth import MouthLook
from streamdiff.errors import CheckpointError, ConfigError, InputError
from streamdiff.media.picture import open_picture

FORMAT = "streamdiff.identity"
VERSION = 1
GRID = 128
"""Cells along a side of the flow grid."""
SIZES = (256, 512)
"""Sides of a frame, in pixels."""

_NUM_MESH = 468
_MIN_FACE_PX = 64
_MAX_PHOTO_PX = 2048
_MAX_TURN = 0.6

# Landmarks along the opening of each slit, from the picture's left to its right: upper side, lower side.
MOUTH = (
    (78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308),
    (78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308),
)
RIGHT_EYE = ((33, 246, 161, 160, 159, 158, 157, 173, 133), (33, 7, 163, 144, 145, 153, 154, 155, 133))
LEFT_EYE = ((362, 398, 384, 385, 386, 387, 388, 466, 263), (362, 382, 381, 380, 374, 373, 390, 249, 263))
SLITS = (MOUTH, RIGHT_EYE, LEFT_EYE)
HOLD = (0.4, 0.2)
"""How far past its edge the upper, and the lower, side of a slit is carried on, in widths of the slit."""
SIDES_DIFFER = (1.2, 0.65, 0.65)
"""How far below mouth and eyes a frame has to ask for the lower side: the hold, and how far the skin there drops."""
IRISES = (468, 473)
"""Centres of the right and of the left iris; the four that follow lie on its rim."""

_OVAL = [
    *(10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377),
    *(152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109),
]
_LASHES = 0.09
"""Height of the band of lashes above a lid, which moves without stretching, in widths of the eye."""
_LID_SKIN = 0.3
"""Height of the skin above the lashes that a blink stretches; what lies higher, a glasses' rim for one, stays."""
_BLINKS = ("", "eyeBlinkRight", "eyeBlinkLeft")
"""The shape that shuts each slit."""
# Rings of lip around the inner lips, upper and lower: how much they follow when parted lips are closed.
_LIP_ROWS = (
    (
        ((62, 183, 42, 41, 38, 12, 268, 271, 272, 407, 292), 0.95),
        ((61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291), 0.6),
    ),
    (
        ((62, 96, 89, 179, 86, 15, 316, 403, 319, 325, 292), 0.95),
        ((61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291), 0.7),
    ),
)
_SKIN = (
    50,
    280,
    101,
    330,
    118,
    347,
    205,
    425,
    151,
    9,
    69,
    299,
    104,
    333,
    36,
    266,
    147,
    376,
    187,
    411,
    192,
    416,
)


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


def _placement(facts: dict[str, Any]) -> Placement:
    def tuples(values: dict[str, Any]) -> dict[str, Any]:
        return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}

    fixed = tuples(facts)
    fixed["look"] = MouthLook(**tuples(facts["look"]))
    return Placement(**fixed)


@dataclass(frozen=True, eq=False)
class IdentityBundle:
    """One person's frozen looks. Pixels count from the top left corner, their centres at +0.5."""

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
        """Write one file; nobody ever sees half of it."""
        path = Path(path)
        metadata = {"format": FORMAT, "version": str(VERSION), "facts": self._facts(), "sha256": self.sha256}
        partial = path.with_name(path.name + ".partial")
        save_file({k: v.cpu().contiguous() for k, v in self.tensors().items()}, partial, metadata)
        partial.replace(path)
        return path

    @staticmethod
    def load(path: str | Path) -> IdentityBundle:
        """Read and verify a bundle; `CheckpointError` when it is none, is newer, or was altered."""
        try:
            with safe_open(path, "pt") as opened:
                metadata = dict(opened.metadata() or {})
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} cannot be read as an identity bundle ({error}); make one with create_bundle()"
            ) from error
        if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
            raise CheckpointError(
                f"{path} is no identity bundle of version {VERSION}; make it again with create_bundle()"
            )
        facts = json.loads(metadata["facts"])
        decoder = {k.removeprefix("decoder."): tensors.pop(k) for k in list(tensors) if k.startswith("decoder.")}
        try:
            bundle = IdentityBundle(
                **tensors,
                placement=_placement(facts["placement"]),
                name=facts["name"],
                source_sha256=facts["source_sha256"],
                style=facts["style"],
                decoder=decoder,
            )
        except TypeError as error:
            raise CheckpointError(f"{path} lacks or adds tensors: {error}") from error
        if bundle.sha256 != metadata["sha256"]:
            raise CheckpointError(f"{path} was altered after it was made: its hash differs; make it again")
        return bundle

    def inspect(self) -> dict[str, Any]:
        """What the bundle holds, for people: sizes, pose, light, hash."""
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
            "tensors": {name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in tensors.items()},
        }


@dataclass(frozen=True)
class Rig:
    """How faces move: made from a 3D head by `streamdiff.training.avatar.rig`; cm, camera axes."""

    rest_J3: Floats
    """The 468 landmarks of the mesh at rest."""
    shapes_EJ3: Floats
    """What each ARKit shape adds at weight 1."""
    triangles_R3: NDArray[np.int64]
    """The landmarker's mesh."""


@functools.cache
def load_rig() -> Rig:
    """The rig that comes with the library."""
    path = importlib.resources.files("streamdiff") / "weights" / "landmark_rig.safetensors"
    with importlib.resources.as_file(path) as file:
        table = load_file(file)
    return Rig(
        table["rest_J3"].float().numpy(),
        table["shapes_EJ3"].float().numpy(),
        table["triangles_R3"].long().numpy(),
    )


def read_photo(path: str | Path) -> tuple[NDArray[np.uint8], str]:
    """The pixels ``[H, W, 3]`` of an image file and the file's hash; or `InputError`.

    Upright, in sRGB, at most 2048 pixels wide or high.
    """
    image = open_picture(path)
    image.thumbnail((_MAX_PHOTO_PX, _MAX_PHOTO_PX))
    return np.array(image.convert("RGB"), dtype=np.uint8), hashlib.sha256(Path(path).read_bytes()).hexdigest()


def find_face(picture_HW3: NDArray[np.uint8], landmarker: Landmarker, *, source: str = "the photo") -> Face:
    """The one face of a picture, frontal and large enough; `InputError` says what is wrong otherwise."""
    height, width = picture_HW3.shape[:2]
    faces = landmarker.faces(picture_HW3) if min(height, width) >= 16 else []
    if not faces:
        raise InputError(
            f"no face found in {source} ({width}x{height}); use a photo of one person who faces the camera"
        )
    wide = [float(np.ptp(face.landmarks_J3[:, 0])) for face in faces]
    if len(faces) > 1 and wide[1] > 0.4 * wide[0]:
        raise InputError(f"{len(faces)} faces found in {source}; crop it to the one person who is to speak")
    if wide[0] < _MIN_FACE_PX:
        raise InputError(
            f"the face in {source} is {wide[0]:.0f} pixels wide, too little to animate; "
            f"use a photo where it is at least {_MIN_FACE_PX}"
        )
    return faces[0]


def create_bundle(
    photo: str | Path | NDArray[np.uint8],
    size: int = 256,
    *,
    landmarker: Landmarker | None = None,
    name: str | None = None,
) -> IdentityBundle:
    """Make a bundle from one photo (a path, or pixels ``[H, W, 3]`` uint8 sRGB); about two seconds on a CPU.

    ``size`` is the side of the frames, 256 or 512. Raises `InputError` for a file that is no picture, and
    for a picture without a face, with several, or with one that is tiny, turned away or cut off. A drawing
    that the landmarker takes for a face is animated like a photo.
    """
    if size not in SIZES:
        raise ConfigError(f"a frame is {' or '.join(map(str, SIZES))} pixels wide, got size={size}")
    if isinstance(photo, np.ndarray):
        picture, digest, source = photo, hashlib.sha256(photo.tobytes()).hexdigest(), "the picture"
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise InputError(f"a picture is uint8 [H, W, 3], got {picture.dtype} {list(picture.shape)}")
    else:
        (picture, digest), source = read_photo(photo), str(photo)
        name = name or Path(photo).stem
    landmarker = landmarker or Landmarker(fetch_task())
    face = find_face(picture, landmarker, source=source)
    return bundle_from_landmarks(
        picture, face.landmarks_J3, size, name=name or "avatar", source=source, source_sha256=digest
    )


def bundle_from_landmarks(
    picture: NDArray[np.uint8],
    landmarks_J3: Floats,
    size: int = 256,
    *,
    name: str = "avatar",
    source: str = "the picture",
    source_sha256: str = "",
) -> IdentityBundle:
    """The same from pixels and landmarks that are known already (`landmarks.Face.landmarks_J3`)."""
    rig = load_rig()
    crop, landmarks = _crop_to_face(picture, landmarks_J3, size)
    turn, scale, shift = similarity(rig.rest_J3, landmarks[:_NUM_MESH])
    yaw, pitch, roll = _angles(turn)
    if max(abs(yaw), abs(pitch)) > _MAX_TURN:
        raise InputError(
            f"the face in {source} is turned by {math.degrees(max(abs(yaw), abs(pitch))):.0f} degrees; "
            f"use a photo that faces the camera"
        )
    landmarks = _settle_lip_line(crop, landmarks)
    motion_KJ2 = _personal_motion(landmarks, scale * rig.shapes_EJ3 @ turn.T)
    upper, lower = _spread(landmarks, motion_KJ2, rig.triangles_R3, size, _lid_skin(crop, landmarks))
    pivot = scale * turn @ np.array([0.0, 3.0, -2.5]) + shift
    pose, mask = _pose_fields(landmarks, float(pivot[2]), size)
    stomion = (landmarks[13, :2] + landmarks[14, :2]) / 2
    gain, look = _light(crop, landmarks, rig.triangles_R3)
    return IdentityBundle(
        reference_3HW=torch.from_numpy(crop).permute(2, 0, 1).contiguous(),
        eyes_3HW=torch.from_numpy(_without_lids(crop, landmarks)).permute(2, 0, 1).contiguous(),
        mask_HW=torch.from_numpy(mask),
        landmarks_J3=torch.from_numpy(landmarks.astype(np.float32)),
        motion_KJ2=torch.from_numpy(motion_KJ2.astype(np.float32)),
        upper_K2GG=upper.half(),
        lower_K2GG=lower.half(),
        pose_2GG=pose.half(),
        placement=Placement(
            pixels_per_cm=round(float(scale), 5),
            stomion=(round(float(stomion[0]), 4), round(float(stomion[1]), 4)),
            roll=round(roll, 5),
            yaw=round(yaw, 5),
            pitch=round(pitch, 5),
            pivot=(round(float(pivot[0]), 3), round(float(pivot[1]), 3), round(float(pivot[2]), 3)),
            eye_distance=round(float(np.linalg.norm(landmarks[263, :2] - landmarks[33, :2])), 4),
            gain=gain,
            look=look,
        ),
        name=name,
        source_sha256=source_sha256,
    )


def _crop_to_face(picture: NDArray[np.uint8], landmarks_J3: Floats, size: int) -> tuple[NDArray[np.uint8], Floats]:
    """A square around head and shoulders, resized, and the landmarks in its pixels."""
    height, width = picture.shape[:2]
    low, high = landmarks_J3[:, :2].min(0), landmarks_J3[:, :2].max(0)
    face = float(high[1] - low[1])
    x, y = (float(v) for v in (low + high) / 2)
    # Two face heights show hair and collar; a tighter or lopsided crop is better than inventing a border.
    side = float(np.clip(min(width, height), 1.25 * face, 1.95 * face))
    left, top = x - side / 2, y - side * 0.55
    if side <= width:
        left = float(np.clip(left, 0, width - side))
    if side <= height:
        top = float(np.clip(top, 0, height - side))
    image = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float()
    factor = side / size
    if factor > 1:
        # A box as wide as a target pixel keeps detail that plain bilinear reduction would alias.
        blur = torch.exp(-0.5 * (torch.arange(-4, 5) / (0.45 * factor)).square())
        blur = blur / blur.sum()
        padded = functional.pad(image, (4, 4, 4, 4), mode="replicate")
        image = functional.conv2d(padded, blur.view(1, 1, 9, 1).expand(3, 1, 9, 1), groups=3)
        image = functional.conv2d(image, blur.view(1, 1, 1, 9).expand(3, 1, 1, 9), groups=3)
    axis = (torch.arange(size) + 0.5) * factor
    v, u = torch.meshgrid(top + axis, left + axis, indexing="ij")
    grid = torch.stack([u * (2 / width) - 1, v * (2 / height) - 1], -1)[None]
    crop = functional.grid_sample(image, grid, mode="bicubic", padding_mode="border", align_corners=False)
    pixels = crop[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()
    return pixels, ((landmarks_J3 - np.array([left, top, 0])) / factor).astype(np.float32)


def similarity(source_J3: Floats, target_J3: Floats) -> tuple[Floats, float, Floats]:
    """Rotation, scale and shift that carry one point set onto the other (Umeyama 1991)."""
    source, target = source_J3.astype(np.float64), target_J3.astype(np.float64)
    a, b = source - source.mean(0), target - target.mean(0)
    u, s, vt = np.linalg.svd(b.T @ a)
    flip = np.diag([1, 1, np.sign(np.linalg.det(u @ vt))])
    turn = u @ flip @ vt
    scale = float((s * np.diag(flip)).sum() / (a**2).sum())
    return turn, scale, target.mean(0) - scale * turn @ source.mean(0)


def _angles(turn: Floats) -> tuple[float, float, float]:
    """Yaw (about y), pitch (about x), roll (about z) of a rotation, radians."""
    yaw = math.asin(float(np.clip(turn[0, 2], -1, 1)))
    pitch = math.atan2(float(-turn[1, 2]), float(turn[2, 2]))
    roll = math.atan2(float(-turn[0, 1]), float(turn[0, 0]))
    return yaw, pitch, roll


def _settle_lip_line(crop: NDArray[np.uint8], landmarks: Floats) -> Floats:
    """Lay the inner lips of a closed mouth on the dark line between them, where the landmarks miss it."""
    upper, lower = (list(side) for side in MOUTH)
    gap = np.linalg.norm(landmarks[upper[1:-1], :2] - landmarks[lower[1:-1], :2], axis=1)
    width = float(np.linalg.norm(landmarks[308, :2] - landmarks[78, :2]))
    if gap.max() > 0.05 * width:
        # Parted lips: keep clear of the teeth, which would else be drawn along the closed lips.
        parted = landmarks.copy()
        parted[upper[1:-1], 1] -= 0.02 * width
        parted[lower[1:-1], 1] += 0.035 * width
        return parted
    grey = crop.astype(np.float32).mean(2)
    reach = max(1, round(0.045 * width))
    moves = np.zeros(len(upper))
    for n, (a, b) in enumerate(zip(upper, lower, strict=True)):
        x, y = (landmarks[a, :2] + landmarks[b, :2]) / 2
        column = int(np.clip(x, 1, grey.shape[1] - 2))
        rows = np.arange(max(int(y) - reach, 1), min(int(y) + reach + 1, grey.shape[0] - 1))
        dark = grey[rows, column - 1 : column + 2].mean(1)
        # Prefer near rows: beside a moustache the darkest row is not the lip line.
        cost = dark - dark.min() + 2.0 * np.abs(rows + 0.5 - y)
        moves[n] = rows[cost.argmin()] + 0.5 - y
    smooth = np.convolve(np.pad(moves, 2, mode="edge"), [0.15, 0.2, 0.3, 0.2, 0.15], mode="valid")
    settled = landmarks.copy()
    for n, (a, b) in enumerate(zip(upper, lower, strict=True)):
        middle = (landmarks[a, 1] + landmarks[b, 1]) / 2 + smooth[n]
        settled[[a, b], 1] = middle
    return settled


def _personal_motion(landmarks: Floats, shapes_EJ3: Floats) -> Floats:
    """Drivers ``[K, J, 2]``: the rig's shapes on this face, corrected where contact has to be exact."""
    motion = np.zeros((1 + len(shapes_EJ3), NUM_LANDMARKS, 2))
    motion[1:, :_NUM_MESH] = shapes_EJ3[..., :2]
    points = landmarks[:, :2].astype(np.float64)
    # Driver 0 shuts lips that are parted in the photo.
    upper, lower = (np.array(side) for side in MOUTH)
    gap = points[lower] - points[upper]
    for side, share in ((0, 0.45), (1, -0.55)):
        motion[0, np.array(MOUTH[side])] = share * gap
        for row, follow in _LIP_ROWS[side]:
            motion[0, np.array(row)] = share * gap * follow
    # The 3D head's upper lip follows its jaw down over the teeth; that of people who speak hardly does.
    jaw = 1 + ARKIT_NAMES.index("jawOpen")
    for rows in (MOUTH[0][1:-1], *(row[1:-1] for row, _ in _LIP_ROWS[0])):
        motion[jaw, np.array(rows), 1] *= 0.4
    # A blink ends where the lower lid is: the upper lid falls by this eye's opening, not by the rig's.
    for slit, name in zip(SLITS[1:], _BLINKS[1:], strict=True):
        driver = 1 + ARKIT_NAMES.index(name)
        above, below = (np.array(side) for side in slit)
        along = points[below]
        order = along[:, 0].argsort()
        target_y = np.interp(points[above, 0], along[order, 0], along[order, 1])
        rise = 0.5 * motion[driver, below, 1]
        motion[driver, below] *= 0.5
        fall = target_y - points[above, 1] + np.interp(points[above, 0], along[order, 0], rise[order])
        # A little further than they meet: the seam comes to lie on skin, not on the white above the lower lid.
        fall[1:-1] += 0.09 * float(np.ptp(points[above, 0]))
        motion[driver, above, 1] = fall
        motion[driver, above, 0] *= 0.3
    return motion.astype(np.float32)


def _oval_radius(landmarks: Floats, size: int) -> tuple[Tensor, Tensor]:
    """For each cell its distance from the middle of the face, in radii of the oval, and its direction's y."""
    oval = landmarks[_OVAL, :2].astype(np.float64)
    centre = (oval.min(0) + oval.max(0)) / 2
    spokes = oval - centre
    angle = np.arctan2(spokes[:, 1], spokes[:, 0])
    order = angle.argsort()
    axis = (np.arange(GRID) + 0.5) * (size / GRID)
    v, u = np.meshgrid(axis - centre[1], axis - centre[0], indexing="ij")
    radius = np.interp(np.arctan2(v, u), angle[order], np.hypot(*spokes.T)[order], period=2 * math.pi)
    distance = np.hypot(u, v)
    return torch.from_numpy(distance / radius), torch.from_numpy(v / np.maximum(distance, 1e-6))


def _between(x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """0 below ``low``, 1 above ``high``, smooth in between."""
    t = ((x - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def _to_border() -> Tensor:
    """Distance of each cell from the border of the picture, in sides of it."""
    axis = (torch.arange(GRID) + 0.5) / GRID
    edge = torch.minimum(axis, 1 - axis)
    return torch.minimum(edge[:, None], edge[None, :])


def _pose_fields(landmarks: Floats, pivot_z: float, size: int) -> tuple[Tensor, NDArray[np.uint8]]:
    """How the head's movement spreads: ``[2, G, G]``, and the share as a mask in pixels."""
    rho, down = _oval_radius(landmarks, size)
    up, below = (-down).clamp(min=0), down.clamp(min=0)
    inner = 1.25 + 0.25 * up - 0.2 * below
    outer = 2.4 + 0.5 * up + 0.1 * below
    share = 1 - _between(rho, inner, outer)
    share = share * _between(_to_border(), 0.004, 0.12)
    # Depth: from the landmarks over the face, smoothly on towards the ears and hair.
    cells = torch.from_numpy(landmarks[:_NUM_MESH, :2] * (GRID / size)).long().clamp(0, GRID - 1)
    depth = torch.zeros(GRID, GRID, dtype=torch.float64)
    count = torch.zeros(GRID, GRID, dtype=torch.float64)
    z = torch.from_numpy(landmarks[:_NUM_MESH, 2].astype(np.float64) - pivot_z)
    depth.index_put_((cells[:, 1], cells[:, 0]), z, accumulate=True)
    count.index_put_((cells[:, 1], cells[:, 0]), torch.ones_like(z), accumulate=True)
    known = count > 0
    depth = torch.where(known, depth / count.clamp(min=1), 0)
    # The head goes on behind the oval: its sides lie deeper than its rim.
    rim = float(z[torch.tensor(_OVAL)].mean())
    far = rho > 1.5
    depth = torch.where(far, torch.full_like(depth, rim * 0.6), depth)
    depth = fill_smoothly(depth[None], known | far)[0]
    depth = _blur(depth[None].float(), 2.0)[0].double()
    pose = torch.stack([share, share * depth])
    mask = functional.interpolate(share[None, None].float(), size=(size, size), mode="bilinear", align_corners=False)
    return pose.float(), (mask[0, 0] * 255).round().to(torch.uint8).numpy()


def fill_smoothly(values_CGG: Tensor, known_GG: Tensor, *, iterations: int = 400) -> Tensor:
    """Keep the known cells; make each other the mean of its neighbours (harmonic), free at the border.

    Conjugate gradients on the unknown cells, from a start that already carries the coarse shape.
    """
    values = values_CGG * known_GG
    x = torch.where(known_GG, values, _coarse_fill(values, known_GG.to(values.dtype)))
    free = (~known_GG).to(values.dtype)

    def residual_of(field_CGG: Tensor) -> Tensor:
        padded = functional.pad(field_CGG[None], (1, 1, 1, 1), mode="replicate")[0]
        around = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
        return (4 * field_CGG - around) * free

    r = -residual_of(x)
    p, rr = r.clone(), (r * r).sum((1, 2), keepdim=True)
    floor = 1e-7 * rr.amax() + 1e-30
    for _ in range(iterations):
        ap = residual_of(p)
        alpha = rr / (p * ap).sum((1, 2), keepdim=True).clamp(min=1e-30)
        x, r = x + alpha * p, r - alpha * ap
        rr_next = (r * r).sum((1, 2), keepdim=True)
        p, rr = r + rr_next / rr.clamp(min=1e-30) * p, rr_next
        if float(rr.amax()) < floor:
            break
    return x


def _coarse_fill(values: Tensor, known: Tensor) -> Tensor:
    """Unknown cells from an ever coarser picture of the known ones."""
    if float(known.min()) >= 1 or max(values.shape[-2:]) <= 2:
        return values / known.clamp(min=1e-12)
    small_values = functional.avg_pool2d(values[None], 2, ceil_mode=True)[0]
    small_known = functional.avg_pool2d(known[None, None], 2, ceil_mode=True)[0, 0]
    seen = small_known > 0
    small = torch.where(seen, small_values / small_known.clamp(min=1e-12), 0)
    small = _coarse_fill(small, seen.to(values.dtype))
    shape = values.shape[-2:]
    back = functional.interpolate(small[None], size=shape, mode="bilinear", align_corners=False)[0]
    return torch.where(known > 0, values, back)


def _blur(values_CGG: Tensor, sigma: float) -> Tensor:
    reach = math.ceil(3 * sigma)
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma).square())
    taps = (taps / taps.sum()).to(values_CGG.dtype)
    x = functional.pad(values_CGG[:, None], (reach, reach, reach, reach), mode="replicate")
    x = functional.conv2d(x, taps.view(1, 1, -1, 1))
    return functional.conv2d(x, taps.view(1, 1, 1, -1))[:, 0]


def _lid_skin(crop: NDArray[np.uint8], landmarks: Floats) -> tuple[float, ...]:
    """Height of the skin that a blink may stretch above each slit's lashes, pixels: it ends below a dark rim."""
    grey = crop.astype(np.float32).mean(2)
    cheeks = landmarks[np.array(_SKIN), :2].astype(int).clip(0, crop.shape[0] - 1)
    dark = 0.5 * float(np.median(grey[cheeks[:, 1], cheeks[:, 0]]))
    heights = [0.0]
    for upper, _ in SLITS[1:]:
        lid = landmarks[list(upper), :2]
        width = float(np.ptp(lid[:, 0]))
        most, height = _LID_SKIN * width, _LID_SKIN * width
        for x, y in lid[2:-2]:
            lashes = y - _LASHES * width
            rows = np.arange(int(lashes - 1), max(int(lashes - most), 0), -1)
            rim = np.flatnonzero(grey[rows, int(x)] < dark)
            if len(rim):
                height = min(height, float(lashes - rows[rim[0]]) - 1)
        heights.append(max(height, 0.1 * width))
    return tuple(heights)


def _spread(
    landmarks: Floats,
    motion_KJ2: Floats,
    triangles: NDArray[np.int64],
    size: int,
    lid_skin: tuple[float, ...],
) -> tuple[Tensor, Tensor]:
    """From landmarks to cells, above the slits and below: twice ``[K, 2, G, G]``, pixels."""
    cell = size / GRID
    screen = landmarks[:_NUM_MESH].copy()
    screen[:, :2] /= cell
    # The mesh closes mouth and eyes with triangles; those are the holes.
    holes = [np.isin(triangles, [j for side in slit for j in side]).all(1) for slit in SLITS]
    skin = triangles[~np.any(holes, axis=0)]
    found = rasterize(screen, skin, GRID, GRID, cull=False)
    covered = torch.from_numpy(found.triangle_HW >= 0)
    corners = skin[np.maximum(found.triangle_HW, 0)]
    weights = torch.from_numpy(found.weights_HW3.astype(np.float64))
    motion = torch.from_numpy(motion_KJ2.astype(np.float64))
    field_KGG2 = sum(motion[:, corners[..., n]] * weights[..., n, None] for n in range(3))
    assert isinstance(field_KGG2, Tensor)
    face = field_KGG2.permute(0, 3, 1, 2) * covered
    rho, down = _oval_radius(landmarks, size)
    far = rho > 1.35 + 0.35 * down.clamp(min=0)
    border = torch.zeros(GRID, GRID, dtype=torch.bool)
    border[[0, -1]] = border[:, [0, -1]] = True
    K = face.shape[0]
    face = fill_smoothly(face.flatten(0, 1).float(), covered | far | border).view(K, 2, GRID, GRID)
    axis = (np.arange(GRID) + 0.5) * cell
    v, u = np.meshgrid(axis, axis, indexing="ij")
    still = _between(_to_border(), 0.004, 0.03)
    out: list[Tensor] = []
    for side in (0, 1):
        values = face.clone()
        for slit, blink, skin_above in zip(SLITS, _BLINKS, lid_skin, strict=True):
            edge = landmarks[list(slit[side]), :2].astype(np.float64)
            other = landmarks[list(slit[1 - side]), :2].astype(np.float64)
            order = edge[:, 0].argsort(kind="stable")
            x = edge[order, 0]
            height = np.interp(u, x, edge[order, 1])
            width = float(x[-1] - x[0])
            reach = HOLD[side] * width
            if side == 0 and blink:
                height = height - _LASHES * width
            within = (u >= x[0]) & (u <= x[-1])
            beyond = (
                (v > height) & (v < other[:, 1].max() + reach)
                if side == 0
                else (v < height) & (v > other[:, 1].min() - reach)
            )
            cells = torch.from_numpy(within & beyond)
            # Past its edge a lip goes on as it is there: a warp that starts beyond still finds the lip.
            rim = motion[:, list(slit[side])][:, order].numpy()
            held = np.stack([[np.interp(u[0], x, rim[k, :, axis_]) for axis_ in (0, 1)] for k in range(K)])
            rims = torch.from_numpy(held.astype(np.float32))[:, :, None, :]
            values = torch.where(cells, rims, values)
            if side == 0 and blink:
                # Finer than the mesh: the skin stretches evenly from above the lashes.
                driver = 1 + ARKIT_NAMES.index(blink)
                share = torch.from_numpy(1 - (height - v) / skin_above).clamp(0, 1).float()
                over = torch.from_numpy(within & (v <= height))
                values[driver] = torch.where(cells, values[driver], rims[driver] * share * over)
        out.append(_blur(values.flatten(0, 1), 0.7).view(K, 2, GRID, GRID) * still)
    return out[0], out[1]


def _without_lids(crop: NDArray[np.uint8], landmarks: Floats) -> NDArray[np.uint8]:
    """The picture with the eyeballs carried on under the lids, for eyes that open wider or look aside."""
    size = crop.shape[0]
    image = torch.from_numpy(crop.copy()).permute(2, 0, 1).double()
    axis = np.arange(size) + 0.5
    v, u = np.meshgrid(axis, axis, indexing="ij")
    for slit in SLITS[1:]:
        upper, lower = (landmarks[list(side), :2].astype(np.float64) for side in slit)
        upper, lower = upper[upper[:, 0].argsort()], lower[lower[:, 0].argsort()]
        width = float(upper[-1, 0] - upper[0, 0])
        # Lashes and the lid's shadow are no part of the eyeball.
        inset = 0.05 * width
        top = np.interp(u, upper[:, 0], upper[:, 1]) + inset
        bottom = np.interp(u, lower[:, 0], lower[:, 1]) - 0.5 * inset
        inside = (v > top) & (v < bottom) & (u > upper[0, 0]) & (u < upper[-1, 0])
        left, right = int(upper[0, 0] - 0.3 * width), math.ceil(upper[-1, 0] + 0.3 * width)
        first = int(min(upper[:, 1].min(), lower[:, 1].min()) - 0.4 * width)
        last = math.ceil(max(upper[:, 1].max(), lower[:, 1].max()) + 0.4 * width)
        left, first = max(left, 0), max(first, 0)
        right, last = min(right, size), min(last, size)
        if not inside[first:last, left:right].any():
            continue
        window = image[:, first:last, left:right]
        known = torch.from_numpy(inside[first:last, left:right])
        filled = fill_smoothly(window, known)
        raw_top = np.interp(u, upper[:, 0], upper[:, 1])[first:last, left:right]
        # Keep the true pixels of the whole opening; only what a lid covers is filled.
        open_now = torch.from_numpy(
            (v[first:last, left:right] > raw_top)
            & (v < np.interp(u, lower[:, 0], lower[:, 1]))[first:last, left:right]
            & ((u > upper[0, 0]) & (u < upper[-1, 0]))[first:last, left:right]
        )
        image[:, first:last, left:right] = torch.where(open_now, window, filled)
    return image.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def _light(
    crop: NDArray[np.uint8], landmarks: Floats, triangles: NDArray[np.int64]
) -> tuple[tuple[float, float, float], MouthLook]:
    """How bright white would be in this photo, and where the light comes from (Lambert, least squares)."""
    size = crop.shape[0]
    points = landmarks[:_NUM_MESH].astype(np.float64)
    normals = np.zeros_like(points)
    a, b, c = (points[triangles[:, n]] for n in range(3))
    for n in range(3):
        np.add.at(normals, triangles[:, n], np.cross(b - a, c - a))
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
    normals *= -np.sign(np.median(normals[:, 2]))
    linear = (crop.astype(np.float64) / 255) ** 2.2
    soft = _blur(torch.from_numpy(linear).permute(2, 0, 1), size / 128).permute(1, 2, 0).numpy()
    chosen = np.array(_SKIN)
    x, y = (points[chosen, :2].astype(int).clip(0, size - 1)).T
    colours = soft[y, x]
    bright = colours.mean(1)
    # On skin alone; the ridge keeps a flatly lit face from inventing a direction.
    terms = np.concatenate([np.ones((len(chosen), 1)), normals[chosen]], 1)
    ridge = np.diag([1e-3, 0.5, 0.5, 0.5]) * len(chosen) * 0.05
    fit = np.linalg.solve(terms.T @ terms + ridge, terms.T @ bright)
    direct = fit[1:]
    strength = float(np.linalg.norm(direct))
    towards = direct / max(strength, 1e-9)
    depth = max(-towards[2], 0.35)
    light_x, light_y = (float(np.clip(v / depth, -0.8, 0.8)) for v in towards[:2])
    skin = np.median(colours, axis=0)
    # Skin reflects between a tenth (very dark) and a half (very light) of the light: guess the light
    # between the two, and take its colour half from the skin, whose own tint is a mean human one.
    level = float(np.clip(skin.mean() / 0.42, 0.25, 0.95)) ** 0.75
    tint = skin / np.array([0.52, 0.33, 0.25])
    tint = ((tint / tint.mean()) ** 0.6).clip(0.82, 1.15)
    # Light may be warmer than white, seldom greener or bluer: pale skin only looks so.
    tint = np.minimum.accumulate(tint)
    gain = tuple(round(float(v), 4) for v in (level * tint) ** (1 / 2.2))
    look = MouthLook(
        light_x=round(light_x, 3),
        light_y=round(float(np.clip(light_y, -0.45, 0.1)), 3),
        ambient=round(float(np.clip(1 - strength / max(float(bright.mean()), 1e-6), 0.5, 0.8)), 3),
    )
    return (gain[0], gain[1], gain[2]), look


def with_look(bundle: IdentityBundle, **changes: Any) -> IdentityBundle:
    """The same person with another mouth: `MouthLook` fields by name, or ``gain``."""
    place = bundle.placement
    if "gain" in changes:
        place = replace(place, gain=changes.pop("gain"))
    return replace(bundle, placement=replace(place, look=replace(place.look, **changes)))
