"""Eight-bit linears let Hopper sum in 14 bits (``use_fast_accum``): no GPU is needed to know what that costs."""

import pytest
import torch
from torch import Tensor

from streamdiff_kernels import plain

FRACTION_BITS = 13
PRODUCTS_PER_INSTRUCTION = 32


def sums_of_14_bits(a8_MD: Tensor, b8_ND: Tensor) -> Tensor:
    """Products as Hopper's tensor cores sum them in eight bits: 32 at a time, each term and the running sum cut off 13
    bits below the largest of them (DeepSeek-V3, arXiv 2412.19437, 3.3.2).
    """
    a_MD, b_ND = a8_MD.double(), b8_ND.double()
    total_MN = torch.zeros(a_MD.shape[0], b_ND.shape[0], dtype=torch.float64)
    for first in range(0, a_MD.shape[1], PRODUCTS_PER_INSTRUCTION):
        inner = slice(first, first + PRODUCTS_PER_INSTRUCTION)
        terms = torch.cat([a_MD[:, None, inner] * b_ND[None, :, inner], total_MN[..., None]], dim=-1)
        largest = terms.abs().amax(-1, keepdim=True)
        step = torch.exp2(torch.floor(torch.log2(largest.clamp_min(1e-300))) - FRACTION_BITS)
        total_MN = (torch.trunc(terms / step) * step).sum(-1)
    return total_MN


@pytest.mark.parametrize("width", [5120, 13824])
@pytest.mark.parametrize("uneven", [False, True])
def test_fast_sums_lose_a_tenth_of_what_eight_bits_lose(width: int, uneven: bool) -> None:
    generator = torch.Generator().manual_seed(width)
    x_LD, weight_ED = (torch.randn(32, width, generator=generator) for _ in range(2))
    if uneven:  # some channels far louder than others, as in a real model
        x_LD *= torch.randn(width, generator=generator).exp()
    exact = x_LD.double() @ weight_ED.double().t()
    (x8, x_scale), (w8, w_scale) = plain.quantise_rows(x_LD), plain.quantise_rows(weight_ED)
    scale = (x_scale[:, None] * w_scale).double()
    rounded = x8.double() @ w8.double().t() * scale
    fast = sums_of_14_bits(x8, w8) * scale

    def error(y: Tensor, want: Tensor) -> float:
        return float(((y - want).square().mean() / exact.square().mean()).sqrt())

    assert 0 < error(fast, rounded) < 0.11 * error(rounded, exact)
    assert error(fast, exact) < 1.01 * error(rounded, exact)
