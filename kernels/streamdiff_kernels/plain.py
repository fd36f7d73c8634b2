"""The ops in plain torch, written for speed: the implementation where there is no Triton, and the CPU's.

Three habits set it apart from `reference`: it writes in place or straight into the ring, it works on blocks
of tokens so that float32 temporaries stay in the cache, and it multiplies rotary pairs as complex64 views
(measured on AVX-512, 768 tokens of 8 heads of 128: 0.30 ms, against 1.01 ms for strided real pairs and 1.39
ms in complex128).

Axes as in `reference`. Nothing here reads a CUDA tensor on the host.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from streamdiff_kernels.reference import E4M3_MAX, quantise_heads

_BLOCK_BYTES = 1 << 20
"""float32 temporaries of one block of tokens on a CPU; half of a usual second-level cache."""


def _working_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _blocks(num_tokens: int, width: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Ranges of tokens whose temporaries stay small on a CPU; one range elsewhere, where launches cost
    more.
    """
    step = num_tokens if device.type != "cpu" else max(1, _BLOCK_BYTES // (4 * width))
    for first in range(0, num_tokens, step):
        yield first, min(num_tokens, first + step)


def rms_norm(x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    if x_BLD.numel() * 4 <= _BLOCK_BYTES:
        return _rms_normed(x_BLD, weight_D, eps).to(x_BLD.dtype)
    out_BLD = torch.empty(x_BLD.shape, dtype=x_BLD.dtype, device=x_BLD.device)
    for first, last in _blocks(x_BLD.shape[1], x_BLD.shape[0] * x_BLD.shape[2], x_BLD.device):
        out_BLD[:, first:last] = _rms_normed(x_BLD[:, first:last], weight_D, eps)
    return out_BLD


def _rms_normed(x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """A fresh tensor in the working type, safe to write over."""
    x = x_BLD.to(_working_type(x_BLD))
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = torch.rsqrt(length.square_().div_(x.shape[-1]).add_(eps))
    return (x * inverse if x is x_BLD else x.mul_(inverse)).mul_(weight_D)


def _table(cos_LR: Tensor, sin_LR: Tensor, dtype: torch.dtype) -> Tensor:
    """``e^(i angle)`` with an axis for the heads, ``[L, 1, R]``."""
    return torch.complex(cos_LR.to(dtype), sin_LR.to(dtype))[:, None]


def _turned(x_BLNK: Tensor, table_L1R: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x_BLNK.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table_L1R).flatten(-2)


def _turn_(x_BLNK: Tensor, table_L1R: Tensor) -> Tensor:
    torch.view_as_complex(x_BLNK.unflatten(-1, (-1, 2))).mul_(table_L1R)
    return x_BLNK


class _Slot:
    """Rows of a ring, named by the host on a CPU and by the device elsewhere."""

    def __init__(self, ring_BMNK: Tensor, slot: Tensor, ring_start: int, num_tokens: int) -> None:
        self._rows: Tensor | None = None
        self._first = 0
        if ring_BMNK.device.type == "cpu":
            self._first = ring_start + int(slot) * num_tokens
            if int(slot) < 0 or self._first + num_tokens > ring_BMNK.shape[1]:
                raise IndexError(
                    f"slot {int(slot)} of {num_tokens} tokens lies outside a ring of {ring_BMNK.shape[1]} "
                    "rows; slots count from 0, after the sink"
                )
        else:
            steps = torch.arange(num_tokens, device=ring_BMNK.device)
            self._rows = ring_start + slot.reshape(()).long() * num_tokens + steps

    def write(self, ring: Tensor, x: Tensor, first: int, last: int) -> None:
        """Tokens ``first..last`` of the slot."""
        if self._rows is None:
            ring[:, self._first + first : self._first + last] = x
        elif ring.dtype == torch.float8_e4m3fn:
            # index_copy_ has no eight-bit float; the bits are what moves.
            ring.view(torch.uint8).index_copy_(1, self._rows[first:last], x.view(torch.uint8))
        else:
            ring.index_copy_(1, self._rows[first:last], x.to(ring.dtype))


def qk_norm_rope_write(
    q_BLD: Tensor,
    k_BLD: Tensor,
    v_BLD: Tensor,
    q_weight_D: Tensor,
    k_weight_D: Tensor,
    cos_LR: Tensor,
    sin_LR: Tensor,
    cos_sink_LR: Tensor | None,
    sin_sink_LR: Tensor | None,
    keys_BMNK: Tensor,
    values_BMNK: Tensor,
    key_scale_BN: Tensor | None,
    value_scale_BN: Tensor | None,
    slot: Tensor,
    ring_start: int,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    B, L, D = q_BLD.shape
    N, K = keys_BMNK.shape[-2:]
    dtype = _working_type(q_BLD)
    table = _table(cos_LR, sin_LR, dtype)
    table_sink = None
    if cos_sink_LR is not None and sin_sink_LR is not None:
        table_sink = _table(cos_sink_LR, sin_sink_LR, dtype)
    target = _Slot(keys_BMNK, slot, ring_start, L)
    q_out = torch.empty((B, L, N, K), dtype=q_BLD.dtype, device=q_BLD.device)
    q_sink = None if table_sink is None else torch.empty_like(q_out)

    for first, last in _blocks(L, B * D, q_BLD.device):
        q = _rms_normed(q_BLD[:, first:last], q_weight_D, eps).view(B, -1, N, K)
        if q_sink is not None and table_sink is not None:
            q_sink[:, first:last] = _turned(q, table_sink[first:last])
        q_out[:, first:last] = _turn_(q, table[first:last])
        k = _turn_(_rms_normed(k_BLD[:, first:last], k_weight_D, eps).view(B, -1, N, K), table[first:last])
        v = v_BLD[:, first:last].reshape(B, -1, N, K)
        for ring, scale_BN, x in ((keys_BMNK, key_scale_BN, k), (values_BMNK, value_scale_BN, v)):
            target.write(ring, x if scale_BN is None else quantise_heads(x, scale_BN), first, last)
    return q_out, q_sink


def rope_table(cos_LR: Tensor, sin_LR: Tensor, dtype: torch.dtype) -> Tensor:
    """What `qkv_norm_rope_write` turns projections of this type by: once for all layers."""
    return _table(cos_LR, sin_LR, torch.float64 if dtype == torch.float64 else torch.float32)


def qkv_norm_rope_write(
    qkv_BLE: Tensor,
    weight_2D: Tensor,
    table_L1R: Tensor,
    keys_BMNK: Tensor,
    values_BMNK: Tensor,
    first_row: int,
    eps: float,
) -> Tensor:
    """`qk_norm_rope_write` of one projection to q, k and v on a CPU: q and k in one pass each, nothing checked.

    ``first_row``: of the slot in the ring. The same bits, in half of the calls; q may be a view.
    """
    B, L, E = qkv_BLE.shape
    N, K = keys_BMNK.shape[-2:]
    parts = qkv_BLE.view(B, L, 3, E // 3)
    values_BMNK[:, first_row : first_row + L] = parts[:, :, 2].unflatten(-1, (N, K))
    q_out: Tensor | None = None
    for first, last in _blocks(L, 2 * B * E // 3, qkv_BLE.device):
        normed = _rms_normed(parts[:, first:last, :2], weight_2D, eps)
        turned = _turn_(normed.view(B, last - first, 2 * N, K), table_L1R[first:last]).unflatten(2, (2, N))
        keys_BMNK[:, first_row + first : first_row + last] = turned[:, :, 1]
        if last - first == L:
            return turned[:, :, 0].to(qkv_BLE.dtype)
        if q_out is None:
            q_out = torch.empty((B, L, N, K), dtype=qkv_BLE.dtype)
        q_out[:, first:last] = turned[:, :, 0]
    assert q_out is not None
    return q_out


def rotate_sink_(
    pristine_BGNK: Tensor,
    cos_GR: Tensor,
    sin_GR: Tensor,
    keys_BMNK: Tensor,
    key_scale_BN: Tensor | None,
    first_row: int,
) -> None:
    B, G, N, K = pristine_BGNK.shape
    dtype = _working_type(pristine_BGNK)
    table = _table(cos_GR, sin_GR, dtype)
    for first, last in _blocks(G, B * N * K, keys_BMNK.device):
        turned = _turned(pristine_BGNK[:, first:last].to(dtype), table[first:last])
        rows = slice(first_row + first, first_row + last)
        if key_scale_BN is None:
            keys_BMNK[:, rows] = turned
        else:
            keys_BMNK[:, rows] = quantise_heads(turned, key_scale_BN)


def norm_modulate(
    x_BLD: Tensor, scale_BTD: Tensor, shift_BTD: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """Modulations arrive as ``[B or 1, T, D]``."""
    B, L, D = x_BLD.shape
    T = scale_BTD.shape[1]
    out_type, dtype = dtype or x_BLD.dtype, _working_type(x_BLD)
    weight_BTD, bias_BTD = 1 + scale_BTD.to(dtype), shift_BTD.to(dtype)
    if x_BLD.device.type != "cpu":
        # CUDA's layer norm wants weights of the type of x; a float32 x keeps the modulation exact.
        normed = F.layer_norm(x_BLD.to(dtype), (D,), eps=eps).unflatten(1, (T, L // T))
        return normed.mul_(weight_BTD[:, :, None]).add_(bias_BTD[:, :, None]).flatten(1, 2).to(out_type)
    # On a CPU the modulation is the affine part of the native layer norm: one pass, no temporary.
    shared = scale_BTD.shape[0] == 1
    frames = [
        F.layer_norm(frame_LD, (D,), weight_BTD[0 if shared else b, t], bias_BTD[0 if shared else b, t], eps).to(
            out_type
        )
        for b in range(B)
        for t, frame_LD in enumerate(x_BLD[b].tensor_split(T))
    ]
    return (frames[0] if len(frames) == 1 else torch.cat(frames)).view(B, L, D)


def gate_residual_(x_BLD: Tensor, y_BLD: Tensor, gate_BTD: Tensor | None) -> None:
    if gate_BTD is None:
        x_BLD.add_(y_BLD)
        return
    T = gate_BTD.shape[1]
    x_BTLD, y_BTLD = x_BLD.unflatten(1, (T, -1)), y_BLD.unflatten(1, (T, -1))
    x_BTLD.addcmul_(y_BTLD, gate_BTD[:, :, None].to(_working_type(x_BLD)))


def rms_norm_silu(x_BCTHW: Tensor, weight_C: Tensor, bias_C: Tensor | None, eps: float) -> Tensor:
    dtype = _working_type(x_BCTHW)
    shape = (1, -1, *([1] * (x_BCTHW.dim() - 2)))
    gain = (weight_C.to(dtype) * math.sqrt(x_BCTHW.shape[1])).view(shape)
    bias = None if bias_C is None else bias_C.to(dtype).view(shape)
    out = torch.empty_like(x_BCTHW)
    # One latent frame at a time bounds the float32 temporaries; pictures of four axes have no frames.
    frames = [(x_BCTHW, out)] if x_BCTHW.dim() < 5 else zip(x_BCTHW.split(1, 2), out.split(1, 2), strict=True)
    for x, y in frames:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype).clamp_min_(eps)
        normed = (x / length).mul_(gain)
        y.copy_(F.silu(normed if bias is None else normed.add_(bias), inplace=True))
    return out


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.to(_working_type(x))
    scale = torch.linalg.vector_norm(wide, ord=math.inf, dim=-1).div_(E4M3_MAX)
    inverse = torch.where(scale > 0, scale, 1.0).reciprocal_()
    # No clamp: what rounding lifts above 448 by an ulp is nearest to 448.
    return (wide * inverse[..., None]).to(torch.float8_e4m3fn), scale.float()


def norm_modulate_fp8(x_BLD: Tensor, scale_BTD: Tensor, shift_BTD: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dtype = _working_type(x_BLD)
    return quantise_rows(norm_modulate(x_BLD.to(dtype), scale_BTD, shift_BTD, eps))


def gelu_fp8(x_BLF: Tensor) -> tuple[Tensor, Tensor]:
    out8 = torch.empty(x_BLF.shape, dtype=torch.float8_e4m3fn, device=x_BLF.device)
    scale = torch.empty(x_BLF.shape[:-1], dtype=torch.float32, device=x_BLF.device)
    for first, last in _blocks(x_BLF.shape[1], x_BLF.shape[0] * x_BLF.shape[2], x_BLF.device):
        wide = x_BLF[:, first:last].to(_working_type(x_BLF))
        out8[:, first:last], scale[:, first:last] = quantise_rows(F.gelu(wide, approximate="tanh"))
    return out8, scale


@functools.cache
def onednn_missing(dtype: torch.dtype) -> str | None:
    """Why oneDNN's matrix products cannot be called here, or None when they can."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this build of torch has no oneDNN"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this processor has no bfloat16 products"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it multiplies float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


@functools.cache
def _onednn_product() -> Callable[..., Tensor]:
    """oneDNN's product; finding the overload anew takes as long as a small product."""
    return torch.ops.mkldnn._linear_pointwise.default


def product(x_LD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, *, gelu: bool = False) -> Tensor:
    """``x @ weight.T + bias`` by oneDNN, on a CPU for which `onednn_missing` is None; x may have further axes in front.

    torch gives float32 products to MKL, which uses half the width of the vectors of AMD's processors: 103
    GFLOP/s on one core of an EPYC with AVX-512, against oneDNN's 228. Both round as float32 does.
    """
    if not (weight_ED.is_mkldnn or weight_ED.is_contiguous() or weight_ED.t().is_contiguous()):
        # Other strides fall to its reference loops, a thousand times slower.
        weight_ED = weight_ED.contiguous()
    post_op = ("gelu", [], "tanh") if gelu else ("none", [], "")
    return _onednn_product()(x_LD, weight_ED, bias_E, *post_op)


def packed(weight_ED: Tensor, num_rows: int) -> Tensor | None:
    """A copy of a weight in oneDNN's own layout for products of about ``num_rows`` rows: the same bits, and no layout
    to change at every call. Only `product` reads it. None where oneDNN does not multiply such weights, or needs none.
    """
    plain = type(weight_ED) in (Tensor, torch.nn.Parameter) and weight_ED.device.type == "cpu"
    if not plain or onednn_missing(weight_ED.dtype) is not None or not weight_ED.is_contiguous():
        return None
    found = torch.ops.mkldnn._reorder_linear_weight(weight_ED.detach(), num_rows)
    return found if found.is_mkldnn else None


def linear(x_BLD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, *, gelu: bool) -> Tensor:
    same_type = x_BLD.dtype == weight_ED.dtype
    if x_BLD.device.type == "cpu" and same_type and onednn_missing(x_BLD.dtype) is None:
        return product(x_BLD, weight_ED, bias_E, gelu=gelu)
    if gelu and bias_E is not None and _ends_in_gelu(x_BLD, weight_ED, bias_E):
        y = torch.ops.aten._addmm_activation(bias_E, x_BLD.flatten(0, -2), weight_ED.t(), use_gelu=True)
        return y.unflatten(0, x_BLD.shape[:-1])
    y = F.linear(x_BLD, weight_ED, bias_E)
    return F.gelu(y, approximate="tanh") if gelu else y


def _ends_in_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether the library's product can end in GELU (tanh), before it is rounded and written: cuBLASLt's in 16 bits."""
    narrow = x.dtype in (torch.float16, torch.bfloat16) and x.dtype == weight.dtype == bias.dtype
    return narrow and x.device.type == "cuda" and torch.version.hip is None


@functools.cache
def _cpu_scales_rows() -> bool:
    """Whether this torch takes a scale per row in eight-bit products on a CPU; 2.11 takes one per tensor."""
    x8, ones = torch.zeros(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch.ops.aten._scaled_mm(x8, x8.t(), scale_a=ones, scale_b=ones.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


def linear_fp8(
    x8_BLD: Tensor,
    x_scale_BL: Tensor,
    weight8_ED: Tensor,
    weight_scale_E: Tensor,
    bias_E: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    B, L, D = x8_BLD.shape
    if x8_BLD.device.type == "cpu" and not _cpu_scales_rows():
        x = x8_BLD.float() * x_scale_BL[..., None]
        return F.linear(x, weight8_ED.float() * weight_scale_E[:, None], None if bias_E is None else bias_E.float()).to(
            out_dtype
        )
    y = torch.ops.aten._scaled_mm(
        x8_BLD.reshape(B * L, D),
        weight8_ED.t(),
        scale_a=x_scale_BL.reshape(B * L, 1),
        scale_b=weight_scale_E.reshape(1, -1),
        bias=None if bias_E is None else bias_E.to(out_dtype),
        out_dtype=out_dtype,
        # Hopper sums in 14 bits then; what that loses is a tenth of what eight bits lose (README, "Eight bits").
        use_fast_accum=True,
    )
    return y.view(B, L, -1)
