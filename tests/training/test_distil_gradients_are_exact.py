"""The gradient gathered chunk by chunk is that of one big backward pass, and the loss is what it is named for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamdiff import presets, rng
from streamdiff.errors import ConfigError
from streamdiff.training.distil import (
    Cut,
    ScoreLevels,
    accumulate,
    at_level,
    consistency_grid,
    consistency_loss,
    critic_loss,
    data_of,
    guided,
    matching_gradient,
    remake,
    roll_out,
)

SIGMAS = (1.0, 0.85, 0.6, 0.2, 0.0)
WINDOW = ((0,), (0, 1), (0, 1, 2), (1, 2, 3), (2, 3, 4))
SPARSE = ((0,), (0, 1), (0, 1, 2), (0, 2, 3), (0, 3, 4))


class Toy(nn.Module):
    """A model of one channel whose velocity depends on the level, on itself and on all it is shown of the past."""

    def __init__(self, dtype: torch.dtype = torch.float64, hidden: int = 12, seed: int = 0) -> None:
        super().__init__()
        self.enter = nn.Linear(3, hidden, dtype=dtype)
        self.leave = nn.Linear(hidden, 1, dtype=dtype)
        for name, parameter in self.named_parameters():
            parameter.data.copy_(0.6 * rng.normal(tuple(parameter.shape), "toy", seed, name))

    def forward(
        self, noisy_BCTHW: Tensor, *, sigma: float | Tensor, chunk: int, history: Mapping[int, Tensor]
    ) -> tuple[Tensor, Tensor]:
        past = sum((seen / (1 + chunk - c) for c, seen in history.items()), torch.zeros_like(noisy_BCTHW))
        level = torch.zeros_like(noisy_BCTHW) + sigma
        h = torch.tanh(self.enter(torch.stack([noisy_BCTHW, past, level], dim=-1)))
        velocity = self.leave(h).squeeze(-1)
        return velocity, h.mean(-1) + 0.3 * noisy_BCTHW


def noise_of(dtype: torch.dtype, clips: int = 3, frames: int = 2) -> Callable[[int, int], Tensor]:
    return lambda chunk, step: rng.normal((clips, 1, frames, 1, 2), "test", chunk, step).to(dtype)


def naive(toy: Toy, noise: Callable[[int, int], Tensor], visible: tuple, exit_step: int, renoise: bool) -> Tensor:
    """Algorithm 1 of Live Avatar, written out: a list of histories, a graph through the exit step of every chunk."""
    caches: list[dict[int, Tensor]] = [{} for _ in SIGMAS[1:]]
    out = []
    for i, seen in enumerate(visible):
        x = noise(i, 0)
        for j in range(exit_step + 1):
            with torch.set_grad_enabled(j == exit_step):
                v, left = toy(x, sigma=SIGMAS[j], chunk=i, history={c: caches[j][c] for c in seen if c != i})
                caches[j][i] = left.detach()
                data = x - SIGMAS[j] * v
                if j == exit_step:
                    out.append(data)
                elif renoise:
                    x = (1 - SIGMAS[j + 1]) * data + SIGMAS[j + 1] * noise(i, j + 1)
                else:
                    x = x + (SIGMAS[j + 1] - SIGMAS[j]) * v
    return torch.cat(out, dim=2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("visible", [WINDOW, SPARSE], ids=["window", "sparse"])
@pytest.mark.parametrize("renoise", [False, True], ids=["euler", "renoise"])
@pytest.mark.parametrize("exit_step", range(4))
def test_chunk_by_chunk_equals_one_big_backward(
    dtype: torch.dtype, visible: tuple, renoise: bool, exit_step: int
) -> None:
    toy, noise = Toy(dtype), noise_of(dtype)
    whole = naive(toy, noise, visible, exit_step, renoise)
    target = torch.randn(whole.shape, dtype=dtype, generator=torch.Generator().manual_seed(5))
    score = (whole.detach() - target) / (whole.detach() - target).abs().mean()
    # The loss as it is usually written, on the whole graph.
    (0.5 * F.mse_loss(whole, (whole - score).detach())).backward()
    expected = {name: p.grad.clone() for name, p in toy.named_parameters() if p.grad is not None}
    toy.zero_grad()

    made = roll_out(toy, noise, sigmas=SIGMAS, visible=visible, exit_step=exit_step, renoise=renoise)
    accumulate(toy, made, score / score.numel())

    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(made.data_BCTHW, whole.detach(), atol=tolerance, rtol=0)
    assert len(expected) == 4
    for name, parameter in toy.named_parameters():
        assert expected[name].abs().max() > 1e-4
        torch.testing.assert_close(parameter.grad, expected[name], atol=tolerance, rtol=tolerance)


def test_a_chunk_made_again_is_the_same_chunk() -> None:
    toy = Toy(torch.float32)
    made = roll_out(toy, noise_of(torch.float32), sigmas=SIGMAS, visible=WINDOW, exit_step=2, renoise=True)
    again = torch.cat([remake(toy, made, chunk) for chunk in range(5)], dim=2)
    assert torch.equal(again, made.data_BCTHW)
    assert again.requires_grad


def test_the_rollout_lets_go_of_what_no_chunk_needs() -> None:
    toy = Toy()
    made = roll_out(toy, noise_of(torch.float64), sigmas=SIGMAS, visible=WINDOW, exit_step=1, renoise=False)
    assert made.kept.keys() == set(range(5))
    accumulate(toy, made, torch.ones_like(made.data_BCTHW))
    assert not made.kept
    assert not made.entered


def test_every_step_sees_the_history_of_its_own_level() -> None:
    seen: list[tuple[int, float, tuple[float, ...]]] = []

    def model(x: Tensor, *, sigma: float, chunk: int, history: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
        seen.append((chunk, sigma, tuple(float(level) for level in history.values())))
        return torch.zeros_like(x), torch.tensor(sigma)

    roll_out(model, noise_of(torch.float32), sigmas=SIGMAS, visible=WINDOW, exit_step=2, renoise=False)
    assert [(chunk, sigma) for chunk, sigma, _ in seen] == [(c, s) for c in range(5) for s in SIGMAS[:3]]
    for chunk, sigma, levels in seen:
        assert levels == pytest.approx((sigma,) * min(chunk, 2))


def test_what_all_chunks_share_learns_from_all_of_them() -> None:
    weight = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    other = torch.tensor(2.0, dtype=torch.float64)
    cut = Cut(((weight * weight, other), weight.sin()))
    (square, constant), wave = cut.tree
    for factor in (1.0, 2.0, 3.0):  # three backward passes through one graph
        (factor * square * constant + wave).backward()
    assert weight.grad is None
    cut.go_on()
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx(6 * 2 * 2 * 1.5 + 3 * math.cos(1.5))


def _gaussian(mean: Tensor, std: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact velocity of normal data: E[noise - data | noisy]."""

    def velocity(noisy: Tensor, sigma_B: Tensor) -> Tensor:
        s = sigma_B.to(noisy).view(-1, 1, 1, 1, 1)
        variance = ((1 - s) * std) ** 2 + s**2
        centred = noisy - (1 - s) * mean
        return (s * centred - (1 - s) * std**2 * centred) / variance - mean

    return velocity


