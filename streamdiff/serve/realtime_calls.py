"""OpenAI Realtime over WebRTC: an SDP offer begins a session, and its data channel speaks Realtime's names.

    POST /v1/realtime/calls            an offer (application/sdp), or a form with sdp and session -> 201, the answer
    POST /v1/realtime/calls/ID/hangup  ends it

``Location`` names the call; ``/v1/realtime?call_id=ID`` joins it over a WebSocket. Video is one more m-line.
The avatar is named by ``?avatar=NAME``, or in the session as ``{"streamdiff": {"avatar": NAME}}``.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from aiohttp import BodyPartReader, web

from streamdiff.errors import InputError
from streamdiff.serve.calls import Call
from streamdiff.serve.protocol import Ending
from streamdiff.serve.realtime_events import session_video
from streamdiff.serve.realtime_response import Fields
from streamdiff.serve.realtime_session import Realtime
from streamdiff.serve.server import HOUSE, guest_of
from streamdiff.serve.webrtc import MAX_SDP_BYTES, Channel

SDP = "application/sdp"
_MAX_SESSION_BYTES = 131_072
_READ_S = 10.0
_MAX_PARTS = 4


def realtime_calls(app: web.Application) -> None:
    """A `Door`: adds ``/v1/realtime/calls``."""
    app.router.add_post("/v1/realtime/calls", _begin)
    app.router.add_post("/v1/realtime/calls/{id}/hangup", _hang_up)


async def read_offer(request: web.Request) -> str:
    """The SDP that is the body of a request.

    Raises:
        HTTPUnsupportedMediaType: it is something else.
        InputError: it is too long, or did not come in time.
    """
    if request.content_type != SDP:
        raise web.HTTPUnsupportedMediaType(reason=f"An offer is sent as {SDP}")
    if (request.content_length or 0) > MAX_SDP_BYTES:
        raise InputError(f"an offer of {request.content_length} bytes; at most {MAX_SDP_BYTES} are read")
    raw = bytearray()
    try:
        async with asyncio.timeout(_READ_S):
            while len(raw) <= MAX_SDP_BYTES and not request.content.at_eof():
                raw += await request.content.readany()
    except TimeoutError:
        raise InputError(f"the offer did not come in {_READ_S:.0f} s") from None
    return _text(bytes(raw), MAX_SDP_BYTES)


async def _begin(request: web.Request) -> web.StreamResponse:
    house, session = request.app[HOUSE], dict[str, Any]()
    if request.content_type == "multipart/form-data":
        offer_sdp, session = await _form(request)
    else:
        offer_sdp = await read_offer(request)
    session_video(session)
    model, avatar = session.get("model", ""), (session.get("streamdiff") or {}).get("avatar", "")
    if not isinstance(model, str) or not isinstance(avatar, str):
        raise InputError("model and avatar are names")
    call = await house.begin(guest_of(request), avatar=request.query.get("avatar", avatar))
    try:
        _, answer_sdp = await house.join(call, offer_sdp, lambda c, channel: _Tongue(c, channel, model[:200]))
    except BaseException:
        await house.calls.end(call, Ending.LEFT)
        raise
    headers = {"Location": f"/v1/realtime/calls/{call.id}"}
    return web.Response(body=answer_sdp.encode(), status=201, content_type=SDP, headers=headers)


async def _hang_up(request: web.Request) -> web.StreamResponse:
    house = request.app[HOUSE]
    try:
        call = house.call_of(guest_of(request), request.match_info["id"])
    except KeyError:
        raise web.HTTPNotFound(reason="There is no such session") from None
    await house.calls.end(call, Ending.LEFT)
    return web.Response(status=200)


async def _form(request: web.Request) -> tuple[str, dict[str, Any]]:
    """The offer and the session of a multipart form."""
    parts: dict[str, bytes] = {}
    try:
        async with asyncio.timeout(_READ_S):
            reader = await request.multipart()
            while (part := await reader.next()) is not None:
                if not isinstance(part, BodyPartReader) or len(parts) == _MAX_PARTS:
                    raise InputError("the form holds more than sdp and session")
                parts[part.name or ""] = await _bytes(part)
    except TimeoutError:
        raise InputError(f"the form did not come in {_READ_S:.0f} s") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError("this is no form that can be read") from None
    if "sdp" not in parts:
        raise InputError("the form needs a field sdp, with an offer")
    return _text(parts["sdp"], MAX_SDP_BYTES), _session(parts.get("session", b"{}"))


async def _bytes(part: BodyPartReader) -> bytes:
    raw = bytearray()
    while not part.at_eof():
        raw += await part.read_chunk(16_384)
        if len(raw) > _MAX_SESSION_BYTES:
            raise InputError(f"a field of more than {_MAX_SESSION_BYTES} bytes")
    return bytes(raw)


def _session(raw: bytes) -> dict[str, Any]:
    try:
        session: Any = json.loads(raw)
    except (ValueError, RecursionError):
        raise InputError("session must be a JSON object") from None
    if not isinstance(session, dict) or not isinstance(session.get("streamdiff", {}), Mapping):
        raise InputError("session must be a JSON object")
    return session


def _text(raw: bytes, most: int) -> str:
    if len(raw) > most:
        raise InputError(f"an offer of more than {most} bytes")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise InputError("an offer is text") from None


class _Tongue:
    """Realtime's names on a data channel; a `webrtc.Tongue`, and the `Wire` of its session."""

    def __init__(self, call: Call, channel: Channel, model: str) -> None:
        self._channel = channel
        self._realtime = Realtime(call, self, model=model, sends_media=False)
        self._is_closing = False
        self._realtime.start()

    def receive(self, data: str | bytes) -> None:
        """Of `Tongue`."""
        if not self._is_closing:
            self._realtime.receive(data)

    def send(self, event: Fields) -> bool:
        """Of `Wire`."""
        self._channel.send(json.dumps(event, ensure_ascii=False, separators=(",", ":")))
        return True

    def drop_sound(self) -> None:
        """Of `Wire`: a peer connection drops what is late by itself."""

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Of `Tongue` and of `Wire`: a data channel knows no codes."""
        del code, reason
        if not self._is_closing:
            self._is_closing = True
            self._realtime.close()
            self._channel.hang_up()
