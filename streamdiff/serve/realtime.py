"""A WebSocket that speaks OpenAI Realtime's names (GA), at ``/v1/realtime``.

    GET /v1/realtime?avatar=NAME      a session of its own; it ends with the connection
    GET /v1/realtime?call_id=ID       joins a session that stands, such as one that was begun over WebRTC

The token comes in the Authorization header or, from browsers, as a subprotocol (``openai-insecure-api-key.TOKEN``
beside ``realtime``), never in the URL, and is checked before anything is allocated. A client that reads too slowly
loses pictures first; one that leaves sound or events unread for too long is closed with 1013, one that does not speak
Realtime with 1008.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections import Counter, deque
from typing import Literal, TypeAlias

from aiohttp import WSCloseCode, WSMsgType, web

from streamdiff.errors import InputError
from streamdiff.serve.calls import Call
from streamdiff.serve.gate import bearer
from streamdiff.serve.leases import Refused
from streamdiff.serve.protocol import Ending
from streamdiff.serve.realtime_events import MAX_EVENT_BYTES
from streamdiff.serve.realtime_response import Fields
from streamdiff.serve.realtime_session import Realtime
from streamdiff.serve.server import HOUSE, House, admit, admits_itself
from streamdiff.serve.webrtc import Bucket

logger = logging.getLogger(__name__)

PROTOCOL = "realtime"
_KEY_PREFIX = "openai-insecure-api-key."
_MAX_CLIENTS = 16
"""Connections to one session."""
_MESSAGES_PER_S = 200
"""More are read as slowly as this."""
_HEARTBEAT_S = 20.0
_SEND_BUFFER = 131_072
"""Bytes that the kernel may hold back: what lies there can neither be dropped nor overtaken."""
_STALL_S = 5.0
"""A client that takes nothing for so long is given up."""
_CLOSE_S = 2.0
_LAST_S = 5.0
"""What was sent before the end may take so long to leave."""
_Kind: TypeAlias = Literal["picture", "sound", "event"]
_MOST: dict[_Kind, int] = {"picture": 25, "sound": 125, "event": 1_000}
"""Messages that may wait for one client: a second of pictures, five of sound."""
_KINDS: dict[str, _Kind] = {"streamdiff.video.delta": "picture", "response.output_audio.delta": "sound"}


_CLIENTS: web.AppKey[Counter[str]] = web.AppKey("realtime_clients", Counter[str])


def realtime(app: web.Application) -> None:
    """A `Door`: adds ``/v1/realtime``."""
    app[_CLIENTS] = Counter()
    app.router.add_get("/v1/realtime", _connect)


@admits_itself
async def _connect(request: web.Request) -> web.StreamResponse:
    house, offered = request.app[HOUSE], _protocols(request)
    guest = admit(request, _token(request, offered))
    if request.headers.get("Upgrade", "").lower() != "websocket":
        raise web.HTTPUpgradeRequired(reason="This is a WebSocket")
    if offered and PROTOCOL not in offered:
        raise InputError(f"the subprotocol spoken here is {PROTOCOL}; offer it beside the key")
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
    clients[call.id] += 1
    try:
        return await _Connection(request, house, call, is_owner=call_id is None).run()
    finally:
        clients[call.id] -= 1
        if not clients[call.id]:
            del clients[call.id]


def _protocols(request: web.Request) -> tuple[str, ...]:
    offered = ",".join(request.headers.getall("Sec-WebSocket-Protocol", ()))
    return tuple(name for name in (part.strip() for part in offered.split(",")) if name)


def _token(request: web.Request, offered: tuple[str, ...]) -> str | None:
    keys = (name.removeprefix(_KEY_PREFIX) for name in offered if name.startswith(_KEY_PREFIX))
    return bearer(request.headers.get("Authorization")) or next(keys, None)


class _Connection:
    """One client's WebSocket."""

    def __init__(self, request: web.Request, house: House, call: Call, *, is_owner: bool) -> None:
        self._request, self._house, self._call, self._is_owner = request, house, call, is_owner
        # Without a common subprotocol aiohttp would log what was offered, keys included: `_connect` refuses that.
        self._socket = web.WebSocketResponse(
            protocols=(PROTOCOL,),
            heartbeat=_HEARTBEAT_S,
            max_msg_size=MAX_EVENT_BYTES,
            compress=False,
            timeout=_CLOSE_S,
        )
        self._outbox = Outbox()
        model = request.query.get("model", "")[:200]
        self._realtime = Realtime(call, self._outbox, model=model)

    async def run(self) -> web.StreamResponse:
        """Serve it until one of the two ends it."""
        outbox, has_left = self._outbox, False
        try:
            await self._socket.prepare(self._request)
            self._shrink_buffer()
            self._realtime.start()
            has_left = await self._converse()
            if outbox.is_closing:
                await self._close()
        except ConnectionError:
            logger.info("session %s: a connection broke", self._call.log_id)
        finally:
            self._realtime.close()
            code = self._socket.close_code
            logger.info("session %s: a connection ended, %s %s", self._call.log_id, code, outbox.reason)
            # One that was lost or too slow may come back with call_id, as long as the lease waits for viewers.
            if self._is_owner and (has_left or outbox.code == WSCloseCode.POLICY_VIOLATION):
                await self._house.calls.end(self._call, Ending.LEFT)
        return self._socket

    async def _converse(self) -> bool:
        """Read and write until either is over; whether the client said goodbye."""
        reading, writing = asyncio.create_task(self._read()), asyncio.create_task(self._write())
        try:
            await asyncio.wait((reading, writing), return_when=asyncio.FIRST_COMPLETED)
        finally:
            # The session is free at once, whatever the connection still has to do.
            self._realtime.close()
            for task in (reading, writing):
                task.cancel()
        done = await asyncio.gather(reading, writing, return_exceptions=True)
        for error in done:
            if isinstance(error, Exception) and not isinstance(error, ConnectionError):
                raise error
        return done[0] is True

    async def _read(self) -> bool:
        """Read until the connection is over; whether the client said goodbye."""
        bucket = Bucket(_MESSAGES_PER_S)
        while True:
            message = await self._socket.receive()
            if message.type in (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR):
                return message.type is WSMsgType.CLOSE
            if message.type is not WSMsgType.TEXT:
                self._outbox.close(WSCloseCode.POLICY_VIOLATION, "events are text")
            elif not self._outbox.is_closing:
                self._realtime.receive(message.data)
            while not bucket.take():
                await asyncio.sleep(0.02)

    async def _write(self) -> None:
        """Send what waits, one message at a time, until the outbox is closed."""
        try:
            while (text := await self._outbox.next()) is not None:
                async with asyncio.timeout(_STALL_S):
                    await self._socket.send_str(text)
        except TimeoutError:
            self._outbox.give_up()

    async def _close(self) -> None:
        """Tell why, wait a moment for the client to agree, and let go."""
        transport = self._request.transport
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * _CLOSE_S):
                await self._socket.close(code=self._outbox.code, message=self._outbox.reason.encode(), drain=False)
        if transport is not None:
            transport.close()
            asyncio.get_running_loop().call_later(_LAST_S, transport.abort)

    def _shrink_buffer(self) -> None:
        transport = self._request.transport
        plug = transport.get_extra_info("socket") if transport is not None else None
        if plug is not None:
            with contextlib.suppress(OSError):
                plug.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)


