"""The messages between the page and the server: frozen values, and JSON in between.

A client sends commands, the server sends events; both are JSON objects with a ``type``, one per message of the data
channel. What comes from outside is checked here, once: unknown types, unknown or missing fields, wrong types and
numbers out of range raise `InputError` with a sentence that the client is told.

>>> parse('{"type": "say", "text": "Hello."}')
Say(text='Hello.')
>>> render(Caption(role="avatar", text="Hello.", turn=1, final=True))
'{"type":"caption","role":"avatar","text":"Hello.","turn":1,"final":true}'
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, TypeAlias

from streamdiff.errors import InputError

MAX_MESSAGE_BYTES = 16_384
APPEND_HZ = 24_000
MAX_TEXT = 4_000
"""Characters of one text to say."""


class Ending(StrEnum):
    """Why a session ended. Every session ends with one of these."""

    LEFT = "left"
    """The client said goodbye."""
    GONE = "gone"
    """No viewer for longer than a reconnection may take."""
    IDLE = "idle"
    """Nobody said or did anything for the idle timeout."""
    LIFETIME = "lifetime"
    """It reached the longest time that a session may last."""
    DRAINED = "drained"
    """The server is shutting down."""
    REVOKED = "revoked"
    """The consent or the token behind it was withdrawn."""
    FINISHED = "finished"
    """The stream ended by itself."""
    FAILED = "failed"
    """The stream broke."""


@dataclass(frozen=True, slots=True)
class Say:
    """Speak this text, or answer it where a mind is connected."""

    text: str


@dataclass(frozen=True, slots=True)
class Interrupt:
    """Stop speaking now."""

    heard_s: float | None = None
    """Position in the stream, seconds, that the listener has heard; None: not known."""


@dataclass(frozen=True, slots=True)
class Listen:
    """Whether somebody is speaking to the face."""

    listening: bool


@dataclass(frozen=True, slots=True)
class Prompt:
    """Follow another prompt; for streams that can."""

    text: str


@dataclass(frozen=True, slots=True)
class Report:
    """What the browser's own statistics say; all cumulative since the connection stood, but the delays."""

    frames_decoded: int = 0
    frames_dropped: int = 0
    key_frames: int = 0
    freezes: int = 0
    concealed_samples: int = 0
    jitter_buffer_ms: float = 0.0
    """How far the loudspeaker is behind what arrives."""
    round_trip_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Append:
    """Sound of a microphone that no WebRTC carries."""

    audio: str
    """Base64 of little-endian int16 samples, mono, `APPEND_HZ`; 20 ms is a good length."""


@dataclass(frozen=True, slots=True)
class Bye:
    """End the session."""


Doing: TypeAlias = Literal["idle", "listening", "thinking", "speaking"]

Command: TypeAlias = Say | Interrupt | Listen | Prompt | Report | Append | Bye


@dataclass(frozen=True, slots=True)
class Ready:
    """The first event: what this session is."""

    session: str
    fps: int
    rate_hz: int
    width: int
    height: int
    can: tuple[str, ...]
    hears: bool = False
    """Whether a microphone is understood."""
    mind: str = ""
    """Who answers; empty: texts are spoken as they are."""
    recorded: bool = False
    """Whether what is shown is kept in a file."""


@dataclass(frozen=True, slots=True)
class Status:
    """What the conversation does now."""

    state: Doing


@dataclass(frozen=True, slots=True)
class Hearing:
    """The user's voice: it has begun (confirmed, no echo), or their turn has ended."""

    speaking: bool


@dataclass(frozen=True, slots=True)
class Caption:
    """Words, by whom. A later caption of the same role and turn replaces an earlier one."""

    role: Literal["user", "avatar"]
    text: str
    turn: int
    final: bool = True


@dataclass(frozen=True, slots=True)
class Stopped:
    """An utterance was interrupted."""

    segment: int
    """0: nothing was being said."""
    heard_s: float
    """How much of the utterance the listener has heard, as well as is known."""
    dropped: int
    """Frames that were made and are not shown."""


@dataclass(frozen=True, slots=True)
class Latency:
    """How long one stage of one turn took."""

    stage: str
    """Such as ``end of turn``, ``transcript``, ``first word``, ``first sound``, ``first frame``."""
    ms: float
    turn: int


@dataclass(frozen=True, slots=True)
class Problem:
    """Something did not work; the session goes on."""

    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The last event of a session."""

    reason: Ending
    text: str = ""


Event: TypeAlias = Ready | Status | Hearing | Caption | Stopped | Latency | Problem | Ended

_COMMANDS: dict[str, type[Command]] = {
    "say": Say,
    "interrupt": Interrupt,
    "listen": Listen,
    "prompt": Prompt,
    "report": Report,
    "input_audio_buffer.append": Append,
    "bye": Bye,
}
_NAMES: dict[type[Any], str] = {
    Ready: "ready",
    Status: "status",
    Hearing: "hearing",
    Caption: "caption",
    Stopped: "stopped",
    Latency: "latency",
    Problem: "problem",
    Ended: "ended",
} | {kind: name for name, kind in _COMMANDS.items()}


def render(message: Event | Command) -> str:
    """A message as JSON."""
    return json.dumps(
        {"type": _NAMES[type(message)], **dataclasses.asdict(message)}, ensure_ascii=False, separators=(",", ":")
    )


def parse(data: str | bytes) -> Command:
    """The command in a message from outside.

    Raises:
        InputError: no command; says what is wrong with it.
    """
    fields = _object(data)
    name = fields.pop("type", None)
    kind = _COMMANDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise InputError(f"unknown message type {_short(name)}; known: {', '.join(_COMMANDS)}")
    known = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(set(fields) - set(known)):
        raise InputError(f"a {name} message has no field {_short(unknown[0])}; known: {', '.join(known) or 'none'}")
    values: dict[str, Any] = {}
    for key, field in known.items():
        if key in fields:
            values[key] = _checked(f"{name}.{key}", str(field.type), fields[key])
        elif field.default is dataclasses.MISSING:
            raise InputError(f"a {name} message needs the field {key}")
    return kind(**values)


def _object(data: str | bytes) -> dict[str, Any]:
    if len(data) > MAX_MESSAGE_BYTES:
        raise InputError(f"a message of {len(data)} bytes; at most {MAX_MESSAGE_BYTES} are read")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"a message that is no JSON: {str(error)[:80]}") from None
    if not isinstance(value, dict):
        raise InputError(f'a message must be a JSON object such as {{"type": "bye"}}, got {_short(value)}')
    return value


def _checked(name: str, kind: str, value: object) -> Any:
    """The value, if it is of the kind that a field's annotation names."""
    if value is None and kind.endswith("| None"):
        return None
    kind = kind.removesuffix(" | None")
    if kind == "str" and isinstance(value, str):
        text = value.strip()
        if not text or len(text) > MAX_TEXT:
            raise InputError(f"{name} must hold 1 to {MAX_TEXT} characters, got {len(text)}")
        return text.encode("utf-8", "replace").decode()
    if kind == "bool" and isinstance(value, bool):
        return value
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else -1
    if kind == "int" and 0 <= number < 1e12:
        return int(number)
    if kind == "float" and 0 <= number < 1e12:
        return float(number)
    raise InputError(f"{name} must be a {kind}{' from 0' if kind in ('int', 'float') else ''}, got {_short(value)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
