"""A small stream with everything happening on the way, for the tests that compare layouts bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from streamdiff import flow, presets
from streamdiff.config import AudioInjectionConfig, DiTConfig, EngineConfig, MemoryConfig, VAEConfig
from streamdiff.engine import Engine
from streamdiff.models.audio import AudioChunk
from streamdiff.pipeline.packet import Packet

PROMPT_AT, REWIND_AFTER, REWIND_TO, NUM_ENTRIES = 3, 8, 6, 12


def small_config(num_steps: int, *, renoise: bool = False) -> EngineConfig:
    """The tiny preset, smaller still: 64x64 pixels, two layers."""
    return dataclasses.replace(
        presets.tiny(),
        dit=DiTConfig(
            dim=32,
            ffn_dim=64,
            num_heads=2,
            num_layers=2,
            text_dim=16,
            text_len=8,
            freq_dim=32,
            audio=AudioInjectionConfig(feature_dim=8, num_features=2, num_tokens=2, inject_layers=(0,)),
        ),
        vae=VAEConfig(base_dim=4, num_res_blocks=1),
        memory=MemoryConfig(window_chunks=3, slack_chunks=3),
        sigmas=flow.published_grid(num_steps),
        height=64,
        width=64,
        renoise=renoise,
    )


def eventful_packets(engine: Engine, *, seed: int = 7) -> Iterator[Packet]:
    """Twelve packets: a prompt switch, a sink refresh, and a rewind that takes three chunks back."""
    config = engine.config
    generator = torch.Generator().manual_seed(5)
    image_HWC = torch.randint(0, 256, (config.height, config.width, 3), dtype=torch.uint8, generator=generator)
    head = engine.intake(image_HWC, "a person talks", seed=seed)
    other_prompt = engine.encode_prompt("a person nods")
    audio = config.dit.audio
    assert audio is not None

    def heard() -> Iterator[AudioChunk]:
        for entry in range(NUM_ENTRIES):
            if head.next_chunk == PROMPT_AT:
                head.switch_prompt(other_prompt)
            if entry == REWIND_AFTER + 1:
                head.rewind(REWIND_TO)
            features = torch.randn(
                1, audio.num_features, audio.feature_dim, config.video_frames_per_chunk, generator=generator
            )
            yield AudioChunk(features, torch.zeros(7680))

    return head.packets(heard())


def digest(packet: Packet) -> tuple[int, int, torch.Tensor, torch.Tensor]:
    assert packet.frames_THWC is not None
    return packet.chunk, packet.epoch, packet.latent_BCTHW, packet.frames_THWC


def same(a: list[Packet], b: list[Packet]) -> bool:
    """Whether two streams are the same packets with the same bits."""
    return len(a) == len(b) and all(
        (x.chunk, x.epoch) == (y.chunk, y.epoch)
        and torch.equal(x.latent_BCTHW, y.latent_BCTHW)
        and x.frames_THWC is not None
        and y.frames_THWC is not None
        and torch.equal(x.frames_THWC, y.frames_THWC)
        for x, y in zip(a, b, strict=True)
    )
