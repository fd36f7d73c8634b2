"""One transformer block as it is served: self-attention over the ring, cross-attention to the prompt, feed-forward.

What stands between its linear layers and its attention are `RowOps`: our fused kernels, or the same in torch that a
compiler can see through.

Axes: B streams, T latent frames, L tokens of this chunk, M tokens remembered, D model width, N heads, K head width, F
hidden width, E output width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

import streamdiff_kernels as kernels
from streamdiff.models.served.cross import CrossAttention, Keys
from streamdiff.models.served.linear import Activation, AnyLinear, FP8Tensor
from streamdiff.rope import Rotation
from streamdiff_kernels import Impl, reference


class RowOps(Protocol):
    """Element-wise and row-wise ops between linear layers and attention: norm, modulation, rotary embedding."""

    def norm_modulate(
        self, x_BLD: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype, *, eight_bits: bool
    ) -> Activation:
        """Norm and modulation, in ``dtype`` or in eight bits."""
        ...

    def residual_norm_modulate(
        self,
        x_BLD: Tensor,
        y_BLD: Tensor,
        gate: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        eps: float,
        *,
        eight_bits: bool,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Activation]:
        """Gated residual add ``x + gate * y``, in the type of ``x``, and its norm and modulation, in ``dtype`` (that
        of ``y``) or in eight bits; may write over ``x``.
        """
        ...

    def norm_rope_write(
        self, qkv_BLE: Tensor, layer: LayerWeights, rotation: Rotation, ring: LayerHistory, eps: float
    ) -> Tensor:
        """Norm and rotate q and k, write k and v into their slot; returns ``q_BLNK``."""
        ...

    def attend(self, q_BLNK: Tensor, ring: LayerHistory) -> Tensor:
        """Self-attention over a history; ``[B, L, N, K]``."""
        ...

    def attend_all(self, q_BLNK: Tensor, k_BPNK: Tensor, v_BPNK: Tensor, backend: str) -> Tensor:
        """Attention to all keys; ``[B, L, N, K]``."""
        ...

    def rms_norm(self, x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor: ...

    def quantised(self, x_BLD: Tensor, *, eight_bits: bool) -> Activation:
        """Quantise an activation for an eight-bit layer; unchanged otherwise."""
        ...

    def gelu_fp8(self, x_BLF: Tensor) -> Activation:
        """GELU (tanh) of the hidden layer, in eight bits."""
        ...


class Attending:
    """Attention through the door of our kernels."""

    def attend(self, q_BLNK: Tensor, ring: LayerHistory) -> Tensor:
        return kernels.attend(
            q_BLNK,
            ring.keys_BMNK,
            ring.values_BMNK,
            ring.length,
            backend=ring.backend,
            key_scale_BN=ring.key_scale_BN,
            value_scale_BN=ring.value_scale_BN,
        )

    def attend_all(self, q_BLNK: Tensor, k_BPNK: Tensor, v_BPNK: Tensor, backend: str) -> Tensor:
        return kernels.attend(q_BLNK, k_BPNK, v_BPNK, k_BPNK.shape[1], backend=backend)


class FusedRowOps(Attending):
    """Row ops by our fused kernels: one pass over memory each."""

    def __init__(self, impl: Impl) -> None:
        self._impl = impl

    def norm_modulate(
        self, x_BLD: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype, *, eight_bits: bool
    ) -> Activation:
        if eight_bits:
            return FP8Tensor(*kernels.norm_modulate_fp8(x_BLD, scale, shift, eps=eps, impl=self._impl))
        return kernels.norm_modulate(x_BLD, scale, shift, eps=eps, out_dtype=dtype, impl=self._impl)

    def residual_norm_modulate(
        self,
        x_BLD: Tensor,
        y_BLD: Tensor,
        gate: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        eps: float,
        *,
        eight_bits: bool,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Activation]:
        arguments = (x_BLD, y_BLD, gate, scale, shift)
        if eight_bits:
            return x_BLD, FP8Tensor(*kernels.gate_residual_norm_modulate_fp8_(*arguments, eps=eps, impl=self._impl))
        return x_BLD, kernels.gate_residual_norm_modulate_(*arguments, eps=eps, out_dtype=dtype, impl=self._impl)

    def norm_rope_write(
        self, qkv_BLE: Tensor, layer: LayerWeights, rotation: Rotation, ring: LayerHistory, eps: float
    ) -> Tensor:
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
            key_scale_BN=ring.key_scale_BN,
            value_scale_BN=ring.value_scale_BN,
            slot=ring.slot,
            ring_start=ring.sink_tokens,
            eps=eps,
            impl=self._impl,
        )
        return q_BLNK

    def rms_norm(self, x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return kernels.rms_norm(x_BLD, weight_D, eps=eps, impl=self._impl)

    def quantised(self, x_BLD: Tensor, *, eight_bits: bool) -> Activation:
        return FP8Tensor(*kernels.quantise_rows(x_BLD, impl=self._impl)) if eight_bits else x_BLD

    def gelu_fp8(self, x_BLF: Tensor) -> Activation:
        return FP8Tensor(*kernels.gelu_fp8(x_BLF, impl=self._impl))


class TracedRowOps(Attending):
    """Row ops in plain torch, for ``torch.compile`` to fuse."""

    def norm_modulate(
        self, x_BLD: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype, *, eight_bits: bool
    ) -> Activation:
        if eight_bits:
            return FP8Tensor(*reference.quantise_rows(reference.norm_modulate(x_BLD.float(), scale, shift, eps)))
        return reference.norm_modulate(x_BLD, scale, shift, eps, dtype)

    def residual_norm_modulate(
        self,
        x_BLD: Tensor,
        y_BLD: Tensor,
        gate: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        eps: float,
        *,
        eight_bits: bool,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Activation]:
        # A new tensor, not the old one overwritten: torch 2.13's compiler fails on a CPU where it fuses two writes.
        x_BLD = reference.gate_residual(x_BLD, y_BLD, gate)
        return x_BLD, self.norm_modulate(x_BLD, scale, shift, eps, dtype or y_BLD.dtype, eight_bits=eight_bits)

    def norm_rope_write(
        self, qkv_BLE: Tensor, layer: LayerWeights, rotation: Rotation, ring: LayerHistory, eps: float
    ) -> Tensor:
        q_BLD, k_BLD, v_BLD = qkv_BLE.chunk(3, dim=-1)
        weights = (layer.norm_q_D, layer.norm_k_D)
        q_BLNK, k_BLNK = reference.qk_norm_rope(q_BLD, k_BLD, *weights, rotation.cos_LF, rotation.sin_LF, eps)
        L = q_BLD.shape[1]
        rows_L = ring.sink_tokens + ring.slot * L + torch.arange(L, device=q_BLD.device)
        v_BLNK = v_BLD.unflatten(-1, k_BLNK.shape[-2:])
        for rows_BMNK, scale_BN, x_BLNK in (
            (ring.keys_BMNK, ring.key_scale_BN, k_BLNK),
            (ring.values_BMNK, ring.value_scale_BN, v_BLNK),
        ):
            if scale_BN is None:
                rows_BMNK.index_copy_(1, rows_L, x_BLNK.to(rows_BMNK.dtype))
            else:
                x8_BLNK = reference.quantise_heads(x_BLNK, scale_BN)
                # The bits are what moves: no index_copy_ takes eight-bit floats.
                rows_BMNK.view(torch.uint8).index_copy_(1, rows_L, x8_BLNK.view(torch.uint8))
        return q_BLNK.to(q_BLD.dtype)

    def rms_norm(self, x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return reference.rms_norm(x_BLD, weight_D, eps)

    def quantised(self, x_BLD: Tensor, *, eight_bits: bool) -> Activation:
        return FP8Tensor(*reference.quantise_rows(x_BLD)) if eight_bits else x_BLD

    def gelu_fp8(self, x_BLF: Tensor) -> Activation:
        return FP8Tensor(*reference.quantise_rows(reference.gelu_tanh(x_BLF.float())))


@dataclass(slots=True, eq=False)
class LayerWeights:
    """One block's weights, laid out for use."""

    qkv: AnyLinear
    norm_q_D: Tensor
    norm_k_D: Tensor
    o: AnyLinear
    text: CrossAttention
    norm3_scale_1D: Tensor
    norm3_shift_1D: Tensor
    up: AnyLinear
    down: AnyLinear
    audio: CrossAttention | None


