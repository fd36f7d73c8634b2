"""Impl.TORCH against float64, at odd sizes, for each type."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import streamdiff_kernels as sk
from streamdiff_kernels import Impl, reference
from streamdiff_kernels.tolerance import TOLERANCES, check_eight_bits, check_eight_bits_of_heads

TYPES = [torch.float32, torch.bfloat16]
B, T, N, K, L = 2, 3, 3, 10, 21
D = N * K


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def tables(num_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    angle = 50 * torch.randn(num_tokens, K // 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return angle.cos().float(), angle.sin().float()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("impl", [Impl.REFERENCE, Impl.TORCH])
def test_rms_norm_and_rotation(impl: Impl, dtype: torch.dtype) -> None:
    x, weight, (cos, sin) = draw(B, L, D, dtype=dtype), draw(D), tables(L)
    want = reference.rms_norm(x.double(), weight, 1e-6)
    TOLERANCES["rms_norm"].check(sk.rms_norm(x, weight, impl=impl), want)
    heads = x.unflatten(-1, (N, K))
    TOLERANCES["rotate"].check(sk.rotate(heads, cos, sin, impl=impl), reference.rotate(heads.double(), cos, sin))


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("two_turns", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("impl", [Impl.REFERENCE, Impl.TORCH])
def test_a_chunk_is_written_into_its_slot_alone(
    impl: Impl, dtype: torch.dtype, two_turns: bool, eight_bits: bool
) -> None:
    q, k, v = draw(B, L, 3 * D, dtype=dtype).split(D, dim=-1)
    wq, wk = draw(D, seed=1), draw(D, seed=2)
    (cos, sin), (cos_sink, sin_sink) = tables(L), tables(L, seed=1)
    sink, slots, slot = 5, 3, 1
    ring_type = torch.float8_e4m3fn if eight_bits else dtype
    keys, values = (draw(B, sink + slots * L, N, K, seed=s).to(ring_type) for s in (3, 4))
    # Small enough for the largest values to be cut off.
    scales = [draw(B, N, seed=s).abs() / 256 + 1e-3 if eight_bits else None for s in (5, 6)]
    before = [x.clone() for x in (keys, values)]
    got, got_sink = sk.qk_norm_rope_write(
        q,
        k,
        v,
        q_weight_D=wq,
        k_weight_D=wk,
        cos_LR=cos,
        sin_LR=sin,
        cos_sink_LR=cos_sink if two_turns else None,
        sin_sink_LR=sin_sink if two_turns else None,
        keys_BMNK=keys,
        values_BMNK=values,
        key_scale_BN=scales[0],
        value_scale_BN=scales[1],
        slot=torch.tensor(slot, dtype=torch.int32),
        ring_start=sink,
        impl=impl,
    )
    want_q, want_k = reference.qk_norm_rope(q.double(), k.double(), wq, wk, cos, sin, 1e-6)
    bound = TOLERANCES["qk_norm_rope_write"]
    bound.check(got, want_q)
    if two_turns:
        assert got_sink is not None
        bound.check(got_sink, reference.qk_norm_rope(q.double(), k.double(), wq, wk, cos_sink, sin_sink, 1e-6)[0])
    else:
        assert got_sink is None
    rows = slice(sink + slot * L, sink + (slot + 1) * L)
    want_v = v.unflatten(-1, (N, K)).double()
    if eight_bits:
        assert scales[0] is not None
        assert scales[1] is not None
        check_eight_bits_of_heads(keys[:, rows], scales[0], want_k)
        check_eight_bits_of_heads(values[:, rows], scales[1], want_v)
        assert (want_v.abs() > 448 * scales[1][:, None, :, None]).any()
    else:
        bound.check(keys[:, rows], want_k)
        assert torch.equal(values[:, rows].double(), want_v)
    for now, then in zip((keys, values), before, strict=True):
        untouched = torch.ones(now.shape[1], dtype=torch.bool)
        untouched[rows] = False
        assert torch.equal(now.float()[:, untouched], then.float()[:, untouched])


@pytest.mark.parametrize("impl", [Impl.REFERENCE, Impl.TORCH])
def test_a_slot_outside_the_ring_is_refused(impl: Impl) -> None:
    (cos, sin), ring = tables(L), torch.zeros(2 * L, N, K)
    for slot in (-1, 2):
        with pytest.raises(IndexError, match="lies outside a ring"):
            sk.qk_norm_rope_write(
                *(draw(1, L, D) for _ in range(3)),
                q_weight_D=draw(D),
                k_weight_D=draw(D),
                cos_LR=cos,
                sin_LR=sin,
                keys_BMNK=ring,
                values_BMNK=ring.clone(),
                slot=torch.tensor(slot, dtype=torch.int32),
                impl=impl,
            )


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("impl", [Impl.REFERENCE, Impl.TORCH])
def test_the_sink_is_rotated_into_its_rows_alone(impl: Impl, dtype: torch.dtype) -> None:
    G, first = 7, 2
    pristine, keys, (cos, sin) = draw(B, G, N, K, dtype=dtype), draw(B, 20, N, K, dtype=dtype), tables(G)
    before = keys.clone()
    sk.rotate_sink_(pristine, cos, sin, keys, first_row=first, impl=impl)
    TOLERANCES["rotate_sink_"].check(keys[:, first : first + G], reference.rotate(pristine.double(), cos, sin))
    assert torch.equal(keys[:, :first], before[:, :first])
    assert torch.equal(keys[:, first + G :], before[:, first + G :])


@pytest.mark.parametrize("mod_shape", [(T, D), (1, D), (B, T, D), (1, T, D)])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("impl", [Impl.REFERENCE, Impl.TORCH])
def test_norms_gates_and_modulations(impl: Impl, dtype: torch.dtype, mod_shape: tuple[int, ...]) -> None:
    x, y = draw(B, L, D, dtype=dtype) + 3, draw(B, L, D, dtype=dtype, seed=9)
    table = draw(*mod_shape[:-1], 6, mod_shape[-1], seed=7)
    shift, scale, gate = (table[..., i, :] for i in range(3))
    want = reference.norm_modulate(x.double(), scale, shift, 1e-6)
    TOLERANCES["norm_modulate"].check(sk.norm_modulate(x, scale, shift, impl=impl), want)

    for a_gate in (gate, None):
        stream = x.clone()
        assert sk.gate_residual_(stream, y, a_gate, impl=impl) is stream
        TOLERANCES["gate_residual_"].check(stream, reference.gate_residual(x.double(), y.double(), a_gate))
        fused = x.clone()
        out = sk.gate_residual_norm_modulate_(fused, y, a_gate, scale, shift, impl=impl)
        assert torch.equal(fused, stream)
        want = reference.norm_modulate(stream.double(), scale, shift, 1e-6)
        TOLERANCES["gate_residual_norm_modulate_"].check(out, want)


@pytest.mark.parametrize("impl", [Impl.REFERENCE, Impl.TORCH])
def test_a_stream_may_be_wider_than_its_branches(impl: Impl) -> None:
    x, y = draw(B, L, D) + 3, draw(B, L, D, dtype=torch.bfloat16, seed=9)
    shift, scale, gate = draw(T, 6, D).unbind(1)[:3]
    stream = x.clone()
    out = sk.gate_residual_norm_modulate_(stream, y, gate, scale, shift, impl=impl)
    exact = reference.gate_residual(x.double(), y.double(), gate)
    TOLERANCES["gate_residual_"].check(stream, exact)
    assert out.dtype == torch.bfloat16
    want = reference.norm_modulate(exact, scale, shift, 1e-6)
    TOLERANCES["gate_residual_norm_modulate_"].check(out, want)
    check_eight_bits(*sk.gate_residual_norm_modulate_fp8_(x.clone(), y, gate, scale, shift, impl=impl), want)


@pytest.mark.parametrize("impl", [Impl.REFERENCE, Impl.TORCH])
@pytest.mark.parametrize("dtype", TYPES)
def test_eight_bits(impl: Impl, dtype: torch.dtype) -> None:
    x, y = draw(B, L, D, dtype=dtype), draw(B, L, D, dtype=dtype, seed=9)
    x[0, 3] = 0
    shift, scale, gate = draw(T, 6, D).unbind(1)[:3]
    check_eight_bits(*sk.quantise_rows(x, impl=impl), x.double())
    check_eight_bits(*sk.gelu_fp8(x, impl=impl), reference.gelu_tanh(x.double()))
    check_eight_bits(
        *sk.norm_modulate_fp8(x, scale, shift, impl=impl),
        reference.norm_modulate(x.double(), scale, shift, 1e-6),
    )
    stream = x.clone()
    eight = sk.gate_residual_norm_modulate_fp8_(stream, y, gate, scale, shift, impl=impl)
    TOLERANCES["gate_residual_"].check(stream, reference.gate_residual(x.double(), y.double(), gate))
    check_eight_bits(*eight, reference.norm_modulate(stream.double(), scale, shift, 1e-6))


def test_an_eight_bit_linear_layer_is_the_product_of_its_rounded_factors() -> None:
    x8, x_scale = sk.quantise_rows(draw(2, 9, 64), impl=Impl.TORCH)
    w8, w_scale = sk.quantise_rows(draw(48, 64), impl=Impl.TORCH)
    bias = draw(48)
    got = sk.linear_fp8(x8, x_scale, w8, w_scale, bias, out_dtype=torch.float32)
    want = sk.linear_fp8(x8, x_scale, w8, w_scale, bias, out_dtype=torch.float32, impl=Impl.REFERENCE)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    in_bf16 = sk.linear_fp8(x8, x_scale, w8, w_scale, bias)
    torch.testing.assert_close(in_bf16.float(), want, rtol=2.0**-7, atol=1e-2)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, *TYPES])
@pytest.mark.parametrize("impl", [Impl.REFERENCE, Impl.TORCH])
def test_a_linear_layer(impl: Impl, dtype: torch.dtype, gelu: bool) -> None:
    x = draw(2, 5, 60, dtype=dtype)[..., :37]
    # As stored, as a slice of a joined matrix, and transposed: all strides are right, some are fast.
    whole = draw(50, 37, dtype=dtype)
    for weight in (whole[:19], draw(37, 19, dtype=dtype).t(), draw(19, 50, dtype=dtype)[:, 3:40]):
        for bias in (None, draw(19, dtype=dtype)):
            want = reference.linear(x.double(), weight.double(), None if bias is None else bias.double(), gelu=gelu)
            got = sk.linear(x, weight, bias, gelu=gelu, impl=impl)
            TOLERANCES["linear"].check(got, want)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("impl", [Impl.REFERENCE, Impl.TORCH])
def test_the_norm_of_the_decoder(impl: Impl, dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = draw(2, 12, 3, 5, 7, dtype=dtype).to(memory_format=layout)
    x[0, :, 1, 2, 3] = 0
    weight, bias = draw(12), draw(12, seed=3)
    for a_bias in (None, bias):
        got = sk.rms_norm_silu(x, weight.view(12, 1, 1, 1), a_bias, impl=impl)
        assert got.stride() == x.stride()
        TOLERANCES["rms_norm_silu"].check(got, reference.rms_norm_silu(x.double(), weight, a_bias, 1e-12))


CPU_BACKENDS = ["reference", "sdpa", "onednn"]


def ready_backends(dtype: torch.dtype) -> list[str]:
    reasons = sk.available_backends(device=torch.device("cpu"), dtype=dtype, head_dim=K)
    return [name for name in CPU_BACKENDS if reasons[name] is None]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, *TYPES])
def test_attention_over_segments(backend: str, dtype: torch.dtype) -> None:
    if backend not in ready_backends(dtype):
        pytest.skip(f"{backend} does not compute in {dtype} here")
    M, sink = 40, 6
    q, q_sink = draw(B, L, N, K, dtype=dtype), draw(B, L, N, K, dtype=dtype, seed=1)
    keys, values = draw(B, M, N, K, dtype=dtype, seed=2), draw(B, M, N, K, dtype=dtype, seed=3)
    keys[:, 31:] = math.nan  # rows beyond the fill level are never read
    values[:, 31:] = math.nan
    bound = TOLERANCES[f"attend_{'float32' if dtype == torch.float64 else str(dtype).removeprefix('torch.')}"]
    sparse = [(0, 6), (9, 5), (20, 11)]
    for rows, kwargs in (
        ([(0, 31)], {"length": 31}),
        ([(0, 31)], {"length": torch.tensor(31, dtype=torch.int32)}),
        (sparse, {"segments": sparse}),
        (sparse, {"segments": torch.tensor(sparse, dtype=torch.int32)}),
    ):
        for second in (None, q_sink):
            turned = None if second is None else second.double()
            want, want_lse = reference.attend(
                q.double(), keys.double(), values.double(), rows, q_sink_BLNK=turned, sink_rows=sink
            )
            got, lse = sk.attend_with_lse(
                q, keys, values, backend=backend, q_sink_BLNK=second, sink_rows=sink, **kwargs
            )
            bound.check(got, want)
            TOLERANCES["lse"].check(lse, want_lse)
            plainly = sk.attend(q, keys, values, backend=backend, q_sink_BLNK=second, sink_rows=sink, **kwargs)
            bound.check(plainly, want)


def test_an_eight_bit_history_is_attended_as_its_numbers() -> None:
    key_scale, value_scale = draw(1, N).abs() / 64, draw(1, N, seed=3).abs() / 64
    keys8 = reference.quantise_heads(draw(1, 30, N, K), key_scale)
    values8 = reference.quantise_heads(draw(1, 30, N, K, seed=1), value_scale)
    q = draw(1, L, N, K)
    numbers = [reference.dequantise_heads(x, s).double() for x, s in ((keys8, key_scale), (values8, value_scale))]
    want, _ = reference.attend(q.double(), *numbers, [(0, 30)])
    for backend in ready_backends(torch.float32):
        got = sk.attend(q, keys8, values8, 30, backend=backend, key_scale_BN=key_scale, value_scale_BN=value_scale)
        TOLERANCES["attend_float32"].check(got, want)
