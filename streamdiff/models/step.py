"""One denoising step as it is served: constants computed once, branches fused, the whole of it one CUDA graph.

`CausalDiT.forward` says what a step computes, in differentiable torch. This module computes the same from the same
weights, for inference only:

- a rank's noise level never changes, so scales, shifts and gates are constants; so are the prompt's keys and values;
- q, k and v come from one matrix product, and one pass norms and rotates them and writes k and v into their ring slot;
- every ``x + gate * y`` is one pass with the norm and modulation that follow it;
- attention reads the ring where it lies: nothing is concatenated, masked or rotated again;
- on CUDA, inputs are copied into buffers of fixed address and the step is replayed as one graph. The slot and, where
  the attention backend can read it there, the fill level stay on the device; other backends get one graph per level.

Linear layers may run in eight bits (e4m3, one scale per token and per output), their inputs quantised in the pass that
makes them; the first and last linear of the model, modulation, norms and attention stay as they are.

Axes: B streams, T latent frames, L tokens of this chunk, M tokens remembered, D model width, N heads, K head width,
F hidden width, Z layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import streamdiff_kernels as kernels
from streamdiff.errors import BackendError
from streamdiff.memory import StepMemory
from streamdiff.models.dit import Attention, AudioCondition, Block, CausalDiT, Modulation, TextCondition
from streamdiff.rope import Rotation
from streamdiff_kernels import Impl

_AUDIO_NORM_EPS = 1e-5


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
    attention: str = "sdpa"
    """A backend of `streamdiff_kernels`, or ``auto`` to measure once and take the fastest (then ranks may differ)."""
    precision: Precision = Precision.WEIGHTS
    graph: bool = True
    """Replay a CUDA graph; no effect on a CPU."""
    compile: bool = False
    """Compile the block with ``torch.compile`` instead of capturing the step; one compilation for all layers."""

    def resolved(self, device: torch.device) -> Impl:
        if self.impl is not None:
            return self.impl
        return Impl.TRITON if device.type == "cuda" else Impl.TORCH


Activation = Tensor | tuple[Tensor, Tensor]
"""What goes into a linear layer: as it is, or in eight bits with one scale per token."""


class _Dense:
    """A linear layer in the precision of its weights."""

    def __init__(self, weight_ED: Tensor, bias_E: Tensor) -> None:
        self.weight_ED, self.bias_E = weight_ED, bias_E

    def __call__(self, x: Activation) -> Tensor:
        assert isinstance(x, Tensor)
        return F.linear(x, self.weight_ED, self.bias_E)


class _Dense8:
    """A linear layer in eight bits; the weight is quantised once."""

    def __init__(self, weight_ED: Tensor, bias_E: Tensor, impl: Impl) -> None:
        self._weight8_ED, self._scale_E = kernels.quantise_rows(weight_ED, impl=impl)
        self._bias_E = bias_E
        self._dtype = weight_ED.dtype

    def __call__(self, x: Activation) -> Tensor:
        x8, scale = x
        return kernels.linear_fp8(
            x8, scale, self._weight8_ED, self._scale_E, self._bias_E, out_dtype=self._dtype, impl=Impl.TORCH
        )


_Linear = Callable[[Activation], Tensor]


@dataclass(slots=True, eq=False)
class _Query:
    """A cross-attention whose keys and values are given."""

    q: _Linear
    norm_D: Tensor
    o: _Linear


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


class ServedWeights:
    """A DiT's weights laid out for serving; shared by all steps of a rank.

    The projections to q, k and v become views of one matrix, so the DiT keeps working and nothing is held twice.
    """

    def __init__(self, dit: CausalDiT, options: StepOptions) -> None:
        self.dit = dit
        self.impl = options.resolved(dit.device)
        self.fp8 = options.precision is Precision.FP8
        if self.fp8 and dit.dtype != torch.bfloat16:
            raise BackendError(
                f"fp8 linears accumulate to bfloat16 but the weights are {dit.dtype}; load them as bfloat16"
            )
        kernels.require(self.impl, dit.device)
        self.layers = [self._layer(z, block) for z, block in enumerate(dit.blocks)]

    def _layer(self, index: int, block: Block) -> _Layer:
        dit = self.dit
        attention = block.self_attn
        injector = dit.injector_of.get(index)
        audio = None if injector is None else dit.audio_injector.injector.at(injector)
        return _Layer(
            qkv=self._linear(*_joined(attention.q, attention.k, attention.v)),
            norm_q_D=attention.norm_q.weight,
            norm_k_D=attention.norm_k.weight,
            o=self._linear(attention.o.weight, attention.o.bias),
            text=self._query(block.cross_attn),
            # A norm with weights is a modulation that never changes: norm * w + b = norm * (1 + (w - 1)) + b.
            norm3_scale_1D=(block.norm3.weight.float() - 1)[None],
            norm3_shift_1D=block.norm3.bias.float()[None],
            up=self._linear(block.up.weight, block.up.bias),
            down=self._linear(block.down.weight, block.down.bias),
            audio=None if audio is None else self._query(audio),
        )

    def _query(self, attention: Attention) -> _Query:
        return _Query(
            q=self._linear(attention.q.weight, attention.q.bias),
            norm_D=attention.norm_q.weight,
            o=self._linear(attention.o.weight, attention.o.bias),
        )

    def _linear(self, weight: Tensor, bias: Tensor) -> _Linear:
        return _Dense8(weight, bias, self.impl) if self.fp8 else _Dense(weight, bias)


def _joined(*linears: nn.Linear) -> tuple[Tensor, Tensor]:
    """Stack linear layers into one matrix and make each of them a view of it."""
    weight = torch.cat([linear.weight for linear in linears])
    bias = torch.cat([linear.bias for linear in linears])
    rows = linears[0].weight.shape[0]
    for i, linear in enumerate(linears):
        linear.weight.data = weight[i * rows : (i + 1) * rows]
        linear.bias.data = bias[i * rows : (i + 1) * rows]
    return weight, bias


class ServedStep:
    """One noise level of one stream, ready to be served.

    Call it with a chunk whose slot was admitted to the memory and whose sink was turned; it writes the chunk's keys and
    values and returns the velocity, float32.
    """

    def __init__(
        self, weights: ServedWeights, modulation: Modulation, memory: StepMemory, options: StepOptions
    ) -> None:
        self._weights = weights
        self._memory = memory
        self._impl = weights.impl
        self._eps = weights.dit.config.eps
        self._constants = [_Constants(*(row[None] for row in rows)) for rows in modulation.layers_Z6D]
        self._head_shift_1D, self._head_scale_1D = modulation.head_2D[:1], modulation.head_2D[1:]
        self._backend = self._resolve(options.attention)
        self._captures = options.graph and not options.compile and weights.dit.device.type == "cuda"
        self._block = torch.compile(self._plain_block, fullgraph=True) if options.compile else self._plain_block
        self._inputs: _Inputs | None = None
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(
        self,
        latent_BCTHW: Tensor,
        rotation: Rotation,
        text: TextCondition,
        audio: AudioCondition | None,
    ) -> Tensor:
        if not self._captures:
            return self._forward(latent_BCTHW, rotation, text, audio)
        if self._inputs is None:
            self._inputs = _Inputs(latent_BCTHW, rotation, text, audio)
        self._inputs.load(latent_BCTHW, rotation, text, audio)
        # A backend that reads the fill level on the device needs one graph; the others one per level.
        key = 0 if self._backend in _READS_LENGTH_ON_DEVICE else self._memory.length_on_host
        if key not in self._graphs:
            self._graphs[key] = self._captured(self._inputs)
        graph, velocity_BCTHW = self._graphs[key]
        graph.replay()
        return velocity_BCTHW.clone()

    def _captured(self, inputs: _Inputs) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        arguments = (inputs.latent_BCTHW, inputs.rotation, inputs.text, inputs.audio)
        # Kernels are compiled and libraries pick their algorithms outside the capture, on a stream of their own.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._forward(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            velocity_BCTHW = self._forward(*arguments)
        return graph, velocity_BCTHW

    def _resolve(self, name: str) -> str:
        memory = self._memory
        L = memory.chunk_tokens
        return kernels.resolve_backend(name, memory.keys_ZBMNK[0][:, :L], memory.keys_ZBMNK[0], memory.values_ZBMNK[0])

    def _forward(
        self, latent_BCTHW: Tensor, rotation: Rotation, text: TextCondition, audio: AudioCondition | None
    ) -> Tensor:
        dit, layers = self._weights.dit, self._weights.layers
        _, _, T, H, W = latent_BCTHW.shape
        x_BLD = dit.embed_video(latent_BCTHW)
        first = self._constants[0]
        h: Activation = self._open(x_BLD, first.scale1, first.shift1)
        injector = 0
        y_BLD, gate = x_BLD, None
        for z in range(len(layers)):
            y_BLD = self._block(
                x_BLD,
                h,
                layers[z],
                self._constants[z],
                rotation,
                text.keys_ZBPNK[z],
                text.values_ZBPNK[z],
                self._memory.keys_ZBMNK[z],
                self._memory.values_ZBMNK[z],
            )
            gate = self._constants[z].gate2
            if layers[z].audio is not None and audio is not None:
                kernels.gate_residual_(x_BLD, y_BLD, gate, impl=self._impl)
                y_BLD, gate = self._hear(x_BLD, layers[z], audio, injector), None
                injector += 1
            if z + 1 < len(layers):
                following = self._constants[z + 1]
                h = self._close(x_BLD, y_BLD, gate, following.scale1, following.shift1)
        h_BLD = kernels.gate_residual_norm_modulate_(
            x_BLD, y_BLD, gate, self._head_scale_1D, self._head_shift_1D, eps=self._eps, impl=self._impl
        )
        return dit.unpatchify(dit.head.head(h_BLD), T, H, W)

    def _plain_block(
        self,
        x_BLD: Tensor,
        h: Activation,
        layer: _Layer,
        constants: _Constants,
        rotation: Rotation,
        text_k_BPNK: Tensor,
        text_v_BPNK: Tensor,
        keys_BMNK: Tensor,
        values_BMNK: Tensor,
    ) -> Tensor:
        """Self-attention and attention to the prompt, added to ``x`` in place; returns the feed-forward's branch."""
        memory = self._memory
        q_BLD, k_BLD, v_BLD = layer.qkv(h).chunk(3, dim=-1)
        q_BLNK, _ = kernels.qk_norm_rope_write(
            q_BLD,
            k_BLD,
            v_BLD,
            q_weight_D=layer.norm_q_D,
            k_weight_D=layer.norm_k_D,
            cos_LR=rotation.cos_LF,
            sin_LR=rotation.sin_LF,
            keys_BMNK=keys_BMNK,
            values_BMNK=values_BMNK,
            slot=memory.slot_index,
            ring_start=memory.sink_tokens,
            eps=self._eps,
            impl=self._impl,
        )
        y_BLNK = kernels.attend(q_BLNK, keys_BMNK, values_BMNK, self._length, backend=self._backend)
        y_BLD = layer.o(self._enter(y_BLNK.flatten(2)))
        h = self._close(x_BLD, y_BLD, constants.gate1, layer.norm3_scale_1D, layer.norm3_shift_1D)
        y_BLD = self._ask(layer.text, h, text_k_BPNK, text_v_BPNK)
        h = self._close(x_BLD, y_BLD, None, constants.scale2, constants.shift2)
        return layer.down(self._activate(layer.up(h)))

    def _hear(self, x_BLD: Tensor, layer: _Layer, audio: AudioCondition, injector: int) -> Tensor:
        assert layer.audio is not None
        scale_BT1D, shift_BT1D = audio.scales[injector], audio.shifts[injector]
        T = scale_BT1D.shape[1]
        h_BLD = kernels.norm_modulate(
            x_BLD, scale_BT1D[:, :, 0], shift_BT1D[:, :, 0], eps=_AUDIO_NORM_EPS, impl=self._impl
        )
        frames = self._enter(h_BLD.unflatten(1, (T, -1)).flatten(0, 1))
        y = self._ask(layer.audio, frames, audio.keys[injector], audio.values[injector])
        return y.view_as(x_BLD)

    def _ask(self, query: _Query, h: Activation, k_BPNK: Tensor, v_BPNK: Tensor) -> Tensor:
        """Attention to a short, fixed set of keys."""
        q_BLD = kernels.rms_norm(query.q(h), query.norm_D, eps=self._eps, impl=self._impl)
        q_BLNK = q_BLD.unflatten(-1, k_BPNK.shape[-2:])
        y_BLNK = kernels.attend(q_BLNK, k_BPNK, v_BPNK, k_BPNK.shape[1], backend="sdpa")
        return query.o(self._enter(y_BLNK.flatten(2)))

    @property
    def _length(self) -> Tensor | int:
        memory = self._memory
        return memory.length if self._backend in _READS_LENGTH_ON_DEVICE else memory.length_on_host

    # Activations, in the precision of the linears

    def _open(self, x_BLD: Tensor, scale_1D: Tensor, shift_1D: Tensor) -> Activation:
        if self._weights.fp8:
            return kernels.norm_modulate_fp8(x_BLD, scale_1D, shift_1D, eps=self._eps, impl=self._impl)
        return kernels.norm_modulate(x_BLD, scale_1D, shift_1D, eps=self._eps, impl=self._impl)

    def _close(
        self, x_BLD: Tensor, y_BLD: Tensor, gate: Tensor | None, scale_1D: Tensor, shift_1D: Tensor
    ) -> Activation:
        close = kernels.gate_residual_norm_modulate_fp8_ if self._weights.fp8 else kernels.gate_residual_norm_modulate_
        return close(x_BLD, y_BLD, gate, scale_1D, shift_1D, eps=self._eps, impl=self._impl)

    def _enter(self, x_BLD: Tensor) -> Activation:
        return kernels.quantise_rows(x_BLD, impl=self._impl) if self._weights.fp8 else x_BLD

    def _activate(self, x_BLF: Tensor) -> Activation:
        if self._weights.fp8:
            return kernels.gelu_fp8(x_BLF, impl=self._impl)
        return F.gelu(x_BLF, approximate="tanh")


