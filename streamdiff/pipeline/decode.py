"""The stage that decodes: finished latents become RGB frames, and leave the device.

Axes: B streams, T latent frames, C channels, H height, W width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from streamdiff.config import EngineConfig
from streamdiff.errors import MemoryOrderError
from streamdiff.memory import Kept
from streamdiff.models.served.decoder import ServedDecoder
from streamdiff.models.vae import DecoderState, VideoDecoder, to_rgb8
from streamdiff.pipeline.device import on_device
from streamdiff.pipeline.packet import Packet, Rewind, SetReference
from streamdiff.trace import Observer, Silent, span

PRIMING_LATENTS = 7
"""Still latents that the decoder sees before the first chunk, so that it starts as if the face had long been there."""


class DecodeStage:
    """Turns finished latents into RGB frames, keeping what the decoder remembers between chunks.

    The decoder is primed with the still reference, so every chunk, the first one too, gives
    ``config.video_frames_per_chunk`` frames and stays beside its own sound. (The published code drops three frames of
    the first chunk, which puts the picture 120 ms ahead of the sound.)
    """

    def __init__(self, decoder: VideoDecoder, config: EngineConfig, *, observer: Observer | None = None) -> None:
        self._decoder = decoder
        self._config = config
        self._slack = config.memory.slack_chunks
        self._observer = observer or Silent()
        self._device = next(decoder.parameters()).device
        self._way_out: torch.cuda.Stream | None = None
        self._before: dict[int, DecoderState] = {}
        """Chunk -> what the decoder remembered before it, for the chunks that can be taken back, and for the next."""
        self._states = 0
        self._numbers: dict[int, int] = {}
        """Chunk -> number of that state, by which it is kept."""

    def begin(self, *, seed: int, stream: int) -> None:
        """See `SeatedStage`; a decoder draws no noise, and `SetReference` primes it."""

    def kept(self) -> Kept:
        """See `KeptStage`. A state is written once, and there is a new one after every chunk."""
        tensors: dict[str, Tensor] = {}
        for chunk, state in self._before.items():
            tensors |= {f"{self._numbers[chunk]}/{i}": past for i, past in enumerate(state.pasts)}
        before = [[c, self._numbers[c], s.num_latents, len(s.pasts)] for c, s in self._before.items()]
        return Kept({"before": before, "states": self._states}, tensors)

    def resume(self, kept: Kept) -> None:
        """See `KeptStage`."""
        before: list[list[int]] = kept.facts["before"]
        self._states = kept.facts["states"]
        self._numbers = {chunk: number for chunk, number, _, _ in before}
        self._before = {
            chunk: DecoderState(
                num_latents, tuple(kept.tensors[f"{number}/{i}"].to(self._device) for i in range(num_pasts))
            )
            for chunk, number, num_latents, num_pasts in before
        }

    def _remember(self, chunk: int, state: DecoderState) -> None:
        self._states += 1
        self._before[chunk] = state
        self._numbers = {c: n for c, n in self._numbers.items() if c in self._before} | {chunk: self._states}

    @torch.inference_mode()
    def step(self, packet: Packet) -> Packet:
        with on_device(self._device):
            return self._step(packet)

    def _step(self, packet: Packet) -> Packet:
        for command in packet.commands:
            match command:
                case SetReference():
                    self._prime(command, packet.chunk)
                case Rewind():
                    self._before = {c: s for c, s in self._before.items() if c <= command.chunk}
                case _:
                    pass
        state = self._before.get(packet.chunk)
        if state is None:
            raise MemoryOrderError(
                f"cannot decode chunk {packet.chunk}: the decoder knows what came before chunks "
                f"{sorted(self._before)}; the first packet of a stream carries SetReference, and a rewind reaches "
                f"back slack_chunks={self._slack} chunks"
            )
        with span(self._observer, "decode", chunk=packet.chunk, epoch=packet.epoch):
            frames_BCTHW, after = self._decoder.decode(packet.latent_BCTHW, state)
            frames_THWC = self._leave(to_rgb8(frames_BCTHW)[0])
        self._remember(packet.chunk + 1, after)
        self._before.pop(packet.chunk - self._slack - 1, None)
        return replace(packet, frames_THWC=frames_THWC)

    @torch.inference_mode()
    def warm(self) -> None:
        """Capture the CUDA graph of a chunk before the first one comes; without graphs there is nothing to do."""
        if not isinstance(self._decoder, ServedDecoder):
            return
        config, device = self._config, self._device
        with on_device(device):
            latents_BCTHW = torch.zeros(1, config.vae.z_dim, config.frames_per_chunk, *config.latent_hw, device=device)
            _, state = self._decoder.decode(latents_BCTHW[:, :, :1].expand(-1, -1, PRIMING_LATENTS, -1, -1))
            frames_BCTHW, _ = self._decoder.decode(latents_BCTHW, state)
            self._leave(to_rgb8(frames_BCTHW)[0])

    def _leave(self, frames_THWC: Tensor) -> Tensor:
        """Copy frames to pinned memory on a stream of their own; waits for the copy, and for no work behind it."""
        if not frames_THWC.is_cuda:
            return frames_THWC
        if self._way_out is None:
            self._way_out = torch.cuda.Stream(frames_THWC.device)
        self._way_out.wait_stream(torch.cuda.current_stream(frames_THWC.device))
        with torch.cuda.stream(self._way_out):
            shown_THWC = torch.empty(frames_THWC.shape, dtype=frames_THWC.dtype, pin_memory=True)
            shown_THWC.copy_(frames_THWC, non_blocking=True)
        self._way_out.synchronize()
        return shown_THWC

    def _prime(self, reference: SetReference, chunk: int) -> None:
        latents = reference.motion_BCTHW
        if latents is None:
            latents = reference.reference_BCTHW.expand(-1, -1, PRIMING_LATENTS, -1, -1)
        _, state = self._decoder.decode(latents[:, :, :PRIMING_LATENTS], None)
        self._before = {}
        self._remember(chunk, state)
