"""Linear layers as they are served: in the precision of their weights, or in FP8.

FP8 is e4m3 with one scale per token and per output channel. A weight that was quantised is not kept a second time.

Axes: B streams, L tokens of this chunk, D model width, E output width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import streamdiff_kernels as kernels
from streamdiff_kernels import Impl


@dataclass(frozen=True, slots=True, eq=False)
class FP8Tensor:
    """Activations in eight bits, one scale per token."""

    x8_BLD: Tensor
    scale_BL: Tensor

    def frames(self, num_frames: int) -> FP8Tensor:
        """Latent frames moved into the batch axis."""
        return FP8Tensor(by_frame(self.x8_BLD, num_frames), by_frame(self.scale_BL, num_frames))


Activation = Tensor | FP8Tensor
"""What goes into a linear layer: as it is, or in eight bits."""


def by_frame(x_BL: Tensor, num_frames: int) -> Tensor:
    """Latent frames moved into the batch axis."""
    return x_BL.unflatten(1, (num_frames, -1)).flatten(0, 1)


class DenseLinear:
    """A linear layer in the precision of its weights; ``impl`` None: one that a compiler sees through.

    ``packs``: at the first call the weight is laid out once more as products of as many rows like it (`pack_linear`);
    nobody changes it after that.
    """

    eight_bits = False

    def __init__(self, weight_ED: Tensor, bias_E: Tensor, impl: Impl | None, *, packs: bool = False) -> None:
        self.weight_ED, self.bias_E, self._impl, self._packs = weight_ED, bias_E, impl, packs
        self._packed_ED: Tensor | None = None

    def __call__(self, x: Activation, *, gelu: bool = False) -> Tensor:
        assert isinstance(x, Tensor)
        if self._impl is not None:
            if self._packs:
                self._packed_ED = kernels.pack_linear(self.weight_ED, num_rows=x.shape[0] * x.shape[1])
                self._packs = False
            return kernels.linear(x, self.weight_ED, self.bias_E, gelu=gelu, impl=self._impl, packed_ED=self._packed_ED)
        y = F.linear(x, self.weight_ED, self.bias_E)
        return F.gelu(y, approximate="tanh") if gelu else y


class FP8Linear:
    """A linear layer in eight bits."""

    eight_bits = True

    def __init__(self, weight8_ED: Tensor, scale_E: Tensor, bias_E: Tensor) -> None:
        self.weight8_ED, self.scale_E, self.bias_E = weight8_ED, scale_E, bias_E

    def __call__(self, x: Activation, *, gelu: bool = False) -> Tensor:
        assert isinstance(x, FP8Tensor)
        assert not gelu, "in eight bits GELU belongs to the pass that quantises it"
        return kernels.linear_fp8(
            x.x8_BLD,
            x.scale_BL,
            self.weight8_ED,
            self.scale_E,
            self.bias_E,
            out_dtype=self.bias_E.dtype,
            impl=Impl.TORCH,
        )


AnyLinear = DenseLinear | FP8Linear


class DequantisedLinear(nn.Linear):
    """A linear layer of the DiT with an FP8 weight, dequantised at every call.

    The sink is prefilled through it, once per reference; a chunk never is.
    """

    def __init__(self, weight8_ED: Tensor, scale_E: Tensor, bias_E: Tensor) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight8_ED.shape
        self.weight8_ED = nn.Buffer(weight8_ED)
        self.scale_E = nn.Buffer(scale_E)
        self.bias = nn.Parameter(bias_E, requires_grad=False)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight as it would be without quantisation, but for its rounding; ``[E, D]``."""
        return (self.weight8_ED.float() * self.scale_E[:, None]).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.dense(input.dtype), self.bias)


def stack_linears(linears: tuple[nn.Linear, ...]) -> tuple[Tensor, Tensor]:
    """Stack linear layers into one matrix and make each of them a view of it; one alone stays where it is."""
    if len(linears) == 1:
        return linears[0].weight.data, linears[0].bias.data
    weight_ED = torch.cat([linear.weight.data for linear in linears])
    bias_E = torch.cat([linear.bias.data for linear in linears])
    sizes = [linear.out_features for linear in linears]
    for linear, rows, shift in zip(linears, weight_ED.split(sizes), bias_E.split(sizes), strict=True):
        linear.weight = nn.Parameter(rows, requires_grad=False)
        linear.bias = nn.Parameter(shift, requires_grad=False)
    return weight_ED, bias_E