@pytest.mark.parametrize("sigma", [0.3, 0.7, 0.95])
def test_the_score_gradient_is_that_of_the_kl_divergence(sigma: float) -> None:
    """Generated data mu + s z against real data m + r z: both noisy distributions are normal, their KL is known."""
    mu, s = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.4, 0.8))
    m, r = torch.tensor(-0.5, dtype=torch.float64), torch.tensor(1.3, dtype=torch.float64)
    fake_variance, real_variance = (((1 - sigma) * x) ** 2 + sigma**2 for x in (s, r))
    shift = (1 - sigma) * (mu - m)
    kl = 0.5 * (fake_variance / real_variance - 1 - (fake_variance / real_variance).log() + shift**2 / real_variance)
    kl.backward()

    # Quadrature over data and noise instead of draws: the integrand is a polynomial, so this is exact.
    nodes, weights = (torch.from_numpy(x) for x in _hermite(8))
    z, eps = torch.meshgrid(nodes, nodes, indexing="ij")
    share = torch.outer(weights, weights).flatten()
    data = (mu.detach() + s.detach() * z).view(-1, 1, 1, 1, 1)
    sigma_B = torch.full((len(data),), sigma, dtype=torch.float64)
    real, fake = _gaussian(m, r), _gaussian(mu.detach(), s.detach())
    gradient = matching_gradient(real, fake, data, eps.reshape(data.shape), sigma_B).flatten() * len(data)
    # Undo the weight that each clip is given; what is left is (fake - real) (1 - sigma)^2 / sigma^2 per point.
    noisy = at_level(data, eps.reshape(data.shape), sigma_B)
    size = (data - data_of(noisy, real(noisy, sigma_B), sigma_B)).abs().flatten()
    gradient = gradient * size * (1 - sigma) ** 2 / sigma**2
    assert mu.grad is not None
    assert s.grad is not None
    torch.testing.assert_close((share * gradient).sum(), mu.grad, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close((share * gradient * z.flatten()).sum(), s.grad, atol=1e-10, rtol=1e-8)


def _hermite(count: int):
    import numpy as np

    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return nodes, weights / weights.sum()


def test_the_score_gradient_is_that_of_the_loss_as_it_is_written() -> None:
    draw = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(3, 2, 4, 2, 2, dtype=torch.float64, generator=draw) for _ in range(2))
    data.requires_grad_()
    sigma_B = torch.tensor([0.2, 0.5, 0.9])
    real, fake = (lambda x, s: 0.3 * x + 1), (lambda x, s: x.sin())
    got = matching_gradient(real, fake, data, noise, sigma_B)
    s = sigma_B.double().view(-1, 1, 1, 1, 1)
    noisy = ((1 - s) * data + s * noise).detach()
    r, f = noisy - s * real(noisy, s), noisy - s * fake(noisy, s)
    step = (f - r) / (data.detach() - r).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    (0.5 * F.mse_loss(data, (data - step).detach())).backward()
    torch.testing.assert_close(got, data.grad, atol=1e-13, rtol=1e-10)


