"""Simli's wire protocol: who speaks it (Pipecat's and LiveKit's plugins do) talks to a face here by changing a URL.

    POST /compose/token        {"faceId": AVATAR, ...} -> {"session_token": TICKET}; the key is a token of ours
    GET  /compose/ice          the ICE servers
    WS   /compose/webrtc/p2p   ?session_token=TICKET: an offer -> the answer, then START

Then the client sends sound (16-bit PCM, 16 kHz, mono) and ``SKIP``, ``DONE`` or ``PLAY_IMMEDIATE``; it is told
``SPEAK`` and ``SILENT``, and why the session ends. The protocol has no word for the end of an utterance: a pause is
one. ``/compose/webrtc/livekit``, where the server joins a LiveKit room, is not spoken.

A ticket is in a URL, where proxies log it: it opens one session, once, within a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from aiohttp import WSMessage, WSMsgType, web

from streamdiff.errors import InputError
from streamdiff.serve.calls import Call
from streamdiff.serve.gate import Denied, Guest, bearer
from streamdiff.serve.leases import Refused
from streamdiff.serve.protocol import Ended, Ending, Event, Status
from streamdiff.serve.server import HOUSE, House, admit, admits_itself
from streamdiff.serve.webrtc import MAX_SDP_BYTES, Bucket

logger = logging.getLogger(__name__)

RATE_HZ = 16_000
TICKET_S = 60.0
_MAX_TICKETS, _MAX_TICKETS_EACH = 4_096, 32
_MAX_CONFIG_BYTES = 16_384
_MAX_MESSAGE_BYTES = 262_144
"""The client sends its first 128,000 bytes at once."""
_MESSAGES_PER_S = 200
"""More are read as slowly as this."""
_OFFER_S, _CONNECT_S, _SEND_S, _HEARTBEAT_S, _CLOSE_S = 10.0, 20.0, 5.0, 20.0, 2.0
_PAUSE_S = 0.3
"""An utterance ends where no sound has come for so long, and what came has been spoken but for `_TAIL_S`."""
_TAIL_S = 0.2
_BYTES_PER_S = 4_000_000
"""Sound that comes faster than this, 125 times as fast as it is spoken, is read as slowly."""
_TICK_S = 0.05
_MAX_EVENTS = 64
_IMMEDIATE, _SKIP, _DONE = b"PLAY_IMMEDIATE", b"SKIP", b"DONE"
_PICTURE_CONTROLS = (b"CAM_", b"BG_", b"FG_")
_REASONS = {Ending.IDLE: "IDLE", Ending.LIFETIME: "MAX"}
"""What the client calls them; the others have the names of `Ending`."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """Opens one session."""

    guest: Guest
    avatar: str
    lifetime_s: float
    idle_s: float
    until_s: float


@dataclass(slots=True)
class Tickets:
    """Tickets that were given out and not used."""

    _prefix: str = ""
    """See `Leases.prefix`."""
    _by_name: dict[str, Ticket] = field(default_factory=dict[str, Ticket])

    def issue(self, ticket: Ticket) -> str:
        """Its name. Refused: too many wait to be used, of this guest or of all."""
        now_s = time.monotonic()
        self._by_name = {name: known for name, known in self._by_name.items() if known.until_s > now_s}
        of_guest = sum(known.guest.user == ticket.guest.user for known in self._by_name.values())
        if of_guest >= _MAX_TICKETS_EACH or len(self._by_name) >= _MAX_TICKETS:
            raise Refused("too many session tokens wait to be used", retry_after_s=round(TICKET_S))
        name = self._prefix + secrets.token_urlsafe(32)
        self._by_name[name] = ticket
        return name

    def use(self, name: str) -> Ticket:
        """The ticket with this name, which is none afterwards. Denied: there is none."""
        ticket = self._by_name.pop(name, None)
        if ticket is None or ticket.until_s <= time.monotonic():
            raise Denied("no valid session token")
        return ticket

    def user_of(self, name: str) -> str:
        """Whom the ticket with this name was given to; empty: there is none. It can still be used."""
        ticket = self._by_name.get(name)
        return "" if ticket is None else ticket.guest.user


TICKETS: web.AppKey[Tickets] = web.AppKey("simli_tickets", Tickets)


def simli(app: web.Application) -> None:
    """A `Door`: adds ``/compose``."""
    app[TICKETS] = Tickets(app[HOUSE].calls.leases.prefix)
    app.router.add_post("/compose/token", _token)
    app.router.add_get("/compose/ice", _ice)
    app.router.add_get("/compose/webrtc/p2p", _connect)


@admits_itself
async def _token(request: web.Request) -> web.StreamResponse:
    house = request.app[HOUSE]
    try:
        guest = _admit(request)
    except Denied:
        house.calls.meters.denied.inc()
        return web.json_response({"detail": "INVALID_API_KEY"}, status=401)
    config = await _config(request)
    avatar = config.get("faceId")
    if not isinstance(avatar, str) or avatar not in house.cast.names or not guest.may_see(avatar):
        return web.json_response({"detail": "INVALID_FACE_ID"}, status=400)
    ticket = Ticket(
        guest,
        avatar,
        lifetime_s=_seconds(config, "maxSessionLength", 600.0),
        idle_s=_seconds(config, "maxIdleTime", 30.0),
        until_s=time.monotonic() + TICKET_S,
    )
    return web.json_response({"session_token": request.app[TICKETS].issue(ticket)})


@admits_itself
async def _ice(request: web.Request) -> web.StreamResponse:
    _admit(request)
    servers = request.app[HOUSE].ice_servers
    return web.json_response([{"urls": s.urls, "username": s.username, "credential": s.credential} for s in servers])


@admits_itself
async def _connect(request: web.Request) -> web.StreamResponse:
    house = request.app[HOUSE]
    if request.headers.get("Upgrade", "").lower() != "websocket":
        raise web.HTTPUpgradeRequired(reason="This is a WebSocket")
    ticket = request.app[TICKETS].use(request.query.get("session_token", ""))
    call = await house.begin(ticket.guest, avatar=ticket.avatar)
    return await _Connection(request, house, call, ticket).run()


def _admit(request: web.Request) -> Guest:
    key = request.headers.get("x-simli-api-key") or bearer(request.headers.get("Authorization"))
    return admit(request, key)


async def _config(request: web.Request) -> Mapping[str, Any]:
    """What a client asks for; fields that mean nothing here are left alone."""
    if (request.content_length or 0) > _MAX_CONFIG_BYTES:
        raise InputError(f"a body of {request.content_length} bytes; at most {_MAX_CONFIG_BYTES} are read")
    raw = bytearray()
    try:
        async with asyncio.timeout(_OFFER_S):
            while len(raw) <= _MAX_CONFIG_BYTES and not request.content.at_eof():
                raw += await request.content.readany()
        config = json.loads(raw) if len(raw) <= _MAX_CONFIG_BYTES else None
    except (ValueError, RecursionError, TimeoutError):
        config = None
    if not isinstance(config, dict):
        raise InputError('the body must be a JSON object such as {"faceId": "demo"}')
    return config


def _seconds(config: Mapping[str, Any], name: str, default: float) -> float:
    value = config.get(name, default)
    if type(value) not in (int, float) or not 1 <= value <= 86_400:
        raise InputError(f"{name} must be a number of seconds from 1 to 86400")
    return float(value)


class _Connection:
    """One client: its WebSocket, its peer, and the sound that it sends."""

    def __init__(self, request: web.Request, house: House, call: Call, ticket: Ticket) -> None:
        self._request, self._house, self._call, self._ticket = request, house, call, ticket
        self._socket = web.WebSocketResponse(
            heartbeat=_HEARTBEAT_S, max_msg_size=_MAX_MESSAGE_BYTES, compress=False, timeout=_CLOSE_S
        )
        self._events: asyncio.Queue[str | None] = asyncio.Queue(_MAX_EVENTS)
        self._began_s = self._active_s = time.monotonic()
        self._came_s = self._spoken_s = 0.0
        self._is_open = self._speaks = False
        self._ended = Ending.GONE
        self._odd = b""

    async def run(self) -> web.StreamResponse:
        """Serve it until one of the two ends it."""
        ending = Ending.GONE
        try:
            await self._socket.prepare(self._request)
            if await self._begin():
                ending = await self._converse()
        except (InputError, Refused) as error:
            await self._tell(f"ERROR: {error}")
        except (ConnectionError, TimeoutError):
            logger.info("session %s: a connection broke", self._call.log_id)
        except Exception:
            ending = Ending.FAILED
            logger.exception("session %s: a connection failed", self._call.log_id)
            await self._tell("ERROR: the session failed")
        finally:
            self._call.unsubscribe(self._on_event)
            await self._house.calls.end(self._call, ending)
            with contextlib.suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(2 * _CLOSE_S):
                    await self._socket.close()
        return self._socket

    async def _begin(self) -> bool:
        """Answer the offer, and wait until media can flow; whether the client still wants it."""
        message = await self._socket.receive(timeout=_OFFER_S)
        if message.type not in (WSMsgType.TEXT, WSMsgType.BINARY):
            return False
        peer, answer_sdp = await self._house.join(self._call, _offer(message), None)
        await self._tell(json.dumps({"sdp": answer_sdp, "type": "answer"}))
        try:
            async with asyncio.timeout(_CONNECT_S):
                await peer.connected.wait()
        except TimeoutError:
            raise InputError(f"the connection did not stand after {_CONNECT_S:.0f} s") from None
        await self._tell("START")
        self._call.subscribe(self._on_event)
        return True

    async def _converse(self) -> Ending:
        """Hear and tell until either end is reached; why."""
        tasks = [asyncio.create_task(work) for work in (self._read(), self._write(), self._watch())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        ending = done.pop().result()
        if ending is not Ending.LEFT:
            await self._tell(f"CLOSING REASON: {_REASONS.get(ending, ending.value.upper())}")
            await self._tell("STOP")
        return ending

    async def _read(self) -> Ending:
        bucket = Bucket(_MESSAGES_PER_S)
        while True:
            message = await self._socket.receive()
            if message.type not in (WSMsgType.TEXT, WSMsgType.BINARY):
                return Ending.LEFT if message.type is WSMsgType.CLOSE else Ending.GONE
            data = message.data.encode() if message.type is WSMsgType.TEXT else message.data
            if data == _DONE:
                return Ending.LEFT
            self._obey(data, is_text=message.type is WSMsgType.TEXT)
            await asyncio.sleep(len(data) / _BYTES_PER_S)
            while not bucket.take():
                await asyncio.sleep(0.02)

    async def _write(self) -> Ending:
        while (text := await self._events.get()) is not None:
            await self._tell(text)
        return self._ended

    async def _watch(self) -> Ending:
        """End an utterance after a pause, and the session at the times that the client set."""
        while True:
            await asyncio.sleep(_TICK_S)
            now_s = time.monotonic()
            if self._is_open and now_s > max(self._came_s + _PAUSE_S, self._spoken_s - _TAIL_S):
                self._is_open = False
                self._call.session.end()
            if self._speaks or self._is_open:
                self._active_s = now_s
            if now_s - self._began_s > self._ticket.lifetime_s:
                return Ending.LIFETIME
            if now_s - self._active_s > self._ticket.idle_s:
                return Ending.IDLE

    def _obey(self, data: bytes, *, is_text: bool) -> None:
        if data == _SKIP:
            self._skip()
        elif data.startswith(_IMMEDIATE):
            self._skip()
            self._hear(data.removeprefix(_IMMEDIATE))
        elif data.startswith(_PICTURE_CONTROLS):
            self._queue("Selected model does not support cameras, backgrounds and foregrounds")
        elif is_text:
            self._queue("pong" if data == b"ping" else f"WARNING: unknown message of {len(data)} characters")
        else:
            self._hear(data)

    def _skip(self) -> None:
        self._is_open, self._odd, self._spoken_s = False, b"", 0.0
        self._call.interrupt()

    def _hear(self, data: bytes) -> None:
        data = (self._odd if self._is_open else b"") + data
        self._odd = data[len(data) // 2 * 2 :]
        data = data[: len(data) // 2 * 2]
        # Clients keep a connection warm with silence, which is no utterance.
        if not data or not (self._is_open or any(data)):
            return
        self._call.touch()
        try:
            self._call.session.push_audio(np.frombuffer(data, "<i2"), RATE_HZ)
        except InputError as error:
            self._queue(f"WARNING: {error}")
            return
        self._is_open, self._came_s = True, time.monotonic()
        self._spoken_s = max(self._came_s, self._spoken_s) + len(data) / 2 / RATE_HZ

    def _on_event(self, event: Event) -> None:
        match event:
            case Status(state):
                if (speaks := state == "speaking") != self._speaks:
                    self._speaks = speaks
                    self._queue("SPEAK" if speaks else "SILENT")
            case Ended(reason):
                self._ended = reason
                self._queue(None)
            case _:
                pass

    def _queue(self, text: str | None) -> None:
        with contextlib.suppress(asyncio.QueueFull):
            self._events.put_nowait(text)

    async def _tell(self, text: str) -> None:
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(_SEND_S):
                await self._socket.send_str(text)


def _offer(message: WSMessage) -> str:
    """The SDP of the first message.

    Raises:
        InputError: it is no offer.
    """
    data = message.data
    try:
        offer = json.loads(data) if len(data) <= 2 * MAX_SDP_BYTES else None
    except (ValueError, RecursionError):
        offer = None
    if not isinstance(offer, dict) or offer.get("type") != "offer" or not isinstance(offer.get("sdp"), str):
        raise InputError('the first message must be an offer, {"sdp": ..., "type": "offer"}')
    return offer["sdp"]
