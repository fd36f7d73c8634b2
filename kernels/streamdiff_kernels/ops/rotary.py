"""Norm and rotation of queries and keys, and the writes into the ring."""

from __future__ import annotations

import torch
from torch import Tensor

from streamdiff_kernels import reference
from streamdiff_kernels.errors import KernelInputError
from streamdiff_kernels.ops.door import (
    Impl,
    batched,
    batched_or_none,
    check_index,
    check_ring,
    fast,
    layout,
    op,
    shapes_of,
)


def rotate(x_BLNK: Tensor, cos_LR: Tensor, sin_LR: Tensor, *, impl: Impl) -> Tensor:
    """Rotary embedding on interleaved pairs, ``(a, b) -> (a cos - b sin, a sin + b cos)``; the tables are
    float32.
    """
    _check_tables(x_BLNK.shape[1], x_BLNK.shape[-1], cos_LR, sin_LR)
    return _rotate(x_BLNK, cos_LR, sin_LR, impl.value)


@op("rotate")
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, impl: str) -> Tensor:
    if impl == Impl.REFERENCE:
        return reference.rotate(x, cos, sin)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    fast(impl, x.device).rotate_sink_(x, cos, sin, out, None, 0)
    return out


@shapes_of("rotate")
def _(x: Tensor, cos: Tensor, sin: Tensor, impl: str) -> Tensor:
    return x.new_empty(x.shape)


def _check_tables(num_tokens: int, head_dim: int, cos: Tensor, sin: Tensor) -> None:
    if cos.shape != (num_tokens, head_dim // 2) or sin.shape != cos.shape or head_dim % 2:
        raise KernelInputError(
            f"cos and sin must be [{num_tokens}, {head_dim // 2}], one angle per token and pair, "
            f"got {layout(cos)} and {layout(sin)}"
        )


def qk_norm_rope_write(
    q_BLD: Tensor,
    k_BLD: Tensor,
    v_BLD: Tensor,
    *,
    q_weight_D: Tensor,
    k_weight_D: Tensor,
    cos_LR: Tensor,
    sin_LR: Tensor,
    keys_BMNK: Tensor,
    values_BMNK: Tensor,
    slot: Tensor,
    ring_start: int = 0,
    cos_sink_LR: Tensor | None = None,
    sin_sink_LR: Tensor | None = None,
    key_scale_BN: Tensor | None = None,
    value_scale_BN: Tensor | None = None,
    eps: float = 1e-6,
    impl: Impl,
) -> tuple[Tensor, Tensor | None]:
    """Prepare a chunk for self-attention in one pass: norm and rotate q and k, write k and v into their ring
    slot.

    ``q, k, v`` are the projections, ``[B, L, D]`` with D = N * K, rows at any stride (slices of one fused
    projection will do). RMS norm over D and rotation run in float32. Rows ``ring_start + slot * L .. + L`` of
    the rings are overwritten, all others left alone; a ring may be of another type than q, or float8_e4m3fn
    with one scale per head that is given and stays (``key_scale``, ``value_scale``: float32 ``[B, N]``); what
    exceeds 448 of it is cut off.

    Returns ``q_BLNK`` rotated by ``cos, sin``, and the same queries rotated by ``cos_sink, sin_sink`` for
    `attend(q_sink_BLNK=...)`, or None when those tables are not given.
    """
    B, L, _ = q_BLD.shape
    K = keys_BMNK.shape[-1]
    _check_projections(q_BLD, k_BLD, v_BLD, q_weight_D, k_weight_D, keys_BMNK)
    _check_tables(L, K, cos_LR, sin_LR)
    if (cos_sink_LR is None) != (sin_sink_LR is None):
        raise KernelInputError("cos_sink and sin_sink come together; give both or neither")
    if cos_sink_LR is not None and sin_sink_LR is not None:
        _check_tables(L, K, cos_sink_LR, sin_sink_LR)
    check_ring(keys_BMNK, values_BMNK, (key_scale_BN, value_scale_BN))
    if (keys_BMNK.shape[0] if keys_BMNK.dim() == 4 else 1) != B or ring_start + L > keys_BMNK.shape[-3]:
        raise KernelInputError(
            f"{B} streams of {L} tokens after {ring_start} rows of sink do not fit a ring {layout(keys_BMNK)}"
        )
    check_index(slot, keys_BMNK.device, "slot")
    q, q_sink = _qk_norm_rope_write(
        q_BLD,
        k_BLD,
        v_BLD,
        q_weight_D,
        k_weight_D,
        cos_LR,
        sin_LR,
        cos_sink_LR,
        sin_sink_LR,
        keys_BMNK,
        values_BMNK,
        key_scale_BN,
        value_scale_BN,
        slot,
        ring_start,
        eps,
        impl.value,
    )
    return q, None if cos_sink_LR is None else q_sink


def _check_projections(
    q_BLD: Tensor, k_BLD: Tensor, v_BLD: Tensor, q_weight_D: Tensor, k_weight_D: Tensor, keys_BMNK: Tensor
) -> None:
    D = q_BLD.shape[-1]
    N, K = keys_BMNK.shape[-2:]
    if N * K != D or k_BLD.shape != q_BLD.shape or v_BLD.shape != q_BLD.shape:
        raise KernelInputError(
            f"q, k, v must be [B, L, {N} * {K}] to fill a ring {layout(keys_BMNK)}, "
            f"got {layout(q_BLD)}, {layout(k_BLD)}, {layout(v_BLD)}"
        )
    if q_BLD.stride(-1) != 1 or k_BLD.stride(-1) != 1 or v_BLD.stride(-1) != 1:
        raise KernelInputError("q, k and v must be contiguous along the width; call .contiguous() on the projection")
    if q_weight_D.shape != (D,) or k_weight_D.shape != (D,):
        raise KernelInputError(f"norm weights must be [{D}], got {layout(q_weight_D)} and {layout(k_weight_D)}")


@op("qk_norm_rope_write", mutates=("keys", "values"))
def _qk_norm_rope_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_sink: Tensor | None,
    sin_sink: Tensor | None,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    slot: Tensor,
    ring_start: int,
    eps: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    rings = batched(keys, 4), batched(values, 4)
    scales = batched_or_none(key_scale, 2), batched_or_none(value_scale, 2)
    if impl != Impl.REFERENCE:
        q_out, q_sink = fast(impl, q.device).qk_norm_rope_write(
            q, k, v, q_weight, k_weight, cos, sin, cos_sink, sin_sink, *rings, *scales, slot, ring_start, eps
        )
        return q_out, q.new_empty(0) if q_sink is None else q_sink
    roped_q, roped_k = reference.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps)
    for ring, scale, x in zip(rings, scales, (roped_k, v.unflatten(-1, roped_k.shape[-2:])), strict=True):
        if scale is None:
            ring.copy_(reference.write_slot(ring, x, int(slot), ring_start))
        else:
            x8 = reference.quantise_heads(x, scale)
            bits = reference.write_slot(ring.view(torch.uint8), x8.view(torch.uint8), int(slot), ring_start)
            ring.view(torch.uint8).copy_(bits)
    if cos_sink is None or sin_sink is None:
        return roped_q.to(q.dtype), q.new_empty(0)
    turned = reference.qk_norm_rope(q, k, q_weight, k_weight, cos_sink, sin_sink, eps)[0]
    return roped_q.to(q.dtype), turned.to(q.dtype)


