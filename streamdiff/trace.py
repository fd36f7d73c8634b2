"""Measuring is a value: code receives an `Observer` and writes spans in schedule words.

    with span(observer, "denoise", chunk=7, stage=2):
        ...

`Silent` costs nothing, `JsonLines` writes one line per span, `Recorder` keeps spans in memory for tests and benches.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import stat
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TextIO

logger = logging.getLogger(__name__)


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
    """One JSON object per span, appended to a file; close it, or use it as a context manager.

    A disk that takes no more ends the trace, with a warning, not what is traced. Raises OSError for what is no file.
    """

    def __init__(self, path: str | Path, **labels: int | str) -> None:
        # Without waiting for the reader of a pipe.
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "a trace is written to a file alone", str(path))
        self._file: TextIO = open(fd, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  closed by close()
        self._labels, self._is_full = labels, False
        self._lock = threading.Lock()

    def record(self, span: Span) -> None:
        line = json.dumps(
            {"name": span.name, "start_s": span.start_s, "end_s": span.end_s, **self._labels, **span.labels}
        )
        with self._lock:
            if self._is_full:
                return
            try:
                self._file.write(line + "\n")
            except OSError as error:
                self._is_full = True
                logger.warning("the trace ends here: %s", error.strerror)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it was told when it happened
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
