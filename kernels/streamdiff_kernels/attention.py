"""Attention of one chunk over {sink, ring, own chunk}: the backends and which of them can run here.

The keys that a chunk may see are a *set* of rows of the ring: softmax does not care for their order, and
every key carries its own rotation. So attention is dense over contiguous slices: no concatenation, no mask,
no page table. Several slices are several dense calls whose results are merged by their log-sum-exp.

Axes as in `reference`; q ``[B, L, N, K]``, rings ``[B, M, N, K]``, lse ``[B, N, L]`` float32.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from streamdiff_kernels import plain, reference
from streamdiff_kernels.errors import BackendUnavailable, KernelInputError

Segments: TypeAlias = Sequence[tuple[int, int]]
"""Pairs of (first row, number of rows) of a ring."""

HALF_TYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class _Dense:
    """One dense call: every row of ``keys``, or the first ``used_B`` of them where that count lives on the
    device.
    """

    q_BLNK: Tensor
    keys_BMNK: Tensor
    values_BMNK: Tensor
    used_B: Tensor | None
    scale: float
    need_lse: bool


_Answer: TypeAlias = tuple[Tensor, Tensor | None]


# --------------------------------------------------------------------------------------------- dense backends


def _heads_first(call: _Dense) -> tuple[Tensor, Tensor, Tensor]:
    return call.q_BLNK.transpose(1, 2), call.keys_BMNK.transpose(1, 2), call.values_BMNK.transpose(1, 2)


def _sdpa(call: _Dense) -> _Answer:
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


def _onednn(call: _Dense) -> _Answer:
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


def _sdpa_flash(call: _Dense) -> _Answer:
    q, k, v = _heads_first(call)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=call.scale)
    return out.transpose(1, 2), lse


def _sdpa_cudnn(call: _Dense) -> _Answer:
    q, k, v = _heads_first(call)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, call.need_lse, scale=call.scale)
    return out.transpose(1, 2), lse.reshape(q.shape[:3]) if call.need_lse else None


def _with_kvcache(module: ModuleType, call: _Dense) -> _Answer:
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


def _flash_attn(call: _Dense) -> _Answer:
    return _with_kvcache(importlib.import_module("flash_attn"), call)


def _fa3(call: _Dense) -> _Answer:
    return _with_kvcache(_fa3_module(), call)


def _fa3_module() -> ModuleType:
    """The full wheel of FlashAttention-3, else the forward-only one of PyPI (``fa3-fwd``)."""
    try:
        return importlib.import_module("flash_attn_interface")
    except ImportError:
        return importlib.import_module("fa3_fwd_interface")


def _xformers(call: _Dense) -> _Answer:
    ops: Any = importlib.import_module("xformers.ops")
    if not call.need_lse:
        return ops.memory_efficient_attention(call.q_BLNK, call.keys_BMNK, call.values_BMNK, scale=call.scale), None
    out, lse = ops.memory_efficient_attention_forward_requires_grad(
        call.q_BLNK, call.keys_BMNK, call.values_BMNK, scale=call.scale
    )
    return out, lse[:, :, : call.q_BLNK.shape[1]]


# ---------------------------------------------------------------------------------- what is missing to run it


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
    dense: Callable[[_Dense], _Answer] | None
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


# --------------------------------------------------------------------------------------- walking the segments


def host_segments(
    length: Tensor | None, segments_G2: Tensor | None, host_bounds: Sequence[int]
) -> list[tuple[int, int]]:
    """The segments as integers, neighbours joined, empty ones dropped. Reads device tensors: a CUDA one
    waits.
    """
    if length is not None:
        pairs = [(0, int(length))]
    elif segments_G2 is not None:
        pairs = [(int(first), int(count)) for first, count in segments_G2.tolist()]
    else:
        pairs = list(zip(host_bounds[0::2], host_bounds[1::2], strict=True))
    joined: list[tuple[int, int]] = []
    for first, count in sorted(pair for pair in pairs if pair[1] > 0):
        if joined and sum(joined[-1]) == first:
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        else:
            joined.append((first, count))
    return joined


def _split_at(segments: Segments, row: int) -> list[tuple[int, int]]:
    """The same rows, cut where a segment crosses ``row``."""
    parts: list[tuple[int, int]] = []
    for first, count in segments:
        if first < row < first + count:
            parts += [(first, row - first), (row, first + count - row)]
        else:
            parts.append((first, count))
    return parts


def attend_over_segments(
    backend: Backend,
    q_BLNK: Tensor,
    q_sink_BLNK: Tensor | None,
    keys_BMNK: Tensor,
    values_BMNK: Tensor,
    key_scale_BMN: Tensor | None,
    value_scale_BMN: Tensor | None,
    length: Tensor | None,
    segments_G2: Tensor | None,
    host_bounds: Sequence[int],
    *,
    sink_rows: int,
    scale: float,
    need_lse: bool,
) -> _Answer:
    """Run a backend that computes dense slices: one call per slice, merged by log-sum-exp."""
    on_host = q_BLNK.device.type == "cpu" or backend.name == "reference"
    has_sink_query = q_sink_BLNK is not None and sink_rows > 0
    if length is not None and not on_host and backend.counts_on_device and key_scale_BMN is None:
        calls = _calls_with_device_length(
            q_BLNK,
            q_sink_BLNK if has_sink_query else None,
            keys_BMNK,
            values_BMNK,
            length,
            sink_rows,
            scale,
            need_lse,
        )
    else:
        if not on_host and (length is not None or segments_G2 is not None):
            raise BackendUnavailable(
                f"attention backend {backend.name!r} cannot read a fill level from the GPU without "
                "stopping the host; give length as an int and segments as pairs, or use 'triton'"
            )
        segments = host_segments(length, segments_G2, host_bounds)
        if not segments:
            raise KernelInputError("attention over no rows has no value; write the chunk's own keys first")
        if segments[-1][0] + segments[-1][1] > keys_BMNK.shape[1]:
            raise KernelInputError(
                f"segments reach row {sum(segments[-1])} of a ring of {keys_BMNK.shape[1]}; "
                "length counts rows of the ring, the sink included"
            )
        if backend.name == "reference":
            keys, values = (
                _stored(keys_BMNK, key_scale_BMN, None),
                _stored(values_BMNK, value_scale_BMN, None),
            )
            out, lse = reference.attend(
                q_BLNK, keys, values, segments, scale=scale, q_sink_BLNK=q_sink_BLNK, sink_rows=sink_rows
            )
            return out, lse.float()
        parts = _split_at(segments, sink_rows) if has_sink_query else segments
        calls: list[_Dense] = []
        for first, count in parts:
            rows = slice(first, first + count)
            calls.append(
                _Dense(
                    q_sink_BLNK if q_sink_BLNK is not None and first < sink_rows else q_BLNK,
                    _stored(
                        keys_BMNK[:, rows],
                        None if key_scale_BMN is None else key_scale_BMN[:, rows],
                        q_BLNK.dtype,
                    ),
                    _stored(
                        values_BMNK[:, rows],
                        None if value_scale_BMN is None else value_scale_BMN[:, rows],
                        q_BLNK.dtype,
                    ),
                    None,
                    scale,
                    need_lse or len(parts) > 1,
                )
            )
    assert backend.dense is not None
    out, lse = backend.dense(calls[0])
    for call in calls[1:]:
        more, more_lse = backend.dense(call)
        assert lse is not None
        assert more_lse is not None
        # Merging in float32 rounds once, however many segments there are.
        out, lse = reference.merge_attention(out.float(), lse.float(), more, more_lse.float())
    return out.to(q_BLNK.dtype), lse.float() if need_lse and lse is not None else None


def _stored(x_BMNK: Tensor, scale_BMN: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """Rows as numbers: as they are, or from eight bits and a scale (which allocates)."""
    if scale_BMN is None:
        return x_BMNK
    return reference.dequantise_rows(x_BMNK, scale_BMN).to(dtype or torch.float32)


def _calls_with_device_length(
    q_BLNK: Tensor,
    q_sink_BLNK: Tensor | None,
    keys_BMNK: Tensor,
    values_BMNK: Tensor,
    length: Tensor,
    sink_rows: int,
    scale: float,
    need_lse: bool,
) -> list[_Dense]:
    used_B = length.reshape(1).to(torch.int32).expand(q_BLNK.shape[0]).contiguous()
    if q_sink_BLNK is None:
        return [_Dense(q_BLNK, keys_BMNK, values_BMNK, used_B, scale, need_lse)]
    return [
        _Dense(q_sink_BLNK, keys_BMNK[:, :sink_rows], values_BMNK[:, :sink_rows], None, scale, True),
        _Dense(q_BLNK, keys_BMNK[:, sink_rows:], values_BMNK[:, sink_rows:], used_B - sink_rows, scale, True),
    ]
