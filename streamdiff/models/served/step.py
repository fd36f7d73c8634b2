"""One denoising step as it is served: constants computed once, branches fused, the whole of it one CUDA graph.

`CausalDiT.forward` says what a step computes, in differentiable torch. This module computes the same from the same
weights, for inference only:

- a rank's noise level never changes, so scales, shifts and gates are constants; so are the prompt's keys and values;
- q, k and v come from one matrix product, and one pass norms and rotates them and writes k and v into their ring slot;
- every ``x + gate * y`` is one pass with the norm and modulation that follow it;
- attention reads the ring where it lies: nothing is concatenated, masked or rotated again;
- on CUDA, inputs are copied into buffers of fixed address and the step is replayed as one graph. The slot and, where
  the attention backend can read it there, the fill level stay on the device; other backends get one graph per level.
  `ServedStep.warm` captures them all before the first chunk. Nothing here waits for the device.

Linear layers may run in eight bits (e4m3, one scale per token and per output), their inputs quantised in the pass that
makes them. Layers at both ends of the model, patch embedding, head, modulation, norms and attention stay as they are,
and a weight that was quantised is not kept a second time.

Axes: B streams, T latent frames, C channels, H height, W width, L tokens of this chunk, M tokens remembered, D model
width, N heads, K head width, F hidden width, P prompt tokens, A audio tokens, E audio or output width, Z layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import streamdiff_kernels as kernels
from streamdiff.config import DiTConfig
from streamdiff.errors import BackendError, ConfigError
from streamdiff.memory import StepMemory
from streamdiff.models.dit import (
    ADAPTIVE_NORM_EPS,
    Attention,
    AudioCondition,
    Block,
    CausalDiT,
    Modulation,
    TextCondition,
)
from streamdiff.models.served.graphs import CudaGraphs, Graphs
from streamdiff.rope import Rotation
from streamdiff_kernels import BackendUnavailable, Impl, reference
from streamdiff_kernels.attention import backend_named


class Precision(StrEnum):
    """Arithmetic of the large linear layers."""

    WEIGHTS = "weights"
    """That of the weights as loaded."""
    FP8 = "fp8"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """How a step is computed. The defaults give the same bits on every rank and in every run."""

    impl: Impl | None = None
    """None: Triton on CUDA, plain torch elsewhere."""
    attention: str | None = None
    """A backend of `streamdiff_kernels`, or ``auto`` to measure once and take the fastest (then ranks may differ).
    None: oneDNN on a CPU that has it (heads narrower than 64 excepted, in float32), cuDNN from Hopper on, what torch
    chooses elsewhere."""
    precision: Precision = Precision.WEIGHTS
    kept_layers: int = 1
    """With fp8: how many layers at each end of the model keep the precision of their weights."""
    history: Precision = Precision.WEIGHTS
    """Of the keys and values that are remembered; fp8 takes half the memory, and on CUDA the attention ``triton``."""
    graph: bool = True
    """Replay CUDA graphs; no effect on a CPU."""
    compile: bool = False
    """Let ``torch.compile`` fuse the block instead of our kernels: one compilation for all layers, steps and chunks, or
    two where attention wants the fill level as an integer. May be combined with ``graph``."""

    def __post_init__(self) -> None:
        if self.kept_layers < 0:
            raise ConfigError(f"kept_layers counts layers at each end, got {self.kept_layers}; use 0 for none")

    def resolved(self, device: torch.device) -> Impl:
        if self.impl is not None:
            return self.impl
        return Impl.TRITON if device.type == "cuda" else Impl.TORCH

    def resolved_attention(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
        """The backend to ask for; not yet whether it can run."""
        if self.attention is not None:
            return self.attention
        if device.type == "cuda" and self.history is Precision.FP8:
            return "triton"  # the others would widen the whole history at every call
        ready = kernels.available_backends(device=device, dtype=dtype, head_dim=head_dim)
        narrow = head_dim < 64 and dtype == torch.float32
        if device.type == "cpu" and ready["onednn"] is None and not narrow:
            return "onednn"  # narrow heads are left to torch: a chunk of the portrait preset takes 0.8 of the time
        if device.type == "cuda" and ready["sdpa-cudnn"] is None and torch.cuda.get_device_capability(device) >= (9, 0):
            return "sdpa-cudnn"
        return "sdpa"

    def check(self, config: DiTConfig, device: torch.device, dtype: torch.dtype) -> None:
        """Find what cannot run here before weights are loaded.

        Raises BackendError for an implementation, an attention backend or a precision that this device, these weights
        or this model rule out. ``auto`` finds a backend everywhere.
        """
        try:
            kernels.require(self.resolved(device), device)
            if self.attention is not None and self.attention != "auto":
                backend_named(self.attention, device=device, dtype=dtype, head_dim=config.head_dim)
        except BackendUnavailable as error:
            raise BackendError(str(error)) from error
        if self.precision is Precision.FP8:
            _check_eight_bits(config, device, dtype)


def _check_eight_bits(config: DiTConfig, device: torch.device, dtype: torch.dtype) -> None:
    if dtype != torch.bfloat16:
        raise BackendError(
            f"fp8 linears accumulate to bfloat16 but the weights are {str(dtype).removeprefix('torch.')}; load them as "
            "bfloat16, as is done on CUDA, or use the precision of the weights"
        )
    if config.dim % 16 or config.ffn_dim % 16:
        raise BackendError(
            f"fp8 products want widths in multiples of 16, got dim={config.dim} and ffn_dim={config.ffn_dim}; "
            "use the precision of the weights"
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        major, minor = torch.cuda.get_device_capability(device)
        raise BackendError(
            f"fp8 products need capability 8.9 (Ada, Hopper) and this GPU has {major}.{minor}; "
            "use the precision of the weights"
        )


# ----------------------------------------------------------------------------------------------------- linear layers


@dataclass(frozen=True, slots=True, eq=False)
class _Bytes:
    """Activations in eight bits, one scale per token."""

    x8_BLD: Tensor
    scale_BL: Tensor

    def frames(self, num_frames: int) -> _Bytes:
        """Latent frames moved into the batch axis."""
        return _Bytes(_frames(self.x8_BLD, num_frames), _frames(self.scale_BL, num_frames))


Activation = Tensor | _Bytes
"""What goes into a linear layer: as it is, or in eight bits."""


def _frames(x_BL: Tensor, num_frames: int) -> Tensor:
    return x_BL.unflatten(1, (num_frames, -1)).flatten(0, 1)


class _Dense:
    """A linear layer in the precision of its weights; ``impl`` None: one that a compiler sees through."""

    eight_bits = False

    def __init__(self, weight_ED: Tensor, bias_E: Tensor, impl: Impl | None) -> None:
        self.weight_ED, self.bias_E, self._impl = weight_ED, bias_E, impl

    def __call__(self, x: Activation, *, gelu: bool = False) -> Tensor:
        assert isinstance(x, Tensor)
        if self._impl is not None:
            return kernels.linear(x, self.weight_ED, self.bias_E, gelu=gelu, impl=self._impl)
        y = F.linear(x, self.weight_ED, self.bias_E)
        return F.gelu(y, approximate="tanh") if gelu else y


class _Dense8:
    """A linear layer in eight bits."""

    eight_bits = True

    def __init__(self, weight8_ED: Tensor, scale_E: Tensor, bias_E: Tensor) -> None:
        self.weight8_ED, self.scale_E, self.bias_E = weight8_ED, scale_E, bias_E

    def __call__(self, x: Activation, *, gelu: bool = False) -> Tensor:
        assert isinstance(x, _Bytes)
        assert not gelu, "in eight bits GELU belongs to the pass that quantises it"
        return kernels.linear_fp8(
            x.x8_BLD,
            x.scale_BL,
            self.weight8_ED,
            self.scale_E,
            self.bias_E,
            out_dtype=self.bias_E.dtype,
            impl=Impl.TORCH,
        )


_Linear = _Dense | _Dense8


class _Rested(nn.Linear):
    """A linear layer of the DiT whose weight now lies in eight bits, widened anew at every call.

    The sink is prefilled through it, once per reference; a chunk never is.
    """

    def __init__(self, weight8_ED: Tensor, scale_E: Tensor, bias_E: Tensor) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight8_ED.shape
        self.weight8_ED = nn.Buffer(weight8_ED)
        self.scale_E = nn.Buffer(scale_E)
        self.bias = nn.Parameter(bias_E, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        weight_ED = (self.weight8_ED.float() * self.scale_E[:, None]).to(input.dtype)
        return F.linear(input, weight_ED, self.bias)


def _joined(linears: tuple[nn.Linear, ...]) -> tuple[Tensor, Tensor]:
    """Stack linear layers into one matrix and make each of them a view of it; one alone stays where it is."""
    if len(linears) == 1:
        return linears[0].weight.data, linears[0].bias.data
    weight_ED = torch.cat([linear.weight.data for linear in linears])
    bias_E = torch.cat([linear.bias.data for linear in linears])
    sizes = [linear.out_features for linear in linears]
    for linear, rows, shift in zip(linears, weight_ED.split(sizes), bias_E.split(sizes), strict=True):
        linear.weight = nn.Parameter(rows, requires_grad=False)
        linear.bias = nn.Parameter(shift, requires_grad=False)
    return weight_ED, bias_E


# ----------------------------------------------------------------------------------------- what stands between them


class _Between(Protocol):
    """All that a step does between its linear layers and its attention."""

    def open(self, x_BLD: Tensor, scale: Tensor, shift: Tensor, eps: float, *, eight_bits: bool) -> Activation:
        """Norm and modulation."""
        ...

    def close(
        self,
        x_BLD: Tensor,
        y_BLD: Tensor,
        gate: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        eps: float,
        *,
        eight_bits: bool,
    ) -> tuple[Tensor, Activation]:
        """``x + gate * y``, and that opened again; may write over ``x``."""
        ...

    def place(self, qkv_BLE: Tensor, layer: _Layer, rotation: Rotation, ring: _Ring, eps: float) -> Tensor:
        """Norm and rotate q and k, write k and v into their slot; returns ``q_BLNK``."""
        ...

    def norm(self, x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor: ...

    def enter(self, x_BLD: Tensor, *, eight_bits: bool) -> Activation:
        """An activation that no other pass prepared."""
        ...

    def gelu8(self, x_BLF: Tensor) -> Activation:
        """GELU (tanh) of the hidden layer, in eight bits."""
        ...


class _Fused:
    """Our kernels: one pass over memory each."""

    def __init__(self, impl: Impl) -> None:
        self._impl = impl

    def open(self, x_BLD: Tensor, scale: Tensor, shift: Tensor, eps: float, *, eight_bits: bool) -> Activation:
        if eight_bits:
            return _Bytes(*kernels.norm_modulate_fp8(x_BLD, scale, shift, eps=eps, impl=self._impl))
        return kernels.norm_modulate(x_BLD, scale, shift, eps=eps, impl=self._impl)

    def close(
        self,
        x_BLD: Tensor,
        y_BLD: Tensor,
        gate: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        eps: float,
        *,
        eight_bits: bool,
    ) -> tuple[Tensor, Activation]:
        arguments = (x_BLD, y_BLD, gate, scale, shift)
        if eight_bits:
            return x_BLD, _Bytes(*kernels.gate_residual_norm_modulate_fp8_(*arguments, eps=eps, impl=self._impl))
        return x_BLD, kernels.gate_residual_norm_modulate_(*arguments, eps=eps, impl=self._impl)

    def place(self, qkv_BLE: Tensor, layer: _Layer, rotation: Rotation, ring: _Ring, eps: float) -> Tensor:
        q_BLD, k_BLD, v_BLD = qkv_BLE.chunk(3, dim=-1)
        q_BLNK, _ = kernels.qk_norm_rope_write(
            q_BLD,
            k_BLD,
            v_BLD,
            q_weight_D=layer.norm_q_D,
            k_weight_D=layer.norm_k_D,
            cos_LR=rotation.cos_LF,
            sin_LR=rotation.sin_LF,
            keys_BMNK=ring.keys_BMNK,
            values_BMNK=ring.values_BMNK,
            key_scale_BMN=ring.key_scale_BMN,
            value_scale_BMN=ring.value_scale_BMN,
            slot=ring.slot,
            ring_start=ring.sink_tokens,
            eps=eps,
            impl=self._impl,
        )
        return q_BLNK

    def norm(self, x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return kernels.rms_norm(x_BLD, weight_D, eps=eps, impl=self._impl)

    def enter(self, x_BLD: Tensor, *, eight_bits: bool) -> Activation:
        return _Bytes(*kernels.quantise_rows(x_BLD, impl=self._impl)) if eight_bits else x_BLD

    def gelu8(self, x_BLF: Tensor) -> Activation:
        return _Bytes(*kernels.gelu_fp8(x_BLF, impl=self._impl))


class _Traced:
    """The same in torch that a compiler can see through, so that it does the fusing."""

    def open(self, x_BLD: Tensor, scale: Tensor, shift: Tensor, eps: float, *, eight_bits: bool) -> Activation:
        if eight_bits:
            return _Bytes(*reference.quantise_rows(reference.norm_modulate(x_BLD.float(), scale, shift, eps)))
        return reference.norm_modulate(x_BLD, scale, shift, eps)

    def close(
        self,
        x_BLD: Tensor,
        y_BLD: Tensor,
        gate: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        eps: float,
        *,
        eight_bits: bool,
    ) -> tuple[Tensor, Activation]:
        # A new tensor, not the old one overwritten: torch 2.13's compiler fails on a CPU where it fuses two writes.
        x_BLD = reference.gate_residual(x_BLD, y_BLD, gate)
        return x_BLD, self.open(x_BLD, scale, shift, eps, eight_bits=eight_bits)

    def place(self, qkv_BLE: Tensor, layer: _Layer, rotation: Rotation, ring: _Ring, eps: float) -> Tensor:
        q_BLD, k_BLD, v_BLD = qkv_BLE.chunk(3, dim=-1)
        weights = (layer.norm_q_D, layer.norm_k_D)
        q_BLNK, k_BLNK = reference.qk_norm_rope(q_BLD, k_BLD, *weights, rotation.cos_LF, rotation.sin_LF, eps)
        L = q_BLD.shape[1]
        rows_L = ring.sink_tokens + ring.slot * L + torch.arange(L, device=q_BLD.device)
        v_BLNK = v_BLD.unflatten(-1, k_BLNK.shape[-2:])
        for rows_BMNK, scales_BMN, x_BLNK in (
            (ring.keys_BMNK, ring.key_scale_BMN, k_BLNK),
            (ring.values_BMNK, ring.value_scale_BMN, v_BLNK),
        ):
            if scales_BMN is None:
                rows_BMNK.index_copy_(1, rows_L, x_BLNK.to(rows_BMNK.dtype))
            else:
                x8_BLNK, scale_BLN = reference.quantise_rows(x_BLNK.float())
                # The bits are what moves: no index_copy_ takes eight-bit floats.
                rows_BMNK.view(torch.uint8).index_copy_(1, rows_L, x8_BLNK.view(torch.uint8))
                scales_BMN.index_copy_(1, rows_L, scale_BLN)
        return q_BLNK.to(q_BLD.dtype)

    def norm(self, x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return reference.rms_norm(x_BLD, weight_D, eps)

    def enter(self, x_BLD: Tensor, *, eight_bits: bool) -> Activation:
        return _Bytes(*reference.quantise_rows(x_BLD)) if eight_bits else x_BLD

    def gelu8(self, x_BLF: Tensor) -> Activation:
        return _Bytes(*reference.quantise_rows(reference.gelu_tanh(x_BLF.float())))


# ------------------------------------------------------------------------------------------------------- one layer


@dataclass(slots=True, eq=False)
class _Query:
    """A cross-attention whose keys and values are given."""

    q: _Linear
    norm_D: Tensor
    o: _Linear
    backend: str

    def __call__(self, between: _Between, h: Activation, k_BPNK: Tensor, v_BPNK: Tensor, eps: float) -> Tensor:
        q_BLNK = between.norm(self.q(h), self.norm_D, eps).unflatten(-1, k_BPNK.shape[-2:])
        y_BLNK = kernels.attend(q_BLNK, k_BPNK, v_BPNK, k_BPNK.shape[1], backend=self.backend)
        return self.o(between.enter(y_BLNK.flatten(2), eight_bits=self.o.eight_bits))


@dataclass(slots=True, eq=False)
class _Layer:
    """One block's weights, laid out for use."""

    qkv: _Linear
    norm_q_D: Tensor
    norm_k_D: Tensor
    o: _Linear
    text: _Query
    norm3_scale_1D: Tensor
    norm3_shift_1D: Tensor
    up: _Linear
    down: _Linear
    audio: _Query | None


