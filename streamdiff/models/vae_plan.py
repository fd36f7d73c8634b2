"""Which layers the encoder and the decoder of the video VAE have, in order, and how wide they are: integers only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from streamdiff.config import VAEConfig


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One member of ``middle``, ``downsamples`` or ``upsamples``."""

    kind: Literal["residual", "attention", "up", "down"]
    in_dim: int
    out_dim: int
    time: bool = False


def _middle(config: VAEConfig) -> list[LayerPlan]:
    dim = config.base_dim * config.dim_mult[-1]
    return [LayerPlan("residual", dim, dim), LayerPlan("attention", dim, dim), LayerPlan("residual", dim, dim)]


def _downsamples(config: VAEConfig) -> list[LayerPlan]:
    layers: list[LayerPlan] = []
    dim = config.base_dim
    for mult, time in zip(config.dim_mult, (*config.temporal_downsample, None), strict=True):
        for _ in range(config.num_res_blocks):
            layers.append(LayerPlan("residual", dim, config.base_dim * mult))
            dim = config.base_dim * mult
        if time is not None:
            layers.append(LayerPlan("down", dim, dim, time))
    return layers


def _upsamples(config: VAEConfig) -> list[LayerPlan]:
    layers: list[LayerPlan] = []
    dim = config.base_dim * config.dim_mult[-1]
    for mult, time in zip(config.dim_mult[::-1], (*config.temporal_downsample[::-1], None), strict=True):
        for _ in range(config.num_res_blocks + 1):
            layers.append(LayerPlan("residual", dim, config.base_dim * mult))
            dim = config.base_dim * mult
        if time is not None:
            layers.append(LayerPlan("up", dim, dim // 2, time))
            dim = dim // 2
    return layers


def encoder_columns(config: VAEConfig) -> dict[str, list[LayerPlan]]:
    return {"downsamples": _downsamples(config), "middle": _middle(config)}


def decoder_columns(config: VAEConfig) -> dict[str, list[LayerPlan]]:
    return {"middle": _middle(config), "upsamples": _upsamples(config)}


CUBE, POINT = (3, 3, 3), (1, 1, 1)


@dataclass(frozen=True, slots=True)
class Sides:
    """What a trunk reads and writes, and how."""

    in_dim: int
    out_dim: int
    in_kernel: tuple[int, int, int] = CUBE
    out_kernel: tuple[int, int, int] = CUBE
    projects: bool = False


def encoder_sides(config: VAEConfig) -> Sides:
    kernel = POINT if config.projects else CUBE
    return Sides(config.patch_channels, 2 * config.z_dim, in_kernel=kernel, projects=config.projects)


def decoder_sides(config: VAEConfig) -> Sides:
    kernel = POINT if config.projects else CUBE
    return Sides(config.z_dim, config.patch_channels, out_kernel=kernel, projects=config.projects)
