"""Matrix products, with bias and GELU, and in eight bits."""

from __future__ import annotations

import torch
from torch import Tensor

from streamdiff_kernels import plain, reference
from streamdiff_kernels.errors import BackendUnavailable, KernelInputError
from streamdiff_kernels.ops.door import (
    E4M3,
    Impl,
    is_watched,
    layout,
    op,
    require,
    shapes_of,
)


def linear(
    x_BLD: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor | None = None,
    *,
    gelu: bool = False,
    impl: Impl,
    packed_ED: Tensor | None = None,
) -> Tensor:
    """Linear layer, ``[B, L, D] -> [B, L, E]``, with GELU (tanh) on its way out if asked.

    The library's product on a GPU. On a CPU oneDNN's, which is twice as fast as torch's choice for float32 on
    AMD's processors and as exact. ``packed_ED``: the same weight as `pack_linear` lays it out, read where eager code
    runs on a CPU.
    """
    if packed_ED is not None and impl == Impl.TORCH and x_BLD.dtype == packed_ED.dtype and not is_watched(x_BLD):
        return plain.product(x_BLD, packed_ED, bias_E, gelu=gelu)
    if x_BLD.dim() != 3 or weight_ED.shape[-1] != x_BLD.shape[-1] or weight_ED.dim() != 2:
        raise KernelInputError(f"linear wants x [B, L, D] and weight [E, D], got {layout(x_BLD)}, {layout(weight_ED)}")
    if impl == Impl.TRITON and x_BLD.device.type == "cpu":
        require(impl, x_BLD.device)
    return _linear(x_BLD, weight_ED, bias_E, gelu, impl.value)


def pack_linear(weight_ED: Tensor, *, num_rows: int) -> Tensor | None:
    """A second copy of a weight for `linear` (``packed_ED``), for products of about ``num_rows`` rows: the same bits in
    less time. None where it would save nothing, or where somebody watches: such a tensor has no address to look at. A
    later change of the weight does not reach it.
    """
    watched = is_watched(weight_ED) or torch._C._len_torch_function_stack() > 0  # pyright: ignore[reportAttributeAccessIssue]
    return None if watched else plain.packed(weight_ED, num_rows)


@op("linear")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, impl: str) -> Tensor:
    if impl == Impl.REFERENCE:
        return reference.linear(x, weight, bias, gelu=gelu)
    return plain.linear(x, weight, bias, gelu=gelu)


@shapes_of("linear")
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
            f"linear_fp8 wants x [B, L, D], weight [E, D], float8_e4m3fn; got {layout(x8_BLD)}, {layout(weight8_ED)}"
        )
    if x_scale_BL.shape != x8_BLD.shape[:-1] or weight_scale_E.shape != (E,):
        raise KernelInputError(
            f"scales must be {list(x8_BLD.shape[:-1])} and [{E}], got {layout(x_scale_BL)}, {layout(weight_scale_E)}"
        )
    if impl == Impl.TRITON:
        raise BackendUnavailable("linear_fp8 has no Triton implementation: torch._scaled_mm serves it; use Impl.TORCH")
    return _linear_fp8(x8_BLD, x_scale_BL, weight8_ED, weight_scale_E, bias_E, out_dtype, impl.value)


@op("linear_fp8")
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


@shapes_of("linear_fp8")
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
