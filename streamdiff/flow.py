"""How noise becomes data: noise levels, and the step from one to the next.

sigma runs from 1 (noise) to 0 (data); x_sigma = (1 - sigma) * data + sigma * noise; the model predicts the velocity
noise - data. Axes: B streams, C channels, T latent frames, H height, W width.
"""

from __future__ import annotations

from torch import Tensor

from streamdiff import rng
from streamdiff.errors import ConfigError

_TRAIN_STEPS = 1000


def shifted(sigma: float, shift: float) -> float:
    """Move a noise level towards noise: ``shift * sigma / (1 + (shift - 1) * sigma)``.

    >>> shifted(0.5, 3.0)
    0.75
    """
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def shifted_grid(num_steps: int, shift: float = 3.0) -> tuple[float, ...]:
    """Evenly spaced noise levels, shifted once: the ordinary grid of flow matching.

    >>> shifted_grid(4, 1.0)
    (1.0, 0.75, 0.5, 0.25, 0.0)
    """
    if num_steps < 1 or shift <= 0:
        raise ConfigError(f"a grid needs num_steps >= 1 and shift > 0, got {num_steps} and {shift}")
    return tuple(shifted(1.0 - i / num_steps, shift) for i in range(num_steps + 1))


def published_grid(num_steps: int, shift: float = 3.0) -> tuple[float, ...]:
    """The grid that Live Avatar runs, for any number of steps: shifted, spread evenly, and shifted again.

    >>> [round(s, 6) for s in published_grid(4)]
    [1.0, 0.857692, 0.602151, 0.008929, 0.0]
    """
    if num_steps < 1 or shift <= 0:
        raise ConfigError(f"a grid needs num_steps >= 1 and shift > 0, got {num_steps} and {shift}")
    first = 1.0
    last = shifted(1.0 / _TRAIN_STEPS, shift)
    if num_steps == 1:
        return (1.0, 0.0)
    spread = (first + (last - first) * i / (num_steps - 1) for i in range(num_steps))
    return (*(shifted(s, shift) for s in spread), 0.0)


def regridded(sigmas: tuple[float, ...], num_steps: int) -> tuple[float, ...]:
    """A grid of the same kind with another number of steps: shifted once if this one is, else as published.

    >>> regridded((1.0, 0.9, 0.75, 0.5, 0.0), 2)
    (1.0, 0.75, 0.0)
    """
    given = len(sigmas) - 1
    if sigmas == shifted_grid(given):
        return shifted_grid(num_steps)
    return published_grid(num_steps)


def initial_noise(shape: tuple[int, ...], *, seed: int, stream: int, chunk: int) -> Tensor:
    """Noise that a chunk starts from; float32 on the CPU, keyed by (seed, stream, chunk, step 0)."""
    return rng.normal(shape, "noise", seed, stream, chunk, 0)


def step_noise(shape: tuple[int, ...], *, seed: int, stream: int, chunk: int, step: int) -> Tensor:
    """Fresh noise after step ``step`` (0 first) of a chunk; float32 on the CPU."""
    return rng.normal(shape, "noise", seed, stream, chunk, step + 1)


def euler_step(x_BCTHW: Tensor, velocity_BCTHW: Tensor, *, sigma: float, sigma_next: float) -> Tensor:
    """Move along the learned velocity from one noise level to the next."""
    return x_BCTHW + (sigma_next - sigma) * velocity_BCTHW


SMALLEST_SIGMA = 0.05
"""Below this noise level, an error of predicted data is not divided by less: nothing is served there."""


def velocity_to(x_BCTHW: Tensor, data_BCTHW: Tensor, sigma: float | Tensor) -> Tensor:
    """The velocity at a noise level of a path that ends in these data."""
    floor = sigma.clamp_min(SMALLEST_SIGMA) if isinstance(sigma, Tensor) else max(sigma, SMALLEST_SIGMA)
    return (x_BCTHW - data_BCTHW) / floor


def renoise_step(
    x_BCTHW: Tensor, velocity_BCTHW: Tensor, noise_BCTHW: Tensor, *, sigma: float, sigma_next: float
) -> Tensor:
    """Estimate the data, then add fresh noise up to the next level (self-forcing distillation, Psi of Alg. 1)."""
    data_BCTHW = x_BCTHW - sigma * velocity_BCTHW
    return (1.0 - sigma_next) * data_BCTHW + sigma_next * noise_BCTHW
