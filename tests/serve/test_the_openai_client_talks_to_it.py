"""The unmodified `openai` client, over its own WebSocket, against a server on a loopback port."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from openai import AsyncOpenAI
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.frames import Close

from streamdiff.conversation.mind import ScriptedMind
from streamdiff.serve.protocol import Caption, Status, Stopped
from streamdiff.serve.realtime import realtime
from streamdiff.serve.realtime_session import Realtime
from streamdiff.serve.talk import talking
from tests.serve.house import SECRET, Ear, Password, Place, play
from tests.serve.scripted import FPS

FRAME_MS = 1_000 // FPS


@asynccontextmanager
async def connect(place: Place, key: str = SECRET, **query: str) -> AsyncIterator[Any]:
    async with (
        AsyncOpenAI(api_key=key, base_url=f"{place.base}/v1", max_retries=0) as client,
        client.realtime.connect(model="gpt-realtime", extra_query=query) as connection,
    ):
        yield connection


async def until(connection: Any, kind: str) -> list[Any]:
    """Events up to the first of this type."""
    events: list[Any] = []
    async with asyncio.timeout(30):
        while not events or events[-1].type != kind:
            events.append(await connection.recv())
    return events


async def ask(connection: Any, text: str) -> None:
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}
    await connection.conversation.item.create(item=item)
    await connection.response.create()


def sound_ms(events: list[Any]) -> float:
    pcm = b"".join(base64.b64decode(e.delta) for e in events if e.type == "response.output_audio.delta")
    return len(pcm) / 2 / 24


def test_a_text_is_spoken_in_the_words_of_the_published_api() -> None:
    async def scene(place: Place) -> None:
        async with connect(place) as connection:
            created = await connection.recv()
            assert created.type == "session.created"
            assert created.session.audio.output.format.rate == 24_000
            assert created.session.model == "gpt-realtime"
            await ask(connection, "three short words")
            events = await until(connection, "response.done")
        kinds = [event.type for event in events]
        order = [
            "conversation.item.added",
            "conversation.item.done",
            "response.created",
            "response.output_item.added",
            "conversation.item.added",
            "response.content_part.added",
            "response.output_audio_transcript.delta",
            "response.output_audio.delta",
            "response.output_audio.done",
            "response.output_audio_transcript.done",
            "response.content_part.done",
            "response.output_item.done",
            "conversation.item.done",
            "response.done",
        ]
        assert [kind for k, kind in enumerate(kinds) if k == 0 or kinds[k - 1] != kind] == order
        assert events[0].item.content[0].text == "three short words"
        done = events[-1].response
        assert (done.status, done.output[0].content[0].transcript) == ("completed", "three short words")
        ids = {event.response_id for event in events if getattr(event, "response_id", None)}
        assert ids == {done.id}
        assert len({event.event_id for event in events}) == len(events)
        assert sound_ms(events) == 360  # a word of the script takes 120 ms
        first = np.frombuffer(base64.b64decode(events[kinds.index(order[7])].delta), "<i2")
        assert 0.25 < np.abs(first).max() / 32_767 <= 0.31  # the script's tone

    engine = play(scene, realtime, gate=Password(), word_s=0.12)
    assert engine.streams[0].closed


def test_pictures_come_when_they_are_asked_for_and_begin_with_a_keyframe() -> None:
    async def scene(place: Place) -> None:
        async with connect(place) as connection:
            created = await connection.recv()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(connection.recv(), 0.3)
            await connection.session.update(session={"type": "realtime", "streamdiff": {"video": True}})
            updated = (await until(connection, "session.updated"))[-1]
            assert updated.session.streamdiff["video"] is True
            pictures = [(await until(connection, "streamdiff.video.delta"))[-1] for _ in range(5)]
            assert pictures[0].is_key is True
            async with connect(place, call_id=created.session.id) as another:
                await another.session.update(session={"type": "realtime", "streamdiff": {"video": True}})
                # The encoder runs already: without being asked it would make no keyframe again.
                assert (await until(another, "streamdiff.video.delta"))[-1].is_key is True
            first = pictures[0].frame
            assert [picture.frame for picture in pictures] == list(range(first, first + 5))
            assert [picture.pts_s for picture in pictures] == [round((first + k) / FPS, 6) for k in range(5)]
            await connection.session.update(session={"type": "realtime", "streamdiff": {"video": False}})
            await until(connection, "session.updated")
            call = place.house.calls.all[0]
            assert call.pump.num_viewers == 1  # it watches without pictures, too

    play(scene, realtime)


class Player:
    """A loudspeaker that begins 120 ms after the first sound comes, and knows what it has played."""

    def __init__(self) -> None:
        self.item_id = ""
        self._began_s = 0.0
        self._samples = 0

    def take(self, event: Any) -> None:
        if not self.item_id:
            self.item_id, self._began_s = event.item_id, time.monotonic() + 0.12
        self._samples += len(base64.b64decode(event.delta)) // 2

    @property
    def played_ms(self) -> int:
        return round(1e3 * max(0.0, min(self._samples / 24_000, time.monotonic() - self._began_s)))


async def play_some(connection: Any, player: Player, seconds: float) -> None:
    async with asyncio.timeout(30):
        while player.played_ms < seconds * 1e3:
            event = await connection.recv()
            if event.type == "response.output_audio.delta":
                player.take(event)


@pytest.mark.parametrize("seconds", [0.1, 0.45, pytest.param(2.13, marks=pytest.mark.slow)])
def test_client_and_session_agree_within_40_ms_on_what_was_heard(seconds: float) -> None:
    async def scene(place: Place) -> None:
        async with connect(place) as connection:
            await ask(connection, "one two three four five six seven eight nine ten eleven twelve")
            player, told = Player(), []
            await play_some(connection, player, seconds)
            place.house.calls.all[0].subscribe(told.append)
            cut_ms = player.played_ms
            await connection.conversation.item.truncate(item_id=player.item_id, content_index=0, audio_end_ms=cut_ms)
            events = await until(connection, "conversation.item.truncated")
            stopped = next(event for event in told if isinstance(event, Stopped))
            assert abs(1e3 * stopped.heard_s - cut_ms) <= 40
            assert abs(events[-1].audio_end_ms - cut_ms) <= 40
            assert events[-1].item_id == player.item_id
            done = next(event for event in events if event.type == "response.done")
            assert (done.response.status, done.response.status_details.reason) == ("cancelled", "client_cancelled")

    play(scene, realtime)


def test_a_cancelled_response_says_how_much_was_played_and_falls_silent() -> None:
    async def scene(place: Place) -> None:
        async with connect(place) as connection:
            await ask(connection, "one two three four five six seven eight nine ten eleven twelve")
            events = []
            while sound_ms(events) < 200:
                events.append(await connection.recv())
            await connection.response.cancel()
            events += await until(connection, "conversation.item.truncated")
            assert abs(sound_ms(events) - events[-1].audio_end_ms) <= 3 * FRAME_MS
            item_id, total_ms = events[-1].item_id, sound_ms(events)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(until(connection, "response.output_audio.delta"), 0.3)
            # A client that learns late how much its loudspeaker played may still say so.
            await connection.conversation.item.truncate(item_id=item_id, content_index=0, audio_end_ms=130)
            assert (await until(connection, "conversation.item.truncated"))[-1].audio_end_ms == 130
            await connection.conversation.item.truncate(item_id=item_id, content_index=0, audio_end_ms=60_000)
            assert (await until(connection, "conversation.item.truncated"))[-1].audio_end_ms == total_ms
            await connection.response.cancel()
            assert (await until(connection, "error"))[-1].error.code == "response_cancel_not_active"
            await ask(connection, "and on")
            assert (await until(connection, "response.done"))[-1].response.status == "completed"

    play(scene, realtime, word_s=0.12)


def test_a_second_response_waits_for_the_first_and_is_told_so() -> None:
    async def scene(place: Place) -> None:
        async with connect(place) as connection:
            await ask(connection, "one two three")
            await connection.response.create(response={"input": []}, event_id="mine")
            assert (await until(connection, "error"))[-1].error.param == "response.input"
            await ask(connection, "one two three four")
            error = (await until(connection, "error"))[-1].error
            assert error.code == "conversation_already_has_active_response"
            assert (await until(connection, "response.done"))[-1].response.status == "completed"
            await connection.response.create()  # what was created meanwhile is still there
            done = (await until(connection, "response.done"))[-1].response
            assert done.output[0].content[0].transcript == "one two three four"

    play(scene, realtime, word_s=0.08)


class Paper:
    """A wire that keeps what is sent."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def send(self, event: dict[str, Any]) -> bool:
        self.events.append(event)
        return True

    def drop_sound(self) -> None: ...

    def close(self, code: int, reason: str) -> None: ...


