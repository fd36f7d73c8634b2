"""Few steps: self-forcing distribution matching, with the history that each step really keeps.

    python -m streamdiff train distil --data latents --teacher runs/forcing/dit.safetensors \\
        --init runs/consistency/dit.safetensors --out runs/student

In every step the student rolls clips out as the engine serves them, up to one denoising step drawn for all chunks
(Live Avatar, algorithm 1), and the critic learns to tell noise from data in them. In every fifth step the student moves
too: the frozen teacher and the critic say, from the same noisy clip, what they take for its data, and the student goes
from the critic's answer towards the teacher's (DMD2; Self-Forcing). Both see clips causally, with all chunks at one
level.

What a step draws depends on ``(seed, step)`` alone. Axes: B clips, n chunks.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from streamdiff import rng
from streamdiff.config import EngineConfig
from streamdiff.errors import ConfigError
from streamdiff.models.dit import CausalDiT
from streamdiff.options import RATE, SHARE, WEIGHT, Number, Whole
from streamdiff.training import distil, forcing, lora, recipe, sequence, student
from streamdiff.training.distil import ClipModel, Cut, ScoreLevels, clip_velocity, conditions, guided
from streamdiff.training.forcing import Draws, ForcingConfig
from streamdiff.training.latents import Batch, LatentClips
from streamdiff.training.loop import Part, Trainer
from streamdiff.training.sequence import Layout, Visit, directly
from streamdiff.training.student import StudentRun, silent


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchingConfig:
    """How student and critic learn from each other."""

    num_chunks: int = 7
    sparse: bool = False
    """The student sees the first, the previous and its own chunk (TalkingMachines, 3.2); teacher and critic do not."""
    guidance: float = 1.0
    """How far the teacher is led away from what it says without sound and prompt; 0: not at all."""
    student_every: int = 5
    """The critic learns in every step, the student in every so many-th."""
    adaptive_sink: float = 0.0
    """Share of clips whose sink is a moment of the clip, as after a refresh of the sink; else it is the reference."""
    regression: float = 0.0
    """Weight of the distance of the student's data from real data, from which its noisy clips were made
    (TalkingMachines, 3.3); it holds colours and faces that the scores alone let drift."""
    critic_lr: float = 1e-4
    critic_floor: float = 0.25
    """Level below which the critic's errors weigh no more than at it (`distil.critic_loss`)."""
    average: float = 0.98
    levels: ScoreLevels = field(default_factory=ScoreLevels)

    def __post_init__(self) -> None:
        weights = (self.guidance, self.regression)
        if self.student_every < 1 or min(weights) < 0 or self.critic_lr <= 0 or not 0 <= self.adaptive_sink <= 1:
            raise ConfigError(
                "student_every >= 1, guidance >= 0, regression >= 0, critic_lr > 0 and adaptive_sink in 0..1 are "
                f"needed, got {self.student_every}, {self.guidance}, {self.regression}, {self.critic_lr} and "
                f"{self.adaptive_sink}"
            )

    @property
    def draws(self) -> ForcingConfig:
        """What of the draws of diffusion forcing is used: where the sink stands, and which latent it is."""
        return ForcingConfig(
            num_chunks=self.num_chunks,
            shared=1.0,
            no_sink=0.0,
            adaptive_sink=self.adaptive_sink,
            no_audio=0.0,
            no_text=0.0,
        )

    def student_layout(self, config: EngineConfig) -> Layout:
        """Attention layout of a rollout."""
        if self.sparse:
            return sequence.sparse(self.num_chunks, frames_per_chunk=config.frames_per_chunk)
        return self.draws.layout(config)


