"""WebRTC: one peer connection per viewer, fed with packets that were encoded once for all of them.

aiortc would encode for every viewer, rebuild its encoder whenever the estimated bandwidth moves by a tenth, and count
30 frames a second; a track that returns `av.Packet` is only packetised. What its sender then ignores (requests for a
keyframe, bandwidth estimates) is taken from it here.

Sound leaves as 20 ms packets at the times at which they begin, so that the sender reports, which pair a timestamp with
the wall clock, say the same of sound and picture.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Protocol, TypeAlias

import av
import numpy as np
from aiortc import (
    MediaStreamTrack,
    RTCConfiguration,
    RTCDataChannel,
    RTCIceServer,
    RTCPeerConnection,
    RTCRtpSender,
    RTCSessionDescription,
)
from aiortc.jitterbuffer import JitterFrame
from aiortc.mediastreams import MediaStreamError
from aiortc.rtp import RTCP_PSFB_APP, RtcpPsfbPacket, RtpPacket, unpack_remb_fci
from aiortc.sdp import SessionDescription

from streamdiff.errors import InputError
from streamdiff.serve.calls import Call
from streamdiff.serve.clock import BLOCK_S
from streamdiff.serve.protocol import Ending, Event, parse, render
from streamdiff.serve.pump import Beat

logger = logging.getLogger(__name__)

MAX_SDP_BYTES = 65_536
_VIDEO_HZ = 90_000
_MIMES = {"vp8": "video/VP8", "h264": "video/H264"}
_QUEUE_BEATS = 12
_EVENTS_BYTES = 262_144
"""Events that may wait in a data channel; a client that reads none loses them."""
_MESSAGES_PER_S = 100
_EAR_HZ = 16_000
_SETTLE_S = 5.0
"""Estimates of the bandwidth begin low and mean nothing at first."""
_ESTIMATE_S = 4.0
"""An estimate counts once it has been so low for so long: one burst of jitter halves it for a moment."""


class Tongue(Protocol):
    """What is spoken on a peer's data channel."""

    def receive(self, data: str | bytes) -> None:
        """The client says this."""
        ...

    def close(self) -> None:
        """The connection is over; idempotent."""
        ...


class Channel(Protocol):
    """The server's end of a data channel. No call blocks or raises."""

    def send(self, data: str) -> None:
        """Send this; lost where the client reads nothing."""
        ...

    def hang_up(self) -> None:
        """Close the connection once what was sent is on its way."""
        ...


Speak: TypeAlias = "Callable[[Call, Channel], Tongue]"


class Plain:
    """The messages of `protocol`, as they are; a `Tongue`."""

    def __init__(self, call: Call, channel: Channel) -> None:
        self._call, self._channel = call, channel
        call.subscribe(self._on_event)

    def receive(self, data: str | bytes) -> None:
        """Of `Tongue`."""
        try:
            command = parse(data)
        except InputError as error:
            self._call.problem("malformed", str(error))
            return
        self._call.do(command)

    def close(self) -> None:
        """Of `Tongue`."""
        self._call.unsubscribe(self._on_event)

    def _on_event(self, event: Event) -> None:
        self._channel.send(render(event))


