"""Ops on whole rows of the residual stream: norms, modulation, gates, and quantisation to eight bits."""

from __future__ import annotations

import torch
from torch import Tensor

from streamdiff_kernels import plain, reference
from streamdiff_kernels.errors import KernelInputError
from streamdiff_kernels.ops.door import (
    E4M3,
    Impl,
    batched,
    batched_or_none,
    fast,
    layout,
    op,
    shapes_of,
)


def rms_norm(x_BLD: Tensor, weight_D: Tensor, *, eps: float = 1e-6, impl: Impl) -> Tensor:
    """Root-mean-square norm over the full width, computed in float32; ``[B, L, D] -> [B, L, D]`` in the type
    of x.

    For cross-attention, whose keys have no position. Wan norms all heads together (weight ``[D]``).
    """
    if x_BLD.dim() != 3 or weight_D.shape != x_BLD.shape[-1:] or x_BLD.stride(-1) != 1:
        raise KernelInputError(f"rms_norm wants x [B, L, D] and weight [D], got {layout(x_BLD)}, {layout(weight_D)}")
    return _rms_norm(x_BLD, weight_D, eps, impl.value)


@op("rms_norm")
def _rms_norm(x: Tensor, weight: Tensor, eps: float, impl: str) -> Tensor:
    if impl == Impl.REFERENCE:
        return reference.rms_norm(x, weight, eps)
    return fast(impl, x.device).rms_norm(x, weight, eps)


@shapes_of("rms_norm")
def _(x: Tensor, weight: Tensor, eps: float, impl: str) -> Tensor:
    return x.new_empty(x.shape)


def _check_modulation(x: Tensor, *mods: Tensor | None) -> None:
    if x.dim() != 3 or not x.is_contiguous():
        raise KernelInputError(f"the residual stream must be a contiguous [B, L, D], got {layout(x)}")
    B, L, D = x.shape
    first = next((mod for mod in mods if mod is not None), None)
    for mod in mods:
        if mod is None:
            continue
        if mod.dim() not in (2, 3) or mod.shape[-1] != D or mod.stride(-1) != 1 or L % mod.shape[-2] != 0:
            raise KernelInputError(
                f"a modulation is [T, {D}] or [B, T, {D}] with T dividing the {L} tokens, got {layout(mod)}"
            )
        if mod.dim() == 3 and mod.shape[0] not in (1, B):
            raise KernelInputError(f"a modulation for {mod.shape[0]} streams cannot serve {B}; give [T, D] to share it")
        if first is not None and mod.shape[-2] != first.shape[-2]:
            raise KernelInputError(f"modulations must agree on T, got {layout(first)} and {layout(mod)}")


def norm_modulate(
    x_BLD: Tensor,
    scale_BTD: Tensor,
    shift_BTD: Tensor,
    *,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    impl: Impl,
) -> Tensor:
    """Layer norm without affine, then adaptive scale and shift per latent frame: ``norm(x) * (1 + scale) +
    shift``.

    Modulations are ``[T, D]`` or ``[B, T, D]``, T dividing L: frame t holds tokens ``t * L/T .. (t + 1) *
    L/T``. They may be slices of a ``[T, 6, D]`` table, and float32 whatever x is. An affine layer norm is the
    case T = 1 with ``scale = weight - 1``, ``shift = bias``. Returns ``[B, L, D]`` in ``out_dtype``, by default
    the type of x.
    """
    _check_modulation(x_BLD, scale_BTD, shift_BTD)
    return _norm_modulate(x_BLD, scale_BTD, shift_BTD, eps, out_dtype or x_BLD.dtype, impl.value)


@op("norm_modulate")
def _norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float, out_dtype: torch.dtype, impl: str) -> Tensor:
    if impl == Impl.REFERENCE:
        return reference.norm_modulate(x, scale, shift, eps, out_dtype)
    return fast(impl, x.device).norm_modulate(x, batched(scale, 3), batched(shift, 3), eps, out_dtype)


@shapes_of("norm_modulate")
def _(x: Tensor, scale: Tensor, shift: Tensor, eps: float, out_dtype: torch.dtype, impl: str) -> Tensor:
    return x.new_empty(x.shape, dtype=out_dtype)


def gate_residual_(x_BLD: Tensor, y_BLD: Tensor, gate_BTD: Tensor | None, *, impl: Impl) -> Tensor:
    """Add a branch to the residual stream in place, ``x += gate * y`` (``x += y`` without a gate); returns x.

    The product is formed in float32 and rounded once, into the type of x, which may be wider than that of y.
    """
    _check_modulation(x_BLD, gate_BTD)
    _check_branch(x_BLD, y_BLD)
    _gate_residual(x_BLD, y_BLD, gate_BTD, impl.value)
    return x_BLD


def _check_branch(x: Tensor, y: Tensor) -> None:
    if y.shape != x.shape or not y.is_contiguous():
        raise KernelInputError(f"a branch must be contiguous and shaped as its stream {layout(x)}, got {layout(y)}")


