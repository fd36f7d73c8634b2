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
import copy
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from streamdiff import flow, rng
from streamdiff.config import EngineConfig, sparse
from streamdiff.errors import ConfigError, InputError
from streamdiff.media import contact_sheet
from streamdiff.memory import sink_lead
from streamdiff.models.dit import CausalDiT, initialise
from streamdiff.models.text import HashedText, TextEncoder
from streamdiff.models.vae import to_rgb8
from streamdiff.pipeline.denoise import DenoiseStage
from streamdiff.pipeline.packet import Command, Packet, SetReference, SwitchPrompt
from streamdiff.training import recipe, sequence
from streamdiff.training.codec import Codec, attention_map, load_codec
from streamdiff.training.loop import Part, Trainer
from streamdiff.training.sequence import Layout, Visit, directly, sequence_velocity

LATENTS = "latents.safetensors"

_LEAST_SIGMA = 0.6


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Clips to learn from."""

    latent_BCTHW: Tensor
    """Normalised, ``n * frames_per_chunk`` latent frames."""
    reference_BCTHW: Tensor
    """One latent frame that shows who it is."""
    audio_BZEA: Tensor
    """What is heard while they are seen."""
    text_BPC: Tensor
    """Prompt embeddings, padded with zeros to the same length."""
    elsewhere_BCTHW: Tensor | None = None
    """One latent frame from any moment of the same clip, as an adaptive sink; None: take one of ``latent_BCTHW``."""

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device, float32."""
        elsewhere = self.elsewhere_BCTHW
        return Batch(
            latent_BCTHW=self.latent_BCTHW.to(device, torch.float32),
            reference_BCTHW=self.reference_BCTHW.to(device, torch.float32),
            audio_BZEA=self.audio_BZEA.to(device, torch.float32),
            text_BPC=self.text_BPC.to(device, torch.float32),
            elsewhere_BCTHW=None if elsewhere is None else elsewhere.to(device, torch.float32),
        )


def embedded_prompts(encoder: TextEncoder, prompts: list[str]) -> Tensor:
    """Embeddings of several prompts, padded with zeros to the longest, ``[len(prompts), P, C]``.

    The model pads with zeros as well (`CausalDiT.text_condition`), so a batch is read as its prompts are.
    """
    rows = [encoder.encode(prompt)[0] for prompt in prompts]
    longest = max(len(row) for row in rows)
    return torch.stack([F.pad(row, (0, 0, 0, longest - len(row))) for row in rows])


