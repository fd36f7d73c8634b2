"""What a denoising step remembers of its own stream, at its own noise level.

Every step keeps a history of its own: the keys and values that it computed itself, from the noisy chunk it was given
(Live Avatar, timestep-forcing). Per layer there is one buffer of fixed address,

    [ sink | slot 0 | slot 1 | ... | slot W-1 ]

and chunk c always lives in slot ``c mod W``. Softmax does not care about the order of keys once they carry their
positions, so a chunk attends to one dense prefix of that buffer: no concatenation, no mask, no eviction.

- The chunks' keys are stored already rotated to their absolute positions.
- The sink's keys are kept un-rotated in a pristine copy and rotated from it into the buffer for every chunk. Rotating
  the rotated keys again would lose a little each time: 5 % after 100 chunks in bfloat16, 52 % after 1000.
- A slot that is overwritten is first copied to a spill, so that ``slack_chunks`` chunks can be taken back.

What is where is decided with integers in `Ring`; `StepMemory` moves the tensors.

Axes: Z layers, B streams, S sink tokens, M tokens remembered, L tokens of a chunk, N heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamdiff import counter
from streamdiff.errors import MemoryOrderError
from streamdiff.rope import Rotation, rotate


def sink_lead(*, seed: int, stream: int, chunk: int, low: int, high: int) -> int:
    """Latent frames by which the sink leads a chunk: drawn per chunk, the same on every rank and step.

    The published code draws it anew in every forward on every rank, unseeded, and so cannot be reproduced.
    """
    return counter.integer(low, high, "lead", seed, stream, chunk)


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

    def __init__(self, *, window: int, slack: int) -> None:
        self.window = window
        self.slack = slack
        self.latest = -1
        self._held: dict[int, int] = {}
        """Slot -> chunk whose keys are really there."""
        self._spilled: dict[int, int] = {}
        """Spill slot -> chunk kept there."""

    @property
    def resident(self) -> tuple[int, ...]:
        """Chunks remembered, oldest first."""
        return tuple(range(max(0, self.latest - self.window + 1), self.latest + 1))

    def admit(self, chunk: int) -> Slot:
        """Make room for a chunk and say where it goes."""
        if chunk not in (self.latest, self.latest + 1) or chunk < 0:
            raise MemoryOrderError(
                f"chunk {chunk} came out of turn: this memory holds up to chunk {self.latest}, so it takes "
                f"{f'{self.latest} again or ' if self.latest >= 0 else ''}{self.latest + 1}; "
                f"to go back, rewind first"
            )
        index = chunk % self.window
        evicted = None
        if chunk > self.latest and self._held.get(index) == chunk - self.window:
            # Right after a rewind the slot may hold a chunk that was taken back: nothing worth keeping.
            evicted = chunk - self.window
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
        needed = range(max(0, chunk - self.window + 1), chunk)
        lost = [c for c in needed if self._held.get(c % self.window) != c]
        where = {kept: spill for spill, kept in self._spilled.items()}
        missing = [c for c in lost if c not in where]
        if missing:
            raise MemoryOrderError(
                f"cannot rewind to chunk {chunk}: chunk {missing[0]} is needed and no longer kept "
                f"({self.latest - chunk + 1} chunks taken back, slack_chunks={self.slack}); "
                f"use slack_chunks={self.latest - chunk} or more"
            )
        self._held = {slot: c for slot, c in self._held.items() if c < chunk}
        self._held.update({c % self.window: c for c in lost})
        self._spilled = {spill: c for spill, c in self._spilled.items() if c < chunk}
        self.latest = chunk - 1
        return [Restore(chunk=c, slot=c % self.window, spill=where[c]) for c in lost]

    def clear(self) -> None:
        self.latest = -1
        self._held.clear()
        self._spilled.clear()


class SinkMemory:
    """Keys and values of the sink, un-rotated; shared by all steps of a rank, since the sink is seen at time 0."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_streams: int,
        sink_tokens: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (num_layers, num_streams, sink_tokens, num_heads, head_dim)
        self.keys_ZBSNK = torch.zeros(shape, dtype=dtype, device=device)
        self.values_ZBSNK = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def sink_tokens(self) -> int:
        return self.keys_ZBSNK.shape[2]

    def write(self, layer: int, keys_BSNK: Tensor, values_BSNK: Tensor) -> None:
        """Replace one layer's sink."""
        self.keys_ZBSNK[layer].copy_(keys_BSNK)
        self.values_ZBSNK[layer].copy_(values_BSNK)

    @property
    def num_bytes(self) -> int:
        return 2 * self.keys_ZBSNK.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class LayerMemory:
    """One layer's view for one chunk: write the chunk's keys and values, then attend to the whole prefix."""

    own_keys_BLNK: Tensor
    own_values_BLNK: Tensor
    keys_BMNK: Tensor
    values_BMNK: Tensor


