"""Attention of one chunk over the rows of a ring: no concatenation, no mask but at the last tile, two
rotations of q.

Flash attention over a *set* of rows: softmax does not care for their order, so a tile is any BLOCK_M
neighbouring rows of the ring and only the end of a segment needs a mask. The sink's rows are scored against a
second rotation of the query; the keys go from global memory to the tensor cores untouched. Rotating keys on
read would take them through registers and back to shared memory, and at 128 x 128 tiles that no longer fits
(231 registers, 229,400 bytes).

Fill level and segments are read on the device, so one CUDA graph serves every chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from streamdiff_kernels.triton.launch import (
    IEEE,
    INTERPRETED,
    Gpu,
    current_gpu,
    next_power_of_2,
    on_device_of,
    to_e4m3,
)

LOG2_E = 1.4426950408889634


@triton.jit
def _load_rows(
    source,  # descriptor of [B * M, N * K], or pointer
    row,
    head,
    N,
    column,
    end,
    BLOCK_M: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A tile ``[BLOCK_M, WIDTH]`` of one head; rows from ``end`` on are zero when MASKED."""
    rows = row + tl.arange(0, BLOCK_M)
    if DESCRIPTOR:
        tile = source.load([row, head * K])
        if MASKED:
            # The rows that follow may never have been written: 0 * NaN would reach the sum.
            tile = tl.where((rows < end)[:, None], tile, 0.0).to(tile.dtype)
    else:
        pointers = source + rows.to(tl.int64)[:, None] * (N * K) + head * K + column[None, :]
        if MASKED:
            tile = tl.load(pointers, mask=(rows < end)[:, None] & (column < K)[None, :], other=0.0)
        elif WIDTH == K:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(column < K)[None, :], other=0.0)
    return tile


@triton.jit
def _load_queries(pointers, column, K: tl.constexpr, WIDTH: tl.constexpr):
    """A tile of queries; columns that only fill up the width are zero."""
    if WIDTH == K:
        return tl.load(pointers)
    return tl.load(pointers, mask=(column < K)[None, :], other=0.0)


@triton.jit
def _prepared(q, scale, EIGHT_BITS: tl.constexpr):
    """Queries as they are multiplied, and what makes their products scores in powers of two: a scale of each query in
    eight bits, of all otherwise.
    """
    if EIGHT_BITS:
        wide = q.to(tl.float32)
        largest = tl.max(tl.abs(wide), axis=1) / 448.0
        largest = tl.where(largest > 0, largest, 1.0)
        q = to_e4m3(wide * (1.0 / largest)[:, None], tl.float8e4nv)
        scale = largest * scale
    return q, scale


