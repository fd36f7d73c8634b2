"""Change a file as somebody would who knows its format: parts dropped, doubled, moved, their fields and texts changed.

Every change is drawn from a `random.Random`, so that a seed gives the same file again.
"""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tests.hostile.formats import FORMATS, Part, replaced

_BAD_FORMAT = (ValueError, struct.error, IndexError, KeyError, TypeError, RecursionError)
_NUMBERS = (0, 1, 2, 3, 7, 8, 255, 256, 4096, 65_535, 2**31 - 1, 2**31, 2**32 - 1, 2**53 + 1, 2**63, -1, -8, 1e308)
_TEXTS = ("", "x", "x" * 5000, "\x1b[31mred", "a\nb", "\0", "../../x", "\u202e", "nan", "1e999", "\ud800", "-0")
_FLOATS = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e30, -1e30, 65_504.0, 1e-40)
_WIDTHS = {1: "B", 2: "H", 4: "I", 8: "Q"}


def mutated(data: bytes, kind: str, draw: random.Random, others: Sequence[bytes] = ()) -> bytes:
    """``data``, a file of one of `FORMATS` (another name: bytes without structure), with one to four changes."""
    found = data
    for _ in range(draw.choice((1, 1, 1, 2, 2, 4))):
        if kind in FORMATS and draw.random() < 0.8:
            found = _restructured(found, kind, draw, others)
        else:
            found = changed_bytes(found, draw)
    return found


def _restructured(data: bytes, kind: str, draw: random.Random, others: Sequence[bytes]) -> bytes:
    format_ = FORMATS[kind]
    try:
        parts = tuple(format_.split(data))
        strange = tuple(format_.split(draw.choice(others))) if others and draw.random() < 0.1 else ()
        if not parts:
            return changed_bytes(data, draw)
        if strange:
            parts = _spliced(parts, strange, draw)
        else:
            at = draw.randrange(sum(part.leaves() for part in parts))
            parts = replaced(parts, at, lambda part: _changed_part(part, draw))
        return format_.join(parts)
    except _BAD_FORMAT:
        return changed_bytes(data, draw)  # an earlier change has broken the format


def _spliced(parts: tuple[Part, ...], others: tuple[Part, ...], draw: random.Random) -> tuple[Part, ...]:
    """A part of another file put between, or the rest of another file."""
    at, of = draw.randrange(len(parts) + 1), draw.randrange(len(others))
    return (*parts[:at], others[of], *parts[at:]) if draw.random() < 0.5 else (*parts[:at], *others[of:])


def _changed_part(part: Part, draw: random.Random) -> Sequence[Part]:
    way = draw.randrange(10)
    if way == 0:
        return ()
    if way == 1:
        return (part,) * draw.choice((2, 2, 3, 200))
    if way == 2:
        return tuple(draw.sample(part.inner, len(part.inner))) or (replace(part, body=b""),)
    if way == 3 and part.name:
        return (replace(part, name=_changed_field(part.name, draw)),)
    return (replace(part, body=_changed_field(part.body, draw)),)


def _changed_field(data: bytes, draw: random.Random) -> bytes:
    """As JSON where it is, as compressed data where it is, else as bytes."""
    if data[:1] in (b"{", b"["):
        try:
            return json.dumps(changed_json(json.loads(data), draw)).encode()
        except (ValueError, RecursionError):
            return changed_bytes(data, draw)
    if data[:1] == b"\x78" and draw.random() < 0.7:
        try:
            return zlib.compress(changed_bytes(zlib.decompress(data), draw))
        except zlib.error:
            return changed_bytes(data, draw)
    return changed_bytes(data, draw)


def changed_json(value: Any, draw: random.Random) -> Any:
    """A JSON value with one place of it changed, dropped, added or replaced by something of another kind."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        name = draw.choice(sorted(value))
        way = draw.randrange(8)
        if way == 0:
            return {key: item for key, item in value.items() if key != name}
        if way == 1:
            return {**value, draw.choice((*_TEXTS, name + "x")): value[name]}
        return {**value, name: changed_json(value[name], draw)}
    if isinstance(value, list) and value and draw.random() < 0.85:
        at, way = draw.randrange(len(value)), draw.randrange(6)
        if way == 0:
            return value[:at] + value[at + 1 :]
        if way == 1:
            return value[:at] + [value[at]] * draw.choice((2, 50, 3000)) + value[at:]
        return [*value[:at], changed_json(value[at], draw), *value[at + 1 :]]
    if isinstance(value, str) and value[:1] in ("{", "[") and draw.random() < 0.9:
        try:
            return json.dumps(changed_json(json.loads(value), draw))
        except (ValueError, RecursionError):
            return value[: draw.randrange(len(value))]
    if isinstance(value, str) and draw.random() < 0.4:
        return changed_bytes(value.encode("utf-8", "replace"), draw).decode("utf-8", "replace")
    if isinstance(value, int | float) and not isinstance(value, bool) and draw.random() < 0.5:
        return draw.choice((value + 1, value - 1, -value, value * 2, value * 1000, value / 3))
    return draw.choice((*_NUMBERS, *_TEXTS, *_FLOATS, None, True, [], {}, [[]], {"a": 1}, _nested(draw)))


def _nested(draw: random.Random) -> Any:
    value: Any = 0
    for _ in range(draw.choice((3, 30, 300))):
        value = [value] if draw.random() < 0.5 else {"a": value}
    return value


def changed_bytes(data: bytes, draw: random.Random) -> bytes:
    """A number written over, a number of another kind, bits turned, a stretch cut, doubled, moved or filled."""
    if not data:
        return draw.choice((b"", b"\0", b"\xff" * 8, draw.randbytes(20)))
    found, at = bytearray(data), _place(len(data), draw)
    way = draw.randrange(9)
    if way <= 2:
        width = draw.choice((1, 1, 2, 2, 4, 4, 8))
        number = draw.choice(_NUMBERS) if draw.random() < 0.7 else draw.getrandbits(64)
        packed = struct.pack(draw.choice("<>") + _WIDTHS[width], int(min(number, 2**64)) & ((1 << 8 * width) - 1))
        found[at : at + width] = packed
    elif way == 3:
        found[at : at + 4] = struct.pack(draw.choice(("<f", ">f")), min(draw.choice(_FLOATS), 3e38))
    elif way == 4:
        for _ in range(draw.randint(1, 8)):
            found[_place(len(data), draw)] ^= 1 << draw.randrange(8)
    elif way == 5:
        del found[at : at + draw.choice((1, 2, 4, 16, len(found)))]
    elif way == 6:
        count = draw.randint(1, 64)
        found[at:at] = found[at : at + count] * draw.choice((1, 1, 2, 100))
    elif way == 7:
        count, to = draw.randint(1, 200), _place(len(data), draw)
        found[to : to + count] = found[at : at + count]
    else:
        count = draw.choice((1, 3, 16, 200))
        found[at : at + count] = draw.choice((b"\0", b"\xff", draw.randbytes(1))) * min(count, len(found) - at)
    return bytes(found)


def _place(size: int, draw: random.Random) -> int:
    """Half of the places are in the head, where sizes and offsets stand."""
    return draw.randrange(min(64, size)) if draw.random() < 0.5 else draw.randrange(size)
