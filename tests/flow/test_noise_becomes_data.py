"""Noise levels are the published ones, steps lead to data, and noise is a value of its key."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from streamdiff import flow, presets, rng
from streamdiff.errors import ConfigError


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 8])
def test_the_grid_is_the_published_schedulers(num_steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    scheduler.set_timesteps(num_steps)
    assert flow.published_grid(num_steps) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


def test_the_four_steps_are_those_of_live_avatar() -> None:
    assert flow.published_grid(4) == pytest.approx(presets.LIVE_AVATAR_SIGMAS, abs=1e-6)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("grid", [flow.published_grid, flow.shifted_grid])
def test_every_grid_falls_from_one_to_zero(grid, shift: float) -> None:
    for num_steps in range(1, 20):
        sigmas = grid(num_steps, shift)
        assert len(sigmas) == num_steps + 1
        assert sigmas[0] == 1.0
        assert sigmas[-1] == 0.0
        assert list(sigmas) == sorted(set(sigmas), reverse=True)


@pytest.mark.parametrize("grid", [flow.published_grid, flow.shifted_grid])
def test_an_impossible_grid_says_so(grid) -> None:
    with pytest.raises(ConfigError, match="num_steps >= 1"):
        grid(0)
    with pytest.raises(ConfigError, match="shift > 0"):
        grid(4, 0.0)


def test_with_the_true_velocity_both_samplers_reach_the_data() -> None:
    generator = torch.Generator().manual_seed(0)
    data, noise, fresh = torch.randn(3, 1, 2, 3, 4, 4, generator=generator, dtype=torch.float64).unbind(0)
    sigmas = flow.published_grid(4)
    x, y, last_noise = noise, noise, noise
    for sigma, sigma_next in itertools.pairwise(sigmas):
        x = flow.euler_step(x, noise - data, sigma=sigma, sigma_next=sigma_next)
        y = flow.renoise_step(y, last_noise - data, fresh, sigma=sigma, sigma_next=sigma_next)
        last_noise = fresh
        assert torch.allclose(x, (1 - sigma_next) * data + sigma_next * noise)
        assert torch.allclose(y, (1 - sigma_next) * data + sigma_next * fresh)
    assert torch.allclose(x, data)
    assert torch.allclose(y, data)


def test_noise_is_a_value_of_its_key() -> None:
    key = {"seed": 1, "stream": 2, "chunk": 3}
    first = flow.initial_noise((2, 3), **key)
    torch.manual_seed(99)
    torch.randn(1000)
    assert torch.equal(first, flow.initial_noise((2, 3), **key))
    others = [flow.initial_noise((2, 3), **{**key, name: 7}) for name in key]
    others += [flow.step_noise((2, 3), **key, step=step) for step in range(3)]
    assert all(not torch.equal(first, other) for other in others)
    assert len({tuple(other.flatten().tolist()) for other in others}) == len(others)


def test_noise_is_normal() -> None:
    draws = torch.cat([rng.normal((1000,), "test", i) for i in range(50)])
    assert abs(draws.mean().item()) < 0.02
    assert abs(draws.std().item() - 1) < 0.02
    neighbours = torch.stack([rng.normal((1000,), "test", 1), rng.normal((1000,), "test", 2)])
    assert abs(torch.corrcoef(neighbours)[0, 1].item()) < 0.1


def test_integers_are_drawn_evenly() -> None:
    counts = torch.bincount(torch.tensor([rng.integer(4, 30, "lead", i) for i in range(27_000)]), minlength=31)
    assert counts[:4].sum() == 0
    assert counts[4:].min() > 850
    assert counts[4:].max() < 1150
