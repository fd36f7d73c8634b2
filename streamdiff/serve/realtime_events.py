"""OpenAI Realtime's client events (GA names): frozen values, checked once, and JSON before.

Bounded in bytes by `MAX_EVENT_BYTES`. Fields that this server does not know are ignored, for clients are newer than
servers; the ones that it knows have the right type or the event is refused with a sentence.

>>> parse('{"type": "conversation.item.truncate", "item_id": "item_1", "content_index": 0, "audio_end_ms": 480}')[1]
TruncateItem(item_id='item_1', audio_end_ms=480)
"""

from __future__ import annotations

import base64
import binascii
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from streamdiff.errors import InputError
from streamdiff.serve.protocol import MAX_TEXT

MAX_EVENT_BYTES = 1 << 20
"""16 s of sound in base64."""
RATE_HZ = 24_000
_MAX_ID = 64
_MAX_PARTS = 64


class BadEvent(InputError):  # noqa: N818  it says what came
    """A client event that cannot be followed; told to the client as an ``error`` event.

    ``is_broken``: it is no event at all, and who sends such a thing speaks another protocol.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "invalid_value",
        param: str | None = None,
        event_id: str | None = None,
        is_broken: bool = False,
    ) -> None:
        super().__init__(message)
        self.code, self.param, self.event_id, self.is_broken = code, param, event_id, is_broken


@dataclass(frozen=True, slots=True)
class UpdateSession:
    """``session.update``: of all that may be set, only whether encoded pictures are wanted changes anything."""

    video: bool | None = None


@dataclass(frozen=True, slots=True)
class AppendAudio:
    """``input_audio_buffer.append``."""

    pcm: bytes
    """Little-endian int16, mono, 24 kHz."""


@dataclass(frozen=True, slots=True)
class CommitAudio:
    """``input_audio_buffer.commit``: whoever spoke has finished."""


@dataclass(frozen=True, slots=True)
class ClearAudio:
    """``input_audio_buffer.clear``."""


@dataclass(frozen=True, slots=True)
class CreateItem:
    """``conversation.item.create`` of a user's text."""

    text: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class CreateResponse:
    """``response.create``; ``text``: what its own ``input`` says, None without one."""

    text: str | None = None


@dataclass(frozen=True, slots=True)
class CancelResponse:
    """``response.cancel``."""

    response_id: str | None = None


@dataclass(frozen=True, slots=True)
class ClearOutput:
    """``output_audio_buffer.clear``."""


@dataclass(frozen=True, slots=True)
class TruncateItem:
    """``conversation.item.truncate``: so much of an item was heard."""

    item_id: str
    audio_end_ms: int


ClientEvent: TypeAlias = (
    UpdateSession
    | AppendAudio
    | CommitAudio
    | ClearAudio
    | CreateItem
    | CreateResponse
    | CancelResponse
    | ClearOutput
    | TruncateItem
)


def parse(data: str | bytes) -> tuple[str | None, ClientEvent]:
    """The client's own id of an event, and the event.

    Raises:
        BadEvent: none that can be followed.
    """
    fields = _object(data)
    event_id = fields.get("event_id")
    if event_id is not None and not (isinstance(event_id, str) and len(event_id) <= 512):
        raise BadEvent("event_id must be a string of at most 512 characters", param="event_id")
    kind = fields.get("type")
    read = _READERS.get(kind) if isinstance(kind, str) else None
    try:
        if read is None:
            raise BadEvent(
                f"unknown event type {_short(kind)}; known: {', '.join(_READERS)}", code="unknown_event", param="type"
            )
        return event_id, read(fields)
    except BadEvent as error:
        error.event_id = event_id
        raise


def session_video(session: Mapping[str, Any], at: str = "session") -> bool | None:
    """Whether a session's settings ask for encoded pictures; None where they say nothing.

    Raises:
        BadEvent: sound in a format that is not spoken here, or a setting of the wrong type.
    """
    if session.get("type", "realtime") != "realtime":
        raise BadEvent("only sessions of type realtime are held here", param=f"{at}.type")
    for side in ("input", "output"):
        half = _part(_part(session, "audio", at), side, f"{at}.audio")
        form = _part(half, "format", f"{at}.audio.{side}")
        if form.get("type", "audio/pcm") != "audio/pcm" or form.get("rate", RATE_HZ) != RATE_HZ:
            raise BadEvent(f"sound is audio/pcm at {RATE_HZ} Hz here", param=f"{at}.audio.{side}.format")
    video = _part(session, "streamdiff", at).get("video")
    if video is not None and not isinstance(video, bool):
        raise BadEvent("video must be true or false", param=f"{at}.streamdiff.video")
    return video


def new_id(kind: str) -> str:
    """An identifier that nobody can guess, such as ``item_x3...``."""
    return f"{kind}_{secrets.token_hex(8)}"


def _object(data: str | bytes) -> dict[str, Any]:
    if len(data) > MAX_EVENT_BYTES:
        raise BadEvent(f"an event of {len(data)} bytes; at most {MAX_EVENT_BYTES} are read", is_broken=True)
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        message = f"an event that is no JSON: {str(error)[:80]}"
        raise BadEvent(message, code="invalid_json", is_broken=True) from None
    if not isinstance(value, dict):
        raise BadEvent(f"an event must be a JSON object with a type, got {_short(value)}", is_broken=True)
    return value


