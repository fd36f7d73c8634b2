"""`streamdiff.client` against a server on a loopback port: frames with their sound, interruption, and clear errors."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import re
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web

import streamdiff.serve
from streamdiff import client
from streamdiff.client.frames import Frames
from streamdiff.client.opening import address
from streamdiff.conversation.mind import ScriptedMind
from streamdiff.errors import InputError, SessionClosed, Unsupported
from streamdiff.serve.encoder import Codec, VideoEncoder
from streamdiff.serve.protocol import Ending, Stopped
from streamdiff.serve.realtime import realtime
from streamdiff.serve.talk import talking
from tests.serve.house import SECRET, Ear, Password, Place, play
from tests.serve.scripted import FPS

SAMPLES = 24_000 // FPS


def test_the_example_of_the_readme_runs() -> None:
    text = (Path(streamdiff.serve.__file__).parent / "README.md").read_text(encoding="utf-8")
    (example,) = (
        code for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "client.connect(" in code
    )
    out = io.StringIO()

    def run(port: int) -> None:
        source = example.replace(":8100", f":{port}").replace("pts_s > 2", "pts_s > 0.5")
        with contextlib.redirect_stdout(out):
            exec(compile(source, "README.md", "exec"), {"__name__": "example"})

    async def scene(place: Place) -> None:
        await asyncio.to_thread(run, place.port)

    play(scene, realtime, word_s=0.8)
    lines = out.getvalue().splitlines()
    assert re.fullmatch(r"[\d.]+ \(32, 32, 3\) 960 \w+", lines[0])
    heard_s = float(lines[-1].split()[-1])
    assert abs(heard_s - sum("item_" in line for line in lines) / FPS) <= 0.04


def test_every_frame_comes_once_with_exactly_its_sound() -> None:
    async def scene(place: Place) -> None:
        async with client.connect(f"{place.base}/v1/", token=SECRET, avatar="other") as face:
            assert (face.session["width"], face.session["fps"], face.session["hears"]) == (32, FPS, False)
            face.say("one two")
            face.say("three")
            shown = []
            async for frame in face:
                shown.append(frame)
                if len({s.item_id for s in shown if s.item_id}) == 2 and not frame.item_id:
                    break
        first = shown[0].index
        assert [s.index for s in shown] == list(range(first, first + len(shown)))
        assert all(s.pts_s == pytest.approx(s.index / FPS, abs=1e-5) for s in shown)
        assert {s.frame_HWC.shape for s in shown} == {(32, 32, 3)}
        assert {len(s.sound_S) for s in shown} == {SAMPLES}
        assert face.num_lost == 0
        lengths = [
            sum(s.item_id == item for s in shown) for item in dict.fromkeys(s.item_id for s in shown if s.item_id)
        ]
        assert lengths == [10, 5]  # 200 ms a word
        for frame in shown:
            # The script's own picture and tone: bright while something is said, and a sine of the stream's clock.
            assert bool(frame.frame_HWC.mean() > 150) is (frame.item_id is not None)
            at = frame.index * SAMPLES + np.arange(SAMPLES)
            tone_S = 0.3 * np.sin(2 * np.pi * 440 * at / 24_000) * (frame.item_id is not None)
            np.testing.assert_allclose(frame.sound_S, tone_S, atol=1e-4)

    play(scene, realtime, gate=Password())


@pytest.mark.parametrize("heard_s", [None, 0.23])
def test_an_interruption_counts_what_was_taken_or_what_the_caller_says(heard_s: float | None) -> None:
    async def scene(place: Place) -> None:
        async with client.connect(place.base) as face:
            told: list[Any] = []
            place.house.calls.all[0].subscribe(told.append)
            face.say("one two three four five six seven eight nine ten")
            face.say("never said")
            taken = 0
            async for shown in face:
                taken += shown.item_id is not None
                if taken == 8:
                    break
            answer_s = await face.interrupt(heard_s)
            stopped = next(event for event in told if isinstance(event, Stopped))
            expected_s = taken / FPS if heard_s is None else heard_s
            assert abs(answer_s - expected_s) <= 0.04
            assert abs(stopped.heard_s - expected_s) <= 0.04
            last = shown.index
            async for shown in face:
                assert shown.item_id is None
                if shown.index > last + 10:
                    break
            assert await face.interrupt() == 0.0
            face.say("again")
            async for shown in face:
                if shown.item_id:
                    break

    play(scene, realtime)


def test_what_is_thought_of_can_be_interrupted_and_events_tell_the_words() -> None:
    async def scene(place: Place) -> None:
        async with client.connect(place.base) as face:
            assert face.session["mind"] == "scripted"
            face.say("what is the time?")
            words = ""
            async for event in face.events():
                words += event.get("delta", "") if event["type"] == "response.output_audio_transcript.delta" else ""
                if event["type"] == "response.done":
                    break
            assert words == "It is noon."
            face.say("and now?")
            async for event in face.events():
                if event["type"] == "response.created":
                    break
            assert await face.interrupt() == 0.0
            async for event in face.events():
                if event["type"] == "response.done":
                    assert event["response"]["status"] == "cancelled"
                    break

    def mind() -> ScriptedMind:
        return ScriptedMind(["It is noon.", "Never said."], first_s=0.3)

    play(scene, realtime, word_s=0.08, talk=talking(mind, "scripted"))


def test_a_microphone_is_heard_understood_and_answered() -> None:
    async def scene(place: Place) -> None:
        async with client.connect(place.base) as face:
            assert face.session["hears"] is True
            tone_S = 0.3 * np.sin(np.arange(24_000) / 10)
            face.hear(tone_S)
            face.hear((tone_S * 32_767).astype(np.int16)[:500])
            with pytest.raises(InputError, match="24000 Hz"):
                face.hear(tone_S, 16_000)
            with pytest.raises(InputError, match="mono"):
                face.hear(tone_S[None])
            face.hear(np.zeros(4_800, np.float32))
            seen = []
            async for event in face.events():
                seen.append(event)
                if event["type"] == "response.done":
                    break
        said = [e["transcript"] for e in seen if e["type"].endswith("input_audio_transcription.completed")]
        assert said == ["what time is it"]
        assert seen[-1]["response"]["output"][0]["content"][0]["transcript"] == "It is noon."

    play(scene, realtime, word_s=0.08, talk=talking(lambda: ScriptedMind(["It is noon."]), "scripted", ear=Ear()))  # type: ignore[arg-type]


def test_what_goes_wrong_has_an_error_that_says_what_to_do() -> None:
    async def fails(kind: type[Exception], says: str, url: str, **options: Any) -> Any:
        with pytest.raises(kind, match=says) as error:
            async with client.connect(url, **options):
                pass
        return error.value

    async def scene(place: Place) -> None:
        with socket.socket() as plug:
            plug.bind(("127.0.0.1", 0))
            await fails(client.NoServer, "streamdiff serve", f"http://127.0.0.1:{plug.getsockname()[1]}")
        await fails(client.Denied, "--mint", place.base)
        await fails(client.Denied, "--mint", place.base, token="wrong")
        await fails(InputError, "no such avatar", place.base, token=SECRET, avatar="nobody")
        await fails(InputError, "no such session", place.base, token=SECRET, session="x")
        await fails(InputError, "looks like", "ws://127.0.0.1:1")
        await fails(client.NoServer, "HTTP 404", f"{place.base}/elsewhere", token=SECRET)
        async with client.connect(place.base, token=SECRET) as face:
            busy = await fails(client.Busy, "all sessions are taken", place.base, token=SECRET)
            assert 1 <= busy.retry_after_s <= 60
            for text in ("", "  ", "x" * 4_001):
                with pytest.raises(InputError, match="1 to 4000"):
                    face.say(text)
            with pytest.raises(Unsupported, match="--ear"):
                face.hear(np.zeros(480, np.float32))
            async with client.connect(place.base, token=SECRET, session=face.session["id"]) as other:
                assert (await anext(other)).frame_HWC.shape == (32, 32, 3)
            assert len(place.house.calls.all) == 1
        with pytest.raises(SessionClosed, match="connect anew"):
            face.say("too late")
        assert [shown async for shown in face if shown.item_id] == []

    play(scene, realtime, gate=Password(), terms={"capacity": 1})


def test_a_session_that_ends_otherwise_than_by_goodbye_is_an_error() -> None:
    async def scene(place: Place) -> None:
        async with client.connect(place.base) as face:
            await anext(face)
            await place.house.calls.end(place.house.calls.all[0], Ending.LIFETIME)
            with pytest.raises(SessionClosed, match="ended the session: lifetime"):
                async for _ in face:
                    pass
        async with client.connect(place.base) as face:
            await anext(face)
            face._socket._response.connection.transport.abort()  # type: ignore[union-attr]
            with pytest.raises(SessionClosed, match=r"lost.*session="):
                async for _ in face:
                    pass
        async with client.connect(place.base, session=face.session["id"]) as face:
            await anext(face)
            await place.house.calls.end(place.house.calls.all[0], Ending.FINISHED)
            async for _ in face:
                pass

    play(scene, realtime)


def test_somebody_else_who_speaks_first_is_waited_for() -> None:
    async def scene(place: Place) -> None:
        async with (
            client.connect(place.base) as one,
            client.connect(place.base, session=one.session["id"]) as two,
        ):
            one.say("one two")
            two.say("three four five")
            for face in (one, two):
                num_frames: Counter[str] = Counter()
                texts = {}
                async for shown in face:
                    if shown.item_id is not None:
                        num_frames[shown.item_id] += 1
                    elif len(num_frames) == 2:
                        break
                async for event in face.events():
                    if event["type"] == "response.done":
                        (item,) = event["response"]["output"]
                        texts[item["id"]] = item["content"][0]["transcript"]
                        if len(texts) == 2:
                            break
                assert {texts[item]: count for item, count in num_frames.items()} == {
                    "one two": 4,
                    "three four five": 6,
                }

    play(scene, realtime, word_s=0.08)


def test_a_program_that_takes_nothing_loses_the_oldest_frames_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamdiff.client.face._MAX_FRAMES", 5)

    async def scene(place: Place) -> None:
        async with client.connect(place.base) as face:
            async with asyncio.timeout(20):
                while face.num_lost < 5:
                    await asyncio.sleep(0.02)
            indices = [(await anext(face)).index for _ in range(10)]
            assert indices == list(range(indices[0], indices[0] + 10))
            assert indices[0] >= 5

    play(scene, realtime)


def test_a_picture_that_was_lost_keeps_its_sound() -> None:
    async def scene(place: Place) -> None:
        async with aiohttp.ClientSession() as http, http.ws_connect(f"{place.base}/v1/realtime") as connection:
            update = {"type": "session.update", "session": {"streamdiff": {"video": True}}}
            await connection.send_json(update)
            item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "one two"}]}
            await connection.send_json({"type": "response.create", "response": {"input": [item]}})
            frames, shown, pictures = Frames(32, 32, FPS), [], 0
            while len(shown) < 8:
                event = await connection.receive_json()
                if event["type"] == "response.output_audio.delta":
                    frames.sound(event)
                elif event["type"] == "streamdiff.video.delta":
                    pictures += 1
                    if pictures not in (4, 5):
                        shown += frames.picture(event)
            first = shown[0].index
            assert [s.index for s in shown] == list(range(first, first + len(shown)))
            assert [s.is_repeated for s in shown] == [False] * 3 + [True] * 2 + [False] * (len(shown) - 5)
            assert all(s.item_id for s in shown[3:5])

    play(scene, realtime)


@pytest.mark.parametrize("codec", ["vp8", "h264"])
def test_every_picture_is_decoded_as_it_comes(codec: Codec) -> None:
    encoder, frames = VideoEncoder(64, 48, FPS, codec=codec), Frames(64, 48, FPS)
    for index in range(12):
        frame_HWC = np.full((48, 64, 3), 20 * index, np.uint8)
        picture = encoder.encode(frame_HWC, index, key=index == 0)
        delta = base64.b64encode(picture.data).decode()
        (shown,) = frames.picture({"frame": index, "pts_s": index / FPS, "codec": codec, "delta": delta})
        assert shown.index == index
        assert abs(shown.frame_HWC.mean() - 20 * index) < 8


@pytest.mark.parametrize(
    "event",
    [
        "no json",
        "[]",
        '{"type": 1}',
        '{"type": "session.created"}',
        '{"type": "session.created", "session": {"id": "a", "streamdiff": {"width": -1, "height": 8, "fps": 25}}}',
        '{"type": "session.created", "session": {"id": "a", "streamdiff": {"width": 1e9, "height": 8, "fps": 25}}}',
        "{delta}",
        '{"type": "streamdiff.video.delta", "frame": 0, "pts_s": 0, "codec": "vp8", "delta": "AAAA"}',
        '{"type": "streamdiff.video.delta", "frame": 0, "pts_s": 0, "codec": "vp8", "delta": ""}',
        '{"type": "streamdiff.video.delta", "frame": 0, "pts_s": 0, "codec": "exr", "delta": ""}',
        '{"type": "streamdiff.video.delta", "frame": "x", "pts_s": 0, "codec": "vp8", "delta": ""}',
        '{"type": "response.output_audio.delta", "item_id": "a", "frame": 0, "delta": "???"}',
        '{"type": "response.output_audio.delta", "item_id": "a", "frame": 0, "delta": "AAAA"}',
    ],
)
def test_a_server_that_is_none_is_an_error_and_not_a_hang(event: str) -> None:
    face = {"width": 32, "height": 32, "fps": 25}
    created = json.dumps({"type": "session.created", "session": {"id": "a", "streamdiff": face}})

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.WebSocketResponse()
        await response.prepare(request)
        if "delta" in event:
            await response.send_str(created)
        await response.send_str(event)
        await response.receive()
        return response

    async def main() -> None:
        app = web.Application()
        app.router.add_get("/v1/realtime", answer)
        runner = web.AppRunner(app, shutdown_timeout=1.0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            with pytest.raises(SessionClosed, match="not understood"):
                async with client.connect(f"http://127.0.0.1:{runner.addresses[0][1]}") as face:
                    await anext(face)
        finally:
            await runner.cleanup()

    asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.parametrize(
    ("status", "after", "kind", "says"),
    [
        (403, "", client.Denied, "no consent"),
        (429, "7", client.Busy, "too often; ask again in 7 s"),
        (503, "soon", client.Busy, "taken; ask again in 10 s"),
        (503, "9" * 30, client.Busy, "ask again in 10 s"),
        (500, "", client.NoServer, "HTTP 500"),
        (200, "", client.NoServer, "HTTP 200"),
    ],
)
def test_a_refusal_is_an_error_of_its_kind(status: int, after: str, kind: type[Exception], says: str) -> None:
    async def refuse(request: web.Request) -> web.StreamResponse:
        del request
        return web.Response(status=status, headers={"Retry-After": after} if after else {})

    async def main() -> None:
        app = web.Application()
        app.router.add_get("/v1/realtime", refuse)
        runner = web.AppRunner(app, shutdown_timeout=1.0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            with pytest.raises(kind, match=says):
                async with client.connect(f"http://127.0.0.1:{runner.addresses[0][1]}"):
                    pass
        finally:
            await runner.cleanup()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_the_address_holds_what_was_asked_for_and_no_token() -> None:
    assert (
        address("https://a.example/base/", avatar="x y", call_id="") == "https://a.example/base/v1/realtime?avatar=x+y"
    )
    for url in ("", "a.example", "ftp://a", "http://", "http://a?token=b"):
        with pytest.raises(InputError, match="looks like"):
            address(url)


@pytest.mark.processes
@pytest.mark.heavy
def test_the_client_needs_no_package_of_the_server_and_no_torch() -> None:
    code = (
        "import sys, streamdiff.client; "
        "heavy = ('torch', 'aiortc', 'jwt', 'prometheus_client', 'streamdiff.serve'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert said.stdout.strip() == "[]"
