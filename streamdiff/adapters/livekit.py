"""LiveKit Agents: any session is the face of an agent (extra ``livekit``).

In the agent's own process, a queue brings its voice:

    output = QueueAudioOutput(sample_rate=24_000, wait_playback_start=True)
    async with engine.open() as session, on_air(session, room, output):
        agent_session.output.audio = output
        await agent_session.start(agent, room=room)

As a participant of its own; the agent sends its voice with `DataStreamAudioOutput(room, destination_identity=...)`:

    async with engine.open() as session, remote(session, room, sender=agent_identity):
        await gone.wait()

LiveKit's runner counts what it hands to its audio source as played, and never takes it back. So frames are handed over
at their times and not before: at most 60 ms of sound wait in the source, an interruption lets them play out, and the
position that the agent is told is what was heard.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, TypeAlias

import numpy as np

from streamdiff.adapters.playing import Playing, pcm
from streamdiff.errors import BackendError, InputError
from streamdiff.session import Session
from streamdiff.stream import Can, Shown

try:
    from livekit import rtc
    from livekit.agents import AgentSession, UserStateChangedEvent, utils
    from livekit.agents.voice.avatar import (
        AudioReceiver,
        AudioSegmentEnd,
        AvatarOptions,
        AvatarRunner,
        DataStreamAudioReceiver,
        VideoGenerator,
    )
except ImportError as error:
    raise BackendError(
        f"the LiveKit adapter needs {error.name}, which is not installed; run: pip install 'streamdiff[livekit]'"
    ) from error

logger = logging.getLogger(__name__)

Media: TypeAlias = rtc.VideoFrame | rtc.AudioFrame | AudioSegmentEnd

_LEAD_S = 0.020
"""Sound of an utterance begins so much after its picture: a frame that comes a little late then leaves no gap."""
_SETTLE_S = 0.5
"""Longest wait for the runner to finish what it was handed."""
_JOIN_S = 30.0


class SessionVideo(VideoGenerator):
    """What a session shows, as LiveKit's runner wants it: a picture for every frame, sound only while it speaks.

    Args:
        session: open; its owner closes it. The runner takes its frames, and nobody else may.
    """

    def __init__(self, session: Session) -> None:
        self._session, self._playing = session, Playing(session)
        self._settled = asyncio.Event()
        self._settled.set()

    @property
    def options(self) -> AvatarOptions:
        """What an `AvatarRunner` must know of the session."""
        (height, width), fps = self._session.size, self._session.fps
        return AvatarOptions(width, height, fps, audio_sample_rate=self._session.rate_hz, audio_channels=1)

    async def push_audio(self, frame: rtc.AudioFrame | AudioSegmentEnd) -> None:
        """Speak this sound, or end the utterance. Sound that the session cannot take is left out and logged.

        Raises:
            SessionClosed: the session has ended, or what made it fail.
        """
        if isinstance(frame, AudioSegmentEnd):
            self._session.end()
            return
        samples_SC = np.frombuffer(frame.data, np.int16).reshape(-1, frame.num_channels)
        try:
            self._session.push_audio(samples_SC, frame.sample_rate)
        except InputError as error:
            logger.warning("sound of the agent is left out: %s", error)

    async def clear_buffer(self) -> None:
        """Stop speaking; returns when the runner has handed over the last sound that counts as played."""
        # Before anything is awaited: what the agent says next must not be dropped with what it said before.
        self._playing.interrupt()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_S):
                await self._settled.wait()

    def __aiter__(self) -> AsyncIterator[Media]:
        return self._media()

    async def _media(self) -> AsyncGenerator[Media]:
        speaking = False
        async for frame in self._playing.frames():
            if not frame.segment:
                self._playing.play(frame)
            yield _picture(frame)
            if frame.segment and not speaking:
                await asyncio.sleep(_LEAD_S)
            speaking = bool(frame.segment) and not frame.ends_segment
            if not frame.segment or self._playing.is_void(frame):
                continue
            self._playing.play(frame)
            self._settled.clear()
            try:
                yield rtc.AudioFrame(pcm(frame), self._session.rate_hz, 1, len(frame.sound_S))
            finally:
                self._settled.set()
            if frame.ends_segment and not self._playing.is_void(frame):
                yield AudioSegmentEnd()


@contextlib.asynccontextmanager
async def on_air(session: Session, room: rtc.Room, audio: AudioReceiver) -> AsyncGenerator[AvatarRunner]:
    """Publish a session's picture and sound in a room, and let it speak what ``audio`` brings. Leaving ends that.

    Args:
        session: open; stays open afterwards.
        audio: such as a `QueueAudioOutput` that is the agent's audio output.
    """
    runner = AvatarRunner(room, audio_recv=audio, video_gen=(video := SessionVideo(session)), options=video.options)
    await runner.start()
    try:
        yield runner
    finally:
        await runner.aclose()


@contextlib.asynccontextmanager
async def remote(session: Session, room: rtc.Room, sender: str) -> AsyncGenerator[AvatarRunner]:
    """`on_air` for a participant of its own: the sound comes from the agent with the identity ``sender``.

    Raises:
        BackendError: the room is not connected, or the agent did not join it in time.
    """
    try:
        async with asyncio.timeout(_JOIN_S):
            await utils.wait_for_participant(room, identity=sender)
    except (TimeoutError, RuntimeError) as error:
        raise BackendError(
            f"the agent {sender!r} is not in the room after {_JOIN_S:g} s; connect the room first, check the identity"
        ) from error
    async with on_air(session, room, DataStreamAudioReceiver(room, sender_identity=sender)) as runner:
        yield runner


def attend(session: Session, agent_session: AgentSession[Any]) -> None:
    """Let the face look attentive while the user of this agent speaks, where it can."""

    def changed(event: UserStateChangedEvent) -> None:
        if not session.is_closed:
            session.listen(event.new_state == "speaking")

    if Can.LISTEN in session.can:
        agent_session.on("user_state_changed", changed)


def _picture(frame: Shown) -> rtc.VideoFrame:
    _, height, width, _ = frame.frames_THWC.shape
    return rtc.VideoFrame(width, height, rtc.VideoBufferType.RGB24, frame.frames_THWC.tobytes())
