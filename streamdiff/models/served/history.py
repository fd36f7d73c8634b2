"""Scales of an eight-bit history, known before a chunk is seen.

Keys and values that attention remembers may be kept as e4m3 with one scale per layer and head. A scale that never
changes lets attention multiply what it reads as it is kept; so it is derived from the weights, as a bound that nothing
exceeds:

- Keys leave an RMS norm over the model width: no vector is longer than ``sqrt(D)`` times the largest weight of the
  norm, and rotary embedding lengthens none.
- Values are ``W (norm(x) * (1 + scale) + shift) + b`` with ``|norm(x)| <= sqrt(D)``: by Cauchy and Schwarz no entry
  exceeds ``sqrt(D) |W_i * (1 + scale)| + |W_i shift + b_i|``.

e4m3 is a floating-point type: a bound that is too wide by a factor costs nothing until values fall below 2^-15 of it.

Axes: Z layers, N heads, K head width, D model width, E output width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from streamdiff.models.dit import Block, CausalDiT, Modulation
from streamdiff.models.served.linear import DequantisedLinear
from streamdiff_kernels.reference import E4M3_MAX

_ROUNDED = 1.15
"""What rounding inputs and weights to eight bits (6 % each at most) can add to a length."""


def history_scales(dit: CausalDiT, modulations: Sequence[Modulation]) -> tuple[Tensor, Tensor]:
    """Scales of keys and of values, float32 ``[Z, N]`` each, that hold for every input at these noise levels.

    ``modulations``: of the step whose history it is, and of the sink that is kept beside it.
    """
    heads = dit.config.num_heads
    keys_ZD = torch.stack([block.self_attn.norm_k.weight.float().abs() for block in dit.blocks])
    keys_ZN = math.sqrt(dit.config.dim) * keys_ZD.unflatten(1, (heads, -1)).amax(2)
    bounds = [
        torch.stack([_largest_value(block, modulation.layers_Z6D[z, :2]) for modulation in modulations]).amax(0)
        for z, block in enumerate(dit.blocks)
    ]
    values_ZN = torch.stack(bounds).unflatten(1, (heads, -1)).amax(2)
    tiny = torch.finfo(torch.float32).tiny
    return tuple((_ROUNDED * bound_ZN / E4M3_MAX).clamp_min(tiny) for bound_ZN in (keys_ZN, values_ZN))  # pyright: ignore[reportReturnType]


def _largest_value(block: Block, shift_scale_2D: Tensor) -> Tensor:
    """Bound of every entry of a layer's values, ``[D]``."""
    linear = block.self_attn.v
    weight_ED = linear.dense(torch.float32) if isinstance(linear, DequantisedLinear) else linear.weight.float()
    shift_D, scale_D = shift_scale_2D
    moved_E = linear.bias.float() + weight_ED @ shift_D
    return math.sqrt(weight_ED.shape[1]) * (weight_ED * (1 + scale_D)).norm(dim=1) + moved_E.abs()
