"""The causal video VAE of Wan2.1, as an encoder and a decoder that stream.

Weights and parameter names are those of the published ``Wan2.1_VAE.pth``; `official_name` translates those of
diffusers' ``AutoencoderKLWan``. The two halves are separate modules, because no rank needs both.

A module holds weights only. What a stream has seen is a value: `encode` and `decode` take a state and return
the next one, made of new tensors, so that an old state is a snapshot to which a stream can be taken back.
Every call works through the same shapes, one latent frame at a time, however many frames it was given: a
stream cut anywhere gives the same bits as the whole.

Time is causal: the first latent frame is one video frame, each later one is ``temporal_factor`` of them.

Axes: B streams, T frames (latent or video), C channels, H height, W width, F frames of all streams, L pixels
of a frame. Activations are channels-last in memory (``torch.channels_last_3d``), the layout that
convolutions, channel norms and RGB output all prefer.

Source: Wan (arXiv 2503.20314, section 4.1); https://github.com/Wan-Video/Wan2.2, wan/modules/vae2_1.py.
"""

from __future__ import annotations

import abc
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import streamdiff_kernels as kernels
from streamdiff import rng
from streamdiff.config import VAEConfig
from streamdiff.errors import ConfigError
from streamdiff.models.packing import Packing
from streamdiff.models.vae_plan import (
    POINT,
    LayerPlan,
    Sides,
    decoder_columns,
    decoder_sides,
    encoder_columns,
    encoder_sides,
)
from streamdiff_kernels import Impl

_SMALLEST_NORM = 1e-12
"""Of a pixel's channel vector, as in the published model; a shorter one is not scaled to unit length."""


@dataclass(frozen=True, slots=True, eq=False)
class DecoderState:
    """Causal-convolution cache of a decoder for one batch of streams; never written to, so it is a snapshot."""

    num_latents: int
    """Latent frames decoded so far."""
    pasts: tuple[Tensor, ...]
    """For each layer that looks back, the last frames of its input, in order of execution."""

    @property
    def bytes(self) -> int:
        """Bytes held by the tensors."""
        return _bytes(self.pasts)


@dataclass(frozen=True, slots=True, eq=False)
class EncoderState:
    """Causal-convolution cache of an encoder for one batch of streams; never written to, so it is a snapshot."""

    num_latents: int
    """Latent frames encoded so far."""
    waiting_BCTHW: Tensor
    """Video frames that do not fill a latent frame yet."""
    pasts: tuple[Tensor, ...]
    """For each layer that looks back, the last frames of its input, in order of execution."""

    @property
    def bytes(self) -> int:
        """Bytes held by the tensors."""
        return _bytes((self.waiting_BCTHW, *self.pasts))


class LatentStatistics(Protocol):
    """How the latents of a decoder are scaled, per channel; empty where they are not."""

    @property
    def z_dim(self) -> int: ...

    @property
    def latent_mean(self) -> tuple[float, ...]: ...

    @property
    def latent_std(self) -> tuple[float, ...]: ...


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Tape:
    """Causal-convolution cache of one pass: each layer reads its past frames and stores those for the next pass."""

    def __init__(self, pasts: tuple[Tensor, ...], *, first: bool) -> None:
        self.first = first
        """Whether this is the latent frame that opens the stream."""
        self._pasts = iter(pasts)
        self._remembered: list[Tensor] = []

    def recall(self) -> Tensor:
        return next(self._pasts)

    def remember(self, past_BCTHW: Tensor) -> None:
        self._remembered.append(past_BCTHW)

    @property
    def pasts(self) -> tuple[Tensor, ...]:
        """What the next pass shall recall, in order of execution."""
        return tuple(self._remembered)


def last_frames(x_BCTHW: Tensor, num: int) -> Tensor:
    """The last frames, as a tensor of their own: a view would keep the whole of x alive."""
    return x_BCTHW[:, :, -num:].clone(memory_format=torch.channels_last_3d)


def per_frame(layer: Callable[[Tensor], Tensor], x_BCTHW: Tensor) -> Tensor:
    """Apply a layer for pictures, (F, C, H, W), to every frame; views only, when x is channels-last."""
    return _from_pictures(layer(_to_pictures(x_BCTHW)), x_BCTHW.shape[0])


