"""The key-value cache of one denoising step: rings of fixed address, and the sink turned into them for every chunk.

Axes: Z layers, B streams, S sink tokens, M tokens remembered, L tokens of a chunk, N heads, K head width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from streamdiff.errors import MemoryOrderError
from streamdiff.memory.kept import Kept
from streamdiff.memory.ring import Ring, Slot
from streamdiff.rope import Rotation
from streamdiff_kernels import Impl, rotate_sink_
from streamdiff_kernels.reference import quantise_heads


class SinkMemory:
    """Keys and values of the sink, un-rotated; shared by all steps of a rank, since the sink is seen at time 0.

    The first ``moving_tokens`` of it (the reference) roll with the stream, the rest (the motion prefix) stays where it
    is; they lie in two buffers so that each can be rotated whole.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_streams: int,
        moving_tokens: int,
        still_tokens: int = 0,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        def zeros(num_tokens: int) -> Tensor:
            shape = (num_layers, num_streams, num_tokens, num_heads, head_dim)
            return torch.zeros(shape, dtype=dtype, device=device)

        self.moving_keys_ZBSNK = zeros(moving_tokens)
        self.still_keys_ZBSNK = zeros(still_tokens)
        self.values_ZBSNK = zeros(moving_tokens + still_tokens)

    @property
    def sink_tokens(self) -> int:
        return self.values_ZBSNK.shape[2]

    @property
    def moving_tokens(self) -> int:
        return self.moving_keys_ZBSNK.shape[2]

    def write(self, layer: int, keys_BSNK: Tensor, values_BSNK: Tensor) -> None:
        """Replace one layer's sink."""
        self.moving_keys_ZBSNK[layer].copy_(keys_BSNK[:, : self.moving_tokens])
        self.still_keys_ZBSNK[layer].copy_(keys_BSNK[:, self.moving_tokens :])
        self.values_ZBSNK[layer].copy_(values_BSNK)

    def keys(self, layer: int) -> Tensor:
        """One layer's pristine keys, moving ones first: ``[B, S, N, K]``."""
        return torch.cat([self.moving_keys_ZBSNK[layer], self.still_keys_ZBSNK[layer]], dim=1)

    def wipe(self) -> None:
        """As if new."""
        for buffer in (self.moving_keys_ZBSNK, self.still_keys_ZBSNK, self.values_ZBSNK):
            buffer.zero_()

    @property
    def num_bytes(self) -> int:
        return 2 * self.values_ZBSNK.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class LayerMemory:
    """One layer's view for one chunk: write the chunk's keys and values, then attend to the whole prefix."""

    own_keys_BLNK: Tensor
    own_values_BLNK: Tensor
    keys_BMNK: Tensor
    values_BMNK: Tensor