class MatchingTask:
    """What `streamdiff.training.loop` runs: one rollout a step.

    Args:
        dit: the student; its parameters that require a gradient learn.
        critic: begins as a copy of the teacher.
        teacher: knows real clips; never changes.
    """

    def __init__(
        self,
        dit: CausalDiT,
        critic: CausalDiT,
        teacher: CausalDiT,
        clips: LatentClips,
        config: EngineConfig,
        settings: MatchingConfig,
        *,
        batch: int,
        lr: float,
        seed: int,
        bf16: bool = False,
        visit: Visit = directly,
    ) -> None:
        self.student, self.critic = dit, critic
        self._teacher = teacher
        # Constant rates (DMD2): the two chase each other, and where the chase ends is not known before.
        betas = (0.0, 0.999)
        self.parts = {
            "student": Part(module=dit, lr=lr, betas=betas, clip_norm=10.0, average=settings.average, final_lr=1.0),
            "critic": Part(
                module=critic, lr=settings.critic_lr, betas=betas, clip_norm=10.0, average=0.0, final_lr=1.0
            ),
        }
        self._clips, self._config, self._settings = clips, config, settings
        self._layout = settings.student_layout(config)
        self._whole = settings.draws.layout(config)
        self._batch, self._seed, self._bf16, self._visit = batch, seed, bf16, visit

    def exit_step(self, step: int) -> int:
        """The denoising step that the rollouts of a training step leave at."""
        return rng.integer(0, self._config.num_steps - 1, "exit", self._seed, step)

    def gradients(self, step: int) -> Mapping[str, float]:
        settings, device = self._settings, self.student.device
        batch = self._clips.batch(self._batch, settings.num_chunks, seed=self._seed, step=step).to(device)
        draws = forcing.draw(settings.draws, self._config, tuple(batch.latent_BCTHW.shape), "distil", self._seed, step)
        sink = forcing.sink_of(batch, draws.adaptive_B.to(device))
        moves = step % settings.student_every == 0

        # A cast of the weights that autocast keeps must not outlive the mode, with or without gradients, it was made
        # in: hence one context for each.
        with torch.set_grad_enabled(moves), self._arithmetic():
            given = Cut(
                conditions(self.student, sink, batch.text_BPC, batch.audio_BZEA, self._layout, visit=self._visit)
            )
        model = ClipModel(self.student, given.tree, self._layout, draws.lead_Bn, visit=self._visit)
        with self._arithmetic():
            rollout = distil.roll_out(
                model,
                lambda chunk, drawn: self._noise(batch, step, chunk, drawn),
                sigmas=self._config.sigmas,
                visible=self._layout.visible,
                exit_step=self.exit_step(step),
                renoise=self._config.renoise,
            )
        data = rollout.data_BCTHW
        numbers: dict[str, float] = {}
        if moves:
            gradient = self._disagreement(data, batch, sink, draws, step)
            with self._arithmetic():
                distil.accumulate(model, rollout, gradient)
            given.go_on()
            numbers["gap"] = float(gradient.abs().sum())
            if settings.regression:
                with self._arithmetic():
                    distance = self._distance(batch, sink, draws, step)
                (settings.regression * distance).backward()
                numbers["distance"] = float(distance.detach())
        del rollout, model, given
        return {"loss": self._teach_critic(data, batch, sink, draws, step), **numbers}

    def _disagreement(self, data_BCTHW: Tensor, batch: Batch, sink: Tensor, draws: Draws, step: int) -> Tensor:
        """Distribution matching gradient: the difference of critic and teacher on the same noisy clips."""
        with torch.no_grad(), self._arithmetic():
            return distil.matching_gradient(
                self._real(batch, sink, draws),
                self._velocity(self.critic, batch, sink, draws),
                data_BCTHW,
                self._fresh(data_BCTHW, "student", step),
                self._settings.levels.draw(self._batch, "student", self._seed, step).to(data_BCTHW.device),
            )

    def _teach_critic(self, data_BCTHW: Tensor, batch: Batch, sink: Tensor, draws: Draws, step: int) -> float:
        """Leave the critic's gradients on generated clips; its loss."""
        with self._arithmetic():
            loss = distil.critic_loss(
                self._velocity(self.critic, batch, sink, draws),
                data_BCTHW,
                self._fresh(data_BCTHW, "critic", step),
                self._settings.levels.draw(self._batch, "critic", self._seed, step).to(data_BCTHW.device),
                floor=self._settings.critic_floor,
            )
        loss.backward()
        return float(loss.detach())

    def _distance(self, batch: Batch, sink_BCTHW: Tensor, draws: Draws, step: int) -> Tensor:
        """Of what the student takes for the data of real clips, made noisy to a served level, from that data."""
        data = batch.latent_BCTHW
        drawn = (
            rng.integer(0, self._config.num_steps - 1, "regression", self._seed, step, b) for b in range(len(data))
        )
        sigma_B = torch.tensor([self._config.sigmas[i] for i in drawn], device=data.device)
        noisy = distil.at_level(data, self._fresh(data, "regression", step), sigma_B)
        velocity = self._velocity(self.student, batch, sink_BCTHW, draws, self._layout)
        return F.mse_loss(distil.data_of(noisy, velocity(noisy, sigma_B), sigma_B), data)

    def _arithmetic(self) -> torch.autocast:
        return torch.autocast(self.student.device.type, torch.bfloat16, enabled=self._bf16)

    def _noise(self, batch: Batch, step: int, chunk: int, drawn: int) -> Tensor:
        B, C, _, H, W = batch.latent_BCTHW.shape
        shape = (B, C, self._layout.frames_per_chunk, H, W)
        return rng.normal(shape, "rollout", self._seed, step, chunk, drawn).to(self.student.device)

    def _fresh(self, data_BCTHW: Tensor, who: str, step: int) -> Tensor:
        return rng.normal(tuple(data_BCTHW.shape), "score", who, self._seed, step).to(data_BCTHW)

    def _velocity(
        self, dit: CausalDiT, batch: Batch, sink_BCTHW: Tensor, draws: Draws, layout: Layout | None = None
    ) -> distil.Velocity:
        layout = self._whole if layout is None else layout
        given = conditions(dit, sink_BCTHW, batch.text_BPC, batch.audio_BZEA, layout, visit=self._visit)
        return clip_velocity(dit, given, layout, draws.lead_Bn, visit=self._visit)

    def _real(self, batch: Batch, sink_BCTHW: Tensor, draws: Draws) -> distil.Velocity:
        led = self._velocity(self._teacher, batch, sink_BCTHW, draws)
        if self._settings.guidance == 0:
            return led
        without = silent(batch, self._clips.empty_text_1PC)
        return guided(led, self._velocity(self._teacher, without, sink_BCTHW, draws), self._settings.guidance)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``streamdiff train distil``."""
    student.add_arguments(parser, lr=3e-5)
    parser.epilog = (
        "The student begins with --init, weights of recipe consistency, or else with those of --teacher. Loss is the "
        "critic's; gap is how far teacher and critic disagree about the student's clips, and need not fall. Judge by "
        "the samples, and stop early: lip sync is learned first, and colours fade afterwards."
    )
    add = parser.add_argument
    add("--teacher", type=Path, required=True, metavar="FILE", help="weights of recipe forcing, which know real clips")
    add("--critic-lr", type=RATE, default=1e-4, help="learning rate of the critic (default: %(default)s)")
    add(
        "--student-every",
        type=Whole(1, 10_000),
        default=5,
        metavar="N",
        help="steps between two of the student (default: 5)",
    )
    add("--guidance", type=WEIGHT, default=1.0, help="lead the teacher by sound and prompt (default: %(default)s)")
    add("--adaptive-sink", type=SHARE, default=0.0, metavar="SHARE", help="clips with a moment of theirs as sink")
    add("--regression", type=WEIGHT, default=0.0, metavar="WEIGHT", help="stay near real clips (default: %(default)s)")
    add(
        "--average",
        type=Number(0, 0.999999),
        default=0.98,
        help="kept of the running average in a move (default: %(default)s)",
    )
    add(
        "--lora",
        type=Whole(1, 4096),
        metavar="RANK",
        help="train adapters of this rank; written as lora.safetensors too",
    )


def models(run: StudentRun, args: argparse.Namespace) -> tuple[CausalDiT, CausalDiT, CausalDiT]:
    """Student, critic and teacher; with adapters, those that begin alike share their weights."""
    teacher = run.load(args.teacher).requires_grad_(requires_grad=False)
    if args.lora is None:
        dit = run.load(args.init or args.teacher)
        critic = run.load(args.teacher)
        return dit, critic, teacher
    dit = lora.twin(teacher) if args.init is None else run.load(args.init)
    critic = lora.twin(teacher)
    lora.adapt(dit, rank=args.lora, seed=rng.seed_of("student", args.seed))
    lora.adapt(critic, rank=args.lora, seed=rng.seed_of("critic", args.seed))
    return dit, critic, teacher


def run(args: argparse.Namespace) -> int:
    """Distil a student of few steps."""
    config = student.served_config(args)
    settings = MatchingConfig(
        num_chunks=args.chunks,
        sparse=args.sparse,
        guidance=args.guidance,
        student_every=args.student_every,
        adaptive_sink=args.adaptive_sink,
        regression=args.regression,
        critic_lr=args.critic_lr,
        average=args.average,
    )
    run = StudentRun(args, config)
    dit, critic, teacher = models(run, args)
    task = MatchingTask(
        dit,
        critic,
        teacher,
        run.clips,
        config,
        settings,
        batch=args.batch,
        lr=args.lr,
        seed=args.seed,
        bf16=args.bf16,
        visit=run.visit,
    )
    facts = {**run.facts(), "settings": settings, "teacher": args.teacher, "lora": args.lora}

    def plain(module: object) -> CausalDiT:
        made = copy.deepcopy(cast("CausalDiT", module))
        return lora.merge_(made) if args.lora else made

    def sample(trainer: Trainer) -> None:
        with trainer.averaged("student") as module:
            run.sample(plain(module), trainer.step)

    def finish(trainer: Trainer) -> Sequence[Path]:
        with trainer.averaged("student") as module:
            written = [run.save(plain(module).state_dict(), trainer)]
            if args.lora:
                written.append(args.out / "lora.safetensors")
                lora.save_lora(module, written[-1])
        return written

    plan = recipe.plan_of(args, budget="15min", warmup_steps=20)
    return recipe.conduct("distil", task, args, plan, facts=facts, sample=sample, finish=finish)
