"""Whose chunk enters a line next: earliest deadline first, in integer microseconds.

A stream's first chunk is due when the stream joins. Each later one is due a period after the one before, or, if it was
offered later than that, when it was offered: a stream that paused has saved nothing up. A stream that makes a film runs
ahead of the clock and is due later and later; so one that keeps to the clock goes before it, and a new one before both.
Films among themselves are due no earlier than the last film's chunk that entered, or one that joins late would have the
line to itself until it had caught up (start-time fair queueing, Goyal, Vin and Cheng 1996). Nobody starves: every chunk
that enters moves its own stream back by a period.

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
        self._films: set[K] = set()
        self._ahead_us = 0
        """Deadline of the last film's chunk that entered."""
        self._offered: dict[K, int] = {}
        """Deadline of the chunk that each stream offers."""

    def join(self, stream: K, now_us: int, *, live: bool = True) -> None:
        """A stream whose first chunk is due now; ``live``: whether it keeps to the clock, or makes a film."""
        self._due_us[stream] = now_us
        if not live:
            self._films.add(stream)

    def leave(self, stream: K) -> None:
        """Forget a stream and what it offers; nothing happens if it has left already."""
        self._due_us.pop(stream, None)
        self._begun.discard(stream)
        self._films.discard(stream)
        self._offered.pop(stream, None)

    def offer(self, stream: K, now_us: int) -> None:
        """A stream has a chunk that may enter; one at a time."""
        due_us = self._due_us[stream]
        if stream in self._begun:
            due_us = max(due_us, now_us)
        self._offered[stream] = max(due_us, self._ahead_us) if stream in self._films else due_us

    def take(self) -> K | None:
        """The stream whose chunk enters now: the earliest deadline, and of equal ones the stream that joined first."""
        ready = [stream for stream in self._due_us if stream in self._offered]
        if not ready:
            return None
        first = min(ready, key=self._offered.__getitem__)
        deadline_us = self._offered.pop(first)
        self._due_us[first] = deadline_us + self._period_us
        if first in self._films:
            self._ahead_us = max(self._ahead_us, deadline_us)
        self._begun.add(first)
        return first
