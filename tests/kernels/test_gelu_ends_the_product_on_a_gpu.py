"""The feed-forward's GELU is no pass of its own on CUDA in sixteen bits, where the library's product can end in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import streamdiff_kernels as sk
from streamdiff_kernels import Impl, plain, reference
from streamdiff_kernels.tolerance import TOLERANCES


class Called(TorchDispatchMode):
    """Names of the operations that run, and their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((str(func), dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def calls(dtype: torch.dtype, *, gelu: bool, bias: bool = True) -> dict[str, dict[str, Any]]:
    with FakeTensorMode(), torch.device("cuda:0"):
        x, weight = torch.empty(1, 6, 8, dtype=dtype), torch.empty(16, 8, dtype=dtype)
        with Called() as called:
            y = plain.linear(x, weight, torch.empty(16, dtype=dtype) if bias else None, gelu=gelu)
    assert y.shape == (1, 6, 16)
    return dict(called.calls)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_call_does_both(dtype: torch.dtype) -> None:
    found = calls(dtype, gelu=True)
    assert found["aten._addmm_activation.default"] == {"use_gelu": True}
    assert "aten.gelu.default" not in found
    assert "aten._addmm_activation.default" not in calls(dtype, gelu=False)


@pytest.mark.parametrize(("dtype", "bias"), [(torch.float32, True), (torch.bfloat16, False)])
def test_what_it_cannot_do_stays_a_pass(dtype: torch.dtype, bias: bool) -> None:
    found = calls(dtype, gelu=True, bias=bias)
    assert found["aten.gelu.default"] == {"approximate": "tanh"}
    assert "aten._addmm_activation.default" not in found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_is_the_tanh_approximation(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=generator).to(dtype) for s in ((1, 33, 64), (48, 64), (48,)))
    weight = weight / 8
    want = reference.linear(x.double(), weight.double(), bias.double(), gelu=True)
    got = sk.linear(x.cuda(0), weight.cuda(0), bias.cuda(0), gelu=True, impl=Impl.TORCH)
    TOLERANCES["linear"].check(got.cpu(), want)