@dataclass(slots=True, eq=False)
class _Constants:
    """Modulation of one layer at one noise level, float32 ``[1, D]``."""

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor
    scale2: Tensor
    gate2: Tensor


@dataclass(slots=True, eq=False)
class _Ring:
    """One layer's history, and where in it this chunk goes and how far it sees."""

    keys_BMNK: Tensor
    values_BMNK: Tensor
    key_scale_BMN: Tensor | None
    value_scale_BMN: Tensor | None
    slot: Tensor
    sink_tokens: int
    length: Tensor | int
    backend: str


def _attend(between: _Between, eps: float, h: Activation, layer: _Layer, rotation: Rotation, ring: _Ring) -> Tensor:
    """Self-attention over the history. What is used once has no name here, so that its memory is free at once."""
    q_BLNK = between.place(layer.qkv(h), layer, rotation, ring, eps)
    y_BLNK = kernels.attend(
        q_BLNK,
        ring.keys_BMNK,
        ring.values_BMNK,
        ring.length,
        backend=ring.backend,
        key_scale_BMN=ring.key_scale_BMN,
        value_scale_BMN=ring.value_scale_BMN,
    )
    return layer.o(between.enter(y_BLNK.flatten(2), eight_bits=layer.o.eight_bits))


def _block(
    between: _Between,
    eps: float,
    x_BLD: Tensor,
    h: Activation,
    layer: _Layer,
    constants: _Constants,
    rotation: Rotation,
    text_k_BPNK: Tensor,
    text_v_BPNK: Tensor,
    ring: _Ring,
) -> tuple[Tensor, Tensor]:
    """Self-attention and attention to the prompt, added to ``x``; returns that and the feed-forward's branch.

    ``h`` is ``x``, normed and modulated for this layer. ``x`` may be overwritten.
    """
    y_BLD = _attend(between, eps, h, layer, rotation, ring)
    scale, shift = layer.norm3_scale_1D, layer.norm3_shift_1D
    x_BLD, h = between.close(x_BLD, y_BLD, constants.gate1, scale, shift, eps, eight_bits=layer.text.q.eight_bits)
    y_BLD = layer.text(between, h, text_k_BPNK, text_v_BPNK, eps)
    scale, shift = constants.scale2, constants.shift2
    x_BLD, h = between.close(x_BLD, y_BLD, None, scale, shift, eps, eight_bits=layer.up.eight_bits)
    hidden = between.gelu8(layer.up(h)) if layer.down.eight_bits else layer.up(h, gelu=True)
    return x_BLD, layer.down(hidden)


