"""One denoising step as it is served: constants computed once, branches fused, the whole of it one CUDA graph.

`CausalDiT.forward` says what a step computes, in differentiable torch. This module computes the same from the same
weights, for inference only:

- a rank's noise level never changes, so scales, shifts and gates are constants; so are the prompt's keys and values;
- q, k and v come from one matrix product, and one pass norms and rotates them and writes k and v into their ring slot;
- every ``x + gate * y`` is one pass with the norm and modulation that follow it; the residual stream ``x``, the
  embedding, the head and the encoder of sound are float32 whatever the weights are rounded to;
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

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import streamdiff_kernels as kernels
from streamdiff.errors import BackendError
from streamdiff.memory import StepMemory
from streamdiff.models import cost
from streamdiff.models.dit import (
    ADAPTIVE_NORM_EPS,
    Attention,
    AudioCondition,
    Block,
    CausalDiT,
    Modulation,
)
from streamdiff.models.served.block import (
    FusedRowOps,
    LayerHistory,
    LayerModulation,
    LayerWeights,
    RowOps,
    TracedRowOps,
    run_block,
)
from streamdiff.models.served.cross import (
    CrossAttention,
    FoldedText,
    ServedText,
    audio_keys,
    fold_audio,
    fold_text,
    folded_length,
    folds_sound,
    text_keys,
)
from streamdiff.models.served.eager import EagerRowOps
from streamdiff.models.served.graphs import CudaGraphs, Graphs
from streamdiff.models.served.linear import (
    Activation,
    AnyLinear,
    DenseLinear,
    DequantisedLinear,
    FP8Linear,
    FP8Tensor,
    by_frame,
    stack_linears,
)
from streamdiff.models.served.options import Precision, StepOptions
from streamdiff.rope import Rotation
from streamdiff_kernels import Impl


class _Inputs:
    """Static input buffers of captured graphs, shared by the steps of a stage.

    What lives here already, or was loaded by the step before, is not copied again: callers hand over new objects, not
    old ones with new contents.
    """

    def __init__(self) -> None:
        self._latent_BCTHW: Tensor | None = None
        self._rotation: Rotation | None = None
        self._texts: dict[int, ServedText] = {}
        """By `form`: folded and plain prompts have buffers and graphs of their own."""
        self._audio: AudioCondition | None = None
        self._last: tuple[Rotation | None, ServedText | None, AudioCondition | None] = (None, None, None)

    def adopt_text(self, text: ServedText) -> ServedText:
        """Bring a condition to its fixed address, which is its own if it is the first of its form."""
        mine = self._texts.setdefault(form(text), text)
        if text is not mine:
            for buffer, value in zip(parts(mine), parts(text), strict=True):
                buffer.copy_(value, non_blocking=True)
        return mine

    def adopt_audio(self, audio: AudioCondition) -> AudioCondition:
        if self._audio is None:
            self._audio = audio
        elif audio is not self._audio:
            for mine, theirs in zip(self._audio.parts, audio.parts, strict=True):
                for buffer, value in zip(mine, theirs, strict=True):
                    buffer.copy_(value, non_blocking=True)
        return self._audio

    def load(
        self, latent_BCTHW: Tensor, rotation: Rotation, text: ServedText, audio: AudioCondition | None
    ) -> tuple[Tensor, Rotation, ServedText, AudioCondition | None]:
        if self._latent_BCTHW is None or self._rotation is None:
            self._latent_BCTHW = torch.empty_like(latent_BCTHW)
            self._rotation = Rotation(torch.empty_like(rotation.cos_LF), torch.empty_like(rotation.sin_LF))
        last_rotation, last_text, last_audio = self._last
        self._latent_BCTHW.copy_(latent_BCTHW, non_blocking=True)
        if rotation is not last_rotation:
            self._rotation.copy_(rotation)
        if form(text) not in self._texts:
            self._texts[form(text)] = type(text)(*(part.clone() for part in parts(text)))
        elif text is not last_text:
            self.adopt_text(text)
        if audio is not None and self._audio is None:
            self._audio = type(audio)(*(tuple(t.clone() for t in part) for part in audio.parts))
        elif audio is not None and audio is not last_audio:
            self.adopt_audio(audio)
        self._last = (rotation, text, audio)
        return self._latent_BCTHW, self._rotation, self._texts[form(text)], None if audio is None else self._audio


def parts(text: ServedText) -> tuple[Tensor, ...]:
    """The tensors of a prompt's condition, in the order of its fields."""
    if isinstance(text, FoldedText):
        return text.keys_ZBNKP, text.bias_P, text.outputs_ZBQD
    return text.keys_ZBPNK, text.values_ZBPNK