@op("gate_residual_", mutates=("x",))
def _gate_residual(x: Tensor, y: Tensor, gate: Tensor | None, impl: str) -> None:
    if impl == Impl.REFERENCE:
        x.copy_(reference.gate_residual(x, y, gate))
    else:
        fast(impl, x.device).gate_residual_(x, y, batched_or_none(gate, 3))


@shapes_of("gate_residual_")
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
    out_dtype: torch.dtype | None = None,
    impl: Impl,
) -> Tensor:
    """Close one branch and open the next: ``x += gate * y`` in place, then `norm_modulate` of x, which is
    returned in ``out_dtype``, by default the type of y.

    A stream in float32 beside branches in 16 bits is never rounded.
    """
    _check_modulation(x_BLD, gate_BTD, scale_BTD, shift_BTD)
    _check_branch(x_BLD, y_BLD)
    return _gate_residual_norm_modulate(
        x_BLD, y_BLD, gate_BTD, scale_BTD, shift_BTD, eps, out_dtype or y_BLD.dtype, impl.value
    )


@op("gate_residual_norm_modulate_", mutates=("x",))
def _gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    impl: str,
) -> Tensor:
    if impl == Impl.REFERENCE:
        stream, out = reference.gate_residual_norm_modulate(x, y, gate, scale, shift, eps, out_dtype)
        x.copy_(stream)
        return out
    gate, scale, shift = batched_or_none(gate, 3), batched(scale, 3), batched(shift, 3)
    if impl == Impl.TORCH:
        plain.gate_residual_(x, y, gate)
        return plain.norm_modulate(x, scale, shift, eps, out_dtype)
    return fast(impl, x.device).gate_residual_norm_modulate_(x, y, gate, scale, shift, eps, out_dtype)


@shapes_of("gate_residual_norm_modulate_")
def _(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    impl: str,
) -> Tensor:
    return x.new_empty(x.shape, dtype=out_dtype)


def quantise_rows(x: Tensor, *, impl: Impl) -> tuple[Tensor, Tensor]:
    """e4m3 with one scale per row: ``[..., D] -> float8_e4m3fn [..., D], float32 [...]``, ``x ~ x8 * scale``.

    For weights once, and for activations that no fused op prepares. A row of zeros has scale 0.
    """
    if x.dim() < 2 or not x.is_contiguous():
        raise KernelInputError(f"quantise_rows wants a contiguous [..., D], got {layout(x)}")
    return _quantise_rows(x, impl.value)


@op("quantise_rows")
def _quantise_rows(x: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    if impl == Impl.REFERENCE:
        return reference.quantise_rows(x)
    return fast(impl, x.device).quantise_rows(x)


@shapes_of("quantise_rows")
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


@op("norm_modulate_fp8")
def _norm_modulate_fp8(x: Tensor, scale: Tensor, shift: Tensor, eps: float, impl: str) -> tuple[Tensor, Tensor]:
    if impl == Impl.REFERENCE:
        return reference.quantise_rows(reference.norm_modulate(reference.wide(x), scale, shift, eps))
    return fast(impl, x.device).norm_modulate_fp8(x, batched(scale, 3), batched(shift, 3), eps)


@shapes_of("norm_modulate_fp8")
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


@op("gate_residual_norm_modulate_fp8_", mutates=("x",))
def _gate_residual_norm_modulate_fp8(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float, impl: str
) -> tuple[Tensor, Tensor]:
    if impl == Impl.REFERENCE:
        x.copy_(reference.gate_residual(x, y, gate))
        return reference.quantise_rows(reference.norm_modulate(reference.wide(x), scale, shift, eps))
    gate, scale, shift = batched_or_none(gate, 3), batched(scale, 3), batched(shift, 3)
    if impl == Impl.TORCH:
        plain.gate_residual_(x, y, gate)
        return plain.norm_modulate_fp8(x, scale, shift, eps)
    return fast(impl, x.device).gate_residual_norm_modulate_fp8_(x, y, gate, scale, shift, eps)


@shapes_of("gate_residual_norm_modulate_fp8_")
def _(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float, impl: str
) -> tuple[Tensor, Tensor]:
    return _fake_eight_bits(x)


def gelu_fp8(x_BLF: Tensor, *, impl: Impl) -> tuple[Tensor, Tensor]:
    """GELU (tanh) of the hidden layer for an eight-bit linear: float8_e4m3fn ``[B, L, F]`` and row scales
    ``[B, L]``.
    """
    if x_BLF.dim() != 3 or not x_BLF.is_contiguous():
        raise KernelInputError(f"gelu_fp8 wants a contiguous [B, L, F], got {layout(x_BLF)}")
    return _gelu_fp8(x_BLF, impl.value)


@op("gelu_fp8")
def _gelu_fp8(x: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    if impl == Impl.REFERENCE:
        return reference.quantise_rows(reference.gelu_tanh(reference.wide(x)))
    return fast(impl, x.device).gelu_fp8(x)


@shapes_of("gelu_fp8")
def _(x: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return _fake_eight_bits(x)
