"""Files in pieces: each format taken apart into named parts and put together again, lengths and checksums made right.

What is changed in a part therefore reaches the code behind the checks of its container.
"""

from __future__ import annotations

import io
import json
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of a file: a chunk, a box, a page, an entry."""

    name: bytes
    body: bytes
    inner: tuple[Part, ...] = ()
    """Parts within it, which follow ``body``."""

    def leaves(self) -> int:
        """Parts in all, this one among them."""
        return 1 + sum(part.leaves() for part in self.inner)


@dataclass(frozen=True, slots=True)
class Format:
    """How files of one kind are taken apart and put together."""

    split: Callable[[bytes], list[Part]]
    """Raises ValueError, struct.error or IndexError for another kind of file."""
    join: Callable[[Sequence[Part]], bytes]


def _png_split(data: bytes) -> list[Part]:
    _must(data.startswith(b"\x89PNG\r\n\x1a\n"))
    return [Part(name, body) for name, body in _chunks(data, 8, ">I", length_first=True, after=4)]


def _png_join(parts: Sequence[Part]) -> bytes:
    chunks = [struct.pack(">I", len(p.body)) + p.name + p.body + struct.pack(">I", _crc(p)) for p in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _crc(part: Part) -> int:
    return zlib.crc32(part.name + part.body)


def _must(holds: bool) -> None:
    if not holds:
        raise ValueError("another kind of file")


def _chunks(
    data: bytes, at: int, size: str, *, length_first: bool = False, after: int = 0, even: bool = False
) -> Iterator[tuple[bytes, bytes]]:
    """Names of four bytes, lengths, bodies."""
    width = struct.calcsize(size)
    while at + 4 + width <= len(data):
        name_at, length_at = (at + width, at) if length_first else (at, at + 4)
        name, length = data[name_at : name_at + 4], struct.unpack_from(size, data, length_at)[0]
        start = at + 4 + width
        yield name, data[start : start + length]
        at = start + length + after + (length % 2 if even else 0)


def _iff(length: str, lists: tuple[bytes, ...]) -> Format:
    """RIFF and IFF: lists hold a name and parts."""

    def parts(data: bytes) -> list[Part]:
        found: list[Part] = []
        for name, body in _chunks(data, 0, length, even=True):
            inner = tuple(parts(body[4:])) if name in lists else ()
            found.append(Part(name, body[:4], inner) if inner else Part(name, body))
        return found

    def split(data: bytes) -> list[Part]:
        _must(data[:4] in lists)
        return parts(data)

    def join(found: Sequence[Part]) -> bytes:
        out = b""
        for part in found:
            body = part.body + join(part.inner)
            out += part.name + struct.pack(length, len(body) & 0xFFFFFFFF) + body + b"\0" * (len(body) % 2)
        return out

    return Format(split, join)


_BOXES = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf", b"mvex", b"edts", b"dinf", b"udta")


def _boxes_split(data: bytes) -> list[Part]:
    found: list[Part] = []
    for name, body in _boxes(data):
        found.append(Part(name, b"", tuple(_boxes_split(body))) if name in _BOXES else Part(name, body))
    return found


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at + 8 <= len(data):
        size = struct.unpack_from(">I", data, at)[0]
        _must(size >= 8)
        yield data[at + 4 : at + 8], data[at + 8 : at + size]
        at += size


def _boxes_join(parts: Sequence[Part]) -> bytes:
    bodies = [(part.name, part.body + _boxes_join(part.inner)) for part in parts]
    return b"".join(struct.pack(">I", 8 + len(body)) + name + body for name, body in bodies)


_MASTERS = (
    *(b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75", b"\x16\x54\xae\x6b", b"\x15\x49\xa9\x66"),
    *(b"\x1c\x53\xbb\x6b", b"\xae", b"\xe1", b"\xe0", b"\xa0", b"\xbb", b"\xb7"),
)


def _ebml_split(data: bytes) -> list[Part]:
    """Matroska and WebM: elements with lengths of one to eight bytes."""
    found, at = list[Part](), 0
    while at < len(data):
        width = 9 - data[at].bit_length()
        name, at = data[at : at + width], at + width
        width = 9 - data[at].bit_length()
        _must(1 <= width <= 8)
        size = int.from_bytes(data[at : at + width], "big") & ((1 << 7 * width) - 1)
        body, at = data[at + width : at + width + size], at + width + size
        found.append(Part(name, b"", tuple(_ebml_split(body))) if name in _MASTERS else Part(name, body))
    return found


def _ebml_join(parts: Sequence[Part]) -> bytes:
    out = b""
    for part in parts:
        body = part.body + _ebml_join(part.inner)
        out += part.name + (len(body) | 1 << 56).to_bytes(8, "big") + body
    return out


def _ogg_table() -> list[int]:
    table: list[int] = []
    for byte in range(256):
        crc = byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x04C11DB7 if crc & 0x80000000 else 0)) & 0xFFFFFFFF
        table.append(crc)
    return table


_OGG_TABLE = _ogg_table()


def _ogg_split(data: bytes) -> list[Part]:
    """Pages: 22 bytes of head and the table of segments are the name, the checksum is left out."""
    found, at = list[Part](), 0
    while at + 27 <= len(data):
        _must(data[at : at + 4] == b"OggS")
        segments = data[at + 26 : at + 27 + data[at + 26]]
        start = at + 26 + len(segments)
        end = start + sum(segments[1:])
        found.append(Part(data[at : at + 22] + segments, data[start:end]))
        at = end
    return found


def _ogg_join(parts: Sequence[Part]) -> bytes:
    out = b""
    for part in parts:
        head, segments = part.name[:22], part.name[22:]
        crc = 0
        for byte in head + bytes(4) + segments + part.body:
            crc = (crc << 8 & 0xFFFFFFFF) ^ _OGG_TABLE[crc >> 24 ^ byte]
        out += head + struct.pack("<I", crc) + segments + part.body
    return out


def _jpeg_split(data: bytes) -> list[Part]:
    """Segments, and the coded picture with all that follows as the last."""
    _must(data.startswith(b"\xff\xd8"))
    found, at = list[Part](), 2
    while data[at + 1] != 0xDA:
        size = struct.unpack_from(">H", data, at + 2)[0]
        _must(data[at] == 0xFF and size >= 2)
        found.append(Part(data[at : at + 2], data[at + 4 : at + 2 + size]))
        at += 2 + size
    return [*found, Part(b"", data[at:])]


def _jpeg_join(parts: Sequence[Part]) -> bytes:
    return b"\xff\xd8" + b"".join(
        p.name + (struct.pack(">H", 2 + len(p.body) & 0xFFFF) if p.name else b"") + p.body for p in parts
    )


def _flac_split(data: bytes) -> list[Part]:
    _must(data.startswith(b"fLaC"))
    found, at, is_last = list[Part](), 4, False
    while not is_last:
        is_last, size = bool(data[at] & 0x80), int.from_bytes(data[at + 1 : at + 4], "big")
        found.append(Part(data[at : at + 1], data[at + 4 : at + 4 + size]))
        at += 4 + size
    return [*found, Part(b"", data[at:])]


def _flac_join(parts: Sequence[Part]) -> bytes:
    return b"fLaC" + b"".join(p.name + (len(p.body).to_bytes(3, "big") if p.name else b"") + p.body for p in parts)


def _tiff_split(data: bytes) -> list[Part]:
    """The entries of the first directory, of twelve bytes; the rest of the file comes first."""
    _must(data.startswith(b"II*\0"))
    at = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, at)[0]
    ends = at + 2 + 12 * count
    entries = [Part(data[p : p + 2], data[p + 2 : p + 12]) for p in range(at + 2, ends, 12)]
    return [Part(b"", data[:at]), *entries, Part(b"", data[ends:])]


def _tiff_join(parts: Sequence[Part]) -> bytes:
    before, entries = parts[0], [part for part in parts[1:] if part.name]
    rest = b"".join(part.body for part in parts[1:] if not part.name)
    return before.body + struct.pack("<H", len(entries)) + b"".join(p.name + p.body for p in entries) + rest


def _zip_split(data: bytes) -> list[Part]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return [Part(info.filename.encode(), archive.read(info)) for info in archive.infolist()]
    except zipfile.BadZipFile as error:
        raise ValueError(str(error)) from error


def _zip_join(parts: Sequence[Part]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive, warnings.catch_warnings(action="ignore"):  # two entries of one name
        for part in parts:
            archive.writestr(zipfile.ZipInfo(part.name.decode("utf-8", "replace")[:60_000] or "x"), part.body)
    return out.getvalue()


def _tensors_split(data: bytes) -> list[Part]:
    """Safetensors: the metadata, then every tensor with its kind and shape."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    metadata = header.pop("__metadata__", None)
    parts = [Part(b"", json.dumps(metadata).encode())]
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        about = json.dumps({"name": name, "dtype": entry["dtype"], "shape": entry["shape"]})
        parts.append(Part(about.encode(), data[8 + size + first : 8 + size + last]))
    return parts


