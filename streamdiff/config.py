"""What a stream is made of, as frozen values: checked once when made, then trusted.

Derived facts are properties, never fields. A preset (`streamdiff.presets`) returns a whole `EngineConfig`;
variants use `dataclasses.replace`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from streamdiff.errors import ConfigError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioInjectionConfig:
    """How sound enters the DiT (Wan2.2-S2V: causal audio encoder, adaptive norm, per-frame cross-attention)."""

    feature_dim: int
    """Width of one hidden state of the audio encoder (wav2vec2-large: 1024)."""
    num_features: int
    """Hidden states per moment, all layers of the encoder (wav2vec2-large: 25)."""
    num_tokens: int
    """Local audio tokens per latent frame; one learnable padding token is added to them."""
    inject_layers: tuple[int, ...]
    """DiT layers after which audio is injected."""
    motion_frames: int = 73
    """Video frames of history that the causal encoder sees; filled with copies of the chunk's first frame."""

    def __post_init__(self) -> None:
        _require(
            self.feature_dim > 0 and self.num_features > 0 and self.num_tokens > 0,
            f"audio widths must be positive, got {self}",
        )
        _require(
            list(self.inject_layers) == sorted(set(self.inject_layers)),
            f"inject_layers must rise without repeats, got {self.inject_layers}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DiTConfig:
    """Shape of the causal video DiT: that of Wan2.2-S2V, or of plain Wan T2V when ``audio`` is None."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    text_dim: int
    text_len: int
    freq_dim: int = 256
    in_dim: int = 16
    out_dim: int = 16
    cond_dim: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    audio: AudioInjectionConfig | None = None
    packs_motion: bool = True
    """Whether a model with audio has weights for a motion prefix (FramePack)."""
    predicts_data: bool = False
    """Whether the last layer says the data, from which the velocity follows, or (Wan) the velocity itself. Data lie on
    few dimensions, noise on all: a model no wider than its patches cannot pass noise through (Li and He 2025)."""

    def __post_init__(self) -> None:
        _require(
            self.dim % self.num_heads == 0 and (self.dim // self.num_heads) % 2 == 0,
            f"dim must split into {self.num_heads} heads of even width, got dim={self.dim}",
        )
        _require(
            self.head_dim >= 6,
            f"a head of width {self.head_dim} has no room for three rotary axes; use at least 6",
        )
        _require(self.patch[0] == 1, f"a patch spans one latent frame, got patch={self.patch}")
        _require(self.freq_dim % 2 == 0, f"freq_dim must be even, got {self.freq_dim}")
        if self.audio is not None and self.audio.inject_layers:
            _require(
                self.audio.inject_layers[0] >= 0 and self.audio.inject_layers[-1] < self.num_layers,
                f"inject_layers {self.audio.inject_layers} do not lie within {self.num_layers} layers",
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def rotary_pairs(self) -> tuple[int, int, int]:
        """Complex pairs given to time, height and width; the remainder goes to time.

        >>> DiTConfig(dim=5120, ffn_dim=1, num_heads=40, num_layers=1, text_dim=1, text_len=1).rotary_pairs
        (22, 21, 21)
        """
        pairs = self.head_dim // 2
        side = pairs // 3
        return pairs - 2 * side, side, side


@dataclass(frozen=True, slots=True, kw_only=True)
class VAEConfig:
    """Shape of the causal video VAE (Wan2.1): 4x in time, 8x in height and width for the published one."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    patch: int = 1
    """Pixels along a side that are folded into channels before the first convolution (Wan2.2 TI2V: 2)."""
    patch_frames: int = 1
    """Frames that are folded into channels with them."""
    projects: bool = False
    """Whether a patch is also projected linearly, past the convolutions, which then begin and end pointwise: a codec
    that works from the first step of its training on, as principal components do."""
    latent_mean: tuple[float, ...] = ()
    """Per-channel mean of the latents; the model sees (z - mean) / std. Empty: zeros."""
    latent_std: tuple[float, ...] = ()
    """Per-channel standard deviation of the latents. Empty: ones."""

    def __post_init__(self) -> None:
        _require(
            len(self.temporal_downsample) == len(self.dim_mult) - 1,
            f"one temporal_downsample flag stands between two levels: expected {len(self.dim_mult) - 1}, "
            f"got {len(self.temporal_downsample)}",
        )
        _require(
            self.patch >= 1 and self.patch_frames >= 1,
            f"a patch is at least one pixel of one frame, got patch={self.patch}, patch_frames={self.patch_frames}",
        )
        for name in ("latent_mean", "latent_std"):
            values = getattr(self, name)
            _require(
                len(values) in (0, self.z_dim),
                f"{name} must have one value per latent channel ({self.z_dim}), got {len(values)}",
            )

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell, along height and along width."""
        return self.patch * 2 ** len(self.temporal_downsample)

    @property
    def temporal_factor(self) -> int:
        """Video frames per latent frame (after the first)."""
        return self.patch_frames * 2 ** sum(self.temporal_downsample)

    @property
    def patch_channels(self) -> int:
        """Values of one patch: what the first convolution reads and the last one writes."""
        return 3 * self.patch_frames * self.patch**2


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """What a denoising step remembers of its own stream."""

    window_chunks: int = 4
    """Chunks that a chunk attends to, itself included (Live Avatar: 4)."""
    keeps_first: bool = False
    """Whether the first chunk never leaves the window. With ``window_chunks=3`` a chunk sees the first, the previous
    and itself (TalkingMachines, 3.2); for weights that were trained so."""
    first_reach: int = 18
    """Latent frames that a kept first chunk lies behind at most: further on it moves along, as if re-indexed. 18 are
    six chunks of three, as far as training looks."""
    slack_chunks: int = 0
    """Chunks that can be taken back by a rewind, beyond those still in the window."""
    sink_lead_min: int = 4
    sink_lead_max: int = 30
    """The sink sits this many latent frames ahead of the chunk, drawn per chunk (Live Avatar: 4..30)."""
    sink_position: int = 30
    """Temporal position of the sink before it starts to roll (Wan2.2-S2V: 30)."""
    adaptive_sink: bool = True
    """Whether the first generated latent replaces the reference."""
    refresh_chunk: int | None = None
    """Chunk before which the adaptive sink takes over; None: num_steps + 1, the first that costs no bubble."""

    def __post_init__(self) -> None:
        _require(self.window_chunks >= 1, f"window_chunks counts the chunk itself, got {self.window_chunks}")
        _require(
            not self.keeps_first or self.window_chunks >= 2,
            f"a window that keeps the first chunk holds at least two, got window_chunks={self.window_chunks}",
        )
        _require(self.first_reach >= 0, f"first_reach must not be negative, got {self.first_reach}")
        _require(self.slack_chunks >= 0, f"slack_chunks must not be negative, got {self.slack_chunks}")
        _require(
            0 <= self.sink_lead_min <= self.sink_lead_max <= self.sink_position,
            f"the sink's lead must lie in 0..sink_position ({self.sink_position}), "
            f"got {self.sink_lead_min}..{self.sink_lead_max}",
        )
        _require(
            self.refresh_chunk is None or self.refresh_chunk >= 1,
            f"the sink can be refreshed from chunk 1 on (chunk 0 must be finished), got {self.refresh_chunk}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One stream, whole: models, noise levels, memory, picture."""

    name: str
    dit: DiTConfig
    vae: VAEConfig
    memory: MemoryConfig
    sigmas: tuple[float, ...]
    """Noise levels from 1 to 0; one denoising step stands between two neighbours."""
    height: int
    width: int
    fps: int = 25
    frames_per_chunk: int = 3
    """Latent frames in a chunk."""
    renoise: bool = False
    """False: Euler along the velocity. True: estimate the data, then add fresh noise (the sampler of training)."""
    motion_latents: int = 19
    """Latent frames of FramePack motion prefix, copies of the reference; 0: none."""

    def __post_init__(self) -> None:
        _require(
            len(self.sigmas) >= 2 and list(self.sigmas) == sorted(set(self.sigmas), reverse=True),
            f"sigmas must fall from noise to data, got {self.sigmas}; "
            f"try sigmas={tuple(sorted(set(self.sigmas), reverse=True))}",
        )
        first, last = max(self.sigmas), min(self.sigmas)
        _require(
            first <= 1.0 and last == 0.0,
            f"sigmas must start at 1 or below and end at 0, got {self.sigmas}",
        )
        step = self.vae.spatial_factor * self.dit.patch[1]
        _require(
            self.height > 0 and self.width > 0 and self.height % step == 0 and self.width % step == 0,
            f"height and width must be positive multiples of {step} (VAE {self.vae.spatial_factor} x patch "
            f"{self.dit.patch[1]}), got {self.height}x{self.width}; "
            f"try {max(step, round(self.height / step) * step)}x{max(step, round(self.width / step) * step)}",
        )
        _require(
            not self.motion_latents or self.dit.audio is None or self.dit.packs_motion,
            f"motion_latents={self.motion_latents}, but the DiT has no weights for a motion prefix; use 0",
        )
        smallest = 8 * self.vae.spatial_factor
        _require(
            not self.motion_latents or min(self.height, self.width) >= smallest,
            f"with a motion prefix the picture must be at least {smallest}x{smallest} (it is packed 8 latent cells at "
            f"a time), got {self.height}x{self.width}; choose a larger size",
        )
        _require(self.fps > 0, f"fps must be positive, got {self.fps}")
        _require(
            self.frames_per_chunk >= 1,
            f"a chunk holds at least one latent frame, got {self.frames_per_chunk}",
        )
        _require(
            self.dit.in_dim == self.vae.z_dim,
            f"the DiT reads {self.dit.in_dim} channels but the VAE makes {self.vae.z_dim}",
        )

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def latent_hw(self) -> tuple[int, int]:
        return self.height // self.vae.spatial_factor, self.width // self.vae.spatial_factor

    @property
    def frame_tokens(self) -> int:
        """Tokens of one latent frame."""
        latent_h, latent_w = self.latent_hw
        return (latent_h // self.dit.patch[1]) * (latent_w // self.dit.patch[2])

    @property
    def chunk_tokens(self) -> int:
        return self.frames_per_chunk * self.frame_tokens

    @property
    def video_frames_per_chunk(self) -> int:
        """Video frames in a chunk; the decoder is primed, so the first chunk is no shorter than the others."""
        return self.frames_per_chunk * self.vae.temporal_factor

    @property
    def chunk_s(self) -> float:
        """Seconds of video in a chunk."""
        return self.video_frames_per_chunk / self.fps

    @property
    def refresh_chunk(self) -> int | None:
        """Chunk before which the sink is refreshed, or None when the sink stays the reference."""
        if not self.memory.adaptive_sink:
            return None
        return self.memory.refresh_chunk if self.memory.refresh_chunk is not None else self.num_steps + 1


def sparse(config: EngineConfig) -> EngineConfig:
    """The same model, but a chunk sees the first, the previous and itself (TalkingMachines, 3.2)."""
    memory = dataclasses.replace(config.memory, window_chunks=3, keeps_first=True)
    return dataclasses.replace(config, memory=memory)
