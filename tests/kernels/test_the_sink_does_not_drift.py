"""A sink turned from its pristine copy stays exact for ever; one turned in place rots."""

from __future__ import annotations

import torch
from torch import Tensor

import streamdiff_kernels as sk
from streamdiff_kernels import Impl, reference

G, N, K = 16, 2, 32
R = K // 2
FREQUENCIES = 10000.0 ** -(torch.arange(R, dtype=torch.float64) / R)


def tables(position: float) -> tuple[Tensor, Tensor]:
    angle = torch.full((G, 1), position, dtype=torch.float64) * FREQUENCIES
    return angle.cos().float(), angle.sin().float()


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def test_a_thousand_chunks_from_the_pristine_copy() -> None:
    exact = torch.randn(G, N, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pristine = exact.to(torch.bfloat16)
    ring = torch.zeros(G, N, K, dtype=torch.bfloat16)
    in_place = pristine.clone()
    step = tables(3.0)
    errors = {}
    for chunk in range(1, 1001):
        sk.rotate_sink_(pristine, *tables(3.0 * chunk), ring, impl=Impl.TORCH)
        in_place = sk.rotate(in_place[None], *step, impl=Impl.TORCH)[0]
        if chunk in (100, 1000):
            angle = torch.full((G, 1), 3.0 * chunk, dtype=torch.float64) * FREQUENCIES
            want = reference.rotate(pristine.double()[None], angle.cos(), angle.sin())[0]
            errors[chunk] = relative_error(ring, want), relative_error(in_place, want)
    for from_pristine, from_itself in errors.values():
        assert from_pristine < 2.5e-3
        assert from_itself > 1e-2
    # It grows with time; the pristine one does not.
    assert errors[1000][1] > 2 * errors[100][1]
    assert errors[1000][0] < 1.2 * errors[100][0]


def test_a_day_of_video_is_as_exact_as_its_first_second() -> None:
    """540,000 latent frames: angles in float64 on the host, never accumulated."""
    pristine = torch.randn(G, N, K, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    ring = torch.zeros(G, N, K, dtype=torch.bfloat16)
    for position in (6.0, 540_000.0):
        sk.rotate_sink_(pristine, *tables(position), ring, impl=Impl.TORCH)
        angle = torch.full((G, 1), position, dtype=torch.float64) * FREQUENCIES
        want = reference.rotate(pristine.double()[None], angle.cos(), angle.sin())[0]
        assert relative_error(ring, want) < 2.5e-3
