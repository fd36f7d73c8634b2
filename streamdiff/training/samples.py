"""Samples during training: held-out clips, generated as the engine does, beside the clips themselves.

Axes: B clips, T frames, C channels, H height, W width.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from streamdiff import flow
from streamdiff.config import EngineConfig
from streamdiff.media import contact_sheet
from streamdiff.memory import sink_lead
from streamdiff.models.dit import CausalDiT
from streamdiff.models.vae import to_rgb8
from streamdiff.pipeline.denoise import DenoiseStage
from streamdiff.pipeline.packet import Command, Packet, SetReference, SwitchPrompt
from streamdiff.training.codec import Codec
from streamdiff.training.latents import Batch

_SHOWN_CLIPS, _SHOWN_FRAMES = 4, 12


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
