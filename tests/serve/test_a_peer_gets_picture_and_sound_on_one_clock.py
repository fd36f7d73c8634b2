"""WebRTC between two ends of one process: the other end is aiortc's own."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Awaitable, Callable
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from aiortc import MediaStreamTrack, RTCPeerConnection, RTCSessionDescription
from aiortc.rtp import RtpPacket

from streamdiff.serve.calls import Call, Calls, Reader
from streamdiff.serve.leases import Leases, Terms
from streamdiff.serve.protocol import Caption, Ended, Ending, Say, render
from streamdiff.serve.webrtc import AsItComes, Bucket, Peer
from tests.serve.scripted import Stage


class Far:
    """The viewer's end."""

    def __init__(self) -> None:
        self.pc = RTCPeerConnection()
        self.tracks: dict[str, Any] = {}
        self.events: list[dict[str, Any]] = []
        self.pc.addTransceiver("video", direction="recvonly")
        self.pc.addTransceiver("audio", direction="recvonly")
        self.channel = self.pc.createDataChannel("events")
        self.channel.on("message", lambda text: self.events.append(json.loads(text)))
        self.pc.on("track", lambda track: self.tracks.__setitem__(track.kind, track))

    async def join(self, peer: Peer) -> None:
        await self.pc.setLocalDescription(await self.pc.createOffer())
        answer = await peer.answer(self.pc.localDescription.sdp)
        await self.pc.setRemoteDescription(RTCSessionDescription(answer, "answer"))

    async def until(self, kind: str) -> dict[str, Any]:
        for _ in range(500):
            for event in self.events:
                if event["type"] == kind:
                    return event
            await asyncio.sleep(0.02)
        raise AssertionError(f"no {kind} among {self.events}")


