"""SDP over HTTP: the `openai` client's calls, and WHEP for further viewers. The far end is aiortc's own."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiortc import RTCIceServer, RTCPeerConnection, RTCSessionDescription
from openai import APIStatusError, AsyncOpenAI, AuthenticationError

from streamdiff.serve.protocol import Say
from streamdiff.serve.realtime import realtime
from streamdiff.serve.realtime_calls import realtime_calls
from streamdiff.serve.server import Door
from streamdiff.serve.whep import whep
from tests.serve.house import SECRET, Password, Place, Scene, play

SDP = {"Content-Type": "application/sdp"}


class Far:
    """The viewer's end. ``kinds``: of the media that it asks for."""

    def __init__(self, *kinds: str, channel: bool = True) -> None:
        self.pc = RTCPeerConnection()
        self.tracks: dict[str, Any] = {}
        self.events: list[dict[str, Any]] = []
        for kind in kinds:
            self.pc.addTransceiver(kind, direction="recvonly")
        self.channel = self.pc.createDataChannel("oai-events") if channel else None
        if self.channel is not None:
            self.channel.on("message", lambda text: self.events.append(json.loads(text)))
        self.pc.on("track", lambda track: self.tracks.__setitem__(track.kind, track))

    async def offer(self) -> str:
        await self.pc.setLocalDescription(await self.pc.createOffer())
        return self.pc.localDescription.sdp

    async def take(self, answer_sdp: str) -> None:
        await self.pc.setRemoteDescription(RTCSessionDescription(answer_sdp, "answer"))

    def send(self, event: dict[str, Any]) -> None:
        assert self.channel is not None
        self.channel.send(json.dumps(event))

    async def until(self, kind: str) -> dict[str, Any]:
        async with asyncio.timeout(20):
            while True:
                for event in self.events:
                    if event["type"] == kind:
                        return event
                await asyncio.sleep(0.02)


def run(scene: Scene, *doors: Door, **options: Any) -> Any:
    return play(scene, *(doors or (realtime, realtime_calls, whep)), side=64, **options)


def client(place: Place, key: str = SECRET) -> AsyncOpenAI:
    return AsyncOpenAI(api_key=key, base_url=f"{place.base}/v1", max_retries=0)


@pytest.mark.heavy
def test_the_openai_client_calls_and_its_events_come_over_the_data_channel() -> None:
    async def scene(place: Place) -> None:
        far = Far("audio", "video")
        session: Any = {"type": "realtime", "model": "face", "streamdiff": {"avatar": "other"}}
        openai = client(place)
        answer = await openai.realtime.calls.create(sdp=await far.offer(), session=session)
        assert answer.response.status_code == 201
        assert answer.response.headers["Content-Type"] == "application/sdp"
        call_id = answer.response.headers["Location"].removeprefix("/v1/realtime/calls/")
        await far.take(answer.text)
        created = await far.until("session.created")
        assert (created["session"]["id"], created["session"]["model"]) == (call_id, "face")
        for event in say("three short words"):
            far.send(event)
        await far.until("output_audio_buffer.started")
        async with asyncio.timeout(10):
            loudest = 0
            while loudest < 3_000:
                loudest = int(np.abs((await far.tracks["audio"].recv()).to_ndarray()).max())
            assert (await far.tracks["video"].recv()).width == 64
        done = await far.until("response.done")
        assert done["response"]["status"] == "completed"
        await far.until("output_audio_buffer.stopped")
        kinds = {event["type"] for event in far.events}
        assert not kinds & {"response.output_audio.delta", "streamdiff.video.delta", "error"}
        async with openai.realtime.connect(call_id=call_id) as side:
            assert (await side.recv()).session.id == call_id
        await openai.realtime.calls.hangup(call_id)
        await openai.close()
        await far.until("streamdiff.session.ended")
        assert place.house.calls.all == ()
        await far.pc.close()

    run(scene, gate=Password())


def say(text: str) -> list[dict[str, Any]]:
    content = [{"type": "input_text", "text": text}]
    item = {"type": "message", "role": "user", "content": content}
    return [{"type": "conversation.item.create", "item": item}, {"type": "response.create"}]


@pytest.mark.heavy
def test_an_interruption_over_webrtc_says_what_was_heard_and_clears() -> None:
    async def scene(place: Place) -> None:
        far = Far("audio")
        answer = await place.http.post("/v1/realtime/calls", data=await far.offer(), headers=SDP)
        await far.take(await answer.text())
        await far.until("session.created")
        for event in say("word " * 50):
            far.send(event)
        await far.until("output_audio_buffer.started")
        await asyncio.sleep(0.3)
        far.send({"type": "output_audio_buffer.clear"})
        await far.until("output_audio_buffer.cleared")
        truncated = await far.until("conversation.item.truncated")
        assert 0 < truncated["audio_end_ms"] < 5_000
        far.send({"type": "session.update", "session": {"streamdiff": {"video": True}}})
        assert (await far.until("error"))["error"]["code"] == "unsupported"
        call = place.house.calls.all[0]
        assert not place.house.peers[call.id][0]._feed._pictures  # nobody takes them: they would ask for keyframes
        await far.pc.close()

    run(scene)


