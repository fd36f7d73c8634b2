"""The inside of a mouth: a small learned decoder from coefficients to a picture of teeth, gums and tongue.

A photo with closed lips says nothing about what lies behind them. The decoder draws it, for any head, in a
square fixed to the skull: `EXTENT_CM` wide, its origin on the middle of the closed lip line. The lips of the
photo then decide how much of the square is seen (`streamdiff.avatar.render`), so that teeth neither swim nor
reach over a lip. Trained on pictures of a 3D head (`streamdiff.training.avatar.mouth`).

    A frames   C conditions   P pixels along a side of the square
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

PATCH = 80
"""Pixels along a side of the decoded square."""
LEFT_CM, TOP_CM, EXTENT_CM = -2.7, -1.2, 5.4
"""The square in head centimetres, from the middle of the closed lip line; x right, y down."""
NUM_SHAPES = 4
"""Principal modes of how mouths differ between heads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MouthLook:
    """How one person's mouth is lit, built and coloured; fixed for an avatar."""

    light_x: float = 0.0
    """Where the light comes from, as a slope: positive from the right of the picture."""
    light_y: float = -0.4
    """Positive from below."""
    ambient: float = 0.5
    """Share of the light that comes from everywhere."""
    shape: tuple[float, ...] = (0.0,) * NUM_SHAPES
    """How the mouth differs from the mean one: principal modes, in standard deviations."""
    gloss: float = 0.35
    """How wet teeth and tongue look, 0..1."""
    teeth: tuple[float, float, float] = (0.80, 0.75, 0.65)
    """Share of red, green and blue light that teeth reflect (linear)."""
    flesh: tuple[float, float, float] = (0.62, 0.15, 0.13)
    """The same for gums and tongue."""


MOTION_CONDITIONS = ("jawOpen", "jawForward", "jawSide", "tongueOut", "yaw", "pitch")
OPENING_CONDITIONS = ("openingTop", "openingBottom", "openingHalfWidth", "openingX")
LIGHT_CONDITIONS = ("lightX", "lightY", "ambient")
NUM_CONDITIONS = len(MOTION_CONDITIONS + OPENING_CONDITIONS + LIGHT_CONDITIONS) + NUM_SHAPES
# About one standard deviation of each in training, so that the first layer sees numbers of one size.
_SCALES = (0.3, 0.3, 0.3, 0.3, 0.15, 0.15, 0.3, 0.8, 0.6, 0.3, 0.5, 0.4, 0.3)

GAMMA = 2.2


