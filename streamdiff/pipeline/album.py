"""Tensors in memory that outlives the process that wrote them: what a rank's stand-in is told.

The memory is a file without a name, which the driver of a line holds open as well. Tensors of one owner are replaced
together, and only new names are copied. Nothing that was held before a `replace` is overwritten by it; so if the
process ends before it has told anybody of the new state (`where`), the old one is whole.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from streamdiff.errors import StreamdiffError

_ALIGN_BYTES = 4096
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.float8_e4m3fn,
        torch.uint8,
        torch.int64,
    )
}


def shared_memory() -> int:
    """A file descriptor of memory without a name: gone with the last process that holds it, however that ends."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("streamdiff-album", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


@dataclass(frozen=True, slots=True)
class Cell:
    """Where a tensor lies, and how it is read."""

    offset: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * _DTYPES[self.dtype].itemsize

    @classmethod
    def read(cls, words: Mapping[str, Any]) -> Cell:
        """What `Album.where` said."""
        return cls(words["offset"], words["dtype"], tuple(words["shape"]), tuple(words["stride"]))


class Album:
    """Tensors by owner and name, in a file descriptor of `shared_memory`, which it takes over.

    Args:
        fd: of an empty file, or of one that an album of another process has written.
        held: what that one held, as its `where` said, by owner.

    Raises StreamdiffError when there is no room.
    """

    def __init__(self, fd: int, held: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._fd = fd
        self._cells: dict[str, dict[str, Cell]] = {
            owner: {name: Cell.read(words) for name, words in cells.items()} for owner, cells in (held or {}).items()
        }

    def close(self) -> None:
        """Let go of the memory. Idempotent."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
        self._fd = -1

    def replace(self, owners: Mapping[str, Mapping[str, Tensor]]) -> int:
        """Hold these tensors for these owners, and nothing else for them; bytes that were copied.

        A name that an owner has already is taken to be the same tensor, and not looked at.
        """
        copied = 0
        new = {owner: dict(self._cells.get(owner, {})) for owner in owners}
        used = sorted((cell.offset, cell.num_bytes) for cells in self._cells.values() for cell in cells.values())
        for owner, tensors in owners.items():
            for name, tensor in tensors.items():
                if name not in new[owner]:
                    cell = _cell_for(tensor, used)
                    self._write(cell, tensor)
                    new[owner][name] = cell
                    copied += cell.num_bytes
        for owner, tensors in owners.items():
            self._cells[owner] = {name: new[owner][name] for name in tensors}
        return copied

    def where(self, owner: str) -> dict[str, Any]:
        """Where the tensors of an owner lie, for JSON."""
        return {name: asdict(cell) for name, cell in self._cells.get(owner, {}).items()}

    def load(self, owner: str) -> dict[str, Tensor]:
        """Copies of the tensors of an owner, in the layout that they had."""
        return {name: self._read(cell) for name, cell in self._cells.get(owner, {}).items()}

    def _write(self, cell: Cell, tensor: Tensor) -> None:
        dense = torch.empty_strided(cell.shape, cell.stride, dtype=tensor.dtype)
        dense.copy_(tensor)
        view, done = memoryview(_bytes_of(dense, cell)), 0
        try:
            while done < len(view):
                done += os.pwrite(self._fd, view[done:], cell.offset + done)
        except OSError as error:
            raise StreamdiffError(
                f"no room for a snapshot of {len(view) / 2**20:.0f} MiB ({error.strerror}); give the machine more "
                "memory, or a line that does not heal"
            ) from error

    def _read(self, cell: Cell) -> Tensor:
        tensor = torch.empty_strided(cell.shape, cell.stride, dtype=_DTYPES[cell.dtype])
        view, done = memoryview(_bytes_of(tensor, cell)), 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done:]], cell.offset + done)
            if count == 0:
                raise StreamdiffError(f"a snapshot ends at byte {cell.offset + done}; another version wrote it")
            done += count
        return tensor


def _bytes_of(tensor: Tensor, cell: Cell) -> Any:
    """A dense tensor's memory, whatever the order of its axes."""
    flat = torch.as_strided(tensor, (prod(cell.shape),), (1,))
    return flat.view(torch.uint8).numpy() if flat.numel() else bytearray()


def _cell_for(tensor: Tensor, used: list[tuple[int, int]]) -> Cell:
    """The first gap between what is used that is wide enough; it counts as used from then on."""
    shape = tuple(tensor.shape)
    # A dense tensor keeps the order of its axes: what reads it may sum in another order for another layout.
    stride = torch.empty_like(tensor, device="meta").stride()
    num_bytes, offset, place = tensor.nbytes, 0, len(used)
    for index, (begin, length) in enumerate(used):
        if begin - offset >= num_bytes:
            place = index
            break
        offset = -(-max(offset, begin + length) // _ALIGN_BYTES) * _ALIGN_BYTES
    used.insert(place, (offset, num_bytes))
    return Cell(offset, str(tensor.dtype).removeprefix("torch."), shape, tuple(stride))
