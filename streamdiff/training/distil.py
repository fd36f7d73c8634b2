"""From many steps to few: causal consistency, then self-forcing distribution matching.

The mathematics, without data or command line; the recipes are `streamdiff.training.consistency` and
`streamdiff.training.matching`. Both start from a model trained with diffusion forcing (`streamdiff.training.forcing`),
and both let a chunk see earlier chunks as the engine does: step j of a chunk attends to what step j of the earlier
chunks kept, at the noise level of that step.

- `consistency_loss`: agree with oneself, one step of the teacher further down; no trajectories are stored
  (Causal-Forcing++, causal consistency).
- `roll_out`, `matching_gradient`, `accumulate`: the student makes a whole clip as it would be served, up to one step
  drawn for all chunks; two models that know the distributions of real and of generated clips say where it should have
  gone (DMD, Yin et al. 2024; Self-Forcing, Huang et al. 2025); the gradient is brought home chunk by chunk (Live
  Avatar, algorithms 1 and 2, but with one evaluation of the two models instead of one per chunk).

What is accumulated is exact, not an approximation: histories are detached, so the gradient of the loss is the sum over
chunks i of ``<dL/d data_i, d data_i/d weights>``, and the first factor is known as soon as the whole clip is.

Axes: B clips, C channels, T latent frames, H height, W width, n chunks of a clip.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from streamdiff import flow, rng
from streamdiff.errors import ConfigError
from streamdiff.models.dit import AudioCondition, CausalDiT, TextCondition
from streamdiff.training.sequence import (
    Layout,
    Remembered,
    Visit,
    chunk_velocity,
    directly,
    hear,
    remember_sink,
    sequence_velocity,
)

_T = TypeVar("_T")
_R = TypeVar("_R", bound="Forgetful")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreLevels:
    """At which noise levels clips are compared: uniform, shifted towards noise, kept away from both ends (DMD)."""

    shift: float = 5.0
    low: float = 0.02
    high: float = 0.98

    def __post_init__(self) -> None:
        if not (0 < self.low < self.high < 1 and self.shift > 0):
            raise ConfigError(
                f"levels for scores lie in 0 < low < high < 1 and shift > 0, got {self.low}, {self.high}, {self.shift}"
            )

    def draw(self, num_clips: int, *key: int | str) -> Tensor:
        """One level per clip, the same for all its chunks; float32 on the CPU, keyed like all noise."""
        generator = torch.Generator().manual_seed(rng.seed_of("level", *key))
        uniform_B = torch.rand(num_clips, generator=generator)
        shifted_B = self.shift * uniform_B / (1.0 + (self.shift - 1.0) * uniform_B)
        return shifted_B.clamp(self.low, self.high)


def consistency_grid(sigmas: Sequence[float], *, num_levels: int = 48, shift: float = 3.0) -> tuple[float, ...]:
    """Levels of the teacher's path from 1 to 0: a shifted grid, and those that are served among them.

    >>> [round(s, 2) for s in consistency_grid((1.0, 0.6, 0.0), num_levels=4, shift=1.0)]
    [1.0, 0.75, 0.6, 0.5, 0.25, 0.0]
    """
    levels = set(flow.shifted_grid(num_levels, shift))
    # A served level next to one of the grid would make a step of no length.
    served = [s for s in sigmas if all(abs(s - level) > 1e-6 for level in levels)]
    return tuple(sorted(levels.union(served), reverse=True))


def at_level(data_BCTHW: Tensor, noise_BCTHW: Tensor, sigma_B: Tensor) -> Tensor:
    """Noisy clips ``(1 - sigma) * data + sigma * noise``, each at its own level."""
    sigma = _per_clip(sigma_B, data_BCTHW)
    return (1 - sigma) * data_BCTHW + sigma * noise_BCTHW


def data_of(noisy_BCTHW: Tensor, velocity_BCTHW: Tensor, sigma_B: Tensor) -> Tensor:
    """Data prediction of a velocity: ``noisy - sigma * velocity``."""
    return noisy_BCTHW - _per_clip(sigma_B, noisy_BCTHW) * velocity_BCTHW


def _per_clip(sigma_B: Tensor, like_BCTHW: Tensor) -> Tensor:
    return sigma_B.to(like_BCTHW).view(-1, *([1] * (like_BCTHW.ndim - 1)))


Velocity = Callable[[Tensor, Tensor], Tensor]
"""From noisy clips ``[B, C, T, H, W]`` and one level per clip ``[B]`` to the velocity of every chunk."""


def guided(velocity: Velocity, without: Velocity, guidance: float) -> Velocity:
    """Classifier-free guidance, ``v + guidance * (v - v_without)``; 0 evaluates the model only once."""
    if guidance == 0:
        return velocity

    def both(noisy_BCTHW: Tensor, sigma_B: Tensor) -> Tensor:
        with_BCTHW = velocity(noisy_BCTHW, sigma_B)
        return with_BCTHW + guidance * (with_BCTHW - without(noisy_BCTHW, sigma_B))

    return both


def consistency_loss(
    student: Velocity,
    average: Velocity,
    teacher: Velocity,
    data_BCTHW: Tensor,
    noise_BCTHW: Tensor,
    sigma_B: Tensor,
    sigma_next_B: Tensor,
) -> Tensor:
    """Squared distance of what the student takes for the data from what its average does one step further down.

    The step is the teacher's own (Euler). At level 0 the next point is the data itself: there is nothing left to judge.
    """
    noisy_BCTHW = at_level(data_BCTHW, noise_BCTHW, sigma_B)
    with torch.no_grad():
        step = _per_clip(sigma_next_B - sigma_B, noisy_BCTHW)
        next_BCTHW = noisy_BCTHW + step * teacher(noisy_BCTHW, sigma_B)
        target_BCTHW = data_of(next_BCTHW, average(next_BCTHW, sigma_next_B), sigma_next_B)
    return F.mse_loss(data_of(noisy_BCTHW, student(noisy_BCTHW, sigma_B), sigma_B), target_BCTHW)


def critic_loss(
    critic: Velocity, data_BCTHW: Tensor, noise_BCTHW: Tensor, sigma_B: Tensor, *, floor: float = 0.0
) -> Tensor:
    """Flow matching on generated clips: the critic learns what the student makes now.

    An error of velocity is one of data, divided by the level; below ``floor`` it is divided by the floor. What is best
    at each level stays best, but clips at rare low levels, of which a young critic is as wrong as of others, no longer
    count for hundreds of them.
    """
    noisy_BCTHW = at_level(data_BCTHW, noise_BCTHW, sigma_B)
    error_B = (critic(noisy_BCTHW, sigma_B) - (noise_BCTHW - data_BCTHW)).square().flatten(1).mean(1)
    weight_B = (sigma_B / sigma_B.clamp_min(floor)).square() if floor else torch.ones_like(sigma_B)
    return (weight_B.to(error_B) * error_B).mean()


@torch.no_grad()
def matching_gradient(
    real: Velocity, fake: Velocity, data_BCTHW: Tensor, noise_BCTHW: Tensor, sigma_B: Tensor
) -> Tensor:
    """Gradient of the distribution matching loss by the generated data, ``(fake - real) / mean|data - real|``.

    Both models estimate the data from the same noisy clip; the mean is over each clip. It is divided by the number of
    values, so that it belongs to ``0.5 * mse(data, (data - gradient).detach())``, the loss that is usually written.
    """
    noisy_BCTHW = at_level(data_BCTHW, noise_BCTHW, sigma_B)
    real_BCTHW = data_of(noisy_BCTHW, real(noisy_BCTHW, sigma_B), sigma_B)
    fake_BCTHW = data_of(noisy_BCTHW, fake(noisy_BCTHW, sigma_B), sigma_B)
    size_B = (data_BCTHW - real_BCTHW).abs().flatten(1).mean(1)
    gradient_BCTHW = (fake_BCTHW - real_BCTHW) / _per_clip(size_B.clamp_min(1e-6), data_BCTHW)
    return gradient_BCTHW / gradient_BCTHW.numel()


class Forgetful(Protocol):
    """State of a chunk (keys and values) that can be detached from the autograd graph."""

    def detach(self: _T) -> _T: ...


class ChunkModel(Protocol[_R]):
    """Denoises one chunk of a clip."""

    def __call__(
        self, noisy_BCTHW: Tensor, *, sigma: float, chunk: int, history: Mapping[int, _R]
    ) -> tuple[Tensor, _R]:
        """Velocity of a chunk, and what it leaves behind, given what earlier chunks left at the same level."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Rollout(Generic[_R]):
    """A clip that the student made, and all that is needed to make each of its chunks again."""

    data_BCTHW: Tensor
    """What the student takes for the data at the exit step."""
    sigma: float
    """Level of the exit step."""
    entered: list[Tensor]
    """Per chunk, what went into the exit step."""
    kept: dict[int, _R]
    """What the exit step of every chunk left behind."""
    visible: tuple[tuple[int, ...], ...]

    @property
    def num_chunks(self) -> int:
        return len(self.visible)


