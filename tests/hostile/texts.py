"""Hostile texts: endless words, numbers and punctuation, other scripts, and what is no text at all."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

from tests.hostile.case import Case, Wants

_WORDS = (
    *("a", "ab ", "7", "7 ", "M", "MDCLXVI", "MMMDCCCLXXXVIII ", "1,000,", "12/31/1999 ", "$1,234.5 ", "12:34 ", "a-"),
    *("a'", "a.", "well-known-", "1.", "1st ", "ABCDEFGH", "QXZ ", "a.b/", "a@b.", "aB", "bcdfg", "nationalization"),
    *("1e9 ", "\u00bd", "\u0663", "\uff11", "a1", "ed", "Dr. ", "e.g. ", "x\u0301", "\u202ea ", "word ", "?! ", "a..."),
    *("I ", "I'm ", "%$#", "<b>", "\\n", "{}", "0x", "1/2 ", "+1 ", "No. 5 ", "&amp;", "supercalifragilistic"),
)
"""Each is repeated to many thousands of characters."""


def texts() -> Mapping[str, str]:
    """By name; 20,000 characters, or 100,000."""
    found = {f"{word!r} again and again": word * (20_000 // len(word)) for word in _WORDS}
    found |= {"100 KB of one letter": "a" * 100_000, "20 MB on one line": "word " * 4_000_000}
    draw = random.Random(17)
    for number in range(40):
        found[f"drawn {number}"] = "".join(_drawn(draw) for _ in range(3000))
    return found


def _drawn(draw: random.Random) -> str:
    kind = draw.randrange(5)
    if kind == 0:
        return chr(draw.randrange(0xA0, 0x3000))
    if kind == 1:
        return draw.choice(" .,;:!?'\"-/\\()[]$%&@#\n\t\0")
    return chr(draw.randrange(32, 127)) if kind < 4 else str(draw.randrange(10**6))


def cases() -> Iterator[Case]:
    """What is no words, by the command itself; words would make a film as long as it takes to say them."""
    argv = ("talk", "-", "--out", "out.mp4", "--no-sheet")
    wordless: Mapping[str, bytes] = {
        "empty": b"",
        "20 MB of brackets": b"(" * 20_000_000,
        "20 MB of line ends": b"\n" * 20_000_000,
        "20 MB of spaces": b" " * 20_000_000,
        "zeros": bytes(100_000),
        "an escape": b"\x1b[2J\x1b]0;x\x07" * 2,  # it has letters and digits, and they are said
        "emoji": "\U0001f600".encode() * 50_000,
        "ideograms": "\u6f22\u5b57".encode() * 50_000,
        "no UTF-8": b"\xff\xfe\xc3\x28" * 10_000,
        "half a character": b"\xf0\x9f\x98",
        "surrogates": b"\xed\xa0\x80" * 1000,
    }
    for name, data in wordless.items():
        wants = Wants.EITHER if name in ("an escape", "no UTF-8") else Wants.REFUSED
        yield Case(f"text: {name}, on standard input", argv, {"said": data}, wants, stdin="said", most_s=8000.0)
    for text in ("", " ", "...", "\u6f22", "\U0001f600", "\x01", "\u202e", "-- --", "()" * 9000):
        command = ("talk", "--out", "out.mp4", "--no-sheet", "--", text)
        yield Case(f"text: {text[:8]!r}", command, wants=Wants.REFUSED)
    yield Case(
        "text: a broken surrogate", ("talk", "--out", "out.mp4", "--no-sheet", "Yes \udcff."), wants=Wants.EITHER
    )
