"""The audit log: every change to its records is found, and a crash in mid-line is survived."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from streamdiff.cli.main import main as command
from streamdiff.errors import InputError
from streamdiff.serve.calls import Calls
from streamdiff.serve.leases import Leases, Terms
from streamdiff.serve.local import LocalDoor
from streamdiff.serve.protocol import Bye, Ended
from streamdiff.serve.register import Register, Unrecorded
from streamdiff.trust import audit
from streamdiff.trust.audit import AuditError, AuditLog, Head, parse_head, verify_log
from tests.serve.scripted import Stage


def filled(path: Path, count: int = 6, **options: int) -> AuditLog:
    log = AuditLog(path, **options)
    for k in range(count):
        log.write("opened" if k % 2 == 0 else "ended", session=f"s{k // 2}", user="ann")
    return log


def test_the_chain_can_be_computed_by_anybody(tmp_path: Path) -> None:
    """From the description alone: json, sorted names, no spaces, SHA-256."""
    path = tmp_path / "a.jsonl"
    filled(path)
    before = "0" * 64
    for n, line in enumerate(path.read_text().splitlines()):
        record = json.loads(line)
        digest = record.pop("hash")
        assert (record["n"], record["prev"]) == (n, before)
        before = hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        assert digest == before
    assert (tmp_path / "a.jsonl.head").read_text() == f"5:{before}\n"
    verdict = verify_log(path)
    assert (verdict.fault, verdict.num_records, verdict.notes) == ("", 6, [])


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    filled(path, 3)
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert verify_log(path).fault, data[at : at + 20]


def test_a_record_that_was_altered_with_its_own_hash_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    filled(path)
    lines = path.read_text().splitlines()
    record = json.loads(lines[2]) | {"user": "eve"}
    del record["hash"]
    digest = hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    lines[2] = json.dumps(record | {"hash": digest}, sort_keys=True, separators=(",", ":"))
    path.write_text("\n".join(lines) + "\n")
    assert verify_log(path).fault.startswith("a.jsonl line 4: record 3 does not follow the one before it")


def test_a_record_in_another_spelling_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    filled(path)
    path.write_text(path.read_text().replace('"event":', '"event": ', 1))
    assert "no record" in verify_log(path).fault


@pytest.mark.parametrize(
    ("order", "why"),
    [
        ([0, 1, 3, 4, 5], "one was removed or put in"),
        ([0, 1, 2, 2, 3, 4, 5], "one was removed or put in"),
        ([0, 2, 1, 3, 4, 5], "one was removed or put in"),
        ([0, 1, 2, 3], "its last 2 records were cut off"),
        ([], "its last 6 records were cut off"),
        ([1, 2, 3, 4, 5], ""),
    ],
)
def test_a_removed_or_repeated_line_is_found(tmp_path: Path, order: list[int], why: str) -> None:
    path = tmp_path / "a.jsonl"
    filled(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[k] for k in order))
    verdict = verify_log(path)
    assert why in verdict.fault
    if not why:  # the first records may have been rotated away: it is said, not called a fault
        assert verdict.notes[0] == "it begins with record 1: older ones were rotated away"


def test_a_new_chain_is_found_by_a_head_that_was_kept_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    kept = filled(path).write("ended", session="last")
    filled(tmp_path / "b.jsonl", 9)
    for suffix in ("", ".head"):
        (tmp_path / f"b.jsonl{suffix}").replace(tmp_path / f"a.jsonl{suffix}")
    assert verify_log(path).fault == ""  # as the module says: a chain cannot show it
    assert verify_log(path, kept).fault == "record 6 is not the one of the head"
    (tmp_path / "a.jsonl.head").unlink()
    assert "would not be noticed" in verify_log(path).notes[-1]


def test_a_line_that_a_crash_cut_short_stays_and_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    log = filled(path, 4)
    whole, head = path.read_bytes(), (tmp_path / "a.jsonl.head").read_text()
    log.write("opened", session="s9")
    full = path.read_bytes()
    for cut in (1, 40, 200):
        torn = full[: len(whole) + cut]
        path.write_bytes(torn)
        (tmp_path / "a.jsonl.head").write_text(head)
        assert "is no record" in verify_log(path).fault  # nobody has said yet that it was a crash
        AuditLog(path).write("began")
        verdict = verify_log(path)
        assert (verdict.fault, verdict.num_records) == ("", 6)
        assert "a crash cut a record short before record 4" in verdict.notes
        assert path.read_bytes().startswith(torn + b"\n")
        path.write_bytes(torn[:-1] + b"x" + path.read_bytes()[len(torn) :])
        assert "line 6: the line before it is not the one" in verify_log(path).fault


def test_a_record_that_lost_only_the_end_of_its_line_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    log = filled(path, 4)
    head = (tmp_path / "a.jsonl.head").read_text()
    log.write("began")
    path.write_bytes(path.read_bytes()[:-1])
    (tmp_path / "a.jsonl.head").write_text(head)
    log.write("began")
    assert (verify_log(path).fault, verify_log(path).num_records) == ("", 6)


def test_nothing_is_appended_to_a_log_that_was_cut_or_altered(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    log = filled(path)
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    for altered in (b"".join(lines[:-1]), b"", b"".join(lines[:-1]) + b"{}\n", b"x" * 40_000):
        path.write_bytes(altered)
        with pytest.raises(AuditError, match="move"):
            log.write("opened", session="x")
        assert path.read_bytes() == altered
    path.unlink()
    path.mkdir()
    with pytest.raises(AuditError):
        log.write("opened", session="x")


def test_old_logs_go_on_in_one_chain_and_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    filled(path, 60, max_bytes=2_000, kept=3)
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == ["a.jsonl", "a.jsonl.1", "a.jsonl.2", "a.jsonl.3", "a.jsonl.head", "a.jsonl.lock"]
    assert all((tmp_path / name).stat().st_size <= 2_000 for name in files)
    verdict = verify_log(path)
    assert verdict.fault == ""
    assert verdict.head.n == 59
    assert "older ones were rotated away" in verdict.notes[0]
    second = tmp_path / "a.jsonl.2"
    second.write_bytes(b"".join(second.read_bytes().splitlines(keepends=True)[:-1]))
    assert "a.jsonl.1 line 1" in verify_log(path).fault


def test_a_full_disk_leaves_no_half_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    log = filled(path)
    before = path.read_bytes()
    write, calls = os.write, []

    def full(fd: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[:10])

    monkeypatch.setattr(audit.os, "write", full)
    with pytest.raises(AuditError, match="No space left"):
        log.write("opened", session="x")
    monkeypatch.undo()
    assert path.read_bytes() == before
    log.write("opened", session="x")
    assert verify_log(path).fault == ""


WRITER = """
import sys
from streamdiff.trust.audit import AuditLog
log = AuditLog(sys.argv[1], max_bytes=20_000, kept=20)
for k in range(100):
    log.write("opened", session=sys.argv[2] + str(k))
    log.write("ended", session=sys.argv[2] + str(k))
