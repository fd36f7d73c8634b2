"""Nothing falls back quietly: what cannot run raises, and says what is wrong, why, and what to do."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import streamdiff_kernels as sk
from streamdiff_kernels import BackendUnavailable, Impl, KernelInputError, attention, backends, reference
from streamdiff_kernels.tolerance import TOLERANCES

ROOT = Path(__file__).parents[2]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def ring_and_query() -> tuple[Tensor, Tensor, Tensor]:
    return draw(1, 5, 2, 16), draw(12, 2, 16, seed=1), draw(12, 2, 16, seed=2)


@pytest.mark.parametrize("name", ["sdpa-flash", "sdpa-cudnn", "triton", "flash-attn", "fa3", "xformers"])
def test_a_cuda_backend_on_a_cpu(name: str) -> None:
    q, keys, values = ring_and_query()
    for use in (
        lambda: sk.attend(q, keys, values, 12, backend=name),
        lambda: sk.resolve_backend(name, q, keys, values),
    ):
        with pytest.raises(BackendUnavailable, match=rf"attention backend '{name}' cannot run: .+; .+"):
            use()
    assert issubclass(BackendUnavailable, RuntimeError)


def test_an_unknown_backend_is_answered_with_the_known() -> None:
    q, keys, values = ring_and_query()
    with pytest.raises(BackendUnavailable, match=r"'fa2' is unknown; choose one of reference, sdpa, "):
        sk.attend(q, keys, values, 12, backend="fa2")


def test_triton_kernels_on_a_cpu() -> None:
    with pytest.raises(BackendUnavailable, match=r"Impl\.TRITON cannot run: .*; use Impl\.TORCH"):
        sk.norm_modulate(draw(1, 4, 8), draw(1, 8), draw(1, 8), impl=Impl.TRITON)
    x8, scale = sk.quantise_rows(draw(1, 4, 16), impl=Impl.TORCH)
    with pytest.raises(BackendUnavailable, match="no Triton implementation"):
        sk.linear_fp8(x8, scale, x8[0], scale[0], impl=Impl.TRITON)


def test_auto_is_one_that_was_measured_here() -> None:
    q, keys, values = ring_and_query()
    reasons = sk.available_backends(device=q.device, dtype=q.dtype, head_dim=16)
    assert set(reasons) == set(sk.BACKENDS)
    ready = {name for name, why in reasons.items() if why is None}
    assert {"reference", "sdpa"} <= ready <= {"reference", "sdpa", "onednn"}
    times_ms = sk.measure_backends(q, keys, values, num_runs=3)
    assert set(times_ms) == ready - {"reference"}
    assert all(0 < time_ms < 1e3 for time_ms in times_ms.values())
    assert sk.resolve_backend("auto", q, keys, values) in times_ms


@pytest.mark.slow
@pytest.mark.processes
def test_without_triton_everything_but_triton_works() -> None:
    program = """
import sys
sys.modules["triton"] = None
import torch, streamdiff_kernels as sk
x = torch.randn(1, 4, 8)
sk.norm_modulate(x, x[0, :1], x[0, :1], impl=sk.Impl.REFERENCE)
sk.norm_modulate(x, x[0, :1], x[0, :1], impl=sk.Impl.TORCH)
try:
    sk.norm_modulate(x, x[0, :1], x[0, :1], impl=sk.Impl.TRITON)
