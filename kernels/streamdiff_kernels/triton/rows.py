"""Ops that work on whole rows of the model width: norm, modulation, gate, residual, eight bits.

One program holds one row at a time, in float32, in registers: every tensor is read once and written once.
Rows of a frame share their modulation, which is small and stays in the first-level cache; the stream of rows
is marked to leave it first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamdiff_kernels.triton.launch import next_power_of_2, on_device_of, register_limit, row_warps, to_e4m3

ROWS_PER_PROGRAM = 1
"""Consecutive rows that one program serves."""


@triton.jit
def store_eight_bits(
    out_ptr,  # [rows, D] float8_e4m3fn
    row_scale_ptr,  # [rows] float32
    row,
    offsets,
    y,
    live,
    live_row,
    D,
):
    """Divide a row by the scale that brings its largest magnitude to 448, and store both; y is 0 where not
    live.
    """
    row_scale = tl.max(tl.abs(y), axis=0) / 448.0
    # No clamp: what rounding lifts above 448 by an ulp is nearest to 448.
    inverse = 1.0 / tl.where(row_scale > 0, row_scale, 1.0)
    y8 = to_e4m3(y * inverse, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * D + offsets, y8, mask=live)
    tl.store(row_scale_ptr + row, row_scale, mask=live_row)


@triton.jit
def residual_norm_kernel(
    x_ptr,  # [B * L, D]; rewritten when BRANCH
    y_ptr,  # [B * L, D]
    gate_ptr,  # [B or 1, T, D] at strides
    scale_ptr,  # [B or 1, T, D] at strides
    shift_ptr,  # [B or 1, T, D] at strides
    out_ptr,  # [B * L, D]
    row_scale_ptr,  # [B * L]
    T,
    frame_tokens,
    D,
    eps,
    gate_stride_b,
    gate_stride_t,
    scale_stride_b,
    scale_stride_t,
    shift_stride_b,
    shift_stride_t,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BRANCH: tl.constexpr,
    GATE: tl.constexpr,
    NORM: tl.constexpr,
    EIGHT_BITS: tl.constexpr,
):
    """``x += gate * y`` when BRANCH, then ``norm(x) * (1 + scale) + shift`` when NORM. Grid: row groups, B *
    T.
    """
    frame = tl.program_id(1)
    b = (frame // T).to(tl.int64)
    t = (frame % T).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < D
    for i in range(ROWS):
        token = tl.program_id(0) * ROWS + i
        live = inside & (token < frame_tokens)
        row = frame.to(tl.int64) * frame_tokens + token
        x = tl.load(x_ptr + row * D + offsets, mask=live, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if BRANCH:
            y = tl.load(y_ptr + row * D + offsets, mask=live, other=0.0, eviction_policy="evict_first").to(tl.float32)
            if GATE:
                gate = tl.load(
                    gate_ptr + b * gate_stride_b + t * gate_stride_t + offsets,
                    mask=live,
                    other=0.0,
                    eviction_policy="evict_last",
                ).to(tl.float32)
                y *= gate
            # The norm must see the stream as stored, so that fused and unfused agree.
            stored = (x + y).to(x_ptr.dtype.element_ty)
            tl.store(x_ptr + row * D + offsets, stored, mask=live)
            x = stored.to(tl.float32)
        if NORM:
            mean = tl.sum(x, axis=0) / D
            centred = tl.where(live, x - mean, 0.0)
            inverse = tl.rsqrt(tl.sum(centred * centred, axis=0) / D + eps)
            scale = tl.load(
                scale_ptr + b * scale_stride_b + t * scale_stride_t + offsets,
                mask=live,
                other=0.0,
                eviction_policy="evict_last",
            ).to(tl.float32)
            out = centred * inverse * (1.0 + scale)
            shift = tl.load(
                shift_ptr + b * shift_stride_b + t * shift_stride_t + offsets,
                mask=live,
                other=0.0,
                eviction_policy="evict_last",
            ).to(tl.float32)
            out += shift
            if EIGHT_BITS:
                store_eight_bits(out_ptr, row_scale_ptr, row, offsets, out, live, token < frame_tokens, D)
            else:
                tl.store(out_ptr + row * D + offsets, out.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def rms_norm_kernel(
    x_ptr,  # [B, L, D] at strides, rows contiguous
    weight_ptr,  # [D]
    out_ptr,  # [B, L, D]
    L,
    D,
    eps,
    x_stride_b,
    x_stride_l,
    BLOCK: tl.constexpr,
):
    """One program per token. Grid: L, B."""
    token = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    live = offsets < D
    x = tl.load(x_ptr + b * x_stride_b + token * x_stride_l + offsets, mask=live, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + offsets, mask=live, other=0.0, eviction_policy="evict_last").to(tl.float32)
    out = x * tl.rsqrt(tl.sum(x * x, axis=0) / D + eps) * weight
    tl.store(out_ptr + (b * L + token) * D + offsets, out.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def quantise_kernel(
    x_ptr,  # [rows, D]
    out_ptr,  # [rows, D] float8_e4m3fn
    row_scale_ptr,  # [rows]
    D,
    BLOCK: tl.constexpr,
    GELU: tl.constexpr,
):
    """Eight bits with one scale per row, of x or of its GELU (tanh). Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    live = offsets < D
    x = tl.load(x_ptr + row * D + offsets, mask=live, other=0.0).to(tl.float32)
    if GELU:
        # x/2 (1 + tanh(u)) = x sigmoid(2 u): one exponential and no cancellation for large negative x.
        inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        x = x / (1.0 + tl.exp(-inner))
    store_eight_bits(out_ptr, row_scale_ptr, row, offsets, x, live, True, D)