"""


@pytest.mark.processes
@pytest.mark.heavy
def test_several_processes_write_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name]) for name in "abc"]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    verdict = verify_log(path)
    assert (verdict.fault, verdict.num_records, verdict.notes) == ("", 600, [])


@pytest.mark.processes
@pytest.mark.heavy
def test_a_writer_that_is_killed_leaves_a_log_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    endless = WRITER.replace("range(100)", "range(10**9)")
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", endless, str(path), "k"]) as writer:
            size = path.stat().st_size if path.exists() else 0
            while not path.exists() or path.stat().st_size == size:
                assert writer.poll() is None
            writer.kill()
    AuditLog(path).write("began")
    assert verify_log(path).fault == ""


def test_sessions_are_recorded_from_their_lease_to_their_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    register = Register(AuditLog(path), {"demo": "ab" * 32})

    async def main() -> None:
        async with Calls(Leases(Terms(capacity=2)), Stage(), register=register) as calls:
            async with LocalDoor(calls).connect("ann") as client:
                client.send(Bye())
                await client.event(Ended)
            while len(path.read_text().splitlines()) < 2:
                await asyncio.sleep(0.01)
            with pytest.raises(InputError):
                await calls.open("bob", avatar="nobody")

    asyncio.run(asyncio.wait_for(main(), 60))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["event"], r.get("user"), r.get("avatar"), r.get("reason")) for r in records] == [
        ("opened", "ann", "demo", None),
        ("ended", None, None, "left"),
        ("opened", "bob", "nobody", None),
        ("ended", None, None, "failed"),
    ]
    assert records[0]["bundle"] == "ab" * 32
    assert records[0]["session"] == records[1]["session"]
    assert verify_log(path).notes == []


def test_no_session_is_opened_that_cannot_be_recorded(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("not a log\n")

    async def main() -> None:
        stage = Stage()
        calls = Calls(Leases(Terms(capacity=2)), stage, register=Register(AuditLog(path), {}))
        async with calls:
            with pytest.raises(Unrecorded) as refused:
                await calls.open("ann")
            assert (refused.value.status, refused.value.retry_after_s) == (503, 30)
            assert (stage.streams, calls.leases.held) == ([], ())

    asyncio.run(asyncio.wait_for(main(), 60))


def test_the_command_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    head = filled(path).write("opened", session="s9\x1b[31m")
    assert command(["verify", str(path)]) == 0
    out = capsys.readouterr().out
    assert f"whole: 7 records, head {head}" in out
    assert "\x1b" not in out
    assert "has no end" in out
    path.write_text(path.read_text().replace("ann", "eve", 1))
    assert command(["verify", str(path)]) == 1
    assert "altered: a.jsonl line 2: the line before it is no record" in capsys.readouterr().out
    assert command(["verify", str(path), "--head", "x"]) == 2
    assert command(["verify", str(tmp_path / "none.jsonl")]) == 2


def test_what_is_no_head_is_refused() -> None:
    assert parse_head(f"12:{'ab' * 32}\n") == Head(12, "ab" * 32)
    for text in ("", "12", f"-1:{'ab' * 32}", f"{'1' * 20}:{'ab' * 32}", f"\u0661:{'ab' * 32}", "1:ab"):
        with pytest.raises(InputError, match="no head"):
            parse_head(text)