# -------------------------------------------------------------------------------------------------- what is served


class _Inputs:
    """What captured steps read: buffers of fixed address, shared by the steps and graphs of a rank.

    What lives here already, or was loaded by the step before, is not copied again: callers hand over new objects, not
    old ones with new contents.
    """

    def __init__(self) -> None:
        self._latent_BCTHW: Tensor | None = None
        self._rotation: Rotation | None = None
        self._text: TextCondition | None = None
        self._audio: AudioCondition | None = None
        self._last: tuple[Rotation | None, TextCondition | None, AudioCondition | None] = (None, None, None)

    def adopt_text(self, text: TextCondition) -> TextCondition:
        """Bring a condition to its fixed address, which is its own if it is the first."""
        if self._text is None:
            self._text = text
        elif text is not self._text:
            self._text.keys_ZBPNK.copy_(text.keys_ZBPNK, non_blocking=True)
            self._text.values_ZBPNK.copy_(text.values_ZBPNK, non_blocking=True)
        return self._text

    def adopt_audio(self, audio: AudioCondition) -> AudioCondition:
        if self._audio is None:
            self._audio = audio
        elif audio is not self._audio:
            for mine, theirs in zip(self._audio.parts, audio.parts, strict=True):
                for buffer, value in zip(mine, theirs, strict=True):
                    buffer.copy_(value, non_blocking=True)
        return self._audio

    def load(
        self, latent_BCTHW: Tensor, rotation: Rotation, text: TextCondition, audio: AudioCondition | None
    ) -> tuple[Tensor, Rotation, TextCondition, AudioCondition | None]:
        if self._latent_BCTHW is None or self._rotation is None:
            self._latent_BCTHW = torch.empty_like(latent_BCTHW)
            self._rotation = Rotation(torch.empty_like(rotation.cos_LF), torch.empty_like(rotation.sin_LF))
        last_rotation, last_text, last_audio = self._last
        self._latent_BCTHW.copy_(latent_BCTHW, non_blocking=True)
        if rotation is not last_rotation:
            self._rotation.copy_(rotation)
        if self._text is None:
            self._text = TextCondition(text.keys_ZBPNK.clone(), text.values_ZBPNK.clone())
        elif text is not last_text:
            self.adopt_text(text)
        if audio is not None and self._audio is None:
            self._audio = AudioCondition(*(tuple(t.clone() for t in part) for part in audio.parts))
        elif audio is not None and audio is not last_audio:
            self.adopt_audio(audio)
        self._last = (rotation, text, audio)
        return self._latent_BCTHW, self._rotation, self._text, None if audio is None else self._audio