def _to_pictures(x_BCTHW: Tensor) -> Tensor:
    # By way of (F, H, W, C): `flatten` alone gives a single frame strides that torch does not take for such.
    return x_BCTHW.permute(0, 2, 3, 4, 1).flatten(0, 1).permute(0, 3, 1, 2)


def _from_pictures(x_FCHW: Tensor, num_streams: int) -> Tensor:
    return x_FCHW.permute(0, 2, 3, 1).unflatten(0, (num_streams, -1)).permute(0, 4, 1, 2, 3)


def interleave(x_BCTHW: Tensor, num_groups: int) -> Tensor:
    """Turn channel groups into frames: (B, G * C, T, H, W) to (B, C, T * G, H, W), first group earliest."""
    x_BTHWGC = x_BCTHW.permute(0, 2, 3, 4, 1).unflatten(-1, (num_groups, -1))
    return x_BTHWGC.permute(0, 1, 4, 2, 3, 5).flatten(1, 2).contiguous().permute(0, 4, 1, 2, 3)


def channels_last(x_BCTHW: Tensor) -> Tensor:
    """The same values with channels last in memory, also where axes of one element leave the strides open."""
    pictures_FCHW = _to_pictures(x_BCTHW).contiguous(memory_format=torch.channels_last)
    return _from_pictures(pictures_FCHW, x_BCTHW.shape[0])


def fold(x_BCTHW: Tensor, config: VAEConfig) -> Tensor:
    """Fold patches into channels, a pixel's column varying slower than its row (as Wan2.2 does), its frame slowest.

    A single frame, as opens a stream, stands for all frames of its patches.
    """
    p, frames = config.patch, config.patch_frames
    if p == frames == 1:
        return x_BCTHW
    if x_BCTHW.shape[2] == 1:
        x_BCTHW = x_BCTHW.expand(-1, -1, frames, -1, -1)
    patches = x_BCTHW.unflatten(4, (-1, p)).unflatten(3, (-1, p)).unflatten(2, (-1, frames))
    return patches.permute(0, 3, 1, 7, 5, 2, 4, 6).flatten(1, 4)


def unfold(x_BCTHW: Tensor, config: VAEConfig, *, first: bool) -> Tensor:
    """Inverse of `fold`; of the patches that open a stream, only the last frame is real."""
    p, frames = config.patch, config.patch_frames
    if p == frames == 1:
        return x_BCTHW
    patches = x_BCTHW.unflatten(1, (frames, -1, p, p)).permute(0, 2, 5, 1, 6, 4, 7, 3)
    frames_BCTHW = patches.flatten(6, 7).flatten(4, 5).flatten(2, 3)
    return frames_BCTHW[:, :, -1:] if first else frames_BCTHW


class CausalConv3d(nn.Conv3d):
    """A convolution that sees no later frame; the frames before its input are handed in.

    ``past_frames`` is how many it needs: kernel minus stride, so that outputs tile the time axis.
    """

    packing: Packing | None = None

    def __init__(self, in_dim: int, out_dim: int, kernel: tuple[int, int, int], *, stride_t: int = 1) -> None:
        padding = (0, kernel[1] // 2, kernel[2] // 2)
        super().__init__(in_dim, out_dim, kernel, stride=(stride_t, 1, 1), padding=padding)
        self.past_frames = kernel[0] - stride_t

    def stream(self, x_BCTHW: Tensor, tape: Tape) -> Tensor:
        """Convolve x with the cached past frames in front of it."""
        if self.past_frames == 0:
            return self(x_BCTHW)
        joined_BCTHW = torch.cat([tape.recall(), x_BCTHW], 2)
        tape.remember(last_frames(joined_BCTHW, self.past_frames))
        return self(joined_BCTHW)

    def forward(self, input: Tensor) -> Tensor:
        return _convolve(input, self)


class Conv2d(nn.Conv2d):
    """A convolution over pictures that keeps them channels-last."""

    packing: Packing | None = None

    def forward(self, input: Tensor) -> Tensor:
        return _convolve(input, self)


def _convolve(x: Tensor, conv: CausalConv3d | Conv2d) -> Tensor:
    """Convolution by the call that is fastest for the device and the shape.

    On a CPU with one thread, torch's own rule sends a float32 convolution of fewer than 20,480 rows to loops
    that are up to 20 times slower at the widths of a tiny model (78 ms against 3.9 ms: 16 channels, 4 frames
    of 128x128) and lose the channels-last layout for all that follow. oneDNN does neither.
    """
    padding = cast(tuple[int, ...], conv.padding)
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    if on_cpu and not torch.compiler.is_compiling() and torch.backends.mkldnn.is_available():
        if conv.packing is not None and not torch.is_grad_enabled():
            return conv.packing.convolve(x, conv)
        return torch.mkldnn_convolution(x, conv.weight, conv.bias, padding, conv.stride, conv.dilation, conv.groups)
    no_padding = (0,) * len(padding)
    return torch.convolution(
        x, conv.weight, conv.bias, conv.stride, padding, conv.dilation, False, no_padding, conv.groups
    )


class RMSNorm(nn.Module):
    """Scale each pixel's channel vector to unit root mean square, then by ``gamma``."""

    def __init__(self, dim: int, *, num_axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * num_axes))

    def forward(self, x: Tensor) -> Tensor:
        # Summed in float32 at least.
        dtype = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype).clamp_min(_SMALLEST_NORM)
        return x * (math.sqrt(x.shape[1]) / norm).to(x.dtype) * self.gamma


