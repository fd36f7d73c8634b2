"""One trace per turn of a conversation: which stage took how long, in OpenTelemetry's format, without a word of it.

A line is an OTLP ``ExportTraceServiceRequest`` in JSON, as the collector's ``otlpjsonfile`` receiver reads it. Its root
span is the turn; times are laid out from what each stage took: from the user's last sound to the end of the turn, to
the mind's first word, to the first sound of the answer. A stage that is told by itself ends when it is told.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from streamdiff.errors import InputError
from streamdiff.serve.calls import Call
from streamdiff.serve.protocol import Ended, Event, Latency

_MAX_BYTES, _KEPT = 64 << 20, 4
_NS_PER_MS = 1_000_000


class Turns:
    """Writes traces of calls to a file; `watch` each call.

    Args:
        path: of the file. At 64 MB it becomes ``FILE.1``; four such are kept. Of one process alone.
        clock: nanoseconds since 1970.

    Raises:
        InputError: it cannot be written.
    """

    def __init__(self, path: str | Path, *, clock: Callable[[], int] = time.time_ns) -> None:
        self._clock = clock
        try:
            self._file = RotatingFileHandler(path, maxBytes=_MAX_BYTES, backupCount=_KEPT, encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write traces to {path}: {error.strerror}; choose another file") from error
        self._file.setFormatter(logging.Formatter("%(message)s"))

    def watch(self, call: Call) -> None:
        """Trace the turns of this call, to its end."""
        call.subscribe(_Turn(call.log_id, call.avatar, self._write, self._clock))

    def close(self) -> None:
        """Write nothing more."""
        self._file.close()

    def _write(self, line: str) -> None:
        self._file.emit(logging.LogRecord("", logging.INFO, "", 0, line, None, None))


class _Turn:
    """A listener: gathers the stages of one turn after the other."""

    def __init__(self, session: str, avatar: str, write: Callable[[str], None], clock: Callable[[], int]) -> None:
        self._facts = {"session": session, "avatar": avatar}
        self._write, self._clock = write, clock
        self._turn = 0
        self._stages: dict[str, tuple[float, int]] = {}
        """What each took, milliseconds, and when it was told."""

    def __call__(self, event: Event) -> None:
        if isinstance(event, Latency):
            if event.turn and event.turn != self._turn:
                self._flush()
                self._turn = event.turn
            self._stages.setdefault(event.stage, (event.ms, self._clock()))
        elif isinstance(event, Ended):
            self._flush()

    def _flush(self) -> None:
        stages, self._stages = self._stages, {}
        if not stages:
            return
        times = _laid_out(stages)
        trace, root = secrets.token_hex(16), secrets.token_hex(8)
        whole = min(start for start, _ in times.values()), max(end for _, end in times.values())
        spans = [_span(trace, root, "", "turn", whole, {**self._facts, "turn": self._turn})]
        spans += [_span(trace, secrets.token_hex(8), root, stage, times[stage], {}) for stage in times]
        named = {"resource": {"attributes": _attributes({"service.name": "streamdiff"})}}
        scoped = {"scope": {"name": "streamdiff.serve"}, "spans": spans}
        self._write(json.dumps({"resourceSpans": [{**named, "scopeSpans": [scoped]}]}, separators=(",", ":")))


def _laid_out(stages: Mapping[str, tuple[float, int]]) -> dict[str, tuple[int, int]]:
    """Start and end of each stage, nanoseconds since 1970."""
    took = {stage: round(ms * _NS_PER_MS) for stage, (ms, _) in stages.items()}
    times = {stage: (told - took[stage], told) for stage, (_, told) in stages.items()}
    if "answer" not in times or "end of turn" not in times:
        return times
    at = times["answer"][0]
    decided = at + took["end of turn"]
    times["end of turn"] = at, decided
    if "transcript" in times:
        times["transcript"] = max(at, decided - took["transcript"]), decided
    at = decided
    for stage in ("first word", "first sound"):
        if stage in times:
            times[stage] = at, at + took[stage]
            at += took[stage]
    return times


def _span(
    trace: str, span: str, parent: str, name: str, times: tuple[int, int], facts: Mapping[str, str | int]
) -> dict[str, Any]:
    start, end = (str(time) for time in times)
    found: dict[str, Any] = {"traceId": trace, "spanId": span, "name": name, "kind": 1}
    found |= {"parentSpanId": parent} if parent else {}
    return {**found, "startTimeUnixNano": start, "endTimeUnixNano": end, "attributes": _attributes(facts)}


def _attributes(facts: Mapping[str, str | int]) -> list[dict[str, Any]]:
    return [
        {"key": key, "value": {"stringValue": value} if isinstance(value, str) else {"intValue": str(value)}}
        for key, value in facts.items()
    ]
