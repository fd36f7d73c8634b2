"""What every op means, slowly and obviously, in the precision of its inputs or above.

These functions are the specification: pure (they return, they never write in place), differentiable, and
exact in float64 when given float64. Every other implementation is compared with them; the tolerances stand in
`streamdiff_kernels.tolerance`.

Axes: B streams, T latent frames, L tokens of this chunk, M tokens remembered, D model width, N heads, K head
width, R = K / 2 rotary pairs, G sink tokens, C channels. A *ring* is a buffer ``[B, M, N, K]`` laid out as
``[sink | slot 0 | slot 1 | ...]``; a slot holds the L tokens of one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

E4M3_MAX = 448.0
"""Largest finite float8_e4m3fn."""


def wide(x: Tensor) -> Tensor:
    """The same values in float32, or in float64 when they already are."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the full width: ``x / sqrt(mean(x^2) + eps) * weight``.

    Wan normalises queries and keys over all heads together, before they are split.
    """
    x = wide(x_BLD)
    return (x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * wide(weight_D)).to(x_BLD.dtype)


def rotate(x_BLNK: Tensor, cos_LR: Tensor, sin_LR: Tensor) -> Tensor:
    """Rotary embedding on interleaved pairs: ``(a, b) -> (a cos - b sin, a sin + b cos)``.

    Pair r of a head is ``x[2r], x[2r + 1]``: the complex number of the published models, in real arithmetic.
    """
    x = wide(x_BLNK)
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = cos_LR.to(x.dtype)[:, None, :], sin_LR.to(x.dtype)[:, None, :]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x_BLNK.dtype)


def qk_norm_rope(
    q_BLD: Tensor,
    k_BLD: Tensor,
    q_weight_D: Tensor,
    k_weight_D: Tensor,
    cos_LR: Tensor,
    sin_LR: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Normalise over the width, split into heads, rotate. Returns ``q_BLNK, k_BLNK`` in float32 or
    float64.
    """
    width = 2 * cos_LR.shape[-1]

    def prepare(x_BLD: Tensor, weight_D: Tensor) -> Tensor:
        normed = rms_norm(wide(x_BLD), weight_D, eps)
        return rotate(normed.unflatten(-1, (-1, width)), cos_LR, sin_LR)

    return prepare(q_BLD, q_weight_D), prepare(k_BLD, k_weight_D)


def write_slot(ring_BMNK: Tensor, x_BLNK: Tensor, slot: int, ring_start: int) -> Tensor:
    """A copy of the ring whose slot holds ``x``: rows ``ring_start + slot * L`` and the L - 1 after it."""
    num_tokens = x_BLNK.shape[1]
    first = ring_start + slot * num_tokens
    if slot < 0 or first + num_tokens > ring_BMNK.shape[1]:
        raise IndexError(f"slot {slot} of {num_tokens} tokens lies outside a ring of {ring_BMNK.shape[1]} rows")
    written = ring_BMNK.clone()
    written[:, first : first + num_tokens] = x_BLNK.to(ring_BMNK.dtype)
    return written


