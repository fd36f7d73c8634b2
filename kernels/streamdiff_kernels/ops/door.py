"""What every op needs: who computes it (`Impl`), whether that can run, and what its tensors must be."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from enum import StrEnum
from types import ModuleType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.library import custom_op, register_fake
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from streamdiff_kernels import plain
from streamdiff_kernels.backends import triton_missing
from streamdiff_kernels.errors import BackendUnavailable, KernelInputError


class Impl(StrEnum):
    """Who computes an op: the specification, fast plain torch, or Triton."""

    REFERENCE = "reference"
    TORCH = "torch"
    TRITON = "triton"


E4M3 = torch.float8_e4m3fn

_Shapes = TypeVar("_Shapes", bound=Callable[..., object])
_Body = TypeVar("_Body", bound=Callable[..., Any])


def op(name: str, *, mutates: tuple[str, ...] = ()) -> Callable[[_Body], _Body]:
    """Register an op whose first argument is a tensor; ``mutates`` names the arguments that it writes into.

    Eager code on a CPU calls the body itself: the dispatcher takes longer than a small op. It is asked where somebody
    watches: a compiler, a dispatch mode, autograd, a tensor without data.
    """

    def register(body: _Body) -> _Body:
        registered = custom_op(f"streamdiff_kernels::{name}", mutates_args=mutates)(body)

        @functools.wraps(body)
        def call(*arguments: Any) -> Any:
            return (registered if is_watched(arguments[0]) else body)(*arguments)

        call.registered = registered  # type: ignore[attr-defined]
        return cast("_Body", call)

    return register


def is_watched(x: Tensor) -> bool:
    """Whether somebody looks at what is computed, so that ops must be seen: see `op`."""
    return (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or x.device.type != "cpu"
        or type(x) not in (Tensor, torch.nn.Parameter)
        or is_in_torch_dispatch_mode()
    )


def shapes_of(name: str) -> Callable[[_Shapes], _Shapes]:
    """Register what an op returns for tensors without data (torch's decorator is untyped)."""

    def register(shapes: _Shapes) -> _Shapes:
        register_fake(f"streamdiff_kernels::{name}", shapes)
        return shapes

    return register


def require(impl: Impl, device: torch.device) -> None:
    """Raise `BackendUnavailable` when ``impl`` cannot run on ``device``."""
    if impl == Impl.TRITON and (why := triton_missing(device)) is not None:
        raise BackendUnavailable(f"Impl.TRITON cannot run: {why}; use Impl.TORCH")


def fast(impl: str, device: torch.device) -> Any:
    """The module behind ``impl``. `plain` and `triton` have the same functions; `reference` is called by
    name.
    """
    if impl == Impl.TRITON:
        require(Impl.TRITON, device)
        return importlib.import_module("streamdiff_kernels.triton")
    module: ModuleType = plain
    return module


def batched(x: Tensor, num_axes: int) -> Tensor:
    """Give a lone stream its axis."""
    return x if x.dim() == num_axes else x.unsqueeze(0)


def batched_or_none(x: Tensor | None, num_axes: int) -> Tensor | None:
    return None if x is None else batched(x, num_axes)


def layout(x: Tensor) -> str:
    """Type and shape, for errors."""
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"


def check_ring(keys: Tensor, values: Tensor | None, scales: tuple[Tensor | None, ...]) -> None:
    if keys.dim() not in (3, 4) or not keys.is_contiguous():
        raise KernelInputError(f"a ring is a contiguous [B, M, N, K] or [M, N, K], got {layout(keys)}")
    if values is not None and (values.shape != keys.shape or values.dtype != keys.dtype or not values.is_contiguous()):
        raise KernelInputError(f"keys and values must be alike, got {layout(keys)} and {layout(values)}")
    for scale in scales:
        if (scale is not None) != (keys.dtype == E4M3):
            raise KernelInputError(
                f"float32 scales [.., N] go with a float8_e4m3fn ring, and no other; ring {layout(keys)}"
            )
        shape = (*keys.shape[:-3], keys.shape[-2])
        if scale is not None and (scale.shape != shape or not scale.is_contiguous() or scale.dtype != torch.float32):
            raise KernelInputError(
                f"scales of a ring {layout(keys)} are float32 {list(shape)}, one per head, got {layout(scale)}"
            )


def check_index(index: Tensor, device: torch.device, name: str) -> None:
    if index.numel() != 1 or index.dtype != torch.int32 or index.device != device:
        raise KernelInputError(
            f"{name} must be one int32 on {device}, the device of the ring, got {layout(index)} on "
            f"{index.device}; try torch.zeros((), dtype=torch.int32, device=...)"
        )
