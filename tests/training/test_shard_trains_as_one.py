"""Two processes with half of the weights and half of the clips each take the step that one process takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from streamdiff.models.dit import CausalDiT
from streamdiff.pipeline.group import World
from streamdiff.training import shard
from tests.pipeline.ranks import run_ranks, values
from tests.training import shard_job

CASES = (
    ("flow", 0, 0.5, False),
    ("flow", 3, 0.5, True),
    ("rollout", 0, 0.5, True),
    ("rollout", 3, 1e6, False),
)
"""Which gradient, rank of adapters (0: all weights learn), longest gradient, whether layers are computed again."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sharded_step_is_the_step() -> None:
    ranks = values(run_ranks(shard_job.job, 2, CASES, timeout_s=600))
    for case, first, second in zip(CASES, *ranks, strict=True):
        which, rank, longest, _ = case
        expected, loss, length = shard_job.alone(which, rank, longest)
        state, first_loss, first_length, first_held = first
        _, second_loss, second_length, second_held = second
        assert (first_loss + second_loss) / 2 == pytest.approx(loss, rel=1e-5), case
        assert first_length == second_length == pytest.approx(length, rel=1e-5), case
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            np.testing.assert_allclose(state[name], tensor.numpy(), atol=1e-6, rtol=0, err_msg=f"{case} {name}")
        # Each holds about half, and both hold all.
        total = sum(t.numel() for t in expected.values())
        assert first_held + second_held == total
        assert abs(first_held - second_held) < 0.02 * total


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_only_the_last_of_several_passes_needs_to_send() -> None:
    for each, last in values(run_ranks(shard_job.accumulated, 2, timeout_s=400)):
        assert len(each) == len(last) > 0
        for a, b in zip(each, last, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_checkpoint_fills_the_shards_and_comes_back_whole() -> None:
    first, second = values(run_ranks(shard_job.filled, 2, timeout_s=400))
    expected = shard_job.model().state_dict()
    assert not second
    assert first.keys() == expected.keys()
    assert all(np.array_equal(first[name], tensor.numpy()) for name, tensor in expected.items())


@pytest.mark.heavy
def test_a_missing_rank_is_not_waited_for_forever() -> None:
    world = World(rank=1, size=2, port=shard_job.free_port())
    with pytest.raises(RuntimeError, match=r"(?i)time|refused|connect"), shard.processes(world, timeout_s=1.0):
        pass


def test_what_is_not_sharded_runs_as_it_is() -> None:
    dit = shard_job.model()
    seen: list[tuple[Tensor, ...]] = []

    def note(*tensors: Tensor) -> CausalDiT:
        seen.append(tensors)
        return dit

    x = torch.ones(2)
    assert shard.enter(dit, note, x) is dit
    assert seen[0][0] is x
