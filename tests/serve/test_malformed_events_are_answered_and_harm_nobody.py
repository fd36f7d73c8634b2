"""Whatever a Realtime client sends becomes an event that was checked, or an error; nobody else notices."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from typing import Any, get_args

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamdiff.serve.protocol import Say
from streamdiff.serve.pump import Viewer
from streamdiff.serve.realtime import realtime
from streamdiff.serve.realtime_events import (
    MAX_EVENT_BYTES,
    AppendAudio,
    BadEvent,
    CancelResponse,
    ClientEvent,
    CreateItem,
    CreateResponse,
    UpdateSession,
    parse,
)
from tests.serve.house import Place, play

TYPES = [
    "session.update",
    "input_audio_buffer.append",
    "input_audio_buffer.commit",
    "input_audio_buffer.clear",
    "conversation.item.create",
    "conversation.item.truncate",
    "response.create",
    "response.cancel",
    "output_audio_buffer.clear",
]
KEYS = ["session", "audio", "item", "response", "item_id", "audio_end_ms", "event_id", "response_id", "content_index"]
DEEP = ["type", "role", "content", "text", "input", "format", "rate", "output", "streamdiff", "video", "conversation"]
WORDS = ["message", "user", "input_text", "realtime", "audio/pcm", "auto", "none", "AAAA", "AAA", ""]

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(WORDS)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(DEEP) | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)
almost = st.builds(
    lambda kind, fields: {"type": kind, **fields},
    st.sampled_from(TYPES) | st.text(max_size=20),
    st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), values, max_size=4),
)
messages = almost.map(json.dumps) | values.map(json.dumps) | st.text(max_size=200)


def message(text: str, **item: Any) -> dict[str, Any]:
    content = [{"type": "input_text", "text": text}]
    return {"type": "conversation.item.create", "item": {"type": "message", "role": "user", "content": content, **item}}


def audio_format(side: str, **form: Any) -> str:
    return json.dumps({"type": "session.update", "session": {"audio": {side: {"format": form}}}})


@pytest.mark.slow
@settings(max_examples=2_000)
@given(messages)
def test_anything_at_all_is_an_event_or_an_error_with_a_sentence(text: str) -> None:
    result: object
    try:
        _, result = parse(text)
    except BadEvent as error:
        result = error
    assert isinstance(result, get_args(ClientEvent)) or (isinstance(result, BadEvent) and str(result) and result.code)


@pytest.mark.parametrize(
    ("event", "says", "is_broken"),
    [
        ("", "no JSON", True),
        ("[" * 60_000, "no JSON", True),
        ("[" * 900 + "]" * 900, "a list", True),
        ('"hello"', "JSON object", True),
        ("x" * (MAX_EVENT_BYTES + 1), "at most 1048576", True),
        ('{"type": "eval"}', "unknown event type 'eval'", False),
        ('{"type": ["response.create"]}', "unknown event type a list", False),
        ('{"type": "session.update"}', "needs the field session", False),
        ('{"type": "session.update", "session": {"type": "transcription"}}', "type realtime", False),
        ('{"type": "session.update", "session": {"streamdiff": {"video": 1}}}', "true or false", False),
        (
            '{"type": "session.update", "session": {"audio": {"input": {"format": {"type": "audio/pcmu"}}}}}',
            "pcm",
            False,
        ),
        ('{"type": "session.update", "session": {"audio": {"output": {"format": {"rate": 8000}}}}}', "24000 Hz", False),
        ('{"type": "input_audio_buffer.append"}', "base64", False),
        ('{"type": "input_audio_buffer.append", "audio": "AA=A"}', "base64", False),
        ('{"type": "input_audio_buffer.append", "audio": "AAAA"}', "3 bytes are no whole number", False),
        (json.dumps(message("  ")), "1 to 4000 characters", False),
        (json.dumps(message("x" * 4_001)), "1 to 4000 characters", False),
        (json.dumps(message("x", role="assistant")), "role user", False),
        (json.dumps(message("x", type="function_call")), "role user", False),
        (json.dumps(message("x", content=[{"type": "input_image"}])), "input_text", False),
        (json.dumps(message("x", content=[])), "1 to 64 parts", False),
        (json.dumps(message("x", id="i" * 65)), "1 to 64 characters", False),
        ('{"type": "conversation.item.truncate", "item_id": "a"}', "whole number", False),
        ('{"type": "conversation.item.truncate", "item_id": "a", "audio_end_ms": -1}', "whole number", False),
        ('{"type": "conversation.item.truncate", "item_id": "a", "audio_end_ms": true}', "whole number", False),
        ('{"type": "conversation.item.truncate", "audio_end_ms": 1}', "item_id must be a string", False),
        ('{"type": "response.create", "response": {"conversation": "none"}}', "one conversation", False),
        ('{"type": "response.create", "response": []}', "must be an object", False),
        ('{"type": "response.cancel", "response_id": {}}', "must be a string", False),
        ('{"type": "response.cancel", "event_id": 5}', "event_id", False),
    ],
)
def test_what_is_wrong_is_said(event: str, says: str, is_broken: bool) -> None:
    with pytest.raises(BadEvent, match=says) as error:
        parse(event)
    assert error.value.is_broken is is_broken


def test_what_is_right_is_read_and_what_is_newer_than_this_server_is_passed_over() -> None:
    assert parse(json.dumps(message(" Hello. ", id="item_1"))) == (None, CreateItem("Hello.", "item_1"))
    assert parse('{"type": "response.cancel", "event_id": "e1", "new": [1]}') == ("e1", CancelResponse())
    pcm = bytes(range(8))
    append = {"type": "input_audio_buffer.append", "audio": base64.b64encode(pcm).decode()}
    assert parse(json.dumps(append)) == (None, AppendAudio(pcm))
    session = {"type": "realtime", "instructions": "be kind", "tools": [{}], "streamdiff": {"video": True}}
    assert parse(json.dumps({"type": "session.update", "session": session})) == (None, UpdateSession(True))
    response = {"input": [message("one")["item"], message("two")["item"]], "metadata": {"a": "b"}}
    assert parse(json.dumps({"type": "response.create", "response": response})) == (None, CreateResponse("one\ntwo"))


def test_an_error_names_the_event_that_it_is_about() -> None:
    with pytest.raises(BadEvent) as error:
        parse('{"type": "conversation.item.truncate", "event_id": "mine"}')
    assert (error.value.event_id, error.value.param) == ("mine", "audio_end_ms")


@pytest.mark.slow
def test_a_thousand_malformed_messages_end_no_session_but_their_own() -> None:
    """Each is answered; who speaks something else than events is closed with 1008; the same server takes the next."""
    num_errors = num_closed = 0

    async def abuse(place: Place, events: list[str], last: str) -> None:
        nonlocal num_errors, num_closed
        async with aiohttp.ClientSession() as http, http.ws_connect(f"{place.base}/v1/realtime") as socket:
            for text in events:
                await socket.send_str(text)
            await socket.send_str('{"type": "?", "event_id": "all"}')
            async with asyncio.timeout(60):
                while (error := json.loads((await socket.receive()).data).get("error") or {}).get("event_id") != "all":
                    num_errors += bool(error.get("message"))
                await socket.send_str(last)
                with contextlib.suppress(ConnectionError):  # it is closed already, unless that was an object by chance
                    await socket.send_bytes(b"")
                async for _ in socket:
                    pass
            num_closed += socket.close_code == 1008

    async def scene(place: Place) -> None:
        call = await place.house.calls.open("neighbour")
        viewer = Viewer(call.pump, is_encoded=False)
        loop = asyncio.get_running_loop()

        @settings(max_examples=80, suppress_health_check=list(HealthCheck))
        @given(st.lists(almost.map(json.dumps), min_size=25, max_size=40), st.text(max_size=200))
        def fuzz(events: list[str], last: str) -> None:
            asyncio.run_coroutine_threadsafe(abuse(place, events, last), loop).result(90)

        await asyncio.to_thread(fuzz)
        call.do(Say("still here"))
        indices = []
        while not (beat := await viewer.next()) or not beat.ends_segment:
            assert beat is not None
            indices.append(beat.index)
        assert indices == list(range(indices[0], indices[0] + len(indices)))
        async with asyncio.timeout(20):
            while len(place.house.calls.all) > 1:
                await asyncio.sleep(0.05)

    play(scene, realtime, terms={"capacity": 8})
    assert num_errors >= 1_000
    assert num_closed >= 40