def meet(scene: Callable[[Calls, Call], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        codec = options.pop("codec", "vp8")
        async with Calls(Leases(Terms(capacity=1)), Stage(side=64, **options), codec=codec) as calls:
            await asyncio.wait_for(scene(calls, await calls.open("ann")), 40)

    asyncio.run(main())


@pytest.mark.heavy
@pytest.mark.parametrize("codec", ["vp8", "h264"])
def test_picture_and_sound_arrive_and_say_when_they_belong(codec: str) -> None:
    async def scene(calls: Calls, call: Call) -> None:
        far, peer = Far(), Peer(call)
        await far.join(peer)
        pictures = [await far.tracks["video"].recv() for _ in range(8)]
        sounds = [await far.tracks["audio"].recv() for _ in range(8)]
        assert {(p.width, p.height) for p in pictures} == {(64, 64)}
        gaps = {Fraction(b.pts - a.pts) * b.time_base for a, b in itertools.pairwise(pictures)}
        # On a busy machine the stream may fall behind: both clocks then move on by whole blocks of 20 ms.
        assert min(gaps) == Fraction(1, 25)
        assert all((50 * gap).denominator == 1 for gap in gaps)
        steps = {Fraction(b.pts - a.pts) * b.time_base for a, b in itertools.pairwise(sounds)}
        assert min(steps) == Fraction(1, 50)
        assert all((50 * step).denominator == 1 for step in steps)
        assert call.pump.num_viewers == 1
        assert call.lease.num_viewers == 1
        await far.pc.close()
        await peer.aclose()
        assert call.lease.num_viewers == 0

    meet(scene, codec=codec)


def test_messages_pass_both_ways() -> None:
    async def scene(calls: Calls, call: Call) -> None:
        far, peer = Far(), Peer(call)
        await far.join(peer)
        assert (await far.until("ready"))["session"] == call.id
        far.channel.send(render(Say("Some words.")))
        assert (await far.until("caption"))["text"] == "Some words."
        far.channel.send("{not json")
        assert (await far.until("problem"))["code"] == "malformed"
        peak = 0
        began_s = time.monotonic()
        while peak < 1_000 and time.monotonic() - began_s < 10:
            peak = max(peak, int(np.abs((await far.tracks["audio"].recv()).to_ndarray()).max()))
        assert peak >= 1_000
        await calls.end(call, Ending.IDLE)
        assert (await far.until("ended"))["reason"] == "idle"
        await far.pc.close()
        for _ in range(100):
            if peer.is_closed:
                return
            await asyncio.sleep(0.05)
        raise AssertionError("the connection stands after the end of the call")

    meet(scene)


@pytest.mark.heavy
def test_a_request_for_a_keyframe_is_heard() -> None:
    async def scene(calls: Calls, call: Call) -> None:
        far, peer = Far(), Peer(call)
        await far.join(peer)
        for _ in range(3):
            await far.tracks["video"].recv()
        (receiver,) = [t.receiver for t in far.pc.getTransceivers() if t.kind == "video"]
        await asyncio.sleep(0.6)
        before = call.pump.num_keys
        (sender,) = [t.sender for t in peer._pc.getTransceivers() if t.kind == "video"]
        await receiver._send_rtcp_pli(sender._ssrc)
        for _ in range(20):
            await far.tracks["video"].recv()
        assert call.pump.num_keys == before + 1
        await far.pc.close()
        await peer.aclose()

    meet(scene)


class ThreeBlocks(MediaStreamTrack):
    """A microphone that falls silent after 60 ms."""

    kind = "audio"

    def __init__(self) -> None:
        super().__init__()
        self._num = 0

    async def recv(self) -> Any:
        if self._num == 3:
            await asyncio.Event().wait()
        frame = av.AudioFrame.from_ndarray(np.full((1, 960), 9_000, np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 48_000, 960 * self._num, Fraction(1, 48_000)
        self._num += 1
        return frame


class Listener(Reader):
    """Counts the seconds that it hears."""

    hears = True

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.heard_s = 0.0
        self.heard = asyncio.Event()

    def hear(self, samples_S: Any, rate_hz: int) -> None:
        self.heard_s += len(samples_S) / rate_hz
        if self.heard_s >= 0.04:
            self.heard.set()


def test_a_microphone_is_heard_before_more_of_it_comes() -> None:
    async def scene(calls: Calls, call: Call) -> None:
        listener = call.talk = Listener(call)
        far, peer = Far(), Peer(call)
        far.pc.addTrack(ThreeBlocks())
        await far.join(peer)
        async with asyncio.timeout(20):
            await listener.heard.wait()
        await far.pc.close()
        await peer.aclose()

    meet(scene)


def test_a_packet_that_was_overtaken_is_dropped_and_a_new_count_is_followed() -> None:
    buffer = AsItComes()

    def add(number: int) -> bool:
        packet = RtpPacket(sequence_number=number, timestamp=number * 960)
        packet._data = b"opus"  # type: ignore[attr-defined]
        key_wanted, frame = buffer.add(packet)
        assert not key_wanted
        assert frame is None or (frame.data, frame.timestamp) == (b"opus", number * 960)
        return frame is not None

    assert [add(number) for number in (65_534, 0, 65_535, 0, 1)] == [True, True, False, False, True]
    assert [add(number) for number in (40_000, 39_990, 39_000, 39_001)] == [True, False, True, True]


def test_a_flood_of_messages_is_not_read() -> None:
    async def scene(calls: Calls, call: Call) -> None:
        heard: list[object] = []
        call.subscribe(heard.append)
        peer = Peer(call)
        for _ in range(1_000):
            peer._on_message('{"type": "listen", "listening": true}')
        peer._on_message(render(Say("Not read.")))
        assert not [event for event in heard if isinstance(event, Caption)]
        assert sum(getattr(event, "code", "") == "too_fast" for event in heard) == 1
        await peer.aclose()
        await calls.end(call, Ending.LEFT)
        assert heard[-1] == Ended(Ending.LEFT)

    meet(scene)


def test_a_bucket_fills_again() -> None:
    bucket = Bucket(50)
    assert sum(bucket.take() for _ in range(60)) in (50, 51)
    time.sleep(0.1)
    assert bucket.take()