@shapes_of("qk_norm_rope_write")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_sink: Tensor | None,
    sin_sink: Tensor | None,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    slot: Tensor,
    ring_start: int,
    eps: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:2], *keys.shape[-2:])
    return q.new_empty(shape), q.new_empty(0) if cos_sink is None else q.new_empty(shape)


def rotate_sink_(
    pristine_BGNK: Tensor,
    cos_GR: Tensor,
    sin_GR: Tensor,
    keys_BMNK: Tensor,
    *,
    first_row: int = 0,
    key_scale_BN: Tensor | None = None,
    impl: Impl,
) -> None:
    """Write the sink's keys, rotated from their pristine copy, into rows ``first_row .. first_row + G`` of
    the ring.

    The pristine keys are normed and never rotated. Rotating the ring's own rows in place instead would round
    them at every chunk, and drift: 5 % after 100 chunks in bfloat16.
    """
    G, N, K = pristine_BGNK.shape[-3:]
    _check_tables(G, K, cos_GR, sin_GR)
    check_ring(keys_BMNK, None, (key_scale_BN,))
    fits = keys_BMNK.shape[-2:] == (N, K) and first_row >= 0 and first_row + G <= keys_BMNK.shape[-3]
    if pristine_BGNK.dim() != keys_BMNK.dim() or pristine_BGNK.shape[:-3] != keys_BMNK.shape[:-3] or not fits:
        raise KernelInputError(
            f"a sink {layout(pristine_BGNK)} does not fit a ring {layout(keys_BMNK)} from row {first_row}"
        )
    if not pristine_BGNK.is_contiguous():
        raise KernelInputError("the pristine sink must be contiguous; keep it in a buffer of its own")
    _rotate_sink(pristine_BGNK, cos_GR, sin_GR, keys_BMNK, key_scale_BN, first_row, impl.value)


@op("rotate_sink_", mutates=("keys",))
def _rotate_sink(
    pristine: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    key_scale: Tensor | None,
    first_row: int,
    impl: str,
) -> None:
    sink, ring, scales = batched(pristine, 4), batched(keys, 4), batched_or_none(key_scale, 2)
    if impl != Impl.REFERENCE:
        fast(impl, keys.device).rotate_sink_(sink, cos, sin, ring, scales, first_row)
        return
    rows = slice(first_row, first_row + sink.shape[1])
    turned = reference.rotate(reference.wide(sink), cos, sin)
    if scales is None:
        ring[:, rows] = turned.to(ring.dtype)
    else:
        ring[:, rows] = reference.quantise_heads(turned, scales)


@shapes_of("rotate_sink_")
def _(
    pristine: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    key_scale: Tensor | None,
    first_row: int,
    impl: str,
) -> None:
    return None