class Outbox:
    """What waits for one client; a `Wire`."""

    def __init__(self) -> None:
        self.code, self.reason = 1000, ""
        self.is_closing = self.is_slow = False
        self.num_lost = 0
        """Pictures that were dropped."""
        self._waiting: deque[tuple[_Kind, str]] = deque()
        self._counts: Counter[_Kind] = Counter()
        self._changed = asyncio.Event()

    def send(self, event: Fields) -> bool:
        """Of `Wire`."""
        kind = _KINDS.get(event["type"], "event")
        if self.is_closing:
            return False
        if self._counts[kind] >= _MOST[kind]:
            if kind != "picture":
                self.give_up()
                return False
            self._drop("picture")
            self.num_lost += 1
            return False
        self._waiting.append((kind, json.dumps(event, ensure_ascii=False, separators=(",", ":"))))
        self._counts[kind] += 1
        self._changed.set()
        return True

    def drop_sound(self) -> None:
        """Of `Wire`."""
        self._drop("sound")

    def close(self, code: int, reason: str) -> None:
        """Of `Wire`; the first reason stands."""
        if not self.is_closing:
            self.is_closing, self.code, self.reason = True, code, reason
            self._changed.set()

    def give_up(self) -> None:
        """The client does not keep up: forget what waits, and close with 1013."""
        self._waiting.clear()
        self._counts.clear()
        self.close(WSCloseCode.TRY_AGAIN_LATER, "too slow")
        self.is_slow = True

    async def next(self) -> str | None:
        """The next message; None: close now."""
        while not self._waiting:
            if self.is_closing:
                return None
            self._changed.clear()
            await self._changed.wait()
        kind, text = self._waiting.popleft()
        self._counts[kind] -= 1
        return text

    def _drop(self, kind: _Kind) -> None:
        self.num_lost += self._counts[kind] if kind == "picture" else 0
        self._waiting = deque(entry for entry in self._waiting if entry[0] != kind)
        self._counts[kind] = 0
