"""Serving asks for consent when a session is leased, and goes on asking while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from aiohttp.test_utils import TestClient, TestServer

from streamdiff.cli.main import main as command
from streamdiff.serve.calls import Calls
from streamdiff.serve.cast import Cast
from streamdiff.serve.leases import Leases, Terms
from streamdiff.serve.local import LocalDoor
from streamdiff.serve.permits import Permits, Signed
from streamdiff.serve.protocol import Ended, Ending
from streamdiff.serve.server import House, application
from streamdiff.session import Session
from streamdiff.trust.consent import ConsentError, describe, grant
from streamdiff.trust.keys import SigningKey, make_key, read_key
from tests.avatar.drawn_face import drawn_bundle
from tests.serve.scripted import ScriptedStream, Stage

ANN, BOB = "aa" * 32, "bb" * 32
Scene = Callable[[Calls, LocalDoor, Stage], Awaitable[None]]


@pytest.fixture
def key(tmp_path: Path) -> SigningKey:
    make_key(tmp_path / "key")
    return read_key(tmp_path / "key")


def signed(key: SigningKey, sha256: str, *, lasts_s: float = 3_600, scope: str = "live") -> Signed:
    expires = datetime.now(UTC) + timedelta(seconds=lasts_s)
    begins = expires - timedelta(days=1)
    return Signed(sha256, (grant(key, sha256, subject="x", scope=scope, expires=expires, now=begins),))


def play(permits: Permits, scene: Scene) -> Calls:
    async def main() -> Calls:
        stage = Stage()
        async with Calls(Leases(Terms(capacity=3)), stage, permits=permits) as calls:
            await asyncio.wait_for(scene(calls, LocalDoor(calls), stage), 60)
        return calls

    return asyncio.run(main())


def test_nothing_is_allocated_for_whom_nobody_agreed_to(key: SigningKey, tmp_path: Path) -> None:
    make_key(tmp_path / "eve")
    eve = signed(read_key(tmp_path / "eve"), BOB)
    avatars = {"ann": signed(key, ANN), "bob": eve, "cid": Signed("cc"), "dan": signed(key, ANN, scope="film")}
    permits = Permits(avatars, trusted=[key.public])

    async def scene(calls: Calls, door: LocalDoor, stage: Stage) -> None:
        for name, why in (
            ("bob", "not trusted"),
            ("cid", "no record of consent"),
            ("dan", "not for live"),
            ("brought-x", "without a signed record"),
        ):
            with pytest.raises(ConsentError, match=why):
                await calls.open("user", avatar=name)
        assert (stage.streams, calls.leases.held) == ([], ())
        async with door.connect("user"):  # the first, who agreed
            assert len(stage.streams) == 1

    calls = play(permits, scene)
    assert calls.meters.registry.get_sample_value("streamdiff_refused_total", {"reason": "consent"}) == 4


@pytest.mark.parametrize("line", ["record", f"bundle {ANN}", "key", "user carol"])
def test_a_withdrawal_ends_the_sessions_that_it_concerns(key: SigningKey, tmp_path: Path, line: str) -> None:
    listed = tmp_path / "withdrawn"
    listed.write_text("")
    (tmp_path / "other").mkdir()
    make_key(tmp_path / "other" / "key")
    other = read_key(tmp_path / "other" / "key")
    ann = signed(key, ANN)
    record = describe(ann.statements, ANN)[0]["id"]
    line = {"record": record, "key": f"key {key.public.fingerprint}"}.get(line, line)
    permits = Permits({"ann": ann, "bob": signed(other, BOB)}, trusted=[key.public, other.public], withdrawn=listed)

    async def scene(calls: Calls, door: LocalDoor, stage: Stage) -> None:
        async with door.connect("carol", avatar="ann") as hit, door.connect("dave", avatar="bob") as spared:
            listed.write_text(f"{line}\n")
            assert await hit.event(Ended) == Ended(Ending.REVOKED)
            with pytest.raises(ConsentError, match=r"withdrawn|any more"):
                await calls.open("carol", avatar="ann")
            assert calls.all == (spared.call,)
            assert await spared.beat() is not None

    calls = play(permits, scene)
    assert calls.meters.registry.get_sample_value("streamdiff_sessions_ended_total", {"reason": "revoked"}) == 1


def test_a_consent_that_expires_ends_its_session(key: SigningKey) -> None:
    time = [datetime.now(UTC)]
    permits = Permits({"ann": signed(key, ANN)}, trusted=[key.public], clock=lambda: time[0])

    async def scene(calls: Calls, door: LocalDoor, stage: Stage) -> None:
        async with door.connect("carol") as client:
            await asyncio.sleep(0.8)  # a sweep or two, in which it stands
            assert await client.beat() is not None
            time[0] += timedelta(hours=1)
            assert await client.event(Ended) == Ended(Ending.REVOKED)
        with pytest.raises(ConsentError, match="expired"):
            await calls.open("carol")

    play(permits, scene)


def test_nobody_is_let_in_while_the_list_cannot_be_read(key: SigningKey, tmp_path: Path) -> None:
    listed = tmp_path / "withdrawn"
    listed.write_text("user eve\n")
    permits = Permits({"ann": signed(key, ANN)}, withdrawn=listed)

    async def scene(calls: Calls, door: LocalDoor, stage: Stage) -> None:
        async with door.connect("carol") as client:
            listed.write_text("what is this\n")
            with pytest.raises(ConsentError, match="cannot be read"):
                await calls.open("dave")
            permits.reread()
            assert permits.why_not("ann", "eve")  # what was known stands
            assert await client.beat() is not None
            listed.write_text("")
            await calls.open("eve")

    play(permits, scene)


def test_a_bundle_can_be_withdrawn_where_no_consent_is_asked_for(tmp_path: Path) -> None:
    listed = tmp_path / "withdrawn"
    listed.write_text(f"bundle {ANN}\n")
    permits = Permits({"ann": Signed(ANN), "bob": Signed(BOB)}, withdrawn=listed)
    permits.reread()
    assert permits.why_not("ann", "x") == permits.why_not("", "x") == "ann may not be shown any more"
    assert permits.why_not("bob", "x") == permits.why_not("brought-x", "x") == ""


def test_the_client_is_told_403_and_why(key: SigningKey) -> None:
    class Engine:
        def open(self) -> Session:
            return Session(ScriptedStream())

    async def main() -> None:
        with Cast({"ann": Engine()}) as cast:
            permits = Permits({"ann": Signed(ANN)}, trusted=[key.public])
            calls = Calls(Leases(Terms(capacity=1)), cast.open, permits=permits)
            house = House(calls=calls, cast=cast)
            async with calls, TestClient(TestServer(application(house))) as client:
                answer = await client.post("/v1/sessions", json={})
                error = (await answer.json())["error"]
                assert (answer.status, error["code"]) == (403, "no_consent")
                assert "no record of consent" in error["message"]

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.slow
def test_a_server_says_at_the_start_whom_it_may_not_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = drawn_bundle().save(tmp_path / "a.avatar")
    make_key(tmp_path / "k")
    options = ["--avatar", str(bundle), "--mind", "none", "--capacity", "1"]
    assert command(["serve", *options, "--require-consent", str(tmp_path / "k.pub")]) == 2
    assert "a may not be shown: it holds no record of consent" in capsys.readouterr().err


def test_where_sessions_are_filmed_a_consent_must_be_for_films_too(key: SigningKey) -> None:
    avatars = {
        "ann": signed(key, ANN),
        "bob": signed(key, BOB, scope="film live"),
        "eve": signed(key, ANN, scope="film"),
    }
    permits = Permits(avatars, trusted=[key.public], scopes=("live", "film"))
    permits.check("bob", "guest")
    with pytest.raises(ConsentError, match="not for film"):
        permits.check("ann", "guest")
    with pytest.raises(ConsentError, match="not for live"):
        permits.check("eve", "guest")
