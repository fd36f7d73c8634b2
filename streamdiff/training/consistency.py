"""Fewer steps: causal consistency, which readies a model of many steps for distribution matching.

    python -m streamdiff train consistency --data latents --init runs/forcing/dit.safetensors --out runs/consistency

A clip is made noisy at one level for all its chunks, so that a chunk sees its past as noisy as itself, as the engine's
steps do. The teacher takes one step down a fine grid; what the student takes for the data before that step is drawn
towards what the student's running average takes for it after (`distil.consistency_loss`). No trajectory of the teacher
is ever stored.

What a step draws depends on ``(seed, step)`` alone. Axes: B clips, n chunks.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from streamdiff import rng
from streamdiff.config import EngineConfig
from streamdiff.errors import ConfigError
from streamdiff.models.dit import CausalDiT
from streamdiff.options import WEIGHT, Number, Whole
from streamdiff.training import distil, forcing, recipe, student
from streamdiff.training.distil import clip_velocity, conditions, guided
from streamdiff.training.followed import Followed
from streamdiff.training.forcing import Draws, ForcingConfig
from streamdiff.training.latents import Batch, LatentClips
from streamdiff.training.loop import Part, Trainer
from streamdiff.training.sequence import Visit, directly
from streamdiff.training.student import StudentRun, frozen, silent


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsistencyConfig:
    """How the teacher's path is cut, and how the student follows."""

    num_levels: int = 48
    shift: float = 3.0
    served: float = 0.25
    """Share of clips at exactly the levels that are served."""
    guidance: float = 0.0
    """How far the teacher is led away from what it says without sound and prompt."""
    average: float = 0.95
    """How much of its running average a step keeps: the one that is drawn towards, and the one that is saved."""

    def __post_init__(self) -> None:
        if not (0 <= self.served <= 1 and 0 <= self.average < 1 and self.guidance >= 0):
            raise ConfigError(f"served lies in 0..1, average in 0..1 (below 1) and guidance >= 0, got {self}")


class ConsistencyTask:
    """What `streamdiff.training.loop` runs: one batch a step."""

    def __init__(
        self,
        dit: CausalDiT,
        clips: LatentClips,
        config: EngineConfig,
        settings: ConsistencyConfig,
        draws: ForcingConfig,
        *,
        batch: int,
        lr: float,
        seed: int,
        bf16: bool = False,
        visit: Visit = directly,
    ) -> None:
        self._teacher = frozen(dit)
        self.followed = Followed(dit, settings.average)
        self.parts = {"student": Part(module=self.followed, lr=lr, average=0.0, final_lr=0.1)}
        self._clips, self._config, self._settings, self._draws = clips, config, settings, draws
        self._layout = draws.layout(config)
        self._batch, self._seed, self._bf16, self._visit = batch, seed, bf16, visit
        self._grid = distil.consistency_grid(config.sigmas, num_levels=settings.num_levels, shift=settings.shift)

    def gradients(self, step: int) -> Mapping[str, float]:
        self.followed.follow(step)
        dit, settings = self.followed.model, self._settings
        device = dit.device
        batch = self._clips.batch(self._batch, self._draws.num_chunks, seed=self._seed, step=step).to(device)
        draws = forcing.draw(
            self._draws, self._config, tuple(batch.latent_BCTHW.shape), "consistency", self._seed, step
        )
        sigma_B, next_B = self.levels(self._batch, step)
        with torch.autocast(device.type, torch.bfloat16, enabled=self._bf16):
            with torch.no_grad():
                average = self._velocity(self.followed.average, batch, draws)
                teacher = self._velocity(self._teacher, batch, draws)
                if settings.guidance:
                    without = self._velocity(self._teacher, silent(batch, self._clips.empty_text_1PC), draws)
                    teacher = guided(teacher, without, settings.guidance)
            loss = distil.consistency_loss(
                self._velocity(dit, batch, draws),
                average,
                teacher,
                batch.latent_BCTHW,
                draws.noise_BCTHW.to(device),
                sigma_B.to(device),
                next_B.to(device),
            )
        loss.backward()
        return {"loss": float(loss.detach())}

    def levels(self, num_clips: int, step: int) -> tuple[Tensor, Tensor]:
        """A level of the grid for each clip, and the next below it; on the CPU."""
        generator = torch.Generator().manual_seed(rng.seed_of("consistency level", self._seed, step))
        grid = torch.tensor(self._grid)
        any_B = torch.randint(0, len(grid) - 1, (num_clips,), generator=generator)
        served = torch.tensor([self._index(sigma) for sigma in self._config.sigmas[:-1]])
        served_B = served[torch.randint(0, len(served), (num_clips,), generator=generator)]
        is_served_B = torch.rand(num_clips, generator=generator) < self._settings.served
        index_B = torch.where(is_served_B, served_B, any_B)
        return grid[index_B], grid[index_B + 1]

    def _index(self, sigma: float) -> int:
        return min(range(len(self._grid)), key=lambda i: abs(self._grid[i] - sigma))

    def _velocity(self, dit: CausalDiT, batch: Batch, draws: Draws) -> distil.Velocity:
        sink = forcing.sink_of(batch, draws.adaptive_B.to(dit.device))
        given = conditions(dit, sink, batch.text_BPC, batch.audio_BZEA, self._layout, visit=self._visit)
        return clip_velocity(dit, given, self._layout, draws.lead_Bn, sees_sink_B=draws.sees_sink_B, visit=self._visit)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``streamdiff train consistency``."""
    student.add_arguments(parser, lr=1e-4)
    parser.epilog = "--init must be given: the weights of recipe forcing are both teacher and beginning of the student."
    add = parser.add_argument
    add(
        "--grid",
        type=Whole(2, 1000),
        default=48,
        metavar="N",
        help="levels of the teacher's path (default: %(default)s)",
    )
    add("--guidance", type=WEIGHT, default=0.0, help="lead the teacher by sound and prompt (default: %(default)s)")
    add(
        "--average",
        type=Number(0, 0.999999),
        default=0.95,
        help="kept of the running average in a step (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Train the student by causal consistency."""
    if args.init is None:
        raise ConfigError("consistency begins with a trained model; give --init DIT.safetensors of recipe forcing")
    config = student.served_config(args)
    run = StudentRun(args, config)
    settings = ConsistencyConfig(num_levels=args.grid, guidance=args.guidance, average=args.average)
    draws = ForcingConfig(num_chunks=args.chunks, shared=1.0, no_audio=0.0, no_text=0.0, sparse=args.sparse)
    task = ConsistencyTask(
        run.load(args.init),
        run.clips,
        config,
        settings,
        draws,
        batch=args.batch,
        lr=args.lr,
        seed=args.seed,
        bf16=args.bf16,
        visit=run.visit,
    )
    plan = recipe.plan_of(args, budget="15min", warmup_steps=50)
    facts = {**run.facts(), "settings": settings, "draws": draws}

    def sample(trainer: Trainer) -> None:
        run.sample(task.followed.average, trainer.step)

    def finish(trainer: Trainer) -> list[Path]:
        task.followed.follow(trainer.step)
        return [run.save(task.followed.average.state_dict(), trainer)]

    return recipe.conduct("consistency", task, args, plan, facts=facts, sample=sample, finish=finish)