@dataclass(slots=True, eq=False)
class LayerModulation:
    """Modulation of one layer at one noise level, float32 ``[1, D]``."""

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor
    scale2: Tensor
    gate2: Tensor


@dataclass(slots=True, eq=False)
class LayerHistory:
    """One layer's KV cache: the buffers, the slot this chunk is written to, and the length attended to."""

    keys_BMNK: Tensor
    values_BMNK: Tensor
    key_scale_BN: Tensor | None
    value_scale_BN: Tensor | None
    slot: Tensor
    sink_tokens: int
    length: Tensor | int
    backend: str


def _attend(
    ops: RowOps, eps: float, h: Activation, layer: LayerWeights, rotation: Rotation, ring: LayerHistory
) -> Tensor:
    """Self-attention over the history. What is used once has no name here, so that its memory is free at once."""
    q_BLNK = ops.norm_rope_write(layer.qkv(h), layer, rotation, ring, eps)
    y_BLNK = ops.attend(q_BLNK, ring)
    return layer.o(ops.quantised(y_BLNK.flatten(2), eight_bits=layer.o.eight_bits))


def run_block(
    ops: RowOps,
    eps: float,
    x_BLD: Tensor,
    h: Activation,
    layer: LayerWeights,
    constants: LayerModulation,
    rotation: Rotation,
    text: Keys,
    ring: LayerHistory,
) -> tuple[Tensor, Tensor]:
    """Self-attention and attention to the prompt, added to ``x``; returns that and the feed-forward's branch.

    ``h`` is ``x``, normed and modulated for this layer. ``x`` may be overwritten.
    """
    y_BLD = _attend(ops, eps, h, layer, rotation, ring)
    scale, shift = layer.norm3_scale_1D, layer.norm3_shift_1D
    x_BLD, h = ops.residual_norm_modulate(
        x_BLD, y_BLD, constants.gate1, scale, shift, eps, eight_bits=layer.text.q.eight_bits
    )
    y_BLD = layer.text(ops, h, text, eps)
    scale, shift = constants.scale2, constants.shift2
    x_BLD, h = ops.residual_norm_modulate(x_BLD, y_BLD, None, scale, shift, eps, eight_bits=layer.up.eight_bits)
    hidden = ops.gelu_fp8(layer.up(h)) if layer.down.eight_bits else layer.up(h, gelu=True)
    return x_BLD, layer.down(hidden)
