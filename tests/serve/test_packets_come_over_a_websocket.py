"""Packets over a WebSocket, for pages that WebRTC does not reach; messages as text beside them."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from typing import Any

import aiohttp
import av
import numpy as np
import pytest

from streamdiff.serve.calls import Call, Reader
from streamdiff.serve.media import media
from streamdiff.serve.protocol import Append, Ending, Say, render
from tests.serve.house import SECRET, Password, Place, play
from tests.serve.scripted import FPS

KEY = f"openai-insecure-api-key.{SECRET}"


def test_packets_decode_and_lie_on_one_clock_and_messages_go_both_ways() -> None:
    async def scene(place: Place) -> None:
        call = await place.house.calls.open("ann")
        url = f"/v1/sessions/{call.id}/media"
        pictures: list[tuple[float, Any]] = []
        sounds: list[tuple[float, Any]] = []
        video, opus = av.CodecContext.create("vp8", "r"), av.CodecContext.create("libopus", "r")
        opus.sample_rate, opus.layout = 48_000, "mono"
        events: list[dict[str, Any]] = []
        async with place.http.ws_connect(url, protocols=("streamdiff", KEY)) as socket:
            assert socket.protocol == "streamdiff"
            await socket.send_str(render(Say("hello there")))
            while not any(event.get("state") == "idle" for event in events[2:]):
                message = await socket.receive(timeout=20)
                if message.type is aiohttp.WSMsgType.TEXT:
                    events.append(json.loads(message.data))
                    continue
                kind, at_us = struct.unpack_from("<B7xd", message.data)
                packet = av.Packet(message.data[16:])
                if kind == 2:
                    sounds += [(at_us, f.to_ndarray()) for f in opus.decode(packet)]
                else:
                    assert (kind == 1) is (not pictures)
                    pictures += [(at_us, f.to_ndarray(format="rgb24")) for f in video.decode(packet)]
            assert call.pump.num_viewers == 1
            await place.house.calls.end(call, Ending.REVOKED)
            while (message := await socket.receive(timeout=20)).type is not aiohttp.WSMsgType.CLOSE:
                events += [json.loads(message.data)] if message.type is aiohttp.WSMsgType.TEXT else []
            assert (message.data, message.extra) == (1008, "revoked")
        assert [event["type"] for event in events[:2]] == ["ready", "status"]
        assert events[-1] == {"type": "ended", "reason": "revoked", "text": ""}
        # The same places as the pump gave them: a frame every 40 ms, a block every 20, on a clock that both share.
        steps_us = np.diff([at_us for at_us, _ in pictures])
        assert np.allclose(np.remainder(steps_us + 1, 20_000), 1, atol=0.5)
        assert np.isclose(np.min(steps_us), 1e6 / FPS)
        assert np.isclose(np.min(np.diff([at_us for at_us, _ in sounds])), 20_000)
        bright = [at_us for at_us, frame in pictures if frame.mean() > 150]
        peaks = [(at_us, float(np.abs(sound).max())) for at_us, sound in sounds]
        loud = [at_us for at_us, peak in peaks if peak > 0.3 * max(peak for _, peak in peaks)]
        assert abs(bright[0] - loud[0]) <= 40_000
        assert abs(bright[-1] - loud[-1]) <= 60_000

    play(scene, media, gate=Password(), side=64)


class Listener(Reader):
    """Keeps what it hears."""

    hears = True

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.heard: list[tuple[Any, int]] = []

    def hear(self, samples_S: Any, rate_hz: int) -> None:
        self.heard.append((samples_S, rate_hz))


def test_a_microphone_is_carried_as_text_and_what_is_no_sound_is_told() -> None:
    async def scene(place: Place) -> None:
        call = await place.house.calls.open("ann")
        listener = call.talk = Listener(call)
        spoken_S = np.arange(-480, 480, 2, dtype="<i2") * 60
        bad = ("@@@@", base64.b64encode(b"odd").decode(), "AAD/")
        async with place.http.ws_connect(f"/v1/sessions/{call.id}/media", protocols=("streamdiff", KEY)) as socket:
            for audio in (*bad, base64.b64encode(spoken_S.tobytes()).decode()):
                await socket.send_str(render(Append(audio)))
            problems: list[dict[str, Any]] = []
            async with asyncio.timeout(20):
                while len(problems) < len(bad) or not listener.heard:
                    message = await socket.receive()
                    if (
                        message.type is aiohttp.WSMsgType.TEXT
                        and (event := json.loads(message.data))["type"] == "problem"
                    ):
                        problems.append(event)
        assert {problem["text"] for problem in problems} == {"audio must be base64 of little-endian int16 samples"}
        [(samples_S, rate_hz)] = listener.heard
        assert rate_hz == 24_000
        assert np.array_equal(samples_S * 32_768, spoken_S)

    play(scene, media, gate=Password())


def test_only_the_owner_of_a_session_gets_its_packets_and_only_messages_are_read() -> None:
    async def scene(place: Place) -> None:
        call, other = await place.house.calls.open("ann"), await place.house.calls.open("bob")
        url = f"/v1/sessions/{call.id}/media"
        for protocols, path, status in (
            ((), url, 401),
            (("streamdiff",), url, 401),
            ((KEY,), url, 400),
            (("streamdiff", KEY), f"/v1/sessions/{other.id}/media", 404),
        ):
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await place.http.ws_connect(path, protocols=protocols)
            assert refused.value.status == status
        assert call.pump.num_viewers == 0
        async with place.http.ws_connect(url, protocols=("streamdiff", KEY)) as socket:
            await socket.send_str('{"type": "say"}')
            async with asyncio.timeout(20):
                while (message := await socket.receive()).type is not aiohttp.WSMsgType.TEXT or (
                    json.loads(message.data)["type"] != "problem"
                ):
                    pass
            await socket.send_bytes(b"\0")
            async with asyncio.timeout(20):
                while (await socket.receive()).type is not aiohttp.WSMsgType.CLOSE:
                    pass
            assert socket.close_code == 1008
        async with asyncio.timeout(20):
            while call.pump.num_viewers:
                await asyncio.sleep(0.02)
        assert place.house.calls.find(call.id) is call

    play(scene, media, gate=Password())
