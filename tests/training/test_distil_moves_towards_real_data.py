"""A few hundred iterations on numbers instead of pictures: the critic learns the student, the student the real data."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from streamdiff import rng
from streamdiff.training.distil import (
    Rollout,
    ScoreLevels,
    accumulate,
    critic_loss,
    matching_gradient,
    roll_out,
)

VISIBLE = ((0,), (0, 1), (0, 1, 2))
CLIPS = 256
REAL_MEAN, REAL_STD, REAL_TIE = 2.0, 0.5, 0.8
"""Real clips are three numbers around 2, each tied to the one before it with correlation 0.8."""


def _net(inputs: int, outputs: int, seed: int) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(inputs, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, outputs))
    for name, parameter in net.named_parameters():
        parameter.data.copy_(rng.normal(tuple(parameter.shape), "net", seed, name))
        parameter.data.mul_(parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
    return net


class Student(nn.Module):
    """One number after the other; sees the noisy number before it, as it was at the same step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _net(4, 1, seed=1)

    def forward(
        self, noisy_BCTHW: Tensor, *, sigma: float, chunk: int, history: Mapping[int, Tensor]
    ) -> tuple[Tensor, Tensor]:
        x_B1 = noisy_BCTHW.flatten(1)
        past_B1 = history.get(chunk - 1, torch.zeros_like(x_B1))
        first_B1 = torch.full_like(x_B1, float(chunk == 0))
        v_B1 = self.net(torch.cat([x_B1, past_B1, first_B1, torch.full_like(x_B1, sigma)], dim=1))
        return v_B1.view_as(noisy_BCTHW), noisy_BCTHW.flatten(1)


class Normal(nn.Module):
    """Exact velocity of jointly normal numbers, given or learned: three means and the factor of a covariance."""

    def __init__(self, mean_3: Tensor, factor_33: Tensor) -> None:
        super().__init__()
        self.mean_3, self.factor_33 = nn.Parameter(mean_3), nn.Parameter(factor_33)

    def forward(self, noisy_BCTHW: Tensor, sigma_B: Tensor) -> Tensor:
        s_B11 = sigma_B[:, None, None]
        covariance_33 = self.factor_33 @ self.factor_33.T
        spread_B33 = (1 - s_B11) ** 2 * covariance_33 + s_B11**2 * torch.eye(3)
        centred_B31 = noisy_BCTHW.flatten(1)[..., None] - (1 - s_B11) * self.mean_3[:, None]
        solved_B31 = torch.linalg.solve(spread_B33, centred_B31)
        data_B31 = self.mean_3[:, None] + (1 - s_B11) * (covariance_33 @ solved_B31)
        return (s_B11 * solved_B31 - data_B31).view_as(noisy_BCTHW)


def real() -> Normal:
    gap = (torch.arange(3)[:, None] - torch.arange(3)).abs()
    return Normal(torch.full((3,), REAL_MEAN), torch.linalg.cholesky(REAL_STD**2 * REAL_TIE**gap))


def made(student: Student, sigmas: tuple[float, ...], iteration: int, exit_step: int, clips: int) -> Rollout[Tensor]:
    return roll_out(
        student,
        lambda chunk, step: rng.normal((clips, 1, 1, 1, 1), "toy", iteration, chunk, step),
        sigmas=sigmas,
        visible=VISIBLE,
        exit_step=exit_step,
        renoise=True,
    )


def judged(student: Student, sigmas: tuple[float, ...], exit_step: int) -> Tensor:
    return made(student, sigmas, -1, exit_step, 4096).data_BCTHW.flatten(1)


def distil(sigmas: tuple[float, ...], iterations: int) -> tuple[Student, Normal, list[float]]:
    """As in the recipe: the critic begins as a copy of the real model, learns in every iteration, and is one for all
    exit steps; what is kept is the student's average."""
    student, average, teacher, critic, levels = Student(), Student(), real(), real(), ScoreLevels()
    move = torch.optim.Adam(student.parameters(), lr=3e-3, betas=(0.0, 0.999))
    learn = torch.optim.Adam(critic.parameters(), lr=2e-2, betas=(0.0, 0.999))
    losses: list[float] = []
    for iteration in range(iterations):
        exit_step = rng.integer(0, len(sigmas) - 2, "exit", iteration)
        rollout = made(student, sigmas, iteration, exit_step, CLIPS)
        data = rollout.data_BCTHW
        if iteration % 3 == 0:
            noise = rng.normal(tuple(data.shape), "student", iteration)
            gradient = matching_gradient(teacher, critic, data, noise, levels.draw(CLIPS, "student", iteration))
            move.zero_grad()
            accumulate(student, rollout, gradient)
            move.step()
            with torch.no_grad():
                for slow, fast in zip(average.parameters(), student.parameters(), strict=True):
                    slow.lerp_(fast, 0.02)
        noise = rng.normal(tuple(data.shape), "critic", iteration)
        loss = critic_loss(critic, data, noise, levels.draw(CLIPS, "critic", iteration))
        learn.zero_grad()
        loss.backward()
        learn.step()
        losses.append(loss.item())
    return average, critic, losses


@pytest.mark.slow
def test_one_step_becomes_the_real_distribution() -> None:
    sigmas = (1.0, 0.0)
    before = judged(Student(), sigmas, 0)
    student, critic, losses = distil(sigmas, 1200)
    after = judged(student, sigmas, 0)
    assert (before.mean(0) - REAL_MEAN).abs().min() > 1.0
    assert (after.mean(0) - REAL_MEAN).abs().max() < 0.25
    assert after.std(0).tolist() == pytest.approx([REAL_STD] * 3, abs=0.15)
    assert torch.corrcoef(after.T)[0, 1] > 0.6 > torch.corrcoef(before.T)[0, 1].abs() + 0.3
    # The critic begins by knowing only real data: it is wrong about the student until it has learned.
    assert sum(losses[-50:]) < 0.5 * sum(losses[:50])
    assert (critic.mean_3 - after.mean(0)).abs().max() < 0.25


@pytest.mark.slow
def test_several_steps_share_one_critic_and_come_close_together() -> None:
    """One critic sees all exits as one distribution: together they must be right, each alone only nearer."""
    sigmas = (1.0, 0.5, 0.0)
    student, _, _ = distil(sigmas, 1200)
    exits = [(judged(Student(), sigmas, step), judged(student, sigmas, step)) for step in (0, 1)]
    for before, after in exits:
        assert (after.mean() - REAL_MEAN).abs() < 0.5 * (before.mean() - REAL_MEAN).abs()
    assert torch.stack([after for _, after in exits]).mean().item() == pytest.approx(REAL_MEAN, abs=0.3)


def test_the_same_seed_gives_the_same_student() -> None:
    first, second = (distil((1.0, 0.5, 0.0), 20)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
