"""The typed door to every op: checks, chooses an implementation, calls it.

Each op is a `torch.library.custom_op` of the namespace ``streamdiff_kernels``, so that
``torch.compile(fullgraph=True)`` sees one opaque node, and each takes the implementation by name. One that
cannot run is an error, never a quiet fallback. Ops whose name ends in ``_`` write into an argument, as
`qk_norm_rope_write` writes into the ring. They are for inference: the functions of `reference` are
differentiable, these are not.

Axes as in `reference`: B streams, T latent frames, L tokens of this chunk, M tokens remembered, D model
width, N heads, K head width, R = K / 2 rotary pairs, G sink tokens, C channels, F hidden, E output width.

Rings and sinks may come without their first axis when there is one stream (``[M, N, K]``), and so may
modulations that all streams share (``[T, D]``). A slot number is an int32 tensor of one element on the device
of the ring: the op reads it there, so neither a recompile nor a wait follows it round the ring. A slot
outside the ring raises IndexError on a CPU; on a GPU nothing is written.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from enum import StrEnum
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.library import custom_op, register_fake

from streamdiff_kernels import plain, reference
from streamdiff_kernels.attention import (
    Segments,
    attend_over_segments,
    backend_named,
    host_segments,
    triton_missing,
)
from streamdiff_kernels.errors import BackendUnavailable, KernelInputError

E4M3 = torch.float8_e4m3fn


class Impl(StrEnum):
    """Who computes an op: the specification, fast plain torch, or Triton."""

    REFERENCE = "reference"
    TORCH = "torch"
    TRITON = "triton"


_Shapes = TypeVar("_Shapes", bound=Callable[..., object])


def _shapes_of(name: str) -> Callable[[_Shapes], _Shapes]:
    """Register what an op returns for tensors without data (torch's decorator is untyped)."""

    def register(shapes: _Shapes) -> _Shapes:
        register_fake(f"streamdiff_kernels::{name}", shapes)
        return shapes

    return register


def require(impl: Impl, device: torch.device) -> None:
    """Raise `BackendUnavailable` when ``impl`` cannot run on ``device``."""
    if impl == Impl.TRITON and (why := triton_missing(device)) is not None:
        raise BackendUnavailable(f"Impl.TRITON cannot run: {why}; use Impl.TORCH")


def _fast(impl: str, device: torch.device) -> Any:
    """The module behind ``impl``. `plain` and `triton` have the same functions; `reference` is called by
    name.
    """
    if impl == Impl.TRITON:
        require(Impl.TRITON, device)
        return importlib.import_module("streamdiff_kernels.triton")
    module: ModuleType = plain
    return module


def _batched(x: Tensor, num_axes: int) -> Tensor:
    """Give a lone stream its axis."""
    return x if x.dim() == num_axes else x.unsqueeze(0)


def _batched_or_none(x: Tensor | None, num_axes: int) -> Tensor | None:
    return None if x is None else _batched(x, num_axes)


def _shape(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"


# --------------------------------------------------------------------------------------- norm, rotation, ring


def rms_norm(x_BLD: Tensor, weight_D: Tensor, *, eps: float = 1e-6, impl: Impl) -> Tensor:
    """Root-mean-square norm over the full width, computed in float32; ``[B, L, D] -> [B, L, D]`` in the type
    of x.

    For cross-attention, whose keys have no position. Wan norms all heads together (weight ``[D]``).
    """
    if x_BLD.dim() != 3 or weight_D.shape != x_BLD.shape[-1:] or x_BLD.stride(-1) != 1:
        raise KernelInputError(f"rms_norm wants x [B, L, D] and weight [D], got {_shape(x_BLD)}, {_shape(weight_D)}")
    return _rms_norm(x_BLD, weight_D, eps, impl.value)


@custom_op("streamdiff_kernels::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float, impl: str) -> Tensor:
    if impl == Impl.REFERENCE:
        return reference.rms_norm(x, weight, eps)
    return _fast(impl, x.device).rms_norm(x, weight, eps)


@_shapes_of("rms_norm")
def _(x: Tensor, weight: Tensor, eps: float, impl: str) -> Tensor:
    return x.new_empty(x.shape)


def rotate(x_BLNK: Tensor, cos_LR: Tensor, sin_LR: Tensor, *, impl: Impl) -> Tensor:
    """Rotary embedding on interleaved pairs, ``(a, b) -> (a cos - b sin, a sin + b cos)``; the tables are
    float32.
    """
    _check_tables(x_BLNK.shape[1], x_BLNK.shape[-1], cos_LR, sin_LR)
    return _rotate(x_BLNK, cos_LR, sin_LR, impl.value)


@custom_op("streamdiff_kernels::rotate", mutates_args=())
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, impl: str) -> Tensor:
    if impl == Impl.REFERENCE:
        return reference.rotate(x, cos, sin)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _fast(impl, x.device).rotate_sink_(x, cos, sin, out, None, 0)
    return out


@_shapes_of("rotate")
def _(x: Tensor, cos: Tensor, sin: Tensor, impl: str) -> Tensor:
    return x.new_empty(x.shape)


def _check_tables(num_tokens: int, head_dim: int, cos: Tensor, sin: Tensor) -> None:
    if cos.shape != (num_tokens, head_dim // 2) or sin.shape != cos.shape or head_dim % 2:
        raise KernelInputError(
            f"cos and sin must be [{num_tokens}, {head_dim // 2}], one angle per token and pair, "
            f"got {_shape(cos)} and {_shape(sin)}"
        )


def _check_ring(keys: Tensor, values: Tensor | None, scales: tuple[Tensor | None, ...]) -> None:
    if keys.dim() not in (3, 4) or not keys.is_contiguous():
        raise KernelInputError(f"a ring is a contiguous [B, M, N, K] or [M, N, K], got {_shape(keys)}")
    if values is not None and (values.shape != keys.shape or values.dtype != keys.dtype or not values.is_contiguous()):
        raise KernelInputError(f"keys and values must be alike, got {_shape(keys)} and {_shape(values)}")
    for scale in scales:
        if (scale is not None) != (keys.dtype == E4M3):
            raise KernelInputError(
                f"float32 scales [.., M, N] go with a float8_e4m3fn ring, and no other; ring {_shape(keys)}"
            )
        if scale is not None and (scale.shape != keys.shape[:-1] or not scale.is_contiguous()):
            raise KernelInputError(
                f"scales of a ring {_shape(keys)} must be {list(keys.shape[:-1])}, got {_shape(scale)}"
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
    key_scale_BMN: Tensor | None = None,
    value_scale_BMN: Tensor | None = None,
    eps: float = 1e-6,
    impl: Impl,
) -> tuple[Tensor, Tensor | None]:
    """Prepare a chunk for self-attention in one pass: norm and rotate q and k, write k and v into their ring
    slot.

    ``q, k, v`` are the projections, ``[B, L, D]`` with D = N * K, rows at any stride (slices of one fused
    projection will do). RMS norm over D and rotation run in float32. Rows ``ring_start + slot * L .. + L`` of
    the rings are overwritten, all others left alone; a ring may be of another type than q, or float8_e4m3fn
    with one scale per token and head (``key_scale``, ``value_scale``: float32 ``[B, M, N]``).

    Returns ``q_BLNK`` rotated by ``cos, sin``, and the same queries rotated by ``cos_sink, sin_sink`` for
    `attend(q_sink_BLNK=...)`, or None when those tables are not given.
    """
    B, L, D = q_BLD.shape
    N, K = keys_BMNK.shape[-2:]
    if N * K != D or k_BLD.shape != q_BLD.shape or v_BLD.shape != q_BLD.shape:
        raise KernelInputError(
            f"q, k, v must be [B, L, {N} * {K}] to fill a ring {_shape(keys_BMNK)}, "
            f"got {_shape(q_BLD)}, {_shape(k_BLD)}, {_shape(v_BLD)}"
        )
    if q_BLD.stride(-1) != 1 or k_BLD.stride(-1) != 1 or v_BLD.stride(-1) != 1:
        raise KernelInputError("q, k and v must be contiguous along the width; call .contiguous() on the projection")
    if q_weight_D.shape != (D,) or k_weight_D.shape != (D,):
        raise KernelInputError(f"norm weights must be [{D}], got {_shape(q_weight_D)} and {_shape(k_weight_D)}")
    _check_tables(L, K, cos_LR, sin_LR)
    if (cos_sink_LR is None) != (sin_sink_LR is None):
        raise KernelInputError("cos_sink and sin_sink come together; give both or neither")
    if cos_sink_LR is not None and sin_sink_LR is not None:
        _check_tables(L, K, cos_sink_LR, sin_sink_LR)
    _check_ring(keys_BMNK, values_BMNK, (key_scale_BMN, value_scale_BMN))
    if (keys_BMNK.shape[0] if keys_BMNK.dim() == 4 else 1) != B or ring_start + L > keys_BMNK.shape[-3]:
        raise KernelInputError(
            f"{B} streams of {L} tokens after {ring_start} rows of sink do not fit a ring {_shape(keys_BMNK)}"
        )
    _check_index(slot, keys_BMNK.device, "slot")
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
        key_scale_BMN,
        value_scale_BMN,
        slot,
        ring_start,
        eps,
        impl.value,
    )
    return q, None if cos_sink_LR is None else q_sink


def _check_index(index: Tensor, device: torch.device, name: str) -> None:
    if index.numel() != 1 or index.dtype != torch.int32 or index.device != device:
        raise KernelInputError(
            f"{name} must be one int32 on {device}, the device of the ring, got {_shape(index)} on "
            f"{index.device}; try torch.zeros((), dtype=torch.int32, device=...)"
        )


@custom_op(
    "streamdiff_kernels::qk_norm_rope_write",
    mutates_args=("keys", "values", "key_scale", "value_scale"),
)
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
    rings = _batched(keys, 4), _batched(values, 4)
    scales = _batched_or_none(key_scale, 3), _batched_or_none(value_scale, 3)
    if impl != Impl.REFERENCE:
        q_out, q_sink = _fast(impl, q.device).qk_norm_rope_write(
            q, k, v, q_weight, k_weight, cos, sin, cos_sink, sin_sink, *rings, *scales, slot, ring_start, eps
        )
        return q_out, q.new_empty(0) if q_sink is None else q_sink
    roped_q, roped_k = reference.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps)
    for ring, scale, x in zip(rings, scales, (roped_k, v.unflatten(-1, roped_k.shape[-2:])), strict=True):
        if scale is None:
            ring.copy_(reference.write_slot(ring, x, int(slot), ring_start))
        else:
            x8, x_scale = reference.quantise_rows(x)
            bits = reference.write_slot(ring.view(torch.uint8), x8.view(torch.uint8), int(slot), ring_start)
            ring.view(torch.uint8).copy_(bits)
            scale.copy_(reference.write_slot(scale, x_scale, int(slot), ring_start))
    if cos_sink is None or sin_sink is None:
        return roped_q.to(q.dtype), q.new_empty(0)
    turned = reference.qk_norm_rope(q, k, q_weight, k_weight, cos_sink, sin_sink, eps)[0]
    return roped_q.to(q.dtype), turned.to(q.dtype)


@_shapes_of("qk_norm_rope_write")
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
    key_scale_BMN: Tensor | None = None,
    impl: Impl,
) -> None:
    """Write the sink's keys, rotated from their pristine copy, into rows ``first_row .. first_row + G`` of
    the ring.

    The pristine keys are normed and never rotated. Rotating the ring's own rows in place instead would round
    them at every chunk, and drift: 5 % after 100 chunks in bfloat16.
    """
    G, N, K = pristine_BGNK.shape[-3:]
    _check_tables(G, K, cos_GR, sin_GR)
    _check_ring(keys_BMNK, None, (key_scale_BMN,))
    fits = keys_BMNK.shape[-2:] == (N, K) and first_row >= 0 and first_row + G <= keys_BMNK.shape[-3]
    if pristine_BGNK.dim() != keys_BMNK.dim() or pristine_BGNK.shape[:-3] != keys_BMNK.shape[:-3] or not fits:
        raise KernelInputError(
            f"a sink {_shape(pristine_BGNK)} does not fit a ring {_shape(keys_BMNK)} from row {first_row}"
        )
    if not pristine_BGNK.is_contiguous():
        raise KernelInputError("the pristine sink must be contiguous; keep it in a buffer of its own")
    _rotate_sink(pristine_BGNK, cos_GR, sin_GR, keys_BMNK, key_scale_BMN, first_row, impl.value)


