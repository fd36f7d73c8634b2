"""Whole configurations by name. Each is a typed function; variants use `dataclasses.replace`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from streamdiff.config import AudioInjectionConfig, DiTConfig, EngineConfig, MemoryConfig, VAEConfig
from streamdiff.errors import ConfigError

LIVE_AVATAR_SIGMAS = (1.0, 0.857692, 0.602151, 0.0089286, 0.0)
"""The published four steps. Their grid is shifted twice (once when the scheduler is made, once when the steps are set),
which is why the last step starts at 0.0089: it polishes more than it denoises. `flow.published_grid` makes such grids
for other numbers of steps."""

# Mean and deviation of each latent channel of the Wan2.1 VAE, as published with its weights.
_WAN_LATENT_MEAN = (
    -0.7571,
    -0.7089,
    -0.9113,
    0.1075,
    -0.1745,
    0.9653,
    -0.1517,
    1.5508,
    0.4134,
    -0.0715,
    0.5517,
    -0.3632,
    -0.1922,
    -0.9497,
    0.2503,
    -0.2921,
)
_WAN_LATENT_STD = (
    2.8184,
    1.4541,
    2.3275,
    2.6558,
    1.2196,
    1.7708,
    2.6052,
    2.0743,
    3.2687,
    2.1526,
    2.8652,
    1.5579,
    1.6382,
    1.1253,
    2.8251,
    1.9160,
)


def wan21_vae() -> VAEConfig:
    """The Wan2.1 video VAE: 16 channels, 4x in time, 8x in height and width."""
    return VAEConfig(latent_mean=_WAN_LATENT_MEAN, latent_std=_WAN_LATENT_STD)


def wan_t2v_14b_dit() -> DiTConfig:
    """The plain Wan2.1/2.2 14B text-to-video trunk: 1095 tensors."""
    return DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, text_dim=4096, text_len=512)


def live_avatar_14b() -> EngineConfig:
    """Wan2.2-S2V-14B with the Live Avatar LoRA: four steps, 704x384, chunks of 12 frames at 25 fps."""
    audio = AudioInjectionConfig(
        feature_dim=1024, num_features=25, num_tokens=4, inject_layers=(0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)
    )
    return EngineConfig(
        name="live_avatar_14b",
        dit=dataclasses.replace(wan_t2v_14b_dit(), audio=audio),
        vae=wan21_vae(),
        memory=MemoryConfig(),
        sigmas=LIVE_AVATAR_SIGMAS,
        height=704,
        width=384,
    )


def tiny() -> EngineConfig:
    """The same machine at toy size: runs on one laptop core without any download, 128x128.

    Its weights are random until trained ones are given, so it paints noise; what it shows is the engine.
    """
    return EngineConfig(
        name="tiny",
        dit=DiTConfig(
            dim=128,
            ffn_dim=256,
            num_heads=4,
            num_layers=4,
            text_dim=64,
            text_len=16,
            freq_dim=64,
            audio=AudioInjectionConfig(feature_dim=64, num_features=3, num_tokens=4, inject_layers=(0, 2)),
        ),
        vae=VAEConfig(base_dim=8, dim_mult=(1, 2, 4, 4), num_res_blocks=1),
        memory=MemoryConfig(),
        sigmas=LIVE_AVATAR_SIGMAS,
        height=128,
        width=128,
    )


def portrait() -> EngineConfig:
    """A small model with weights of its own, trained on drawn heads: 128x128, real time on a laptop core or two.

    Its codec squeezes 16x in height and width, like that of Wan2.2 TI2V, so that a latent frame has 16 tokens.
    """
    return EngineConfig(
        name="portrait",
        dit=DiTConfig(
            dim=256,
            ffn_dim=1024,
            num_heads=8,
            num_layers=4,
            text_dim=64,
            text_len=16,
            freq_dim=128,
            in_dim=48,
            out_dim=48,
            audio=AudioInjectionConfig(feature_dim=64, num_features=3, num_tokens=4, inject_layers=(0, 1, 2)),
            packs_motion=False,
            predicts_data=True,
        ),
        vae=VAEConfig(
            base_dim=96,
            z_dim=48,
            dim_mult=(1,),
            num_res_blocks=1,
            temporal_downsample=(),
            patch=16,
            patch_frames=4,
            projects=True,
        ),
        # An adaptive sink takes over the model's own small errors: farther from the photograph in every measure.
        memory=MemoryConfig(adaptive_sink=False),
        sigmas=(1.0, 0.9, 0.75, 0.5, 0.0),
        height=128,
        width=128,
        renoise=True,
        motion_latents=0,
    )


PRESETS: dict[str, Callable[[], EngineConfig]] = {
    "portrait": portrait,
    "tiny": tiny,
    "live_avatar_14b": live_avatar_14b,
}


def preset(name: str) -> EngineConfig:
    """A preset by the name it has on the command line."""
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; choose from {', '.join(PRESETS)}")
    return PRESETS[name]()
