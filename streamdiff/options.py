"""Types of command-line options: numbers of a kind and a range, checked where an option is declared, once.

    add("--steps", type=Whole(1, 50), help=...)
    add("--seconds", type=Number(0, DAY_S, above=True), help=...)

Digits are those of ASCII: ``int`` reads others too, and underscores. A number that is none, not finite or out of range
leaves as an `argparse.ArgumentTypeError`, which names the option; `Parser` makes one line of it.
"""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from streamdiff.errors import ConfigError
from streamdiff.facts import printable

_WHOLE = re.compile(r"[+-]?\d{1,20}", flags=re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d{1,40}\.?\d{0,40}|\.\d{1,40})(e[+-]?\d{1,3})?", flags=re.ASCII | re.IGNORECASE)
_DURATION = re.compile(r"(\d{1,20}(?:\.\d{1,20})?) ?(s|min|h)", flags=re.ASCII)
DAY_S = 86_400.0


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ours: one line, and no usage."""

    def error(self, message: str) -> NoReturn:
        """Raise `ConfigError`."""
        raise ConfigError(f"{printable(message, 600)}; see {self.prog} --help")


class Whole:
    """A whole number within ``low..high``."""

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high

    def __call__(self, text: str) -> int:
        """The number that a text says."""
        value = int(text) if _WHOLE.fullmatch(text) else None
        if value is None or not self.low <= value <= self.high:
            raise argparse.ArgumentTypeError(
                f"must be a whole number in {self.low}..{self.high}, got {printable(text, 40)!r}"
            )
        return value


class Number:
    """A finite number within ``low..high``; with ``above``, more than ``low``."""

    def __init__(self, low: float, high: float, *, above: bool = False) -> None:
        self.low, self.high, self.above = low, high, above

    def __call__(self, text: str) -> float:
        """The number that a text says."""
        value = float(text) if _NUMBER.fullmatch(text) else float("nan")
        if not self.low <= value <= self.high or (self.above and value == self.low):
            raise argparse.ArgumentTypeError(f"must be {self}, got {printable(text, 40)!r}")
        return value

    def __str__(self) -> str:
        if not self.above:
            return f"a number in {self.low:g}..{self.high:g}"
        return f"a {'positive number' if self.low == 0 else f'number above {self.low:g}'}, at most {self.high:g}"


SEED = Whole(0, 2**63 - 1)
THREADS = Whole(1, 1024)
STEPS = Whole(1, 10**9)
"""Of training."""
BATCH = Whole(1, 4096)
RATE = Number(0, 10, above=True)
"""Of learning."""
SHARE = Number(0, 1)
WEIGHT = Number(0, 1e3)
"""Of a term of a loss, and of guidance."""
SECONDS = Number(0, 7 * DAY_S, above=True)
MINUTES = Number(0, 7 * 1440, above=True)


def duration_s(text: str) -> float:
    """Seconds in a duration, from one to those of a year.

    >>> duration_s("10min"), duration_s("1.5h"), duration_s("90s")
    (600.0, 5400.0, 90.0)
    """
    match = _DURATION.fullmatch(text.strip(" "))
    seconds = 0.0 if match is None else float(match[1]) * {"s": 1.0, "min": 60.0, "h": 3600.0}[match[2]]
    if not 1 <= seconds <= 366 * DAY_S:
        raise argparse.ArgumentTypeError(
            f"must look like 10min, 2h or 90s, from 1s to 8784h, got {printable(text, 40)!r}"
        )
    return seconds


def part(text: str) -> tuple[int, int]:
    """``K/N`` with K below N.

    >>> part("0/2")
    (0, 2)
    """
    index, slash, parts = text.partition("/")
    count = Whole(1, 1_000_000)
    if not slash or not _WHOLE.fullmatch(index) or not _WHOLE.fullmatch(parts) or not 0 <= int(index) < count(parts):
        raise argparse.ArgumentTypeError(
            f"must be K/N with K below N, such as 0/2 and 1/2 for two processes, got {printable(text, 40)!r}"
        )
    return int(index), int(parts)
