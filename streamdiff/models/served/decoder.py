"""A video decoder as it is served: weights in the layout of the activations, norm and activation in one pass, the
decoding of a chunk one CUDA graph.

The same interface as the decoder inside and its values, but for rounding in the pass that was two; for inference only.
States stay values: they are copied into the graph's buffers and out of them, so a kept state is still a snapshot. That
moves four times the state per chunk: 5.1 GB for the Wan VAE at 704x384 in bfloat16, or 1.2 ms at 4.3 TB/s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import streamdiff_kernels as kernels
from streamdiff.models.packing import Packing, packs_convolutions
from streamdiff.models.served.graphs import CudaGraphs, Graphs
from streamdiff.models.vae import (
    CausalConv3d,
    Conv2d,
    DecoderState,
    NormedConvs,
    VideoDecoder,
)
from streamdiff_kernels import Impl


@dataclass(frozen=True, slots=True, eq=False)
class _Captured:
    """One graph and the tensors it reads and writes, at fixed addresses."""

    replay: Callable[[], None]
    latents: Tensor
    pasts: tuple[Tensor, ...]
    frames: Tensor
    next_pasts: tuple[Tensor, ...]


class ServedDecoder(VideoDecoder):
    """Decodes as ``decoder`` does, without its launch and layout overheads.

    ``graph``: replay the decoding of a chunk as one CUDA graph, one per shape of chunk; no effect on a CPU, nor on
    the call that opens a stream, which happens once. ``compile``: let ``torch.compile`` fuse the decoding of a latent
    frame; may be combined with ``graph``. ``impl``: who computes norm and activation in one pass; None: Triton on CUDA,
    where nothing is compiled, and else the decoder as it is.

    Serve a decoder where it will run: BackendUnavailable when ``impl`` cannot.
    """

    def __init__(
        self, decoder: VideoDecoder, *, graph: bool = True, compile: bool = False, impl: Impl | None = None
    ) -> None:
        super().__init__(decoder.latents)
        self.decoder = decoder
        pack_weights(decoder)
        device = next(decoder.parameters()).device
        if impl is None and device.type == "cuda" and not compile:
            impl = Impl.TRITON
        if impl is not None:
            kernels.require(impl, device)
            fuse_norms(decoder, impl)
        self._graph = graph
        self._graphs: Graphs | None = None
        self._one = torch.compile(decoder.decode_one, fullgraph=True) if compile else decoder.decode_one
        self._captured: dict[tuple[torch.Size, torch.dtype], _Captured] = {}

    def initial_state(self, *, latent_h: int, latent_w: int, num_streams: int = 1) -> DecoderState:
        return self.decoder.initial_state(latent_h=latent_h, latent_w=latent_w, num_streams=num_streams)

    def decode_one(
        self, z_BC1HW: Tensor, pasts: tuple[Tensor, ...], *, first: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self._one(z_BC1HW, pasts, first=first)

    @torch.inference_mode()
    def decode_checked(self, latents_BCTHW: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        if not (self._graph and state.pasts[0].is_cuda) or state.num_latents == 0:
            return super().decode_checked(latents_BCTHW, state)
        key = (latents_BCTHW.shape, latents_BCTHW.dtype)
        if key not in self._captured:
            self._captured[key] = self._capture(latents_BCTHW, state)
        captured = self._captured[key]
        captured.latents.copy_(latents_BCTHW, non_blocking=True)
        for buffer, past in zip(captured.pasts, state.pasts, strict=True):
            buffer.copy_(past, non_blocking=True)
        captured.replay()
        pasts = tuple(past.clone() for past in captured.next_pasts)
        return captured.frames.clone(), DecoderState(state.num_latents + latents_BCTHW.shape[2], pasts)

    def _capture(self, latents_BCTHW: Tensor, state: DecoderState) -> _Captured:
        latents_BCTHW = latents_BCTHW.to(state.pasts[0].device, copy=True)
        static = DecoderState(state.num_latents, tuple(past.clone() for past in state.pasts))
        if self._graphs is None:
            self._graphs = CudaGraphs(latents_BCTHW.device)
        (frames, after), replay = self._graphs.capture(lambda: VideoDecoder.decode_checked(self, latents_BCTHW, static))
        return _Captured(replay, latents_BCTHW, static.pasts, frames, after.pasts)


def fuse_norms(module: nn.Module, impl: Impl) -> None:
    """Let ``impl`` compute each norm over channels with the activation that follows, in one pass over memory."""
    for layer in module.modules():
        if isinstance(layer, NormedConvs):
            layer.impl = impl


MOST_PACKED_BYTES = 256 << 20
"""Convolutions of at most so many bytes are kept a second time on a CPU, as oneDNN lays them out."""


def pack_weights(module: nn.Module) -> None:
    """Store the kernels of convolutions channels-last, so that no call has to reorder them. Values stay.

    On a CPU, float32 ones are kept once more as oneDNN wants them, unless they are large.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, (nn.Conv2d, nn.Conv3d))]
    for layer in layers:
        last = torch.channels_last if isinstance(layer, nn.Conv2d) else torch.channels_last_3d
        layer.weight.data = layer.weight.data.contiguous(memory_format=last)
    if sum(layer.weight.nbytes for layer in layers) > MOST_PACKED_BYTES or not packs_convolutions():
        return
    for layer in layers:
        if isinstance(layer, (CausalConv3d, Conv2d)) and _is_plain(layer.weight):
            layer.packing = layer.packing or Packing()


def _is_plain(weight: Tensor) -> bool:
    return type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype == torch.float32
