"""Impl.TRITON for norm, rotation and the ring: right in the slot, untouched everywhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import streamdiff_kernels as sk
from streamdiff_kernels import Impl, reference
from streamdiff_kernels.tolerance import TOLERANCES, check_eight_bits_of_heads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = [torch.float32, torch.float16, torch.bfloat16]
TRITON = Impl.TRITON
GUARD = 7


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def tables(num_tokens: int, head_dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    angle = 50 * torch.randn(num_tokens, head_dim // 2, generator=generator, dtype=torch.float64)
    return angle.cos().float().to(DEVICE), angle.sin().float().to(DEVICE)


def guarded(*shape: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """A tensor with a moat on both sides, and the whole with its moat."""
    size = torch.Size(shape).numel()
    whole = draw(size + 2 * GUARD, seed=seed).to(dtype)
    return whole[GUARD:-GUARD].view(shape), whole


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("two_turns", [False, True])
@pytest.mark.parametrize(("B", "N", "K"), [(1, 3, 16), (2, 2, 10), (1, 40, 128)])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_chunk_is_written_into_its_slot_alone(
    dtype: torch.dtype, B: int, N: int, K: int, two_turns: bool, eight_bits: bool
) -> None:
    if eight_bits and DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 begins with capability 8.9")
    L, sink, slots, slot, D = 5 if N < 40 else 2, 3, 3, 1, N * K
    M = sink + slots * L
    q, k, v = draw(B, L, 3 * D, dtype=dtype).split(D, dim=-1)
    wq, wk = draw(D, seed=1), draw(D, seed=2)
    (cos, sin), (cos_sink, sin_sink) = tables(L, K), tables(L, K, seed=1)
    ring_type = torch.float8_e4m3fn if eight_bits else dtype
    (keys, keys_moat), (values, values_moat) = (guarded(B, M, N, K, dtype=ring_type, seed=s) for s in (3, 4))
    (key_scale, ks_moat), (value_scale, vs_moat) = (guarded(B, N, dtype=torch.float32, seed=s) for s in (5, 6))
    key_scale.abs_().add_(0.1).div_(256)
    value_scale.abs_().add_(0.1).div_(256)
    moats = [keys_moat, values_moat, ks_moat, vs_moat]
    before = [moat.clone() for moat in moats]
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
        key_scale_BN=key_scale if eight_bits else None,
        value_scale_BN=value_scale if eight_bits else None,
        slot=torch.tensor(slot, dtype=torch.int32, device=DEVICE),
        ring_start=sink,
        impl=TRITON,
    )
    want_q, want_k = reference.qk_norm_rope(q.double(), k.double(), wq, wk, cos, sin, 1e-6)
    want_v = v.unflatten(-1, (N, K)).double()
    bound = TOLERANCES["qk_norm_rope_write"]
    bound.check(got, want_q)
    if two_turns:
        assert got_sink is not None
        turned = reference.qk_norm_rope(q.double(), k.double(), wq, wk, cos_sink, sin_sink, 1e-6)[0]
        bound.check(got_sink, turned)
    rows = slice(sink + slot * L, sink + (slot + 1) * L)
    if eight_bits:
        check_eight_bits_of_heads(keys[:, rows], key_scale, want_k)
        check_eight_bits_of_heads(values[:, rows], value_scale, want_v)
    else:
        bound.check(keys[:, rows], want_k)
        assert torch.equal(values[:, rows].double(), want_v)
    # Put the slot back as it was: nothing else may differ, the moat included.
    for tensor, then in zip((keys, values), before, strict=False):
        tensor[:, rows] = then[GUARD:-GUARD].view(tensor.shape)[:, rows]
    for moat, then in zip(moats, before, strict=True):
        assert torch.equal(moat.float(), then.float())


@pytest.mark.parametrize("slot", [-1, 2, 1 << 30])
def test_a_slot_outside_the_ring_writes_nothing(slot: int) -> None:
    L, N, K = 3, 2, 8
    (keys, moat), (values, values_moat) = (guarded(2 * L, N, K, dtype=torch.float32, seed=s) for s in (1, 2))
    before = moat.clone(), values_moat.clone()
    cos, sin = tables(L, K)
    sk.qk_norm_rope_write(
        *(draw(1, L, N * K) for _ in range(3)),
        q_weight_D=draw(N * K),
        k_weight_D=draw(N * K),
        cos_LR=cos,
        sin_LR=sin,
        keys_BMNK=keys,
        values_BMNK=values,
        slot=torch.tensor(slot, dtype=torch.int32, device=DEVICE),
        impl=TRITON,
    )
    assert torch.equal(moat, before[0])
    assert torch.equal(values_moat, before[1])


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_the_sink_is_rotated_into_its_rows_alone(dtype: torch.dtype, eight_bits: bool) -> None:
    B, G, N, K, M, first = 2, 4, 3, 12, 9, 2
    ring_type = torch.float8_e4m3fn if eight_bits else dtype
    pristine, (cos, sin) = draw(B, G, N, K, dtype=dtype), tables(G, K)
    (keys, moat), (scales, scale_moat) = (
        guarded(B, M, N, K, dtype=ring_type, seed=1),
        guarded(B, N, dtype=torch.float32, seed=2),
    )
    scales.abs_().add_(0.1).div_(64)
    before, scale_before, untouched = moat.clone(), scale_moat.clone(), pristine.clone()
    sk.rotate_sink_(pristine, cos, sin, keys, first_row=first, key_scale_BN=scales if eight_bits else None, impl=TRITON)
    want = reference.rotate(pristine.double(), cos, sin)
    rows = slice(first, first + G)
    if eight_bits:
        check_eight_bits_of_heads(keys[:, rows], scales, want)
    else:
        TOLERANCES["rotate_sink_"].check(keys[:, rows], want)
    keys[:, rows] = before[GUARD:-GUARD].view(keys.shape)[:, rows]
    assert torch.equal(moat.float(), before.float())
    assert torch.equal(scale_moat, scale_before)
    assert torch.equal(pristine, untouched)


@pytest.mark.parametrize("dtype", TYPES)
def test_rotation_alone(dtype: torch.dtype) -> None:
    x, (cos, sin) = draw(2, 5, 3, 14, dtype=dtype), tables(5, 14)
    want = reference.rotate(x.double(), cos, sin)
    TOLERANCES["rotate"].check(sk.rotate(x, cos, sin, impl=TRITON), want)
    heads_first = x.transpose(1, 2).contiguous().transpose(1, 2)
    TOLERANCES["rotate"].check(sk.rotate(heads_first, cos, sin, impl=TRITON), want)
