"""The decoder's norm over channels with its activation, in one read and one write."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamdiff_kernels.triton.launch import next_power_of_2, on_device_of


@triton.jit
def rms_norm_silu_kernel(
    x_ptr,  # [B, C, P] or, CHANNELS_LAST, [B, P, C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    out_ptr,  # as x
    num_pixels,
    C,
    root_c,
    eps,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BIAS: tl.constexpr,
):
    """A tile of pixels with all their channels; the axis that is contiguous in memory runs fastest. Grid:
    pixels, B.
    """
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, CHANNELS)
    base = tl.program_id(1).to(tl.int64) * num_pixels * C
    weight = tl.load(weight_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    if CHANNELS_LAST:
        offsets = base + pixel[:, None] * C + channel[None, :]
        live = (pixel < num_pixels)[:, None] & (channel < C)[None, :]
        x = tl.load(x_ptr + offsets, mask=live, other=0.0).to(tl.float32)
        length = tl.sqrt(tl.sum(x * x, axis=1))[:, None]
        gain = weight[None, :]
    else:
        offsets = base + channel[:, None] * num_pixels + pixel[None, :]
        live = (channel < C)[:, None] & (pixel < num_pixels)[None, :]
        x = tl.load(x_ptr + offsets, mask=live, other=0.0).to(tl.float32)
        length = tl.sqrt(tl.sum(x * x, axis=0))[None, :]
        gain = weight[:, None]
    normed = x * (root_c / tl.maximum(length, eps)) * gain
    if BIAS:
        bias = tl.load(bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
        normed += bias[None, :] if CHANNELS_LAST else bias[:, None]
    out = normed / (1.0 + tl.exp(-normed))
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=live)


def pixels_per_program(channels: int, *, channels_last: bool) -> int:
    """8,192 elements a program; at least 32 pixels when they are what is contiguous, to fill memory
    sectors.
    """
    return max(1 if channels_last else 32, 8192 // channels)


def rms_norm_silu(x_BCTHW: Tensor, weight_C: Tensor, bias_C: Tensor | None, eps: float) -> Tensor:
    B, C = x_BCTHW.shape[:2]
    num_pixels = x_BCTHW[0, 0].numel()
    channels_last = not x_BCTHW.is_contiguous()
    channels = next_power_of_2(C)
    pixels = pixels_per_program(channels, channels_last=channels_last)
    out = torch.empty_like(x_BCTHW)
    with on_device_of(x_BCTHW):
        rms_norm_silu_kernel[(triton.cdiv(num_pixels, pixels), B)](
            x_BCTHW,
            weight_C,
            weight_C if bias_C is None else bias_C,
            out,
            num_pixels,
            C,
            math.sqrt(C),
            eps,
            CHANNELS=channels,
            PIXELS=pixels,
            CHANNELS_LAST=channels_last,
            BIAS=bias_C is not None,
            num_warps=8,
        )
    return out