@custom_op("streamdiff_kernels::rotate_sink_", mutates_args=("keys", "key_scale"))
def _rotate_sink(
    pristine: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    key_scale: Tensor | None,
    first_row: int,
    impl: str,
) -> None:
    sink, ring, scales = _batched(pristine, 4), _batched(keys, 4), _batched_or_none(key_scale, 3)
    if impl != Impl.REFERENCE:
        _fast(impl, keys.device).rotate_sink_(sink, cos, sin, ring, scales, first_row)
        return
    rows = slice(first_row, first_row + sink.shape[1])
    turned = reference.rotate(reference.wide(sink), cos, sin)
    if scales is None:
        ring[:, rows] = turned.to(ring.dtype)
    else:
        ring[:, rows], scales[:, rows] = reference.quantise_rows(turned)


@_shapes_of("rotate_sink_")
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


# ----------------------------------------------------------------------------- residual stream and modulation


def _check_modulation(x: Tensor, *mods: Tensor | None) -> None:
    if x.dim() != 3 or not x.is_contiguous():
        raise KernelInputError(f"the residual stream must be a contiguous [B, L, D], got {_shape(x)}")
    B, L, D = x.shape
    first = next((mod for mod in mods if mod is not None), None)
    for mod in mods:
        if mod is None:
            continue
        if mod.dim() not in (2, 3) or mod.shape[-1] != D or mod.stride(-1) != 1 or L % mod.shape[-2] != 0:
            raise KernelInputError(
                f"a modulation is [T, {D}] or [B, T, {D}] with T dividing the {L} tokens, got {_shape(mod)}"
            )
        if mod.dim() == 3 and mod.shape[0] not in (1, B):
            raise KernelInputError(f"a modulation for {mod.shape[0]} streams cannot serve {B}; give [T, D] to share it")
        if first is not None and mod.shape[-2] != first.shape[-2]:
            raise KernelInputError(f"modulations must agree on T, got {_shape(first)} and {_shape(mod)}")


