"""How far an op may stand from its float64 reference: ``|got - want| <= rtol * |want| + atol``, per type of
its output.

``rtol`` is the rounding of the output type: half a unit in the last place when rounding to nearest, one whole
unit where a test runs under Triton's interpreter, which truncates. ``atol`` covers cancellation: it is stated
for inputs of unit variance and grows with nothing else. Each bound is two to four times the largest error
seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_UNIT = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


@dataclass(frozen=True, slots=True)
class Tolerance:
    """``atol32`` is the absolute error of the arithmetic, which is float32 whatever the output type."""

    atol32: float
    units: float = 1.0
    """Relative error in units in the last place of the output type."""

    def check(self, got: Tensor, want_f64: Tensor, dtype: torch.dtype | None = None) -> None:
        """AssertionError with the worst entry unless every entry of ``got`` is within bounds and finite.

        ``dtype`` is the type whose rounding is granted; by default the type of ``got``.
        """
        rounding = _UNIT[dtype or got.dtype] * self.units
        torch.testing.assert_close(
            got.double(), want_f64.double(), rtol=max(rounding, 8 * _UNIT[torch.float32]), atol=self.atol32
        )


TOLERANCES = {
    "rms_norm": Tolerance(atol32=4e-6),
    "rotate": Tolerance(atol32=2e-6),
    # A rotation subtracts two products, so an entry near zero carries the rounding of its larger neighbours.
    "qk_norm_rope_write": Tolerance(atol32=8e-6),
    "rotate_sink_": Tolerance(atol32=2e-6),
    "norm_modulate": Tolerance(atol32=8e-6),
    "gate_residual_": Tolerance(atol32=2e-6),
    # The norm reads the rounded stream; with a bfloat16 stream that is compared like with like.
    "gate_residual_norm_modulate_": Tolerance(atol32=8e-6),
    "rms_norm_silu": Tolerance(atol32=8e-6),
    # A sum of D products of unit variance; twice the units because the product is rounded before GELU in
    # bfloat16.
    "linear": Tolerance(atol32=3e-5, units=2.0),
    # Softmax weights are rounded to the type of q before the second product, as in every flash attention.
    "attend_float32": Tolerance(atol32=4e-6),
    "attend_float16": Tolerance(atol32=1e-3),
    "attend_bfloat16": Tolerance(atol32=8e-3),
    "lse": Tolerance(atol32=2e-5),
}
"""By op. Eight-bit ops are bounded by `E4M3_STEP` instead."""

E4M3_STEP = 2.0**-3
"""Distance between neighbours of e4m3, relative: a value that lands beside its reference differs by one
step.
"""


def check_eight_bits_of_heads(x8: Tensor, scale_BN: Tensor, want_f64: Tensor) -> None:
    """Values ``[B, L, N, K]`` in eight bits with given scales against the exact ones, as far as e4m3 reaches."""
    scale = scale_BN.double()[:, None, :, None]
    want = want_f64.clamp(-448.0 * scale, 448.0 * scale)
    half_step = torch.maximum(want.abs() * E4M3_STEP / 2, scale * 2.0**-10)
    worst = ((x8.double() * scale - want).abs() / half_step).max().item()
    assert worst <= 1.001, f"an eight-bit value is {worst:.3f} half steps from its reference"


def check_eight_bits(x8: Tensor, scale: Tensor, want_f64: Tensor) -> None:
    """Eight-bit rows against the exact ones: scales to float32, values to half a step, ties to a whole one.

    Below 2^-6 of e4m3 the steps are absolute, 2^-9.
    """
    want_scale = want_f64.abs().amax(-1) / 448.0
    torch.testing.assert_close(scale.double(), want_scale.double(), rtol=1e-5, atol=0.0)
    error = (x8.double() * scale.double()[..., None] - want_f64).abs()
    half_step = torch.maximum(want_f64.abs() * E4M3_STEP / 2, want_scale[..., None] * 2.0**-10)
    # A value on a tie may go either way after the last float32 rounding: at most 0.1 % more than half a step.
    worst = (error / half_step.clamp_min(1e-300)).max().item()
    assert worst <= 1.001, f"an eight-bit value is {worst:.3f} half steps from its reference"