@torch.no_grad()
def roll_out(
    model: ChunkModel[_R],
    noise: Callable[[int, int], Tensor],
    *,
    sigmas: Sequence[float],
    visible: Sequence[Sequence[int]],
    exit_step: int,
    renoise: bool,
) -> Rollout[_R]:
    """Make a clip as it is served: chunk after chunk, every step with the history that this step itself kept.

    Args:
        noise: of a chunk, 0: what it starts from; j + 1: what is added after step j when ``renoise``.
        sigmas: the served levels, from noise to data.
        visible: per chunk, the chunks that it sees; itself may be among them.
        exit_step: the last step taken, the same for all chunks; later ones are not run.
        renoise: the sampler, as `streamdiff.config.EngineConfig.renoise`.
    """
    num_steps = len(sigmas) - 1
    if not 0 <= exit_step < num_steps:
        raise ConfigError(f"there is no step {exit_step} in {num_steps} steps; choose 0..{num_steps - 1}")
    histories: list[dict[int, _R]] = [{} for _ in range(exit_step + 1)]
    entered: list[Tensor] = []
    made: list[Tensor] = []
    for chunk in range(len(visible)):
        x = noise(chunk, 0)
        for step, history in enumerate(histories):
            sigma = sigmas[step]
            seen = {c: history[c] for c in visible[chunk] if c != chunk}
            velocity, history[chunk] = model(x, sigma=sigma, chunk=chunk, history=seen)
            if step == exit_step:
                entered.append(x)
                made.append(flow.euler_step(x, velocity, sigma=sigma, sigma_next=0.0))
            elif renoise:
                x = flow.renoise_step(x, velocity, noise(chunk, step + 1), sigma=sigma, sigma_next=sigmas[step + 1])
            else:
                x = flow.euler_step(x, velocity, sigma=sigma, sigma_next=sigmas[step + 1])
        for history in histories[:-1]:
            # The exit step's history is kept whole: chunks are made again from it.
            for old in [c for c in history if not any(c in later for later in visible[chunk + 1 :])]:
                del history[old]
    return Rollout(
        data_BCTHW=torch.cat(made, dim=2),
        sigma=sigmas[exit_step],
        entered=entered,
        kept=histories[-1],
        visible=tuple(tuple(seen) for seen in visible),
    )


