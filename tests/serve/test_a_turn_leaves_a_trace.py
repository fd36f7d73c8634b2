"""One trace per turn, in OpenTelemetry's JSON, with stages where they were."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from streamdiff.errors import InputError
from streamdiff.serve.calls import Calls
from streamdiff.serve.leases import Leases, Terms
from streamdiff.serve.local import LocalDoor
from streamdiff.serve.protocol import Bye, Ended, Ending, Latency, Say
from streamdiff.serve.turns import Turns, _Turn
from tests.serve.scripted import Stage

MS = 1_000_000
NOW = 1_700_000_000_000 * MS


def spans_of(line: str) -> list[dict[str, Any]]:
    (resource,) = json.loads(line)["resourceSpans"]
    (scope,) = resource["scopeSpans"]
    return scope["spans"]


def times(spans: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    return {s["name"]: tuple((int(s[k]) - NOW) // MS for k in ("startTimeUnixNano", "endTimeUnixNano")) for s in spans}  # type: ignore[misc]


def test_stages_of_a_turn_follow_each_other() -> None:
    lines: list[str] = []
    clock = [NOW]
    turn = _Turn("abc", "demo", lines.append, lambda: clock[0])
    for stage, ms in (
        ("end of turn", 200),
        ("transcript", 80),
        ("first word", 300),
        ("first sound", 50),
        ("answer", 550),
    ):
        turn(Latency(stage, ms, 1))
    clock[0] += 40 * MS
    turn(Latency("encode", 10, 1))
    assert lines == []
    turn(Latency("answer", 5, 2))
    turn(Ended(Ending.LEFT))
    turn(Ended(Ending.LEFT))
    assert len(lines) == 2
    spans = spans_of(lines[0])
    assert times(spans) == {
        "turn": (-550, 40),
        "end of turn": (-550, -350),
        "transcript": (-430, -350),
        "first word": (-350, -50),
        "first sound": (-50, 0),
        "answer": (-550, 0),
        "encode": (30, 40),
    }
    root, *stages = spans
    assert "parentSpanId" not in root
    assert {s["parentSpanId"] for s in stages} == {root["spanId"]}
    assert {len(s["traceId"]) for s in spans} == {32}
    assert {len(s["spanId"]) for s in spans} == {16}
    assert len({s["traceId"] for s in spans}) == 1
    assert len({s["spanId"] for s in spans}) == len(spans)
    told = {a["key"]: a["value"] for a in root["attributes"]}
    assert told == {"session": {"stringValue": "abc"}, "avatar": {"stringValue": "demo"}, "turn": {"intValue": "1"}}


def test_what_is_said_in_a_call_is_traced_without_its_words(tmp_path: Path) -> None:
    path = tmp_path / "turns.jsonl"
    turns = Turns(path)

    async def main() -> None:
        calls = Calls(Leases(Terms(capacity=1)), Stage(), watch=turns.watch)
        async with calls, LocalDoor(calls).connect("ann") as client:
            for words in ("One secret.", "Another secret."):
                client.send(Say(words))
                for _ in range(3):
                    await client.event(Latency)
            client.send(Bye())
            await client.event(Ended)

    asyncio.run(asyncio.wait_for(main(), 60))
    turns.close()
    text = path.read_text()
    assert "secret" not in text
    assert [{s["name"] for s in spans_of(line)} for line in text.splitlines()] == [
        {"turn", "voice", "face", "encode"}
    ] * 2


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write traces"):
        Turns(tmp_path / "none" / "turns.jsonl")
