"""Pictures and sound without WebRTC: packets over a WebSocket, for WebCodecs in a page that no UDP reaches.

    GET /v1/sessions/ID/media     a WebSocket; subprotocol ``streamdiff``, keys as for `realtime`

Text is what the data channel carries (`protocol`), both ways. Binary messages, server to client only, are packets:

    byte 0        what it is: 0 a picture, 1 a keyframe, 2 20 ms of Opus
    bytes 8..15   its place on the viewers' clock (`pump.Beat.at`), microseconds, little-endian float64
    bytes 16..    the packet

The client keeps its own clock: it plays sound a little late, and shows each picture when its sound is heard.
"""

from __future__ import annotations

import struct

from aiohttp import web

from streamdiff.serve.calls import Call
from streamdiff.serve.clock import BLOCK_S
from streamdiff.serve.leases import Refused
from streamdiff.serve.protocol import MAX_MESSAGE_BYTES, Ending
from streamdiff.serve.pump import Beat
from streamdiff.serve.server import HOUSE, admits_itself
from streamdiff.serve.webrtc import Plain
from streamdiff.serve.websocket import CLOSE_CODES, Connection, Outbox, admitted

PROTOCOL = "streamdiff"
PICTURE, KEYFRAME, SOUND = 0, 1, 2
_HEADER = struct.Struct("<B7xd")
_MAX_VIEWERS = 16


def media(app: web.Application) -> None:
    """A `Door`: adds ``/v1/sessions/ID/media``."""
    app.router.add_get("/v1/sessions/{id}/media", _connect)


@admits_itself
async def _connect(request: web.Request) -> web.StreamResponse:
    guest = admitted(request, PROTOCOL)
    try:
        call = request.app[HOUSE].call_of(guest, request.match_info["id"])
    except KeyError:
        raise web.HTTPNotFound(reason="There is no such session") from None
    if call.pump.num_viewers >= _MAX_VIEWERS:
        raise Refused(f"this session has {_MAX_VIEWERS} viewers already", retry_after_s=10)
    outbox = Outbox(sounds_per_s=round(1 / BLOCK_S))
    viewer = _Packets(call, outbox)
    connection = Connection(request, viewer, outbox, protocol=PROTOCOL, max_bytes=MAX_MESSAGE_BYTES, log_id=call.log_id)
    await connection.run()
    return connection.socket


class _Packets:
    """One viewer; a sink of the call's pump, and the `Channel` of its messages."""

    is_encoded = True

    def __init__(self, call: Call, outbox: Outbox) -> None:
        self._call, self._outbox = call, outbox
        self._needs_key = True
        self._tongue: Plain | None = None

    def start(self) -> None:
        """Of `Client`."""
        self._tongue = Plain(self._call, self)
        self._call.pump.attach(self)
        self._call.watched()

    def receive(self, data: str) -> None:
        """Of `Client`."""
        if self._tongue is not None:
            self._tongue.receive(data)

    def close(self) -> None:
        """Of `Client`."""
        if self._tongue is not None:
            self._tongue.close()
            self._tongue = None
            self._call.pump.detach(self)
            self._call.watched()

    def send(self, data: str) -> None:
        """Of `Channel`."""
        self._outbox.put("event", data)

    def hang_up(self) -> None:
        """Of `Channel`."""
        self._outbox.close(1000, "")

    def put(self, beat: Beat) -> None:
        """Of `Sink`."""
        rate_hz = self._call.pump.rate_hz
        for sound in beat.sounds:
            if sound.opus is not None:
                self._outbox.put("sound", _HEADER.pack(SOUND, 1e6 * sound.first / rate_hz) + sound.opus)
        picture = beat.picture
        if picture is None or (self._needs_key and not picture.is_key):
            self._call.pump.request_key()
            return
        kind = KEYFRAME if picture.is_key else PICTURE
        self._needs_key = not self._outbox.put("picture", _HEADER.pack(kind, 1e6 * float(beat.at)) + picture.data)

    def end(self, reason: Ending) -> None:
        """Of `Sink`."""
        self._outbox.close(CLOSE_CODES.get(reason, 1001), reason.value)
