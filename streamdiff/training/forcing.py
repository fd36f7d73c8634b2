"""Flow matching with diffusion forcing: every chunk learns to be denoised from a history as noisy as the engine's.

    python -m streamdiff train forcing --data latents --out runs/forcing --budget 40min

A clip is a row of chunks. Each gets its own noise level (Chen et al. 2024, 2407.01392), or all get the same, which is
how a denoising step of the engine sees its history: kept from the same step, as noisy as itself (Live Avatar, 4.2). The
sink is dropped now and then, so that a stream without one is a stream the model knows; it is the reference or, as after
a refresh, another moment of the clip; and it leads each chunk by another distance (rolling RoPE).

What a step draws depends on ``(seed, step)`` alone.

Axes: N clips on disk, B clips of a batch, n chunks of a clip, T latent frames, C channels, H height, W width, Z hidden
states of the speech encoder, E their width, A video frames, P prompt tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from streamdiff import flow, rng
from streamdiff.config import EngineConfig, sparse
from streamdiff.errors import ConfigError
from streamdiff.models.dit import CausalDiT, initialise
from streamdiff.models.text import HashedText
from streamdiff.options import SHARE, WEIGHT, Whole
from streamdiff.training import recipe, sequence
from streamdiff.training.codec import attention_map, load_codec
from streamdiff.training.latents import Batch, LatentClips
from streamdiff.training.loop import Part, Trainer
from streamdiff.training.samples import draw_samples
from streamdiff.training.sequence import Layout, Visit, directly, sequence_velocity

_LEAST_SIGMA = 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class ForcingConfig:
    """Shares and distributions of what a step draws."""

    num_chunks: int = 7
    shared: float = 0.6
    """Share of clips with one noise level for all chunks."""
    served: float = 0.15
    """Share of levels that are exactly those of the preset's steps."""
    shift: float = 3.0
    """How far levels are moved towards noise."""
    no_sink: float = 0.15
    adaptive_sink: float = 0.5
    """Share of clips whose sink is a moment of the clip, not the reference."""
    stream_start: float = 0.2
    """Share of clips that begin where a stream begins, with the sink where it stands before it rolls."""
    no_audio: float = 0.1
    no_text: float = 0.1
    sparse: bool = False
    """See the first, the previous and the own chunk, all at one level (TalkingMachines, 3.2)."""
    portrait: float = 0.0
    """How much more errors count where a portrait has its face and mouth (`codec.attention_map`): 0 as anywhere, 1 as
    the codec counts them."""
    visible: float = 0.0
    """How much more errors count in channels that change pixels more: 0 alike, 1 as if pixels were compared."""

    def __post_init__(self) -> None:
        shares = ("shared", "served", "visible", "no_sink", "adaptive_sink", "stream_start", "no_audio", "no_text")
        wrong = {name: getattr(self, name) for name in shares if not 0 <= getattr(self, name) <= 1}
        if wrong or self.num_chunks < 1 or self.shift <= 0 or self.portrait < 0:
            raise ConfigError(f"shares lie in 0..1, num_chunks >= 1, shift > 0 and portrait >= 0, got {self}")

    def layout(self, config: EngineConfig) -> Layout:
        """Attention layout of a clip of this preset."""
        if self.sparse:
            return sequence.sparse(self.num_chunks, frames_per_chunk=config.frames_per_chunk)
        return sequence.windowed(
            self.num_chunks,
            window_chunks=config.memory.window_chunks,
            frames_per_chunk=config.frames_per_chunk,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """All that is random in one step; on the CPU."""

    sigma_Bn: Tensor
    noise_BCTHW: Tensor
    lead_Bn: Tensor
    """Latent frames by which the sink leads each chunk."""
    sees_sink_B: Tensor
    adaptive_B: Tensor
    """Frame of the clip that is the sink, or -1: the reference."""
    hears_B: Tensor
    reads_B: Tensor


def draw(settings: ForcingConfig, config: EngineConfig, shape: tuple[int, ...], *key: int | str) -> Draws:
    """What is drawn for a batch of latents of this shape; the same key, the same bits."""
    B, n = shape[0], settings.num_chunks
    generator = torch.Generator().manual_seed(rng.seed_of("forcing", *key))

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator)

    def level(*size: int) -> Tensor:
        even = uniform(*size)
        free = settings.shift * even / (1.0 + (settings.shift - 1.0) * even)
        steps = torch.tensor(config.sigmas[:-1])
        served = steps[torch.randint(0, len(steps), size, generator=generator)]
        return torch.where(uniform(*size) < settings.served, served, free)

    own_Bn, common_B1 = level(B, n), level(B, 1)
    sigma_Bn = torch.where(uniform(B, 1) < (1.0 if settings.sparse else settings.shared), common_B1, own_Bn)
    memory = config.memory
    lead_Bn = torch.randint(memory.sink_lead_min, memory.sink_lead_max + 1, (B, n), generator=generator)
    # Before it rolls the sink stands still, and every chunk comes nearer to it (`streamdiff.rope.sink_position`).
    first_n = torch.arange(n) * config.frames_per_chunk
    still_Bn = torch.maximum(lead_Bn, memory.sink_position - first_n)
    lead_Bn = torch.where(uniform(B, 1) < settings.stream_start, still_Bn, lead_Bn)
    frame_B = torch.randint(0, shape[2], (B,), generator=generator)
    return Draws(
        sigma_Bn=sigma_Bn,
        noise_BCTHW=torch.randn(shape, generator=generator),
        lead_Bn=lead_Bn,
        sees_sink_B=uniform(B) >= settings.no_sink,
        adaptive_B=torch.where(uniform(B) < settings.adaptive_sink, frame_B, -1),
        hears_B=uniform(B) >= settings.no_audio,
        reads_B=uniform(B) >= settings.no_text,
    )


