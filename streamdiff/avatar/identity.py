"""Make a bundle from a photo.

Find its landmarks; lay the 3D rig of ARKit shapes over them (similarity transform); spread each shape from the
landmarks over the picture; cut the picture open along lips and eyelids, so that what lies above and below may part;
estimate the light, so that teeth are lit like the face.

    H, W pixels   G cells along a side of the flow grid (128)   J landmarks   K drivers (1 + shapes)
    S slits (mouth, right eye, left eye)
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from streamdiff import demo
from streamdiff.arrays import Floats
from streamdiff.avatar.bundle import (
    BUNDLE_SUFFIX,
    MOUTH,
    SIZES,
    SLITS,
    IdentityBundle,
    Placement,
    geometry_fault,
    refuse_engine,
)
from streamdiff.avatar.fields import BLINKS, LASHES, NUM_MESH, fill_smoothly, pose_fields, spread
from streamdiff.avatar.kept import kept_bundle
from streamdiff.avatar.kinematics import ARKIT_NAMES
from streamdiff.avatar.landmarks import NUM_LANDMARKS, Face, Landmarker, fetch_task
from streamdiff.avatar.light import SKIN, light_of
from streamdiff.avatar.rig import load_rig
from streamdiff.errors import ConfigError, InputError
from streamdiff.media.picture import open_picture

_MIN_FACE_PX = 64
_MAX_PHOTO_PX = 2048
_MAX_TURN = 0.6
_LID_SKIN = 0.3
"""Height of the skin above the lashes that a blink stretches; what lies higher, a glasses' rim for one, stays."""
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


def read_photo(path: str | Path) -> tuple[NDArray[np.uint8], str]:
    """The pixels ``[H, W, 3]`` of an image file and the file's hash; or `InputError`.

    Upright, in sRGB, at most 2048 pixels wide or high.
    """
    refuse_engine(path)
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


def open_bundle(person: str | Path | None = None, *, size: int = 256, keep: bool = False) -> IdentityBundle:
    """The bundle of a bundle file or of a photo; None: of the photo of the demo. Raises InputError.

    ``keep``: a bundle made from a photo is kept in the user's cache folder and taken from there the next time
    (`streamdiff.avatar.kept`).
    """
    path = demo.demo_image() if person is None else Path(person)
    refuse_engine(path)
    if path.suffix == BUNDLE_SUFFIX:
        return IdentityBundle.load(path)
    return kept_bundle(path, size, lambda: create_bundle(path, size)) if keep else create_bundle(path, size)


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
    turn, scale, shift = similarity(rig.rest_J3, landmarks[:NUM_MESH])
    yaw, pitch, roll = _angles(turn)
    if max(abs(yaw), abs(pitch)) > _MAX_TURN:
        raise InputError(
            f"the face in {source} is turned by {math.degrees(max(abs(yaw), abs(pitch))):.0f} degrees; "
            f"use a photo that faces the camera"
        )
    landmarks = _settle_lip_line(crop, landmarks)
    motion_KJ2 = _personal_motion(landmarks, scale * rig.shapes_EJ3 @ turn.T)
    upper, lower = spread(landmarks, motion_KJ2, rig.triangles_R3, size, _lid_skin(crop, landmarks))
    pivot = scale * turn @ np.array([0.0, 3.0, -2.5]) + shift
    pose, mask = pose_fields(landmarks, float(pivot[2]), size)
    stomion = (landmarks[13, :2] + landmarks[14, :2]) / 2
    gain, look = light_of(crop, landmarks, rig.triangles_R3)
    bundle = IdentityBundle(
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
    if fault := geometry_fault(bundle):
        raise InputError(f"the face in {source} is cut off: {fault}; use a photo that shows all of it")
    return bundle


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
    motion[1:, :NUM_MESH] = shapes_EJ3[..., :2]
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
    for slit, name in zip(SLITS[1:], BLINKS[1:], strict=True):
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


def _lid_skin(crop: NDArray[np.uint8], landmarks: Floats) -> tuple[float, ...]:
    """Height of the skin that a blink may stretch above each slit's lashes, pixels: it ends below a dark rim."""
    grey = crop.astype(np.float32).mean(2)
    cheeks = landmarks[np.array(SKIN), :2].astype(int).clip(0, crop.shape[0] - 1)
    dark = 0.5 * float(np.median(grey[cheeks[:, 1], cheeks[:, 0]]))
    heights = [0.0]
    for upper, _ in SLITS[1:]:
        lid = landmarks[list(upper), :2]
        width = float(np.ptp(lid[:, 0]))
        most, height = _LID_SKIN * width, _LID_SKIN * width
        for x, y in lid[2:-2]:
            lashes = y - LASHES * width
            rows = np.arange(int(lashes - 1), max(int(lashes - most), 0), -1)
            rim = np.flatnonzero(grey[rows, int(x)] < dark)
            if len(rim):
                height = min(height, float(lashes - rows[rim[0]]) - 1)
        heights.append(max(height, 0.1 * width))
    return tuple(heights)


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
