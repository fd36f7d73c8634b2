"""Attention of a chunk over the ring, through any backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from streamdiff_kernels import reference
from streamdiff_kernels.attention import Segments, attend_over_segments, host_segments
from streamdiff_kernels.backends import BACKENDS, DenseCall, backend_named
from streamdiff_kernels.errors import KernelInputError
from streamdiff_kernels.ops.door import (
    E4M3,
    Impl,
    batched,
    batched_or_none,
    check_index,
    check_ring,
    fast,
    layout,
    op,
    shapes_of,
)


def attend(
    q_BLNK: Tensor,
    keys_BMNK: Tensor,
    values_BMNK: Tensor,
    length: int | Tensor | None = None,
    *,
    backend: str,
    segments: Segments | Tensor | None = None,
    q_sink_BLNK: Tensor | None = None,
    sink_rows: int = 0,
    key_scale_BN: Tensor | None = None,
    value_scale_BN: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of one chunk's queries over rows of the ring, the chunk's own included; returns ``[B, L, N,
    K]``.

    The rows are the first ``length`` (the fill level, sink included), or ``segments``, pairs of (first row,
    number of rows): the sparse {first, previous, own}. Their order is free. Either may live on the device, as
    one int32 or as int32 ``[G, 2]``, for backends that can read it there ('triton' both; 'flash-attn' and
    'fa3' the length), so that one CUDA graph serves every fill level; on a CPU every backend can. Otherwise
    give integers.

    With ``q_sink`` (from `qk_norm_rope_write`), rows below ``sink_rows`` are scored against ``q_sink``, the
    rest against q: the sink's distance is set by turning the query, and no key is touched.

    ``backend`` is a key of `attention.BACKENDS`; one that cannot run raises `BackendUnavailable`. ``scale``
    defaults to ``1 / sqrt(K)``.
    """
    return _attend_checked(
        q_BLNK,
        keys_BMNK,
        values_BMNK,
        length,
        backend,
        segments,
        q_sink_BLNK,
        sink_rows,
        key_scale_BN,
        value_scale_BN,
        scale,
        False,
    )[0]


def attend_with_lse(
    q_BLNK: Tensor,
    keys_BMNK: Tensor,
    values_BMNK: Tensor,
    length: int | Tensor | None = None,
    *,
    backend: str,
    segments: Segments | Tensor | None = None,
    q_sink_BLNK: Tensor | None = None,
    sink_rows: int = 0,
    key_scale_BN: Tensor | None = None,
    value_scale_BN: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend`, and the log-sum-exp of the scores, float32 ``[B, N, L]``, for `merge_attention`."""
    return _attend_checked(
        q_BLNK,
        keys_BMNK,
        values_BMNK,
        length,
        backend,
        segments,
        q_sink_BLNK,
        sink_rows,
        key_scale_BN,
        value_scale_BN,
        scale,
        True,
    )


def attend_prefix(q_BLNK: Tensor, keys_BMNK: Tensor, values_BMNK: Tensor, length: int, *, backend: str) -> Tensor:
    """`attend` to the first ``length`` rows, for eager code on a CPU whose tensors are known to fit: nothing is checked
    and nobody who watches operators sees it.
    """
    dense = BACKENDS[backend].dense
    if dense is None:
        return attend(q_BLNK, keys_BMNK, values_BMNK, length, backend=backend)
    if length < keys_BMNK.shape[1]:
        keys_BMNK, values_BMNK = keys_BMNK[:, :length], values_BMNK[:, :length]
    scale = 1 / math.sqrt(q_BLNK.shape[-1])
    return dense(DenseCall(q_BLNK, keys_BMNK, values_BMNK, None, scale, need_lse=False))[0].contiguous()


merge_attention = reference.merge_attention


def _attend_checked(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int | Tensor | None,
    backend: str,
    segments: Segments | Tensor | None,
    q_sink: Tensor | None,
    sink_rows: int,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    scale: float | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    B, _, N, K = q.shape
    check_ring(keys, values, (key_scale, value_scale))
    if keys.shape[-2:] != (N, K) or (keys.shape[0] if keys.dim() == 4 else 1) != B:
        raise KernelInputError(f"queries {layout(q)} and ring {layout(keys)} must agree on streams, heads and width")
    if keys.dtype not in (q.dtype, E4M3):
        raise KernelInputError(f"queries {layout(q)} and ring {layout(keys)} must be of one type, or the ring e4m3")
    if q_sink is not None and (q_sink.shape != q.shape or q_sink.dtype != q.dtype):
        raise KernelInputError(f"q_sink must be like q {layout(q)}, got {layout(q_sink)}")
    if (length is None) == (segments is None):
        raise KernelInputError("say which rows to attend to: either length or segments")
    length_tensor = segments_tensor = None
    host_bounds: list[int] = []
    if isinstance(length, Tensor):
        check_index(length, q.device, "length")
        length_tensor = length
    elif length is not None:
        host_bounds = [0, length]
    if isinstance(segments, Tensor):
        if segments.dim() != 2 or segments.shape[1] != 2 or segments.dtype != torch.int32:
            raise KernelInputError(f"segments on the device are int32 [G, 2], got {layout(segments)}")
        segments_tensor = segments
    elif segments is not None:
        host_bounds = [bound for segment in segments for bound in segment]
    if scale is None:
        scale = 1 / math.sqrt(K)
    return _attend(
        q,
        q_sink,
        keys,
        values,
        key_scale,
        value_scale,
        length_tensor,
        segments_tensor,
        host_bounds,
        sink_rows,
        scale,
        need_lse,
        backend,
    )


@op("attend")
def _attend(
    q: Tensor,
    q_sink: Tensor | None,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    length: Tensor | None,
    segments: Tensor | None,
    host_bounds: list[int],
    sink_rows: int,
    scale: float,
    need_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    chosen = backend_named(backend, device=q.device, dtype=q.dtype, head_dim=q.shape[-1])
    rings = batched(keys, 4), batched(values, 4)
    scales = batched_or_none(key_scale, 2), batched_or_none(value_scale, 2)
    if backend == "triton":
        pairs = host_segments(None, None, host_bounds) if host_bounds else None
        out, lse = fast(Impl.TRITON, q.device).attend(
            q, q_sink, *rings, *scales, length, segments, pairs, sink_rows, scale, need_lse
        )
    else:
        out, lse = attend_over_segments(
            chosen,
            q,
            q_sink,
            *rings,
            *scales,
            length,
            segments,
            host_bounds,
            sink_rows=sink_rows,
            scale=scale,
            need_lse=need_lse,
        )
    return out.contiguous(), q.new_empty(0, dtype=torch.float32) if lse is None else lse.contiguous()


@shapes_of("attend")
def _(
    q: Tensor,
    q_sink: Tensor | None,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    length: Tensor | None,
    segments: Tensor | None,
    host_bounds: list[int],
    sink_rows: int,
    scale: float,
    need_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    lse_shape = (q.shape[0], q.shape[2], q.shape[1]) if need_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)
