"""What every launch shares: whether the interpreter runs the kernels, tile sizes, the device of a call."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import JITFunction, driver


@triton.jit
def _probe(x_ptr):
    pass


INTERPRETED = not isinstance(_probe, JITFunction)
"""True when TRITON_INTERPRET=1 was set before the import: the kernels run in NumPy, on CPU tensors."""


IEEE = tl.constexpr(INTERPRETED)
"""The same for the kernels, which work around two faults of the interpreter where it is set."""


@triton.jit
def to_e4m3(x, dtype: tl.constexpr):
    """Round float32 to the nearest e4m3, ties to even, for magnitudes up to 448."""
    if IEEE:
        # The interpreter loses the carry when rounding lifts a mantissa to the next power of two. Adding and
        # taking away 1.5 * 2^23 steps rounds to the step before it looks: what it converts then is exact.
        power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        magic = tl.maximum(power * 0.125, 0.001953125) * 12582912.0
        x = (x + magic) - magic
    return x.to(dtype)


@contextlib.contextmanager
def on_device_of(x: Tensor) -> Iterator[None]:
    """Triton launches on the current device; make it the tensor's."""
    with torch.cuda.device_of(x):
        yield


class Gpu(NamedTuple):
    """What a launch may depend on."""

    capability: int
    num_processors: int


def current_gpu() -> Gpu:
    """The GPU that the next launch goes to, as Triton sees it."""
    return _gpu(driver.active.get_current_device())


@functools.cache
def _gpu(device: int) -> Gpu:
    properties = driver.active.utils.get_device_properties(device)
    return Gpu(driver.active.get_current_target().arch, properties["multiprocessor_count"])


def register_limit(x: Tensor) -> int | None:
    """Registers per thread to hold the row kernels to, or None to leave it to the assembler.

    With 64, four programs of eight warps share a processor of Hopper and one's loads hide behind another's
    sums. The same limit spills on Blackwell, and with rows of four bytes.
    """
    return 64 if x.dtype.itemsize == 2 and not INTERPRETED and current_gpu().capability == 90 else None


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def row_warps(block: int) -> int:
    """Warps for a tile of ``block`` elements: 32 elements a thread, which is four 128-bit loads of
    bfloat16.
    """
    return min(16, max(1, block // 1024))
