"""A weight that was laid out for oneDNN gives the bits of the weight, and is read by eager code on a CPU alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import streamdiff_kernels as sk
from streamdiff_kernels import Impl, plain

pytestmark = pytest.mark.skipif(
    plain.onednn_missing(torch.float32) is not None, reason="this build of torch has no oneDNN"
)


class Quiet(TorchDispatchMode):
    """Watches, and changes nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def case(dtype: torch.dtype, rows: int, D: int, E: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + D + E)
    x_BLD, weight_ED, bias_E = (torch.randn(shape, generator=generator) for shape in ((1, rows, D), (E, D), (E,)))
    return x_BLD.to(dtype), (weight_ED / D**0.5).to(dtype), bias_E.to(dtype)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("sizes", [(48, 256, 768), (7, 40, 24), (192, 128, 352)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_products_have_the_same_bits(dtype: torch.dtype, sizes: tuple[int, int, int], gelu: bool) -> None:
    if plain.onednn_missing(dtype) is not None:
        pytest.skip(f"oneDNN does not compute in {dtype} here")
    x_BLD, weight_ED, bias_E = case(dtype, *sizes)
    with torch.inference_mode():
        packed_ED = sk.pack_linear(weight_ED, num_rows=sizes[0])
        assert packed_ED is not None
        for x in (x_BLD, x_BLD[:, : sizes[0] // 2 + 1], x_BLD.expand(3, -1, -1)):  # other numbers of rows as well
            found = sk.linear(x, weight_ED, bias_E, gelu=gelu, impl=Impl.TORCH, packed_ED=packed_ED)
            assert torch.equal(found, sk.linear(x, weight_ED, bias_E, gelu=gelu, impl=Impl.TORCH))


def test_only_eager_code_without_gradients_reads_it() -> None:
    x_BLD, weight_ED, bias_E = case(torch.float32, 8, 32, 16)
    with torch.inference_mode():
        other_ED = sk.pack_linear(2 * weight_ED, num_rows=8)

    def found(impl: Impl = Impl.TORCH) -> Tensor:
        return sk.linear(x_BLD, weight_ED, bias_E, impl=impl, packed_ED=other_ED)

    expected = sk.linear(x_BLD, weight_ED, bias_E, impl=Impl.TORCH)
    with torch.inference_mode():
        assert not torch.equal(found(), expected)
        assert torch.allclose(found(Impl.REFERENCE), expected, atol=1e-5)
        with Quiet():
            assert torch.equal(found(), expected)
    assert torch.equal(found(), expected)


@pytest.mark.parametrize("what", ["meta", "float64", "strided", "watched", "gradients"])
def test_what_it_would_not_help_is_not_packed(what: str) -> None:
    weight_ED = torch.ones(16, 32)
    match what:
        case "meta":
            weight_ED = weight_ED.to("meta")
        case "float64":
            weight_ED = weight_ED.double()
        case "strided":
            weight_ED = weight_ED.t()
        case _:
            pass
    with torch.inference_mode(what != "gradients"):
        if what == "watched":
            with torch.device("cpu"):
                assert sk.pack_linear(weight_ED, num_rows=8) is None
        else:
            assert sk.pack_linear(weight_ED, num_rows=8) is None