except sk.BackendUnavailable as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT / "kernels",
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "triton does not import" in result.stdout
    assert "pip install 'streamdiff[triton]'" in result.stdout


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda q, k, v: sk.attend(q, k, v, backend="sdpa"), "either length or segments"),
        (lambda q, k, v: sk.attend(q, k, v, 0, backend="sdpa"), "attention over no rows"),
        (lambda q, k, v: sk.attend(q, k, v, 13, backend="sdpa"), "reach row 13 of a ring of 12"),
        (lambda q, k, v: sk.attend(q, k[:, :1], v[:, :1], 12, backend="sdpa"), "contiguous"),
        (lambda q, k, v: sk.attend(q, k, v[:5], 5, backend="sdpa"), "keys and values must be alike"),
        (lambda q, k, v: sk.attend(q, k.half(), v.half(), 5, backend="sdpa"), "must be of one type"),
        (
            lambda q, k, v: sk.attend(q, k, v, torch.tensor(5), backend="sdpa"),
            "length must be one int32 on cpu",
        ),
        (
            lambda q, k, v: sk.norm_modulate(q.flatten(2), k[:3].flatten(1), v[:3].flatten(1), impl=Impl.TORCH),
            r"\[T, 32\] or \[B, T, 32\] with T dividing the 5 tokens",
        ),
        *(
            (
                lambda q, k, v, op=op: op(
                    q.flatten(2),
                    q.flatten(2),
                    k[:5].flatten(1),
                    k[:1].flatten(1),
                    v[:1].flatten(1),
                    impl=Impl.TORCH,
                ),
                r"modulations must agree on T, got float32\[5, 32\] and float32\[1, 32\]",
            )
            for op in (sk.gate_residual_norm_modulate_, sk.gate_residual_norm_modulate_fp8_)
        ),
        (
            lambda q, k, v: sk.rotate(q, q[0, :, 0, :4], q[0, :, 0, :4], impl=Impl.TORCH),
            "one angle per token and pair",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(wrong: Any, message: str) -> None:
    with pytest.raises(KernelInputError, match=message):
        wrong(*ring_and_query())


def test_foreign_libraries_are_called_as_they_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the signatures of the libraries, computing by the reference: what we pass them is what
    they take.
    """
    q, keys, values = ring_and_query()
    keys[9:], values[9:] = torch.nan, torch.nan

    def dense(q: Tensor, k: Tensor, v: Tensor, count: int, scale: float | None) -> tuple[Tensor, Tensor]:
        return reference.attend(q, k, v, [(0, count)], scale=scale)

    def flash_attn_with_kvcache(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        cache_seqlens: Tensor | None = None,
        softmax_scale: float | None = None,
        return_softmax_lse: bool = False,
    ) -> Any:
        assert cache_seqlens is None or (cache_seqlens.shape == q.shape[:1] and cache_seqlens.dtype == torch.int32)
        count = k_cache.shape[1] if cache_seqlens is None else int(cache_seqlens[0])
        out, lse = dense(q, k_cache, v_cache, count, softmax_scale)
        return (out, lse) if return_softmax_lse else out

    def memory_efficient_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        return dense(query, key, value, key.shape[1], scale)[0]

    def memory_efficient_attention_forward_requires_grad(
        query: Tensor, key: Tensor, value: Tensor, *, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = dense(query, key, value, key.shape[1], scale)
        return out, torch.nn.functional.pad(lse, (0, 3), value=torch.inf)  # xformers pads the queries

    kvcache = types.SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache)
    efficient = types.SimpleNamespace(
        memory_efficient_attention=memory_efficient_attention,
        memory_efficient_attention_forward_requires_grad=memory_efficient_attention_forward_requires_grad,
    )
    for name, module in (
        ("flash_attn", kvcache),
        ("flash_attn_interface", kvcache),
        ("xformers", types.SimpleNamespace(ops=efficient)),
        ("xformers.ops", efficient),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(backends, "_needs_cuda_half", lambda device, dtype, head_dim: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    q_sink = draw(1, 5, 2, 16, seed=5)
    for second in (None, q_sink):
        want, want_lse = reference.attend(
            q.double(),
            keys[None].double(),
            values[None].double(),
            [(0, 9)],
            q_sink_BLNK=None if second is None else second.double(),
            sink_rows=4,
        )
        for name in ("flash-attn", "fa3", "xformers"):
            backend = backends.backend_named(name, device=q.device, dtype=q.dtype, head_dim=16)
            assert backend.missing(q.device, q.dtype, 16) is None
            got, lse = attention.attend_over_segments(
                backend, q, second, keys[None], values[None], None, None, None, None, [0, 9],
                sink_rows=4, scale=0.25, need_lse=True,
            )  # fmt: skip
            TOLERANCES["attend_float32"].check(got, want)
            assert lse is not None
            TOLERANCES["lse"].check(lse, want_lse)
            if backend.counts_on_device:
                calls = attention._calls_with_device_length(
                    q, second, keys[None], values[None], torch.tensor(9, dtype=torch.int32), 4, 0.25, True
                )
                assert backend.dense is not None
                answers = [backend.dense(call) for call in calls]
                out, lse = answers[0]
                for more, more_lse in answers[1:]:
                    assert lse is not None
                    assert more_lse is not None
                    out, lse = reference.merge_attention(out, lse, more, more_lse)
                TOLERANCES["attend_float32"].check(out, want)
