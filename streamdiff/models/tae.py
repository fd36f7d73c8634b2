"""A light video decoder of the TAE kind: takes the place of the VAE's where decoding must not cap a stream.

Two-dimensional convolutions in blocks that also see their own input of one frame before. Weights and names
are those of the published ``taew2_1`` and ``lighttaew2_1`` decoders; the encoder in those files is not used.

Streams like the VAE's decoder: the state is a value, latent frames pass one by one, a stream cut anywhere has
the same bits. The first latent frame of a stream gives one video frame, as it does in the VAE.

Axes: B streams, T frames, C channels, H height, W width, F frames of all streams.

Source: https://github.com/madebyollin/taehv (MIT), for the architecture and its numbering.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamdiff import rng
from streamdiff.errors import ConfigError
from streamdiff.models.vae import (
    Conv2d,
    DecoderState,
    Tape,
    VideoDecoder,
    channels_last,
    interleave,
    last_frames,
    per_frame,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TAEConfig:
    """Shape of the light decoder; the defaults are the published ``taew2_1``."""

    z_dim: int = 16
    widths: tuple[int, ...] = (256, 128, 64, 64)
    """Channels at each size, smallest picture first."""
    num_blocks: int = 3
    """Blocks at each size but the last."""
    temporal_upsample: tuple[bool, ...] = (False, True, True)
    """Whether the frames double where the picture does."""
    latent_mean: tuple[float, ...] = ()
    """Set, with ``latent_std``, for weights that expect the VAE's own scale (``lighttaew2_1``)."""
    latent_std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.temporal_upsample) + 1:
            raise ConfigError(
                f"one temporal_upsample flag stands between two widths: expected {len(self.widths) - 1}, "
                f"got {len(self.temporal_upsample)}"
            )
        if self.num_blocks < 1 or min(self.z_dim, *self.widths) < 1:
            raise ConfigError(f"z_dim, widths and num_blocks must be positive, got {self}")
        for name, values in (("latent_mean", self.latent_mean), ("latent_std", self.latent_std)):
            if len(values) not in (0, self.z_dim):
                raise ConfigError(f"{name} must have one value per latent channel ({self.z_dim}), got {len(values)}")

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell, along height and along width."""
        return 2 ** len(self.temporal_upsample)

    @property
    def temporal_factor(self) -> int:
        """Video frames per latent frame (after the first)."""
        return 2 ** sum(self.temporal_upsample)


class FrameConv(Conv2d):
    """A convolution within each frame of a video."""

    def __init__(self, in_dim: int, out_dim: int, *, kernel: int = 3, bias: bool = True) -> None:
        super().__init__(in_dim, out_dim, kernel, padding=kernel // 2, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        return per_frame(super().forward, input)


class Stem(FrameConv):
    """Bounds the latents to -3..3 (``3 tanh(z / 3)``), then convolves."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(3.0 * torch.tanh(input / 3.0)))


class Tail(FrameConv):
    """To RGB."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.relu(input))


class MemBlock(nn.Module):
    """Three convolutions over a frame and the one before it, around which the frame passes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            FrameConv(2 * dim, dim), nn.ReLU(), FrameConv(dim, dim), nn.ReLU(), FrameConv(dim, dim)
        )

    def forward(self, x_BCTHW: Tensor, tape: Tape) -> Tensor:
        before_BCTHW = torch.cat([tape.recall(), x_BCTHW], 2)[:, :, :-1]
        tape.remember(last_frames(x_BCTHW, 1))
        return F.relu(self.conv(torch.cat([x_BCTHW, before_BCTHW], 1)) + x_BCTHW)


