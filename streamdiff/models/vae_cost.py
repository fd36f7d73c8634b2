"""What the video VAE costs: floating-point operations and bytes moved, in closed form."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from streamdiff.config import VAEConfig
from streamdiff.models.vae_plan import (
    CUBE,
    POINT,
    LayerPlan,
    Sides,
    decoder_columns,
    decoder_sides,
    encoder_columns,
    encoder_sides,
)


@dataclass(frozen=True, slots=True)
class _Conv:
    """One convolution over one latent frame: enough of its shape to price it."""

    in_dim: int
    out_dim: int
    taps: int
    in_pixels: int
    """Pixels read, those of the past included."""
    out_pixels: int

    @property
    def flops(self) -> int:
        return 2 * self.in_dim * self.out_dim * self.taps * self.out_pixels

    @property
    def elements(self) -> int:
        weights = (self.in_dim * self.taps + 1) * self.out_dim
        return self.in_dim * self.in_pixels + self.out_dim * self.out_pixels + weights


def _convolutions(
    sides: Sides, plan: Sequence[LayerPlan], size: tuple[int, int, int], *, first: bool
) -> Iterator[_Conv]:
    """Every convolution of a trunk for one latent frame; ``size`` is (frames, height, width) of its input."""
    t, h, w = size

    def cube(in_dim: int, out_dim: int, kernel: tuple[int, int, int] = CUBE) -> _Conv:
        return _Conv(in_dim, out_dim, math.prod(kernel), (t + kernel[0] - 1) * h * w, t * h * w)

    if sides.projects:
        yield cube(sides.in_dim, sides.out_dim, POINT)
    yield cube(sides.in_dim, plan[0].in_dim, sides.in_kernel)
    for layer in plan:
        match layer.kind:
            case "residual":
                yield cube(layer.in_dim, layer.out_dim)
                yield cube(layer.out_dim, layer.out_dim)
                if layer.in_dim != layer.out_dim:
                    yield _Conv(layer.in_dim, layer.out_dim, 1, t * h * w, t * h * w)
            case "attention":
                yield _Conv(layer.in_dim, 3 * layer.in_dim, 1, t * h * w, t * h * w)
                yield _Conv(layer.in_dim, layer.in_dim, 1, t * h * w, t * h * w)
            case "up":
                if layer.time and not first:
                    yield _Conv(layer.in_dim, 2 * layer.in_dim, 3, (t + 2) * h * w, t * h * w)
                    t = 2 * t
                yield _Conv(layer.in_dim, layer.out_dim, 9, t * h * w, 4 * t * h * w)
                h, w = 2 * h, 2 * w
            case "down":
                yield _Conv(layer.in_dim, layer.out_dim, 9, t * h * w, t * h * w // 4)
                h, w = h // 2, w // 2
                if layer.time and not first:
                    yield _Conv(layer.out_dim, layer.out_dim, 3, (t + 1) * h * w, t // 2 * h * w)
                    t = t // 2
    yield cube(plan[-1].out_dim, sides.out_dim, sides.out_kernel)


def _half(
    config: VAEConfig, half: Literal["encoder", "decoder"], latent_h: int, latent_w: int, *, first: bool
) -> list[_Conv]:
    pixels = latent_h * latent_w
    if half == "decoder":
        plan = [layer for column in decoder_columns(config).values() for layer in column]
        outer = _Conv(config.z_dim, config.z_dim, 1, pixels, pixels)
        return [outer, *_convolutions(decoder_sides(config), plan, (1, latent_h, latent_w), first=first)]
    plan = [layer for column in encoder_columns(config).values() for layer in column]
    outer = _Conv(2 * config.z_dim, 2 * config.z_dim, 1, pixels, pixels)
    factor = config.spatial_factor // config.patch
    size = (1 if first else config.temporal_factor // config.patch_frames, latent_h * factor, latent_w * factor)
    return [*_convolutions(encoder_sides(config), plan, size, first=first), outer]


def vae_flops(
    config: VAEConfig,
    half: Literal["encoder", "decoder"],
    latent_h: int,
    latent_w: int,
    *,
    first: bool = False,
) -> int:
    """Floating-point operations of the convolutions and the attention for one latent frame of one stream.

    ``first``: the frame that opens a stream. A multiplication and an addition are two operations; norms,
    activations and residual additions are not counted.
    """
    pixels = latent_h * latent_w
    attention = 4 * pixels * pixels * config.base_dim * config.dim_mult[-1]
    return attention + sum(conv.flops for conv in _half(config, half, latent_h, latent_w, first=first))


def vae_bytes(
    config: VAEConfig,
    half: Literal["encoder", "decoder"],
    latent_h: int,
    latent_w: int,
    *,
    first: bool = False,
    element_bytes: int = 2,
) -> int:
    """Memory traffic for one latent frame of one stream when everything else is fused into the convolutions.

    Each convolution reads its input, its past and its weights and writes its output, once; norm, activation,
    addition, nearest upsampling and padding cost nothing. A floor, then, not what an eager run moves.
    """
    return element_bytes * sum(conv.elements for conv in _half(config, half, latent_h, latent_w, first=first))
