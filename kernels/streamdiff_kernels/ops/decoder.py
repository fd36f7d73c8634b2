"""Norm over channels and activation of a video decoder."""

from __future__ import annotations

import torch
from torch import Tensor

from streamdiff_kernels import reference
from streamdiff_kernels.errors import KernelInputError
from streamdiff_kernels.ops.door import (
    Impl,
    fast,
    layout,
    op,
    shapes_of,
)


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
            f"rms_norm_silu wants x [B, C, ...] and weight of C, got {layout(x_BCTHW)}, {layout(weight_C)}"
        )
    last = torch.channels_last if x_BCTHW.dim() == 4 else torch.channels_last_3d
    if not (x_BCTHW.is_contiguous() or x_BCTHW.is_contiguous(memory_format=last)):
        raise KernelInputError("rms_norm_silu wants a contiguous or a channels-last picture; call .contiguous() first")
    return _rms_norm_silu(x_BCTHW, weight_C, bias_C, eps, impl.value)


@op("rms_norm_silu")
def _rms_norm_silu(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, impl: str) -> Tensor:
    weight, bias = weight.reshape(-1), None if bias is None else bias.reshape(-1)
    if impl == Impl.REFERENCE:
        out = torch.empty_like(x)
        return out.copy_(reference.rms_norm_silu(x, weight, bias, eps))
    return fast(impl, x.device).rms_norm_silu(x, weight, bias, eps)


@shapes_of("rms_norm_silu")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, impl: str) -> Tensor:
    return torch.empty_like(x)
