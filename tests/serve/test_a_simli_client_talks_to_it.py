"""Simli's wire protocol: the unmodified `simli-ai` client, Pipecat's own service, and who is let in."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import numpy as np
import pytest
from aiohttp import ClientSession, web

from streamdiff.avatar.engine import AvatarEngine
from streamdiff.serve import simli as door
from streamdiff.serve.calls import Calls
from streamdiff.serve.cast import Cast
from streamdiff.serve.front import _NAMED
from streamdiff.serve.gate import Gate, Loopback
from streamdiff.serve.leases import Leases, Terms
from streamdiff.serve.limits import Limits
from streamdiff.serve.protocol import Ended, Ending, Stopped
from streamdiff.serve.server import House, application
from tests.adapters.orange import ORANGE, Orange
from tests.avatar.tiny_avatar import tiny_motion
from tests.serve.house import SECRET, Password
from tests.serve.test_workers_share_a_port import serving

if TYPE_CHECKING:
    from simli import SimliClient

HZ = door.RATE_HZ


class Place:
    """A server with the door, over real streams of a face that costs nothing."""

    def __init__(self, house: House, http: ClientSession, base: str) -> None:
        self.house, self.http, self.base = house, http, base
        self.events: list[Any] = []

    async def ticket(self, **config: Any) -> str:
        answer = await self.http.post(
            "/compose/token", json={"faceId": "demo", **config}, headers={"x-simli-api-key": SECRET}
        )
        assert answer.status == 200, await answer.text()
        return (await answer.json())["session_token"]

    @asynccontextmanager
    async def client(self, key: str = SECRET, **config: Any) -> AsyncIterator[SimliClient]:
        """The published client, connected."""
        from simli import SimliClient, SimliConfig

        client = SimliClient(key, SimliConfig(faceId="demo", **config), simliURL=self.base, retry_count=1)
        async with asyncio.timeout(60):
            await client.start()
        call = self.house.calls.all[-1]
        assert [peer.connected.is_set() for peer in self.house.peers[call.id]] == [True]
        call.subscribe(self.events.append)
        try:
            yield client
        finally:
            await client.stop()

    async def empty(self) -> None:
        """Wait until every seat is free."""
        await until(lambda: not self.house.calls.leases.held, "every seat is free")

    def told(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


async def until(holds: Callable[[], bool], what: str) -> None:
    for _ in range(3_000):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"never: {what}")


def play(
    scene: Callable[[Place], Awaitable[None]],
    *,
    gate: Gate | None = None,
    prefix: str = "",
    limits: Limits | None = None,
    **terms: float,
) -> None:
    async def main() -> None:
        engine = AvatarEngine(Orange(), motion=tiny_motion())
        with Cast({"demo": engine, "other": engine}) as cast:
            leases = Leases(Terms(**{"capacity": 2, **terms}), prefix=prefix)  # type: ignore[arg-type]
            calls = Calls(leases, cast.open)
            house = House(calls=calls, cast=cast, gate=gate or Password(), limits=limits)
            runner = web.AppRunner(application(house, [door.simli]), access_log=None, shutdown_timeout=2.0)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            base = f"http://127.0.0.1:{runner.addresses[0][1]}"
            try:
                async with calls, ClientSession(base) as http:
                    await asyncio.wait_for(scene(Place(house, http, base)), 100)
                    await calls.drain(0.0)
                    await house.aclose()
            finally:
                await runner.cleanup()

    asyncio.run(main())


def tone(seconds: float) -> bytes:
    return (0.3 * 32767 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * HZ)) / HZ)).astype("<i2").tobytes()


class Listener:
    """What reaches the client."""

    def __init__(self, client: SimliClient) -> None:
        from simli.events import SimliEvent

        self.sounds: list[np.ndarray] = []
        self.pictures: list[np.ndarray] = []
        self.words: list[str] = []
        self._tasks = [asyncio.ensure_future(work) for work in (self._hear(client), self._see(client))]
        for event in (SimliEvent.SPEAK, SimliEvent.SILENT):
            client.registerEventCallback(event, self._note(str(event)))

    def _note(self, word: str) -> Callable[[], Awaitable[None]]:
        async def note() -> None:
            self.words.append(word)

        return note

    async def _hear(self, client: SimliClient) -> None:
        async for frame in client.getAudioStreamIterator(HZ):
            self.sounds.append(frame.to_ndarray().reshape(-1, 2)[:, 0].astype(float))

    async def _see(self, client: SimliClient) -> None:
        async for frame in client.getVideoStreamIterator():
            self.pictures.append(frame.to_ndarray())

    @property
    def loud_s(self) -> float:
        """Seconds in which there was any sound."""
        sound_S = np.concatenate([np.zeros(0), *self.sounds])
        blocks = sound_S[: len(sound_S) // 160 * 160].reshape(-1, 160)
        return float((np.sqrt((blocks**2).mean(1)) > 600).sum()) * 160 / HZ

    async def heard(self, seconds: float) -> None:
        await until(lambda: self.loud_s >= seconds, f"{seconds} s are heard, {self.loud_s} are")

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@pytest.mark.slow
def test_the_published_client_is_heard_and_seen() -> None:
    async def scene(place: Place) -> None:
        async with place.client() as client:
            listener = Listener(client)
            await client.sendSilence()
            await until(lambda: len(listener.pictures) > 5, "pictures")
            assert listener.words == []  # the silence that keeps a connection warm is not spoken
            for _ in range(2):
                await client.send(tone(0.8))
                await until(lambda: listener.words[-1:] == ["silent"], "it has spoken")
                listener.words.append("")
            assert listener.words == ["speak", "silent", ""] * 2
            assert listener.loud_s == pytest.approx(1.6, abs=0.1)
            assert place.house.calls.all[0].session.metrics.segments == 2
            assert np.abs(listener.pictures[-1].reshape(-1, 3).mean(0) - ORANGE).max() < 12
            await listener.aclose()
        await place.empty()
        assert [event.reason for event in place.told(Ended)] == [Ending.LEFT]

    play(scene)


@pytest.mark.slow
def test_skip_and_play_immediate_stop_what_is_being_said() -> None:
    async def scene(place: Place) -> None:
        async with place.client() as client:
            listener = Listener(client)
            await client.send(tone(20.0))
            await listener.heard(0.5)
            await client.clearBuffer()
            await until(lambda: "silent" in listener.words, "it is silent")
            stopped_s, stopped = listener.loud_s, place.told(Stopped)[-1]
            assert 0.4 < stopped.heard_s < 10
            await client.send(tone(20.0))
            await listener.heard(stopped_s + 0.5)
            num_stopped = len(place.told(Stopped))
            await client.sendImmediate(tone(9.0))
            await until(lambda: len(place.told(Stopped)) > num_stopped, "the answer is stopped")
            before_s = listener.loud_s
            await listener.heard(before_s + 0.5)
            await listener.aclose()
        await place.empty()

    play(scene)


@pytest.mark.slow
def test_a_session_ends_for_the_reasons_that_the_client_knows() -> None:
    async def scene(place: Place) -> None:
        for config, reason, ending in (
            ({"maxIdleTime": 1}, "IDLE", Ending.IDLE),
            ({"maxSessionLength": 2}, "MAX", Ending.LIFETIME),
        ):
            async with place.client(**config) as client:
                assert client.Connection is not None
                connection = client.Connection
                await until(lambda connection=connection: connection.stopped, "the server ends it")
                assert client.stopReason == reason
            await place.empty()
            assert place.told(Ended)[-1].reason is ending

    play(scene)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["drained", "failed"])
def test_a_session_that_the_server_ends_says_why(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(place: Place) -> None:
        async with place.client() as client:
            assert client.Connection is not None
            connection = client.Connection
            if how == "drained":
                await place.house.calls.drain(0.0)
            else:
                monkeypatch.setattr(Orange, "render", broken)
            await until(lambda: connection.stopped, "the server ends it")
            assert client.stopReason == how.upper()
        await place.empty()
        assert [str(event.reason) for event in place.told(Ended)] == [how]

    def broken(*_: object) -> None:
        raise RuntimeError("the renderer broke")

    play(scene)


@pytest.mark.slow
def test_a_thousand_random_messages_end_nothing() -> None:
    generator = np.random.default_rng(0)
    prefixes = [b"", b"SKIP", b"PLAY_IMMEDIATE", b"CAM_", b"BG_", b"DONE!", b"{", b"\x00\x01"]

    async def scene(place: Place) -> None:
        async with place.client() as client:
            assert client.Connection is not None
            for _ in range(1_000):
                data = prefixes[generator.integers(len(prefixes))] + generator.bytes(int(generator.integers(0, 60)))
                is_text = bool(generator.integers(2))
                await client.Connection.wsConnection.send(data.decode("latin-1") if is_text else data)
            await client.clearBuffer()
            listener = Listener(client)
            await client.send(tone(0.6))
            await listener.heard(0.3)
            await listener.aclose()
        await place.empty()
        assert place.told(Ended)[-1].reason is Ending.LEFT

    play(scene)


@pytest.mark.slow
def test_pipecats_own_service_speaks_through_it() -> None:
    from pipecat.frames.frames import TTSAudioRawFrame, TTSStoppedFrame
    from pipecat.services.simli.video import SimliVideoService
    from pipecat.tests.utils import SleepFrame, run_test

    async def scene(place: Place) -> None:
        service = SimliVideoService(api_key=SECRET, face_id="demo", simli_url=place.base)
        voice = [TTSAudioRawFrame(tone(0.2), HZ, 1) for _ in range(4)]
        down, _ = await run_test(
            service, frames_to_send=[*voice, TTSStoppedFrame(), SleepFrame(4.0)], start_timeout=60.0
        )
        kinds = [type(frame).__name__ for frame in down]
        assert kinds.count("OutputImageRawFrame") > 25
        assert kinds.count("TTSAudioRawFrame") > 20
        await place.empty()

    play(scene)


@pytest.mark.slow
def test_clients_of_several_workers_each_find_their_own(tmp_path: Path) -> None:
    """`streamdiff serve --simli --workers 2`: a ticket that comes to the wrong process would be none."""
    from simli import SimliClient, SimliConfig

    async def scene(url: str) -> None:
        clients = [SimliClient("any", SimliConfig(faceId="demo"), simliURL=url, retry_count=1) for _ in range(4)]
        listeners = []
        async with asyncio.timeout(200):
            for client in clients:
                await client.start()
                listeners.append(Listener(client))
                await client.send(tone(1.0))
            for listener in listeners:
                await listener.heard(0.5)
        for client, listener in zip(clients, listeners, strict=True):
            await listener.aclose()
            await client.stop()

    with serving(tmp_path, "--simli", "--ear", "none") as (url, _):
        asyncio.run(scene(url))


@pytest.mark.slow
def test_a_wrong_key_and_an_unknown_face_are_told_in_the_clients_words() -> None:
    from simli import SimliAPIError, SimliClient, SimliConfig, SimliExceptions

    async def scene(place: Place) -> None:
        for key, face, status, code in (
            ("wrong", "demo", 401, SimliExceptions.INVALID_API_KEY),
            (SECRET, "nobody", 400, SimliExceptions.INVALID_FACE_ID),
        ):
            client = SimliClient(key, SimliConfig(faceId=face), simliURL=place.base, retry_count=1)
            with pytest.raises(SimliAPIError) as refused:
                await client.start()
            assert (refused.value.status_code, refused.value.code) == (status, code)
        assert place.house.calls.leases.held == ()

    play(scene)


def test_without_a_key_nothing_is_answered_and_nothing_leased() -> None:
    async def scene(place: Place) -> None:
        for headers in ({}, {"x-simli-api-key": ""}, {"x-simli-api-key": "wrong"}, {"Authorization": "Bearer wrong"}):
            body = {"faceId": "demo"}
            assert (await place.http.post("/compose/token", json=body, headers=headers)).status == 401
            assert (await place.http.get("/compose/ice", headers=headers)).status == 401
        for query in ("", "?session_token=", f"?session_token={SECRET}"):
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await place.http.ws_connect(f"/compose/webrtc/p2p{query}")
            assert refused.value.status == 401
        assert place.house.calls.leases.held == ()
        ice = await place.http.get("/compose/ice", headers={"Authorization": f"Bearer {SECRET}"})
        assert await ice.json() == []

    play(scene)


def test_a_ticket_opens_one_session_once_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(place: Place) -> None:
        used = await place.ticket()
        socket = await place.http.ws_connect(f"/compose/webrtc/p2p?session_token={used}")
        assert len(place.house.calls.leases.held) == 1
        with pytest.raises(aiohttp.WSServerHandshakeError, match="401"):
            await place.http.ws_connect(f"/compose/webrtc/p2p?session_token={used}")
        await socket.close()
        monkeypatch.setattr(door, "TICKET_S", -1.0)
        late = await place.ticket()
        with pytest.raises(aiohttp.WSServerHandshakeError, match="401"):
            await place.http.ws_connect(f"/compose/webrtc/p2p?session_token={late}")
        await place.empty()

    play(scene)


def test_tickets_that_nobody_uses_are_bounded() -> None:
    async def scene(place: Place) -> None:
        for _ in range(32):
            await place.ticket()
        headers = {"x-simli-api-key": SECRET}
        answer = await place.http.post("/compose/token", json={"faceId": "demo"}, headers=headers)
        assert answer.status == 503
        assert answer.headers["Retry-After"] == "60"

    play(scene)


def test_a_ticket_names_the_worker_that_gave_it() -> None:
    async def scene(place: Place) -> None:
        named = _NAMED.fullmatch((await place.ticket()).encode())
        assert named is not None
        assert (named[1], named[2]) == (b"3", b"12")

    play(scene, prefix="w3g12.")


def test_tickets_asked_for_too_often_are_refused() -> None:
    async def scene(place: Place) -> None:
        for _ in range(2):
            await place.ticket()
        headers = {"x-simli-api-key": SECRET}
        answer = await place.http.post("/compose/token", json={"faceId": "demo"}, headers=headers)
        assert answer.status == 429

    play(scene, limits=Limits(2))


def test_a_full_house_is_told_before_the_websocket() -> None:
    async def scene(place: Place) -> None:
        first = await place.http.ws_connect(f"/compose/webrtc/p2p?session_token={await place.ticket()}")
        with pytest.raises(aiohttp.WSServerHandshakeError, match="503"):
            await place.http.ws_connect(f"/compose/webrtc/p2p?session_token={await place.ticket()}")
        await first.close()
        await place.empty()

    play(scene, capacity=1)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"faceId": 7}', b'{"faceId": "demo", "maxIdleTime": "long"}', b" " * 20_000]
)
def test_a_body_that_asks_for_nothing_sensible_is_refused(body: bytes) -> None:
    async def scene(place: Place) -> None:
        answer = await place.http.post("/compose/token", data=body)
        assert answer.status == 400

    play(scene, gate=Loopback())


@pytest.mark.parametrize(
    "offer", ["", "no offer", '{"type": "answer", "sdp": ""}', '{"sdp": 1, "type": "offer"}', "[]"]
)
def test_a_first_message_that_is_no_offer_ends_the_session(offer: str) -> None:
    async def scene(place: Place) -> None:
        socket = await place.http.ws_connect(f"/compose/webrtc/p2p?session_token={await place.ticket()}")
        await socket.send_str(offer)
        assert (await socket.receive_str(timeout=20)).startswith("ERROR: ")
        assert (await socket.receive(timeout=20)).type is aiohttp.WSMsgType.CLOSE
        await place.empty()

    play(scene)


@pytest.mark.slow
def test_odd_messages_are_answered_and_harm_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async def scene(place: Place) -> None:
        async with place.client() as client:
            listener = Listener(client)
            with caplog.at_level(logging.WARNING, logger="simli_client"):
                for message in ("ping", "CAM_", "hello", "x" * 200_000, b"BG_", b"\x01", b""):
                    assert client.Connection is not None
                    await client.Connection.wsConnection.send(message)
                odd = tone(0.4)
                for at in range(0, len(odd), 333):
                    await client.Connection.wsConnection.send(odd[at : at + 333])
                await listener.heard(0.3)
                await until(lambda: "unknown message of 200000" in caplog.text, "the last answer")
            assert max(sound_S.max() for sound_S in listener.sounds) < 0.4 * 32767  # shifted by a byte it is noise
            for said in ("pong", "does not support cameras", "unknown message of 5"):
                assert said in caplog.text
            await listener.aclose()
        await place.empty()

    play(scene)


def test_an_offer_in_json_is_read() -> None:
    message = aiohttp.WSMessage(aiohttp.WSMsgType.BINARY, json.dumps({"sdp": "v=0", "type": "offer"}).encode(), None)
    assert door._offer(message) == "v=0"
