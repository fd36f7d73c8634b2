"""Two thousand chunks through the ring, slots in random order, against re-roping all that is remembered.

The published way keeps un-roped keys and rotates the whole window at every step, to positions counted from
its start. Here ring keys keep the rotation they were written with, and only the sink is turned: the scores
are the same because they depend on differences of positions alone, and the order of slots is free because
softmax sums over a set. The bound is one rounding to the type of the ring, 2^-8 for bfloat16, relative to the
norm of the outputs; and ours must be no further from float64 than the published way is in the same type.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import streamdiff_kernels as sk
from streamdiff_kernels import Impl, reference

L, N, K, G = 3, 2, 12, 4
WINDOW, SLOTS, CHUNKS, LEAD = 3, 6, 2000, 7
D, R = N * K, K // 2
FREQUENCIES = 10000.0 ** -(torch.arange(R, dtype=torch.float64) / R)


def tables(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Angles in float64 on the host: in float32 they would be wrong by 2e-4 after an hour of video."""
    angle = positions.double()[:, None] * FREQUENCIES
    return angle.cos(), angle.sin()


@pytest.mark.slow
@pytest.mark.parametrize("sink_by", ["turned queries", "turned keys"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2.0**-20), (torch.bfloat16, 2.0**-8)])
def test_two_thousand_chunks_in_random_slots(dtype: torch.dtype, bound: float, sink_by: str) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.ones(D)
    keys, values = (torch.full((G + SLOTS * L, N, K), torch.nan, dtype=dtype) for _ in range(2))
    pristine = torch.randn(G, N, K, generator=draw, dtype=torch.float64)
    sink_values = torch.randn(G, N, K, generator=draw, dtype=torch.float64)
    values[:G] = sink_values
    turn_keys = sink_by == "turned keys"
    sink_home = 30
    if not turn_keys:
        # Once, for the whole stream.
        home = tables(torch.full((G,), sink_home))
        sk.rotate_sink_(pristine.to(dtype), *(t.float() for t in home), keys, impl=Impl.TORCH)
    owner: dict[int, int] = {}  # slot -> chunk
    history: dict[int, tuple[Tensor, Tensor]] = {}
    our_error = published_error = size = 0.0
    for chunk in range(CHUNKS):
        q, k, v = (torch.randn(1, L, D, generator=draw).to(dtype) for _ in range(3))
        now = chunk * L
        positions = now + torch.arange(L)
        # More slots than the window needs, as a stream that may rewind keeps them: any free one will do.
        owner = {slot: kept for slot, kept in owner.items() if kept > chunk - WINDOW}
        free = [slot for slot in range(SLOTS) if slot not in owner]
        slot = free[int(torch.randint(len(free), (), generator=draw))]
        owner[slot] = chunk
        cos, sin = (t.float() for t in tables(positions))
        # The sink stands at now + LEAD. Turning the query instead: sink_home + (query - (now + LEAD)).
        cos_sink, sin_sink = (t.float() for t in tables(sink_home + positions - (now + LEAD)))
        if turn_keys:
            ahead = tables(torch.full((G,), now + LEAD))
            sk.rotate_sink_(pristine.to(dtype), *(t.float() for t in ahead), keys, impl=Impl.TORCH)
        roped, turned = sk.qk_norm_rope_write(
            q,
            k,
            v,
            q_weight_D=weight,
            k_weight_D=weight,
            cos_LR=cos,
            sin_LR=sin,
            cos_sink_LR=None if turn_keys else cos_sink,
            sin_sink_LR=None if turn_keys else sin_sink,
            keys_BMNK=keys,
            values_BMNK=values,
            slot=torch.tensor(slot, dtype=torch.int32),
            ring_start=G,
            impl=Impl.TORCH,
        )
        segments = torch.tensor([(0, G), *((G + kept * L, L) for kept in owner)], dtype=torch.int32)
        got = sk.attend(roped, keys, values, segments=segments, backend="sdpa", q_sink_BLNK=turned, sink_rows=G)

        # The published way, with positions counted from the oldest chunk in the window: exact, and in the
        # ring's type.
        normed = reference.rms_norm(k.double(), weight, 1e-6).unflatten(-1, (N, K))
        history[chunk] = normed, v.double().unflatten(-1, (N, K))
        history.pop(chunk - WINDOW, None)
        if chunk < CHUNKS - 200 and chunk % 20:
            continue
        oldest = min(history)
        places = {c: tables((c - oldest) * L + torch.arange(L)) for c in history}
        ahead = tables(torch.full((G,), (chunk - oldest) * L + LEAD))
        query = reference.rotate(reference.rms_norm(q.double(), weight, 1e-6).unflatten(-1, (N, K)), *places[chunk])
        window_values = torch.cat([sink_values[None], *(kept for _, kept in history.values())], dim=1)

        def window_keys(stored_as: torch.dtype) -> Tensor:
            kept = {c: x.to(stored_as).double() for c, (x, _) in history.items()}
            sink = reference.rotate(pristine[None].to(stored_as).double(), *ahead)  # noqa: B023
            return torch.cat([sink, *(reference.rotate(x, *places[c]) for c, x in kept.items())], dim=1)  # noqa: B023

        num_rows = window_values.shape[1]
        want, _ = reference.attend(query, window_keys(torch.float64), window_values, [(0, num_rows)])
        rounded = (x.to(dtype) for x in (query, window_keys(dtype), window_values))
        published = sk.attend(*rounded, num_rows, backend="sdpa")
        our_error += float((got.double() - want).square().sum())
        published_error += float((published.double() - want).square().sum())
        size += float(want.square().sum())
    ours, theirs = (our_error / size) ** 0.5, (published_error / size) ** 0.5
    assert ours <= bound
    # Our tables are float32, and the backend rounds the output of each segment before they are merged.
    assert ours <= 1.1 * theirs + 2.0**-21