class Peer:
    """One viewer's peer connection to a call. `answer` once, `aclose` at the end.

    Args:
        call: what is watched.
        ice_servers: for candidates beyond this machine's own.
        speak: begins to speak on the data channel that the viewer opens; None: nothing is said, and nothing heard.
    """

    def __init__(self, call: Call, *, ice_servers: Sequence[RTCIceServer] = (), speak: Speak | None = Plain) -> None:
        self.call = call
        self.id = secrets.token_urlsafe(12)
        self._speak = speak
        self._tongue: Tongue | None = None
        # Without a list, aiortc would ask a public STUN server.
        self._pc = RTCPeerConnection(RTCConfiguration(iceServers=list(ice_servers)))
        self._feed = _Feed(call)
        self._channel: RTCDataChannel | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._bucket = Bucket(_MESSAGES_PER_S)
        self._began_s = time.monotonic()
        self._estimates: deque[tuple[float, float]] = deque(maxlen=64)
        self._closed = False
        self.connected = asyncio.Event()
        """Set once media can flow."""
        self._pc.on("datachannel", self._on_channel)
        self._pc.on("track", self._on_track)
        self._pc.on("connectionstatechange", self._on_state)
        self._feed.on_end = self._on_end

    @property
    def is_closed(self) -> bool:
        """Whether the connection is over."""
        return self._closed

    async def answer(self, offer_sdp: str) -> str:
        """The answer to a viewer's offer; media flows once the connection stands.

        Raises:
            InputError: no offer that this server understands.
        """
        if len(offer_sdp) > MAX_SDP_BYTES:
            raise InputError(f"an offer of {len(offer_sdp)} bytes; at most {MAX_SDP_BYTES} are read")
        try:
            # aiortc cannot answer an offer with a track that was not offered.
            offered = {media.kind for media in SessionDescription.parse(offer_sdp).media}
            if not offered & {"audio", "video"}:
                raise InputError("it asks for neither sound nor picture")
            self._feed.has_pictures = "video" in offered
            if self._feed.has_pictures:
                # The codec must be chosen between adding the track and reading the offer: later it is silently VP8.
                sender = self._pc.addTrack(_PictureTrack(self._feed))
                self._prefer_codec(sender)
                self._watch(sender)
            if "audio" in offered:
                self._pc.addTrack(_SoundTrack(self._feed))
            await self._pc.setRemoteDescription(RTCSessionDescription(offer_sdp, "offer"))
            await self._pc.setLocalDescription(await self._pc.createAnswer())
        except Exception as error:
            await self.aclose()
            logger.info("session %s: refused an offer", self.call.log_id, exc_info=True)
            raise InputError(f"an offer that cannot be answered: {str(error)[:120]}") from error
        return self._pc.localDescription.sdp

    async def aclose(self) -> None:
        """Close the connection; the call stands. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._feed.close()
        if self._tongue is not None:
            self._tongue.close()
        self.call.watched()
        for task in self._tasks:
            task.cancel()
        await self._pc.close()

    def _prefer_codec(self, sender: RTCRtpSender) -> None:
        capabilities = RTCRtpSender.getCapabilities("video").codecs
        mime = _MIMES[self.call.pump.codec].lower()
        wanted = [codec for codec in capabilities if codec.mimeType.lower() in (mime, "video/rtx")]
        for transceiver in self._pc.getTransceivers():
            if transceiver.sender is sender:
                transceiver.setCodecPreferences(wanted)

    def _watch(self, sender: RTCRtpSender) -> None:
        """Hear what aiortc's sender ignores for packets: requests for keyframes, and estimates of the bandwidth."""
        hooked: Any = sender
        handle = hooked._handle_rtcp_packet

        async def heard(packet: object) -> None:
            if isinstance(packet, RtcpPsfbPacket) and packet.fmt == RTCP_PSFB_APP:
                self._on_estimate(packet.fci)
            await handle(packet)

        hooked._send_keyframe = self.call.pump.request_key
        hooked._handle_rtcp_packet = heard

    def _on_estimate(self, fci: bytes) -> None:
        try:
            bitrate, _ = unpack_remb_fci(fci)
        except ValueError:
            return
        now_s = time.monotonic()
        self._estimates.append((now_s, float(bitrate)))
        if now_s - self._began_s < _SETTLE_S:
            return
        recent = [rate for at_s, rate in self._estimates if now_s - at_s <= _ESTIMATE_S]
        self.call.pump.limit(self._feed, max(recent))

    def _on_channel(self, channel: RTCDataChannel) -> None:
        if self._channel is not None or self._speak is None:
            return
        self._channel = channel
        channel.on("message", self._on_message)
        self._tongue = self._speak(self.call, self)

    def _on_message(self, message: str | bytes) -> None:
        if not self._bucket.take():
            if self._bucket.overflowed_now:
                self.call.problem("too_fast", f"more than {_MESSAGES_PER_S} messages a second; the rest is not read")
            return
        if self._tongue is not None:
            self._tongue.receive(message)

    def send(self, data: str) -> None:
        """Of `Channel`."""
        channel = self._channel
        if channel is not None and channel.readyState == "open" and channel.bufferedAmount < _EVENTS_BYTES:
            channel.send(data)

    def hang_up(self) -> None:
        """Of `Channel`."""
        self._spawn(self._close_soon())

    def _on_track(self, track: MediaStreamTrack) -> None:
        # Read even where nobody listens: what arrives is queued without bound otherwise.
        if track.kind == "audio" and self._speak is not None:
            for transceiver in self._pc.getTransceivers():
                receiver: Any = transceiver.receiver
                if receiver.track is track:
                    receiver._RTCRtpReceiver__jitter_buffer = AsItComes()
            self._spawn(self._listen(track))
        else:
            track.stop()

    async def _listen(self, track: MediaStreamTrack) -> None:
        """Pass on what the microphone hears, 16 kHz mono."""
        resampler = av.AudioResampler(format="s16", layout="mono", rate=_EAR_HZ)
        while True:
            try:
                frame: Any = await track.recv()
            except MediaStreamError:
                return
            if not self.call.talk.hears:
                continue
            for part in resampler.resample(frame):
                samples_S = part.to_ndarray().ravel().astype(np.float32)
                samples_S /= 32_768
                self.call.hear(samples_S, _EAR_HZ)

    async def _on_state(self) -> None:
        state = self._pc.connectionState
        logger.info("session %s: connection %s", self.call.log_id, state)
        if state == "connected":
            self.connected.set()
            self.call.watched()
        elif state in ("failed", "closed"):
            await self.aclose()

    def _on_end(self, reason: Ending) -> None:
        logger.info("session %s: a viewer is told that it ended: %s", self.call.log_id, reason.value)
        self._spawn(self._close_soon())

    async def _close_soon(self) -> None:
        await asyncio.sleep(0.5)  # the last event is on its way
        self._tasks.clear()  # or it would cancel itself
        await self.aclose()

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class AsItComes:
    """Takes the place of aiortc's buffer for sound, which holds five packets (100 ms) before it gives the first.

    Nobody plays what a microphone sends, so nothing must be smooth: a packet is given when it comes. One that was
    overtaken is dropped, 20 ms that nobody misses; one that is very old begins a new count.
    """

    capacity = 1
    _REORDERED = 100

    def __init__(self) -> None:
        self._last: int | None = None

    def add(self, packet: RtpPacket) -> tuple[bool, JitterFrame | None]:
        """Of aiortc's ``JitterBuffer``: whether a keyframe is needed, and the next frame."""
        number, last = packet.sequence_number, self._last
        if last is not None and (last - number) % 65_536 < self._REORDERED:
            return False, None
        self._last = number
        data: bytes = packet._data  # type: ignore[attr-defined]  what aiortc took out of the payload
        return False, JitterFrame(data=data, timestamp=packet.timestamp) if data else None