def _launch_residual_norm(
    x_BLD: Tensor,
    y_BLD: Tensor | None,
    gate_BTD: Tensor | None,
    scale_BTD: Tensor | None,
    shift_BTD: Tensor | None,
    out_BLD: Tensor | None,
    row_scale_BL: Tensor | None,
    eps: float,
) -> None:
    B, L, D = x_BLD.shape
    first = next((mod for mod in (scale_BTD, gate_BTD) if mod is not None), None)
    T = 1 if first is None else first.shape[1]
    frame_tokens = L // T
    block = next_power_of_2(D)

    def strides(mod: Tensor | None) -> tuple[int, int]:
        return (0, 0) if mod is None else (0 if mod.shape[0] == 1 else mod.stride(0), mod.stride(1))

    with on_device_of(x_BLD):
        residual_norm_kernel[(triton.cdiv(frame_tokens, ROWS_PER_PROGRAM), B * T)](
            x_BLD,
            x_BLD if y_BLD is None else y_BLD,
            x_BLD if gate_BTD is None else gate_BTD,
            x_BLD if scale_BTD is None else scale_BTD,
            x_BLD if shift_BTD is None else shift_BTD,
            x_BLD if out_BLD is None else out_BLD,
            x_BLD if row_scale_BL is None else row_scale_BL,
            T,
            frame_tokens,
            D,
            eps,
            *strides(gate_BTD),
            *strides(scale_BTD),
            *strides(shift_BTD),
            BLOCK=block,
            ROWS=ROWS_PER_PROGRAM,
            BRANCH=y_BLD is not None,
            GATE=gate_BTD is not None,
            NORM=scale_BTD is not None,
            EIGHT_BITS=row_scale_BL is not None,
            # Rows of four bytes take more registers a value: half as many values a thread keep 32 warps on a processor.
            num_warps=row_warps(block * x_BLD.dtype.itemsize // 2),
            maxnreg=None if y_BLD is not None else register_limit(x_BLD),
        )


def _eight_bits_like(x: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device),
        torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device),
    )


def norm_modulate(
    x_BLD: Tensor, scale_BTD: Tensor, shift_BTD: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    out = torch.empty_like(x_BLD, dtype=dtype or x_BLD.dtype)
    _launch_residual_norm(x_BLD, None, None, scale_BTD, shift_BTD, out, None, eps)
    return out


def norm_modulate_fp8(x_BLD: Tensor, scale_BTD: Tensor, shift_BTD: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out8, row_scale = _eight_bits_like(x_BLD)
    _launch_residual_norm(x_BLD, None, None, scale_BTD, shift_BTD, out8, row_scale, eps)
    return out8, row_scale


def gate_residual_(x_BLD: Tensor, y_BLD: Tensor, gate_BTD: Tensor | None) -> None:
    _launch_residual_norm(x_BLD, y_BLD, gate_BTD, None, None, None, None, 0.0)


def gate_residual_norm_modulate_(
    x_BLD: Tensor,
    y_BLD: Tensor,
    gate_BTD: Tensor | None,
    scale_BTD: Tensor,
    shift_BTD: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    out = torch.empty_like(x_BLD, dtype=dtype or y_BLD.dtype)
    _launch_residual_norm(x_BLD, y_BLD, gate_BTD, scale_BTD, shift_BTD, out, None, eps)
    return out


def gate_residual_norm_modulate_fp8_(
    x_BLD: Tensor, y_BLD: Tensor, gate_BTD: Tensor | None, scale_BTD: Tensor, shift_BTD: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    out8, row_scale = _eight_bits_like(x_BLD)
    _launch_residual_norm(x_BLD, y_BLD, gate_BTD, scale_BTD, shift_BTD, out8, row_scale, eps)
    return out8, row_scale


def rms_norm(x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    B, L, D = x_BLD.shape
    out = torch.empty(x_BLD.shape, dtype=x_BLD.dtype, device=x_BLD.device)
    block = next_power_of_2(D)
    with on_device_of(x_BLD):
        rms_norm_kernel[(L, B)](
            x_BLD,
            weight_D,
            out,
            L,
            D,
            eps,
            x_BLD.stride(0),
            x_BLD.stride(1),
            BLOCK=block,
            num_warps=row_warps(block),
        )
    return out


def _launch_quantise(x: Tensor, *, gelu: bool) -> tuple[Tensor, Tensor]:
    out8, row_scale = _eight_bits_like(x)
    D = x.shape[-1]
    block = next_power_of_2(D)
    with on_device_of(x):
        quantise_kernel[(row_scale.numel(),)](x, out8, row_scale, D, BLOCK=block, GELU=gelu, num_warps=row_warps(block))
    return out8, row_scale


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return _launch_quantise(x, gelu=False)


def gelu_fp8(x_BLF: Tensor) -> tuple[Tensor, Tensor]:
    return _launch_quantise(x_BLF, gelu=True)
