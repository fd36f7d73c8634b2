"""Read facts that a stranger wrote: JSON by name, kind and range, and words that are safe to print."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


def printable(text: object, most: int = 80) -> str:
    """Words from a file as one line of at most ``most`` characters; what a terminal would obey is escaped.

    >>> printable("red\\x1b[31m\\nname")
    'red\\\\x1b[31m\\\\nname'
    """
    words = str(text)
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in words[:most])
    return shown[:most] + ("..." if len(words) > most or len(shown) > most else "")


def parse_json(text: str | bytes) -> Any:
    """JSON with finite numbers and without repeated names; `ValueError` says in a few words why not."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) != len(pairs):
            raise ValueError("a name stands there twice")
        return dict(pairs)

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError as error:
        raise ValueError(printable(error)) from None


class Facts:
    """A JSON object of a file, read by name, kind and range.

    Raises:
        CheckpointError: from every method, when the fact is missing or something else.
    """

    def __init__(self, values: object, fail: Callable[[str], NoReturn], where: str = "") -> None:
        self._fail, self._where = fail, where
        if not isinstance(values, dict):
            fail(f"{where.rstrip('.') or 'its description'} is no table of facts")
        self._values: dict[str, Any] = values

    @property
    def names(self) -> list[str]:
        """Of all facts."""
        return list(self._values)

    def only(self, names: Sequence[str]) -> None:
        """Refuse facts of other names."""
        other = [printable(name) for name in self._values if name not in names]
        if other:
            self._fail(f"{self._where}{other[0]} is not known")

    def _get(self, name: str) -> Any:
        if name not in self._values:
            self._fail(f"{self._where}{printable(name)} is missing")
        return self._values[name]

    def number(self, name: str, low: float, high: float) -> float:
        """A number within ``low..high``, as it is written (an integer stays one)."""
        return self._number(name, self._get(name), low, high)

    def _number(self, name: str, value: object, low: float, high: float) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            shown = printable(json.dumps(value), 40)
            self._fail(f"{self._where}{printable(name)} must be a number in {low:g}..{high:g}, got {shown}")
        return value

    def whole(self, name: str, low: int, high: int) -> int:
        """An integer within ``low..high``."""
        value = self.number(name, low, high)
        if isinstance(value, float):
            self._fail(f"{self._where}{printable(name)} must be a whole number, got {value}")
        return value

    def numbers(self, name: str, low: float, high: float, *, count: int | None = None) -> tuple[float, ...]:
        """A list of numbers, ``count`` of them (None: 1 to 64)."""
        value = self._get(name)
        if not isinstance(value, list) or not 1 <= len(value) <= 64 or (count is not None and len(value) != count):
            self._fail(f"{self._where}{printable(name)} must be a list of {count or 'up to 64'} numbers")
        return tuple(self._number(name, item, low, high) for item in value)

    def truth(self, name: str) -> bool:
        """True or false."""
        value = self._get(name)
        if not isinstance(value, bool):
            self._fail(f"{self._where}{printable(name)} must be true or false, got {printable(json.dumps(value), 40)}")
        return value

    def present(self, name: str) -> bool:
        """Whether the fact is there, and is something."""
        return self._values.get(name) is not None

    def words(self, name: str, most: int = 300) -> str:
        """A text of at most ``most`` characters."""
        value = self._get(name)
        if not isinstance(value, str) or len(value) > most:
            self._fail(f"{self._where}{printable(name)} must be a text of at most {most} characters")
        return value

    def section(self, name: str) -> Facts:
        """A table within the table."""
        return Facts(self._get(name), self._fail, f"{self._where}{name}.")