def forcing_loss(
    dit: CausalDiT,
    batch: Batch,
    draws: Draws,
    layout: Layout,
    empty_text_1PC: Tensor,
    *,
    weight: Tensor | None = None,
    visit: Visit = directly,
) -> Tensor:
    """Mean squared error of the velocity, per chunk of each clip, ``[B, n]`` float32.

    Args:
        empty_text_1PC: embedding of no prompt, for the clips that have to do without.
        weight: how much errors count, by channel and place; spread over the latents, 1 on average (`error_weights`).
    """
    device = dit.device
    n = layout.num_chunks
    latent = batch.latent_BCTHW
    noise = draws.noise_BCTHW.to(device)
    sigma = draws.sigma_Bn.to(device).repeat_interleave(layout.frames_per_chunk, 1)[:, None, :, None, None]
    noisy = torch.lerp(latent, noise, sigma)
    audio_BZEA = batch.audio_BZEA * draws.hears_B.to(device).view(-1, 1, 1, 1)
    text_BPC = _without_prompt(batch.text_BPC, empty_text_1PC.to(device), draws.reads_B.to(device))
    text = dit.text_condition(text_BPC)
    sink = sequence.remember_sink(dit, sink_of(batch, draws.adaptive_B.to(device)), text, visit=visit)
    velocity = sequence_velocity(
        dit,
        noisy,
        draws.sigma_Bn.to(device),
        text,
        sequence.hear(dit, audio_BZEA, n),
        layout,
        sink=sink,
        lead_Bn=draws.lead_Bn,
        sees_sink_B=draws.sees_sink_B,
        visit=visit,
    )
    error = (velocity - (noise - latent)).square()
    if dit.config.predicts_data:
        # Read as a velocity, an error of the data counts by 1 / sigma^2: without a bound, nearly clean chunks decide.
        error = error * (sigma.clamp_min(flow.SMALLEST_SIGMA) / sigma.clamp_min(_LEAST_SIGMA)).square()
    if weight is not None:
        error = error * weight.to(error)
    return error.unflatten(2, (n, -1)).mean(dim=(1, 3, 4, 5))