def test_all_connections_of_a_session_see_the_response_that_one_of_them_asked_for() -> None:
    async def scene(place: Place) -> None:
        call = await place.house.calls.open("local")
        papers = Paper(), Paper()
        one, two = (Realtime(call, paper) for paper in papers)
        item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]}
        for realtime_ in (one, two):
            realtime_.start()
        for realtime_ in (one, two):
            realtime_.receive(json.dumps({"type": "response.create", "response": {"input": [item]}}))
        for paper in papers:
            words = [e["delta"] for e in paper.events if e["type"] == "response.output_audio_transcript.delta"]
            assert words == ["hello"]
        errors = [[e["error"]["code"] for e in paper.events if e["type"] == "error"] for paper in papers]
        assert errors == [[], ["conversation_already_has_active_response"]]
        for realtime_ in (one, two):
            realtime_.close()

    play(scene, realtime)


def test_words_that_come_late_belong_to_no_later_response() -> None:
    async def scene(place: Place) -> None:
        call, paper = await place.house.calls.open("local"), Paper()
        face = Realtime(call, paper)
        face.start()
        for turn, text in ((1, "one"), (2, "two"), (1, "one, and what nobody heard"), (3, "three")):
            if turn == 3:
                call.emit(Status("thinking"))
            call.emit(Caption("avatar", text, turn))
            face._finish("completed")
        words: dict[str, str] = {}
        for event in paper.events:
            if event["type"] == "response.output_audio_transcript.delta":
                words[event["response_id"]] = words.get(event["response_id"], "") + event["delta"]
        assert list(words.values()) == ["one", "two", "three"]
        face.close()

    play(scene, realtime)


