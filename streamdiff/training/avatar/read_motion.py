"""Coefficients from landmarks, by least squares on a bundle's own drivers.

A frames   E coefficients   K drivers   J landmarks   N terms of the least squares
"""

from __future__ import annotations

import numpy as np

from streamdiff.arrays import Floats
from streamdiff.avatar.bundle import IRISES, LEFT_EYE, MOUTH, RIGHT_EYE, IdentityBundle
from streamdiff.avatar.identity import similarity
from streamdiff.avatar.kinematics import ARKIT_NAMES, arkit64
from streamdiff.avatar.render import EYE_RADIUS_CM, POSE_LIMITS

_NUM_MESH = 468
# Bones rather than flesh: brow ridge, bridge of the nose, temples, cheek bones.
RIGID = [6, 168, 197, 195, 5, 8, 9, 151, 10, 33, 133, 362, 263, 127, 356, 234, 454, 21, 251, 54, 284, 122, 351]
# A command that no photo of a face tells apart from another, or that no landmark shows.
_UNSEEN = ("mouthClose", "tongueOut", "cheekPuff", "jawForward")


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
    motion_AE, flat_AJ2 = _posed(bundle, rest_J3, landmarks_AJ3.astype(np.float64))
    motion_KJ2 = bundle.motion_KJ2.numpy().astype(np.float64)
    shut_J2 = rest_J3[:, :2] + motion_KJ2[0]
    gap = np.linalg.norm(motion_KJ2[0, 13] - motion_KJ2[0, 14])
    if photo_J3 is not None and gap < 0.02 * bundle.placement.eye_distance:
        shut_J2 = photo_J3[:, :2].astype(np.float64)
    important_J = np.full(_NUM_MESH, 0.3)
    seen = [j for slit in (MOUTH, RIGHT_EYE, LEFT_EYE) for side in slit for j in side]
    important_J[seen] = 1.5
    moves_AJ2, drives_EJ2 = (flat_AJ2 - shut_J2)[:, :_NUM_MESH], motion_KJ2[1:, :_NUM_MESH]
    target_AN, basis_EN = (_terms(moves, important_J) for moves in (moves_AJ2, drives_EJ2))
    basis_EN[[ARKIT_NAMES.index(name) for name in _UNSEEN]] = 0
    price = 0.004 * float((basis_EN**2).sum(1).max())
    motion_AE[:, spec.part("face")] = _solve_within_one(basis_EN, target_AN, price)
    explained_AJ2 = np.tensordot(motion_AE[:, spec.part("face")], drives_EJ2, 1)
    error = float(np.linalg.norm((moves_AJ2 - explained_AJ2)[:, seen], axis=-1).mean())
    for columns, iris, eye in ((slice(0, 2), IRISES[1], LEFT_EYE), (slice(2, 4), IRISES[0], RIGHT_EYE)):
        corners = [eye[0][0], eye[0][-1]]
        away = (flat_AJ2[:, iris] - flat_AJ2[:, corners].mean(1)) - (rest_J3[iris] - rest_J3[corners].mean(0))[:2]
        gaze = np.arcsin(np.clip(away / (EYE_RADIUS_CM * bundle.placement.pixels_per_cm), -0.45, 0.45))
        motion_AE[:, spec.part("gaze")][:, columns] = gaze
    return motion_AE.astype(np.float32), error


def _posed(bundle: IdentityBundle, rest_J3: Floats, landmarks_AJ3: Floats) -> tuple[Floats, Floats]:
    """Coefficients ``[A, E]`` of pose alone, and the landmarks ``[A, J, 2]`` with that pose taken away."""
    spec, place = arkit64(), bundle.placement
    pivot = np.array(place.pivot)
    motion_AE = np.tile(spec.rest_E, (len(landmarks_AJ3), 1))
    flat_AJ2 = np.zeros((len(landmarks_AJ3), rest_J3.shape[0], 2))
    for frame, points_J3 in enumerate(landmarks_AJ3):
        turn, scale, shift = similarity(rest_J3[RIGID], points_J3[RIGID])
        flat_AJ2[frame] = ((points_J3 - shift) @ turn / scale)[:, :2]
        moved = (scale * turn @ pivot + shift - pivot)[:2] / place.eye_distance
        pose = _uneased(np.concatenate([_rotation_vector(turn), moved]))
        motion_AE[frame, spec.part("rotation")], motion_AE[frame, spec.part("translation")] = pose[:3], pose[3:]
        motion_AE[frame, spec.part("scale")] = scale
    return motion_AE, flat_AJ2


def _terms(moves_AJ2: Floats, important_J: Floats) -> Floats:
    """Terms of the least squares ``[A, N]``: landmarks by their importance, and gaps of lips and lids beside them.

    What people see first is how far lips and lids are apart.
    """
    pairs = ((13, 14), (82, 87), (312, 317), (159, 145), (386, 374))
    gaps = [moves_AJ2[:, low] - moves_AJ2[:, high] for high, low in pairs]
    terms = np.concatenate([moves_AJ2 * important_J[:, None], 3 * np.stack(gaps, 1)], 1)
    return terms.reshape(len(moves_AJ2), -1)


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