class StepMemory:
    """The history of one denoising step: all layers, one noise level, fixed addresses.

    Where the current chunk goes and how much is filled is known twice: on the host as integers, and on the device
    (``slot_index``, ``length``), so that a captured step can follow the ring without the host.

    ``scales``: keys and values are float8_e4m3fn, and these float32 scales of keys and of values, ``[Z, N]`` each, make
    numbers of them. They stay, so that attention may read what is kept as it is kept; only a served step does.
    """

    def __init__(
        self,
        sink: SinkMemory,
        *,
        chunk_tokens: int,
        window_chunks: int,
        slack_chunks: int = 0,
        keeps_first: bool = False,
        impl: Impl = Impl.TORCH,
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        like = sink.values_ZBSNK
        Z, B, S, N, K = like.shape
        self.ring = Ring(window=window_chunks, slack=slack_chunks, keeps_first=keeps_first)
        self.chunk_tokens = chunk_tokens
        self.sink_tokens = S
        self.length_on_host = S
        self.slot_index = torch.zeros((), dtype=torch.int32, device=like.device)
        self.length = torch.full((), S, dtype=torch.int32, device=like.device)
        self._sink = sink
        self._impl = impl
        num_tokens = S + window_chunks * chunk_tokens
        dtype = like.dtype if scales is None else torch.float8_e4m3fn
        self.keys_ZBMNK = torch.zeros((Z, B, num_tokens, N, K), dtype=dtype, device=like.device)
        self.values_ZBMNK = torch.zeros_like(self.keys_ZBMNK)
        self.key_scale_ZBN: Tensor | None = None
        self.value_scale_ZBN: Tensor | None = None
        self._rings = [self.keys_ZBMNK, self.values_ZBMNK]
        """All that has a row per token."""
        if scales is not None:
            self.key_scale_ZBN, self.value_scale_ZBN = (
                scale_ZN.float().to(like.device)[:, None].repeat(1, B, 1) for scale_ZN in scales
            )
        self._first_keys_ZBLNK = like.new_zeros((Z, B, chunk_tokens if keeps_first else 0, N, K))
        """Keys of the first chunk as they were written, at their first positions."""
        self._knows_first = False
        self._writes = 0
        self._written: dict[int, int] = {}
        """Chunk -> which write its keys and values are, counted; a chunk that is made anew is written anew."""
        self._spills = [ring.new_zeros((slack_chunks, Z, B, chunk_tokens, *ring.shape[3:])) for ring in self._rings]

    @property
    def num_bytes(self) -> int:
        scales = [scale for scale in (self.key_scale_ZBN, self.value_scale_ZBN) if scale is not None]
        return sum(buffer.nbytes for buffer in (*self._rings, *self._spills, self._first_keys_ZBLNK, *scales))

    @property
    def eight_bits(self) -> bool:
        return self.key_scale_ZBN is not None

    def take_sink(self, still: Rotation | None) -> None:
        """Bring the sink in after it was computed anew: all its values, and the keys that keep their position.

        The keys that move follow with every `turn_sink`.
        """
        rows_ZBSNK = self.values_ZBMNK[:, :, : self.sink_tokens]
        if self.value_scale_ZBN is None:
            rows_ZBSNK.copy_(self._sink.values_ZBSNK)
        else:  # layer by layer: wide copies of all would take gigabytes
            for rows, values, scale in zip(rows_ZBSNK, self._sink.values_ZBSNK, self.value_scale_ZBN, strict=True):
                rows.copy_(quantise_heads(values, scale))
        if still is not None:
            self._turn(self._sink.still_keys_ZBSNK, still, first_row=self._sink.moving_tokens)

    def turn_sink(self, rotation: Rotation) -> None:
        """Apply rotary embedding to the moving tokens of the sink, from their un-rotated copy into the cache."""
        self._turn(self._sink.moving_keys_ZBSNK, rotation, first_row=0)

    def turn_first(self, shift: Rotation) -> None:
        """Move a kept first chunk on in time, from where it was written: before each chunk but the first.

        ``shift``: of all its tokens alike. Without effect while chunk 0 is the one at work.
        """
        if self.ring.latest == 0:
            return
        if not self._knows_first:
            rows = self._rows(0)
            keys_ZBLNK = self.keys_ZBMNK[:, :, rows]
            if self.key_scale_ZBN is not None:
                keys_ZBLNK = keys_ZBLNK.float() * self.key_scale_ZBN[:, :, None, :, None]
            self._first_keys_ZBLNK.copy_(keys_ZBLNK)
            self._knows_first = True
        self._turn(self._first_keys_ZBLNK, shift, first_row=self.sink_tokens)

    def _turn(self, pristine_ZBSNK: Tensor, rotation: Rotation, *, first_row: int) -> None:
        rotate_sink_(
            pristine_ZBSNK.flatten(0, 1),
            rotation.cos_LF,
            rotation.sin_LF,
            self.keys_ZBMNK.flatten(0, 1),
            first_row=first_row,
            key_scale_BN=None if self.key_scale_ZBN is None else self.key_scale_ZBN.flatten(0, 1),
            impl=self._impl,
        )

    def admit(self, chunk: int) -> Slot:
        """Make room for a chunk; what it displaces goes to the spill. See `Ring.admit` for the order asked for."""
        slot = self.ring.admit(chunk)
        self._knows_first = self._knows_first and chunk > 0
        self._writes += 1
        held, spilled = self.ring.whereabouts
        remembered = {*held.values(), *spilled.values()}
        self._written = {c: n for c, n in self._written.items() if c in remembered} | {chunk: self._writes}
        if slot.evicted is not None and self.ring.slack:
            spill, rows = slot.evicted % self.ring.slack, self._rows(slot.index)
            for ring, kept in zip(self._rings, self._spills, strict=True):
                kept[spill].copy_(ring[:, :, rows])
        self._point(slot.index, slot.filled)
        return slot

    def _point(self, index: int, filled: int) -> None:
        self.length_on_host = self.sink_tokens + filled * self.chunk_tokens
        self.slot_index.fill_(index)
        self.length.fill_(self.length_on_host)

    @contextlib.contextmanager
    def rehearsal(self, filled: int) -> Generator[None]:
        """Stand as if ``filled`` slots held chunks, for a step to be compiled and captured before the first chunk.

        What the step writes meanwhile goes to slot 0 and is wiped afterwards. Raises MemoryOrderError when the memory
        holds a chunk.
        """
        if self.ring.latest >= 0:
            raise MemoryOrderError(
                f"a step cannot be warmed in the middle of a stream: this memory holds up to chunk {self.ring.latest}; "
                "warm it before the first chunk, or clear the memory"
            )
        self._point(0, filled)
        try:
            yield
        finally:
            for ring in self._rings:
                ring[:, :, self._rows(0)].zero_()
            self._point(0, 0)

    def views(self, slot: Slot) -> list[LayerMemory]:
        """The chunk's place in every layer, for a model in plain torch, which does not read eight bits."""
        assert not self.eight_bits
        rows, visible = self._rows(slot.index), self.sink_tokens + slot.filled * self.chunk_tokens
        return [
            LayerMemory(
                own_keys_BLNK=keys_BMNK[:, rows],
                own_values_BLNK=values_BMNK[:, rows],
                keys_BMNK=keys_BMNK[:, :visible],
                values_BMNK=values_BMNK[:, :visible],
            )
            for keys_BMNK, values_BMNK in zip(self.keys_ZBMNK, self.values_ZBMNK, strict=True)
        ]

    def rewind(self, chunk: int) -> None:
        """Forget ``chunk`` and all after it, bringing back what they displaced."""
        for restore in self.ring.rewind(chunk):
            rows = self._rows(restore.slot)
            for ring, kept in zip(self._rings, self._spills, strict=True):
                ring[:, :, rows].copy_(kept[restore.spill])

    def kept(self) -> Kept:
        """All that it must be told to go on from here, but for the sink; see `Kept`.

        Keys and values of a chunk are written once. A first chunk that is kept is turned in the ring later on, so it is
        to be copied before the chunk after it comes.
        """
        held, spilled = self.ring.whereabouts
        tensors: dict[str, Tensor] = {}
        for i, (ring, spill) in enumerate(zip(self._rings, self._spills, strict=True)):
            tensors |= {f"{self._written[c]}/{i}": spill[place] for place, c in spilled.items()}
            tensors |= {f"{self._written[c]}/{i}": ring[:, :, self._rows(slot)] for slot, c in held.items()}
        facts = {
            "latest": self.ring.latest,
            "held": list(held.items()),
            "spilled": list(spilled.items()),
            "written": list(self._written.items()),
            "writes": self._writes,
        }
        return Kept(facts, tensors)

    def resume(self, kept: Kept) -> None:
        """Stand where `kept` was taken. The sink is not in it: `take_sink` after its prompt and reference are known."""
        facts = kept.facts
        held, spilled = dict(facts["held"]), dict(facts["spilled"])
        self.ring.resume(facts["latest"], held, spilled)
        self._written, self._writes, self._knows_first = dict(facts["written"]), facts["writes"], False
        for i, (ring, spill) in enumerate(zip(self._rings, self._spills, strict=True)):
            for slot, chunk in held.items():
                ring[:, :, self._rows(slot)].copy_(kept.tensors[f"{self._written[chunk]}/{i}"])
            for place, chunk in spilled.items():
                spill[place].copy_(kept.tensors[f"{self._written[chunk]}/{i}"])
        filled = min(self.ring.latest + 1, self.ring.window)
        self._point(self.ring.slot_of(self.ring.latest) if filled else 0, filled)

    def clear(self) -> None:
        """Forget every chunk; the sink stays."""
        self.ring.clear()
        self._knows_first = False

    def wipe(self) -> None:
        """As if new: nothing is remembered, and nothing is left of what was."""
        self.clear()
        self._point(0, 0)
        for buffer in (*self._rings, *self._spills, self._first_keys_ZBLNK):
            buffer.zero_()

    def _rows(self, slot: int) -> slice:
        start = self.sink_tokens + slot * self.chunk_tokens
        return slice(start, start + self.chunk_tokens)
