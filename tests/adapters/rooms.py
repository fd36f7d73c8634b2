"""A LiveKit room without a server: participants of one process, real tracks, and what a listener would hear.

Tracks are the native library's own, fed by its own sources in real time; only the way between participants is replaced.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from livekit import rtc

HEARD_HZ = 24_000


class Listener:
    """Records a track from its publication on, 10 ms at a time."""

    def __init__(self, track: Any) -> None:
        is_audio = track.kind == rtc.TrackKind.KIND_AUDIO
        self._stream = (
            rtc.AudioStream.from_track(track=track, sample_rate=HEARD_HZ, num_channels=1)
            if is_audio
            else rtc.VideoStream.from_track(track=track, format=rtc.VideoBufferType.RGB24)
        )
        self.frames: list[Any] = []
        self._task = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        async for event in self._stream:
            self.frames.append(event.frame)

    @property
    def sound_S(self) -> np.ndarray:  # noqa: N802
        """All that was heard."""
        return np.concatenate([np.zeros(0, np.int16), *(np.frombuffer(f.data, np.int16) for f in self.frames)])

    @property
    def loud_s(self) -> float:
        """Seconds in which there was any sound."""
        sound_S = self.sound_S
        blocks = sound_S[: len(sound_S) // 240 * 240].reshape(-1, 240).astype(float)
        return float((np.sqrt((blocks**2).mean(1)) > 600).sum()) * 240 / HEARD_HZ

    async def aclose(self) -> None:
        await self._stream.aclose()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class Reader:
    """The receiving end of a byte stream."""

    def __init__(self, attributes: dict[str, str]) -> None:
        self.info = SimpleNamespace(attributes=attributes, stream_id="bytes")
        self.pieces: asyncio.Queue[bytes | None] = asyncio.Queue()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        piece = await self.pieces.get()
        if piece is None:
            raise StopAsyncIteration
        return piece


class Writer:
    """The sending end."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    async def write(self, data: bytes) -> None:
        self._reader.pieces.put_nowait(data)

    async def aclose(self) -> None:
        self._reader.pieces.put_nowait(None)


class Local:
    """The participant of a room, seen from inside."""

    def __init__(self, room: FakeRoom, identity: str) -> None:
        self._room, self.identity = room, identity
        self.kind = rtc.ParticipantKind.PARTICIPANT_KIND_AGENT
        self.track_publications: dict[str, Any] = {}
        self._rpc_handlers: dict[str, Callable[[Any], Any]] = {}

    async def publish_track(self, track: Any, options: Any = None) -> Any:
        del options
        listener = Listener(track)
        self._room.listeners["audio" if track.kind == rtc.TrackKind.KIND_AUDIO else "video"] = listener

        async def subscribed() -> None:
            pass

        return SimpleNamespace(track=track, kind=track.kind, wait_for_subscription=subscribed)

    def register_rpc_method(self, name: str, handler: Callable[[Any], Any]) -> None:
        self._rpc_handlers[name] = handler

    async def perform_rpc(self, *, destination_identity: str, method: str, payload: str) -> str:
        self._room.calls.append((method, payload))
        handler = self._room.others[destination_identity].local_participant._rpc_handlers[method]
        answer = handler(SimpleNamespace(caller_identity=self.identity, payload=payload))
        return await answer if asyncio.iscoroutine(answer) else answer

    async def stream_bytes(
        self, *, name: str, topic: str, destination_identities: list[str], attributes: dict[str, str]
    ) -> Writer:
        del name
        reader = Reader(attributes)
        for identity in destination_identities:
            self._room.others[identity].byte_handlers[topic](reader, self.identity)
        return Writer(reader)


class FakeRoom(rtc.EventEmitter[str]):
    """What the avatar classes of LiveKit Agents use of a room."""

    def __init__(self, identity: str = "avatar") -> None:
        super().__init__()
        self.local_participant = Local(self, identity)
        self.remote_participants: dict[str, Any] = {}
        self.others: dict[str, FakeRoom] = {}
        self.byte_handlers: dict[str, Callable[[Any, str], None]] = {}
        self.listeners: dict[str, Listener] = {}
        self.calls: list[tuple[str, str]] = []
        """Remote procedure calls made from here."""

    def isconnected(self) -> bool:
        return True

    def register_byte_stream_handler(self, topic: str, handler: Callable[[Any, str], None]) -> None:
        self.byte_handlers[topic] = handler

    def meet(self, other: FakeRoom) -> None:
        """Each sees the other's participant."""
        for here, there in ((self, other), (other, self)):
            identity = there.local_participant.identity
            here.others[identity] = there
            here.remote_participants[identity] = SimpleNamespace(
                identity=identity,
                kind=rtc.ParticipantKind.PARTICIPANT_KIND_AGENT,
                state=rtc.ParticipantState.PARTICIPANT_STATE_ACTIVE,
                track_publications={},
                attributes={},
            )

    async def aclose(self) -> None:
        await asyncio.gather(*(listener.aclose() for listener in self.listeners.values()))
