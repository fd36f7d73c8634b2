"""A WebSocket that speaks OpenAI Realtime's names (GA), at ``/v1/realtime``.

    GET /v1/realtime?avatar=NAME      a session of its own; it ends with the connection
    GET /v1/realtime?call_id=ID       joins a session that stands, such as one that was begun over WebRTC

The token comes in the Authorization header or, from browsers, as a subprotocol (``openai-insecure-api-key.TOKEN``
beside ``realtime``), never in the URL, and is checked before anything is allocated. One who does not speak Realtime is
closed with 1008.
"""

from __future__ import annotations

import json
from collections import Counter

from aiohttp import WSCloseCode, web

from streamdiff.serve.leases import Refused
from streamdiff.serve.protocol import Ending
from streamdiff.serve.realtime_events import MAX_EVENT_BYTES
from streamdiff.serve.realtime_response import Fields
from streamdiff.serve.realtime_session import Realtime
from streamdiff.serve.server import HOUSE, admits_itself
from streamdiff.serve.websocket import Connection, Kind, Outbox, admitted

PROTOCOL = "realtime"
_MAX_CLIENTS = 16
"""Connections to one session."""
_KINDS: dict[str, Kind] = {"streamdiff.video.delta": "picture", "response.output_audio.delta": "sound"}
_CLIENTS: web.AppKey[Counter[str]] = web.AppKey("realtime_clients", Counter[str])


def realtime(app: web.Application) -> None:
    """A `Door`: adds ``/v1/realtime``."""
    app[_CLIENTS] = Counter()
    app.router.add_get("/v1/realtime", _connect)


@admits_itself
async def _connect(request: web.Request) -> web.StreamResponse:
    house, guest = request.app[HOUSE], admitted(request, PROTOCOL)
    call_id = request.query.get("call_id")
    if call_id is None:
        call = await house.begin(guest, avatar=request.query.get("avatar", ""))
    else:
        try:
            call = house.call_of(guest, call_id)
        except KeyError:
            raise web.HTTPNotFound(reason="There is no such session") from None
    clients = request.app[_CLIENTS]
    if clients[call.id] >= _MAX_CLIENTS:
        raise Refused(f"this session has {_MAX_CLIENTS} connections already", retry_after_s=10)
    outbox, has_left = Outbox(sounds_per_s=call.pump.fps), False
    client = Realtime(call, _Wire(outbox), model=request.query.get("model", "")[:200])
    connection = Connection(request, client, outbox, protocol=PROTOCOL, max_bytes=MAX_EVENT_BYTES, log_id=call.log_id)
    clients[call.id] += 1
    try:
        has_left = await connection.run()
    finally:
        clients[call.id] -= 1
        if not clients[call.id]:
            del clients[call.id]
        # One that was lost or too slow may come back with call_id, as long as the lease waits for viewers.
        if call_id is None and (has_left or outbox.code == WSCloseCode.POLICY_VIOLATION):
            await house.calls.end(call, Ending.LEFT)
    return connection.socket


class _Wire:
    """Events as JSON into an outbox; a `realtime_session.Wire`."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    def send(self, event: Fields) -> bool:
        """Of `Wire`."""
        data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
        return self._outbox.put(_KINDS.get(event["type"], "event"), data)

    def drop_sound(self) -> None:
        """Of `Wire`."""
        self._outbox.drop("sound")

    def close(self, code: int, reason: str) -> None:
        """Of `Wire`."""
        self._outbox.close(code, reason)
