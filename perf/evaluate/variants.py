"""Variants of the engine for long runs: without its sink, with a clean history, with the sink standing still."""

from __future__ import annotations

import dataclasses

import torch

from streamdiff.config import EngineConfig
from streamdiff.engine import Engine
from streamdiff.memory import SinkMemory, StepMemory
from streamdiff.models.served.step import ServedStep
from streamdiff.pipeline.denoise import DenoiseStage
from streamdiff.pipeline.packet import Packet
from streamdiff.rope import Rotation

VARIANTS = ("full", "no-sink", "absolute", "clean-history", "no-adaptive")


class _NoSink(StepMemory):
    """A history without a sink in front."""

    def turn_sink(self, rotation: Rotation) -> None:
        """There is nothing to turn."""


class SinkEvicted(DenoiseStage):
    """Loses its sink as soon as the window is full."""

    def step(self, packet: Packet) -> Packet:
        if packet.chunk == self._config.memory.window_chunks:
            with torch.inference_mode():
                self._evict()
        return super().step(packet)

    def _evict(self) -> None:
        config, device, options = self._config, self._dit.device, self._weights.options
        dit = config.dit
        for step in self._steps:
            old = step.memory
            nothing = SinkMemory(num_layers=dit.num_layers, num_streams=1, moving_tokens=0, num_heads=dit.num_heads,
                                 head_dim=dit.head_dim, dtype=self._dit.dtype, device=device)  # fmt: skip
            bare = _NoSink(nothing, chunk_tokens=config.chunk_tokens, window_chunks=config.memory.window_chunks,
                           impl=options.resolved(device))  # fmt: skip
            bare.keys_ZBMNK.copy_(old.keys_ZBMNK[:, :, old.sink_tokens :])
            bare.values_ZBMNK.copy_(old.values_ZBMNK[:, :, old.sink_tokens :])
            bare.ring = old.ring
            step.memory = bare
            step.velocity = ServedStep(self._weights, self._dit.modulation(step.sigma), bare, options)


class CleanHistory(DenoiseStage):
    """Remembers finished chunks: one more forward at noise level 0, kept by every step instead of what it saw."""

    _clean_step: ServedStep | None = None

    @torch.inference_mode()
    def step(self, packet: Packet) -> Packet:
        done = super().step(packet)
        memory = self._steps[0].memory
        if self._clean_step is None:
            modulation = self._dit.modulation(0.0)
            self._clean_step = ServedStep(self._weights, modulation, memory, self._weights.options)
        assert self._text is not None
        own = self._own_rotation(packet.chunk * self._config.frames_per_chunk)
        self._clean_step(done.latent_BCTHW, own, self._text, self._hear(packet))
        start = memory.sink_tokens + memory.ring.slot_of(packet.chunk) * memory.chunk_tokens
        rows = slice(start, start + memory.chunk_tokens)
        for other in self._steps[1:]:
            other.memory.keys_ZBMNK[:, :, rows].copy_(memory.keys_ZBMNK[:, :, rows])
            other.memory.values_ZBMNK[:, :, rows].copy_(memory.values_ZBMNK[:, :, rows])
        return done


def denoiser(engine: Engine, variant: str, *, seed: int = 0) -> DenoiseStage:
    """All steps in one stage, in this variant."""
    kinds: dict[str, type[DenoiseStage]] = {"no-sink": SinkEvicted, "clean-history": CleanHistory}
    kind = kinds.get(variant, DenoiseStage)
    return kind(engine.dit(), engine.config, range(engine.config.num_steps), seed=seed, options=engine.options)


def standing_still(packet: Packet, config: EngineConfig) -> Packet:
    """The same packet with the sink where it was at the beginning: absolute positions."""
    first_frame = packet.chunk * config.frames_per_chunk
    return dataclasses.replace(packet, lead=config.memory.sink_position - first_frame)
