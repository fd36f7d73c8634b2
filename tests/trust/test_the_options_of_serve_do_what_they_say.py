"""`streamdiff serve` with its options of trust, all at once: what is asked for on the command line is what happens."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web

from streamdiff.cli.main import main as command
from streamdiff.serve.local import LocalDoor
from streamdiff.serve.mark import Mark
from streamdiff.serve.protocol import Ended, Ending, Latency, Say
from streamdiff.serve.server import HOUSE
from streamdiff.trust.audit import verify_log
from streamdiff.trust.consent import ConsentError
from tests.avatar.drawn_face import drawn_bundle

pytestmark = pytest.mark.slow
WORDS = "AI generated"


def test_consent_audit_mark_trace_and_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, key, listed = drawn_bundle().save(tmp_path / "ann.avatar"), tmp_path / "key", tmp_path / "withdrawn"
    assert command(["avatar", "key", str(key)]) == 0
    assert command(["avatar", "consent", str(bundle), "--key", str(key), "--subject", "Ann"]) == 0
    listed.write_text("")
    happened: list[str] = []

    async def visit(app: web.Application) -> None:
        house = app[HOUSE]
        async with house.calls, LocalDoor(house.calls).connect("user") as client:
            beat = await client.beat(60)
            assert beat is not None
            white = Mark(WORDS, 256, 256).on(np.zeros((1, 256, 256, 3), np.uint8))[0] > 200
            assert beat.frame_HWC[white].min() > 180
            client.send(Say("Hello."))
            await client.event(Latency, 60)
            listed.write_text(f"bundle {drawn_bundle().sha256}\n")
            assert await client.event(Ended, 60) == Ended(Ending.REVOKED)
            with pytest.raises(ConsentError):
                await house.calls.open("user")
        assert house.limits is not None
        assert not house.cast.takes_photos
        happened.append("visited")

    async def serve(app: web.Application, **_: object) -> None:
        await asyncio.wait_for(visit(app), 200)

    monkeypatch.setattr("streamdiff.serve.server.serve", serve)
    options = ["--avatar", str(bundle), "--mind", "none", "--capacity", "1", "--mark", WORDS, "--rate", "9"]
    options += ["--require-consent", f"{key}.pub", "--withdrawn", str(listed)]
    options += ["--audit", str(tmp_path / "log.jsonl"), "--trace", str(tmp_path / "turns.jsonl")]
    assert command(["serve", *options]) == 0
    assert happened == ["visited"]
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["event"] for record in records] == ["began", "opened", "ended"]
    assert (records[1]["user"], records[1]["avatar"], records[2]["reason"]) == ("user", "ann", "revoked")
    assert records[1]["bundle"] == drawn_bundle().sha256
    assert verify_log(tmp_path / "log.jsonl").fault == ""
    (trace,) = (tmp_path / "turns.jsonl").read_text().splitlines()
    assert json.loads(trace)["resourceSpans"][0]["scopeSpans"][0]["spans"][0]["name"] == "turn"
