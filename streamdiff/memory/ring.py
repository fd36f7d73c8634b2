"""Which chunk lives in which slot of a ring buffer, and what a rewind brings back: integers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from streamdiff import rng
from streamdiff.errors import MemoryOrderError


def sink_lead(*, seed: int, stream: int, chunk: int, low: int, high: int) -> int:
    """Latent frames by which the sink leads a chunk: drawn per chunk, the same on every rank and step.

    The published code draws it anew in every forward on every rank, unseeded, and so cannot be reproduced.
    """
    return rng.integer(low, high, "lead", seed, stream, chunk)


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a chunk goes."""

    index: int
    """Slot in the ring."""
    filled: int
    """Slots that hold something, this chunk's included: the chunk attends to slots 0 .. filled - 1."""
    evicted: int | None
    """Chunk that this one displaces, or None."""


@dataclass(frozen=True, slots=True)
class Restore:
    """A chunk that a rewind brings back from the spill."""

    chunk: int
    slot: int
    spill: int


class Ring:
    """Which chunk lives in which slot. Integers only.

    The same chunk overwrites itself, the next chunk advances, anything else is an error.

    >>> ring = Ring(window=3, slack=2)
    >>> [ring.admit(c).index for c in (0, 1, 2, 2, 3)]
    [0, 1, 2, 2, 0]
    >>> ring.resident
    (1, 2, 3)
    """

    def __init__(self, *, window: int, slack: int, keeps_first: bool = False) -> None:
        self.window = window
        self.slack = slack
        self.keeps_first = keeps_first
        self.latest = -1
        self._period = window - 1 if keeps_first else window
        """Chunks after which a slot is used again."""
        self._held: dict[int, int] = {}
        """Slot -> chunk whose keys are really there."""
        self._spilled: dict[int, int] = {}
        """Spill slot -> chunk kept there."""

    def slot_of(self, chunk: int) -> int:
        """Where a chunk lives while it is remembered."""
        if not self.keeps_first:
            return chunk % self.window
        return 0 if chunk == 0 else 1 + (chunk - 1) % self._period

    def _up_to(self, chunk: int) -> tuple[int, ...]:
        """What the window holds when ``chunk`` is the last one in it, oldest first."""
        recent = tuple(range(max(0, chunk - self._period + 1), chunk + 1))
        return (0, *recent) if self.keeps_first and 0 not in recent and recent else recent

    @property
    def resident(self) -> tuple[int, ...]:
        """Chunks remembered, oldest first."""
        return self._up_to(self.latest)

    def admit(self, chunk: int) -> Slot:
        """Make room for a chunk and say where it goes."""
        if chunk not in (self.latest, self.latest + 1) or chunk < 0:
            raise MemoryOrderError(
                f"chunk {chunk} came out of turn: this memory holds up to chunk {self.latest}, so it takes "
                f"{f'{self.latest} again or ' if self.latest >= 0 else ''}{self.latest + 1}; "
                f"to go back, rewind first"
            )
        index = self.slot_of(chunk)
        evicted = None
        if chunk > self.latest and self._held.get(index) == chunk - self._period:
            # Right after a rewind the slot may hold a chunk that was taken back: nothing worth keeping.
            evicted = chunk - self._period
            if self.slack:
                self._spilled[evicted % self.slack] = evicted
        self._held[index] = chunk
        self.latest = chunk
        return Slot(index=index, filled=min(chunk + 1, self.window), evicted=evicted)

    def rewind(self, chunk: int) -> list[Restore]:
        """Forget ``chunk`` and everything after it; say which chunks must come back from the spill."""
        if not 0 <= chunk <= self.latest + 1:
            raise MemoryOrderError(
                f"cannot rewind to chunk {chunk}: this memory holds up to chunk {self.latest}; "
                f"rewind to 0..{self.latest + 1}"
            )
        # What the chunk to come will see besides itself.
        needed = self._up_to(chunk)[:-1]
        lost = [c for c in needed if self._held.get(self.slot_of(c)) != c]
        where = {kept: spill for spill, kept in self._spilled.items()}
        missing = [c for c in lost if c not in where]
        if missing:
            raise MemoryOrderError(
                f"cannot rewind to chunk {chunk}: chunk {missing[0]} is needed and no longer kept "
                f"({self.latest - chunk + 1} chunks taken back, slack_chunks={self.slack}); "
                f"use slack_chunks={self.latest - chunk} or more"
            )
        self._held = {slot: c for slot, c in self._held.items() if c < chunk}
        self._held.update({self.slot_of(c): c for c in lost})
        self._spilled = {spill: c for spill, c in self._spilled.items() if c < chunk}
        self.latest = chunk - 1
        return [Restore(chunk=c, slot=self.slot_of(c), spill=where[c]) for c in lost]

    @property
    def whereabouts(self) -> tuple[dict[int, int], dict[int, int]]:
        """Slot -> chunk that is there, and spill slot -> chunk kept there."""
        return dict(self._held), dict(self._spilled)

    def resume(self, latest: int, held: Mapping[int, int], spilled: Mapping[int, int]) -> None:
        """Stand where another ring of this shape stood."""
        self.latest, self._held, self._spilled = latest, dict(held), dict(spilled)

    def clear(self) -> None:
        self.latest = -1
        self._held.clear()
        self._spilled.clear()
