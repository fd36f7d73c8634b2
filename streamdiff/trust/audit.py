"""An append-only log whose records are chained by their hashes.

One JSON object per line: ``n`` counts from 0, ``prev`` is the hash of the record before (64 zeros before the first),
and ``hash`` is the SHA-256 of the line without it. So no record can be changed, removed or put in without changing
every one after it. ``FILE.head`` holds number and hash of the last record; it tells a log that was cut off at its end.

What a chain cannot show: whoever can write both files can make a new chain, or cut the log and its head alike. Keep the
head somewhere else (``streamdiff verify FILE --head N:HASH``).

Several processes may write one log: each record is written under a lock of the file system. A record that a crash cut
short stays where it is, and the next writer says so in a record of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from streamdiff.errors import InputError, StreamdiffError
from streamdiff.facts import parse_json, printable

NOTHING = "0" * 64
"""What the first record of a log follows."""
MAX_BYTES = 16 << 20
KEPT = 8
_MOST_LINE = 16_384
_MOST_VALUE = 300
_LOCK_S = 15.0


class AuditError(StreamdiffError, OSError):
    """A record could not be written."""


@dataclass(frozen=True, slots=True)
class Head:
    """Number and hash of the last record of a log."""

    n: int = -1
    hash: str = NOTHING

    def __str__(self) -> str:
        return f"{self.n}:{self.hash}"


@dataclass(slots=True)
class Verdict:
    """What a log shows."""

    fault: str = ""
    """Where the chain is broken and how; empty: it is whole."""
    num_records: int = 0
    head: Head = field(default_factory=Head)
    notes: list[str] = field(default_factory=list[str])
    """What is no fault, and should be known: crashes, sessions without an end, what cannot be told."""


class AuditLog:
    """Appends records to a log. Any thread, any number of processes.

    Args:
        path: of the log; ``FILE.head`` and ``FILE.lock`` lie beside it.
        max_bytes: a log of this size becomes ``FILE.1``, that ``FILE.2``, and so on.
        kept: how many of those are kept; older ones are deleted.
    """

    def __init__(self, path: str | Path, *, max_bytes: int = MAX_BYTES, kept: int = KEPT) -> None:
        self.path = Path(path)
        self._max_bytes, self._kept = max_bytes, kept
        self._lock = threading.Lock()

    def write(self, event: str, **facts: str | float) -> Head:
        """Append a record; when this returns, it is on the disk. Values are cut to 300 characters.

        Raises:
            AuditError: it could not be written, or the log does not end as a log does. Nothing may happen unrecorded:
                the caller should not do what it wanted to record.
        """
        try:
            with self._lock, _locked(self.path):
                return self._write(event, facts)
        except AuditError:
            raise
        except OSError as error:
            raise AuditError(f"cannot write the audit log {self.path}: {error.strerror or error}") from error

    def _write(self, event: str, facts: dict[str, str | float]) -> Head:
        head, torn = _tail(self.path)
        if head is None:
            head = _tail(_old(self.path, 1))[0] or Head()
        kept = _kept_head(self.path) or Head()
        if kept.n > head.n or (kept.n == head.n and kept != head):
            raise AuditError(
                f"the audit log {self.path} was cut off or altered: its head is {kept.n}; move all of it away"
            )
        if (unended := _parsed(torn + b"\n")) is not None:
            head = self._append(b"\n", (Head(unended["n"], unended["hash"]), b""))
        elif torn:
            why = {"torn_bytes": len(torn), "torn_sha256": hashlib.sha256(torn).hexdigest()}
            head = self._append(b"\n", _record(head, "recovered", why))
        record = _record(head, event, facts)
        if _size(self.path) + len(record[1]) > self._max_bytes and _size(self.path):
            self._rotate()
        return self._append(b"", record)

    def _append(self, before: bytes, record: tuple[Head, bytes]) -> Head:
        head, line = record
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
        size = os.fstat(fd).st_size
        try:
            data = before + line
            while data:
                data = data[os.write(fd, data) :]
            os.fdatasync(fd)
        except OSError:
            os.ftruncate(fd, size)  # of a full disk: half a record is worse than none
            raise
        finally:
            os.close(fd)
        partial = _beside(self.path, ".head.partial")
        partial.write_text(f"{head}\n")
        partial.replace(_beside(self.path, ".head"))
        return head

    def _rotate(self) -> None:
        for k in range(self._kept - 1, 0, -1):
            if _old(self.path, k).exists():
                _old(self.path, k).replace(_old(self.path, k + 1))
        self.path.replace(_old(self.path, 1))


def verify_log(path: str | Path, head: Head | None = None) -> Verdict:
    """Check a log and the older ones beside it.

    Args:
        path: of the newest; ``FILE.1``, ``FILE.2``, ... and ``FILE.head`` are found by themselves.
        head: one that was kept elsewhere; None: the one beside the log.

    Raises:
        InputError: there is no log.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{printable(path, 300)} is no file; give an audit log")
    numbers = sorted((k for k in _old_numbers(path)), reverse=True)
    verdict, running = Verdict(), dict[str, str]()
    fault = next(_faults([*(_old(path, k) for k in numbers), path], head or _kept_head(path), verdict, running), "")
    verdict.fault = fault
    for session, began in list(running.items())[:20]:
        verdict.notes.append(f"session {printable(session)}, opened at {printable(began)}, has no end")
    if head is None and _kept_head(path) is None:
        verdict.notes.append(f"there is no {path.name}.head: records cut off at the end would not be noticed")
    return verdict


