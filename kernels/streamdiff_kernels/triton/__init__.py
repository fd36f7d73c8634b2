"""The ops in Triton: the same functions as `streamdiff_kernels.plain`, and attention.

Arithmetic is float32 whatever the tensors are: loads are widened, because the interpreter computes bfloat16
wrongly and a GPU would round at every step. To run on a CPU under Triton's interpreter, set
TRITON_INTERPRET=1 (and OPENBLAS_NUM_THREADS=1, which makes it several times faster) before the first import.
"""

from streamdiff_kernels.triton.attention import attend
from streamdiff_kernels.triton.decoder import rms_norm_silu
from streamdiff_kernels.triton.launch import INTERPRETED
from streamdiff_kernels.triton.rotary import qk_norm_rope_write, rotate_sink_
from streamdiff_kernels.triton.rows import (
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
    "INTERPRETED",
    "attend",
    "gate_residual_",
    "gate_residual_norm_modulate_",
    "gate_residual_norm_modulate_fp8_",
    "gelu_fp8",
    "norm_modulate",
    "norm_modulate_fp8",
    "qk_norm_rope_write",
    "quantise_rows",
    "rms_norm",
    "rms_norm_silu",
    "rotate_sink_",
]
