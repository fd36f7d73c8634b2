"""Weights of convolutions, laid out beforehand as oneDNN wants them on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


class Packing:
    """The weight of a convolution as oneDNN lays it out for a CPU, made at the first call and never again.

    The same bits: only the layout of the weight, which it would else change at every call, is done beforehand.
    """

    def __init__(self) -> None:
        self._weight: Tensor | None = None

    def convolve(self, x: Tensor, conv: nn.Conv2d | nn.Conv3d) -> Tensor:
        """The convolution of a float32 tensor on a CPU."""
        padding = cast(tuple[int, ...], conv.padding)
        if self._weight is None:
            if torch._C._len_torch_function_stack() or is_in_torch_dispatch_mode():  # pyright: ignore[reportAttributeAccessIssue]
                # Somebody watches, and a packed weight has no address to look at.
                return torch.mkldnn_convolution(
                    x, conv.weight, conv.bias, padding, conv.stride, conv.dilation, conv.groups
                )
            places = [list(place) for place in (padding, conv.stride, conv.dilation)]
            self._weight = torch.ops.mkldnn._reorder_convolution_weight(
                conv.weight.detach(), *places, conv.groups, list(x.shape)
            )
        return _packed_convolution()(
            x, self._weight, conv.bias, padding, conv.stride, conv.dilation, conv.groups, "none", [], ""
        )


@functools.cache
def packs_convolutions() -> bool:
    """Whether this torch can lay out the weights of convolutions beforehand."""
    names = ("_reorder_convolution_weight", "_convolution_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


@functools.cache
def _packed_convolution() -> Callable[..., Tensor]:
    return torch.ops.mkldnn._convolution_pointwise.default
