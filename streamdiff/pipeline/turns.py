"""Whose chunk enters a line next: earliest deadline first, in integer microseconds.

A stream's first chunk is due when the stream joins. Each later one is due a period after the one before, or, if it was
offered later than that, when it was offered: a stream that paused has saved nothing up, and one that runs ahead of the
clock is due later and later. So a stream that keeps to the clock goes before one that makes a film, a new one goes
before both, and nobody starves: every chunk that enters moves its own stream back by a period.

    >>> turns = Turns[str](period_us=100)
    >>> for name in ("a", "b"):
    ...     turns.join(name, 0)
    ...     turns.offer(name, 0)
    >>> turns.take(), turns.take(), turns.take()
    ('a', 'b', None)
    >>> for name in ("b", "a"):
    ...     turns.offer(name, 30)
    >>> turns.join("new", 90)
    >>> turns.offer("new", 150)
    >>> turns.take(), turns.take()
    ('new', 'a')
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

from streamdiff.errors import ConfigError

K = TypeVar("K", bound=Hashable)


class Turns(Generic[K]):
    """Deadlines of streams, and which of them has a chunk to offer. Integers only; the caller has the clock."""

    def __init__(self, period_us: int) -> None:
        if period_us < 1:
            raise ConfigError(f"a chunk takes at least a microsecond to show, got period_us={period_us}")
        self._period_us = period_us
        self._due_us: dict[K, int] = {}
        """When each stream's next chunk is due, in order of joining."""
        self._begun: set[K] = set()
        self._offered: dict[K, int] = {}
        """Deadline of the chunk that each stream offers."""

    def join(self, stream: K, now_us: int) -> None:
        """A stream whose first chunk is due now."""
        self._due_us[stream] = now_us

    def leave(self, stream: K) -> None:
        """Forget a stream and what it offers; nothing happens if it has left already."""
        self._due_us.pop(stream, None)
        self._begun.discard(stream)
        self._offered.pop(stream, None)

    def offer(self, stream: K, now_us: int) -> None:
        """A stream has a chunk that may enter; one at a time."""
        due_us = self._due_us[stream]
        self._offered[stream] = max(due_us, now_us) if stream in self._begun else due_us

    def take(self) -> K | None:
        """The stream whose chunk enters now: the earliest deadline, and of equal ones the stream that joined first."""
        ready = [stream for stream in self._due_us if stream in self._offered]
        if not ready:
            return None
        first = min(ready, key=self._offered.__getitem__)
        self._due_us[first] = self._offered.pop(first) + self._period_us
        self._begun.add(first)
        return first
