"""Read files of tensors that a stranger made: safetensors, torch's ``.pth``, numpy's ``.npz``.

A file is data. Its size is bounded before it is read, its header before it is parsed, names, shapes and kinds before a
tensor is made, and values before anybody computes with them. Nothing in a file can name code: safetensors has no way
to, ``.pth`` is read by torch's restricted unpickler (tensors and plain containers only), ``.npz`` without pickles.

Whatever is wrong leaves as one `CheckpointError` of one line.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from streamdiff.errors import CheckpointError, InputError
from streamdiff.facts import parse_json, printable
from streamdiff.output import replacing

_HEADER_BYTES = 1 << 20
_MAX_TENSORS = 10_000
_MAX_NAME = 300
_KINDS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""Kinds of learned weights."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one tensor of a file must be."""

    shape: tuple[int | None, ...]
    """None: at least one, as many as the file has."""
    kinds: tuple[torch.dtype, ...] = FLOATS
    low: float = -math.inf
    high: float = math.inf
    """Range of the values. They are finite in any case."""
    required: bool = True


def like(weights: Mapping[str, Tensor]) -> dict[str, Wanted]:
    """Every tensor of a module's state, by name: the same shape, and any kind of real numbers, or the same integers."""
    return {
        name: Wanted(tuple(value.shape), FLOATS if value.is_floating_point() else (value.dtype,))
        for name, value in weights.items()
    }