def per_token(mod_BTD: Tensor, num_tokens: int) -> Tensor:
    """Repeat a per-frame row for each token of its frame: ``[T, D]`` or ``[B, T, D]`` -> ``[.., L, D]``."""
    num_frames = mod_BTD.shape[-2]
    return mod_BTD.repeat_interleave(num_tokens // num_frames, dim=-2)


def norm_modulate(
    x_BLD: Tensor, scale_BTD: Tensor, shift_BTD: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """Layer norm without affine, then adaptive scale and shift: ``norm(x) * (1 + scale) + shift``.

    ``dtype``: of the result, by default that of x.
    """
    x = wide(x_BLD)
    num_tokens = x.shape[1]
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    scale, shift = per_token(wide(scale_BTD), num_tokens), per_token(wide(shift_BTD), num_tokens)
    return (normed * (1 + scale) + shift).to(dtype or x_BLD.dtype)


def gate_residual(x_BLD: Tensor, y_BLD: Tensor, gate_BTD: Tensor | None) -> Tensor:
    """The residual stream after a branch: ``x + gate * y``; without a gate, ``x + y``."""
    x, y = wide(x_BLD), wide(y_BLD)
    gated = y if gate_BTD is None else per_token(wide(gate_BTD), x.shape[1]) * y
    return (x + gated).to(x_BLD.dtype)


def gate_residual_norm_modulate(
    x_BLD: Tensor,
    y_BLD: Tensor,
    gate_BTD: Tensor | None,
    scale_BTD: Tensor,
    shift_BTD: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`gate_residual`, then `norm_modulate` of its result in ``dtype`` (that of y): returns both, the stream first.

    The norm reads the stream as stored, rounding included, so the fused op equals the two in sequence.
    """
    stream = gate_residual(x_BLD, y_BLD, gate_BTD)
    return stream, norm_modulate(stream, scale_BTD, shift_BTD, eps, dtype or y_BLD.dtype)


def rms_norm_silu(x_BCTHW: Tensor, weight_C: Tensor, bias_C: Tensor | None, eps: float) -> Tensor:
    """The decoder's norm over channels and its activation: ``silu(x / max(|x|, eps) * sqrt(C) * weight +
    bias)``.
    """
    x = wide(x_BCTHW)
    shape = (1, -1, *([1] * (x.dim() - 2)))
    length = x.square().sum(1, keepdim=True).sqrt().clamp_min(eps)
    normed = x / length * math.sqrt(x.shape[1]) * wide(weight_C).view(shape)
    if bias_C is not None:
        normed = normed + wide(bias_C).view(shape)
    return (normed * torch.sigmoid(normed)).to(x_BCTHW.dtype)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each row so that its largest magnitude is 448, and round to e4m3.

    ``[..., D] -> float8_e4m3fn [..., D], float32 [...]``, with ``x ~ x8 * scale``. A row of zeros has scale
    0.
    """
    x = wide(x)
    scale = x.abs().amax(-1) / E4M3_MAX
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (x / safe[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale.float()


def quantise_heads(x_BMNK: Tensor, scale_BN: Tensor) -> Tensor:
    """Round to e4m3 with a given scale per stream and head, ``x ~ x8 * scale``; what exceeds 448 scales is cut off."""
    scaled = wide(x_BMNK) / scale_BN[:, None, :, None]
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def dequantise_heads(x8_BMNK: Tensor, scale_BN: Tensor) -> Tensor:
    """Back to float32: ``x8 * scale``."""
    return x8_BMNK.float() * scale_BN[:, None, :, None]


def dequantise_rows(x8: Tensor, scale: Tensor) -> Tensor:
    """Back to float32: ``x8 * scale``."""
    return x8.float() * scale[..., None]


def gelu_tanh(x: Tensor) -> Tensor:
    """Gaussian error linear unit, tanh approximation: ``x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))``."""
    wide_x = wide(x)
    inner = math.sqrt(2 / math.pi) * (wide_x + 0.044715 * wide_x.pow(3))
    return (0.5 * wide_x * (1 + torch.tanh(inner))).to(x.dtype)


def linear(x_BLD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, *, gelu: bool) -> Tensor:
    """``x @ weight.T + bias``, then GELU (tanh) if asked."""
    y = wide(x_BLD) @ wide(weight_ED).t()
    y = y if bias_E is None else y + wide(bias_E)
    return (gelu_tanh(y) if gelu else y).to(x_BLD.dtype)


def linear_fp8(
    x8_BLD: Tensor, x_scale_BL: Tensor, weight8_ED: Tensor, weight_scale_E: Tensor, bias_E: Tensor | None
) -> Tensor:
    """``(x8 * x_scale) @ (weight8 * weight_scale).T + bias`` in float32."""
    y = dequantise_rows(x8_BLD, x_scale_BL) @ dequantise_rows(weight8_ED, weight_scale_E).t()
    return y if bias_E is None else y + bias_E.float()


def attend(
    q_BLNK: Tensor,
    keys_BMNK: Tensor,
    values_BMNK: Tensor,
    segments: Sequence[tuple[int, int]],
    *,
    scale: float | None = None,
    q_sink_BLNK: Tensor | None = None,
    sink_rows: int = 0,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the rows of the ring named by ``segments``, pairs of (first row, number of
    rows).

    Rows below ``sink_rows`` are scored against ``q_sink``, the others against ``q``: two rotations of the
    query stand for two rotations of the key, because a score depends on the difference of positions alone.

    Returns ``out_BLNK`` in the type of q and the log-sum-exp ``lse_BNL`` (natural logarithm) in float32 or
    float64.
    """
    q, keys, values = wide(q_BLNK), wide(keys_BMNK), wide(values_BMNK)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    rows = [row for first, count in segments for row in range(first, first + count)]
    scores = []
    for row in rows:
        query = wide(q_sink_BLNK) if q_sink_BLNK is not None and row < sink_rows else q
        scores.append((query * keys[:, row, None]).sum(-1) * scale)
    scores_MBLN = torch.stack(scores)
    lse_BLN = torch.logsumexp(scores_MBLN, dim=0)
    weights_MBLN = torch.exp(scores_MBLN - lse_BLN)
    out = torch.einsum("mbln,bmnk->blnk", weights_MBLN, values[:, rows])
    return out.to(q_BLNK.dtype), lse_BLN.transpose(1, 2)


def merge_attention(
    out_a_BLNK: Tensor, lse_a_BNL: Tensor, out_b_BLNK: Tensor, lse_b_BNL: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

    ``out = (e^lse_a out_a + e^lse_b out_b) / (e^lse_a + e^lse_b)``; a side with lse = -inf weighs nothing.
    """
    lse = torch.logaddexp(lse_a_BNL, lse_b_BNL)
    weight_a = torch.exp(lse_a_BNL - lse).transpose(1, 2)[..., None]
    weight_b = torch.exp(lse_b_BNL - lse).transpose(1, 2)[..., None]
    merged = torch.where(weight_a > 0, weight_a * out_a_BLNK, 0.0) + torch.where(
        weight_b > 0, weight_b * out_b_BLNK, 0.0
    )
    return merged.to(out_a_BLNK.dtype), lse
