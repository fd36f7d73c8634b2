"""Who is let in over a WebSocket, and how a connection ends: with a code that says why, whoever ends it."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from typing import Any

import aiohttp
import pytest

from streamdiff.serve.protocol import Ending, Say
from streamdiff.serve.realtime import realtime
from streamdiff.serve.realtime_events import MAX_EVENT_BYTES
from streamdiff.serve.websocket import Outbox
from tests.serve.house import SECRET, Password, Place, play

KEY = f"openai-insecure-api-key.{SECRET}"


async def closing(connection: aiohttp.ClientWebSocketResponse) -> tuple[int | None, list[dict[str, Any]]]:
    """The code that the server closes with, and the events before."""
    events: list[dict[str, Any]] = []
    async with asyncio.timeout(30):
        async for message in connection:
            events.append(json.loads(message.data))
    return connection.close_code, events


def test_a_browser_brings_its_token_as_a_subprotocol_and_no_log_holds_it(caplog: pytest.LogCaptureFixture) -> None:
    async def scene(place: Place) -> None:
        url = f"{place.base}/v1/realtime"
        async with aiohttp.ClientSession() as http:
            async with http.ws_connect(url, protocols=("realtime", KEY)) as connection:
                assert connection.protocol == "realtime"
                assert (await connection.receive_json())["type"] == "session.created"
            for protocols, status in (((KEY,), 400), (("realtime",), 401), ((), 401), (("realtime", KEY + "x"), 401)):
                with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                    await http.ws_connect(url, protocols=protocols)
                assert refused.value.status == status
            assert (await http.get(url, headers={"Authorization": f"Bearer {SECRET}"})).status == 426
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await http.ws_connect(url, protocols=("realtime", KEY), headers={"Origin": "https://evil.example"})
            assert refused.value.status == 403

    with caplog.at_level(logging.DEBUG):
        engine = play(scene, realtime, gate=Password())
    assert len(engine.streams) == 1
    assert SECRET not in caplog.text


@pytest.mark.parametrize("broken", [b"\x00\x01", "no json", "[]"])
def test_who_does_not_speak_realtime_is_closed_with_1008(broken: str | bytes) -> None:
    async def scene(place: Place) -> None:
        async with aiohttp.ClientSession() as http, http.ws_connect(f"{place.base}/v1/realtime") as connection:
            await (connection.send_bytes(broken) if isinstance(broken, bytes) else connection.send_str(broken))
            code, events = await closing(connection)
            assert code == 1008
            assert [event["type"] for event in events][:1] == ["session.created"]
            assert isinstance(broken, bytes) or events[-1]["error"]["type"] == "invalid_request_error"
        async with asyncio.timeout(10):
            while place.house.calls.all:
                await asyncio.sleep(0.02)

    assert play(scene, realtime).streams[0].closed


def test_an_event_that_is_too_long_is_not_read() -> None:
    async def scene(place: Place) -> None:
        async with aiohttp.ClientSession() as http, http.ws_connect(f"{place.base}/v1/realtime") as connection:
            await connection.send_str(json.dumps({"type": "x", "audio": "A" * MAX_EVENT_BYTES}))
            assert (await closing(connection))[0] == 1009

    play(scene, realtime)


@pytest.mark.parametrize(("ending", "code"), [(Ending.IDLE, 1001), (Ending.REVOKED, 1008), (Ending.FINISHED, 1000)])
def test_a_session_that_is_over_closes_its_connections(ending: Ending, code: int) -> None:
    async def scene(place: Place) -> None:
        async with aiohttp.ClientSession() as http, http.ws_connect(f"{place.base}/v1/realtime") as connection:
            await connection.receive_json()
            await place.house.calls.end(place.house.calls.all[0], ending)
            closed, events = await closing(connection)
            assert [(event["type"], event["reason"]) for event in events] == [
                ("streamdiff.session.ended", ending.value)
            ]
            assert closed == code

    play(scene, realtime)


def test_who_says_goodbye_ends_the_session_and_who_is_lost_keeps_it() -> None:
    async def scene(place: Place) -> None:
        async with aiohttp.ClientSession() as http:
            lost = await http.ws_connect(f"{place.base}/v1/realtime")
            await lost.receive_json()
            assert lost._response.connection is not None
            lost._response.connection.transport.abort()
            async with http.ws_connect(f"{place.base}/v1/realtime") as connection:
                await connection.receive_json()
            count = place.house.calls.meters.registry.get_sample_value
            async with asyncio.timeout(10):
                while count("streamdiff_sessions_ended_total", {"reason": "left"}) != 1:
                    await asyncio.sleep(0.02)
                while place.house.calls.all[0].pump.num_viewers:
                    await asyncio.sleep(0.02)
            assert len(place.house.calls.leases.held) == 1

    play(scene, realtime)


def test_an_outbox_loses_pictures_first_and_gives_a_client_up_when_sound_piles_up() -> None:
    async def main() -> None:
        outbox = Outbox(sounds_per_s=25)
        assert all(outbox.put("picture", b"p") for _ in range(25))
        assert outbox.put("sound", "s")
        assert not outbox.put("picture", b"p")  # all that waited are forgotten: the next can only be a keyframe
        assert outbox.num_lost == 26
        assert await outbox.next() == "s"
        assert outbox.put("picture", b"q")
        assert all(outbox.put("sound", "s") for _ in range(125))
        assert not outbox.is_closing
        assert not outbox.put("sound", "s")
        assert (outbox.code, outbox.is_slow, await outbox.next()) == (1013, True, None)

    asyncio.run(main())


@pytest.mark.slow
def test_a_client_that_does_not_read_is_closed_with_1013_and_delays_nobody() -> None:
    async def scene(place: Place) -> None:
        plug = socket.socket()
        plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        plug.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(plug, ("127.0.0.1", place.port))
        upgrade = (
            f"GET /v1/realtime HTTP/1.1\r\nHost: 127.0.0.1:{place.port}\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        await loop.sock_sendall(plug, upgrade.encode())
        async with asyncio.timeout(10):
            while not place.house.calls.all:
                await asyncio.sleep(0.02)
        call = place.house.calls.all[0]
        async with aiohttp.ClientSession() as http:
            url = f"{place.base}/v1/realtime?call_id={call.id}"
            async with http.ws_connect(url) as reader:
                call.do(Say("word " * 200))
                frames: list[int] = []
                async with asyncio.timeout(100):
                    while call.pump.num_viewers > 1:
                        event = await reader.receive_json()
                        if event["type"] == "response.output_audio.delta":
                            frames.append(event["frame"])
                assert frames == list(range(frames[0], frames[0] + len(frames)))
                # What lay in the buffers arrives late, and after it the reason.
                data = b""
                async with asyncio.timeout(20):
                    while part := await loop.sock_recv(plug, 1 << 16):
                        data += part
                assert data.endswith(b"\x03\xf5too slow")
                assert len(data) < 2_000_000
        plug.close()

    play(scene, realtime, word_s=0.4)
