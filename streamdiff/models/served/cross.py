"""Cross-attention as it is served: to keys and values that stay as they are while a prompt, or a chunk of sound, lasts.

Two rewritings are exact in real numbers, and save what is computed again at every step:

- The rows that pad a prompt are all alike, and so are their keys and values. One key stands for n of them when log(n)
  is added to its score.
- ``(softmax(q k) v) W = softmax(q k) (v W)``: with fewer keys than a head is wide, the values of all heads, multiplied
  with the output projection once, are a smaller matrix than the projection, and take its place.

Scores and their softmax are float32. Axes: B streams (of sound: times latent frames), L tokens, P keys, N heads, K head
width, D model width, Q = N * P, Z layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from streamdiff.models.dit import Attention, AudioCondition, CausalDiT, TextCondition
from streamdiff.models.served.linear import Activation, AnyLinear, DequantisedLinear

_NARROW = 64
"""Heads narrower than this are left as they are: there is little to save."""
_SUMS_IN_FLOAT32 = TorchVersion(torch.__version__) >= TorchVersion("2.8")
"""Whether a product of 16-bit matrices can leave its sums as they are."""
_STEP = 16
"""Folded prompts are as long as a multiple of this."""


@dataclass(frozen=True, slots=True, eq=False)
class PlainKeys:
    """Keys and values as attention reads them."""

    k_BPNK: Tensor
    v_BPNK: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class FoldedKeys:
    """Keys, what is added to their scores, and values that were multiplied with the output projection."""

    keys_BNKP: Tensor
    bias_P: Tensor | None
    outputs_BQD: Tensor


Keys: TypeAlias = PlainKeys | FoldedKeys


class _RowOps(Protocol):
    def attend_all(self, q_BLNK: Tensor, k_BPNK: Tensor, v_BPNK: Tensor, backend: str) -> Tensor: ...

    def rms_norm(self, x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor: ...

    def quantised(self, x_BLD: Tensor, *, eight_bits: bool) -> Activation: ...


@dataclass(slots=True, eq=False)
class CrossAttention:
    """Cross-attention with precomputed keys and values."""

    q: AnyLinear
    norm_D: Tensor
    o: AnyLinear
    num_heads: int
    backend: str

    def __call__(self, ops: _RowOps, h: Activation, keys: Keys, eps: float) -> Tensor:
        q_BLNK = ops.rms_norm(self.q(h), self.norm_D, eps).unflatten(-1, (self.num_heads, -1))
        if isinstance(keys, FoldedKeys):
            return attend_folded(q_BLNK, keys, self.o.bias_E)
        y_BLNK = ops.attend_all(q_BLNK, keys.k_BPNK, keys.v_BPNK, self.backend)
        return self.o(ops.quantised(y_BLNK.flatten(2), eight_bits=self.o.eight_bits))


def attend_folded(q_BLNK: Tensor, keys: FoldedKeys, bias_D: Tensor) -> Tensor:
    """Attention to folded keys and the output projection; ``[B, L, D]`` in the type of the queries."""
    B, L, _, K = q_BLNK.shape
    scores_BNLP = _scores(q_BLNK.transpose(1, 2), keys.keys_BNKP) * K**-0.5
    if keys.bias_P is not None:
        scores_BNLP = scores_BNLP + keys.bias_P
    share_BLQ = scores_BNLP.softmax(-1).to(q_BLNK.dtype).transpose(1, 2).reshape(B, L, -1)
    if B == 1:
        return torch.addmm(bias_D, share_BLQ[0], keys.outputs_BQD[0])[None]
    return torch.baddbmm(bias_D, share_BLQ, keys.outputs_BQD)


def _scores(q_BNLK: Tensor, keys_BNKP: Tensor) -> Tensor:
    """Products of queries and keys, summed and left in float32."""
    if q_BNLK.dtype == torch.float32:
        return q_BNLK @ keys_BNKP
    if q_BNLK.device.type == "cuda" and _SUMS_IN_FLOAT32:
        found = torch.bmm(q_BNLK.flatten(0, 1), keys_BNKP.flatten(0, 1), out_dtype=torch.float32)
        return found.unflatten(0, q_BNLK.shape[:2])
    return q_BNLK.float() @ keys_BNKP.float()


@dataclass(frozen=True, slots=True, eq=False)
class FoldedText:
    """A prompt, folded for every layer; ``bias_P`` holds log(n) of n rows alike, and -inf where no key is."""

    keys_ZBNKP: Tensor
    bias_P: Tensor
    outputs_ZBQD: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class FoldedAudio(AudioCondition):
    """A chunk of sound whose ``keys`` are ``[B * T, N, K, A]``, and whose ``values`` are multiplied with the output
    projection: ``[B * T, N * A, D]``.
    """


ServedText: TypeAlias = TextCondition | FoldedText


def text_keys(text: ServedText, layer: int) -> Keys:
    """What one layer attends to."""
    if isinstance(text, FoldedText):
        return FoldedKeys(text.keys_ZBNKP[layer], text.bias_P, text.outputs_ZBQD[layer])
    return PlainKeys(text.keys_ZBPNK[layer], text.values_ZBPNK[layer])


def audio_keys(audio: AudioCondition, injector: int) -> Keys:
    """What one injector attends to."""
    keys, values = audio.keys[injector], audio.values[injector]
    return FoldedKeys(keys, None, values) if isinstance(audio, FoldedAudio) else PlainKeys(keys, values)


def folded_length(dit: CausalDiT, num_rows: int, most: int, *, always_most: bool) -> int | None:
    """Keys of a folded prompt of so many rows; None: it is better left as it is.

    ``always_most``: all prompts that are folded have one length, so that what is compiled and captured fits them all.
    """
    config = dit.config
    most = min(most, config.head_dim, config.text_len - 1)
    needed = -(-(num_rows + (num_rows < config.text_len)) // _STEP) * _STEP
    if config.head_dim < _NARROW or needed > most:
        return None
    return most if always_most else needed


def fold_text(dit: CausalDiT, text_BPC: Tensor, length: int) -> FoldedText:
    """`CausalDiT.text_condition`, with ``length`` keys (see `folded_length`)."""
    num_rows = text_BPC.shape[1]
    num_alike = dit.config.text_len - num_rows
    rows_BPC = F.pad(text_BPC.to(device=dit.device, dtype=dit.dtype), (0, 0, 0, int(num_alike > 0)))
    context_BPD = dit.text_embedding(rows_BPC)
    blocks: Sequence[Attention] = [block.cross_attn for block in dit.blocks]
    folded = [_fold(attention, context_BPD) for attention in blocks]
    missing = length - context_BPD.shape[1]
    bias_P = torch.zeros(length)
    bias_P[num_rows:] = -math.inf
    if num_alike:
        bias_P[num_rows] = math.log(num_alike)
    outputs_ZBNPD = torch.stack([outputs_BNPD for _, outputs_BNPD in folded])
    return FoldedText(
        keys_ZBNKP=F.pad(torch.stack([keys_BNKP for keys_BNKP, _ in folded]), (0, missing)),
        bias_P=bias_P.to(dit.device),
        outputs_ZBQD=F.pad(outputs_ZBNPD, (0, 0, 0, missing)).flatten(2, 3),
    )


def _fold(attention: Attention, context_BPD: Tensor) -> tuple[Tensor, Tensor]:
    """Keys ``[B, N, K, P]``, and values times the output projection ``[B, N, P, D]``, of one layer."""
    keys_BPNK, values_BPNK = attention.key(context_BPD), attention.value(context_BPD)
    return keys_BPNK.permute(0, 2, 3, 1).contiguous(), _projected(values_BPNK, attention.o)


def _projected(values_BPNK: Tensor, output: nn.Linear) -> Tensor:
    """Each head's values times its columns of the output projection."""
    weight_DD = output.dense(values_BPNK.dtype) if isinstance(output, DequantisedLinear) else output.weight
    # Written so that no product wants a copy of the weight, which is far larger than all the rest.
    weight_NDK = weight_DD.unflatten(1, values_BPNK.shape[-2:]).transpose(0, 1)
    product_NDR = torch.bmm(weight_NDK, values_BPNK.flatten(0, 1).permute(1, 2, 0))
    return product_NDR.unflatten(2, values_BPNK.shape[:2]).permute(2, 0, 3, 1).contiguous()


def folds_sound(dit: CausalDiT) -> bool:
    """Whether a frame has few enough audio tokens, and heads are wide enough, for folding to pay."""
    audio = dit.config.audio
    return audio is not None and max(_NARROW, _STEP * (audio.num_tokens + 1)) <= dit.config.head_dim


def fold_audio(dit: CausalDiT, audio: AudioCondition) -> FoldedAudio:
    """The same sound, folded: once per chunk for all of a rank's steps."""
    injectors = [dit.audio_injector.injector.at(j) for j in range(len(audio.keys))]
    return FoldedAudio(
        scales=audio.scales,
        shifts=audio.shifts,
        keys=tuple(keys_BANK.permute(0, 2, 3, 1).contiguous() for keys_BANK in audio.keys),
        values=tuple(
            _projected(values_BANK, injector.o).flatten(1, 2)
            for values_BANK, injector in zip(audio.values, injectors, strict=True)
        ),
    )