def remake(model: ChunkModel[_R], rollout: Rollout[_R], chunk: int) -> Tensor:
    """Recompute one chunk of a rollout, differentiably: the same data from the same inputs and history."""
    seen = {c: rollout.kept[c].detach() for c in rollout.visible[chunk] if c != chunk}
    x = rollout.entered[chunk]
    velocity, _ = model(x, sigma=rollout.sigma, chunk=chunk, history=seen)
    return flow.euler_step(x, velocity, sigma=rollout.sigma, sigma_next=0.0)


def accumulate(model: ChunkModel[_R], rollout: Rollout[_R], gradient_BCTHW: Tensor) -> None:
    """Add ``d <gradient, data> / d weights`` to the gradients of the model's weights, one chunk in memory at a time.

    Uses the rollout up: what no chunk needs any more is let go.
    """
    parts = gradient_BCTHW.chunk(rollout.num_chunks, dim=2)
    for chunk in reversed(range(rollout.num_chunks)):
        rollout.kept.pop(chunk)
        data_BCTHW = remake(model, rollout, chunk)
        torch.autograd.backward(data_BCTHW, parts[chunk])
        rollout.entered.pop()


def mapped(tree: _T, function: Callable[[Tensor], Tensor]) -> _T:
    """The same tuples and dataclasses with other tensors."""
    if isinstance(tree, Tensor):
        return cast("_T", function(tree))
    if isinstance(tree, tuple):
        return cast("_T", tuple(mapped(part, function) for part in cast("tuple[object, ...]", tree)))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        parts = {field.name: mapped(getattr(tree, field.name), function) for field in dataclasses.fields(tree)}
        return cast("_T", dataclasses.replace(cast("Any", tree), **parts))
    return tree