def error_weights(settings: ForcingConfig, latent_hw: tuple[int, int], visibility_C: Tensor | None) -> Tensor | None:
    """`ForcingConfig.portrait` and `ForcingConfig.visible` as weights ``[C, 1, H, W]``, 1 on average.

    None when all errors count alike. Raises ConfigError when it is not known how visible channels are.
    """
    if settings.portrait == 0 and settings.visible == 0:
        return None
    cells_HW = F.adaptive_avg_pool2d(attention_map(16 * max(latent_hw))[None], latent_hw)[0]
    place_HW = 1 + settings.portrait * (cells_HW - 1)
    channel_C = torch.ones(1)
    if settings.visible:
        if visibility_C is None:
            raise ConfigError("these latents do not say how visible their channels are; encode the clips again")
        channel_C = visibility_C ** (2 * settings.visible)
    weight_C1HW = channel_C.view(-1, 1, 1, 1) * place_HW
    return weight_C1HW / weight_C1HW.mean()


def _without_prompt(text_BPC: Tensor, empty_1PC: Tensor, reads_B: Tensor) -> Tensor:
    longest = max(text_BPC.shape[1], empty_1PC.shape[1])
    text_BPC, empty_1PC = (F.pad(t, (0, 0, 0, longest - t.shape[1])) for t in (text_BPC, empty_1PC))
    return torch.where(reads_B.view(-1, 1, 1), text_BPC, empty_1PC)


def sink_of(batch: Batch, adaptive_B: Tensor) -> Tensor:
    """The latent frame that is each clip's sink: that frame of the clip, or where it is -1 the reference."""
    other = batch.elsewhere_BCTHW
    if other is None:
        index = adaptive_B.clamp_min(0).view(-1, 1, 1, 1, 1)
        other = batch.latent_BCTHW.take_along_dim(index, dim=2)
    return torch.where(adaptive_B.view(-1, 1, 1, 1, 1) >= 0, other, batch.reference_BCTHW)


class ForcingTask:
    """What `streamdiff.training.loop` runs: one batch a step."""

    def __init__(
        self,
        dit: CausalDiT,
        clips: LatentClips,
        config: EngineConfig,
        settings: ForcingConfig,
        *,
        batch: int,
        lr: float,
        seed: int,
        bf16: bool = False,
        visit: Visit = directly,
    ) -> None:
        self.dit = dit
        self.parts = {"dit": Part(module=dit, lr=lr)}
        self._clips, self._config, self._settings = clips, config, settings
        self._layout = settings.layout(config)
        self._batch, self._seed, self._bf16, self._visit = batch, seed, bf16, visit
        self._weight = error_weights(settings, config.latent_hw, clips.visibility_C)

    def gradients(self, step: int) -> Mapping[str, float]:
        batch = self._clips.batch(self._batch, self._settings.num_chunks, seed=self._seed, step=step)
        loss_Bn, sigma_Bn = self._loss(batch, self._seed, step)
        loss_Bn.mean().backward()
        loss_Bn = loss_Bn.detach().cpu()
        noisy_Bn = sigma_Bn > 0.75
        parts = {"loss": loss_Bn, "loss_noisy": loss_Bn[noisy_Bn], "loss_clean": loss_Bn[~noisy_Bn]}
        return {name: float(part.mean()) for name, part in parts.items() if part.numel()}

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """On the clips that are held out, with draws that never change."""
        batch = self._clips.held_out_batch(self._settings.num_chunks)
        losses = [self._loss(batch, "held out", number)[0].mean() for number in range(4)]
        return float(torch.stack(losses).mean())

    def _loss(self, batch: Batch, *key: int | str) -> tuple[Tensor, Tensor]:
        device = self.dit.device
        draws = draw(self._settings, self._config, tuple(batch.latent_BCTHW.shape), *key)
        with torch.autocast(device.type, torch.bfloat16, enabled=self._bf16):
            loss_Bn = forcing_loss(
                self.dit,
                batch.to(device),
                draws,
                self._layout,
                self._clips.empty_text_1PC,
                weight=self._weight,
                visit=self._visit,
            )
        return loss_Bn, draws.sigma_Bn