class _PatchDecoder(nn.Module):
    """Numbers ``[A, C]`` to channels of a square picture ``[A, channels, P, P]`` in 0..1: a few linear layers, then
    convolutions that double the side until it is ``size`` (a multiple of 16)."""

    def __init__(self, num_conditions: int, size: int, width: int, scales: tuple[float, ...], *, channels: int) -> None:
        super().__init__()
        side = size // 16
        self.side, self.width = side, width
        self.scales_C: Tensor
        scales_C = torch.ones(num_conditions)
        scales_C[: len(scales)] = torch.tensor(scales)
        self.register_buffer("scales_C", scales_C, persistent=False)
        self.enter = nn.Sequential(
            nn.Linear(num_conditions, 192),
            nn.SiLU(),
            nn.Linear(192, 192),
            nn.SiLU(),
            nn.Linear(192, width * side * side),
        )
        widths = (width, width * 2 // 3, width // 2, width // 3)
        self.grow = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.leave = nn.Conv2d(widths[-1], 4 * channels, 3, padding=1)

    def forward(self, conditions_AC: Tensor) -> Tensor:
        x = self.enter(conditions_AC / self.scales_C)
        x = nn.functional.silu(x.view(-1, self.width, self.side, self.side))
        for conv in self.grow:
            x = nn.functional.silu(conv(nn.functional.interpolate(x, scale_factor=2.0)))
        return nn.functional.pixel_shuffle(self.leave(x), 2).sigmoid()


class MouthDecoder(_PatchDecoder):
    """Conditions ``[A, C]`` to what a mouth is made of, ``[A, 4, P, P]``, all in 0..1.

    Channels: share of teeth (the rest is flesh); light that reaches and leaves the surface (to the power 1/2.2);
    mirrored light (square root); share that reaches out over the lips (a tongue that is put out). `paint` makes
    colours of them, so that one decoder serves teeth and skin of any colour.
    """

    def __init__(self, width: int = 96) -> None:
        super().__init__(NUM_CONDITIONS, PATCH, width, _SCALES, channels=4)


FACE_PATCH = 96
"""Pixels along a side of a person's decoded lower face."""
FACE_LEFT_CM, FACE_TOP_CM, FACE_EXTENT_CM = -6.0, -3.6, 12.0
"""That square in head centimetres, from the middle of the closed lip line."""
NUM_FACE_CONDITIONS = 52 + 3
"""ARKit's shapes, then the head's rotation vector."""


class LowerFaceDecoder(_PatchDecoder):
    """Shapes and rotation ``[A, 55]`` of one person to what the warped lower face lacks, ``[A, 3, P, P]``.

    Differences in sRGB, -1..1. Learned from a clip (`streamdiff.training.avatar.fit`) and added to the warp: the
    person's own teeth, folds and shadows. A decoder that has learned nothing adds nothing.
    """

    def __init__(self, width: int = 96) -> None:
        super().__init__(NUM_FACE_CONDITIONS, FACE_PATCH, width, (0.2,) * 52 + (0.1,) * 3, channels=3)
        nn.init.zeros_(self.leave.weight)
        assert self.leave.bias is not None
        nn.init.zeros_(self.leave.bias)
        # What the clip never showed has not been learned: such conditions count as the nearest that it did show.
        self.low_C: Tensor
        self.high_C: Tensor
        self.register_buffer("low_C", torch.full((NUM_FACE_CONDITIONS,), -10.0))
        self.register_buffer("high_C", torch.full((NUM_FACE_CONDITIONS,), 10.0))

    def forward(self, conditions_AC: Tensor) -> Tensor:
        return super().forward(conditions_AC.clamp(self.low_C, self.high_C)) * 2 - 1


def face_window() -> Tensor:
    """How much of each pixel ``[P, P]`` of the lower face may change: nothing at the rim, so that no seam shows."""
    axis = (torch.arange(FACE_PATCH) + 0.5) / FACE_PATCH * 2 - 1
    radius = (axis[:, None].abs().pow(3) + axis[None, :].abs().pow(3)).pow(1 / 3)
    t = ((0.97 - radius) / 0.3).clamp(0, 1)
    return t * t * (3 - 2 * t)


def static_conditions(look: MouthLook) -> list[float]:
    """The part of the conditions that stays the same for one person: light, then shape."""
    return [look.light_x, look.light_y, look.ambient, *look.shape]


def paint(parts_A4PP: Tensor, teeth_3: Tensor, flesh_3: Tensor, gloss: float) -> Tensor:
    """sRGB colours ``[A, 3, P, P]``, for a white light of strength one; not clipped."""
    teeth, light, mirrored, _ = parts_A4PP.split(1, dim=1)
    flesh, ivory = flesh_3.view(1, 3, 1, 1), teeth_3.view(1, 3, 1, 1)
    # What little light reaches the back of a mouth has bounced off its walls and is red: so are the teeth there.
    ivory = ivory * torch.lerp(flesh / flesh.amax(), torch.ones_like(flesh), (1.3 * light).clamp(max=1))
    colour = torch.lerp(flesh.expand_as(ivory), ivory, teeth)
    linear = colour * light.pow(GAMMA) + gloss * mirrored.square()
    return linear.clamp(min=1e-6).pow(1 / GAMMA)