class Cut(Generic[_T]):
    """A cut in the autograd graph: many backward passes accumulate gradients there, one pass takes them on.

    What the prompt, the sound and the reference become is the same for all chunks. Without the cut the first chunk's
    backward pass would free what the second needs; with it they are computed once and still learn.
    """

    def __init__(self, tree: _T) -> None:
        self._before: list[Tensor] = []
        self._after: list[Tensor] = []

        def leaf(x: Tensor) -> Tensor:
            if not x.requires_grad:
                return x
            self._before.append(x)
            self._after.append(x.detach().requires_grad_())
            return self._after[-1]

        self.tree: _T = mapped(tree, leaf)

    def go_on(self) -> None:
        """Propagate the accumulated gradients to the weights."""
        reached = [(x, y.grad) for x, y in zip(self._before, self._after, strict=True) if y.grad is not None]
        if reached:
            torch.autograd.backward([x for x, _ in reached], [gradient for _, gradient in reached])


@dataclass(frozen=True, slots=True, eq=False)
class Conditions:
    """Conditions of clips as the model encodes them: prompt, sound and reference."""

    text: TextCondition
    audio: AudioCondition | None
    """What each chunk hears; chunks in the batch axis, clip by clip."""
    sink: Remembered


def conditions(
    dit: CausalDiT,
    reference_BCTHW: Tensor,
    text_BPC: Tensor,
    audio_BZEA: Tensor | None,
    layout: Layout,
    *,
    visit: Visit = directly,
) -> Conditions:
    """Encode reference, prompt and sound once for all chunks and levels of clips."""
    text = dit.text_condition(text_BPC)
    return Conditions(
        text=text,
        audio=None if audio_BZEA is None else hear(dit, audio_BZEA, layout.num_chunks),
        sink=remember_sink(dit, reference_BCTHW, text, visit=visit),
    )


def clip_velocity(
    dit: CausalDiT,
    given: Conditions,
    layout: Layout,
    lead_Bn: Tensor,
    *,
    sees_sink_B: Tensor | None = None,
    visit: Visit = directly,
) -> Velocity:
    """Velocity of whole clips with all chunks at one level: a chunk sees earlier chunks as noisy as itself."""

    def velocity(noisy_BCTHW: Tensor, sigma_B: Tensor) -> Tensor:
        return sequence_velocity(
            dit,
            noisy_BCTHW,
            sigma_B[:, None].expand(-1, layout.num_chunks),
            given.text,
            given.audio,
            layout,
            sink=given.sink,
            lead_Bn=lead_Bn,
            sees_sink_B=sees_sink_B,
            visit=visit,
        )

    return velocity


class ClipModel:
    """A DiT that makes clips chunk by chunk: the `ChunkModel` of `roll_out`."""

    def __init__(
        self, dit: CausalDiT, given: Conditions, layout: Layout, lead_Bn: Tensor, *, visit: Visit = directly
    ) -> None:
        self._dit, self._given, self._layout, self._lead_Bn, self._visit = dit, given, layout, lead_Bn, visit

    def __call__(
        self, noisy_BCTHW: Tensor, *, sigma: float, chunk: int, history: Mapping[int, Remembered]
    ) -> tuple[Tensor, Remembered]:
        given, layout = self._given, self._layout
        return chunk_velocity(
            self._dit,
            noisy_BCTHW,
            torch.full((noisy_BCTHW.shape[0],), sigma, dtype=torch.float64),
            given.text,
            None if given.audio is None else _heard_by(given.audio, chunk, layout),
            first_frame=layout.first_frames[chunk],
            history=[(layout.first_frames[c], kept) for c, kept in sorted(history.items())],
            sink=given.sink,
            lead_B=self._lead_Bn[:, chunk],
            visit=self._visit,
        )


def _heard_by(audio: AudioCondition, chunk: int, layout: Layout) -> AudioCondition:
    """What one chunk of every clip hears."""
    n, T = layout.num_chunks, layout.frames_per_chunk

    def frames(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, n, T))[:, chunk].flatten(0, 1)

    def chunks(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, n))[:, chunk]

    return AudioCondition(
        scales=tuple(map(chunks, audio.scales)),
        shifts=tuple(map(chunks, audio.shifts)),
        keys=tuple(map(frames, audio.keys)),
        values=tuple(map(frames, audio.values)),
    )
