"""The typed door to every op: checks, chooses an implementation, calls it.

Each op is a `torch.library.custom_op` of the namespace ``streamdiff_kernels``, so that
``torch.compile(fullgraph=True)`` sees one opaque node; eager code on a CPU calls its body without the dispatcher
(`door.op`). Each takes the implementation by name. One that
cannot run is an error, never a quiet fallback. Ops whose name ends in ``_`` write into an argument, as
`qk_norm_rope_write` writes into the ring. They are for inference: the functions of `reference` are
differentiable, these are not.

Axes as in `reference`: B streams, T latent frames, L tokens of this chunk, M tokens remembered, D model
width, N heads, K head width, R = K / 2 rotary pairs, G sink tokens, C channels, F hidden, E output width.

Rings and sinks may come without their first axis when there is one stream (``[M, N, K]``), and so may
modulations that all streams share (``[T, D]``). A slot number is an int32 tensor of one element on the device
of the ring: the op reads it there, so neither a recompile nor a wait follows it round the ring. A slot
outside the ring raises IndexError on a CPU; on a GPU nothing is written.
"""

from streamdiff_kernels.ops.attention import attend, attend_prefix, attend_with_lse, merge_attention
from streamdiff_kernels.ops.decoder import rms_norm_silu
from streamdiff_kernels.ops.door import Impl, is_watched, require
from streamdiff_kernels.ops.products import linear, linear_fp8, pack_linear
from streamdiff_kernels.ops.rotary import qk_norm_rope_write, rotate, rotate_sink_
from streamdiff_kernels.ops.rows import (
    gate_residual_,
    gate_residual_norm_modulate_,
    gate_residual_norm_modulate_fp8_,
    gelu_fp8,
    norm_modulate,
    norm_modulate_fp8,
    quantise_rows,
    rms_norm,
)

__all__ = [
    "Impl",
    "attend",
    "attend_prefix",
    "attend_with_lse",
    "gate_residual_",
    "gate_residual_norm_modulate_",
    "gate_residual_norm_modulate_fp8_",
    "gelu_fp8",
    "is_watched",
    "linear",
    "linear_fp8",
    "merge_attention",
    "norm_modulate",
    "norm_modulate_fp8",
    "pack_linear",
    "qk_norm_rope_write",
    "quantise_rows",
    "require",
    "rms_norm",
    "rms_norm_silu",
    "rotate",
    "rotate_sink_",
]