class _Feed:
    """The sink behind both tracks of a peer: begins when the sender asks for the first packet."""

    is_encoded = True

    def __init__(self, call: Call) -> None:
        self._call = call
        self._pictures: deque[Beat] = deque()
        self._sounds: deque[tuple[float, int, bytes]] = deque(maxlen=4 * _QUEUE_BEATS)
        self._changed = {"video": asyncio.Event(), "audio": asyncio.Event()}
        self._needs_key = True
        self._attached = self._ended = False
        self.has_pictures = True
        """Whether the viewer asked for any: sound alone needs no keyframes."""
        self.rate_hz = call.pump.rate_hz
        self.on_end: Any = None

    def put(self, beat: Beat) -> None:
        """Of `Sink`."""
        for k, sound in enumerate(beat.sounds):
            if sound.opus is not None:
                self._sounds.append((beat.left_s + k * BLOCK_S, sound.first, sound.opus))
        self._changed["audio"].set()
        if not self.has_pictures:
            return
        if len(self._pictures) >= _QUEUE_BEATS:
            self._pictures.clear()
            self._needs_key = True
        if self._needs_key and not (beat.picture and beat.picture.is_key):
            self._call.pump.request_key()
            return
        self._needs_key = False
        self._pictures.append(beat)
        self._changed["video"].set()

    def end(self, reason: Ending) -> None:
        """Of `Sink`."""
        self._ended = True
        self._wake()
        if self.on_end is not None:
            self.on_end(reason)

    def close(self) -> None:
        """Want nothing more; idempotent."""
        self._ended = True
        self._call.pump.detach(self)
        self._wake()

    async def picture(self) -> Beat:
        """The next picture."""
        self._attach()
        await self._until("video", self._pictures)
        return self._pictures.popleft()

    async def sound(self) -> tuple[int, bytes]:
        """Number of its first sample and packet of the next sound, at its time."""
        self._attach()
        await self._until("audio", self._sounds)
        due_s, first, opus = self._sounds.popleft()
        if (wait_s := due_s - time.monotonic()) > 0:
            await asyncio.sleep(wait_s)
        return first, opus

    async def _until(self, kind: str, queue: deque[Any]) -> None:
        while not queue:
            if self._ended:
                raise MediaStreamError
            self._changed[kind].clear()
            await self._changed[kind].wait()

    def _attach(self) -> None:
        if not self._attached and not self._ended:
            self._attached = True
            self._call.pump.attach(self)
            self._call.watched()

    def _wake(self) -> None:
        for event in self._changed.values():
            event.set()


class _PictureTrack(MediaStreamTrack):
    kind = "video"

    def __init__(self, feed: _Feed) -> None:
        super().__init__()
        self._feed = feed

    async def recv(self) -> Any:
        beat = await self._feed.picture()
        assert beat.picture is not None
        packet = av.Packet(beat.picture.data)
        packet.pts = round(beat.at * _VIDEO_HZ)
        packet.time_base = Fraction(1, _VIDEO_HZ)
        return packet


class _SoundTrack(MediaStreamTrack):
    kind = "audio"

    def __init__(self, feed: _Feed) -> None:
        super().__init__()
        self._feed = feed
        self._time_base = Fraction(1, feed.rate_hz)

    async def recv(self) -> Any:
        first, opus = await self._feed.sound()
        packet = av.Packet(opus)
        packet.pts = first
        packet.time_base = self._time_base
        return packet


class Bucket:
    """Lets so many things a second through, and bursts of as many."""

    def __init__(self, per_s: float) -> None:
        self._per_s = self._left = per_s
        self._at_s = time.monotonic()
        self.overflowed_now = False
        """Whether the last refusal was the first in a row."""
        self._full = False

    def take(self) -> bool:
        """Whether one more may pass."""
        now_s = time.monotonic()
        self._left = min(self._per_s, self._left + (now_s - self._at_s) * self._per_s)
        self._at_s = now_s
        if self._left < 1:
            self.overflowed_now, self._full = not self._full, True
            return False
        self._left -= 1
        self._full = self.overflowed_now = False
        return True