class ServedWeights:
    """A DiT's weights laid out for serving, and what the steps of a rank share.

    The projections to q, k and v become views of one matrix, and what is quantised is dropped: the DiT keeps working
    and nothing is held twice.

    Raises BackendError when the options cannot run on the DiT's device.
    """

    def __init__(self, dit: CausalDiT, options: StepOptions) -> None:
        self.dit = dit
        self.options = options
        self.impl = options.resolved(dit.device)
        options.check(dit.config, dit.device, dit.dtype)
        self.graphs: Graphs | None = CudaGraphs(dit.device) if options.graph and dit.device.type == "cuda" else None
        self.inputs = _Inputs()
        self._backends: dict[torch.Size, str] = {}
        self._audio_graph: tuple[Tensor, AudioCondition, Callable[[], None]] | None = None
        kept = options.kept_layers
        whole = (*range(kept), *range(dit.config.num_layers - kept, dit.config.num_layers))
        self.layers = [
            self._layer(z, block, eight_bits=options.precision is Precision.FP8 and z not in whole)
            for z, block in enumerate(dit.blocks)
        ]
        # A patch does not overlap its neighbours, so its embedding is a matrix product; what is added to every video
        # token (`CausalDiT.embed_video`) is one bias.
        bias_D = dit.patch_embedding.bias
        assert bias_D is not None
        bias_D = bias_D.data.float()
        if dit.config.audio is not None:
            assert dit.cond_encoder.bias is not None
            bias_D = bias_D + dit.cond_encoder.bias.data.float() + dit.trainable_cond_mask.weight.data[0].float()
        self._embed_weight_DC = dit.patch_embedding.weight.data.flatten(1)
        self._embed_bias_D = bias_D.to(dit.dtype)

    @property
    def needs_warming(self) -> bool:
        """Whether anything is compiled or captured."""
        return self.graphs is not None or self.options.compile

    def text_condition(self, text_BPC: Tensor) -> TextCondition:
        """`CausalDiT.text_condition`, computed once per prompt; with graphs, into the buffers that they read."""
        text = self.dit.text_condition(text_BPC)
        return text if self.graphs is None else self.inputs.adopt_text(text)

    def audio_condition(self, audio_BZEA: Tensor) -> AudioCondition:
        """`CausalDiT.audio_condition`, computed once per chunk; with graphs, a graph of its own, and the result lives
        until the next call.
        """
        if self.graphs is None:
            return self.dit.audio_condition(audio_BZEA)
        if self._audio_graph is None:
            heard_BZEA = torch.zeros_like(audio_BZEA, device=self.dit.device)
            audio, replay = self.graphs.capture(lambda: self.dit.audio_condition(heard_BZEA))
            self._audio_graph = heard_BZEA, audio, replay
        heard_BZEA, audio, replay = self._audio_graph
        heard_BZEA.copy_(audio_BZEA, non_blocking=True)
        replay()
        return self.inputs.adopt_audio(audio)

    def backend(self, memory: StepMemory) -> str:
        """The attention backend that the options name; ``auto`` is measured once for all steps of a rank."""
        keys_BMNK, values_BMNK = memory.keys_ZBMNK[0], memory.values_ZBMNK[0]
        shape = keys_BMNK.shape
        if shape not in self._backends:
            name = self.options.resolved_attention(keys_BMNK.device, self.dit.dtype, shape[-1])
            q_BLNK = torch.zeros(
                (shape[0], memory.chunk_tokens, *shape[2:]), dtype=self.dit.dtype, device=keys_BMNK.device
            )
            self._backends[shape] = kernels.resolve_backend(
                name,
                q_BLNK,
                keys_BMNK,
                values_BMNK,
                key_scale_BMN=None if memory.key_scale_ZBMN is None else memory.key_scale_ZBMN[0],
                value_scale_BMN=None if memory.value_scale_ZBMN is None else memory.value_scale_ZBMN[0],
            )
            for layer in self.layers:
                layer.text.backend = self._backends[shape]
        return self._backends[shape]

    def embed(self, latent_BCTHW: Tensor) -> Tensor:
        """`CausalDiT.embed_video` as one matrix product."""
        _, ph, pw = self.dit.config.patch
        cells = latent_BCTHW.unflatten(4, (-1, pw)).unflatten(3, (-1, ph))
        patches_BLC = cells.permute(0, 2, 3, 5, 1, 4, 6).flatten(1, 3).flatten(2)
        return F.linear(patches_BLC.to(self._embed_weight_DC.dtype), self._embed_weight_DC, self._embed_bias_D)

    def _layer(self, index: int, block: Block, *, eight_bits: bool) -> _Layer:
        dit = self.dit
        injector = dit.injector_of.get(index)
        audio = None if injector is None else dit.audio_injector.injector.at(injector)
        return _Layer(
            qkv=self._linear(block.self_attn, ("q", "k", "v"), eight_bits=eight_bits),
            norm_q_D=block.self_attn.norm_q.weight.data,
            norm_k_D=block.self_attn.norm_k.weight.data,
            o=self._linear(block.self_attn, ("o",), eight_bits=eight_bits),
            text=self._query(block.cross_attn, eight_bits=eight_bits),
            # A norm with weights is a modulation that never changes: norm * w + b = norm * (1 + (w - 1)) + b.
            norm3_scale_1D=(block.norm3.weight.data.float() - 1)[None],
            norm3_shift_1D=block.norm3.bias.data.float()[None],
            up=self._linear(block.ffn, ("0",), eight_bits=eight_bits),
            down=self._linear(block.ffn, ("2",), eight_bits=eight_bits),
            audio=None if audio is None else self._query(audio, eight_bits=eight_bits),
        )

    def _query(self, attention: Attention, *, eight_bits: bool) -> _Query:
        return _Query(
            q=self._linear(attention, ("q",), eight_bits=eight_bits),
            norm_D=attention.norm_q.weight.data,
            o=self._linear(attention, ("o",), eight_bits=eight_bits),
            backend="sdpa",
        )

    def _linear(self, parent: nn.Module, names: tuple[str, ...], *, eight_bits: bool) -> _Linear:
        """Linear layers of a module as one; in eight bits they take the place of the originals."""
        linears: list[nn.Linear] = []
        for name in names:
            linear = getattr(parent, name)
            if not isinstance(linear, nn.Linear) or isinstance(linear, _Rested):
                raise BackendError(
                    "these weights were quantised for serving before; share one ServedWeights between steps, "
                    "or load the model again"
                )
            linears.append(linear)
        weight_ED, bias_E = _joined(tuple(linears))
        if not eight_bits:
            return _Dense(weight_ED, bias_E, None if self.options.compile else self.impl)
        weight8_ED, scale_E = kernels.quantise_rows(weight_ED, impl=self.impl)
        first = 0
        for name, linear in zip(names, linears, strict=True):
            rows = slice(first, first + linear.out_features)
            setattr(parent, name, _Rested(weight8_ED[rows], scale_E[rows], bias_E[rows]))
            first += linear.out_features
        return _Dense8(weight8_ED, scale_E, bias_E)


