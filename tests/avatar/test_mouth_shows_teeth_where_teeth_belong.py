"""The rasteriser is exact, the decoder's weights are in the library, and an open mouth is not a hole."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamdiff.avatar.head3d import interpolate, rasterize, rotation_matrix, vertex_normals
from streamdiff.avatar.kinematics import arkit64
from streamdiff.avatar.mouth import EXTENT_CM, NUM_CONDITIONS, PATCH, TOP_CM, MouthLook, paint, static_conditions
from streamdiff.avatar.render import WarpRenderer, load_mouth_decoder
from tests.avatar.drawn_face import drawn_bundle

SPEC = arkit64()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_the_rasteriser_finds_the_nearest_triangle(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vertices = rng.uniform(-3, 15, (12, 3)).astype(np.float32)
    triangles = rng.integers(0, 12, (8, 3))
    found = rasterize(vertices, triangles, 12, 12, cull=False)
    expected = np.full((12, 12), -1)
    depths = np.full((12, 12), np.inf)
    for t, (a, b, c) in enumerate(vertices[triangles].astype(np.float64)):
        area = (b[0] - a[0]) * (c[1] - a[1]) - (c[0] - a[0]) * (b[1] - a[1])
        if abs(area) < 1e-9:
            continue
        for row in range(12):
            for column in range(12):
                x, y = column + 0.5, row + 0.5
                w1 = ((x - a[0]) * (c[1] - a[1]) - (c[0] - a[0]) * (y - a[1])) / area
                w2 = ((b[0] - a[0]) * (y - a[1]) - (x - a[0]) * (b[1] - a[1])) / area
                depth = np.float32(a[2] + w1 * (b[2] - a[2]) + w2 * (c[2] - a[2]))
                if min(1 - w1 - w2, w1, w2) >= -1e-9 and depth < depths[row, column] - 1e-5:
                    depths[row, column], expected[row, column] = depth, t
    seen = found.triangle_HW >= 0
    assert (seen == (expected >= 0)).all()
    z = interpolate(found, triangles, vertices)[..., 2]
    assert np.allclose(z[seen], depths[seen], atol=1e-3)


def test_backs_are_not_drawn_and_normals_point_out() -> None:
    # A square that faces the camera (which looks along +z), wound as the head's faces are.
    square = np.array([[1, 1, 5], [1, 9, 5], [9, 9, 5], [9, 1, 5]], np.float32)
    front = np.array([[0, 1, 2], [0, 2, 3]])
    assert (rasterize(square, front, 10, 10).triangle_HW >= 0).sum() == 64
    assert (rasterize(square, front[:, ::-1], 10, 10).triangle_HW >= 0).sum() == 0
    assert np.allclose(vertex_normals(square, front), [0, 0, -1])


def test_a_rotation_vector_turns_as_the_axes_say() -> None:
    turned = rotation_matrix(np.array([0, 0.3, 0], np.float32)) @ np.array([0, 0, -1.0])
    assert turned[0] < 0, "a positive turn about y carries the nose to the left"
    assert np.allclose(rotation_matrix(np.zeros(3, np.float32)), np.eye(3))


def decode(jaw: float, bottom_cm: float) -> np.ndarray:
    conditions = torch.zeros(1, NUM_CONDITIONS)
    conditions[0, 0] = jaw
    conditions[0, 6:10] = torch.tensor([0.0, bottom_cm, 2.3, 0.0])
    conditions[0, 10:] = torch.tensor(static_conditions(MouthLook()))
    look, parts = MouthLook(), load_mouth_decoder()(conditions)
    colours = paint(parts, torch.tensor(look.teeth), torch.tensor(look.flesh), look.gloss)
    return torch.cat([colours, parts[:, 3:]], 1)[0].permute(1, 2, 0).numpy()


def row_of(y_cm: float) -> int:
    return int((y_cm - TOP_CM) / EXTENT_CM * PATCH)


def test_upper_teeth_stay_and_lower_teeth_fall_with_the_jaw() -> None:
    middle = slice(PATCH // 2 - 8, PATCH // 2 + 8)

    def bright(jaw: float, bottom: float, low_cm: float, high_cm: float) -> float:
        return float(decode(jaw, bottom)[row_of(low_cm) : row_of(high_cm), middle, :3].mean())

    for jaw, bottom in ((0.3, 1.2), (0.6, 2.3)):
        upper = bright(jaw, bottom, -0.6, -0.1)
        gap = bright(jaw, bottom, 0.25, 0.55)
        assert upper > 1.5 * gap, "teeth above, the dark behind them below"
    closed = decode(0.0, 0.1)[row_of(0.3) : row_of(0.7), middle, :3].mean()
    assert closed > 1.3 * bright(0.6, 2.3, 0.3, 0.7), "with a shut jaw lower teeth stand where the gap was"


def test_what_lies_over_the_lips_is_the_tongue_alone() -> None:
    assert decode(0.3, 1.2)[..., 3].max() < 0.1
    conditions = torch.zeros(1, NUM_CONDITIONS)
    conditions[0, [0, 3]] = torch.tensor([0.3, 1.0])
    conditions[0, 6:10] = torch.tensor([0.0, 1.2, 2.3, 0.0])
    conditions[0, 10:] = torch.tensor(static_conditions(MouthLook()))
    assert load_mouth_decoder()(conditions)[0, 3].max() > 0.5


def test_a_shut_mouth_shows_nothing_of_its_inside() -> None:
    bundle = drawn_bundle()
    renderer = WarpRenderer(bundle)
    shut = renderer.render(SPEC.frame()[None])[0]
    with torch.no_grad():
        renderer._gain.fill_(50.0)  # were any of it seen, it would glare
    assert (renderer.render(SPEC.frame()[None])[0].int() - shut.int()).abs().max() <= 3
    glare = renderer.render(SPEC.frame({"jawOpen": 0.5})[None])[0]
    assert (glare.float().mean(-1) > 250).sum() > 100