class LatentClips:
    """Encoded clips on disk: ``latents.safetensors``, as ``streamdiff train encode`` writes it.

    Tensors ``latent`` [N, C, T, H, W] and ``reference`` [N, C, H, W] (float16, normalised), ``audio`` [N, Z, E, A]
    (float16; A = T * temporal_factor video frames, those of the first latent frame first), ``prompt`` [N] (index into
    the JSON list ``prompts`` of the metadata); and ``visibility`` [C] (`codec.visibility`), which may be missing.
    Clips are read when they are drawn; the file stays on disk.

    Args:
        held_out: how many clips at the end are never drawn by `batch`; `held_out_batch` gives them.

    Raises:
        InputError: no such file, or not of this shape, or of another preset.
    """

    def __init__(self, folder: Path, config: EngineConfig, encoder: TextEncoder, *, held_out: int = 0) -> None:
        path = folder / LATENTS
        if not path.is_file():
            raise InputError(f"{path} is not there; write it with `streamdiff train encode --out {folder}`")
        self.path = path
        self._config = config
        try:
            self._file = safe_open(path, framework="pt")
            about = self._file.metadata() or {}
            shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()}  # noqa: SIM118
            prompts = list(map(str, json.loads(about["prompts"])))
            preset = about.get("config", config.name)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(
                f"{path} is no file of encoded clips ({error}); write it with `streamdiff train encode`"
            ) from error
        if preset != config.name:
            raise InputError(
                f"{path} was encoded for the preset {preset!r}, not {config.name!r}; give --preset {preset}"
            )
        self._check(shapes)
        self.num_clips, _, self.num_frames = shapes["latent"][:3]
        self._slices = {name: self._file.get_slice(name) for name in ("latent", "reference", "audio")}
        self.visibility_C = self._file.get_tensor("visibility").float() if "visibility" in shapes else None
        """How much an error in each channel is seen, or None in files that do not say so."""
        self._prompt_N = self._file.get_tensor("prompt").tolist()
        if not all(0 <= p < len(prompts) for p in self._prompt_N):
            raise InputError(f"{path} names a prompt beyond its list of {len(prompts)}; write it again")
        self.prompts = prompts
        texts = embedded_prompts(encoder, [*prompts, ""])
        self._text_NPC, self.empty_text_1PC = texts[:-1], texts[-1:]
        if not 0 <= held_out < self.num_clips:
            raise InputError(f"{path} has {self.num_clips} clips: too few to hold {held_out} of them out; encode more")
        self.held_out = held_out

    def _check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        audio, (H, W), C = self._config.dit.audio, self._config.latent_hw, self._config.dit.in_dim
        if audio is None:
            raise ConfigError(f"the preset {self._config.name!r} hears nothing; take one with audio injectors")
        missing = {"latent", "reference", "audio", "prompt"} - shapes.keys()
        if missing:
            raise InputError(
                f"{self.path} has no tensor {sorted(missing)[0]!r}; write it with `streamdiff train encode`"
            )
        N, T = (*shapes["latent"], 0, 0, 0)[0:3:2]
        expected = {
            "latent": (N, C, T, H, W),
            "reference": (N, C, H, W),
            "audio": (N, audio.num_features, audio.feature_dim, T * self._config.vae.temporal_factor),
            "prompt": (N,),
        }
        for name, shape in expected.items():
            if shapes[name] != shape:
                raise InputError(
                    f"{self.path}: {name} is {list(shapes[name])} but the preset {self._config.name!r} wants "
                    f"{list(shape)}; encode the clips with this preset"
                )

    def batch(self, size: int, num_chunks: int, *, seed: int, step: int) -> Batch:
        """Clips drawn for this step, each cut at a latent frame drawn for it."""
        generator = torch.Generator().manual_seed(rng.seed_of("clips", seed, step))
        chosen_B = torch.randint(0, self.num_clips - self.held_out, (size,), generator=generator)
        return self._cut(chosen_B.tolist(), num_chunks, generator)

    def held_out_batch(self, num_chunks: int) -> Batch:
        """The clips that are held out, cut at latent frames that never change."""
        generator = torch.Generator().manual_seed(rng.seed_of("held out"))
        return self._cut(list(range(self.num_clips - self.held_out, self.num_clips)), num_chunks, generator)

    def _cut(self, chosen: list[int], num_chunks: int, generator: torch.Generator) -> Batch:
        length, factor = num_chunks * self._config.frames_per_chunk, self._config.vae.temporal_factor
        if length > self.num_frames:
            most = self.num_frames // self._config.frames_per_chunk
            raise InputError(f"{self.path} has clips of {self.num_frames} latent frames: at most --chunks {most}")
        first_B = torch.randint(0, self.num_frames - length + 1, (len(chosen),), generator=generator).tolist()
        other_B = torch.randint(0, self.num_frames, (len(chosen),), generator=generator).tolist()
        latent, reference, audio = (self._slices[name] for name in ("latent", "reference", "audio"))
        return Batch(
            latent_BCTHW=torch.stack([latent[i, :, t : t + length] for i, t in zip(chosen, first_B, strict=True)]),
            reference_BCTHW=torch.stack([reference[i] for i in chosen]).unsqueeze(2),
            audio_BZEA=torch.stack(
                [audio[i, :, :, t * factor : (t + length) * factor] for i, t in zip(chosen, first_B, strict=True)]
            ),
            text_BPC=self._text_NPC[[self._prompt_N[i] for i in chosen]],
            elsewhere_BCTHW=torch.stack([latent[i, :, t : t + 1] for i, t in zip(chosen, other_B, strict=True)]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ForcingConfig:
    """What is drawn how often."""

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
        """Who sees whom in a clip of this preset."""
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
    sink = sequence.remember_sink(dit, _sink_of(batch, draws.adaptive_B.to(device)), text, visit=visit)
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


def _sink_of(batch: Batch, adaptive_B: Tensor) -> Tensor:
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


@torch.inference_mode()
def serve(dit: CausalDiT, config: EngineConfig, batch: Batch, *, seed: int = 0) -> Tensor:
    """Latents of the batch's sound as the engine would make them, by its own denoising stage, ``[B, C, T, H, W]``."""
    T, B = config.frames_per_chunk, len(batch.latent_BCTHW)
    num_chunks = batch.latent_BCTHW.shape[2] // T
    config = dataclasses.replace(config, motion_latents=0)
    # A copy: the stage lays weights out for serving, which ends their learning.
    stage = DenoiseStage(copy.deepcopy(dit), config, range(config.num_steps), seed=seed, num_streams=B)
    opening: tuple[Command, ...] = (SetReference(batch.reference_BCTHW, None), SwitchPrompt(batch.text_BPC))
    made: list[Tensor] = []
    for chunk, audio_BZEA in enumerate(batch.audio_BZEA.chunk(num_chunks, dim=3)):
        memory = config.memory
        packet = Packet(
            chunk=chunk,
            epoch=0,
            lead=sink_lead(seed=seed, stream=0, chunk=chunk, low=memory.sink_lead_min, high=memory.sink_lead_max),
            latent_BCTHW=flow.initial_noise(
                (B, config.dit.in_dim, T, *config.latent_hw), seed=seed, stream=0, chunk=chunk
            ),
            audio_BZEA=audio_BZEA,
            commands=opening if chunk == 0 else (),
        )
        made.append(stage.step(packet).latent_BCTHW)
    return torch.cat(made, dim=2)


_SHOWN_CLIPS, _SHOWN_FRAMES = 4, 12


@torch.inference_mode()
def draw_samples(dit: CausalDiT, codec: Codec, config: EngineConfig, batch: Batch, path: Path) -> None:
    """A picture of what the model makes of clips it never saw: above, the clip through the codec; below, its own."""
    few = Batch(
        *(t[:_SHOWN_CLIPS] for t in (batch.latent_BCTHW, batch.reference_BCTHW, batch.audio_BZEA, batch.text_BPC))
    )
    rows: list[Tensor] = []
    films = [to_rgb8(codec.decode(latents.cpu())) for latents in (few.latent_BCTHW, serve(dit, config, few))]
    for of_clip in zip(*films, strict=True):
        rows += [film_THWC[_spread(len(film_THWC))] for film_THWC in of_clip]
    contact_sheet(torch.cat(rows), path, columns=_SHOWN_FRAMES)


def _spread(length: int) -> list[int]:
    return [round(i * (length - 1) / (_SHOWN_FRAMES - 1)) for i in range(_SHOWN_FRAMES)]


def random_dit(config: EngineConfig, *, seed: int) -> CausalDiT:
    """A DiT to begin with: it does nothing yet.

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
    add("--chunks", type=int, default=7, help="chunks of a clip (default: %(default)s)")
    add("--shared-only", action="store_true", help="one noise level a clip, and see the first and previous chunk only")
    add("--served", type=float, default=0.15, metavar="SHARE",
        help="noise levels that are the preset's own, not just any (default: %(default)s)")  # fmt: skip
    add("--portrait", type=float, default=0.0, metavar="WEIGHT",
        help="errors at face and mouth count more: 1 as in the codec's training (default: as anywhere)")  # fmt: skip
    add("--visible", type=float, default=0.0, metavar="SHARE",
        help="errors in channels that change pixels more count more: 1 as in pixels (default: alike)")  # fmt: skip
    add("--held-out", type=int, default=16, metavar="N", help="clips kept to judge by (default: %(default)s)")
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
    dit = random_dit(config, seed=args.seed)
    if args.init is not None:
        recipe.load_weights(dit, args.init)
    dit.to(args.device)
    # Absent from this data; they would only decay.
    for name, parameter in dit.named_parameters():
        if name.startswith("frame_packer.") or name == "cond_encoder.weight":
            parameter.requires_grad_(False)
    visit = sequence.recomputed if args.recompute else directly
    task = ForcingTask(
        dit,
        clips,
        config,
        settings,
        batch=args.batch,
        lr=args.lr,
        seed=args.seed,
        bf16=args.bf16,
        visit=visit,
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

    facts = {
        "preset": config.name,
        "seed": args.seed,
        "batch": args.batch,
        "lr": args.lr,
        "bf16": args.bf16,
        "settings": settings,
        "clips": clips.num_clips,
        "init": args.init,
    }
    return recipe.conduct("forcing", task, args, recipe.plan_of(args), facts=facts, sample=sample, finish=finish)