class ServedStep:
    """One noise level of one stream, ready to be served.

    Call it with a chunk whose slot was admitted to the memory and whose sink was turned; it writes the chunk's keys and
    values and returns the velocity, float32. Steps that share weights take turns, on one stream of the device.
    """

    def __init__(
        self, weights: ServedWeights, modulation: Modulation, memory: StepMemory, options: StepOptions
    ) -> None:
        self._weights = weights
        self._memory = memory
        self._between = _Fused(weights.impl)
        self._within: _Between = _Traced() if options.compile else self._between
        self._eps = weights.dit.config.eps
        self._constants = [_Constants(*(row[None] for row in rows)) for rows in modulation.layers_Z6D]
        self._sigma = modulation.sigma
        self._head_shift_1D, self._head_scale_1D = modulation.head_2D[:1], modulation.head_2D[1:]
        self._backend = weights.backend(memory)
        # A function, not a method: one compilation serves all steps.
        self._block = torch.compile(_block, fullgraph=True) if options.compile else _block
        none = [None] * memory.keys_ZBMNK.shape[0]
        key_scales = none if memory.key_scale_ZBMN is None else memory.key_scale_ZBMN
        value_scales = none if memory.value_scale_ZBMN is None else memory.value_scale_ZBMN
        self._rings = list(zip(memory.keys_ZBMNK, memory.values_ZBMNK, key_scales, value_scales, strict=True))
        self._captured: dict[int, tuple[Tensor, Callable[[], None]]] = {}

    def __call__(
        self,
        latent_BCTHW: Tensor,
        rotation: Rotation,
        text: TextCondition,
        audio: AudioCondition | None,
    ) -> Tensor:
        graphs = self._weights.graphs
        if graphs is None:
            return self._forward(latent_BCTHW, rotation, text, audio)
        inputs = self._weights.inputs.load(latent_BCTHW, rotation, text, audio)
        # A backend that reads the fill level on the device needs one graph; the others one per level.
        key = 0 if self._follows_length else self._memory.length_on_host
        if key not in self._captured:
            self._captured[key] = graphs.capture(lambda: self._forward(*inputs))
        velocity_BCTHW, replay = self._captured[key]
        replay()
        return velocity_BCTHW.clone()

    def warm(
        self,
        latent_BCTHW: Tensor,
        rotation: Rotation,
        text: TextCondition,
        audio: AudioCondition | None,
    ) -> None:
        """Compile and capture all that a stream will need, at every fill level, before its first chunk.

        Values do not matter, shapes do. The memory must hold no chunk (MemoryOrderError), and is left as it was.
        """
        if not self._weights.needs_warming:
            return
        window = self._memory.ring.window
        for filled in (window,) if self._follows_length else range(window, 0, -1):
            with self._memory.rehearsal(filled):
                self(latent_BCTHW, rotation, text, audio)

    @property
    def _follows_length(self) -> bool:
        """Whether attention reads the fill level where a graph can follow it."""
        if self._memory.eight_bits:
            return self._backend == "triton"  # the others widen what they read, and must know how much
        # The reference could read it, but would make the host wait.
        return kernels.BACKENDS[self._backend].counts_on_device and self._backend != "reference"

    def _forward(
        self, latent_BCTHW: Tensor, rotation: Rotation, text: TextCondition, audio: AudioCondition | None
    ) -> Tensor:
        weights, memory, between, eps = self._weights, self._memory, self._between, self._eps
        layers = weights.layers
        _, _, T, H, W = latent_BCTHW.shape
        length = memory.length if self._follows_length else memory.length_on_host
        x_BLD = weights.embed(latent_BCTHW)
        constants = self._constants[0]
        h: Activation = between.open(
            x_BLD, constants.scale1, constants.shift1, eps, eight_bits=layers[0].qkv.eight_bits
        )
        y_BLD, gate = x_BLD, constants.gate2
        injector = 0
        for z, layer in enumerate(layers):
            x_BLD, y_BLD = self._block(
                self._within,
                eps,
                x_BLD,
                h,
                layer,
                self._constants[z],
                rotation,
                text.keys_ZBPNK[z],
                text.values_ZBPNK[z],
                _Ring(*self._rings[z], memory.slot_index, memory.sink_tokens, length, self._backend),
            )
            gate = self._constants[z].gate2
            if layer.audio is not None and audio is not None:
                x_BLD, y_BLD = self._hear(x_BLD, y_BLD, gate, layer.audio, audio, injector)
                gate = None
                injector += 1
            if z + 1 < len(layers):
                constants, eight_bits = self._constants[z + 1], layers[z + 1].qkv.eight_bits
                scale, shift = constants.scale1, constants.shift1
                x_BLD, h = between.close(x_BLD, y_BLD, gate, scale, shift, eps, eight_bits=eight_bits)
        scale, shift = self._head_scale_1D, self._head_shift_1D
        _, h = between.close(x_BLD, y_BLD, gate, scale, shift, eps, eight_bits=False)
        assert isinstance(h, Tensor)
        said_BCTHW = weights.dit.unpatchify(weights.dit.head.head(h), T, H, W)
        return weights.dit.velocity(latent_BCTHW, said_BCTHW, self._sigma)

    def _hear(
        self, x_BLD: Tensor, y_BLD: Tensor, gate_1D: Tensor, query: _Query, audio: AudioCondition, injector: int
    ) -> tuple[Tensor, Tensor]:
        """Add the last branch to ``x``, and open the one in which every latent frame hears its own moment."""
        scale_BTD, shift_BTD = audio.scales[injector][:, :, 0], audio.shifts[injector][:, :, 0]
        T = scale_BTD.shape[1]
        gate_TD = gate_1D.expand(T, -1)
        x_BLD, h = self._between.close(
            x_BLD, y_BLD, gate_TD, scale_BTD, shift_BTD, ADAPTIVE_NORM_EPS, eight_bits=query.q.eight_bits
        )
        frames = h.frames(T) if isinstance(h, _Bytes) else _frames(h, T)
        y = query(self._between, frames, audio.keys[injector], audio.values[injector], self._eps)
        return x_BLD, y.view_as(x_BLD)