_READS_LENGTH_ON_DEVICE = frozenset({"triton", "fa3", "flash-attn"})


class _Inputs:
    """What a captured step reads: buffers of fixed address, shared by its graphs."""

    def __init__(
        self, latent_BCTHW: Tensor, rotation: Rotation, text: TextCondition, audio: AudioCondition | None
    ) -> None:
        self.latent_BCTHW = latent_BCTHW.clone()
        self.rotation = Rotation(rotation.cos_LF.clone(), rotation.sin_LF.clone())
        self.text = TextCondition(text.keys_ZBPNK.clone(), text.values_ZBPNK.clone())
        self.audio = (
            None if audio is None else AudioCondition(*(tuple(t.clone() for t in part) for part in audio.parts))
        )
        self._loaded = text

    def load(self, latent_BCTHW: Tensor, rotation: Rotation, text: TextCondition, audio: AudioCondition | None) -> None:
        self.latent_BCTHW.copy_(latent_BCTHW, non_blocking=True)
        self.rotation.copy_(rotation)
        if text is not self._loaded:
            self.text.keys_ZBPNK.copy_(text.keys_ZBPNK)
            self.text.values_ZBPNK.copy_(text.values_ZBPNK)
            self._loaded = text
        if audio is not None and self.audio is not None:
            for mine, theirs in zip(self.audio.parts, audio.parts, strict=True):
                for buffer, value in zip(mine, theirs, strict=True):
                    buffer.copy_(value, non_blocking=True)
