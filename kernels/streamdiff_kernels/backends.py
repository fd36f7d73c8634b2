"""Attention backends: what each calls, and why one cannot run here.

Axes as in `reference`; q ``[B, L, N, K]``, keys and values ``[B, M, N, K]``, lse ``[B, N, L]`` float32.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from streamdiff_kernels import plain
from streamdiff_kernels.errors import BackendUnavailable

HALF_TYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class DenseCall:
    """One dense call: every row of ``keys``, or the first ``used_B`` of them where that count lives on the
    device.
    """

    q_BLNK: Tensor
    keys_BMNK: Tensor
    values_BMNK: Tensor
    used_B: Tensor | None
    scale: float
    need_lse: bool


Answer: TypeAlias = tuple[Tensor, Tensor | None]


def _heads_first(call: DenseCall) -> tuple[Tensor, Tensor, Tensor]:
    return call.q_BLNK.transpose(1, 2), call.keys_BMNK.transpose(1, 2), call.values_BMNK.transpose(1, 2)


def _sdpa(call: DenseCall) -> Answer:
    q, k, v = _heads_first(call)
    if not call.need_lse:
        return F.scaled_dot_product_attention(q, k, v, scale=call.scale).transpose(1, 2), None
    # The public function does not return the log-sum-exp; the operators under it do.
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=call.scale)
        return out.transpose(1, 2), lse
    if q.dtype in HALF_TYPES:
        return _sdpa_flash(call)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=call.scale)
    return out.transpose(1, 2), lse[:, :, : q.shape[2]]


_SCORE_BYTES = 1 << 22
"""Scores of one block of queries, float32: with their softmax they stay in the third-level cache."""


def _onednn(call: DenseCall) -> Answer:
    """Head by head as two matrix products and a softmax.

    torch's own kernel feeds its products to the library in slices too small to run at speed: 97 GFLOP/s on a
    core where oneDNN reaches 228 in float32 and 450 in bfloat16. Scores are float32 whatever the type,
    weights are rounded to the type of the values, as flash attention does.
    """
    B, L, N, K = call.q_BLNK.shape
    M = call.keys_BMNK.shape[1]
    dtype = call.q_BLNK.dtype
    out_BLNK = torch.empty((B, L, N, K), dtype=dtype)
    lse_BNL = torch.empty((B, N, L), dtype=torch.float32) if call.need_lse else None
    step = max(16, _SCORE_BYTES // (4 * M))
    for b in range(B):
        for head in range(N):
            keys_MK = call.keys_BMNK[b, :, head].float().contiguous()
            values_KM = call.values_BMNK[b, :, head].contiguous().t()
            q_LK = call.q_BLNK[b, :, head].float() * call.scale
            for first in range(0, L, step):
                rows = slice(first, first + step)
                scores_LM = plain.product(q_LK[rows], keys_MK, None)
                if lse_BNL is not None:
                    lse_BNL[b, head, rows] = torch.logsumexp(scores_LM, dim=-1)
                weights_LM = torch.softmax(scores_LM, dim=-1).to(dtype)
                out_BLNK[b, rows, head] = plain.product(weights_LM, values_KM, None)
    return out_BLNK, lse_BNL


def _sdpa_flash(call: DenseCall) -> Answer:
    q, k, v = _heads_first(call)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=call.scale)
    return out.transpose(1, 2), lse


def _sdpa_cudnn(call: DenseCall) -> Answer:
    q, k, v = _heads_first(call)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, call.need_lse, scale=call.scale)
    return out.transpose(1, 2), lse.reshape(q.shape[:3]) if call.need_lse else None


def _with_kvcache(module: ModuleType, call: DenseCall) -> Answer:
    """flash-attn 2 and 3 agree on this call; ``cache_seqlens`` on the device lets one graph serve every fill
    level.
    """
    answer: Any = module.flash_attn_with_kvcache(
        call.q_BLNK,
        call.keys_BMNK,
        call.values_BMNK,
        cache_seqlens=call.used_B,
        softmax_scale=call.scale,
        return_softmax_lse=call.need_lse,
    )
    return (answer[0], answer[1]) if call.need_lse else (answer, None)


def _flash_attn(call: DenseCall) -> Answer:
    return _with_kvcache(importlib.import_module("flash_attn"), call)


def _fa3(call: DenseCall) -> Answer:
    return _with_kvcache(_fa3_module(), call)


def _fa3_module() -> ModuleType:
    """The full wheel of FlashAttention-3, else the forward-only one of PyPI (``fa3-fwd``)."""
    try:
        return importlib.import_module("flash_attn_interface")
    except ImportError:
        return importlib.import_module("fa3_fwd_interface")


def _xformers(call: DenseCall) -> Answer:
    ops: Any = importlib.import_module("xformers.ops")
    if not call.need_lse:
        return ops.memory_efficient_attention(call.q_BLNK, call.keys_BMNK, call.values_BMNK, scale=call.scale), None
    out, lse = ops.memory_efficient_attention_forward_requires_grad(
        call.q_BLNK, call.keys_BMNK, call.values_BMNK, scale=call.scale
    )
    return out, lse[:, :, : call.q_BLNK.shape[1]]


def _why_not_importable(load: Callable[[], object]) -> str | None:
    try:
        load()
    except (ImportError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return None


def _needs_cuda_half(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA device, the tensors are on {device.type}"
    if dtype not in HALF_TYPES:
        return f"it computes in float16 or bfloat16, the queries are {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 != 0 or head_dim > 256:
        return f"it needs a head width that is a multiple of 8 up to 256, got {head_dim}"
    return None


def _onednn_missing(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    del head_dim
    if device.type != "cpu":
        return f"it computes on CPUs, the tensors are on {device.type}"
    return plain.onednn_missing(dtype)


def _nothing_missing(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    del device, dtype, head_dim
    return None


def _flash_attn_missing(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    why = _why_not_importable(lambda: importlib.import_module("flash_attn").flash_attn_with_kvcache)
    return f"flash_attn does not import ({why})" if why else _needs_cuda_half(device, dtype, head_dim)


def _fa3_missing(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    why = _why_not_importable(_fa3_module)
    if why:
        return f"neither flash_attn_interface nor fa3_fwd_interface imports ({why})"
    if (why := _needs_cuda_half(device, dtype, head_dim)) is not None:
        return why
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 9:
        return f"it is built for Hopper (capability 9.x), this GPU has {capability[0]}.{capability[1]}"
    return None


def _xformers_missing(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    why = _why_not_importable(lambda: importlib.import_module("xformers.ops"))
    return f"xformers does not import ({why})" if why else _needs_cuda_half(device, dtype, head_dim)


def _triton_missing(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if (why := triton_missing(device)) is not None:
        return why
    if head_dim > 256:
        return f"its tiles hold head widths up to 256, got {head_dim}"
    if device.type == "cuda" and dtype not in HALF_TYPES:
        # Float32 products on tensor cores take three passes and more registers than there are.
        return f"it multiplies float16 or bfloat16, the queries are {str(dtype).removeprefix('torch.')}"
    return "it computes in float32 or below, the queries are float64" if dtype == torch.float64 else None


def triton_missing(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on ``device``, or None when they can."""
    why = _why_not_importable(lambda: importlib.import_module("streamdiff_kernels.triton"))
    if why:
        return f"triton does not import ({why}); pip install 'streamdiff[triton]'"
    if device.type == "cuda" or importlib.import_module("streamdiff_kernels.triton").INTERPRETED:
        return None
    return f"Triton compiles for GPUs and the tensors are on {device.type}"


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to compute attention. ``dense`` is None for those that walk the segments themselves."""

    name: str
    missing: Callable[[torch.device, torch.dtype, int], str | None]
    dense: Callable[[DenseCall], Answer] | None
    counts_on_device: bool
    """Whether the fill level may live on the GPU; otherwise the host must name it."""
    remedy: str


_INSTALL_HINT = "or let backend='auto' choose"
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("reference", _nothing_missing, None, False, ""),
        Backend("sdpa", _nothing_missing, _sdpa, False, ""),
        Backend("onednn", _onednn_missing, _onednn, False, f"use 'sdpa', {_INSTALL_HINT}"),
        Backend("sdpa-flash", _needs_cuda_half, _sdpa_flash, False, f"use 'sdpa', {_INSTALL_HINT}"),
        Backend("sdpa-cudnn", _needs_cuda_half, _sdpa_cudnn, False, f"use 'sdpa', {_INSTALL_HINT}"),
        Backend("triton", _triton_missing, None, True, f"use 'sdpa', {_INSTALL_HINT}"),
        Backend(
            "flash-attn",
            _flash_attn_missing,
            _flash_attn,
            True,
            f"pip install 'streamdiff[flash-attn]', {_INSTALL_HINT}",
        ),
        Backend("fa3", _fa3_missing, _fa3, True, f"pip install 'streamdiff[fa3]', {_INSTALL_HINT}"),
        Backend(
            "xformers",
            _xformers_missing,
            _xformers,
            False,
            f"pip install 'streamdiff[xformers]', {_INSTALL_HINT}",
        ),
    )
}
"""By name; ``auto`` is no backend, `resolve_backend` turns it into one."""


def backend_named(name: str, *, device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """The backend, or `BackendUnavailable` when it cannot run on such tensors."""
    backend = BACKENDS.get(name)
    if backend is None:
        raise BackendUnavailable(f"attention backend {name!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if (why := backend.missing(device, dtype, head_dim)) is not None:
        raise BackendUnavailable(f"attention backend {name!r} cannot run: {why}; {backend.remedy}")
    return backend


def available_backends(*, device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, str | None]:
    """Every backend by name, with None when it can run and the reason when it cannot."""
    return {name: backend.missing(device, dtype, head_dim) for name, backend in BACKENDS.items()}
