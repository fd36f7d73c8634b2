"""Row ops of eager code on a CPU, where calling a small op costs as much as computing it.

The arithmetic of `FusedRowOps` with ``Impl.TORCH``, and its bits, in fewer calls: what belongs to a noise level or to a
chunk is computed once, and shapes that follow from the configuration are not checked again at every call.

Axes: B streams, L tokens of this chunk, D model width, E three of them, N heads, K head width, F rotary pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

import streamdiff_kernels as kernels
from streamdiff.models.served.block import FusedRowOps, LayerHistory, LayerWeights
from streamdiff.models.served.linear import Activation
from streamdiff.rope import Rotation
from streamdiff_kernels import Impl, plain


class EagerRowOps(FusedRowOps):
    """Row ops of one step, for one thread.

    Not for code that is compiled, recorded or watched: constants and rotations are known by identity, so that whoever
    writes new values into old tensors is not noticed.
    """

    def __init__(self) -> None:
        super().__init__(Impl.TORCH)
        self._affine: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        """By the identity of a scale: it and its shift, which are kept alive, and the norm's weight and bias."""
        self._weights: dict[int, tuple[LayerWeights, Tensor]] = {}
        """By the identity of a layer: it, and the norm weights of its queries and keys."""
        self._table: tuple[Rotation, Tensor] | None = None

    def norm_modulate(
        self, x_BLD: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype, *, eight_bits: bool
    ) -> Activation:
        if eight_bits or scale.dim() != 2 or len(scale) != 1:
            return super().norm_modulate(x_BLD, scale, shift, eps, dtype, eight_bits=eight_bits)
        known = self._affine.get(id(scale))
        if known is None or known[1] is not shift:
            known = self._affine[id(scale)] = scale, shift, (1 + scale[0].float()), shift[0].float()
        return torch.layer_norm(x_BLD, x_BLD.shape[-1:], known[2], known[3], eps).to(dtype)

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
        if eight_bits:
            return super().residual_norm_modulate(x_BLD, y_BLD, gate, scale, shift, eps, eight_bits=True)
        if gate is None:
            x_BLD.add_(y_BLD)
        else:
            x_BLD.addcmul_(y_BLD, gate[0])  # of one noise level, it is the same for all frames
        return x_BLD, self.norm_modulate(x_BLD, scale, shift, eps, dtype or y_BLD.dtype, eight_bits=False)

    def norm_rope_write(
        self, qkv_BLE: Tensor, layer: LayerWeights, rotation: Rotation, ring: LayerHistory, eps: float
    ) -> Tensor:
        if ring.key_scale_BN is not None:
            return super().norm_rope_write(qkv_BLE, layer, rotation, ring, eps)
        if self._table is None or self._table[0] is not rotation:
            self._table = rotation, plain.rope_table(rotation.cos_LF, rotation.sin_LF, qkv_BLE.dtype)
        if id(layer) not in self._weights:
            self._weights[id(layer)] = layer, torch.stack([layer.norm_q_D, layer.norm_k_D])
        return plain.qkv_norm_rope_write(
            qkv_BLE,
            self._weights[id(layer)][1],
            self._table[1],
            ring.keys_BMNK,
            ring.values_BMNK,
            ring.sink_tokens + int(ring.slot) * qkv_BLE.shape[1],
            eps,
        )

    def attend(self, q_BLNK: Tensor, ring: LayerHistory) -> Tensor:
        if ring.key_scale_BN is not None or isinstance(ring.length, Tensor):
            return super().attend(q_BLNK, ring)
        return kernels.attend_prefix(q_BLNK, ring.keys_BMNK, ring.values_BMNK, ring.length, backend=ring.backend)

    def attend_all(self, q_BLNK: Tensor, k_BPNK: Tensor, v_BPNK: Tensor, backend: str) -> Tensor:
        return kernels.attend_prefix(q_BLNK, k_BPNK, v_BPNK, k_BPNK.shape[1], backend=backend)

    def rms_norm(self, x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return plain.rms_norm(x_BLD, weight_D, eps)