class TensorFile:
    """A safetensors file whose header has been checked; `tensors` reads the rest.

    Args:
        path: of the file.
        what: what it should be, for errors: "an identity bundle".
        hint: what to do when it is not, for errors.
        most_bytes: size beyond which it is refused unread.

    Raises:
        CheckpointError: no regular file, too large, or no safetensors.
    """

    def __init__(self, path: str | Path, *, what: str, hint: str, most_bytes: int) -> None:
        self.path, self._what, self._hint = Path(path), what, hint
        try:
            self._data = read_bytes(self.path, most_bytes)
        except CheckpointError as error:
            self.fail(str(error))
        self.metadata: dict[str, str] = {}
        self._found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._read_header()

    def fail(self, why: str) -> NoReturn:
        """Raise the error of this file."""
        raise CheckpointError(f"{printable(self.path, 300)} cannot be read as {self._what}: {why}; {self._hint}")

    def _read_header(self) -> None:
        size = int.from_bytes(self._data[:8], "little")
        if len(self._data) < 8 or size > len(self._data) - 8:
            self.fail("it is not a safetensors file")
        if size > _HEADER_BYTES:
            self.fail(f"its header has {size} bytes, more than {_HEADER_BYTES}")
        try:
            header = parse_json(self._data[8 : 8 + size])
        except ValueError as error:
            self.fail(f"its header is no JSON ({error})")
        if not isinstance(header, dict) or len(header) > _MAX_TENSORS:
            self.fail("its header is no table of tensors")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            self.fail("its metadata are no words")
        self.metadata = metadata
        for name, entry in header.items():
            self._found[name] = self._entry(name, entry)

    def _entry(self, name: str, entry: object) -> tuple[torch.dtype, tuple[int, ...]]:
        shape = entry.get("shape") if isinstance(entry, dict) else None
        kind = entry.get("dtype") if isinstance(entry, dict) else None
        if (
            len(name) > _MAX_NAME
            or not isinstance(shape, list)
            or len(shape) > 8
            or not all(type(n) is int and 0 <= n < 1 << 40 for n in shape)
            or not isinstance(kind, str)
            or kind not in _KINDS
        ):
            self.fail(f"its header says nothing sensible of tensor {printable(name)!r}")
        return _KINDS[kind], tuple(shape)

    @property
    def names(self) -> list[str]:
        """Of all tensors in the file."""
        return list(self._found)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Of one tensor, as the header says; empty when it is not there."""
        return self._found[name][1] if name in self._found else ()

    def tensors(self, wanted: Mapping[str, Wanted]) -> dict[str, Tensor]:
        """All tensors, which are exactly those wanted; values are not looked at yet (`check_values`)."""
        wrong = [f"{name} is missing" for name, want in wanted.items() if want.required and name not in self._found]
        wrong += [f"{printable(name)} is not known" for name in self._found if name not in wanted]
        for name, (kind, shape) in self._found.items():
            if name in wanted and (why := _misfit(wanted[name], kind, shape)):
                wrong.append(f"{name} {why}")
        if wrong:
            self.fail(listed(wrong))
        from safetensors.torch import load

        try:
            return load(self._data)
        except Exception as error:  # noqa: BLE001  a stranger's bytes may fail anywhere inside the reader
            self.fail(_short(error))

    def check_values(self, tensors: Mapping[str, Tensor], wanted: Mapping[str, Wanted]) -> None:
        """Refuse numbers that are not finite or out of range."""
        for name, value in tensors.items():
            if why := _bad_values(value, wanted[name].low, wanted[name].high):
                self.fail(f"{name} holds {why}")


def _misfit(want: Wanted, kind: torch.dtype, shape: tuple[int, ...]) -> str:
    if kind not in want.kinds:
        return f"holds {_kind(kind)}, not {' or '.join(map(_kind, want.kinds))}"
    fits = len(shape) == len(want.shape) and all(
        n == w if w is not None else n > 0 for n, w in zip(shape, want.shape, strict=True)
    )
    return "" if fits else f"has shape {list(shape)}, not {[w if w is not None else 'any' for w in want.shape]}"


def _kind(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def _bad_values(value: Tensor, low: float, high: float) -> str:
    if not value.is_floating_point() or not value.numel():
        return ""
    least, most = (float(v) for v in value.aminmax())
    # A NaN anywhere makes both NaN.
    if not (math.isfinite(least) and math.isfinite(most)):
        return "values that are not finite"
    return f"values of {least:g}..{most:g} outside {low:g}..{high:g}" if least < low or most > high else ""


def listed(wrong: Sequence[str], most: int = 6) -> str:
    """The first few complaints and how many there are."""
    rest = f" and {len(wrong) - most} more" if len(wrong) > most else ""
    return "; ".join(wrong[:most]) + rest


def read_bytes(path: Path, most_bytes: int) -> bytes:
    """A regular file of bounded size; `CheckpointError` says why not, without naming the file."""
    if not path.is_file():
        raise CheckpointError("it is no regular file" if path.exists() else "there is no such file")
    try:
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
    except OSError as error:
        raise CheckpointError(error.strerror or str(error)) from error
    if len(data) > most_bytes:
        raise CheckpointError(f"it is larger than {most_bytes} bytes")
    return data


def load_pickled(path: str | Path, *, what: str, hint: str, most_bytes: int) -> dict[str, Any]:
    """What ``torch.save`` wrote: a dictionary whose leaves are tensors or plain values; no code of it is run.

    Raises:
        CheckpointError: no such file, too large, compressed, or anything but tensors and plain containers.
    """
    path = Path(path)

    def fail(why: str) -> NoReturn:
        raise CheckpointError(f"{printable(path, 300)} cannot be read as {what}: {why}; {hint}")

    try:
        data = read_bytes(path, most_bytes)
    except CheckpointError as error:
        fail(str(error))
    if data[:2] == b"PK" and (why := _swollen(data, most_bytes)):
        fail(why)
    try:
        loaded = torch.load(BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  a stranger's bytes may fail anywhere inside the reader
        fail(f"torch refuses it, {_short(error)}")
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        fail("it holds no tensors by name")
    return loaded


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {printable(str(error).partition(chr(10))[0], 200)}"


def _swollen(data: bytes, most_bytes: int) -> str:
    """Why a zip would unpack to more than it is, or nothing."""
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        return printable(error)
    if len(entries) > _MAX_TENSORS or sum(entry.file_size for entry in entries) > most_bytes:
        return f"it unpacks to more than {most_bytes} bytes"
    return ""


def map_pickled(path: Path) -> dict[str, Tensor]:
    """Tensors by name of a ``.pth`` of any size, mapped into memory and not read; no code of it is run.

    Raises:
        CheckpointError: no regular file, or anything but floating-point tensors by name; without naming the file.
    """
    if not path.is_file():
        raise CheckpointError("it is no regular file" if path.exists() else "there is no such file")
    try:
        loaded: object = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        # A stranger's bytes may fail anywhere inside the reader.
        raise CheckpointError(f"torch refuses it, {_short(error)}") from error
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise CheckpointError("it holds no tensors by name")
    wrong = [f"{printable(name)} {why}" for name, value in loaded.items() if (why := plain_fault(value))]
    if wrong:
        raise CheckpointError(listed(wrong))
    return loaded


_INFINITE = {
    torch.float64: (np.int64, np.uint64, 0x7FF0 << 48, 0xFFF0 << 48),
    torch.float32: (np.int32, np.uint32, 0x7F80 << 16, 0xFF80 << 16),
    torch.float16: (np.int16, np.uint16, 0x7C00, 0xFC00),
    torch.bfloat16: (np.int16, np.uint16, 0x7F80, 0xFF80),
}
"""Integers of the same width, and the bits of plus and minus infinity: whatever lies beyond either is no number."""
_BLOCK_BYTES = 1 << 20
"""What stays in a processor's cache from being looked at until it is copied."""