def norm_modulate(x_BLD: Tensor, scale_BTD: Tensor, shift_BTD: Tensor, *, eps: float = 1e-6, impl: Impl) -> Tensor:
    """Layer norm without affine, then adaptive scale and shift per latent frame: ``norm(x) * (1 + scale) +
    shift``.

    Modulations are ``[T, D]`` or ``[B, T, D]``, T dividing L: frame t holds tokens ``t * L/T .. (t + 1) *
    L/T``. They may be slices of a ``[T, 6, D]`` table, and float32 whatever x is. An affine layer norm is the
    case T = 1 with ``scale = weight - 1``, ``shift = bias``. Returns ``[B, L, D]`` in the type of x.
    """
    _check_modulation(x_BLD, scale_BTD, shift_BTD)
    return _norm_modulate(x_BLD, scale_BTD, shift_BTD, eps, impl.value)


@custom_op("streamdiff_kernels::norm_modulate", mutates_args=())
def _norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float, impl: str) -> Tensor:
    if impl == Impl.REFERENCE:
        return reference.norm_modulate(x, scale, shift, eps)
    return _fast(impl, x.device).norm_modulate(x, _batched(scale, 3), _batched(shift, 3), eps)


@_shapes_of("norm_modulate")
def _(x: Tensor, scale: Tensor, shift: Tensor, eps: float, impl: str) -> Tensor:
    return x.new_empty(x.shape)


