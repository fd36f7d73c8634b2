"""Attention of one chunk over {sink, ring, own chunk}: dense calls over its segments, merged.

The keys that a chunk may see are a *set* of rows of the ring: softmax does not care for their order, and
every key carries its own rotation. So attention is dense over contiguous slices: no concatenation, no mask,
no page table. Several slices are several dense calls whose results are merged by their log-sum-exp.

Axes as in `reference`; q ``[B, L, N, K]``, rings ``[B, M, N, K]``, lse ``[B, N, L]`` float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from streamdiff_kernels import reference
from streamdiff_kernels.backends import Answer, Backend, DenseCall
from streamdiff_kernels.errors import BackendUnavailable, KernelInputError

Segments: TypeAlias = Sequence[tuple[int, int]]
"""Pairs of (first row, number of rows) of a ring."""


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
    key_scale_BN: Tensor | None,
    value_scale_BN: Tensor | None,
    length: Tensor | None,
    segments_G2: Tensor | None,
    host_bounds: Sequence[int],
    *,
    sink_rows: int,
    scale: float,
    need_lse: bool,
) -> Answer:
    """Run a backend that computes dense slices: one call per slice, merged by log-sum-exp."""
    on_host = q_BLNK.device.type == "cpu" or backend.name == "reference"
    has_sink_query = q_sink_BLNK is not None and sink_rows > 0
    if length is not None and not on_host and backend.counts_on_device and key_scale_BN is None:
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
                _stored(keys_BMNK, key_scale_BN, None),
                _stored(values_BMNK, value_scale_BN, None),
            )
            out, lse = reference.attend(
                q_BLNK, keys, values, segments, scale=scale, q_sink_BLNK=q_sink_BLNK, sink_rows=sink_rows
            )
            return out, lse.float()
        parts = _split_at(segments, sink_rows) if has_sink_query else segments
        calls: list[DenseCall] = []
        for first, count in parts:
            rows = slice(first, first + count)
            calls.append(
                DenseCall(
                    q_sink_BLNK if q_sink_BLNK is not None and first < sink_rows else q_BLNK,
                    _stored(
                        keys_BMNK[:, rows],
                        key_scale_BN,
                        q_BLNK.dtype,
                    ),
                    _stored(
                        values_BMNK[:, rows],
                        value_scale_BN,
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


def _stored(x_BMNK: Tensor, scale_BN: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """Rows as numbers: as they are, or from eight bits and a scale (which allocates)."""
    if scale_BN is None:
        return x_BMNK
    return reference.dequantise_heads(x_BMNK, scale_BN).to(dtype or torch.float32)


def _calls_with_device_length(
    q_BLNK: Tensor,
    q_sink_BLNK: Tensor | None,
    keys_BMNK: Tensor,
    values_BMNK: Tensor,
    length: Tensor,
    sink_rows: int,
    scale: float,
    need_lse: bool,
) -> list[DenseCall]:
    used_B = length.reshape(1).to(torch.int32).expand(q_BLNK.shape[0]).contiguous()
    if q_sink_BLNK is None:
        return [DenseCall(q_BLNK, keys_BMNK, values_BMNK, used_B, scale, need_lse)]
    return [
        DenseCall(q_sink_BLNK, keys_BMNK[:, :sink_rows], values_BMNK[:, :sink_rows], None, scale, True),
        DenseCall(q_BLNK, keys_BMNK[:, sink_rows:], values_BMNK[:, sink_rows:], used_B - sink_rows, scale, True),
    ]
