"""What comes from outside becomes a command or an `InputError`, whatever it is."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamdiff.errors import InputError
from streamdiff.serve import protocol
from streamdiff.serve.protocol import (
    Append,
    Bye,
    Ended,
    Ending,
    Interrupt,
    Listen,
    Prompt,
    Ready,
    Report,
    Say,
    parse,
    render,
)

COMMANDS = [
    Say("Hello, wörld."),
    Interrupt(),
    Interrupt(1.25),
    Listen(True),
    Prompt("a person smiles"),
    Report(frames_decoded=250, jitter_buffer_ms=61.5),
    Append("AAD//w=="),
    Bye(),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: type(c).__name__)
def test_a_command_survives_the_wire(command: protocol.Command) -> None:
    assert parse(render(command)) == command
    assert parse(render(command).encode()) == command


def test_an_event_is_one_flat_json_object() -> None:
    ready = json.loads(render(Ready("id", 25, 24_000, 256, 256, ("say",))))
    assert ready["type"] == "ready"
    assert ready["can"] == ["say"]
    assert json.loads(render(Ended(Ending.IDLE))) == {"type": "ended", "reason": "idle", "text": ""}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("", "no JSON"),
        ("[1]", "object"),
        ("{}", "unknown message type"),
        ('{"type": "eval"}', "known: say"),
        ('{"type": ["say"]}', "unknown message type"),
        ('{"type": "say"}', "needs the field text"),
        ('{"type": "say", "text": "  "}', "1 to 4000 characters"),
        ('{"type": "say", "text": 5}', "must be a str"),
        ('{"type": "say", "text": "x", "voice": 1}', "no field 'voice'"),
        ('{"type": "listen", "listening": 1}', "must be a bool"),
        ('{"type": "interrupt", "heard_s": -1}', "must be a float from 0"),
        ('{"type": "interrupt", "heard_s": NaN}', "must be a float from 0"),
        ('{"type": "interrupt", "heard_s": true}', "must be a float from 0"),
        ('{"type": "report", "freezes": null}', "must be a int from 0"),
        ("[" * 10_000, "no JSON"),
        (b"\xff\xfe\x00", "no JSON"),
        ('{"type": "say", "text": "' + "x" * 20_000 + '"}', "at most 16384"),
    ],
)
def test_what_is_no_command_says_why(data: str | bytes, says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse(data)


def test_half_a_surrogate_pair_becomes_text_that_can_be_sent_on() -> None:
    said = parse('{"type": "say", "text": "a\\ud800b"}')
    assert isinstance(said, Say)
    assert said.text.encode() == b"a?b"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = ["text", "heard_s", "listening", "freezes", "round_trip_ms", "audio", "more"]
KINDS = ["say", "interrupt", "listen", "prompt", "report", "input_audio_buffer.append", "bye", "x"]


@pytest.mark.heavy
@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=200)
    | st.text(max_size=200)
    | JSON.map(json.dumps)
    | st.fixed_dictionaries(
        {"type": st.sampled_from(KINDS)},
        optional=dict.fromkeys(FIELDS, JSON),
    ).map(json.dumps)
)
def test_nothing_but_an_input_error_comes_of_noise(data: str | bytes) -> None:
    try:
        command = parse(data)
    except InputError:
        return
    assert parse(render(command)) == command
