"""Fused operations for streaming video diffusion, and attention behind one door.

`reference` says what each op means, `ops` is the typed door, `plain` is fast torch, `triton` is fast on a
GPU. Triton is optional: without it everything imports, and asking for `Impl.TRITON` says so.
"""

from streamdiff_kernels.backends import BACKENDS, available_backends
from streamdiff_kernels.choose import measure_backends, resolve_backend
from streamdiff_kernels.errors import BackendUnavailable, KernelError, KernelInputError
from streamdiff_kernels.ops import (
    Impl,
    attend,
    attend_prefix,
    attend_with_lse,
    gate_residual_,
    gate_residual_norm_modulate_,
    gate_residual_norm_modulate_fp8_,
    gelu_fp8,
    is_watched,
    linear,
    linear_fp8,
    merge_attention,
    norm_modulate,
    norm_modulate_fp8,
    pack_linear,
    qk_norm_rope_write,
    quantise_rows,
    require,
    rms_norm,
    rms_norm_silu,
    rotate,
    rotate_sink_,
)

__all__ = [
    "BACKENDS",
    "BackendUnavailable",
    "Impl",
    "KernelError",
    "KernelInputError",
    "attend",
    "attend_prefix",
    "attend_with_lse",
    "available_backends",
    "gate_residual_",
    "gate_residual_norm_modulate_",
    "gate_residual_norm_modulate_fp8_",
    "gelu_fp8",
    "is_watched",
    "linear",
    "linear_fp8",
    "measure_backends",
    "merge_attention",
    "norm_modulate",
    "norm_modulate_fp8",
    "pack_linear",
    "qk_norm_rope_write",
    "quantise_rows",
    "require",
    "resolve_backend",
    "rms_norm",
    "rms_norm_silu",
    "rotate",
    "rotate_sink_",
]