class NormedConvs(nn.ModuleDict):
    """Norm, SiLU, causal convolution; once, or twice.

    Numbered as in the published sequence, whose other members (SiLU, dropout) have no weights.
    """

    impl: Impl | None = None
    """Who computes norm and SiLU in one pass, without gradients; None: torch, one operation after the other."""

    def __init__(self, *dims: int, kernel: tuple[int, int, int] = (3, 3, 3)) -> None:
        super().__init__()
        for in_dim, out_dim, (norm, conv) in zip(dims, dims[1:], (("0", "2"), ("3", "6")), strict=False):
            self[norm] = RMSNorm(in_dim)
            self[conv] = CausalConv3d(in_dim, out_dim, kernel)

    def pairs(self) -> Iterator[tuple[RMSNorm, CausalConv3d]]:
        members = iter(self.values())
        for norm, conv in zip(members, members, strict=True):
            yield cast(RMSNorm, norm), cast(CausalConv3d, conv)

    def forward(self, x_BCTHW: Tensor, tape: Tape) -> Tensor:
        for norm, conv in self.pairs():
            if self.impl is None:
                active_BCTHW = F.silu(norm(x_BCTHW))
            else:
                active_BCTHW = kernels.rms_norm_silu(x_BCTHW, norm.gamma, eps=_SMALLEST_NORM, impl=self.impl)
            x_BCTHW = conv.stream(active_BCTHW, tape)
        return x_BCTHW


class ResidualBlock(nn.Module):
    """Two normed convolutions, around which the input passes."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.residual = NormedConvs(in_dim, out_dim, out_dim)
        self.shortcut = CausalConv3d(in_dim, out_dim, (1, 1, 1)) if in_dim != out_dim else nn.Identity()

    def forward(self, x_BCTHW: Tensor, tape: Tape) -> Tensor:
        return self.shortcut(x_BCTHW) + self.residual(x_BCTHW, tape)


class AttentionBlock(nn.Module):
    """Single-head self-attention among the pixels of one frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, num_axes=2)
        self.to_qkv = Conv2d(dim, dim * 3, 1)
        self.proj = Conv2d(dim, dim, 1)

    def forward(self, x_BCTHW: Tensor, tape: Tape) -> Tensor:
        del tape
        return x_BCTHW + per_frame(self._attend, x_BCTHW)

    def _attend(self, x_FCHW: Tensor) -> Tensor:
        _, C, H, W = x_FCHW.shape
        qkv_F1LC = self.to_qkv(self.norm(x_FCHW)).flatten(2).transpose(1, 2).unsqueeze(1)
        y_F1LC = F.scaled_dot_product_attention(*qkv_F1LC.chunk(3, dim=-1))
        return self.proj(y_F1LC.reshape(-1, H, W, C).permute(0, 3, 1, 2))


