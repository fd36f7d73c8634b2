"""A small model with a sink, a prompt and a voice, run twice over the same chunks: as it reads, and as it is served."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from streamdiff import presets
from streamdiff.config import AudioInjectionConfig, DiTConfig, EngineConfig, MemoryConfig
from streamdiff.memory import SinkMemory, StepMemory
from streamdiff.models import cost
from streamdiff.models.dit import AudioCondition, CausalDiT, TextCondition, initialise
from streamdiff.models.served.history import history_scales
from streamdiff.models.served.options import StepOptions
from streamdiff.models.served.step import ServedStep, ServedWeights
from streamdiff.rope import Rotation


def config_of(
    *,
    audio: bool = True,
    num_layers: int = 3,
    frames_per_chunk: int = 2,
    window_chunks: int = 3,
    dim: int = 64,
    size: int = 64,
    motion: bool = True,
) -> EngineConfig:
    heard = AudioInjectionConfig(feature_dim=16, num_features=2, num_tokens=3, inject_layers=(0, num_layers - 1))
    return dataclasses.replace(
        presets.tiny(),
        dit=DiTConfig(
            dim=dim,
            ffn_dim=2 * dim,
            num_heads=dim // 32,
            num_layers=num_layers,
            text_dim=24,
            text_len=9,
            freq_dim=32,
            audio=heard if audio else None,
        ),
        memory=MemoryConfig(window_chunks=window_chunks),
        height=size,
        width=size,
        frames_per_chunk=frames_per_chunk,
        motion_latents=19 if motion and audio else 0,
    )


class Case:
    """One noise level of one or more streams.

    ``dit`` may be given to share weights between cases; otherwise it is random, with every bias and norm alive.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        num_streams: int = 1,
        seed: int = 0,
        sigma: float = 0.6,
    ) -> None:
        self.config, self.num_streams, self.sigma = config, num_streams, sigma
        self.device, self.dtype = torch.device(device), dtype
        self._draw = torch.Generator().manual_seed(seed)
        dit = CausalDiT(config.dit)
        initialise(dit, seed=seed)
        with torch.no_grad():
            for name, parameter in dit.named_parameters():
                if "norm" in name:
                    parameter.add_(0.1 * self.randn(*parameter.shape))
        # Rounded to the smaller type in any case, so that cases in two types hold the same weights.
        self.dit = dit.to(torch.bfloat16).to(self.device, dtype).requires_grad_(False).eval()
        self.reference = self.randn(num_streams, 16, 1, *config.latent_hw)
        self.motion = self.randn(num_streams, 16, 19, *config.latent_hw) if config.motion_latents else None
        self.text_BPC = self.randn(num_streams, 5, config.dit.text_dim)
        self.modulation = self.dit.modulation(sigma)
        self.text = self.dit.text_condition(self.text_BPC)
        self.sink = self._sink()

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._draw)

    def _sink(self) -> SinkMemory:
        config, dit = self.config, self.dit
        moving = config.frame_tokens
        sink = SinkMemory(
            num_layers=config.dit.num_layers,
            num_streams=self.num_streams,
            moving_tokens=moving,
            still_tokens=cost.sink_tokens(config) - moving,
            num_heads=config.dit.num_heads,
            head_dim=config.dit.head_dim,
            dtype=self.dtype,
            device=self.device,
        )
        dit.prefill_sink(self.reference, self.motion, self.text, dit.modulation(0.0), sink, position=30)
        return sink

    def memory(self, *, eight_bits: bool = False) -> StepMemory:
        """A new history, poisoned where nothing was written."""
        config = self.config
        memory = StepMemory(
            self.sink,
            chunk_tokens=config.chunk_tokens,
            window_chunks=config.memory.window_chunks,
            slack_chunks=1,
            scales=history_scales(self.dit, (self.modulation, self.dit.modulation(0.0))) if eight_bits else None,
        )
        for ring in (memory.keys_ZBMNK, memory.values_ZBMNK):
            ring.fill_(float("nan"))
        memory.take_sink(self.dit.motion_rotation(config.latent_hw) if self.motion is not None else None)
        return memory

    def served(
        self, memory: StepMemory, options: StepOptions | None = None, weights: ServedWeights | None = None
    ) -> ServedStep:
        options = options or StepOptions()
        return ServedStep(weights or ServedWeights(self.dit, options), self.modulation, memory, options)

    def latents(self, num_chunks: int) -> list[Tensor]:
        shape = (self.num_streams, 16, self.config.frames_per_chunk, *self.config.latent_hw)
        return [self.randn(*shape).to(self.device) for _ in range(num_chunks)]

    def voices(self, num_chunks: int) -> list[Tensor] | list[None]:
        audio = self.config.dit.audio
        if audio is None:
            return [None] * num_chunks
        shape = (self.num_streams, audio.num_features, audio.feature_dim, self.config.video_frames_per_chunk)
        return [self.randn(*shape).to(self.device) for _ in range(num_chunks)]

    def heard(self, voice_BZEA: Tensor | None) -> AudioCondition | None:
        return None if voice_BZEA is None else self.dit.audio_condition(voice_BZEA)

    def rotations(self, chunk: int) -> tuple[Rotation, Rotation]:
        """Of the chunk's own frames, and of the sink."""
        first = chunk * self.config.frames_per_chunk
        frames = range(first, first + self.config.frames_per_chunk)
        return self.dit.frame_rotation(frames, self.config.latent_hw), self.dit.frame_rotation(
            [first + 30], self.config.latent_hw
        )

    def read(self, memory: StepMemory, chunk: int, latent_BCTHW: Tensor, audio: AudioCondition | None) -> Tensor:
        """The chunk through `CausalDiT.forward`."""
        own, sink = self.rotations(chunk)
        slot = memory.admit(chunk)
        memory.turn_sink(sink)
        return self.dit(latent_BCTHW, self.modulation, self.text, own, audio=audio, memory=memory.views(slot))

    def serve(
        self,
        step: ServedStep,
        memory: StepMemory,
        chunk: int,
        latent_BCTHW: Tensor,
        audio: AudioCondition | None,
        text: TextCondition | None = None,
    ) -> Tensor:
        """The chunk through the served step."""
        own, sink = self.rotations(chunk)
        memory.admit(chunk)
        memory.turn_sink(sink)
        return step(latent_BCTHW, own, text or self.text, audio)


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    found, expected = found.double(), expected.double()
    return ((found - expected).abs().max() / expected.abs().max()).item()


def rms_distance(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm()).item()