def form(text: ServedText) -> int:
    """What a captured graph depends on: 0 for a plain condition, the number of keys of a folded one."""
    return len(text.bias_P) if isinstance(text, FoldedText) else 0


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
        small = cost.packed_bytes(dit.config, dit.dtype.itemsize) > 0
        self._packs = small and dit.device.type == "cpu" and self.impl is Impl.TORCH
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
            # Small beside the rest, and every chunk hears through it.
            dit.casual_audio_encoder.float()
        self._embed_weight_DC = dit.patch_embedding.weight.data.flatten(1).float()
        self._embed_bias_D = bias_D
        self.head_weight_ED, self.head_bias_E = dit.head.head.weight.data.float(), dit.head.head.bias.data.float()

    def apart(self) -> ServedWeights:
        """The same weights with input buffers of their own, for a stage whose packets come between those of others: of
        another stream, or of another rank on this device. What a graph reads belongs to one of them.
        """
        other = copy.copy(self)
        other.inputs, other._audio_graph = _Inputs(), None
        return other

    @property
    def needs_warming(self) -> bool:
        """Whether anything is compiled or captured."""
        return self.graphs is not None or self.options.compile

    def text_condition(self, text_BPC: Tensor) -> ServedText:
        """`CausalDiT.text_condition`, folded where that pays, computed once per prompt; with graphs, into the buffers
        that they read.
        """
        num_rows, most = text_BPC.shape[1], self.options.folded_keys
        length = folded_length(self.dit, num_rows, most, always_most=self.needs_warming)
        text = self.dit.text_condition(text_BPC) if length is None else fold_text(self.dit, text_BPC, length)
        return text if self.graphs is None else self.inputs.adopt_text(text)

    def audio_condition(self, audio_BZEA: Tensor) -> AudioCondition:
        """`CausalDiT.audio_condition`, computed once per chunk; with graphs, a graph of its own, and the result lives
        until the next call.
        """
        if self.graphs is None:
            return self._audio_condition(audio_BZEA)
        if self._audio_graph is None:
            heard_BZEA = torch.zeros_like(audio_BZEA, device=self.dit.device)
            audio, replay = self.graphs.capture(lambda: self._audio_condition(heard_BZEA))
            self._audio_graph = heard_BZEA, audio, replay
        heard_BZEA, audio, replay = self._audio_graph
        heard_BZEA.copy_(audio_BZEA, non_blocking=True)
        replay()
        return self.inputs.adopt_audio(audio)

    def _audio_condition(self, audio_BZEA: Tensor) -> AudioCondition:
        audio = self.dit.audio_condition(audio_BZEA)
        folds = folds_sound(self.dit) and self.options.folded_keys > 0 and self.options.precision is Precision.WEIGHTS
        return fold_audio(self.dit, audio) if folds else audio

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
                key_scale_BN=None if memory.key_scale_ZBN is None else memory.key_scale_ZBN[0],
                value_scale_BN=None if memory.value_scale_ZBN is None else memory.value_scale_ZBN[0],
            )
            for layer in self.layers:
                layer.text.backend = self._backends[shape]
        return self._backends[shape]

    def embed(self, latent_BCTHW: Tensor) -> Tensor:
        """`CausalDiT.embed_video` as one matrix product, float32."""
        _, ph, pw = self.dit.config.patch
        cells = latent_BCTHW.unflatten(4, (-1, pw)).unflatten(3, (-1, ph))
        patches_BLC = cells.permute(0, 2, 3, 5, 1, 4, 6).flatten(1, 3).flatten(2)
        return F.linear(patches_BLC.float(), self._embed_weight_DC, self._embed_bias_D)

    def _layer(self, index: int, block: Block, *, eight_bits: bool) -> LayerWeights:
        dit = self.dit
        injector = dit.injector_of.get(index)
        audio = None if injector is None else dit.audio_injector.injector.at(injector)
        return LayerWeights(
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

    def _query(self, attention: Attention, *, eight_bits: bool) -> CrossAttention:
        return CrossAttention(
            q=self._linear(attention, ("q",), eight_bits=eight_bits),
            norm_D=attention.norm_q.weight.data,
            o=self._linear(attention, ("o",), eight_bits=eight_bits),
            num_heads=attention.num_heads,
            backend="sdpa",
        )

    def _linear(self, parent: nn.Module, names: tuple[str, ...], *, eight_bits: bool) -> AnyLinear:
        """Linear layers of a module as one; in eight bits they take the place of the originals."""
        linears: list[nn.Linear] = []
        for name in names:
            linear = getattr(parent, name)
            if not isinstance(linear, nn.Linear) or isinstance(linear, DequantisedLinear):
                raise BackendError(
                    "these weights were quantised for serving before; share one ServedWeights between steps, "
                    "or load the model again"
                )
            linears.append(linear)
        weight_ED, bias_E = stack_linears(tuple(linears))
        if not eight_bits:
            return DenseLinear(weight_ED, bias_E, None if self.options.compile else self.impl, packs=self._packs)
        weight8_ED, scale_E = kernels.quantise_rows(weight_ED, impl=self.impl)
        first = 0
        for name, linear in zip(names, linears, strict=True):
            rows = slice(first, first + linear.out_features)
            setattr(parent, name, DequantisedLinear(weight8_ED[rows], scale_E[rows], bias_E[rows]))
            first += linear.out_features
        return FP8Linear(weight8_ED, scale_E, bias_E)


class ServedStep:
    """One denoising step (one noise level) of one stream, for inference.

    Call it with a chunk whose slot was admitted to the memory and whose sink was turned; it writes the chunk's keys and
    values and returns the velocity, float32. Steps that share weights take turns, on one stream of the device.
    """

    def __init__(
        self, weights: ServedWeights, modulation: Modulation, memory: StepMemory, options: StepOptions
    ) -> None:
        self._weights = weights
        self._memory = memory
        self._ops = FusedRowOps(weights.impl)
        self._block_ops: RowOps = TracedRowOps() if options.compile else self._ops
        is_eager = weights.impl is Impl.TORCH and not options.compile and weights.dit.dtype != torch.float64
        self._eager = EagerRowOps() if is_eager else None
        self._eps = weights.dit.config.eps
        self._constants = [LayerModulation(*(row[None] for row in rows)) for rows in modulation.layers_Z6D]
        self._sigma = modulation.sigma
        self._head_shift_1D, self._head_scale_1D = modulation.head_2D[:1], modulation.head_2D[1:]
        self._backend = weights.backend(memory)
        # A function, not a method: one compilation serves all steps.
        self._block = torch.compile(run_block, fullgraph=True) if options.compile else run_block
        none = [None] * memory.keys_ZBMNK.shape[0]
        key_scales = none if memory.key_scale_ZBN is None else memory.key_scale_ZBN
        value_scales = none if memory.value_scale_ZBN is None else memory.value_scale_ZBN
        self._rings = list(zip(memory.keys_ZBMNK, memory.values_ZBMNK, key_scales, value_scales, strict=True))
        self._captured: dict[tuple[int, int], tuple[Tensor, Callable[[], None]]] = {}

    def __call__(
        self,
        latent_BCTHW: Tensor,
        rotation: Rotation,
        text: ServedText,
        audio: AudioCondition | None,
    ) -> Tensor:
        graphs = self._weights.graphs
        if graphs is None:
            return self._forward(latent_BCTHW, rotation, text, audio)
        inputs = self._weights.inputs.load(latent_BCTHW, rotation, text, audio)
        # A backend that reads the fill level on the device needs one graph; the others one per level.
        key = 0 if self._follows_length else self._memory.length_on_host, form(text)
        if key not in self._captured:
            self._captured[key] = graphs.capture(lambda: self._forward(*inputs))
        velocity_BCTHW, replay = self._captured[key]
        replay()
        return velocity_BCTHW.clone()

    def warm(
        self,
        latent_BCTHW: Tensor,
        rotation: Rotation,
        text: ServedText,
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
        self, latent_BCTHW: Tensor, rotation: Rotation, text: ServedText, audio: AudioCondition | None
    ) -> Tensor:
        weights, memory, eps = self._weights, self._memory, self._eps
        ops, block_ops = self._row_ops(latent_BCTHW)
        layers = weights.layers
        _, _, T, H, W = latent_BCTHW.shape
        length = memory.length if self._follows_length else memory.length_on_host
        x_BLD = weights.embed(latent_BCTHW)
        constants = self._constants[0]
        h: Activation = ops.norm_modulate(
            x_BLD, constants.scale1, constants.shift1, eps, weights.dit.dtype, eight_bits=layers[0].qkv.eight_bits
        )
        y_BLD, gate = x_BLD, constants.gate2
        injector = 0
        for z, layer in enumerate(layers):
            x_BLD, y_BLD = self._block(
                block_ops,
                eps,
                x_BLD,
                h,
                layer,
                self._constants[z],
                rotation,
                text_keys(text, z),
                LayerHistory(*self._rings[z], memory.slot_index, memory.sink_tokens, length, self._backend),
            )
            gate = self._constants[z].gate2
            if layer.audio is not None and audio is not None:
                x_BLD, y_BLD = self._hear(ops, x_BLD, y_BLD, gate, layer.audio, audio, injector)
                gate = None
                injector += 1
            if z + 1 < len(layers):
                constants, eight_bits = self._constants[z + 1], layers[z + 1].qkv.eight_bits
                scale, shift = constants.scale1, constants.shift1
                x_BLD, h = ops.residual_norm_modulate(x_BLD, y_BLD, gate, scale, shift, eps, eight_bits=eight_bits)
        scale, shift = self._head_scale_1D, self._head_shift_1D
        _, h = ops.residual_norm_modulate(x_BLD, y_BLD, gate, scale, shift, eps, eight_bits=False, dtype=x_BLD.dtype)
        assert isinstance(h, Tensor)
        output_BLE = F.linear(h, weights.head_weight_ED, weights.head_bias_E)
        output_BCTHW = weights.dit.unpatchify(output_BLE, T, H, W)
        return weights.dit.velocity(latent_BCTHW, output_BCTHW, self._sigma)

    def _row_ops(self, given: Tensor) -> tuple[FusedRowOps, RowOps]:
        """Row ops for a forward from this latent: around blocks, and within."""
        # A recording reads its inputs where they lie; eager ops know them by what they are.
        if self._eager is None or self._weights.graphs is not None or kernels.is_watched(given):
            return self._ops, self._block_ops
        return self._eager, self._eager

    def _hear(
        self,
        ops: FusedRowOps,
        x_BLD: Tensor,
        y_BLD: Tensor,
        gate_1D: Tensor,
        query: CrossAttention,
        audio: AudioCondition,
        injector: int,
    ) -> tuple[Tensor, Tensor]:
        """Audio cross-attention: add the last branch to ``x``, then each latent frame attends to its audio tokens."""
        scale_BTD, shift_BTD = audio.scales[injector][:, :, 0], audio.shifts[injector][:, :, 0]
        T = scale_BTD.shape[1]
        gate_TD = gate_1D.expand(T, -1)
        x_BLD, h = ops.residual_norm_modulate(
            x_BLD, y_BLD, gate_TD, scale_BTD, shift_BTD, ADAPTIVE_NORM_EPS, eight_bits=query.q.eight_bits
        )
        frames = h.frames(T) if isinstance(h, FP8Tensor) else by_frame(h, T)
        y = query(ops, frames, audio_keys(audio, injector), self._eps)
        return x_BLD, y.view_as(x_BLD)