def random_dit(config: EngineConfig, *, seed: int) -> CausalDiT:
    """A DiT with random weights, its output head zero.

    The head begins at zero and noise levels move little, as in the published model (Wan2.1 ``init_weights``).
    """
    dit = CausalDiT(config.dit)
    initialise(dit, seed=seed)
    with torch.no_grad():
        dit.head.head.weight.zero_()
        cast("torch.nn.Linear", dit.time_projection[1]).weight.mul_(0.02 * config.dit.dim**0.5)
    return dit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``streamdiff train forcing``."""
    recipe.add_training_arguments(parser, data="folder with latents.safetensors", batch=8, lr=1.2e-3)
    add = parser.add_argument
    add("--chunks", type=Whole(1, 64), default=7, help="chunks of a clip (default: %(default)s)")
    add("--shared-only", action="store_true", help="one noise level a clip, and see the first and previous chunk only")
    add("--served", type=SHARE, default=0.15, metavar="SHARE",
        help="noise levels that are the preset's own, not just any (default: %(default)s)")  # fmt: skip
    add("--portrait", type=WEIGHT, default=0.0, metavar="WEIGHT",
        help="errors at face and mouth count more: 1 as in the codec's training (default: as anywhere)")  # fmt: skip
    add("--visible", type=SHARE, default=0.0, metavar="SHARE",
        help="errors in channels that change pixels more count more: 1 as in pixels (default: alike)")  # fmt: skip
    add(
        "--held-out",
        type=Whole(0, 100_000),
        default=16,
        metavar="N",
        help="clips kept to judge by (default: %(default)s)",
    )
    add("--bf16", action="store_true", help="multiply in bfloat16: about 1.7 times as fast on a CPU that has it")
    add("--recompute", action="store_true", help="keep one layer of activations: less memory, a third more work")
    add("--codec", type=Path, metavar="FILE", help="trained codec; with it, pictures of samples while it runs")


def run(args: argparse.Namespace) -> int:
    """Train the video model."""
    config = recipe.preset_of(args)
    settings = ForcingConfig(
        num_chunks=args.chunks,
        sparse=args.shared_only,
        served=args.served,
        portrait=args.portrait,
        visible=args.visible,
    )
    encoder = HashedText(config.dit.text_dim, max_tokens=config.dit.text_len)
    clips = LatentClips(args.data, config, encoder, held_out=args.held_out)
    codec = None if args.codec is None else load_codec(args.codec, config.vae)
    dit = _dit_to_train(args, config)
    visit = sequence.recomputed if args.recompute else directly
    task = ForcingTask(
        dit, clips, config, settings, batch=args.batch, lr=args.lr, seed=args.seed, bf16=args.bf16, visit=visit
    )

    def sample(trainer: Trainer) -> None:
        with trainer.averaged("dit"):
            if clips.held_out:
                trainer.note({"held_out": task.held_out_loss()})
            if codec is not None and clips.held_out:
                batch = clips.held_out_batch(settings.num_chunks).to(dit.device)
                shown = sparse(config) if settings.sparse else config
                draw_samples(dit, codec, shown, batch, args.out / f"samples_{trainer.step:06d}.png")

    def finish(trainer: Trainer) -> list[Path]:
        path = args.out / "dit.safetensors"
        recipe.save_average(trainer, "dit", path)
        return [path]

    asked = {name: getattr(args, name) for name in ("seed", "batch", "lr", "bf16", "init")}
    facts = {"preset": config.name, **asked, "settings": settings, "clips": clips.num_clips}
    return recipe.conduct("forcing", task, args, recipe.plan_of(args), facts=facts, sample=sample, finish=finish)


def _dit_to_train(args: argparse.Namespace, config: EngineConfig) -> CausalDiT:
    """Random weights or those of ``--init``, on the device."""
    dit = random_dit(config, seed=args.seed)
    if args.init is not None:
        recipe.load_weights(dit, args.init)
    dit.to(args.device)
    # Absent from this data; they would only decay.
    for name, parameter in dit.named_parameters():
        if name.startswith("frame_packer.") or name == "cond_encoder.weight":
            parameter.requires_grad_(False)
    return dit
