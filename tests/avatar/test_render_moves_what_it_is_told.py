"""Coefficients move their own part of the face, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from streamdiff.avatar.bundle import LEFT_EYE, MOUTH, RIGHT_EYE
from streamdiff.avatar.kinematics import ARKIT_NAMES, arkit64, full256
from streamdiff.avatar.render import WarpRenderer, _rotation
from streamdiff.errors import InputError
from tests.avatar.drawn_face import drawn_bundle

SPEC = arkit64()


@pytest.fixture(scope="module")
def renderer() -> WarpRenderer:
    return WarpRenderer(drawn_bundle())


def draw(renderer: WarpRenderer, **coefs: float) -> np.ndarray:
    return renderer.render(SPEC.frame(coefs)[None])[0].numpy().astype(np.int32)


def changed(renderer: WarpRenderer, **coefs: float) -> np.ndarray:
    """Pixels that differ visibly from the face at rest."""
    return np.abs(draw(renderer, **coefs) - draw(renderer)).max(-1) > 12


def box(points: tuple[tuple[int, ...], ...], margin: float) -> tuple[slice, slice]:
    at = drawn_bundle().landmarks_J3[[j for side in points for j in side], :2].numpy()
    (x0, y0), (x1, y1) = at.min(0) - margin, at.max(0) + margin
    return slice(int(y0), int(y1) + 1), slice(int(x0), int(x1) + 1)


def test_the_face_at_rest_is_the_photo(renderer: WarpRenderer) -> None:
    photo = drawn_bundle().reference_3HW.permute(1, 2, 0).numpy().astype(np.int32)
    difference = np.abs(draw(renderer) - photo).max(-1)
    # Its lips are drawn a little apart: at rest they are shut.
    seams = np.zeros_like(difference, bool)
    for slit, margin in ((MOUTH, 16), (RIGHT_EYE, 3), (LEFT_EYE, 3)):
        seams[box(slit, margin)] = True
    assert difference[~seams].max() <= 2
    assert difference.mean() < 0.3


def test_each_frame_depends_on_its_own_row_alone(renderer: WarpRenderer) -> None:
    rng = np.random.default_rng(3)
    motion = np.tile(SPEC.rest_E, (7, 1))
    motion[:, :52] = rng.uniform(0, 0.4, (7, 52))
    motion[:, 52:57] = rng.normal(0, 0.1, (7, 5))
    together = renderer.render(motion)
    for row in (6, 0, 3):
        assert torch.equal(renderer.render(motion[row : row + 1])[0], together[row])
    assert torch.equal(WarpRenderer(drawn_bundle()).render(motion), together)


def test_a_jaw_opens_a_mouth_and_leaves_the_eyes(renderer: WarpRenderer) -> None:
    moved = changed(renderer, jawOpen=0.6)
    assert moved[box(MOUTH, 4)].mean() > 0.3
    eyes = box((RIGHT_EYE[0] + LEFT_EYE[0], RIGHT_EYE[1] + LEFT_EYE[1]), 4)
    assert moved[eyes].mean() < 0.01


@pytest.mark.parametrize(("side", "eye", "other"), [("Left", LEFT_EYE, RIGHT_EYE), ("Right", RIGHT_EYE, LEFT_EYE)])
def test_a_blink_covers_its_own_eyeball(renderer: WarpRenderer, side: str, eye, other) -> None:
    open_eye = draw(renderer)[box(eye, 0)].mean(-1)
    shut = draw(renderer, **{f"eyeBlink{side}": 1.0})[box(eye, 0)].mean(-1)
    # White and iris give way to skin: neither bright nor dark is left in the middle of the eye.
    assert open_eye.max() > 200
    assert (open_eye < 90).any()
    inner = shut[1:-1, 4:-4]
    assert ((inner > 195) | (inner < 90)).mean() < 0.08
    assert not changed(renderer, **{f"eyeBlink{side}": 1.0})[box(other, 2)].any()


def test_a_gaze_moves_the_iris_to_its_side(renderer: WarpRenderer) -> None:
    def iris_x(**coefs: float) -> float:
        eye = draw(renderer, **coefs)[box(LEFT_EYE, 0)].mean(-1)
        return float(np.argwhere(eye < 100)[:, 1].mean())

    rest = iris_x()
    assert iris_x(gazeYawLeft=0.25) > rest + 1
    assert iris_x(gazeYawLeft=-0.25) < rest - 1
    assert abs(iris_x(gazeYawRight=0.25) - rest) < 0.2


def test_a_turned_head_keeps_the_border_still(renderer: WarpRenderer) -> None:
    for pose in ({"headRotationY": 0.3}, {"headRotationX": -0.2, "headX": 0.2}, {"headRotationZ": 0.2}):
        moved = changed(renderer, **pose)
        assert moved[80:180, 80:180].mean() > 0.05
        assert not moved[[0, -1]].any()
        assert not moved[:, [0, -1]].any()


def test_turning_left_moves_the_nose_left(renderer: WarpRenderer) -> None:
    # Follows the outline of the eyes: the centre of their dark pixels.
    def eyes_x(**coefs: float) -> float:
        rows, columns = box((RIGHT_EYE[0] + LEFT_EYE[0], RIGHT_EYE[1] + LEFT_EYE[1]), 12)
        dark = draw(renderer, **coefs)[rows, columns].mean(-1) < 75
        return float(np.argwhere(dark)[:, 1].mean())

    rest = eyes_x()
    assert eyes_x(headRotationY=0.15) < rest - 3
    assert eyes_x(headRotationY=-0.15) > rest + 3
    assert eyes_x(headX=0.1) > rest + 3


@pytest.mark.heavy
@pytest.mark.parametrize("name", ARKIT_NAMES)
def test_no_shape_tears_the_picture(renderer: WarpRenderer, name: str) -> None:
    """A warp that folds or leaves the picture shows as colours that no pixel had."""
    frame = draw(renderer, **{name: 1.0})
    photo = drawn_bundle().reference_3HW.permute(1, 2, 0).numpy()
    outside = np.ones(frame.shape[:2], bool)
    outside[box(MOUTH, 40)] = False
    outside[box(RIGHT_EYE, 20)] = outside[box(LEFT_EYE, 20)] = False
    assert frame[outside].max() <= photo.max()
    assert frame[outside].min() >= photo.min()
    assert np.abs(frame - draw(renderer))[outside].mean() < 6


def test_commands_out_of_range_are_held(renderer: WarpRenderer) -> None:
    assert (draw(renderer, jawOpen=3.0) == draw(renderer, jawOpen=1.0)).all()
    assert (draw(renderer, jawOpen=-3.0) == draw(renderer)).all()
    assert draw(renderer, headRotationY=50.0).std() > 10


def test_other_layouts_are_found_by_name(renderer: WarpRenderer) -> None:
    wide = WarpRenderer(drawn_bundle(), spec=full256())
    coefs = {"jawOpen": 0.4, "headRotationY": 0.1}
    assert torch.equal(wide.render(full256().frame(coefs)[None]), renderer.render(SPEC.frame(coefs)[None]))


def test_wrong_motion_is_refused(renderer: WarpRenderer) -> None:
    with pytest.raises(InputError, match=r"\[A, 64\]"):
        renderer.render(np.zeros((2, 52), np.float32))
    with pytest.raises(InputError, match="not finite"):
        renderer.render(np.full((1, 64), np.nan, np.float32))
    assert renderer.render(np.zeros((0, 64), np.float32)).shape == (0, 256, 256, 3)


@pytest.mark.parametrize("seed", range(4))
def test_undoing_a_pose_finds_where_it_came_from(renderer: WarpRenderer, seed: int) -> None:
    """The pose applied to what undoing it answers is the place asked for, for any pose, however far."""
    coefs = torch.from_numpy(SPEC.frame())
    coefs[52:57] = torch.from_numpy(np.random.default_rng(seed).normal(0, 0.4, 5).astype(np.float32))
    with torch.inference_mode():
        turn, shift, scale = renderer._head(coefs)
        back = renderer._undo_pose(_rotation(turn), shift, scale)
        error = (renderer.pose(coefs, back) - renderer._cells).norm(dim=1)
    assert error.mean() < 0.3
    assert error.quantile(0.99) < 2.5