def _update(fields: Mapping[str, Any]) -> UpdateSession:
    if "session" not in fields:
        raise BadEvent("a session.update needs the field session", param="session")
    return UpdateSession(session_video(_part(fields, "session", "")))


def _append(fields: Mapping[str, Any]) -> AppendAudio:
    audio = fields.get("audio")
    try:
        if not isinstance(audio, str):
            raise ValueError
        pcm = base64.b64decode(audio, validate=True)
    except (ValueError, binascii.Error):
        raise BadEvent("audio must be base64 of little-endian int16 samples", param="audio") from None
    if len(pcm) % 2:
        raise BadEvent(f"{len(pcm)} bytes are no whole number of int16 samples", param="audio")
    return AppendAudio(pcm)


def _create_item(fields: Mapping[str, Any]) -> CreateItem:
    item = _part(fields, "item", "")
    return CreateItem(_item_text(item, "item"), _id(item, "id", "item", optional=True))


def _create_response(fields: Mapping[str, Any]) -> CreateResponse:
    response = _part(fields, "response", "")
    if response.get("conversation", "auto") != "auto":
        raise BadEvent("a face has one conversation; leave conversation out", param="response.conversation")
    items = response.get("input")
    if items is None:
        return CreateResponse()
    if not isinstance(items, list) or not 0 < len(items) <= _MAX_PARTS:
        raise BadEvent(f"input must be a list of 1 to {_MAX_PARTS} messages", param="response.input")
    texts = [_item_text(item, f"response.input[{k}]") for k, item in enumerate(items)]
    return CreateResponse(_bounded("\n".join(texts), "response.input"))


def _cancel(fields: Mapping[str, Any]) -> CancelResponse:
    return CancelResponse(_id(fields, "response_id", "", optional=True))


def _truncate(fields: Mapping[str, Any]) -> TruncateItem:
    end_ms = fields.get("audio_end_ms")
    if type(end_ms) is not int or not 0 <= end_ms < 1 << 40:
        raise BadEvent(f"audio_end_ms must be a whole number from 0, got {_short(end_ms)}", param="audio_end_ms")
    item_id = _id(fields, "item_id", "")
    assert item_id is not None
    return TruncateItem(item_id, end_ms)


_READERS: dict[str, Callable[[Mapping[str, Any]], ClientEvent]] = {
    "session.update": _update,
    "input_audio_buffer.append": _append,
    "input_audio_buffer.commit": lambda _: CommitAudio(),
    "input_audio_buffer.clear": lambda _: ClearAudio(),
    "conversation.item.create": _create_item,
    "conversation.item.truncate": _truncate,
    "response.create": _create_response,
    "response.cancel": _cancel,
    "output_audio_buffer.clear": lambda _: ClearOutput(),
}


def _item_text(item: object, at: str) -> str:
    """What a user's message says."""
    if not isinstance(item, dict):
        raise BadEvent(f"{at} must be an object", param=at)
    fields: dict[str, Any] = item
    if fields.get("type", "message") != "message" or fields.get("role") != "user":
        raise BadEvent("only messages of the role user can be answered here", code="unsupported", param=at)
    parts = fields.get("content")
    if not isinstance(parts, list) or not 0 < len(parts) <= _MAX_PARTS:
        raise BadEvent(f"content must be a list of 1 to {_MAX_PARTS} parts", param=f"{at}.content")
    return _bounded("\n".join(_part_text(part, f"{at}.content") for part in parts), f"{at}.content")


def _part_text(part: object, at: str) -> str:
    fields: dict[str, Any] = part if isinstance(part, dict) else {}
    text = fields.get("text")
    if fields.get("type") != "input_text" or not isinstance(text, str):
        raise BadEvent(
            'content must be parts such as {"type": "input_text", "text": "Hello."}; sound goes to '
            "input_audio_buffer.append",
            code="unsupported",
            param=at,
        )
    return text


def _bounded(text: str, at: str) -> str:
    text = text.strip().encode("utf-8", "replace").decode()
    if not 0 < len(text) <= MAX_TEXT:
        raise BadEvent(f"a text must hold 1 to {MAX_TEXT} characters, got {len(text)}", param=at)
    return text


def _part(fields: Mapping[str, Any], key: str, at: str) -> Mapping[str, Any]:
    """An object within an object; empty where there is none."""
    value = fields.get(key)
    if value is not None and not isinstance(value, dict):
        name = f"{at}.{key}" if at else key
        raise BadEvent(f"{name} must be an object, got {_short(value)}", param=name)
    return value or {}


def _id(fields: Mapping[str, Any], key: str, at: str, *, optional: bool = False) -> str | None:
    value = fields.get(key)
    if value is None and optional:
        return None
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_ID:
        name = f"{at}.{key}" if at else key
        raise BadEvent(f"{name} must be a string of 1 to {_MAX_ID} characters, got {_short(value)}", param=name)
    return value


def _short(value: object) -> str:
    # The text of a deep list overflows the stack.
    text = repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    return text if len(text) <= 40 else text[:37] + "..."
