"""A WebSocket to one client, whatever is spoken on it: a bounded outbox, keys as subprotocols, an end with a reason.

A client that reads too slowly loses pictures first; one that leaves sound or events unread for too long is closed with
1013.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import Counter, deque
from typing import Literal, Protocol, TypeAlias

from aiohttp import WSCloseCode, WSMsgType, web

from streamdiff.errors import InputError
from streamdiff.serve.gate import Guest, bearer
from streamdiff.serve.protocol import Ending
from streamdiff.serve.server import admit
from streamdiff.serve.webrtc import Bucket

logger = logging.getLogger(__name__)

CLOSE_CODES = {Ending.LEFT: 1000, Ending.FINISHED: 1000, Ending.REVOKED: 1008, Ending.FAILED: 1011}
"""What a connection is closed with when its session has ended; 1001 otherwise."""
_KEY_PREFIX = "openai-insecure-api-key."
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
Kind: TypeAlias = Literal["picture", "sound", "event"]
_MOST_PICTURES, _MOST_EVENTS = 25, 1_000
"""So many may wait for one client: a second of pictures."""
_MOST_SOUND_S = 5.0


class Client(Protocol):
    """Who speaks with the client at the other end. No call blocks or raises."""

    def start(self) -> None:
        """The connection stands."""
        ...

    def receive(self, data: str) -> None:
        """The client says this."""
        ...

    def close(self) -> None:
        """The connection is over; idempotent."""
        ...


def admitted(request: web.Request, protocol: str) -> Guest:
    """Who wants a WebSocket, by the Authorization header or a subprotocol; asked before anything is allocated.

    Raises:
        Denied: no valid token. HTTPUpgradeRequired: this is no WebSocket.
        InputError: subprotocols without this one.
    """
    offered = ",".join(request.headers.getall("Sec-WebSocket-Protocol", ()))
    names = [name for name in (part.strip() for part in offered.split(",")) if name]
    keys = (name.removeprefix(_KEY_PREFIX) for name in names if name.startswith(_KEY_PREFIX))
    guest = admit(request, bearer(request.headers.get("Authorization")) or next(keys, None))
    if request.headers.get("Upgrade", "").lower() != "websocket":
        raise web.HTTPUpgradeRequired(reason="This is a WebSocket")
    if names and protocol not in names:
        raise InputError(f"the subprotocol spoken here is {protocol}; offer it beside the key")
    return guest


class Connection:
    """One client's WebSocket. ``log_id``: what the log calls its session."""

    def __init__(
        self, request: web.Request, client: Client, outbox: Outbox, *, protocol: str, max_bytes: int, log_id: str
    ) -> None:
        self._request, self._client, self._outbox, self._log_id = request, client, outbox, log_id
        # Without a common subprotocol aiohttp would log what was offered, keys included: `admitted` refuses that.
        self.socket = web.WebSocketResponse(
            protocols=(protocol,),
            heartbeat=_HEARTBEAT_S,
            max_msg_size=max_bytes,
            compress=False,
            timeout=_CLOSE_S,
        )

    async def run(self) -> bool:
        """Serve it until one of the two ends it; whether the client said goodbye."""
        outbox, has_left = self._outbox, False
        try:
            await self.socket.prepare(self._request)
            self._shrink_buffer()
            self._client.start()
            has_left = await self._converse()
            if outbox.is_closing:
                await self._close()
        except ConnectionError:
            logger.info("session %s: a connection broke", self._log_id)
        finally:
            self._client.close()
            logger.info("session %s: a connection ended, %s %s", self._log_id, self.socket.close_code, outbox.reason)
        return has_left

    async def _converse(self) -> bool:
        """Read and write until either is over; whether the client said goodbye."""
        reading, writing = asyncio.create_task(self._read()), asyncio.create_task(self._write())
        try:
            await asyncio.wait((reading, writing), return_when=asyncio.FIRST_COMPLETED)
        finally:
            # The session is free at once, whatever the connection still has to do.
            self._client.close()
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
            message = await self.socket.receive()
            if message.type in (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR):
                return message.type is WSMsgType.CLOSE
            if message.type is not WSMsgType.TEXT:
                self._outbox.close(WSCloseCode.POLICY_VIOLATION, "messages are text")
            elif not self._outbox.is_closing:
                self._client.receive(message.data)
            while not bucket.take():
                await asyncio.sleep(0.02)

    async def _write(self) -> None:
        """Send what waits, one message at a time, until the outbox is closed."""
        try:
            while (data := await self._outbox.next()) is not None:
                async with asyncio.timeout(_STALL_S):
                    await (self.socket.send_str(data) if isinstance(data, str) else self.socket.send_bytes(data))
        except TimeoutError:
            self._outbox.give_up()

    async def _close(self) -> None:
        """Tell why, wait a moment for the client to agree, and let go."""
        transport = self._request.transport
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * _CLOSE_S):
                await self.socket.close(code=self._outbox.code, message=self._outbox.reason.encode(), drain=False)
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
    """What waits for one client. ``sounds_per_s``: messages of sound that a second is made of."""

    def __init__(self, *, sounds_per_s: int) -> None:
        self._most: dict[Kind, int] = {
            "picture": _MOST_PICTURES,
            "sound": round(_MOST_SOUND_S * sounds_per_s),
            "event": _MOST_EVENTS,
        }
        self.code, self.reason = 1000, ""
        self.is_closing = self.is_slow = False
        self.num_lost = 0
        """Pictures that were dropped."""
        self._waiting: deque[tuple[Kind, str | bytes]] = deque()
        self._counts: Counter[Kind] = Counter()
        self._changed = asyncio.Event()

    def put(self, kind: Kind, data: str | bytes) -> bool:
        """Send this; False: there is no room for a picture, and those that waited are forgotten as well."""
        if self.is_closing:
            return False
        if self._counts[kind] >= self._most[kind]:
            if kind != "picture":
                self.give_up()
                return False
            self.drop("picture")
            self.num_lost += 1
            return False
        self._waiting.append((kind, data))
        self._counts[kind] += 1
        self._changed.set()
        return True

    def drop(self, kind: Kind) -> None:
        """Forget what waits of this kind."""
        self.num_lost += self._counts[kind] if kind == "picture" else 0
        self._waiting = deque(entry for entry in self._waiting if entry[0] != kind)
        self._counts[kind] = 0

    def close(self, code: int, reason: str) -> None:
        """End the connection after what was sent; the first reason stands."""
        if not self.is_closing:
            self.is_closing, self.code, self.reason = True, code, reason
            self._changed.set()

    def give_up(self) -> None:
        """The client does not keep up: forget what waits, and close with 1013."""
        self._waiting.clear()
        self._counts.clear()
        self.close(WSCloseCode.TRY_AGAIN_LATER, "too slow")
        self.is_slow = True

    async def next(self) -> str | bytes | None:
        """The next message; None: close now."""
        while not self._waiting:
            if self.is_closing:
                return None
            self._changed.clear()
            await self._changed.wait()
        kind, data = self._waiting.popleft()
        self._counts[kind] -= 1
        return data
