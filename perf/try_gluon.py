"""An experiment: attention for Hopper in Gluon, with its own producer of tiles, against the backends that there are.

    python perf/try_gluon.py                     on a Hopper GPU: checks it, then times it beside the others
    python perf/try_gluon.py --overlap off       scores of the next tile are not computed behind this tile's product

Triton's compiler decides by itself where wgmma, the bulk copy engine and warps go, and its attention is reported at 395
to 480 TFLOP/s on Hopper. Here they are said: one warp fetches keys and values by TMA into two stages, two warpgroups
multiply and take exponentials, and the scores of the next tile run on the tensor cores behind the product of this one
(FlashAttention-3, arXiv 2407.08608, 3.2). It becomes a backend when it is faster than what is there; it has been
compiled for sm_90 (`tests/kernels/test_the_gluon_experiment_compiles.py`) and never run. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from measure import machine_card, report, time_call
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

import streamdiff_kernels as kernels

ROWS, COLUMNS, STAGES, WARPS = 128, 128, 2, 8
"""Queries and keys of a tile, tiles of keys under way, warps that compute."""
PRODUCER_REGISTERS = 24
TOLERANCE = 8e-3
"""As of the bfloat16 attention of `streamdiff_kernels`."""


@gluon.jit
def _fetch(
    q_desc,
    keys_desc,
    values_desc,
    tiles,
    barriers,
    first,
    head,
    num_tiles,
    K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One warp: the queries, then keys and values tile by tile, each into the stage that was given back."""
    q_tile, key_tiles, value_tiles = tiles
    q_full, keys_full, keys_free, values_full, values_free = barriers
    mbarrier.expect(q_full, q_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(q_desc, [first, head * K], q_full, q_tile)
    for tile in range(num_tiles):
        stage = tile % STAGES
        turn = (tile // STAGES) & 1
        row = tile * keys_desc.block_shape[0]
        mbarrier.wait(keys_free.index(stage), turn ^ 1)
        mbarrier.expect(keys_full.index(stage), keys_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(keys_desc, [row, head * K], keys_full.index(stage), key_tiles.index(stage))
        mbarrier.wait(values_free.index(stage), turn ^ 1)
        mbarrier.expect(values_full.index(stage), values_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            values_desc, [row, head * K], values_full.index(stage), value_tiles.index(stage)
        )


@gluon.jit
def _compute(
    out_ptr,  # [L, N * K]
    tiles,
    barriers,
    first,
    head,
    num_tiles,
    length,
    L,
    D,
    scale_log2,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    K: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """Two warpgroups: scores, softmax in base 2, and the product with the values."""
    q_tile, key_tiles, value_tiles = tiles
    q_full, keys_full, keys_free, values_full, values_free = barriers
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLUMNS, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, K, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    rows_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    out_rows_layout: gl.constexpr = gl.SliceLayout(1, out_layout)
    largest = gl.full([ROWS], float("-inf"), gl.float32, layout=rows_layout)
    total = gl.full([ROWS], 0.0, gl.float32, layout=rows_layout)
    out = gl.zeros([ROWS, K], gl.float32, layout=out_layout)
    blank = gl.zeros([ROWS, COLUMNS], gl.float32, layout=scores_layout)
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, scores_layout))
    mbarrier.wait(q_full, 0)
    mbarrier.wait(keys_full.index(0), 0)
    pending = warpgroup_mma(q_tile, key_tiles.index(0).permute((1, 0)), blank, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[pending])
    mbarrier.arrive(keys_free.index(0), count=1)
    for tile in range(num_tiles):
        stage = tile % STAGES
        turn = (tile // STAGES) & 1
        scores = gl.where((tile * COLUMNS + column < length)[None, :], scores, float("-inf"))
        now_largest = gl.maximum(largest, gl.max(scores, 1) * scale_log2)
        shrink = gl.exp2(largest - now_largest)
        weights = gl.exp2(scores * scale_log2 - now_largest[:, None])
        total = total * shrink + gl.sum(weights, 1)
        largest = now_largest
        out = out * gl.convert_layout(shrink, out_rows_layout)[:, None]
        weights16 = gl.convert_layout(weights.to(gl.bfloat16), weights_layout)
        following = tile + 1
        more = following < num_tiles
        next_stage = following % STAGES
        next_turn = (following // STAGES) & 1
        if OVERLAP:
            # After the last tile this multiplies what lies there; nobody reads it.
            mbarrier.wait(keys_full.index(next_stage), next_turn, pred=more)
            next_keys = key_tiles.index(next_stage).permute((1, 0))
            pending = warpgroup_mma(q_tile, next_keys, blank, use_acc=False, is_async=True)
            mbarrier.wait(values_full.index(stage), turn)
            product = warpgroup_mma(weights16, value_tiles.index(stage), out, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[pending])
            mbarrier.arrive(keys_free.index(next_stage), count=1, pred=more)
            out = warpgroup_mma_wait(0, deps=[product])
            mbarrier.arrive(values_free.index(stage), count=1)
        else:
            mbarrier.wait(values_full.index(stage), turn)
            product = warpgroup_mma(weights16, value_tiles.index(stage), out, is_async=True)
            out = warpgroup_mma_wait(0, deps=[product])
            mbarrier.arrive(values_free.index(stage), count=1)
            if more:
                mbarrier.wait(keys_full.index(next_stage), next_turn)
                next_keys = key_tiles.index(next_stage).permute((1, 0))
                pending = warpgroup_mma(q_tile, next_keys, blank, use_acc=False, is_async=True)
                scores = warpgroup_mma_wait(0, deps=[pending])
                mbarrier.arrive(keys_free.index(next_stage), count=1)
    out = out / gl.convert_layout(total, out_rows_layout)[:, None]
    row = first + gl.arange(0, ROWS, layout=out_rows_layout)
    channel = head * K + gl.arange(0, K, layout=gl.SliceLayout(0, out_layout))
    gl.store(out_ptr + row[:, None] * D + channel[None, :], out.to(gl.bfloat16), mask=(row < L)[:, None])


@gluon.jit
def _attend_kernel(
    q_desc,
    keys_desc,
    values_desc,
    out_ptr,
    length,
    L,
    D,
    scale_log2,
    K: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
    OVERLAP: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Grid: tiles of queries, heads."""
    ROWS: gl.constexpr = q_desc.block_shape[0]
    COLUMNS: gl.constexpr = keys_desc.block_shape[0]
    first = gl.program_id(0) * ROWS
    head = gl.program_id(1)
    num_tiles = (length + COLUMNS - 1) // COLUMNS
    tiles = (
        gl.allocate_shared_memory(gl.bfloat16, [ROWS, K], q_desc.layout),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, COLUMNS, K], keys_desc.layout),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, COLUMNS, K], values_desc.layout),
    )
    # By hand: Triton 3.6 has no allocate_mbarrier.
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    keys_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    keys_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(keys_full.index(stage), count=1)
        mbarrier.init(keys_free.index(stage), count=1)
        mbarrier.init(values_full.index(stage), count=1)
        mbarrier.init(values_free.index(stage), count=1)
    barriers = (q_full, keys_full, keys_free, values_full, values_free)
    gl.warp_specialize(
        [
            (
                _compute,
                (
                    out_ptr,
                    tiles,
                    barriers,
                    first,
                    head,
                    num_tiles,
                    length,
                    L,
                    D,
                    scale_log2,
                    ROWS,
                    COLUMNS,
                    K,
                    STAGES,
                    WARPS,
                    OVERLAP,
                ),
            ),
            (_fetch, (q_desc, keys_desc, values_desc, tiles, barriers, first, head, num_tiles, K, STAGES)),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )


def attend(q_BLNK: Tensor, keys_BMNK: Tensor, values_BMNK: Tensor, length: int, *, overlap: bool = True) -> Tensor:
    """One stream's queries over the first ``length`` rows of a ring; bfloat16, heads of 128.

    Tiles end where the descriptors do: rows that were never written are read as zeros, whatever they hold.
    """
    _, L, N, K = q_BLNK.shape
    D = N * K
    out_BLNK = torch.empty_like(q_BLNK)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_desc = TensorDescriptor(q_BLNK, [L, D], [D, 1], [ROWS, K], layout)
    keys_desc, values_desc = (
        TensorDescriptor(ring, [length, D], [D, 1], [COLUMNS, K], layout) for ring in (keys_BMNK, values_BMNK)
    )
    _attend_kernel[(math.ceil(L / ROWS), N)](
        q_desc,
        keys_desc,
        values_desc,
        out_BLNK,
        length,
        L,
        D,
        math.log2(math.e) / math.sqrt(K),
        K=K,
        STAGES=STAGES,
        WARPS=WARPS,
        OVERLAP=overlap,
        PRODUCER_REGISTERS=PRODUCER_REGISTERS,
        num_warps=WARPS,
    )
    return out_BLNK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overlap", choices=["on", "off"], default="on")
    parser.add_argument("--tokens", type=int, default=3168)
    parser.add_argument("--rows", type=int, default=15312, help="rows of the ring that are attended to")
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--budget-s", type=float, default=2.0)
    parser.add_argument("--save", type=Path, help="write the JSON object here too")
    args = parser.parse_args()
    device, overlap = torch.device("cuda", 0), args.overlap == "on"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability(device) < (9, 0):
        raise SystemExit("error: wgmma and TMA need a Hopper GPU; without one, the test beside it compiles this kernel")
    L, M, N, K = args.tokens, args.rows, args.heads, 128
    generator = torch.Generator(device=device).manual_seed(0)
    q, keys, values = (
        torch.randn(1, rows, N, K, generator=generator, device=device).to(torch.bfloat16) for rows in (L, M, M)
    )
    for length in (L, M // 2 + 5, M):
        want = kernels.attend(q.double(), keys.double(), values.double(), length, backend="reference")
        error = (attend(q, keys, values, length, overlap=overlap).double() - want).abs().max().item()
        if not error <= TOLERANCE:
            raise SystemExit(f"error: over {length} rows it is {error:.1e} off, more than {TOLERANCE}: not timed")
    flop = 4 * L * M * N * K
    rows: list[dict[str, Any]] = []
    ready = kernels.available_backends(device=device, dtype=q.dtype, head_dim=K)
    calls = {"gluon": lambda: attend(q, keys, values, M, overlap=overlap)} | {
        name: lambda name=name: kernels.attend(q, keys, values, M, backend=name)
        for name, why in ready.items()
        if why is None and name != "reference"
    }
    for name, call in calls.items():
        timing = time_call(call, device, budget_s=args.budget_s, flush=False)
        rows.append({"backend": name, "time": timing, "ms": timing.p50, "tflops": flop / timing.p50 / 1e9})
    report(
        "gluon",
        f"Attention of {L} queries over {M} rows, {N} heads of {K}, bfloat16",
        rows,
        machine_card(device),
        columns=["backend", "ms", "tflops"],
        save=args.save,
        overlap=overlap,
    )


if __name__ == "__main__":
    main()
