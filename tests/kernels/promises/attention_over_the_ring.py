"""The Triton attention against float64: any fill level, any segments, two rotations of q, eight bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import streamdiff_kernels as sk
from streamdiff_kernels import reference
from streamdiff_kernels.tolerance import TOLERANCES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = torch.float16 if DEVICE == "cuda" else torch.float32
"""The finest type that the kernel takes: a GPU's tensor cores begin at sixteen bits."""


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def on_device(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def check(
    q: Tensor,
    q_sink: Tensor | None,
    keys: Tensor,
    values: Tensor,
    rows: list[tuple[int, int]],
    sink_rows: int,
    **how: Any,
) -> None:
    """Against float64, with and without the log-sum-exp."""
    turned = None if q_sink is None else q_sink.double()
    want, want_lse = reference.attend(
        q.double(), keys.double(), values.double(), rows, q_sink_BLNK=turned, sink_rows=sink_rows
    )
    bound = TOLERANCES[f"attend_{str(q.dtype).removeprefix('torch.')}"]
    got, lse = sk.attend_with_lse(q, keys, values, backend="triton", q_sink_BLNK=q_sink, sink_rows=sink_rows, **how)
    bound.check(got, want)
    TOLERANCES["lse"].check(lse, want_lse)
    again = sk.attend(q, keys, values, backend="triton", q_sink_BLNK=q_sink, sink_rows=sink_rows, **how)
    assert torch.equal(again, got)


@pytest.mark.parametrize("two_turns", [False, True])
@pytest.mark.parametrize(
    ("dtype", "B", "L", "N", "K", "length"),
    [
        (EXACT, 2, 21, 3, 10, 31),
        (torch.bfloat16, 1, 16, 2, 32, 32),
        (torch.float16, 1, 16, 2, 32, 32),
        (torch.bfloat16, 2, 1, 1, 16, 3),
        (EXACT, 1, 33, 2, 40, 49),
    ],
)
def test_any_fill_level(dtype: torch.dtype, B: int, L: int, N: int, K: int, length: int, two_turns: bool) -> None:
    M = length + 5
    q, q_sink = draw(B, L, N, K, dtype=dtype), draw(B, L, N, K, dtype=dtype, seed=1)
    keys, values = draw(B, M, N, K, dtype=dtype, seed=2), draw(B, M, N, K, dtype=dtype, seed=3)
    keys[:, length:] = math.nan  # rows beyond the fill level were never written
    values[:, length:] = math.nan
    sink = 18 if length > 18 else 2
    check(q, q_sink if two_turns else None, keys, values, [(0, length)], sink, length=on_device(length))
    check(q, q_sink if two_turns else None, keys, values, [(0, length)], sink, length=length)


@pytest.mark.parametrize("two_turns", [False, True])
@pytest.mark.parametrize(
    "segments",
    [
        [(0, 6), (9, 5), (20, 18)],  # sink, and two slots
        [(20, 18), (0, 6)],  # order is free
        [(0, 21)],  # one that crosses the end of the sink
        [(2, 9), (30, 0), (33, 16)],  # an empty one
    ],
)
def test_any_segments(segments: list[tuple[int, int]], two_turns: bool) -> None:
    L, N, K, M, sink = 19, 2, 16, 50, 6
    q, q_sink = draw(1, L, N, K, dtype=EXACT), draw(1, L, N, K, dtype=EXACT, seed=1)
    keys, values = draw(M, N, K, seed=2).to(q.dtype), draw(M, N, K, seed=3).to(q.dtype)
    seen = {row for first, count in segments for row in range(first, first + count)}
    hidden = [row for row in range(M) if row not in seen]
    keys[hidden], values[hidden] = math.nan, math.nan
    batched = keys[None], values[None]
    check(q, q_sink if two_turns else None, *batched, segments, sink, segments=on_device(segments))
    check(q, q_sink if two_turns else None, *batched, segments, sink, segments=segments)


def test_the_queries_may_be_slices() -> None:
    whole = draw(2, 9, 4, 24).to(torch.float16)
    q, q_sink = whole[:, :, :2, :16], whole[:, :, 2:, :16]
    keys, values = draw(2, 20, 2, 16, seed=2).half(), draw(2, 20, 2, 16, seed=3).half()
    check(q, q_sink, keys, values, [(0, 20)], 7, length=20)


def test_an_eight_bit_history() -> None:
    B, L, N, K, M = 2, 17, 2, 16, 37
    ring, scales = eight_bit_ring(draw(B, M, N, K) * 3, draw(B, M, N, K, seed=1))
    q, q_sink = draw(B, L, N, K, dtype=torch.bfloat16), draw(B, L, N, K, dtype=torch.bfloat16, seed=9)
    q[0, 3] = 0
    for turn in ({}, {"q_sink_BLNK": q_sink, "sink_rows": 11}):
        for rows, where in (
            ([(0, 35)], {"length": on_device(35)}),
            ([(2, 7), (20, 9)], {"segments": on_device([[2, 7], [20, 9]])}),
        ):
            wide = {"q_sink_BLNK": rounded(q_sink), "sink_rows": 11} if turn else {}
            want, want_lse = reference.attend(rounded(q), *numbers_of(ring, scales), rows, **wide)
            got, lse = sk.attend_with_lse(q, *ring, backend="triton", **where, **turn, **scales)
            TOLERANCES["attend_bfloat16"].check(got, want)
            # A query on the border between two neighbours may fall to either.
            torch.testing.assert_close(lse.double(), want_lse, rtol=0.0, atol=0.02)


def eight_bit_ring(keys: Tensor, values: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Keys and values in e4m3 with a scale per stream and head."""
    scales = [x.abs().amax((1, 3)).float() / 300 for x in (keys, values)]
    ring = [reference.quantise_heads(x, scale) for x, scale in zip((keys, values), scales, strict=True)]
    return ring, dict(zip(("key_scale_BN", "value_scale_BN"), scales, strict=True))


def numbers_of(ring: list[Tensor], scales: dict[str, Tensor]) -> list[Tensor]:
    return [reference.dequantise_heads(x, scale).double() for x, scale in zip(ring, scales.values(), strict=True)]


def rounded(q_BLNK: Tensor) -> Tensor:
    """Queries as they are multiplied: e4m3 with a scale for each."""
    return reference.dequantise_rows(*reference.quantise_rows(q_BLNK)).double()


def test_attention_over_nothing_weighs_nothing() -> None:
    q, ring = draw(1, 5, 2, 16).half(), draw(1, 12, 2, 16).half()
    out, lse = sk.attend_with_lse(q, ring, ring, on_device(0), backend="triton")
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.all(lse == -math.inf)
    some, some_lse = sk.attend_with_lse(q, ring, ring, on_device(12), backend="triton")
    merged, merged_lse = sk.merge_attention(out, lse, some, some_lse)
    assert torch.equal(merged, some)
    assert torch.equal(merged_lse, some_lse)


def test_two_halves_merge_into_the_whole() -> None:
    q, keys, values = (draw(1, 9, 2, 16, seed=0), draw(1, 40, 2, 16, seed=1), draw(1, 40, 2, 16, seed=2))
    q, keys, values = (x.half() for x in (q, keys, values))
    halves = [
        sk.attend_with_lse(q, keys, values, segments=on_device(part), backend="triton")
        for part in ([[0, 13]], [[13, 27]])
    ]
    merged, lse = sk.merge_attention(*halves[0], *halves[1])
    want, want_lse = reference.attend(q.double(), keys.double(), values.double(), [(0, 40)])
    TOLERANCES["attend_float16"].check(merged, want)
    TOLERANCES["lse"].check(lse, want_lse)


def test_large_scores_do_not_overflow() -> None:
    q, keys, values = (draw(1, 6, 1, 16, seed=s).half() for s in range(3))
    keys = (keys * 300)[:, :6].contiguous()
    want, _ = reference.attend(q.double(), keys.double(), values.double(), [(0, 6)])
    got = sk.attend(q, keys, values, 6, backend="triton")
    TOLERANCES["attend_float16"].check(got, want)


@pytest.mark.parametrize("two_turns", [False, True])
def test_tiles_of_full_size(two_turns: bool) -> None:
    from streamdiff_kernels.triton import attention

    L, N, K, M, sink = 150, 2, 128, 410, 140
    q, q_sink = draw(1, L, N, K, dtype=torch.bfloat16), draw(1, L, N, K, dtype=torch.bfloat16, seed=1)
    keys, values = draw(1, M, N, K, dtype=torch.bfloat16, seed=2), draw(1, M, N, K, dtype=torch.bfloat16, seed=3)
    turned = q_sink if two_turns else None
    want, want_lse = reference.attend(
        q.double(),
        keys.double(),
        values.double(),
        [(0, 395)],
        q_sink_BLNK=None if turned is None else turned.double(),
        sink_rows=sink,
    )
    rest = (None, None, on_device(395), None, None, sink, K**-0.5, True)
    got, lse = attention.attend(q, turned, keys, values, *rest, tiles=attention.Tiles(128, 128, 8, 2))
    assert lse is not None
    TOLERANCES["attend_bfloat16"].check(got, want)
    TOLERANCES["lse"].check(lse, want_lse)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has no tiles of this size to choose")
@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("two_turns", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_at_the_tiles_of_the_14b_model(sparse: bool, two_turns: bool, eight_bits: bool) -> None:
    """Forty heads of 128 fill the GPU with 128 x 128 tiles; the oracle is torch in float32."""
    L, N, K, sink = 1000, 40, 128, 300
    M = sink + 3 * L
    q, q_sink = draw(1, L, N, K, dtype=torch.bfloat16), draw(1, L, N, K, dtype=torch.bfloat16, seed=1)
    keys, values = draw(1, M, N, K, dtype=torch.bfloat16, seed=2), draw(1, M, N, K, dtype=torch.bfloat16, seed=3)
    scales: dict[str, Tensor] = {}
    numbers = keys.float(), values.float()
    if eight_bits:
        ring, scales = eight_bit_ring(keys, values)
        numbers = tuple(x.float() for x in numbers_of(ring, scales))
        keys, values = ring
    pairs = [(0, sink), (sink, L), (sink + 2 * L, L - 7)] if sparse else [(0, M - 11)]
    turn: dict[str, Any] = {"sink_rows": sink} if two_turns else {}
    as_multiplied = (lambda x: rounded(x).float()) if eight_bits else Tensor.float
    turned = as_multiplied(q_sink) if two_turns else None
    want, want_lse = sk.attend_with_lse(
        as_multiplied(q), *numbers, segments=pairs, backend="sdpa", q_sink_BLNK=turned, **turn
    )
    where: dict[str, Any] = {"segments": on_device(pairs)} if sparse else {"length": on_device(M - 11)}
    got, lse = sk.attend_with_lse(
        q, keys, values, backend="triton", q_sink_BLNK=q_sink if two_turns else None, **turn, **where, **scales
    )
    TOLERANCES["attend_bfloat16"].check(got, want)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-4)