@pytest.mark.heavy
def test_further_viewers_watch_by_whep_until_they_leave() -> None:
    async def scene(place: Place) -> None:
        place.house.ice_servers = [RTCIceServer("turn:turn.invalid:3478", username="ann", credential="pass")]
        call = await place.house.calls.open("local")
        path = f"/v1/sessions/{call.id}/whep"
        fars, viewers = [Far("video", "audio", channel=False), Far("video", "audio")], []
        for far in fars:
            answer = await place.http.post(path, data=await far.offer(), headers=SDP)
            assert (answer.status, answer.content_type) == (201, "application/sdp")
            assert answer.headers["Link"].startswith('<turn:turn.invalid:3478>; rel="ice-server"; username="ann"')
            viewers.append(answer.headers["Location"])
            await far.take(await answer.text())
        place.house.ice_servers = []
        assert viewers[0].startswith(path + "/")
        async with asyncio.timeout(20):
            for far in fars:
                assert (await far.tracks["video"].recv()).width == 64
        call.do(Say("hello"))
        fars[1].send({"type": "bye"})
        refused = await place.http.patch(viewers[0], data="a=ice-ufrag:x", headers=SDP)
        assert (refused.status, refused.headers["Allow"]) == (405, "DELETE")
        assert (await place.http.delete(viewers[0])).status == 200
        assert (await place.http.delete(viewers[0])).status == 404
        assert call.pump.num_viewers == 1
        assert (await fars[1].tracks["video"].recv()).width == 64
        assert call.wants_end is None  # a viewer says nothing
        assert fars[1].events == []
        for far in fars:
            await far.pc.close()

    run(scene)


@pytest.mark.parametrize("path", ["/v1/realtime/calls", "/v1/sessions/{id}/whep"])
def test_what_is_no_offer_is_refused_and_holds_no_seat(path: str) -> None:
    async def scene(place: Place) -> None:
        call = await place.house.calls.open("local")
        where = path.format(id=call.id)
        sdp = "v=0\r\no=- 0 0 IN IP4 0.0.0.0\r\ns=-\r\nt=0 0\r\nm=video x y z\r\n"
        for body, headers, status in (
            (b"{}", {"Content-Type": "application/json"}, 415),
            (b"", {}, 415),
            (b"v=0", SDP, 400),
            (sdp.encode(), SDP, 400),
            (b"\xff\xfe", SDP, 400),
            (b"x" * 65_537, SDP, 400),
        ):
            answer = await place.http.post(where, data=body, headers=headers)
            assert answer.status == status, await answer.text()
        assert place.house.calls.all == (call,)

    run(scene)


def form(**fields: str | bytes) -> aiohttp.MultipartWriter:
    writer = aiohttp.MultipartWriter("form-data")
    for name, value in fields.items():
        writer.append(value).set_content_disposition("form-data", name=name)
    return writer


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"session": "{}"}, "needs a field sdp"),
        ({"sdp": "v=0", "session": "["}, "JSON object"),
        ({"sdp": "v=0", "session": "[" * 100_000}, "JSON object"),
        ({"sdp": "v=0", "session": '{"streamdiff": 1}'}, "JSON object"),
        ({"sdp": "v=0", "session": '{"streamdiff": {"avatar": 1}}'}, "names"),
        ({"sdp": "v=0", "session": '{"audio": {"output": {"format": {"rate": 8000}}}}'}, "24000 Hz"),
        ({"sdp": "v=0", "session": "x" * 131_073}, "more than 131072 bytes"),
        ({"sdp": "v" * 65_537}, "more than 65536 bytes"),
        ({"sdp": b"\xff"}, "offer is text"),
        ({str(k): "x" for k in range(5)}, "more than sdp and session"),
    ],
)
def test_a_form_is_read_within_bounds_and_checked(fields: dict[str, str], says: str) -> None:
    async def scene(place: Place) -> None:
        answer = await place.http.post("/v1/realtime/calls", data=form(**fields))
        assert answer.status == 400
        assert says in (await answer.json())["error"]["message"]
        assert place.house.calls.leases.held == ()

    assert run(scene).streams == []


def test_nobody_calls_or_watches_without_a_token() -> None:
    async def scene(place: Place) -> None:
        for path in ("/v1/realtime/calls", "/v1/realtime/calls/x/hangup", "/v1/sessions/x/whep"):
            assert (await place.http.post(path, data=b"x" * 1_000, headers=SDP)).status == 401
        assert (await place.http.delete("/v1/sessions/x/whep/y")).status == 401
        async with client(place, "wrong") as stranger:
            with pytest.raises(AuthenticationError):
                await stranger.realtime.calls.create(sdp="v=0")
        call = await place.house.calls.open("bob")
        ann = {"Authorization": f"Bearer {SECRET}"}
        for path in (f"/v1/sessions/{call.id}/whep", f"/v1/realtime/calls/{call.id}/hangup"):
            assert (await place.http.post(path, data=b"v=0", headers=SDP | ann)).status == 404
        async with client(place) as openai:
            with pytest.raises(APIStatusError) as refused:
                await openai.realtime.calls.create(sdp="v=0")
        assert refused.value.status_code == 400

    assert len(run(scene, gate=Password()).streams) == 2
