"""Finished streams of the real engine: its intake, its stages, its decoder, fed chunk by chunk on one rank.

Axes: T frames, H height, W width, C channels, S samples, n chunks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluate.variants import denoiser
from streamdiff.arrays import Floats
from streamdiff.engine import Engine
from streamdiff.models.audio import chunks
from streamdiff.models.vae import from_rgb8, to_rgb8
from streamdiff.pipeline.packet import Packet
from streamdiff.pipeline.run import run_local
from streamdiff.pipeline.schedule import Role, plan
from streamdiff.pipeline.stage import Chain, Stage
from streamdiff.training.data.clip import FRAME_SAMPLES, PROMPTS

PLAIN = PROMPTS["plain"][0]


@torch.inference_mode()
def through_codec(engine: Engine, frames_THWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Frames as the engine's encoder and decoder give them back; the first is shown once more to open the stream."""
    encoder, decoder = engine.encoder(), engine.decoder()
    factor = engine.config.vae.temporal_factor
    opened = torch.from_numpy(np.concatenate([frames_THWC[:1], frames_THWC]))
    state, past, out = None, None, list[NDArray[np.uint8]]()
    for part in (opened[:1], *opened[1:].split(12 * factor)):
        latents, state = encoder.encode(from_rgb8(part[None]), state)
        if latents.shape[2]:
            shown, past = decoder.decode(latents, past)
            out.append(to_rgb8(shown)[0].numpy())
    return np.concatenate(out)[1:]


@dataclass(frozen=True, slots=True, eq=False)
class Film:
    """A finished stream."""

    frames_THWC: NDArray[np.uint8]
    latents_nCTHW: Tensor
    first_s: float
    """From the first sound, with the engine ready, to the first frames."""
    chunk_s: tuple[float, ...]
    """Processor time of every later chunk."""


def film(
    engine: Engine, photo_HWC: Tensor, sound_S: Floats, *, prompts: Mapping[int, str] | None = None, seed: int = 0,
    variant: str = "full",
) -> Film:  # fmt: skip
    """Run a stream to its end, as it is served. ``prompts``: by the chunk that brings them; `PLAIN` until then."""
    schedule = plan(num_steps=engine.config.num_steps, num_ranks=1, refresh_chunk=engine.config.refresh_chunk)
    packets = _packets(engine, photo_HWC, sound_S, {0: PLAIN, **(prompts or {})}, seed)
    frames, latents, chunk_s = list[NDArray[np.uint8]](), list[Tensor](), list[float]()
    last_s, wall_s, first_s = time.process_time(), time.perf_counter(), 0.0
    for packet in run_local(schedule, [_stage(engine, variant, seed)], packets):
        assert packet.frames_THWC is not None
        first_s = first_s or time.perf_counter() - wall_s
        now_s = time.process_time()
        chunk_s.append(now_s - last_s)
        last_s = now_s
        frames.append(packet.frames_THWC.numpy())
        latents.append(packet.latent_BCTHW[0])
    num_frames = len(sound_S) // FRAME_SAMPLES
    return Film(np.concatenate(frames)[:num_frames], torch.stack(latents), first_s, tuple(chunk_s[1:]))


def _stage(engine: Engine, variant: str, seed: int) -> Stage:
    """All that one rank does, in this variant."""
    if variant in ("full", "no-adaptive"):
        schedule = plan(num_steps=engine.config.num_steps, num_ranks=1, refresh_chunk=engine.config.refresh_chunk)
        return engine.stage(schedule.roles[0], seed=seed)
    decode = engine.stage(Role(rank=0, encodes=False, steps=(), decodes=True), seed=seed)
    return Chain([denoiser(engine, variant, seed=seed), decode])


def _packets(
    engine: Engine, photo_HWC: Tensor, sound_S: Floats, prompts: Mapping[int, str], seed: int
) -> Iterator[Packet]:
    """What the intake makes of a sound; prompts switch at their chunks."""
    config = engine.config
    texts = {text: engine.encode_prompt(text) for text in set(prompts.values())}
    intake = engine.intake(photo_HWC, prompts[0], seed=seed)
    heard = chunks(
        [torch.from_numpy(sound_S)],
        engine.audio_encoder(),
        frames_per_chunk=config.video_frames_per_chunk,
        fps=config.fps,
    )
    for sound in heard:
        if intake.next_chunk in prompts and intake.next_chunk > 0:
            intake.switch_prompt(texts[prompts[intake.next_chunk]])
        yield intake.packet(sound)