class StepMemory:
    """The history of one denoising step: all layers, one noise level, fixed addresses."""

    def __init__(
        self, sink: SinkMemory, *, chunk_tokens: int, window_chunks: int, slack_chunks: int = 0
    ) -> None:
        Z, B, S, N, K = sink.keys_ZBSNK.shape
        like = sink.keys_ZBSNK
        self.ring = Ring(window=window_chunks, slack=slack_chunks)
        self.chunk_tokens = chunk_tokens
        self._sink = sink
        self._sink_tokens = S
        num_tokens = S + window_chunks * chunk_tokens
        self.keys_ZBMNK = torch.zeros((Z, B, num_tokens, N, K), dtype=like.dtype, device=like.device)
        self.values_ZBMNK = torch.zeros_like(self.keys_ZBMNK)
        spill_shape = (slack_chunks, Z, B, chunk_tokens, N, K)
        self._spilled_keys = torch.zeros(spill_shape, dtype=like.dtype, device=like.device)
        self._spilled_values = torch.zeros_like(self._spilled_keys)

    @property
    def num_bytes(self) -> int:
        return 2 * (self.keys_ZBMNK.nbytes + self._spilled_keys.nbytes)

    def take_sink(self, still: Rotation | None) -> None:
        """Bring the sink in after it was computed anew: all its values, and the keys of its last tokens, those with a
        fixed position (``still``). The keys of its first tokens follow with every `turn_sink`.
        """
        self.values_ZBMNK[:, :, : self._sink_tokens].copy_(self._sink.values_ZBSNK)
        if still is not None:
            self._turn(still, start=self._sink_tokens - still.cos_LF.shape[0])

    def turn_sink(self, rotation: Rotation) -> None:
        """Rotate the first tokens of the sink, as many as ``rotation`` has, from the pristine copy into the buffer."""
        self._turn(rotation, start=0)

    def _turn(self, rotation: Rotation, *, start: int) -> None:
        tokens = slice(start, start + rotation.cos_LF.shape[0])
        Z, B = self.keys_ZBMNK.shape[:2]
        turned = rotate(self._sink.keys_ZBSNK[:, :, tokens].flatten(0, 1), rotation)
        self.keys_ZBMNK[:, :, tokens].copy_(turned.unflatten(0, (Z, B)))

    def admit(self, chunk: int) -> list[LayerMemory]:
        """Make room for a chunk; one view per layer. See `Ring.admit` for the order that is asked for."""
        slot = self.ring.admit(chunk)
        start, end = self._span(slot.index)
        if slot.evicted is not None and self.ring.slack:
            spill = slot.evicted % self.ring.slack
            self._spilled_keys[spill].copy_(self.keys_ZBMNK[:, :, start:end])
            self._spilled_values[spill].copy_(self.values_ZBMNK[:, :, start:end])
        visible = self._sink_tokens + slot.filled * self.chunk_tokens
        return [
            LayerMemory(
                own_keys_BLNK=keys_BMNK[:, start:end],
                own_values_BLNK=values_BMNK[:, start:end],
                keys_BMNK=keys_BMNK[:, :visible],
                values_BMNK=values_BMNK[:, :visible],
            )
            for keys_BMNK, values_BMNK in zip(self.keys_ZBMNK, self.values_ZBMNK, strict=True)
        ]

    def rewind(self, chunk: int) -> None:
        """Forget ``chunk`` and all after it, bringing back what they displaced."""
        for restore in self.ring.rewind(chunk):
            start, end = self._span(restore.slot)
            self.keys_ZBMNK[:, :, start:end].copy_(self._spilled_keys[restore.spill])
            self.values_ZBMNK[:, :, start:end].copy_(self._spilled_values[restore.spill])

    def clear(self) -> None:
        """Forget every chunk; the sink stays."""
        self.ring.clear()

    def _span(self, slot: int) -> tuple[int, int]:
        start = self._sink_tokens + slot * self.chunk_tokens
        return start, start + self.chunk_tokens
