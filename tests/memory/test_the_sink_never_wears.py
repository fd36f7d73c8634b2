"""The sink is rotated from a pristine copy: its error does not grow. Rotating in place fails the same test."""

from __future__ import annotations

import pytest
import torch

from streamdiff.memory import SinkMemory, StepMemory, sink_lead
from streamdiff.rope import Rotation, grid_rotation, rotate, sink_position

PAIRS = (6, 5, 5)
ROWS, COLUMNS = range(2), range(3)
TOKENS = 6
NUM_CHUNKS = 2000
LIMIT = 2**-7
"""Half a bfloat16 step, relative to the largest key, with one rounding of the input behind it."""


def turn(position: int) -> Rotation:
    return grid_rotation([position], ROWS, COLUMNS, PAIRS)


def exact(keys: torch.Tensor, position: int) -> torch.Tensor:
    """The rotation in float64, through complex numbers."""
    rates = [torch.arange(p, dtype=torch.float64) / p for p in PAIRS]
    rates = [10000.0**-r for r in rates]
    angles = torch.stack(
        [torch.cat([position * rates[0], row * rates[1], column * rates[2]]) for row in ROWS for column in COLUMNS]
    )
    pairs = torch.view_as_complex(keys.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[None, :, None]).flatten(-2)


def positions() -> list[int]:
    return [
        sink_position(3 * c, lead=sink_lead(seed=1, stream=0, chunk=c, low=4, high=30), origin=30)
        for c in range(NUM_CHUNKS)
    ]


def worst_error(found: torch.Tensor, keys: torch.Tensor, position: int) -> float:
    expected = exact(keys, position)
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def new_memory() -> tuple[SinkMemory, StepMemory, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, TOKENS, 2, 32, generator=generator).to(torch.bfloat16)
    sink = SinkMemory(
        num_layers=1,
        num_streams=1,
        moving_tokens=TOKENS,
        num_heads=2,
        head_dim=32,
        dtype=torch.bfloat16,
        device="cpu",
    )
    sink.write(0, keys, keys)
    memory = StepMemory(sink, chunk_tokens=TOKENS, window_chunks=2)
    memory.take_sink(None)
    return sink, memory, keys


@pytest.mark.heavy
def test_the_pristine_sink_does_not_drift() -> None:
    _, memory, keys = new_memory()
    errors = []
    for position in positions():
        memory.turn_sink(turn(position))
        errors.append(worst_error(memory.keys_ZBMNK[0, :, :TOKENS], keys, position))
    assert max(errors) <= LIMIT
    assert max(errors[-100:]) <= 1.5 * max(errors[:100])


@pytest.mark.heavy
def test_rotating_in_place_would_drift() -> None:
    """The same loop, each rotation taken from the last result, as a memory without a pristine copy would do."""
    _, _, keys = new_memory()
    kept, at = rotate(keys, turn(positions()[0])), positions()[0]
    errors = []
    for position in positions():
        kept = rotate(kept, grid_rotation([position - at], [0] * 2, [0] * 3, PAIRS))
        at = position
        errors.append(worst_error(kept, keys, position))
    assert errors[-1] > 10 * LIMIT
    assert max(errors[-100:]) > 1.5 * max(errors[:100])


def test_a_day_of_stream_is_as_exact_as_a_second() -> None:
    keys = torch.randn(1, TOKENS, 2, 32, generator=torch.Generator().manual_seed(0))
    day = 24 * 3600 * 25 // 4
    for position in (0, 45_000, day, 1000 * day):
        assert worst_error(rotate(keys, turn(position)), keys, position) < 1e-6


def test_scores_depend_on_distance_only() -> None:
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 1, TOKENS, 2, 32, generator=generator).unbind(0)
    near = (rotate(q, turn(7)) * rotate(k, turn(30))).sum(-1)
    far = (rotate(q, turn(540_007)) * rotate(k, turn(540_030))).sum(-1)
    assert torch.allclose(near, far, atol=1e-4)


@pytest.mark.parametrize("low_high", [(4, 30), (7, 7)])
def test_the_lead_is_a_value_of_the_chunk(low_high: tuple[int, int]) -> None:
    low, high = low_high
    leads = [sink_lead(seed=5, stream=2, chunk=c, low=low, high=high) for c in range(500)]
    assert leads == [sink_lead(seed=5, stream=2, chunk=c, low=low, high=high) for c in range(500)]
    assert set(leads) == set(range(low, high + 1))