def _tensors_join(parts: Sequence[Part]) -> bytes:
    header, body = dict[str, Any](), b""
    for part in parts:
        if not part.name:
            header["__metadata__"] = _loaded(part.body)
            continue
        about = _loaded(part.name)
        about = about if isinstance(about, dict) else {"name": str(about)}
        name = str(about.pop("name", "nameless"))
        header[name] = {**about, "data_offsets": [len(body), len(body) + len(part.body)]}
        body += part.body
    text = json.dumps({name: value for name, value in header.items() if value is not None}).encode()
    return struct.pack("<Q", len(text)) + text + body


def _loaded(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return repr(text)


def _lines_split(data: bytes) -> list[Part]:
    return [Part(b"", line) for line in data.splitlines(keepends=True)]


def _lines_join(parts: Sequence[Part]) -> bytes:
    return b"".join(part.body for part in parts)


FORMATS: dict[str, Format] = {
    "png": Format(_png_split, _png_join),
    "riff": _iff("<I", (b"RIFF", b"LIST")),
    "iff": _iff(">I", (b"FORM", b"LIST")),
    "boxes": Format(_boxes_split, _boxes_join),
    "ebml": Format(_ebml_split, _ebml_join),
    "ogg": Format(_ogg_split, _ogg_join),
    "jpeg": Format(_jpeg_split, _jpeg_join),
    "flac": Format(_flac_split, _flac_join),
    "tiff": Format(_tiff_split, _tiff_join),
    "zip": Format(_zip_split, _zip_join),
    "tensors": Format(_tensors_split, _tensors_join),
    "lines": Format(_lines_split, _lines_join),
}


def replaced(parts: Sequence[Part], at: int, change: Callable[[Part], Sequence[Part]]) -> tuple[Part, ...]:
    """The parts, but number ``at`` among all of them, inner ones counted, becomes what ``change`` makes of it."""
    found: list[Part] = []
    for part in parts:
        if at == 0:
            found += change(part)
        elif 0 < at < part.leaves():
            found.append(replace(part, inner=replaced(part.inner, at - 1, change)))
        else:
            found.append(part)
        at -= part.leaves()
    return tuple(found)