class Grow(nn.Module):
    """Mixes channels, unfolds them to frames where ``factor`` is 2, and doubles height and width.

    The published order doubles the picture first; the mix sees single pixels, so it commutes with that, and
    costs a quarter when it comes before.
    """

    def __init__(self, dim: int, *, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.conv = FrameConv(dim, dim * factor, kernel=1, bias=False)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        x_BCTHW = self.conv(x_BCTHW)
        if self.factor > 1:
            x_BCTHW = interleave(x_BCTHW, self.factor)
        return per_frame(_twice_the_side, x_BCTHW)


def _twice_the_side(x_FCHW: Tensor) -> Tensor:
    return F.interpolate(x_FCHW, scale_factor=2.0, mode="nearest")


class TAEDecoder(VideoDecoder):
    """Normalised latents to video, under the names of the published ``taew2_1``."""

    official_prefixes: ClassVar = ("decoder.",)
    """What the names of its tensors begin with in the published file."""

    def __init__(self, config: TAEConfig) -> None:
        super().__init__(config)
        self.config = config
        # In order of execution. The numbers are those of the published sequence, whose other members (soft
        # bound, ReLU, upsampling) have no weights.
        self.decoder = nn.ModuleDict({"1": Stem(config.z_dim, config.widths[0])})
        number = 3
        for dim, out_dim, time in zip(config.widths, config.widths[1:], config.temporal_upsample, strict=False):
            for _ in range(config.num_blocks):
                self.decoder[str(number)] = MemBlock(dim)
                number += 1
            self.decoder[str(number + 1)] = Grow(dim, factor=2 if time else 1)
            self.decoder[str(number + 2)] = FrameConv(dim, out_dim, bias=False)
            number += 3
        self.decoder[str(number + 1)] = Tail(config.widths[-1], 3)

    def initial_state(self, *, latent_h: int, latent_w: int, num_streams: int = 1) -> DecoderState:
        weight = next(self.parameters())
        pasts: list[Tensor] = []
        for level, dim in enumerate(self.config.widths[:-1]):
            shape = (num_streams, dim, 1, latent_h << level, latent_w << level)
            pasts += [channels_last(weight.new_zeros(shape)) for _ in range(self.config.num_blocks)]
        return DecoderState(0, tuple(pasts))

    def decode_one(
        self, z_BC1HW: Tensor, pasts: tuple[Tensor, ...], *, first: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        tape = Tape(pasts, first=first)
        x_BCTHW = channels_last(z_BC1HW)
        for layer in self.decoder.values():
            x_BCTHW = layer(x_BCTHW, tape) if isinstance(layer, MemBlock) else layer(x_BCTHW)
        if first:
            x_BCTHW = x_BCTHW[:, :, -1:]  # The frames before it would lie before the start of the video.
        return x_BCTHW.clamp(0.0, 1.0).mul(2.0).sub(1.0), tape.pasts


def initialise(decoder: TAEDecoder, *, seed: int) -> None:
    """Fill the decoder with random weights that depend on the seed and on each tensor's name only.

    Each layer keeps the power of its input (He et al. 2015), but for the branches of the blocks, whose sum
    must stay bounded, and the last layer, which paints around mid-grey.
    """
    *_, tail = decoder.decoder
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.startswith(f"decoder.{tail}."):
                gain = 0.4
            elif ".conv.4." in name:
                gain = 0.5
            elif name.startswith("decoder.1.") or ".conv.0." in name or ".conv.2." in name:
                gain = 2.0**0.5  # a ReLU follows
            else:
                gain = 1.0
            weight = decoder.get_parameter(f"{name.rpartition('.')[0]}.weight")
            std = gain * weight[0].numel() ** -0.5
            parameter.copy_(std * rng.normal(tuple(parameter.shape), "weights", seed, name))
        decoder.get_parameter(f"decoder.{tail}.bias").fill_(0.5)


def tae_flops(config: TAEConfig, latent_h: int, latent_w: int) -> int:
    """Floating-point operations of the convolutions for one latent frame of one stream, the first included.

    A multiplication and an addition are two operations; activations and residual additions are not counted.
    """
    pixels = latent_h * latent_w  # of all frames at this size
    multiply_adds = 9 * config.z_dim * config.widths[0] * pixels
    for dim, out_dim, time in zip(config.widths, config.widths[1:], config.temporal_upsample, strict=False):
        factor = 2 if time else 1
        multiply_adds += config.num_blocks * 9 * (2 + 1 + 1) * dim * dim * pixels
        multiply_adds += factor * dim * dim * pixels
        pixels *= 4 * factor
        multiply_adds += 9 * dim * out_dim * pixels
    multiply_adds += 9 * config.widths[-1] * 3 * pixels
    return 2 * multiply_adds
