"""Every op is a well-formed torch operator: schema, declared mutations, shapes without data, compiled equals
eager.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import streamdiff_kernels as sk
from streamdiff_kernels.ops import attention, decoder, products, rotary, rows

B, T, L, N, K, G = 1, 2, 6, 2, 8, 3
D, M = N * K, G + 3 * L
E4M3 = torch.float8_e4m3fn


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def slot() -> Tensor:
    return torch.tensor(1, dtype=torch.int32)


def eight(*shape: int) -> tuple[Tensor, Tensor]:
    return sk.quantise_rows(draw(*shape), impl=sk.Impl.TORCH)


def write_args(impl: str) -> tuple[Any, ...]:
    tables = draw(L, K // 2), draw(L, K // 2)
    rings = draw(M, N, K), draw(B, M, N, K)[0]
    return (
        *(draw(B, L, D) for _ in range(3)),
        draw(D),
        draw(D),
        *tables,
        *tables,
        *rings,
        None,
        None,
        slot(),
        G,
        1e-6,
        impl,
    )


def attend_args(backend: str) -> tuple[Any, ...]:
    length = torch.tensor(M - L, dtype=torch.int32)
    return (
        draw(B, L, N, K),
        draw(B, L, N, K),
        draw(M, N, K),
        draw(M, N, K),
        None,
        None,
        length,
        None,
        [],
        G,
        0.3,
        True,
        backend,
    )


CASES: dict[str, Callable[[str], tuple[Any, ...]]] = {
    "rms_norm": lambda impl: (draw(B, L, D), draw(D), 1e-6, impl),
    "rotate": lambda impl: (draw(B, L, N, K), draw(L, K // 2), draw(L, K // 2), impl),
    "qk_norm_rope_write": write_args,
    "rotate_sink": lambda impl: (
        draw(G, N, K),
        draw(G, K // 2),
        draw(G, K // 2),
        draw(M, N, K),
        None,
        1,
        impl,
    ),
    "norm_modulate": lambda impl: (draw(B, L, D), draw(T, D), draw(B, T, D), 1e-6, torch.bfloat16, impl),
    "gate_residual": lambda impl: (draw(B, L, D), draw(B, L, D), draw(T, D), impl),
    "gate_residual_norm_modulate": lambda impl: (
        draw(B, L, D),
        draw(B, L, D).bfloat16(),
        draw(T, D),
        draw(T, D),
        draw(T, D),
        1e-6,
        torch.bfloat16,
        impl,
    ),
    "rms_norm_silu": lambda impl: (draw(B, 4, 3, 5, 2), draw(4), None, 1e-12, impl),
    "quantise_rows": lambda impl: (draw(L, D), impl),
    "norm_modulate_fp8": lambda impl: (draw(B, L, D), draw(T, D), draw(T, D), 1e-6, impl),
    "gate_residual_norm_modulate_fp8": lambda impl: (
        draw(B, L, D),
        draw(B, L, D),
        None,
        draw(T, D),
        draw(T, D),
        1e-6,
        impl,
    ),
    "gelu_fp8": lambda impl: (draw(B, L, D), impl),
    "linear": lambda impl: (draw(B, L, D), draw(5, D), draw(5), True, impl),
    "linear_fp8": lambda impl: (*eight(B, L, D), *eight(32, D), draw(32), torch.float32, impl),
    "attend": lambda impl: attend_args({"torch": "sdpa"}.get(impl, impl)),
}


OPS = {
    name.removeprefix("_"): value.registered
    for module in (attention, decoder, products, rotary, rows)
    for name, value in vars(module).items()
    if hasattr(value, "registered")
}


@pytest.mark.heavy
@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("name", CASES)
def test_opcheck_finds_nothing(name: str, impl: str) -> None:
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if name == "linear_fp8":
        # It compares inputs before and after with an allclose that torch has not written for float8.
        checks.remove("test_schema")
    results = torch.library.opcheck(OPS[name], CASES[name](impl), test_utils=checks)
    assert set(results.values()) == {"SUCCESS"}


def test_every_op_of_the_door_is_checked() -> None:
    assert set(OPS) == set(CASES)


def test_eager_code_on_a_cpu_goes_without_the_dispatcher_and_gets_the_same_bits() -> None:
    """Only where nobody watches: a mode, autograd and a tensor without data see one op."""
    x_BLD, weight_D = torch.randn(1, 4, 8), torch.randn(8)
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad():
        direct = rows.rms_norm(x_BLD, weight_D, impl=sk.Impl.TORCH)
        with profile(activities=[ProfilerActivity.CPU]) as watched:
            rows.rms_norm(x_BLD, weight_D, impl=sk.Impl.TORCH)
        with Watch():
            dispatched = rows.rms_norm(x_BLD, weight_D, impl=sk.Impl.TORCH)
        with FakeTensorMode() as mode:
            empty = rows.rms_norm(mode.from_tensor(x_BLD), mode.from_tensor(weight_D), impl=sk.Impl.TORCH)
    assert torch.equal(direct, dispatched)
    assert type(empty) is not torch.Tensor
    assert seen == ["streamdiff_kernels.rms_norm.default"]
    assert not [event for event in watched.key_averages() if event.key.startswith("streamdiff_kernels")]
