"""A clip gives back the motion that made it, and a decoder that knows what one picture does not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from streamdiff.avatar.bundle import IdentityBundle, with_look
from streamdiff.avatar.head3d import rotation_matrix
from streamdiff.avatar.kinematics import arkit64
from streamdiff.avatar.render import POSE_LIMITS, WarpRenderer, ease_pose
from streamdiff.errors import CheckpointError
from streamdiff.training.avatar.fit import fit_footage
from streamdiff.training.avatar.footage import Footage, neutral_frame
from streamdiff.training.avatar.read_motion import read_motion
from streamdiff.training.loop import Plan
from tests.avatar.drawn_face import drawn_bundle

SPEC = arkit64()


def clip_motion(num_frames: int) -> np.ndarray:
    """A jaw that opens and shuts, a smile, a blink, a head that sways."""
    at = np.arange(num_frames)
    motion = np.tile(SPEC.rest_E, (num_frames, 1))
    motion[:, SPEC.index("jawOpen")] = np.clip(0.3 * np.sin(at / 4), 0, 1)
    motion[:, SPEC.indices(["mouthSmileLeft", "mouthSmileRight"])] = np.clip(0.5 * np.sin(at / 11), 0, 1)[:, None]
    motion[20:23, SPEC.indices(["eyeBlinkLeft", "eyeBlinkRight"])] = 0.9
    motion[:, SPEC.index("headRotationY")] = 0.1 * np.sin(at / 9)
    motion[:, SPEC.index("headX")] = 0.05 * np.cos(at / 13)
    motion[:, SPEC.index("headScale")] = 1 + 0.03 * np.sin(at / 7)
    return motion


def landmarks_of(bundle: IdentityBundle, motion_AE: np.ndarray) -> np.ndarray:
    """Where the renderer puts the landmarks, ``[A, 478, 3]``."""
    drivers = np.concatenate([np.ones((len(motion_AE), 1)), motion_AE[:, :52]], 1)
    points = np.repeat(bundle.landmarks_J3.numpy()[None], len(motion_AE), 0).astype(np.float64)
    points[..., :2] += np.einsum("ak,kjc->ajc", drivers, bundle.motion_KJ2.numpy())
    pivot, unit = np.array(bundle.placement.pivot), bundle.placement.eye_distance
    for frame, coefs in zip(points, motion_AE, strict=True):
        eased = ease_pose(torch.from_numpy(coefs[52:57].copy()), torch.tensor(POSE_LIMITS)).numpy()
        turn, shift = rotation_matrix(eased[:3]), eased[3:] * unit
        frame[:] = float(coefs[SPEC.index("headScale")]) * (frame - pivot) @ turn.T + pivot
        frame[:, :2] += shift
    return points.astype(np.float32)


def test_motion_is_read_as_it_was_made() -> None:
    bundle, motion = drawn_bundle(), clip_motion(60)
    read, error = read_motion(bundle, landmarks_of(bundle, motion))
    assert error < 0.3
    for part in ("rotation", "translation", "scale"):
        columns = SPEC.part(part)
        assert np.abs(read[:, columns] - motion[:, columns]).max() < 0.01, part
    for name in ("jawOpen", "mouthSmileLeft", "eyeBlinkRight"):
        column = SPEC.index(name)
        assert np.corrcoef(read[:, column], motion[:, column])[0, 1] > 0.97, name
        assert np.abs(read[:, column] - motion[:, column]).mean() < 0.06, name


def other_mouth() -> IdentityBundle:
    """The same face with a mouth that no generic decoder draws."""
    return with_look(drawn_bundle(), teeth=(0.1, 0.8, 0.2), flesh=(0.1, 0.1, 0.9))


def make_footage(num_frames: int) -> Footage:
    bundle, motion = other_mouth(), clip_motion(num_frames)
    return Footage(WarpRenderer(bundle).render(motion).numpy(), landmarks_of(bundle, motion), 25.0, "made")


@pytest.mark.heavy
def test_the_neutral_frame_is_shut_awake_and_straight() -> None:
    clip = make_footage(60)
    motion = clip_motion(60)[neutral_frame(clip)]
    assert motion[SPEC.index("jawOpen")] < 0.03
    assert motion[SPEC.index("eyeBlinkLeft")] == 0
    assert abs(motion[SPEC.index("headRotationY")]) < 0.08


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_fitted_face_is_nearer_to_its_clip(tmp_path: Path) -> None:
    bundle, report = fit_footage(make_footage(300), Plan(steps=300))
    assert report.num_frames == 300
    assert report.mouth_error_fitted < 0.8 * report.mouth_error_warp
    assert report.error_fitted < report.error_warp
    assert bundle.style
    assert bundle.idle_AE is None or bundle.idle_AE.shape[1] == SPEC.num_coefs
    loaded = IdentityBundle.load(bundle.save(tmp_path / "fitted.avatar"))
    assert loaded.sha256 == bundle.sha256
    assert loaded.style == bundle.style
    motion = clip_motion(5)
    assert torch.equal(WarpRenderer(loaded).render(motion), WarpRenderer(bundle).render(motion))


def test_a_decoder_that_does_not_fit_is_refused() -> None:
    broken = dataclasses.replace(drawn_bundle(), decoder={"enter.0.weight": torch.zeros(3, 3)})
    with pytest.raises(CheckpointError, match="does not fit"):
        WarpRenderer(broken)