def parse_head(text: str) -> Head:
    """A head as it stands in ``FILE.head``. InputError: it is none."""
    number, _, digest = text.strip().partition(":")
    if not (number.isascii() and number.isdigit() and len(number) < 16 and len(digest) == 64):
        raise InputError(f"{printable(text)!r} is no head of a log; one looks like 12:0123...ef, as in FILE.head")
    return Head(int(number), digest)


def _faults(files: list[Path], head: Head | None, verdict: Verdict, running: dict[str, str]) -> Iterator[str]:
    """Everything that is wrong, the first fault first; fills in the verdict on its way."""
    met = head is None
    for file, number, line in _lines(files):
        where = f"{file.name} line {number}"
        torn, record = line
        if record is None:
            yield f"{where} is no record"
            return
        if why := _torn_fault(torn, record):
            yield f"{where}: {why}"
        if not verdict.num_records and record["n"]:
            verdict.head = Head(record["n"] - 1, record["prev"])
            verdict.notes.append(f"it begins with record {record['n']}: older ones were rotated away")
        if record["n"] != verdict.head.n + 1:
            yield f"{where}: record {record['n']} follows record {verdict.head.n}: one was removed or put in"
        if record["prev"] != verdict.head.hash:
            yield f"{where}: record {record['n']} does not follow the one before it, which was altered or removed"
        verdict.head = Head(record["n"], record["hash"])
        verdict.num_records += 1
        met = met or verdict.head == head
        _note(record, verdict, running)
    if not met and head is not None:
        missing = head.n - verdict.head.n
        yield (
            f"its last {missing} records were cut off" if missing > 0 else f"record {head.n} is not the one of the head"
        )


def _lines(files: list[Path]) -> Iterator[tuple[Path, int, tuple[bytes, dict[str, Any] | None]]]:
    """Every record with the bytes of a torn one before it; None where a line is neither."""
    torn = b""
    file, number = Path(), 0
    for file in files:
        with file.open("rb") as opened:
            number = 0
            while line := opened.readline(_MOST_LINE + 1):
                number += 1
                record = _parsed(line)
                if record is None and not torn:
                    torn = line
                    continue
                yield file, number, (torn, record)
                torn = b""
    if torn:
        yield file, number, (b"", None)


def _torn_fault(torn: bytes, record: dict[str, Any]) -> str:
    """Why a line that is no record may not stand before this one, or nothing."""
    if record["event"] != "recovered":
        return "the line before it is no record, it was altered" if torn else ""
    torn = torn.removesuffix(b"\n")
    if record.get("torn_bytes") != len(torn) or record.get("torn_sha256") != hashlib.sha256(torn).hexdigest():
        return "the line before it is not the one that a crash cut short"
    return ""


def _note(record: dict[str, Any], verdict: Verdict, running: dict[str, str]) -> None:
    session = str(record.get("session", ""))
    match record["event"]:
        case "opened":
            running[session] = str(record["at"])
        case "ended":
            running.pop(session, None)
        case "recovered":
            verdict.notes.append(f"a crash cut a record short before record {record['n']}")
        case _:
            pass


def _record(head: Head, event: str, facts: dict[str, Any]) -> tuple[Head, bytes]:
    at = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    cut = {name: value[:_MOST_VALUE] if isinstance(value, str) else value for name, value in facts.items()}
    record = {**cut, "n": head.n + 1, "at": at, "event": event, "prev": head.hash}
    digest = _digest(record)
    return Head(head.n + 1, digest), _text({**record, "hash": digest}).encode() + b"\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The record of a line, which is written as only we write it; None: it is none."""
    try:
        record = parse_json(line)
        digest = record.pop("hash")
        known = (type(record["n"]), type(record["prev"]), type(record["at"]), type(record["event"]))
        whole = known == (int, str, str, str) and digest == _digest(record)
        record["hash"] = digest
        return record if whole and _text(record).encode() + b"\n" == line else None
    except (ValueError, AttributeError, KeyError, TypeError):
        return None


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(_text(record).encode()).hexdigest()


def _text(record: dict[str, Any]) -> str:
    return json.dumps(record, sort_keys=True, separators=(",", ":"))


def _tail(path: Path) -> tuple[Head | None, bytes]:
    """The head of what is whole in a log, and the torn bytes after it; no head: there is no record.

    Raises:
        AuditError: its last line is no record, so that nothing can follow it.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None, b""
    with os.fdopen(fd, "rb") as file:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise AuditError(f"the audit log {path} is no regular file; choose another place")
        file.seek(max(0, info.st_size - 2 * _MOST_LINE))
        end = file.read(2 * _MOST_LINE)
    whole, newline, torn = end.rpartition(b"\n")
    if not newline:
        if len(end) >= _MOST_LINE:
            raise AuditError(f"the audit log {path} does not end with a record; move it away")
        return None, torn
    record = _parsed(whole[whole.rfind(b"\n") + 1 :] + b"\n")
    if record is None:
        raise AuditError(f"the audit log {path} does not end with a record; see streamdiff verify, and move it away")
    return Head(record["n"], record["hash"]), torn


def _kept_head(path: Path) -> Head | None:
    with contextlib.suppress(OSError):
        return parse_head(_beside(path, ".head").read_text("utf-8", "replace")[:200])
    return None


@contextlib.contextmanager
def _locked(path: Path) -> Generator[None]:
    """Be the only writer, of all processes."""
    fd = os.open(_beside(path, ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    try:
        until_s = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until_s:
                    raise AuditError(f"another process has held {path}.lock for {_LOCK_S:g} s; end it") from None
                time.sleep(0.005)
        yield
    finally:
        os.close(fd)


def _old(path: Path, k: int) -> Path:
    return _beside(path, f".{k}")


def _old_numbers(path: Path) -> Iterator[int]:
    k = 1
    while _old(path, k).is_file():
        yield k
        k += 1


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