class Upsampler(nn.Module):
    """Twice the height and width, half the channels; twice the frames too where ``time`` is set."""

    def __init__(self, in_dim: int, out_dim: int, *, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), Conv2d(in_dim, out_dim, 3, padding=1)
        )
        self.time_conv = CausalConv3d(in_dim, in_dim * 2, (3, 1, 1)) if time else None

    def forward(self, x_BCTHW: Tensor, tape: Tape) -> Tensor:
        if self.time_conv is not None:
            if tape.first:
                # The next latent frame will see zeros here, not this one: so the published model was trained.
                tape.remember(tape.recall())
            else:
                x_BCTHW = interleave(self.time_conv.stream(x_BCTHW, tape), 2)
        return per_frame(self.resample, x_BCTHW)


class Downsampler(nn.Module):
    """Half the height and width; half the frames too where ``time`` is set."""

    def __init__(self, in_dim: int, out_dim: int, *, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), Conv2d(in_dim, out_dim, 3, stride=2))
        self.time_conv = CausalConv3d(out_dim, out_dim, (3, 1, 1), stride_t=2) if time else None

    def forward(self, x_BCTHW: Tensor, tape: Tape) -> Tensor:
        y_BCTHW = per_frame(self.resample, x_BCTHW)
        if self.time_conv is None:
            return y_BCTHW
        if tape.first:
            tape.recall()
            tape.remember(y_BCTHW)
            return y_BCTHW
        return self.time_conv.stream(y_BCTHW, tape)


def _build(layer: LayerPlan) -> nn.Module:
    match layer.kind:
        case "residual":
            return ResidualBlock(layer.in_dim, layer.out_dim)
        case "attention":
            return AttentionBlock(layer.in_dim)
        case "up":
            return Upsampler(layer.in_dim, layer.out_dim, time=layer.time)
        case "down":
            return Downsampler(layer.in_dim, layer.out_dim, time=layer.time)


class _Trunk(nn.Module):
    """First convolution, columns of layers, last convolution: the shape that encoder and decoder share."""

    def __init__(self, sides: Sides, columns: Mapping[str, Sequence[LayerPlan]]) -> None:
        super().__init__()
        plan = [layer for column in columns.values() for layer in column]
        self.conv1 = CausalConv3d(sides.in_dim, plan[0].in_dim, sides.in_kernel)
        for name, column in columns.items():
            self.add_module(name, nn.ModuleList([_build(layer) for layer in column]))
        self.head = NormedConvs(plan[-1].out_dim, sides.out_dim, kernel=sides.out_kernel)
        self.projection = CausalConv3d(sides.in_dim, sides.out_dim, POINT) if sides.projects else None

    def layers(self) -> Iterator[nn.Module]:
        """Everything between the first and the last convolution, in order of execution."""
        for column in self.children():
            if isinstance(column, nn.ModuleList):
                yield from column

    def forward(self, x_BCTHW: Tensor, pasts: tuple[Tensor, ...], *, first: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        tape = Tape(pasts, first=first)
        x_BCTHW = channels_last(x_BCTHW)
        y_BCTHW = self.conv1.stream(x_BCTHW, tape)
        for layer in self.layers():
            y_BCTHW = layer(y_BCTHW, tape)
        y_BCTHW = self.head(y_BCTHW, tape)
        return y_BCTHW if self.projection is None else y_BCTHW + self.projection(x_BCTHW), tape.pasts

    def initial_pasts(self, num_streams: int, height: int, width: int) -> tuple[Tensor, ...]:
        """Zeros, as the published model pads; one tensor per layer that looks back, in order of execution."""
        weight = self.conv1.weight
        pasts: list[Tensor] = []
        for layer in (self.conv1, *self.layers(), self.head):
            if isinstance(layer, Downsampler):
                height, width = height // 2, width // 2
            for conv in layer.modules():
                if isinstance(conv, CausalConv3d) and conv.past_frames > 0:
                    shape = (num_streams, conv.in_channels, conv.past_frames, height, width)
                    pasts.append(channels_last(weight.new_zeros(shape)))
            if isinstance(layer, Upsampler):
                height, width = height * 2, width * 2
        return tuple(pasts)


@functools.cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """One float32 value per channel, (1, C, 1, 1, 1).

    Latent statistics are constants of the configuration rather than buffers of a module: buffers would lose
    their values on the meta device and their precision in bfloat16.
    """
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1, 1)


