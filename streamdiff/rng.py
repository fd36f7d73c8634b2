"""Random numbers from a counter: a value depends on its name, never on what was drawn before it.

A stream may be computed by one rank or by five, rewound, or joined in the middle: as long as every draw is keyed by
what it is for, the bits are the same. All draws are made on the CPU, so they do not depend on the device either.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def seed_of(*key: int | str) -> int:
    """Hash a key to a 63-bit seed.

    >>> seed_of("noise", 42, 0) == seed_of("noise", 42, 0)
    True
    >>> seed_of("noise", 1, 23) == seed_of("noise", 12, 3)
    False
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def integer(low: int, high: int, *key: int | str) -> int:
    """Draw an integer from ``low`` to ``high``, both included, for this key."""
    # 2^63 values over a handful of outcomes: the bias of the remainder is below 1e-17.
    return low + seed_of(*key) % (high - low + 1)


def normal(shape: tuple[int, ...], *key: int | str) -> Tensor:
    """Draw standard normal float32 values on the CPU for this key."""
    generator = torch.Generator().manual_seed(seed_of(*key))
    return torch.randn(shape, generator=generator, dtype=torch.float32)
