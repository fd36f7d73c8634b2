"""Packets as bytes: a fixed header, an explicit manifest, and the raw memory of the tensors.

    header    64 B      magic, what follows and how long it is, sequence number, epoch, chunk
    manifest  JSON      fields and commands of the packet; a tensor is its dtype, shape, place and offset
    payload   raw       all tensors of one place one after the other, each aligned

Nothing is pickled: a receiver builds only the types named in `packet`, and refuses what it does not know.
A tensor arrives bit for bit, NaN payloads included.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from math import prod
from typing import Any, get_args

import torch
from torch import Tensor

from streamdiff.errors import RankFailed
from streamdiff.pipeline.packet import Command, Packet

HEADER = struct.Struct("<4sHHqqqQQQ8x")
MAGIC = b"SDPK"
VERSION = 1
ALIGN_BYTES = 64
"""Offset of every tensor in its payload, so that a view of any dtype is aligned."""

_DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.bool,
        torch.complex64,
    )
}
_COMMANDS: dict[str, type[Command]] = {command.__name__: command for command in get_args(Command)}
_PLACES: tuple[str, ...] = ("cpu", "cuda")


class Kind(IntEnum):
    PACKET = 0
    END = 1
    """The stream has ended; nothing follows."""
    HELLO = 2
    """First message on an edge, to open the connection before the stream starts."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a receiver must know before the rest arrives."""

    kind: Kind
    seq: int
    """Counts the messages of an edge from 0."""
    epoch: int = 0
    chunk: int = 0
    manifest_bytes: int = 0
    cpu_bytes: int = 0
    cuda_bytes: int = 0

    def pack(self) -> bytes:
        return HEADER.pack(
            MAGIC,
            VERSION,
            self.kind,
            self.seq,
            self.epoch,
            self.chunk,
            self.manifest_bytes,
            self.cpu_bytes,
            self.cuda_bytes,
        )

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """Raises RankFailed when the bytes are no header of this version."""
        magic, version, kind, *numbers = HEADER.unpack(data)
        if magic != MAGIC or version != VERSION:
            raise RankFailed(
                f"the sender speaks {magic!r} version {version}, this rank {MAGIC!r} version {VERSION}; "
                f"run the same streamdiff on every rank"
            )
        return cls(Kind(kind), *numbers)


@dataclass(frozen=True, slots=True)
class Message:
    """A packet taken apart: its description, and its tensors by place, in the order of their offsets."""

    manifest: bytes
    tensors: Mapping[str, Sequence[Tensor]]
    offsets: Mapping[str, Sequence[int]]
    num_bytes: Mapping[str, int]


def take_apart(packet: Packet) -> Message:
    """Describe a packet; its tensors are neither copied nor moved."""
    tensors: dict[str, list[Tensor]] = {place: [] for place in _PLACES}
    offsets: dict[str, list[int]] = {place: [] for place in _PLACES}
    num_bytes: dict[str, int] = dict.fromkeys(_PLACES, 0)

    def describe(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        place = value.device.type
        if place not in _PLACES:
            raise ValueError(f"a packet holds tensors in {' or '.join(_PLACES)} memory, got one in {place}")
        offset = num_bytes[place]
        tensors[place].append(value.detach())
        offsets[place].append(offset)
        num_bytes[place] = -(-(offset + value.nbytes) // ALIGN_BYTES) * ALIGN_BYTES
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise ValueError(f"no packet carries {dtype} tensors; use one of {', '.join(_DTYPES)}")
        return {"dtype": dtype, "shape": list(value.shape), "place": place, "offset": offset}

    def describe_fields(thing: Packet | Command) -> dict[str, object]:
        return {f.name: describe(getattr(thing, f.name)) for f in fields(thing) if f.name != "commands"}

    manifest = {
        "packet": describe_fields(packet),
        "commands": [[type(command).__name__, describe_fields(command)] for command in packet.commands],
    }
    return Message(json.dumps(manifest, separators=(",", ":")).encode(), tensors, offsets, num_bytes)


def fill_payload(payload_S: Tensor, message: Message, place: str) -> None:
    """Copy the tensors of one place into a byte buffer of ``message.num_bytes[place]``."""
    for tensor, offset in zip(message.tensors[place], message.offsets[place], strict=True):
        if tensor.numel():
            # A tensor's bytes cannot be viewed through a stride or at zero dimensions, hence both steps.
            flat = tensor.contiguous().reshape(-1).view(torch.uint8)
            payload_S[offset : offset + tensor.nbytes].copy_(flat)


def put_together(manifest: bytes, payloads: Mapping[str, Tensor]) -> Packet:
    """Build the packet; its tensors are views into ``payloads``, byte buffers by place.

    Raises RankFailed for a manifest with a command or a field that this version does not know.
    """

    def restore(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        dtype, shape, offset = _DTYPES[value["dtype"]], value["shape"], value["offset"]
        num_bytes = prod(shape) * dtype.itemsize
        return payloads[value["place"]][offset : offset + num_bytes].view(dtype).view(shape)

    def restore_fields(described: dict[str, Any]) -> dict[str, Any]:
        return {name: restore(value) for name, value in described.items()}

    content = json.loads(manifest)
    try:
        commands = tuple(_COMMANDS[name](**restore_fields(described)) for name, described in content["commands"])
        return Packet(**restore_fields(content["packet"]), commands=commands)
    except (KeyError, TypeError) as error:
        raise RankFailed(f"cannot read a packet ({error}); run the same streamdiff on every rank") from error


def tensors_of(packet: Packet) -> list[Tensor]:
    """Every tensor that a packet and its commands hold."""
    things: tuple[Packet | Command, ...] = (packet, *packet.commands)
    values = (getattr(thing, field.name) for thing in things for field in fields(thing))
    return [value for value in values if isinstance(value, Tensor)]
