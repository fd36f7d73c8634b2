"""A preset and clips small enough to train in a test; the sound says what is seen."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from streamdiff import presets
from streamdiff.config import AudioInjectionConfig, DiTConfig, EngineConfig, MemoryConfig, VAEConfig

NUM_FRAMES, PROMPTS = 8, ("a person talks", "a person nods and smiles")


def small_config() -> EngineConfig:
    """Chunks of two latent frames of four tokens, a window of two chunks."""
    return dataclasses.replace(
        presets.tiny(),
        name="small",
        dit=DiTConfig(
            dim=48,
            ffn_dim=96,
            num_heads=2,
            num_layers=2,
            text_dim=16,
            text_len=8,
            freq_dim=32,
            in_dim=4,
            out_dim=4,
            cond_dim=4,
            audio=AudioInjectionConfig(feature_dim=8, num_features=2, num_tokens=2, inject_layers=(0, 1)),
        ),
        vae=VAEConfig(base_dim=4, z_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1),
        memory=MemoryConfig(window_chunks=2, sink_lead_min=2, sink_lead_max=6, sink_position=8),
        frames_per_chunk=2,
        height=32,
        width=32,
        motion_latents=0,
    )


def clip_tensors(config: EngineConfig, num_clips: int, *, seed: int = 0) -> dict[str, Tensor]:
    """A face that is always there, and a brightness that follows the sound."""
    generator = torch.Generator().manual_seed(seed)
    audio, (H, W), C = config.dit.audio, config.latent_hw, config.dit.in_dim
    assert audio is not None
    factor = config.vae.temporal_factor
    heard = torch.randn(num_clips, NUM_FRAMES, generator=generator)
    features = torch.randn(1, audio.num_features, audio.feature_dim, 1, generator=generator)
    face = torch.randn(num_clips, C, 1, H, W, generator=generator)
    return {
        "latent": (0.6 * face + 0.8 * heard[:, None, :, None, None]).half(),
        "reference": (0.6 * face[:, :, 0]).half(),
        "audio": (features * heard.repeat_interleave(factor, 1)[:, None, None]).half(),
        "prompt": torch.arange(num_clips) % len(PROMPTS),
    }


def write_clips(folder: Path, config: EngineConfig, num_clips: int = 12, *, preset: str | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    metadata = {"prompts": json.dumps(PROMPTS), "config": preset or config.name}
    save_file(clip_tensors(config, num_clips), folder / "latents.safetensors", metadata=metadata)
    return folder
