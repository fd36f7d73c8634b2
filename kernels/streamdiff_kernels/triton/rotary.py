"""Norm, rotation and the write into the ring, for one token at a time.

A token is a tile ``[heads, K]`` in registers. Reshaped to ``[heads, R, 2]`` a rotary pair lies in one thread,
because a thread holds at least eight neighbours: splitting and joining pairs moves no data.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamdiff_kernels.triton.launch import next_power_of_2, on_device_of, register_limit, row_warps, to_e4m3


@triton.jit
def _turn(
    a,  # [HEADS, R]
    b,  # [HEADS, R]
    cos_ptr,  # [R]
    sin_ptr,  # [R]
    pair,
    live_pair,
):
    """``(a, b) -> (a cos - b sin, a sin + b cos)`` with one angle per pair, shared by the heads."""
    cos = tl.load(cos_ptr + pair, mask=live_pair, other=0.0)[None, :]
    sin = tl.load(sin_ptr + pair, mask=live_pair, other=0.0)[None, :]
    return a * cos - b * sin, a * sin + b * cos


@triton.jit
def _normed(pointers, weight_pointers, live, D, eps):
    """RMS norm over all heads of a token, with its weight."""
    x = tl.load(pointers, mask=live, other=0.0).to(tl.float32)
    weight = tl.load(weight_pointers, mask=live, other=0.0, eviction_policy="evict_last").to(tl.float32)
    return x * tl.rsqrt(tl.sum(tl.sum(x * x, axis=1), axis=0) / D + eps) * weight


@triton.jit
def _pairs(x, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """``[HEADS, WIDTH]`` to its even and odd columns."""
    return tl.split(tl.reshape(x, (HEADS, WIDTH // 2, 2)))


@triton.jit
def _tile(a, b, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Even and odd columns back to ``[HEADS, WIDTH]``."""
    return tl.reshape(tl.join(a, b), (HEADS, WIDTH))


@triton.jit
def _write_row(
    ring_ptr,  # [B, M, N, K]
    scale_ptr,  # [N] of this stream when EIGHT_BITS
    row,
    x,  # [HEADS, WIDTH]
    head,
    column,
    live,
    inside,
    N,
    K,
    EIGHT_BITS: tl.constexpr,
):
    """Store a token into a row of the ring if it is inside; in eight bits with a given scale per head."""
    if EIGHT_BITS:
        inverse = 1.0 / tl.load(scale_ptr + head, mask=head < N, other=1.0)
        x = tl.minimum(tl.maximum(x * inverse[:, None], -448.0), 448.0)
        stored = to_e4m3(x, ring_ptr.dtype.element_ty)
    else:
        stored = x.to(ring_ptr.dtype.element_ty)
    offsets = head[:, None] * K + column[None, :]
    tl.store(ring_ptr + row * (N * K) + offsets, stored, mask=live & inside)


