"""Impl.TRITON for the ops on whole rows, at odd sizes, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import streamdiff_kernels as sk
from streamdiff_kernels import Impl, reference
from streamdiff_kernels.tolerance import TOLERANCES, check_eight_bits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = [torch.float32, torch.float16, torch.bfloat16]
TRITON = Impl.TRITON
# NumPy speaks up where a GPU goes to infinity, as GELU's exponential is meant to.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


@pytest.mark.parametrize(("B", "L", "T", "D"), [(1, 3, 1, 16), (2, 6, 3, 37), (1, 2, 2, 5120)])
@pytest.mark.parametrize("dtype", TYPES)
def test_norms_gates_and_modulations(B: int, L: int, T: int, D: int, dtype: torch.dtype) -> None:
    x, y = draw(B, L, D, dtype=dtype) + 3, draw(B, L, D, dtype=dtype, seed=9)
    for shape in ((T, D), (B, T, D)):
        modulations = draw(*shape[:-1], 6, D, seed=7)
        shift, scale, gate = (modulations[..., i, :] for i in range(3))
        assert T == 1 or not scale.is_contiguous()
        want = reference.norm_modulate(x.double(), scale, shift, 1e-6)
        TOLERANCES["norm_modulate"].check(sk.norm_modulate(x, scale, shift, impl=TRITON), want)
        for a_gate in (gate, None):
            stream = x.clone()
            sk.gate_residual_(stream, y, a_gate, impl=TRITON)
            TOLERANCES["gate_residual_"].check(stream, reference.gate_residual(x.double(), y.double(), a_gate))
            fused = x.clone()
            out = sk.gate_residual_norm_modulate_(fused, y, a_gate, scale, shift, impl=TRITON)
            assert torch.equal(fused, stream)
            want = reference.norm_modulate(stream.double(), scale, shift, 1e-6)
            TOLERANCES["gate_residual_norm_modulate_"].check(out, want)


@pytest.mark.parametrize("dtype", TYPES[1:])
def test_a_stream_may_be_wider_than_its_branches(dtype: torch.dtype) -> None:
    """In float32 it is not rounded, and what leaves the norm is rounded once."""
    x, y = draw(2, 6, 37) + 3, draw(2, 6, 37, dtype=dtype, seed=9)
    shift, scale, gate = draw(3, 6, 37, seed=7).unbind(1)[:3]
    stream = x.clone()
    out = sk.gate_residual_norm_modulate_(stream, y, gate, scale, shift, impl=TRITON)
    exact = reference.gate_residual(x.double(), y.double(), gate)
    assert stream.dtype == torch.float32
    TOLERANCES["gate_residual_"].check(stream, exact)
    assert out.dtype == dtype
    want = reference.norm_modulate(exact, scale, shift, 1e-6)
    TOLERANCES["gate_residual_norm_modulate_"].check(out, want)
    assert torch.equal(sk.norm_modulate(stream, scale, shift, out_dtype=dtype, impl=TRITON), out)
    check_eight_bits(*sk.gate_residual_norm_modulate_fp8_(x.clone(), y, gate, scale, shift, impl=TRITON), want)


def test_a_program_may_serve_several_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from streamdiff_kernels.triton import rows

    x, y = draw(2, 6, 20), draw(2, 6, 20, seed=9)  # three tokens a frame: the last program of each is not full
    shift, scale, gate = draw(2, 6, 20, seed=7).unbind(1)[:3]
    results = []
    for count in (1, 2, 4):
        monkeypatch.setattr(rows, "ROWS_PER_PROGRAM", count)
        stream = x.clone()
        out = sk.gate_residual_norm_modulate_(stream, y, gate, scale, shift, impl=TRITON)
        x8, row_scale = sk.norm_modulate_fp8(x, scale, shift, impl=TRITON)
        results.append((stream, out, x8.float(), row_scale))
    for several in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], several, strict=True))


def test_an_affine_norm_is_a_modulation_of_one_frame() -> None:
    x, weight, bias = draw(1, 5, 24), draw(24, seed=1), draw(24, seed=2)
    got = sk.norm_modulate(x, (weight - 1)[None], bias[None], impl=TRITON)
    want = torch.nn.functional.layer_norm(x.double(), (24,), weight.double(), bias.double(), 1e-6)
    TOLERANCES["norm_modulate"].check(got, want)


@pytest.mark.parametrize("dtype", TYPES)
def test_eight_bits(dtype: torch.dtype) -> None:
    B, L, T, D = 2, 4, 2, 70
    x, y = draw(B, L, D, dtype=dtype), draw(B, L, D, dtype=dtype, seed=9)
    x[0, 3] = 0
    shift, scale, gate = draw(T, 6, D).unbind(1)[:3]
    check_eight_bits(*sk.quantise_rows(x, impl=TRITON), x.double())
    check_eight_bits(*sk.gelu_fp8(x, impl=TRITON), reference.gelu_tanh(x.double()))
    want = reference.norm_modulate(x.double(), scale, shift, 1e-6)
    check_eight_bits(*sk.norm_modulate_fp8(x, scale, shift, impl=TRITON), want)
    stream = x.clone()
    eight = sk.gate_residual_norm_modulate_fp8_(stream, y, gate, scale, shift, impl=TRITON)
    TOLERANCES["gate_residual_"].check(stream, reference.gate_residual(x.double(), y.double(), gate))
    check_eight_bits(*eight, reference.norm_modulate(stream.double(), scale, shift, 1e-6))


def test_the_largest_entry_never_rounds_beyond_448() -> None:
    x = draw(64, 33) * torch.logspace(-20, 20, 64, device=DEVICE)[:, None]
    x8, scale = sk.quantise_rows(x, impl=TRITON)
    assert torch.all(x8.float().abs().amax(-1) == reference.E4M3_MAX)
    check_eight_bits(x8, scale, x.double())


def test_gelu_holds_far_from_zero() -> None:
    x = torch.linspace(-40, 40, 161, device=DEVICE).view(1, 1, -1)
    check_eight_bits(*sk.gelu_fp8(x, impl=TRITON), reference.gelu_tanh(x.double()))


@pytest.mark.parametrize("dtype", TYPES)
def test_rms_norm_reads_slices_of_a_projection(dtype: torch.dtype) -> None:
    q, k = draw(2, 5, 2 * 39, dtype=dtype).split(39, dim=-1)
    weight = draw(39)
    for x in (q, k):
        want = reference.rms_norm(x.double(), weight, 1e-6)
        TOLERANCES["rms_norm"].check(sk.rms_norm(x, weight, impl=TRITON), want)


@pytest.mark.parametrize("axes", [4, 5])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_the_norm_of_the_decoder(dtype: torch.dtype, channels_last: bool, axes: int) -> None:
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}[axes]
    x = draw(2, 12, *(3, 5, 7)[5 - axes :], dtype=dtype)
    x[0, :, 1, 2] = 0
    if channels_last:
        x = x.contiguous(memory_format=layout)
    weight, bias = draw(12), draw(12, seed=3)
    for a_bias in (None, bias):
        got = sk.rms_norm_silu(x, weight, a_bias, impl=TRITON)
        assert got.stride() == x.stride()
        TOLERANCES["rms_norm_silu"].check(got, reference.rms_norm_silu(x.double(), weight, a_bias, 1e-12))


@pytest.mark.skipif(DEVICE == "cuda", reason="about the interpreter")
def test_the_interpreter_still_computes_bfloat16_wrongly() -> None:
    """The reason why every kernel widens its loads. When this fails, the interpreter has been mended."""
    import triton
    import triton.language as tl

    @triton.jit
    def add(x_ptr, out_ptr):
        at = tl.arange(0, 16)
        tl.store(out_ptr + at, tl.load(x_ptr + at) + tl.load(x_ptr + at))

    x = torch.ones(16, dtype=torch.bfloat16)
    out = torch.zeros_like(x)
    add[(1,)](x, out)
    assert not torch.equal(out, x + x)
    assert math.isfinite(float((x + x).sum()))