def is_finite(tensor: Tensor) -> bool:
    """Whether a floating-point tensor holds finite numbers only; one on no device holds none."""
    if tensor.is_meta:
        return True
    if not _has_plain_bits(tensor):
        return bool(torch.isfinite(tensor).all())
    flat = tensor.detach().flatten()
    return all(_block_is_finite(part) for part in flat.split(_BLOCK_BYTES // flat.element_size()))


def _has_plain_bits(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.dtype in _INFINITE


def _block_is_finite(flat: Tensor) -> bool:
    """By the bits, many times as fast as `torch.isfinite`."""
    signed, unsigned, plus, minus = _INFINITE[flat.dtype]
    bits = flat.view(getattr(torch, signed.__name__)).numpy()
    # Of numbers below two, as weights are nearly all, none has the first bit of the exponent: one look at all at once.
    if not int(np.bitwise_or.reduce(bits.view(unsigned))) >> 8 * bits.itemsize - 2 & 1:
        return True
    # The largest integer of the bits, once with a sign and once without.
    return bool(bits.max() < plus and bits.view(unsigned).max() < minus)


def _copy_block(target: Tensor, source: Tensor) -> bool:
    """Whether what has arrived is finite; what is converted may have become too large on the way."""
    if target.dtype != source.dtype:
        return _block_is_finite(target.copy_(source))
    found = _block_is_finite(source)
    target.copy_(source)
    return found


class FiniteCheck:
    """Looks at weights while they are copied to where they stay; use as a context manager.

    On a CPU each block is looked at just before it is copied, and the copy finds it in the processor's cache.
    Afterwards is too late, what a copy writes goes past the cache: 1.09 of the CPU time of copying alone, against 1.04.
    What goes elsewhere is looked at by a thread, while the next ones are loaded.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="finite")
        self._looks: list[tuple[str, Future[bool]]] = []
        self._broken: list[str] = []

    def copy(self, name: str, target: Tensor, source: Tensor) -> None:
        """``target.copy_(source)``, and remember whether what has arrived is finite."""
        if not target.is_floating_point():
            target.copy_(source)
        elif _has_plain_bits(target) and source.device.type == "cpu" and source.is_contiguous():
            size = _BLOCK_BYTES // source.element_size()
            parts = zip(target.view(-1).split(size), source.view(-1).split(size), strict=True)
            are_finite = [_copy_block(to, part) for to, part in parts]
            self._broken += [] if all(are_finite) else [name]
        else:
            self._looks.append((name, self._pool.submit(is_finite, target.copy_(source))))

    def broken(self) -> list[str]:
        """Names of the tensors that hold NaN or infinity; waits for the last look."""
        return self._broken + [name for name, look in self._looks if not look.result()]

    def __enter__(self) -> FiniteCheck:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def plain_fault(value: object) -> str:
    """Why a leaf that `load_pickled` read is no tensor to compute with, or nothing."""
    if type(value) not in (Tensor, torch.nn.Parameter):
        return "is no tensor"
    assert isinstance(value, Tensor)
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        return "is no plain tensor"
    return ""


def misfits(found: Mapping[str, Any], wanted: Mapping[str, Wanted]) -> list[str]:
    """What is wrong with tensors that were read by `load_pickled`; an empty list: nothing."""
    wrong = [f"{name} is missing" for name, want in wanted.items() if want.required and name not in found]
    wrong += [f"{printable(name)} is not known" for name in found if name not in wanted]
    for name, value in found.items():
        if name not in wanted:
            continue
        if (why := plain_fault(value)) or (why := _misfit(wanted[name], value.dtype, tuple(value.shape))):
            wrong.append(f"{name} {why}")
        elif why := _bad_values(value, wanted[name].low, wanted[name].high):
            wrong.append(f"{name} holds {why}")
    return wrong


def read_npz(
    path: str | Path, *, most_bytes: int, most_arrays: int = 1000, prefix: str = ""
) -> dict[str, NDArray[Any]]:
    """Arrays of an ``.npz`` whose names begin so; `CheckpointError` says why not, without naming the file."""
    data = read_bytes(Path(path), most_bytes)
    if why := _swollen(data, most_bytes):
        raise CheckpointError(why)
    try:
        with np.load(BytesIO(data), allow_pickle=False) as arrays:
            if len(arrays.files) > most_arrays:
                raise CheckpointError(f"it holds {len(arrays.files)} arrays, more than {most_arrays}")
            found = {name: arrays[name] for name in arrays.files if name.startswith(prefix)}
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"numpy refuses it, {_short(error)}") from error
    if strange := [name for name, array in found.items() if not isinstance(array, np.ndarray)]:
        raise CheckpointError(f"{printable(strange[0])} is no array")
    return found


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file, whole or not at all. The tensors may be anywhere but share no memory.

    Raises InputError when the place does not take it.
    """
    found = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(path) as part:
            save_file(found, part, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:
        raise InputError(f"cannot write {path}: {error}; make room or choose another place") from error
    return Path(path)