def test_without_the_token_nothing_is_opened() -> None:
    async def scene(place: Place) -> None:
        for key in ("wrong", SECRET + "x"):
            with pytest.raises(InvalidStatus, match="401"):
                async with connect(place, key):
                    pass
        answer = await place.http.get(f"/v1/realtime?api_key={SECRET}&token={SECRET}&authorization=Bearer+{SECRET}")
        assert answer.status == 401
        assert place.house.calls.leases.held == ()

    assert play(scene, realtime, gate=Password()).streams == []


def test_when_all_seats_are_taken_the_client_is_told_when_to_come_back() -> None:
    async def scene(place: Place) -> None:
        with pytest.raises(InvalidStatus, match="400"):
            async with connect(place, avatar="nobody"):
                pass
        async with connect(place) as first:
            await first.recv()
            with pytest.raises(InvalidStatus) as refused:
                async with connect(place):
                    pass
            assert refused.value.response.status_code == 503
            assert 1 <= int(refused.value.response.headers["Retry-After"]) <= 60

    play(scene, realtime, terms={"capacity": 1})


def test_a_voice_is_heard_understood_and_answered() -> None:
    def mind() -> ScriptedMind:
        return ScriptedMind(["It is noon."])

    async def scene(place: Place) -> None:
        async with connect(place) as connection:
            await connection.recv()
            tone = (8_000 * np.sin(np.arange(2_400) / 10)).astype("<i2").tobytes()
            for _ in range(4):
                await connection.input_audio_buffer.append(audio=base64.b64encode(tone).decode())
            await connection.input_audio_buffer.commit()
            events = await until(connection, "response.done")
        kinds = [event.type for event in events]
        heard = [
            "input_audio_buffer.speech_started",
            "input_audio_buffer.speech_stopped",
            "conversation.item.input_audio_transcription.completed",
        ]
        assert [kind for kind in kinds if kind in heard] == heard
        items = {event.item_id for event in events if event.type in (*heard, "input_audio_buffer.committed")}
        assert len(items) == 1
        completed = events[kinds.index(heard[2])]
        assert completed.transcript == "what time is it"
        assert kinds.count("input_audio_buffer.committed") == 1
        assert events[-1].response.output[0].content[0].transcript == "It is noon."
        assert sound_ms(events) > 0

    play(scene, realtime, word_s=0.08, talk=talking(mind, "scripted", ear=Ear()))  # type: ignore[arg-type]


