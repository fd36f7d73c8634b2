"""Measuring is a value: code receives an `Observer` and writes spans in schedule words.

    with span(observer, "denoise", chunk=7, stage=2):
        ...

`Silent` costs nothing, `JsonLines` writes one line per span, `Recorder` keeps spans in memory for tests and benches.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TextIO


@dataclass(frozen=True, slots=True)
class Span:
    """One stretch of work: ``start_s`` and ``end_s`` on the monotonic clock of this process."""

    name: str
    start_s: float
    end_s: float
    labels: dict[str, int | str] = field(default_factory=dict[str, int | str])

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


class Observer(Protocol):
    """Receives spans; must be cheap and must not raise."""

    def record(self, span: Span) -> None: ...


class Silent:
    """Forgets everything."""

    def record(self, span: Span) -> None:
        del span


class Recorder:
    """Keeps spans in memory, for tests and benches."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._lock = threading.Lock()

    def record(self, span: Span) -> None:
        with self._lock:
            self.spans.append(span)


class JsonLines:
    """One JSON object per span, appended to a file; close it, or use it as a context manager."""

    def __init__(self, path: str | Path, **labels: int | str) -> None:
        self._file: TextIO = Path(path).open("a", encoding="utf-8", buffering=1)  # noqa: SIM115  closed by close()
        self._labels = labels
        self._lock = threading.Lock()

    def record(self, span: Span) -> None:
        line = json.dumps(
            {"name": span.name, "start_s": span.start_s, "end_s": span.end_s, **self._labels, **span.labels}
        )
        with self._lock:
            self._file.write(line + "\n")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@contextlib.contextmanager
def span(observer: Observer, name: str, **labels: int | str) -> Generator[None]:
    """Record how long the body took, also when it raises."""
    start_s = time.monotonic()
    try:
        yield
    finally:
        observer.record(Span(name, start_s, time.monotonic(), labels))