@triton.jit
def _step(
    out,  # [BLOCK_Q, WIDTH] float32
    total,  # [BLOCK_Q] sum of 2^(score - highest)
    highest,  # [BLOCK_Q] largest score so far, in powers of two
    q,  # [BLOCK_Q, WIDTH]
    keys,
    values,
    row,
    end,
    head,
    N,
    column,
    scale,  # [BLOCK_Q] when EIGHT_BITS, else one for all
    BLOCK_M: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EIGHT_BITS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of keys and values into the running softmax."""
    k = _load_rows(keys, row, head, N, column, end, BLOCK_M, K, WIDTH, DESCRIPTOR, MASKED)
    # The interpreter multiplies bfloat16 as integers; float32 holds the same values.
    if IEEE:  # noqa: SIM108 - a conditional expression would compile both sides
        scores = tl.dot(q.to(tl.float32), k.to(tl.float32).T, input_precision="ieee")
    else:
        scores = tl.dot(q, k.T)
    rows = row + tl.arange(0, BLOCK_M)
    if MASKED:
        scores = tl.where((rows < end)[None, :], scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, axis=1) * scale)
    if EIGHT_BITS:
        weights = tl.exp2(scores * scale[:, None] - new_highest[:, None])
    else:
        weights = tl.exp2(scores * scale - new_highest[:, None])
    correction = tl.exp2(highest - new_highest)
    total = total * correction + tl.sum(weights, axis=1)
    out = out * correction[:, None]
    v = _load_rows(values, row, head, N, column, end, BLOCK_M, K, WIDTH, DESCRIPTOR, MASKED)
    if EIGHT_BITS and not IEEE:
        v = v.to(tl.float16)  # exact, and one conversion for two values
    if IEEE:
        out = tl.dot(weights, v.to(tl.float32), out, input_precision="ieee")
    else:
        out = tl.dot(weights.to(v.dtype), v, out)
    return out, total, new_highest


@triton.jit
def _walk(
    out,
    total,
    highest,
    q,
    keys,
    values,
    first,
    end,
    head,
    N,
    column,
    scale,
    BLOCK_M: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EIGHT_BITS: tl.constexpr,
):
    """Rows ``first .. end``: whole tiles without a mask, then what is left with one."""
    whole = first + tl.maximum(end - first, 0) // BLOCK_M * BLOCK_M
    for row in tl.range(first, whole, BLOCK_M):
        out, total, highest = _step(
            out,
            total,
            highest,
            q,
            keys,
            values,
            row,
            end,
            head,
            N,
            column,
            scale,
            BLOCK_M,
            K,
            WIDTH,
            DESCRIPTOR,
            EIGHT_BITS,
            False,
        )
    if whole < end:
        out, total, highest = _step(
            out,
            total,
            highest,
            q,
            keys,
            values,
            whole,
            end,
            head,
            N,
            column,
            scale,
            BLOCK_M,
            K,
            WIDTH,
            DESCRIPTOR,
            EIGHT_BITS,
            True,
        )
    return out, total, highest


@triton.jit
def attend_kernel(
    q_ptr,  # [B, L, N, K] at strides
    q_sink_ptr,  # [B, L, N, K], strides of q
    keys,  # descriptor or pointer of [B, M, N, K]
    values,  # descriptor or pointer of [B, M, N, K]
    key_scale_ptr,  # [B, N] when EIGHT_BITS
    value_scale_ptr,  # [B, N] when EIGHT_BITS
    length_ptr,  # [1] int32 when COUNTED
    segments_ptr,  # [G, 2] int32 unless COUNTED
    out_ptr,  # [B, L, N, K]
    lse_ptr,  # [B, N, L] float32 when LSE
    num_segments,
    sink_rows,
    L,
    M,
    N,
    q_stride_b,
    q_stride_l,
    q_stride_n,
    scale,  # of the scores, times log2(e)
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    COUNTED: tl.constexpr,
    TWO_TURNS: tl.constexpr,
    EIGHT_BITS: tl.constexpr,
    LSE: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """BLOCK_Q queries of one head. Grid: query tiles, B * N; tiles of a head are neighbours and share its
    keys in L2.
    """
    head = tl.program_id(1) % N
    b = tl.program_id(1) // N
    token = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    column = tl.arange(0, WIDTH)
    live = (token < L)[:, None] & (column < K)[None, :]
    # 32 bits span the queries of a stream; 64-bit addresses of a whole tile would cost registers.
    # Tokens past the last are computed as copies of it and never stored: no mask.
    q_offsets = tl.minimum(token, L - 1)[:, None] * q_stride_l + column[None, :]
    q_ptr += b.to(tl.int64) * q_stride_b + head * q_stride_n
    q_sink_ptr += b.to(tl.int64) * q_stride_b + head * q_stride_n
    base = b * M  # rows of the rings are counted through all streams
    if EIGHT_BITS:
        scale *= tl.load(key_scale_ptr + b * N + head)
    q, q_scale = _prepared(_load_queries(q_ptr + q_offsets, column, K, WIDTH), scale, EIGHT_BITS)
    out = tl.zeros((BLOCK_Q, WIDTH), dtype=tl.float32)
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    highest = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)

    PARTS: tl.constexpr = 2 if TWO_TURNS else 1
    if COUNTED:
        length = tl.minimum(tl.load(length_ptr), M)
        start = 0
        if TWO_TURNS:
            start = tl.minimum(sink_rows, length)
            q_sink = _load_queries(q_sink_ptr + q_offsets, column, K, WIDTH)
            q_sink, sink_scale = _prepared(q_sink, scale, EIGHT_BITS)
            out, total, highest = _walk(
                out, total, highest, q_sink, keys, values,
                base, base + start, head, N, column, sink_scale,
                BLOCK_M, K, WIDTH, DESCRIPTOR, EIGHT_BITS,
            )  # fmt: skip
        out, total, highest = _walk(
            out, total, highest, q, keys, values,
            base + start, base + length, head, N, column, q_scale,
            BLOCK_M, K, WIDTH, DESCRIPTOR, EIGHT_BITS,
        )  # fmt: skip
    else:
        # Each segment has two parts, below and above the end of the sink; one of them is usually empty. The
        # query is chosen by address, so that one loop serves both: unrolled, the second would not fit in
        # registers.
        for part in range(num_segments * PARTS):
            first = tl.load(segments_ptr + 2 * (part // PARTS))
            end = tl.minimum(first + tl.load(segments_ptr + 2 * (part // PARTS) + 1), M)
            if PARTS == 2:
                split = tl.minimum(tl.maximum(sink_rows, first), end)
                below = part % 2 == 0
                first = tl.where(below, first, split)
                end = tl.where(below, split, end)
                q = _load_queries(tl.where(below, q_sink_ptr, q_ptr) + q_offsets, column, K, WIDTH)
                q, q_scale = _prepared(q, scale, EIGHT_BITS)
            out, total, highest = _walk(
                out, total, highest, q, keys, values,
                base + first, base + end, head, N, column, q_scale,
                BLOCK_M, K, WIDTH, DESCRIPTOR, EIGHT_BITS,
            )  # fmt: skip

    # Attention over nothing is zero and weighs nothing in a merge.
    out = out / tl.where(total > 0, total, 1.0)[:, None]
    if EIGHT_BITS:
        out *= tl.load(value_scale_ptr + b * N + head)
    out_offsets = ((b.to(tl.int64) * L + token[:, None]) * N + head) * K + column[None, :]
    tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=live)
    if LSE:
        # Back from powers of two to e.
        lse = (highest + tl.log2(tl.where(total > 0, total, 1.0))) * 0.6931471805599453
        tl.store(lse_ptr + (b.to(tl.int64) * N + head) * L + token, lse, mask=token < L)


class Tiles(NamedTuple):
    """How a call is cut up."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


def choose_tiles(gpu: Gpu, programs_of_128: int, width: int, *, crowded: bool) -> Tiles:
    """128 queries by 128 keys feed two warpgroups; smaller where that would not fit or not fill the GPU.

    ``crowded`` says that a second query or segments live in registers beside the tile.
    """
    if width > 128 or programs_of_128 < gpu.num_processors:
        # Wider tiles exceed shared memory; a short chunk leaves processors idle, and half-sized tiles are
        # twice as many.
        return Tiles(64, 64, 4, 2)
    if crowded and gpu.capability >= 100:
        return Tiles(64, 64, 8, 2)
    # One program a processor in any case, by its registers: a third stage costs nothing where it fits.
    return Tiles(128, 128, 8, 3 if gpu.capability == 90 and not crowded else 2)


def _rows_descriptor(ring_BMNK: Tensor, block_m: int, width: int) -> TensorDescriptor:
    """The ring as a matrix of rows by heads, for the bulk copy engine; a head's tile starts at column ``head
    * K``.
    """
    B, M, N, K = ring_BMNK.shape
    return TensorDescriptor(ring_BMNK, [B * M, N * K], [N * K, 1], [block_m, width])


def attend(
    q_BLNK: Tensor,
    q_sink_BLNK: Tensor | None,
    keys_BMNK: Tensor,
    values_BMNK: Tensor,
    key_scale_BN: Tensor | None,
    value_scale_BN: Tensor | None,
    length: Tensor | None,
    segments_G2: Tensor | None,
    pairs: Sequence[tuple[int, int]] | None,
    sink_rows: int,
    scale: float,
    need_lse: bool,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor | None]:
    B, L, N, K = q_BLNK.shape
    M = keys_BMNK.shape[1]
    device = q_BLNK.device
    if pairs is not None:
        # Made on the device from an integer where that is possible: a copy from the host could not be
        # captured.
        if len(pairs) == 1 and pairs[0][0] == 0:
            length = torch.full((), pairs[0][1], dtype=torch.int32, device=device)
        else:
            segments_G2 = torch.tensor(list(pairs), dtype=torch.int32, device=device)
    two_turns = q_sink_BLNK is not None and sink_rows > 0
    q_BLNK = q_BLNK if q_BLNK.stride(-1) == 1 else q_BLNK.contiguous()
    if q_sink_BLNK is not None and q_sink_BLNK.stride() != q_BLNK.stride():
        q_BLNK, q_sink_BLNK = q_BLNK.contiguous(), q_sink_BLNK.contiguous()
    out = torch.empty((B, L, N, K), dtype=q_BLNK.dtype, device=device)
    lse = torch.empty((B, N, L), dtype=torch.float32, device=device) if need_lse else None
    width = max(16, next_power_of_2(K))
    with on_device_of(q_BLNK):
        if INTERPRETED:
            # Small tiles meet more borders in as many steps.
            tiles, descriptor = tiles or Tiles(16, 16, 4, 2), False
        else:
            gpu = current_gpu()
            if tiles is None:
                programs = triton.cdiv(L, 128) * B * N
                tiles = choose_tiles(gpu, programs, width, crowded=two_turns or length is None)
                if gpu.capability >= 100 and two_turns and length is None:
                    tiles = tiles._replace(num_stages=1)  # Triton 3.6 spills with two
            # The bulk copy engine (Hopper on) moves whole tiles whose rows are multiples of 16 bytes.
            descriptor = gpu.capability >= 90 and width == K and keys_BMNK.dtype.itemsize * K % 16 == 0
        attend_kernel[(triton.cdiv(L, tiles.queries), B * N)](
            q_BLNK,
            q_BLNK if q_sink_BLNK is None else q_sink_BLNK,
            _rows_descriptor(keys_BMNK, tiles.keys, width) if descriptor else keys_BMNK,
            _rows_descriptor(values_BMNK, tiles.keys, width) if descriptor else values_BMNK,
            out if key_scale_BN is None else key_scale_BN,
            out if value_scale_BN is None else value_scale_BN,
            out if length is None else length,
            out if segments_G2 is None else segments_G2.contiguous(),
            out,
            out if lse is None else lse,
            0 if segments_G2 is None else segments_G2.shape[0],
            sink_rows,
            L,
            M,
            N,
            q_BLNK.stride(0),
            q_BLNK.stride(1),
            q_BLNK.stride(2),
            scale * LOG2_E,
            BLOCK_Q=tiles.queries,
            BLOCK_M=tiles.keys,
            K=K,
            WIDTH=width,
            COUNTED=length is not None,
            TWO_TURNS=two_turns,
            EIGHT_BITS=key_scale_BN is not None,
            LSE=need_lse,
            DESCRIPTOR=descriptor,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    return out, lse
