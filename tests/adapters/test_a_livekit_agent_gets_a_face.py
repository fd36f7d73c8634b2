"""A face in a LiveKit room: it starts, it stops, and the agent is told how much of it was heard."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from streamdiff.errors import BackendError, InputError
from tests.adapters.leftovers import nothing_left
from tests.adapters.orange import ORANGE

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from tests.adapters.livekit_stage import Face

pytestmark = pytest.mark.slow  # LiveKit Agents alone takes two seconds to import

AGREES_S = 0.040
OPENINGS = ["in_process", "far_away"]


def play(opening: str, scene: Callable[[Face], Coroutine[Any, Any, None]]) -> None:
    """Play a scene with a face that is opened so, and see that nothing of it is left running."""
    from tests.adapters import livekit_stage

    async def main() -> None:
        threads = set(threading.enumerate())
        stage: AbstractAsyncContextManager[Face] = getattr(livekit_stage, opening)()
        async with asyncio.timeout(90), stage as face:
            await face.on_air()
            await scene(face)
        await nothing_left(threads)

    asyncio.run(main())


@pytest.mark.parametrize("opening", OPENINGS)
def test_what_the_agent_says_is_heard_and_finishes(opening: str) -> None:
    async def scene(face: Face) -> None:
        for number in (1, 2):
            before_s = face.ear.loud_s
            await face.speak(0.7)
            assert len(face.finished) == number - 1
            face.output.flush()
            await asyncio.wait_for(face.output.wait_for_playout(), 20)
            await face.quiet()
            assert face.ear.loud_s - before_s == pytest.approx(0.7, abs=AGREES_S)
            assert (len(face.started), len(face.finished)) == (number, number)
            assert not face.finished[-1].interrupted
            assert face.finished[-1].playback_position == pytest.approx(0.7, abs=AGREES_S)

    play(opening, scene)


@pytest.mark.parametrize("opening", OPENINGS)
def test_an_interruption_tells_the_agent_what_was_heard(opening: str) -> None:
    async def scene(face: Face) -> None:
        for number, cut_s in enumerate((0.3, 0.75, 0.1), start=1):
            before_s = face.ear.loud_s
            await face.speak(4.0)
            await face.heard(before_s + cut_s)
            face.output.clear_buffer()
            face.output.flush()
            await asyncio.wait_for(face.output.wait_for_playout(), 20)
            await face.quiet()
            heard_s, told = face.ear.loud_s - before_s, face.finished[-1]
            assert face.interruptions[-1].played_s == pytest.approx(heard_s, abs=AGREES_S)
            assert (len(face.started), len(face.finished)) == (number, number)
            assert told.interrupted
            assert cut_s <= heard_s < 2.0
            assert told.playback_position == pytest.approx(heard_s, abs=AGREES_S)

    play(opening, scene)


def test_a_silence_of_the_agent_is_not_playback() -> None:
    async def scene(face: Face) -> None:
        await face.speak(0.4)
        await face.heard(0.3)
        await asyncio.sleep(0.5)  # the synthesiser pauses in mid-utterance
        await face.speak(0.4)
        face.output.flush()
        await asyncio.wait_for(face.output.wait_for_playout(), 20)
        await face.quiet()
        assert face.ear.loud_s == pytest.approx(0.8, abs=AGREES_S)
        assert face.finished[-1].playback_position == pytest.approx(0.8, abs=AGREES_S)

    play("in_process", scene)


def test_a_chunk_is_given_at_its_times_and_left_where_it_is_interrupted() -> None:
    from tests.adapters.livekit_stage import chunks

    async def scene() -> None:
        async with chunks() as (session, video):
            session.push_audio(np.ones(48_000, np.float32), 24_000, last=True)
            media, began_s = video.__aiter__(), time.monotonic()
            sounds = 0
            while sounds < 5:
                sounds += type(await anext(media)).__name__ == "AudioFrame"
            assert time.monotonic() - began_s >= 4 / 25
            await video.clear_buffer()
            after = [type(await anext(media)).__name__ for _ in range(30)]
            assert after == ["VideoFrame"] * 30
            assert session.metrics.dropped_frames == 12 - 5

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_sound_that_cannot_be_taken_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    from tests.adapters.livekit_stage import chunks, tone

    async def scene() -> None:
        async with chunks() as (session, video):
            session.push_audio = refuse  # type: ignore[method-assign]
            await video.push_audio(tone(0.02)[0])

    def refuse(*_: object) -> None:
        raise InputError("too much waits")

    asyncio.run(asyncio.wait_for(scene(), 60))
    assert "too much waits" in caplog.text


def test_an_agent_that_never_joins_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from streamdiff.adapters import livekit
    from tests.adapters.livekit_stage import chunks
    from tests.adapters.rooms import FakeRoom

    monkeypatch.setattr(livekit, "_JOIN_S", 0.1)

    async def scene() -> None:
        async with chunks() as (session, _):
            with pytest.raises(BackendError, match="'nobody' is not in the room"):
                async with livekit.remote(session, FakeRoom(), sender="nobody"):  # type: ignore[arg-type]
                    raise AssertionError("entered")

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_the_picture_has_its_colours() -> None:
    async def scene(face: Face) -> None:
        frame = face.room.listeners["video"].frames[-1]
        pixels_HWC = np.frombuffer(frame.data, np.uint8).reshape(frame.height, frame.width, 3)
        assert pixels_HWC.shape == (64, 64, 3)
        assert np.abs(pixels_HWC.reshape(-1, 3).mean(0) - ORANGE).max() < 8

    play("in_process", scene)


def test_the_face_listens_while_the_user_speaks() -> None:
    from livekit.agents import AgentSession, UserStateChangedEvent

    from streamdiff.adapters.livekit import attend
    from tests.adapters.livekit_stage import chunks

    heard: list[bool] = []

    async def scene() -> None:
        async with chunks() as (session, _):
            session.listen = heard.append  # type: ignore[method-assign]
            agent_session: AgentSession[None] = AgentSession()
            attend(session, agent_session)
            for state in ("speaking", "listening"):
                agent_session.emit("user_state_changed", UserStateChangedEvent(old_state="away", new_state=state))
        agent_session.emit("user_state_changed", UserStateChangedEvent(old_state="away", new_state="speaking"))

    asyncio.run(asyncio.wait_for(scene(), 60))
    assert heard == [True, False]


def test_an_agent_session_speaks_through_the_face_and_can_be_interrupted() -> None:
    from livekit.agents import Agent, AgentSession

    from streamdiff.adapters.livekit import attend
    from tests.adapters.livekit_stage import spoken

    async def scene(face: Face) -> None:
        agent_session: AgentSession[None] = AgentSession()
        agent_session.output.audio = face.output
        attend(face.session, agent_session)
        await agent_session.start(Agent(instructions=""))
        try:
            whole = agent_session.say("Hello there.", audio=spoken(0.6))
            await asyncio.wait_for(whole.wait_for_playout(), 20)
            await face.quiet()
            assert face.ear.loud_s == pytest.approx(0.6, abs=AGREES_S)
            cut = agent_session.say("This is a long story.", audio=spoken(5.0))
            await face.heard(1.0)
            cut.interrupt()
            await asyncio.wait_for(cut.wait_for_playout(), 20)
            await face.quiet()
            assert face.finished[-1].interrupted
            assert face.finished[-1].playback_position == pytest.approx(face.ear.loud_s - 0.6, abs=AGREES_S)
            assert face.ear.loud_s < 2.5
        finally:
            await agent_session.aclose()

    play("in_process", scene)
