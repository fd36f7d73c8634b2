"""A face in a room without a server, and an agent's voice that is a tone. Imports LiveKit: slow tests only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from livekit import rtc
from livekit.agents.voice.avatar import DataStreamAudioOutput, QueueAudioOutput

from streamdiff.adapters.livekit import SessionVideo, on_air, remote
from streamdiff.avatar.engine import AvatarEngine
from streamdiff.session import Session
from streamdiff.stream import Interrupted
from tests.adapters.orange import Orange
from tests.adapters.rooms import FakeRoom, Listener
from tests.avatar.tiny_avatar import tiny_motion
from tests.serve.scripted import ScriptedStream

RATE_HZ = 24_000


def tone(seconds: float) -> list[rtc.AudioFrame]:
    """A voice in blocks of 20 ms, all there at once, as a synthesiser's are."""
    samples_S = 0.3 * 32767 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * RATE_HZ)) / RATE_HZ)
    blocks = np.split(samples_S.astype(np.int16), range(480, len(samples_S), 480))
    return [rtc.AudioFrame(block_S.tobytes(), RATE_HZ, 1, len(block_S)) for block_S in blocks if len(block_S)]


async def spoken(seconds: float) -> AsyncIterator[rtc.AudioFrame]:
    for frame in tone(seconds):
        yield frame


async def until(holds: Callable[[], bool], what: str) -> None:
    for _ in range(2_000):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"never: {what}")


class Face:
    """A face on the air, what its agent was told, and what its listener hears."""

    def __init__(self, session: Session, room: FakeRoom, output: Any) -> None:
        self.session, self.room, self.output = session, room, output
        self.started: list[Any] = []
        self.finished: list[Any] = []
        self.interruptions: list[Interrupted] = []
        self._interrupt = session.interrupt
        session.interrupt = self._note  # type: ignore[method-assign]
        output.on("playback_started", self.started.append)
        output.on("playback_finished", self.finished.append)

    def _note(self, played_s: float | None = None) -> Interrupted:
        self.interruptions.append(self._interrupt(played_s))
        return self.interruptions[-1]

    @property
    def ear(self) -> Listener:
        return self.room.listeners["audio"]

    async def on_air(self) -> None:
        """Wait until there is a picture and the audio track runs."""
        await until(lambda: "video" in self.room.listeners, "the tracks are published")
        await until(lambda: len(self.room.listeners["video"].frames) > 3, "pictures are seen")

    async def speak(self, seconds: float) -> None:
        for frame in tone(seconds):
            await self.output.capture_frame(frame)

    async def heard(self, seconds: float) -> None:
        await until(lambda: self.ear.loud_s >= seconds, f"{seconds} s are heard")

    async def quiet(self) -> None:
        """Wait until nothing has been heard for 0.3 s."""
        size = int(0.3 * RATE_HZ)
        await until(lambda: len(self.ear.sound_S) > size and not self.ear.sound_S[-size:].any(), "silence")


@asynccontextmanager
async def in_process() -> AsyncGenerator[Face]:
    """The face in the process of its agent."""
    engine = AvatarEngine(Orange(), motion=tiny_motion())
    output = QueueAudioOutput(sample_rate=RATE_HZ, wait_playback_start=True)
    room = FakeRoom()
    async with engine.open() as session, on_air(session, room, output):  # type: ignore[arg-type]
        try:
            yield Face(session, room, output)
        finally:
            await room.aclose()


@asynccontextmanager
async def far_away() -> AsyncGenerator[Face]:
    """The face as a participant of its own, the agent as another."""
    engine = AvatarEngine(Orange(), motion=tiny_motion())
    room, agent = FakeRoom("face"), FakeRoom("agent")
    room.meet(agent)
    async with engine.open() as session, remote(session, room, sender="agent"):  # type: ignore[arg-type]
        output = DataStreamAudioOutput(
            agent,  # type: ignore[arg-type]
            destination_identity="face",
            wait_playback_start=True,
        )
        try:
            yield Face(session, room, output)
        finally:
            await room.aclose()


@asynccontextmanager
async def chunks() -> AsyncGenerator[tuple[Session, SessionVideo]]:
    """A session whose frames come twelve at once, and nobody who plays them."""
    async with Session(ScriptedStream(frames_per_chunk=12)) as session:
        yield session, SessionVideo(session)