def test_a_mind_answers_typed_words_and_its_words_come_as_it_writes_them() -> None:
    replies = ["It is noon.", "It is noon. Or later."]

    async def scene(place: Place) -> None:
        async with connect(place) as connection:
            for reply in replies:
                await ask(connection, "what time is it")
                events = await until(connection, "response.done")
                words = [e.delta for e in events if e.type == "response.output_audio_transcript.delta"]
                assert "".join(words) == reply
                assert events[-1].response.status == "completed"
                assert not any(e.type.startswith("conversation.item.input_audio") for e in events)

    play(scene, realtime, word_s=0.08, talk=talking(lambda: ScriptedMind(replies), "scripted"))


def test_a_face_that_hears_nobody_says_so_once() -> None:
    async def scene(place: Place) -> None:
        async with connect(place) as connection:
            for _ in range(3):
                await connection.input_audio_buffer.append(audio=base64.b64encode(bytes(480)).decode())
            await connection.input_audio_buffer.commit()
            await connection.input_audio_buffer.clear()
            events = await until(connection, "input_audio_buffer.cleared")
        codes = [event.error.code for event in events if event.type == "error"]
        assert codes == ["unsupported", "input_audio_buffer_commit_empty"]

    play(scene, realtime)


def test_a_second_connection_joins_the_session_and_a_lost_one_comes_back() -> None:
    async def scene(place: Place) -> None:
        async with connect(place) as owner:
            session = (await owner.recv()).session
            async with connect(place, call_id=session.id) as guest:
                assert (await guest.recv()).session.id == session.id
                await ask(guest, "hello there")
                for connection in (owner, guest):
                    assert (await until(connection, "response.done"))[-1].response.status == "completed"
            assert len(place.house.calls.all) == 1
            owner._connection.transport.abort()
            await wait_for(lambda: place.house.calls.all[0].pump.num_viewers == 0)
            async with connect(place, call_id=session.id) as back:
                assert (await back.recv()).session.id == session.id
                assert place.house.calls.all[0].pump.num_viewers == 1
        with pytest.raises(InvalidStatus, match="404"):
            async with connect(place, call_id="nothing"):
                pass

    assert len(play(scene, realtime).streams) == 1


async def wait_for(claim: Any) -> None:
    async with asyncio.timeout(20):
        while not claim():
            await asyncio.sleep(0.02)


def test_a_session_that_ends_says_why_before_the_connection_does() -> None:
    async def scene(place: Place) -> None:
        async with connect(place) as connection:
            await connection.recv()
            place.engine.streams[0].fails_with = RuntimeError("broken on purpose")
            events = await until(connection, "streamdiff.session.ended")
            assert events[-1].reason == "failed"
            with pytest.raises(ConnectionClosedError) as closed:
                await connection.recv()
            assert closed.value.rcvd == Close(1011, "failed")
        assert place.house.calls.all == ()

    play(scene, realtime)
