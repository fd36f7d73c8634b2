"""The inside of a mouth: a small learned decoder from coefficients to a picture of teeth, gums and tongue.

A photo with closed lips says nothing about what lies behind them. The decoder draws it, for any head, in a
square fixed to the skull: `EXTENT_CM` wide, its origin on the middle of the closed lip line. The lips of the
photo then decide how much of the square is seen (`streamdiff.avatar.render`), so that teeth neither swim nor
reach over a lip. Trained on pictures of a 3D head (`streamdiff.training.mouth`).

    A frames   C conditions   P pixels along a side of the square
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields

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
    """How one person's mouth is lit and built; fixed for an avatar."""

    light_x: float = 0.0
    """Where the light comes from, as a slope: positive from the right of the picture."""
    light_y: float = -0.4
    """Positive from below."""
    ambient: float = 0.5
    """Share of the light that comes from everywhere."""
    gloss: float = 0.5
    """How wet teeth and tongue look, 0..1."""
    tooth: float = 0.0
    """Brightness of the teeth, -1..1."""
    yellow: float = 0.0
    """Colour of the teeth, -1 (blue white) .. 1 (yellow)."""
    flesh: float = 0.0
    """Brightness of gums and tongue, -1..1."""
    shape: tuple[float, ...] = (0.0,) * NUM_SHAPES
    """Position along the principal modes, in standard deviations."""

    def values(self) -> list[float]:
        """All numbers in a row, as the decoder takes them."""
        return [getattr(self, field.name) for field in fields(self) if field.name != "shape"] + list(self.shape)


MOTION_CONDITIONS = ("jawOpen", "jawForward", "jawSide", "tongueOut", "yaw", "pitch")
OPENING_CONDITIONS = ("openingTop", "openingBottom", "openingHalfWidth", "openingX")
NUM_CONDITIONS = len(MOTION_CONDITIONS) + len(OPENING_CONDITIONS) + len(MouthLook().values())
# About one standard deviation of each in training, so that the first layer sees numbers of one size.
_SCALES = (0.3, 0.3, 0.3, 0.3, 0.15, 0.15, 0.3, 0.8, 0.6, 0.3)


class MouthDecoder(nn.Module):
    """Conditions ``[A, C]`` to pictures ``[A, 4, P, P]``: sRGB, and what lies over the lips.

    Colours are for a white light of strength one; the fourth channel is the share of the pixel that reaches
    out of the mouth (a tongue that is put out). All in 0..1.
    """

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        side = PATCH // 16
        self.side, self.width = side, width
        scales = torch.ones(NUM_CONDITIONS)
        scales[: len(_SCALES)] = torch.tensor(_SCALES)
        self.scales_C: Tensor
        self.register_buffer("scales_C", scales, persistent=False)
        self.enter = nn.Sequential(
            nn.Linear(NUM_CONDITIONS, 192),
            nn.SiLU(),
            nn.Linear(192, 192),
            nn.SiLU(),
            nn.Linear(192, width * side * side),
        )
        widths = (width, width * 2 // 3, width // 2, width // 3)
        self.grow = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.leave = nn.Conv2d(widths[-1], 16, 3, padding=1)

    def forward(self, conditions_AC: Tensor) -> Tensor:
        x = self.enter(conditions_AC / self.scales_C)
        x = nn.functional.silu(x.view(-1, self.width, self.side, self.side))
        for conv in self.grow:
            x = nn.functional.silu(conv(nn.functional.interpolate(x, scale_factor=2.0)))
        return nn.functional.pixel_shuffle(self.leave(x), 2).sigmoid()