def test_guidance_leads_away_from_the_answer_without_conditions() -> None:
    def with_conditions(x: Tensor, s: Tensor) -> Tensor:
        return 2 * x

    def without(x: Tensor, s: Tensor) -> Tensor:
        return x

    x, s = torch.ones(1, 1, 1, 1, 1), torch.ones(1)
    assert guided(with_conditions, without, 0.0)(x, s).item() == 2.0
    assert guided(with_conditions, without, 1.0)(x, s).item() == 3.0
    assert guided(with_conditions, without, 3.0)(x, s).item() == 5.0


def test_levels_are_shifted_clamped_and_drawn_by_name() -> None:
    levels = ScoreLevels()
    sigma_B = levels.draw(4096, 0, 7)
    assert torch.equal(sigma_B, levels.draw(4096, 0, 7))
    assert not torch.equal(sigma_B, levels.draw(4096, 0, 8))
    assert sigma_B.min() >= 0.02
    assert sigma_B.max() <= 0.98
    # The median of u is 0.5, which shift 5 moves to 5/6.
    assert sigma_B.median().item() == pytest.approx(5 / 6, abs=0.02)
    with pytest.raises(ConfigError, match="low < high"):
        ScoreLevels(low=0.9, high=0.1)


def test_the_grid_holds_the_served_levels() -> None:
    grid = consistency_grid(presets.live_avatar_14b().sigmas)
    assert set(presets.live_avatar_14b().sigmas) <= set(grid)
    assert len(grid) == 48 + 1 + 3
    assert list(grid) == sorted(grid, reverse=True)


def test_a_consistent_model_has_no_consistency_loss() -> None:
    """For data at one point, the exact velocity takes every noisy point straight to it."""
    point = torch.tensor(0.7, dtype=torch.float64)

    def exact(x: Tensor, sigma_B: Tensor) -> Tensor:
        return (x - point) / sigma_B.to(x).clamp_min(1e-9).view(-1, 1, 1, 1, 1)

    data = point.expand(4, 1, 2, 1, 1)
    noise = torch.randn(4, 1, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma_B, next_B = torch.tensor([1.0, 0.8, 0.5, 0.02]), torch.tensor([0.9, 0.7, 0.3, 0.0])
    assert consistency_loss(exact, exact, exact, data, noise, sigma_B, next_B) < 1e-20
    wrong = consistency_loss(lambda x, s: exact(x, s) + 1, exact, exact, data, noise, sigma_B, next_B)
    torch.testing.assert_close(wrong, sigma_B.double().square().mean(), atol=1e-7, rtol=0)


def test_the_critic_learns_velocities() -> None:
    data, noise = torch.ones(2, 1, 1, 1, 1), 3 * torch.ones(2, 1, 1, 1, 1)
    sigma_B = torch.tensor([0.25, 0.5])
    assert critic_loss(lambda x, s: torch.full_like(x, 2.0), data, noise, sigma_B) == 0.0
    assert critic_loss(lambda x, s: x, data, noise, sigma_B) == pytest.approx((0.5**2 + 0.0) / 2)
    # Below the floor an error of data weighs the same at every level.
    assert critic_loss(lambda x, s: x, data, noise, sigma_B, floor=0.5) == pytest.approx((0.5**2 * 0.5**2 + 0.0) / 2)


def test_a_step_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no step 4 in 4 steps"):
        roll_out(Toy(), noise_of(torch.float64), sigmas=SIGMAS, visible=WINDOW, exit_step=4, renoise=False)