def gate_residual_(x_BLD: Tensor, y_BLD: Tensor, gate_BTD: Tensor | None, *, impl: Impl) -> Tensor:
    """Add a branch to the residual stream in place, ``x += gate * y`` (``x += y`` without a gate); returns x.

    The product is formed in float32 and rounded once, into the type of x.
    """
    _check_modulation(x_BLD, gate_BTD)
    _check_branch(x_BLD, y_BLD)
    _gate_residual(x_BLD, y_BLD, gate_BTD, impl.value)
    return x_BLD


def _check_branch(x: Tensor, y: Tensor) -> None:
    if y.shape != x.shape or not y.is_contiguous():
        raise KernelInputError(f"a branch must be contiguous and shaped as its stream {_shape(x)}, got {_shape(y)}")


@custom_op("streamdiff_kernels::gate_residual_", mutates_args=("x",))
def _gate_residual(x: Tensor, y: Tensor, gate: Tensor | None, impl: str) -> None:
    if impl == Impl.REFERENCE:
        x.copy_(reference.gate_residual(x, y, gate))
    else:
        _fast(impl, x.device).gate_residual_(x, y, _batched_or_none(gate, 3))


@_shapes_of("gate_residual_")
def _(x: Tensor, y: Tensor, gate: Tensor | None, impl: str) -> None:
    return None