@triton.jit
def qk_norm_rope_write_kernel(
    q_ptr,  # [B, L, N * K] at strides
    k_ptr,  # [B, L, N * K] at strides
    v_ptr,  # [B, L, N * K] at strides
    q_weight_ptr,  # [N * K]
    k_weight_ptr,  # [N * K]
    cos_ptr,  # [L, R]
    sin_ptr,  # [L, R]
    cos_sink_ptr,  # [L, R]
    sin_sink_ptr,  # [L, R]
    q_out_ptr,  # [B, L, N, K]
    q_sink_ptr,  # [B, L, N, K]
    keys_ptr,  # [B, M, N, K]
    values_ptr,  # [B, M, N, K]
    key_scale_ptr,  # [B, N]
    value_scale_ptr,  # [B, N]
    slot_ptr,  # [1] int32
    ring_start,
    L,
    M,
    N,
    K,
    eps,
    q_stride_b,
    q_stride_l,
    k_stride_b,
    k_stride_l,
    v_stride_b,
    v_stride_l,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TWO_TURNS: tl.constexpr,
    EIGHT_BITS: tl.constexpr,
):
    """One program per token and role: q, k or v, a third of the registers of all three. Grid: L, B, 3."""
    token = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    head = tl.arange(0, HEADS)
    column = tl.arange(0, WIDTH)
    pair = tl.arange(0, WIDTH // 2)
    offsets = head[:, None] * K + column[None, :]
    live = (head < N)[:, None] & (column < K)[None, :]
    live_pair = pair < K // 2
    num_pairs = K // 2

    role = tl.program_id(2)
    if role == 0:
        q = _normed(q_ptr + b * q_stride_b + token * q_stride_l + offsets, q_weight_ptr + offsets, live, N * K, eps)
        q_a, q_b = _pairs(q, HEADS, WIDTH)
        out_row = (b * L + token) * (N * K)
        a, c = _turn(q_a, q_b, cos_ptr + token * num_pairs, sin_ptr + token * num_pairs, pair, live_pair)
        tile = _tile(a, c, HEADS, WIDTH).to(q_out_ptr.dtype.element_ty)
        tl.store(q_out_ptr + out_row + offsets, tile, mask=live)
        if TWO_TURNS:
            a, c = _turn(q_a, q_b, cos_sink_ptr + token * num_pairs, sin_sink_ptr + token * num_pairs, pair, live_pair)
            tile = _tile(a, c, HEADS, WIDTH).to(q_sink_ptr.dtype.element_ty)
            tl.store(q_sink_ptr + out_row + offsets, tile, mask=live)
    else:
        # A slot outside the ring cannot be reported from here; writing nothing is what keeps memory whole.
        slot = tl.load(slot_ptr).to(tl.int64)
        in_ring = ring_start + slot * L + token
        inside = (slot >= 0) & (in_ring < M)
        row = b * M + in_ring
        if role == 1:
            k = _normed(k_ptr + b * k_stride_b + token * k_stride_l + offsets, k_weight_ptr + offsets, live, N * K, eps)
            a, c = _pairs(k, HEADS, WIDTH)
            a, c = _turn(a, c, cos_ptr + token * num_pairs, sin_ptr + token * num_pairs, pair, live_pair)
            tile = _tile(a, c, HEADS, WIDTH)
            _write_row(keys_ptr, key_scale_ptr + b * N, row, tile, head, column, live, inside, N, K, EIGHT_BITS)
        else:
            v = tl.load(v_ptr + b * v_stride_b + token * v_stride_l + offsets, mask=live, other=0.0)
            v = v.to(tl.float32)
            _write_row(values_ptr, value_scale_ptr + b * N, row, v, head, column, live, inside, N, K, EIGHT_BITS)


@triton.jit
def rotate_kernel(
    x_ptr,  # [B, G, N, K] at strides, tokens contiguous
    cos_ptr,  # [G, R]
    sin_ptr,  # [G, R]
    ring_ptr,  # [B, M, N, K]
    scale_ptr,  # [B, N]
    first_row,
    M,
    N,
    K,
    x_stride_b,
    x_stride_g,
    x_stride_n,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    EIGHT_BITS: tl.constexpr,
):
    """Rotate tokens into rows ``first_row ..`` of the ring. Grid: G, B."""
    token = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    head = tl.arange(0, HEADS)
    column = tl.arange(0, WIDTH)
    pair = tl.arange(0, WIDTH // 2)
    live = (head < N)[:, None] & (column < K)[None, :]
    offsets = head[:, None] * x_stride_n + column[None, :]
    x = tl.load(x_ptr + b * x_stride_b + token * x_stride_g + offsets, mask=live, other=0.0).to(tl.float32)
    a, c = _pairs(x, HEADS, WIDTH)
    a, c = _turn(a, c, cos_ptr + token * (K // 2), sin_ptr + token * (K // 2), pair, pair < K // 2)
    row = b * M + first_row + token
    _write_row(ring_ptr, scale_ptr + b * N, row, _tile(a, c, HEADS, WIDTH), head, column, live, True, N, K, EIGHT_BITS)


def qk_norm_rope_write(
    q_BLD: Tensor,
    k_BLD: Tensor,
    v_BLD: Tensor,
    q_weight_D: Tensor,
    k_weight_D: Tensor,
    cos_LR: Tensor,
    sin_LR: Tensor,
    cos_sink_LR: Tensor | None,
    sin_sink_LR: Tensor | None,
    keys_BMNK: Tensor,
    values_BMNK: Tensor,
    key_scale_BN: Tensor | None,
    value_scale_BN: Tensor | None,
    slot: Tensor,
    ring_start: int,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    B, L, _ = q_BLD.shape
    M, N, K = keys_BMNK.shape[1:]
    heads, width = next_power_of_2(N), next_power_of_2(K)
    q_out = torch.empty((B, L, N, K), dtype=q_BLD.dtype, device=q_BLD.device)
    q_sink = None if cos_sink_LR is None else torch.empty_like(q_out)
    with on_device_of(q_BLD):
        qk_norm_rope_write_kernel[(L, B, 3)](
            q_BLD,
            k_BLD,
            v_BLD,
            q_weight_D,
            k_weight_D,
            cos_LR.contiguous(),
            sin_LR.contiguous(),
            cos_LR if cos_sink_LR is None else cos_sink_LR.contiguous(),
            sin_LR if sin_sink_LR is None else sin_sink_LR.contiguous(),
            q_out,
            q_out if q_sink is None else q_sink,
            keys_BMNK,
            values_BMNK,
            q_out if key_scale_BN is None else key_scale_BN,
            q_out if value_scale_BN is None else value_scale_BN,
            slot,
            ring_start,
            L,
            M,
            N,
            K,
            eps,
            q_BLD.stride(0),
            q_BLD.stride(1),
            k_BLD.stride(0),
            k_BLD.stride(1),
            v_BLD.stride(0),
            v_BLD.stride(1),
            HEADS=heads,
            WIDTH=width,
            TWO_TURNS=q_sink is not None,
            EIGHT_BITS=key_scale_BN is not None,
            num_warps=row_warps(heads * width),
            maxnreg=None if key_scale_BN is not None else register_limit(q_BLD),
        )
    return q_out, q_sink


def rotate_sink_(
    pristine_BGNK: Tensor,
    cos_GR: Tensor,
    sin_GR: Tensor,
    keys_BMNK: Tensor,
    key_scale_BN: Tensor | None,
    first_row: int,
) -> None:
    B, G, N, K = pristine_BGNK.shape
    heads, width = next_power_of_2(N), next_power_of_2(K)
    x = pristine_BGNK if pristine_BGNK.stride(-1) == 1 else pristine_BGNK.contiguous()
    with on_device_of(keys_BMNK):
        rotate_kernel[(G, B)](
            x,
            cos_GR.contiguous(),
            sin_GR.contiguous(),
            keys_BMNK,
            keys_BMNK if key_scale_BN is None else key_scale_BN,
            first_row,
            keys_BMNK.shape[1],
            N,
            K,
            x.stride(0),
            x.stride(1),
            x.stride(2),
            HEADS=heads,
            WIDTH=width,
            EIGHT_BITS=key_scale_BN is not None,
            num_warps=row_warps(heads * width),
        )
