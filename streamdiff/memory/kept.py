"""What must be kept of something that remembers, so that another one goes on with the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """A snapshot: little that changes, and much that does not.

    Whoever takes one after every chunk has to copy new names only.
    """

    facts: Mapping[str, Any]
    """Numbers and lists of them, as JSON has them."""
    tensors: Mapping[str, Tensor]
    """By names that are given once: what is called the same has the same bits. Some are views, to be copied before the
    next chunk comes."""

    def within(self, name: str) -> dict[str, Tensor]:
        """Its tensors, under names that begin with another one."""
        return {f"{name}/{rest}": tensor for rest, tensor in self.tensors.items()}

    def part(self, name: str, facts: Mapping[str, Any]) -> Kept:
        """What `within` put under a name, with facts of its own."""
        start = f"{name}/"
        return Kept(facts, {key[len(start) :]: t for key, t in self.tensors.items() if key.startswith(start)})