def gate_residual_norm_modulate_(
    x_BLD: Tensor,
    y_BLD: Tensor,
    gate_BTD: Tensor | None,
    scale_BTD: Tensor,
    shift_BTD: Tensor,
    *,
    eps: float = 1e-6,
    impl: Impl,
) -> Tensor:
    """Close one branch and open the next: ``x += gate * y`` in place, then `norm_modulate` of x, which is
    returned.
    """
    _check_modulation(x_BLD, gate_BTD, scale_BTD, shift_BTD)
    _check_branch(x_BLD, y_BLD)
    return _gate_residual_norm_modulate(x_BLD, y_BLD, gate_BTD, scale_BTD, shift_BTD, eps, impl.value)


@custom_op("streamdiff_kernels::gate_residual_norm_modulate_", mutates_args=("x",))
def _gate_residual_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float, impl: str
) -> Tensor:
    if impl == Impl.REFERENCE:
        stream, out = reference.gate_residual_norm_modulate(x, y, gate, scale, shift, eps)
        x.copy_(stream)
        return out
    gate, scale, shift = _batched_or_none(gate, 3), _batched(scale, 3), _batched(shift, 3)
    if impl == Impl.TORCH:
        plain.gate_residual_(x, y, gate)
        return plain.norm_modulate(x, scale, shift, eps)
    return _fast(impl, x.device).gate_residual_norm_modulate_(x, y, gate, scale, shift, eps)


@_shapes_of("gate_residual_norm_modulate_")
def _(x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float, impl: str) -> Tensor:
    return x.new_empty(x.shape)


def rms_norm_silu(
    x_BCTHW: Tensor, weight_C: Tensor, bias_C: Tensor | None = None, *, eps: float = 1e-12, impl: Impl
) -> Tensor:
    """The decoder's norm over channels and its activation: ``silu(x / max(|x|, eps) * sqrt(C) * weight +
    bias)``.

    ``[B, C, ...]`` of 4 or 5 axes, contiguous or channels-last; the layout and the type of x are kept.
    """
    C = x_BCTHW.shape[1]
    if x_BCTHW.dim() not in (4, 5) or weight_C.numel() != C or (bias_C is not None and bias_C.numel() != C):
        raise KernelInputError(
            f"rms_norm_silu wants x [B, C, ...] and weight of C, got {_shape(x_BCTHW)}, {_shape(weight_C)}"
        )
    last = torch.channels_last if x_BCTHW.dim() == 4 else torch.channels_last_3d
    if not (x_BCTHW.is_contiguous() or x_BCTHW.is_contiguous(memory_format=last)):
        raise KernelInputError("rms_norm_silu wants a contiguous or a channels-last picture; call .contiguous() first")
    return _rms_norm_silu(x_BCTHW, weight_C, bias_C, eps, impl.value)


@custom_op("streamdiff_kernels::rms_norm_silu", mutates_args=())
def _rms_norm_silu(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, impl: str) -> Tensor:
    weight, bias = weight.reshape(-1), None if bias is None else bias.reshape(-1)
    if impl == Impl.REFERENCE:
        out = torch.empty_like(x)
        return out.copy_(reference.rms_norm_silu(x, weight, bias, eps))
    return _fast(impl, x.device).rms_norm_silu(x, weight, bias, eps)


@_shapes_of("rms_norm_silu")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, impl: str) -> Tensor:
    return torch.empty_like(x)


# ------------------------------------------------------------------------------------------------- eight bits


def quantise_rows(x: Tensor, *, impl: Impl) -> tuple[Tensor, Tensor]:
    """e4m3 with one scale per row: ``[..., D] -> float8_e4m3fn [..., D], float32 [...]``, ``x ~ x8 * scale``.

    For weights once, and for activations that no fused op prepares. A row of zeros has scale 0.
    """
    if x.dim() < 2 or not x.is_contiguous():
        raise KernelInputError(f"quantise_rows wants a contiguous [..., D], got {_shape(x)}")
    return _quantise_rows(x, impl.value)


