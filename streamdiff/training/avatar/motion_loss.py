"""Losses of the motion model: flow matching, then consistency distillation.

Axes as in `streamdiff.avatar.window`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from streamdiff.avatar.kinematics import KinematicSpec
from streamdiff.avatar.window import MotionModel


def error_weights(spec: KinematicSpec) -> Tensor:
    """How much errors of each coefficient ``[E]`` count: the mouth more, 1 on average."""
    weight_E = torch.ones(spec.num_coefs)
    for name in spec.names:
        if name.startswith(("mouth", "jaw")):
            weight_E[spec.index(name)] = 1.5
    weight_E[spec.indices(["jawOpen", "mouthPucker", "mouthFunnel", "mouthPressLeft", "mouthPressRight"])] = 3.0
    weight_E[spec.part("reserved")] = 0.0
    return weight_E / weight_E.mean()


def _steadiness(spec: KinematicSpec) -> Tensor:
    """Weight of errors in the change from frame to frame: what moves slowly must not tremble."""
    steady_E = torch.full((spec.num_coefs,), 2.0)
    for part in ("rotation", "translation", "scale"):
        steady_E[spec.part(part)] = 12.0
    for name in spec.names:
        if name.startswith(("brow", "cheek", "eyeSquint", "eyeWide")):
            steady_E[spec.index(name)] = 4.0
    return steady_E


def fit_scale(model: MotionModel, motion_AE: Tensor) -> None:
    """Set the model's normalisation from data; coefficients that hardly move are not blown up."""
    model.mean_E.copy_(motion_AE.mean(0))
    model.std_E.copy_(motion_AE.std(0).clamp_min(0.01))


def _history(model: MotionModel, motion_BAE: Tensor, generator: torch.Generator) -> Tensor:
    """Clean frames as a stream would remember them: a little wrong, and at a start the face at rest."""
    config = model.config
    size = motion_BAE.shape[0]
    history_BAE = model.normal(motion_BAE[:, : config.history])
    noise = torch.randn(history_BAE.shape, generator=generator)
    steady = torch.randn(size, 1, history_BAE.shape[2], generator=generator)
    amount = torch.rand(size, 1, 1, generator=generator)
    history_BAE = history_BAE + amount * (0.08 * noise + 0.15 * steady)
    rest_E = model.normal(torch.from_numpy(model.spec.rest_E.copy()))
    at_rest = torch.rand(size, 1, 1, generator=generator) < 0.02
    return torch.where(at_rest, rest_E.expand_as(history_BAE), history_BAE)


def flow_loss(model: MotionModel, batch: Mapping[str, Tensor], weight_E: Tensor, generator: torch.Generator) -> Tensor:
    """Flow matching loss, written as a weighted error of the data, and of its change from frame to frame."""
    config = model.config
    history_BAE = _history(model, batch["motion"], generator)
    data_BAE = model.normal(batch["motion"][:, config.history :])
    size = len(data_BAE)
    # Half the draws near pure noise: with few steps, the first decides most.
    uniform = torch.rand(size, generator=generator)
    sigma_B = torch.where(torch.rand(size, generator=generator) < 0.25, torch.ones(()), flow_shift(uniform))
    noise_BAE = torch.randn(data_BAE.shape, generator=generator)
    sigma = sigma_B[:, None, None]
    noisy_BAE = (1 - sigma) * data_BAE + sigma * noise_BAE
    tokens = model.cue_tokens(batch["cues"], batch["style"])
    guess_BAE = model(torch.cat([history_BAE, noisy_BAE], 1), sigma_B, tokens)[:, config.history :].float()
    error_BAE = guess_BAE - data_BAE
    share = 1.0 / sigma.clamp_min(0.25) ** 2
    change_BAE = F.pad(error_BAE, (0, 0, 1, 0)).diff(dim=1)
    steady_E = _steadiness(model.spec)
    return (weight_E * share * (error_BAE**2)).mean() + (steady_E * weight_E * share * change_BAE**2).mean()


def flow_shift(uniform: Tensor, shift: float = 2.0) -> Tensor:
    """Noise levels pushed towards noise, as `streamdiff.flow.shifted`, for a tensor."""
    return shift * uniform / (1 + (shift - 1) * uniform)


def consistency_loss(
    student: MotionModel,
    average: MotionModel,
    teacher: MotionModel,
    batch: Mapping[str, Tensor],
    weight_E: Tensor,
    generator: torch.Generator,
    *,
    num_levels: int = 16,
) -> Tensor:
    """Consistency distillation (Song et al. 2023): agree with oneself one teacher step further down.

    The averaged student judges the next point of the teacher's own path; at the lowest level the data do.
    """
    config = student.config
    history_BAE = _history(student, batch["motion"], generator)
    data_BAE = student.normal(batch["motion"][:, config.history :])
    size = len(data_BAE)
    level = torch.randint(num_levels, (size,), generator=generator)
    level = torch.where(torch.rand(size, generator=generator) < 0.3, torch.zeros_like(level), level)
    grid = flow_shift(torch.linspace(1.0, 0.0, num_levels + 1))
    sigma_B, next_B = grid[level], grid[level + 1]
    sigma, sigma_next = sigma_B[:, None, None], next_B[:, None, None]
    noise_BAE = torch.randn(data_BAE.shape, generator=generator)
    noisy_BAE = (1 - sigma) * data_BAE + sigma * noise_BAE
    cues, style = batch["cues"], batch["style"]
    with torch.no_grad():
        taught = teacher(torch.cat([history_BAE, noisy_BAE], 1), sigma_B, teacher.cue_tokens(cues, style))
        taught_BAE = taught[:, config.history :].float()
        next_BAE = noisy_BAE + (sigma_next - sigma) * (noisy_BAE - taught_BAE) / sigma
        judged = average(torch.cat([history_BAE, next_BAE], 1), next_B, average.cue_tokens(cues, style))
        target_BAE = torch.where(sigma_next > 0, judged[:, config.history :].float(), data_BAE)
    guess = student(torch.cat([history_BAE, noisy_BAE], 1), sigma_B, student.cue_tokens(cues, style))
    error_BAE = guess[:, config.history :].float() - target_BAE
    share = 1.0 / sigma.clamp_min(0.25)
    steady_E = _steadiness(student.spec)
    change = (steady_E * weight_E * share * F.pad(error_BAE, (0, 0, 1, 0)).diff(dim=1) ** 2).mean()
    return (weight_E * share * error_BAE**2).mean() + change