def normalise(latents_BCTHW: Tensor, config: LatentStatistics) -> Tensor:
    """From the scale of the VAE to the scale of the DiT, in float32: (z - mean) / std."""
    if config.latent_mean:
        latents_BCTHW = latents_BCTHW - _constant(config.latent_mean, latents_BCTHW.device)
    if config.latent_std:
        latents_BCTHW = latents_BCTHW / _constant(config.latent_std, latents_BCTHW.device)
    return latents_BCTHW


def denormalise(latents_BCTHW: Tensor, config: LatentStatistics) -> Tensor:
    """From the scale of the DiT to the scale of the VAE, in float32: z * std + mean."""
    if config.latent_std:
        latents_BCTHW = latents_BCTHW * _constant(config.latent_std, latents_BCTHW.device)
    if config.latent_mean:
        latents_BCTHW = latents_BCTHW + _constant(config.latent_mean, latents_BCTHW.device)
    return latents_BCTHW


class VideoDecoder(nn.Module, abc.ABC):
    """Base of streaming video decoders: normalised latents to frames, chunk by chunk, with an explicit state."""

    def __init__(self, latents: LatentStatistics) -> None:
        super().__init__()
        self.latents = latents

    @abc.abstractmethod
    def initial_state(self, *, latent_h: int, latent_w: int, num_streams: int = 1) -> DecoderState:
        """State of streams that have not begun; same device and dtype as the weights."""

    @abc.abstractmethod
    def decode_one(
        self, z_BC1HW: Tensor, pasts: tuple[Tensor, ...], *, first: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Frames and new pasts of one latent frame, given in the decoder's own scale and dtype.

        The unit to compile or to capture: shapes depend on ``first`` only, no tensor is read on the host.
        """

    def decode(self, latents_BCTHW: Tensor, state: DecoderState | None = None) -> tuple[Tensor, DecoderState]:
        """Decode the next T latent frames of a stream.

        latents_BCTHW: (B, z_dim, T, h, w), normalised. Returns frames in [-1, 1] in the dtype of the weights
        (for the published models (B, 3, 4T, 8h, 8w), three frames fewer at the start of a stream) and the
        next state. Raises ConfigError for latents of another shape than the decoder's or the state's.
        """
        return self.decode_checked(latents_BCTHW, self.checked(latents_BCTHW, state))

    def checked(self, latents_BCTHW: Tensor, state: DecoderState | None) -> DecoderState:
        """The state to decode these latents from; ConfigError when they do not belong together."""
        B, _, T, H, W = _shape(latents_BCTHW, channels=self.latents.z_dim, what="latents")
        if T == 0:
            raise ConfigError("no latent frame to decode; hand in at least one")
        if state is None:
            state = self.initial_state(latent_h=H, latent_w=W, num_streams=B)
        _check_same_stream(latents_BCTHW, state.pasts[0])
        return state

    def decode_checked(self, latents_BCTHW: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Decode latents that are known to fit."""
        weight = next(self.parameters())
        z_BCTHW = denormalise(latents_BCTHW.to(weight.device), self.latents).to(weight.dtype)
        frames: list[Tensor] = []
        # One by one and never more at once: the bits of a convolution may depend on its shape.
        for z_BC1HW in z_BCTHW.split(1, dim=2):
            frames_BCTHW, pasts = self.decode_one(z_BC1HW, state.pasts, first=state.num_latents == 0)
            state = DecoderState(state.num_latents + 1, pasts)
            frames.append(frames_BCTHW)
        return torch.cat(frames, 2), state


class VAEDecoder(VideoDecoder):
    """Normalised latents to video: the decoding half of the published file, under its names."""

    official_prefixes: ClassVar = ("decoder.", "conv2.")
    """What the names of its tensors begin with in the published file."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        _check_widths(config)
        self.config = config
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = _Trunk(decoder_sides(config), decoder_columns(config))

    def initial_state(self, *, latent_h: int, latent_w: int, num_streams: int = 1) -> DecoderState:
        return DecoderState(0, self.decoder.initial_pasts(num_streams, latent_h, latent_w))

    def decode_one(
        self, z_BC1HW: Tensor, pasts: tuple[Tensor, ...], *, first: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        x_BC1HW = self.conv2(channels_last(z_BC1HW))
        frames_BCTHW, pasts = self.decoder(x_BC1HW, pasts, first=first)
        return unfold(frames_BCTHW, self.config, first=first).clamp(-1.0, 1.0), pasts


class VAEEncoder(nn.Module):
    """Video to normalised latents (the mode of the posterior): the encoding half of the published file."""

    official_prefixes: ClassVar = ("encoder.", "conv1.")
    """What the names of its tensors begin with in the published file."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        _check_widths(config)
        self.config = config
        self.encoder = _Trunk(encoder_sides(config), encoder_columns(config))
        self.conv1 = CausalConv3d(config.z_dim * 2, config.z_dim * 2, (1, 1, 1))

    def initial_state(self, *, height: int, width: int, num_streams: int = 1) -> EncoderState:
        """State of streams that have not begun; same device and dtype as the weights. Sizes in pixels."""
        factor = self.config.spatial_factor
        if height <= 0 or width <= 0 or height % factor or width % factor:
            raise ConfigError(f"height and width must be positive multiples of {factor}, got {height}x{width}")
        waiting = self.conv1.weight.new_zeros(num_streams, 3, 0, height, width)
        patch = self.config.patch
        return EncoderState(0, waiting, self.encoder.initial_pasts(num_streams, height // patch, width // patch))

    def encode(self, frames_BCTHW: Tensor, state: EncoderState | None = None) -> tuple[Tensor, EncoderState]:
        """Encode the next T video frames of a stream.

        frames_BCTHW: (B, 3, T, H, W) in [-1, 1]. Returns normalised latents in float32 (for the published
        model (B, 16, N, H/8, W/8)) and the next state. The first frame makes one latent frame, every further
        ``temporal_factor`` frames one more; frames that fill none wait in the state, so that N may be 0.
        Nothing but the latents grows with T: an expanded view of one photograph costs one photograph. Raises
        ConfigError for frames of another shape than the state's.
        """
        B, _, T, H, W = _shape(frames_BCTHW, channels=3, what="frames")
        if state is None:
            state = self.initial_state(height=H, width=W, num_streams=B)
        _check_same_stream(frames_BCTHW, state.waiting_BCTHW)

        weight = self.conv1.weight
        num_latents, waiting_BCTHW, pasts = state.num_latents, state.waiting_BCTHW, state.pasts
        factor = self.config.spatial_factor
        latents = [waiting_BCTHW.new_zeros(B, self.config.z_dim, 0, H // factor, W // factor)]
        begin = 0
        while (end := begin + self._frames_of(num_latents) - waiting_BCTHW.shape[2]) <= T:
            group_BCTHW = torch.cat([waiting_BCTHW, frames_BCTHW[:, :, begin:end].to(weight)], 2)
            latent_BC1HW, pasts = self.encode_one(group_BCTHW, pasts, first=num_latents == 0)
            latents.append(latent_BC1HW)
            num_latents, waiting_BCTHW, begin = num_latents + 1, waiting_BCTHW[:, :, :0], end
        waiting_BCTHW = torch.cat([waiting_BCTHW, frames_BCTHW[:, :, begin:].to(weight)], 2)

        state = EncoderState(num_latents, waiting_BCTHW, pasts)
        return normalise(torch.cat(latents, 2).float(), self.config), state

    def _frames_of(self, latent: int) -> int:
        """Video frames that make the latent frame of this index."""
        return 1 if latent == 0 else self.config.temporal_factor

    def encode_one(
        self, frames_BCTHW: Tensor, pasts: tuple[Tensor, ...], *, first: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The frames of one latent frame, to the mean of its posterior in the VAE's own scale."""
        x_BCTHW, pasts = self.encoder(fold(frames_BCTHW, self.config), pasts, first=first)
        return self.conv1(x_BCTHW)[:, : self.config.z_dim], pasts


def _check_widths(config: VAEConfig) -> None:
    if config.num_res_blocks < 1:
        raise ConfigError(f"a level needs at least one residual block, got {config.num_res_blocks}")
    if any(config.base_dim * mult % 2 for mult in config.dim_mult[1:]):
        raise ConfigError(f"upsampling halves the channels: base_dim must be even, got {config.base_dim}")


def _shape(x_BCTHW: Tensor, *, channels: int, what: str) -> torch.Size:
    if x_BCTHW.dim() != 5 or x_BCTHW.shape[1] != channels:
        raise ConfigError(f"{what} must be (streams, {channels}, frames, height, width), got {tuple(x_BCTHW.shape)}")
    return x_BCTHW.shape


def _check_same_stream(x_BCTHW: Tensor, past_BCTHW: Tensor) -> None:
    given = (x_BCTHW.shape[0], *x_BCTHW.shape[3:])
    known = (past_BCTHW.shape[0], *past_BCTHW.shape[3:])
    if given != known:
        raise ConfigError(
            f"the state belongs to (streams, height, width) = {known}, got {given}; begin with state=None"
        )


def to_rgb8(frames_BCTHW: Tensor) -> Tensor:
    """Frames in [-1, 1] to uint8 RGB on their device: (..., 3, T, H, W) to contiguous (..., T, H, W, 3)."""
    levels_BCTHW = frames_BCTHW.float().add(1.0).mul_(127.5).round_().clamp_(0.0, 255.0)
    if levels_BCTHW.device.type == "cpu":
        # In two steps and plane by plane: twice as fast there, and the same bytes.
        return torch.stack(levels_BCTHW.to(torch.int16).to(torch.uint8).unbind(-4), dim=-1)
    return levels_BCTHW.movedim(-4, -1).to(torch.uint8).contiguous()


def from_rgb8(frames_BTHWC: Tensor) -> Tensor:
    """Inverse of `to_rgb8`: uint8 (..., T, H, W, 3) to float32 in [-1, 1], (..., 3, T, H, W)."""
    return frames_BTHWC.movedim(-1, -4).float().div(127.5).sub(1.0)


def initialise(module: nn.Module, *, seed: int) -> None:
    """Fill an encoder or decoder with random weights that depend on the seed and on each tensor's name only.

    Variance 1 / (3 fan_in) keeps the picture of normal latents between grey and saturation: its standard
    deviation is about 0.3, of a range from -1 to 1.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(1.0)
            else:
                weight = module.get_parameter(f"{name.rpartition('.')[0]}.weight")
                std = (3 * weight[0].numel()) ** -0.5
                parameter.copy_(std * rng.normal(tuple(parameter.shape), "weights", seed, name))


_OFFICIAL_PARTS = {
    "conv_in": "conv1",
    "norm_out": "head.0",
    "conv_out": "head.2",
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
    **{part: part for part in ("norm", "to_qkv", "proj", "resample.1", "time_conv")},
}


def official_name(key: str, *, num_res_blocks: int = 2) -> str:
    """Name in the published ``Wan2.1_VAE.pth`` of a tensor of diffusers' ``AutoencoderKLWan``.

    A name that diffusers does not use comes back unchanged, be it official already or foreign; whether it
    belongs is for the loader to say.

    >>> official_name("decoder.up_blocks.1.resnets.0.conv_shortcut.weight")
    'decoder.upsamples.4.shortcut.weight'
    """
    module, _, parameter = key.rpartition(".")
    if module in ("quant_conv", "post_quant_conv"):
        return f"{'conv1' if module == 'quant_conv' else 'conv2'}.{parameter}"

    # diffusers nests the decoder's column by level; the published one counts straight through.
    level_size = num_res_blocks + 2
    place, part = module, ""
    if match := re.fullmatch(r"(encoder|decoder)\.(conv_in|norm_out|conv_out)", module):
        place, part = match[1], match[2]
    elif match := re.fullmatch(r"(encoder|decoder)\.mid_block\.resnets\.(\d+)\.(\w+)", module):
        place, part = f"{match[1]}.middle.{2 * int(match[2])}", match[3]
    elif match := re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.(\d+)\.(\w+)", module):
        place, part = f"{match[1]}.middle.{2 * int(match[2]) + 1}", match[3]
    elif match := re.fullmatch(r"encoder\.down_blocks\.(\d+)\.([\w.]+)", module):
        place, part = f"encoder.downsamples.{match[1]}", match[2]
    elif match := re.fullmatch(r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.(\w+)", module):
        place, part = f"decoder.upsamples.{level_size * int(match[1]) + int(match[2])}", match[3]
    elif match := re.fullmatch(r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.([\w.]+)", module):
        place, part = f"decoder.upsamples.{level_size * (int(match[1]) + 1) - 1}", match[2]
    return f"{place}.{_OFFICIAL_PARTS[part]}.{parameter}" if part in _OFFICIAL_PARTS else key