@custom_op("streamdiff_kernels::quantise_rows", mutates_args=())
def _quantise_rows(x: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    if impl == Impl.REFERENCE:
        return reference.quantise_rows(x)
    return _fast(impl, x.device).quantise_rows(x)


@_shapes_of("quantise_rows")
def _(x: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return _fake_eight_bits(x)


def _fake_eight_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=E4M3), x.new_empty(x.shape[:-1], dtype=torch.float32)


def norm_modulate_fp8(
    x_BLD: Tensor, scale_BTD: Tensor, shift_BTD: Tensor, *, eps: float = 1e-6, impl: Impl
) -> tuple[Tensor, Tensor]:
    """`norm_modulate` for an eight-bit linear: float8_e4m3fn ``[B, L, D]`` and its row scales ``[B, L]``."""
    _check_modulation(x_BLD, scale_BTD, shift_BTD)
    return _norm_modulate_fp8(x_BLD, scale_BTD, shift_BTD, eps, impl.value)


@custom_op("streamdiff_kernels::norm_modulate_fp8", mutates_args=())
def _norm_modulate_fp8(x: Tensor, scale: Tensor, shift: Tensor, eps: float, impl: str) -> tuple[Tensor, Tensor]:
    if impl == Impl.REFERENCE:
        return reference.quantise_rows(reference.norm_modulate(reference.wide(x), scale, shift, eps))
    return _fast(impl, x.device).norm_modulate_fp8(x, _batched(scale, 3), _batched(shift, 3), eps)


@_shapes_of("norm_modulate_fp8")
def _(x: Tensor, scale: Tensor, shift: Tensor, eps: float, impl: str) -> tuple[Tensor, Tensor]:
    return _fake_eight_bits(x)


def gate_residual_norm_modulate_fp8_(
    x_BLD: Tensor,
    y_BLD: Tensor,
    gate_BTD: Tensor | None,
    scale_BTD: Tensor,
    shift_BTD: Tensor,
    *,
    eps: float = 1e-6,
    impl: Impl,
) -> tuple[Tensor, Tensor]:
    """`gate_residual_norm_modulate_` for an eight-bit linear: float8_e4m3fn ``[B, L, D]`` and row scales
    ``[B, L]``.
    """
    _check_modulation(x_BLD, gate_BTD, scale_BTD, shift_BTD)
    _check_branch(x_BLD, y_BLD)
    return _gate_residual_norm_modulate_fp8(x_BLD, y_BLD, gate_BTD, scale_BTD, shift_BTD, eps, impl.value)


@custom_op("streamdiff_kernels::gate_residual_norm_modulate_fp8_", mutates_args=("x",))
def _gate_residual_norm_modulate_fp8(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float, impl: str
) -> tuple[Tensor, Tensor]:
    if impl == Impl.REFERENCE:
        x.copy_(reference.gate_residual(x, y, gate))
        return reference.quantise_rows(reference.norm_modulate(reference.wide(x), scale, shift, eps))
    gate, scale, shift = _batched_or_none(gate, 3), _batched(scale, 3), _batched(shift, 3)
    if impl == Impl.TORCH:
        plain.gate_residual_(x, y, gate)
        return plain.norm_modulate_fp8(x, scale, shift, eps)
    return _fast(impl, x.device).gate_residual_norm_modulate_fp8_(x, y, gate, scale, shift, eps)


@_shapes_of("gate_residual_norm_modulate_fp8_")
def _(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float, impl: str
) -> tuple[Tensor, Tensor]:
    return _fake_eight_bits(x)


def gelu_fp8(x_BLF: Tensor, *, impl: Impl) -> tuple[Tensor, Tensor]:
    """GELU (tanh) of the hidden layer for an eight-bit linear: float8_e4m3fn ``[B, L, F]`` and row scales
    ``[B, L]``.
    """
    if x_BLF.dim() != 3 or not x_BLF.is_contiguous():
        raise KernelInputError(f"gelu_fp8 wants a contiguous [B, L, F], got {_shape(x_BLF)}")
    return _gelu_fp8(x_BLF, impl.value)


@custom_op("streamdiff_kernels::gelu_fp8", mutates_args=())
def _gelu_fp8(x: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    if impl == Impl.REFERENCE:
        return reference.quantise_rows(reference.gelu_tanh(reference.wide(x)))
    return _fast(impl, x.device).gelu_fp8(x)


@_shapes_of("gelu_fp8")
def _(x: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return _fake_eight_bits(x)


def linear(x_BLD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None, *, gelu: bool = False, impl: Impl) -> Tensor:
    """Linear layer, ``[B, L, D] -> [B, L, E]``, with GELU (tanh) on its way out if asked.

    The library's product on a GPU. On a CPU oneDNN's, which is twice as fast as torch's choice for float32 on
    AMD's processors and as exact.
    """
    if x_BLD.dim() != 3 or weight_ED.shape[-1] != x_BLD.shape[-1] or weight_ED.dim() != 2:
        raise KernelInputError(f"linear wants x [B, L, D] and weight [E, D], got {_shape(x_BLD)}, {_shape(weight_ED)}")
    if impl == Impl.TRITON and x_BLD.device.type == "cpu":
        require(impl, x_BLD.device)
    return _linear(x_BLD, weight_ED, bias_E, gelu, impl.value)


@custom_op("streamdiff_kernels::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, impl: str) -> Tensor:
    if impl == Impl.REFERENCE:
        return reference.linear(x, weight, bias, gelu=gelu)
    return plain.linear(x, weight, bias, gelu=gelu)


@_shapes_of("linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, impl: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def linear_fp8(
    x8_BLD: Tensor,
    x_scale_BL: Tensor,
    weight8_ED: Tensor,
    weight_scale_E: Tensor,
    bias_E: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    impl: Impl = Impl.TORCH,
) -> Tensor:
    """Eight-bit linear layer with one scale per token and per output: ``[B, L, D] -> [B, L, E]`` in
    ``out_dtype``.

    `Impl.TORCH` is ``torch._scaled_mm`` (tensor cores on a GPU: capability 8.9 or above, D and E multiples of
    16; bfloat16 out). There is no Triton version: the library's is at the chip's limit.
    """
    D, E = x8_BLD.shape[-1], weight8_ED.shape[0]
    if x8_BLD.dim() != 3 or x8_BLD.dtype != E4M3 or weight8_ED.dtype != E4M3 or weight8_ED.shape != (E, D):
        raise KernelInputError(
            f"linear_fp8 wants x [B, L, D], weight [E, D], float8_e4m3fn; got {_shape(x8_BLD)}, {_shape(weight8_ED)}"
        )
    if x_scale_BL.shape != x8_BLD.shape[:-1] or weight_scale_E.shape != (E,):
        raise KernelInputError(
            f"scales must be {list(x8_BLD.shape[:-1])} and [{E}], got {_shape(x_scale_BL)}, {_shape(weight_scale_E)}"
        )
    if impl == Impl.TRITON:
        raise BackendUnavailable("linear_fp8 has no Triton implementation: torch._scaled_mm serves it; use Impl.TORCH")
    return _linear_fp8(x8_BLD, x_scale_BL, weight8_ED, weight_scale_E, bias_E, out_dtype, impl.value)


@custom_op("streamdiff_kernels::linear_fp8", mutates_args=())
def _linear_fp8(
    x8: Tensor,
    x_scale: Tensor,
    weight8: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    impl: str,
) -> Tensor:
    if impl == Impl.REFERENCE:
        return reference.linear_fp8(x8, x_scale, weight8, weight_scale, bias).to(out_dtype)
    return plain.linear_fp8(x8, x_scale, weight8, weight_scale, bias, out_dtype)


@_shapes_of("linear_fp8")
def _(
    x8: Tensor,
    x_scale: Tensor,
    weight8: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    impl: str,
) -> Tensor:
    return x8.new_empty((*x8.shape[:-1], weight8.shape[0]), dtype=out_dtype)


# -------------------------------------------------------------------------------------------------- attention


def attend(
    q_BLNK: Tensor,
    keys_BMNK: Tensor,
    values_BMNK: Tensor,
    length: int | Tensor | None = None,
    *,
    backend: str,
    segments: Segments | Tensor | None = None,
    q_sink_BLNK: Tensor | None = None,
    sink_rows: int = 0,
    key_scale_BMN: Tensor | None = None,
    value_scale_BMN: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of one chunk's queries over rows of the ring, the chunk's own included; returns ``[B, L, N,
    K]``.

    The rows are the first ``length`` (the fill level, sink included), or ``segments``, pairs of (first row,
    number of rows): the sparse {first, previous, own}. Their order is free. Either may live on the device, as
    one int32 or as int32 ``[G, 2]``, for backends that can read it there ('triton' both; 'flash-attn' and
    'fa3' the length), so that one CUDA graph serves every fill level; on a CPU every backend can. Otherwise
    give integers.

    With ``q_sink`` (from `qk_norm_rope_write`), rows below ``sink_rows`` are scored against ``q_sink``, the
    rest against q: the sink's distance is set by turning the query, and no key is touched.

    ``backend`` is a key of `attention.BACKENDS`; one that cannot run raises `BackendUnavailable`. ``scale``
    defaults to ``1 / sqrt(K)``.
    """
    return _attend_checked(
        q_BLNK,
        keys_BMNK,
        values_BMNK,
        length,
        backend,
        segments,
        q_sink_BLNK,
        sink_rows,
        key_scale_BMN,
        value_scale_BMN,
        scale,
        False,
    )[0]


def attend_with_lse(
    q_BLNK: Tensor,
    keys_BMNK: Tensor,
    values_BMNK: Tensor,
    length: int | Tensor | None = None,
    *,
    backend: str,
    segments: Segments | Tensor | None = None,
    q_sink_BLNK: Tensor | None = None,
    sink_rows: int = 0,
    key_scale_BMN: Tensor | None = None,
    value_scale_BMN: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend`, and the log-sum-exp of the scores, float32 ``[B, N, L]``, for `merge_attention`."""
    return _attend_checked(
        q_BLNK,
        keys_BMNK,
        values_BMNK,
        length,
        backend,
        segments,
        q_sink_BLNK,
        sink_rows,
        key_scale_BMN,
        value_scale_BMN,
        scale,
        True,
    )


merge_attention = reference.merge_attention


def _attend_checked(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int | Tensor | None,
    backend: str,
    segments: Segments | Tensor | None,
    q_sink: Tensor | None,
    sink_rows: int,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    scale: float | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    B, _, N, K = q.shape
    _check_ring(keys, values, (key_scale, value_scale))
    if keys.shape[-2:] != (N, K) or (keys.shape[0] if keys.dim() == 4 else 1) != B:
        raise KernelInputError(f"queries {_shape(q)} and ring {_shape(keys)} must agree on streams, heads and width")
    if keys.dtype not in (q.dtype, E4M3):
        raise KernelInputError(f"queries {_shape(q)} and ring {_shape(keys)} must be of one type, or the ring e4m3")
    if q_sink is not None and (q_sink.shape != q.shape or q_sink.dtype != q.dtype):
        raise KernelInputError(f"q_sink must be like q {_shape(q)}, got {_shape(q_sink)}")
    if (length is None) == (segments is None):
        raise KernelInputError("say which rows to attend to: either length or segments")
    length_tensor = segments_tensor = None
    host_bounds: list[int] = []
    if isinstance(length, Tensor):
        _check_index(length, q.device, "length")
        length_tensor = length
    elif length is not None:
        host_bounds = [0, length]
    if isinstance(segments, Tensor):
        if segments.dim() != 2 or segments.shape[1] != 2 or segments.dtype != torch.int32:
            raise KernelInputError(f"segments on the device are int32 [G, 2], got {_shape(segments)}")
        segments_tensor = segments
    elif segments is not None:
        host_bounds = [bound for segment in segments for bound in segment]
    if scale is None:
        scale = 1 / math.sqrt(K)
    return _attend(
        q,
        q_sink,
        keys,
        values,
        key_scale,
        value_scale,
        length_tensor,
        segments_tensor,
        host_bounds,
        sink_rows,
        scale,
        need_lse,
        backend,
    )


@custom_op("streamdiff_kernels::attend", mutates_args=())
def _attend(
    q: Tensor,
    q_sink: Tensor | None,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    length: Tensor | None,
    segments: Tensor | None,
    host_bounds: list[int],
    sink_rows: int,
    scale: float,
    need_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    chosen = backend_named(backend, device=q.device, dtype=q.dtype, head_dim=q.shape[-1])
    rings = _batched(keys, 4), _batched(values, 4)
    scales = _batched_or_none(key_scale, 3), _batched_or_none(value_scale, 3)
    if backend == "triton":
        pairs = host_segments(None, None, host_bounds) if host_bounds else None
        out, lse = _fast(Impl.TRITON, q.device).attend(
            q, q_sink, *rings, *scales, length, segments, pairs, sink_rows, scale, need_lse
        )
    else:
        out, lse = attend_over_segments(
            chosen,
            q,
            q_sink,
            *rings,
            *scales,
            length,
            segments,
            host_bounds,
            sink_rows=sink_rows,
            scale=scale,
            need_lse=need_lse,
        )
    return out.contiguous(), q.new_empty(0, dtype=torch.float32) if lse is None else lse.contiguous()


@_shapes_of("attend")
def _(
    q: Tensor,
    q_sink: Tensor | None,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    length: Tensor | None,
    segments: Tensor | None,
    host_bounds: list[int],
    sink_rows: int,
    scale: float,
    need_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    lse_shape = (q.shape[0], q.shape[2], q.shape[1]) if need_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)
