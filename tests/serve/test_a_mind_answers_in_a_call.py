"""A conversation inside a call: typed words are answered, a stop button silences, and the client sees every step."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from streamdiff.conversation.mind import ScriptedMind
from streamdiff.serve.calls import Calls
from streamdiff.serve.leases import Leases, Terms
from streamdiff.serve.local import LocalClient, LocalDoor
from streamdiff.serve.protocol import Caption, Ended, Ending, Interrupt, Latency, Say, Status, Stopped
from streamdiff.serve.talk import Answers, talking
from tests.serve.scripted import Stage


def play(scene: Callable[[LocalClient], Awaitable[None]], *replies: str, word_s: float = 0.1) -> None:
    async def main() -> None:
        talk = talking(lambda: ScriptedMind(replies), "scripted")
        async with Calls(Leases(Terms(capacity=1)), Stage(word_s=word_s), talk=talk) as calls:
            async with LocalDoor(calls).connect() as client:
                await asyncio.wait_for(scene(client), 30)
            call = client.call
            await calls.end(call, Ending.LEFT)
            assert isinstance(call.talk, Answers)
            assert call.talk._task.done()

    asyncio.run(main())


async def caption(client: LocalClient, role: str, *, final: bool = True) -> Caption:
    while True:
        event = await client.event(Caption)
        assert isinstance(event, Caption)
        if event.role == role and event.final == final:
            return event


@pytest.mark.heavy
def test_typed_words_are_shown_thought_about_and_answered() -> None:
    async def scene(client: LocalClient) -> None:
        client.send(Say("What is the time?"))
        assert await caption(client, "user") == Caption("user", "What is the time?", 1)
        stages: set[str] = set()
        while len(stages) < 8:
            event = await client.event(Latency)
            assert isinstance(event, Latency)
            assert event.turn == 1
            stages.add(event.stage)
        assert {"first word", "first sound", "answer", "voice", "face"} <= stages, stages
        assert await caption(client, "avatar") == Caption("avatar", "It is noon.", 1)
        client.send(Say("And now?"))
        assert await caption(client, "avatar") == Caption("avatar", "Later.", 2)

    play(scene, "It is noon.", "Later.")


@pytest.mark.heavy
def test_a_stop_button_silences_it_and_only_what_was_heard_is_remembered() -> None:
    async def scene(client: LocalClient) -> None:
        client.send(Say("Tell me a story."))
        while not (beat := await client.beat()) or not beat.segment:
            pass
        for _ in range(15):
            await client.beat()
        client.send(Interrupt())
        stopped = await client.event(Stopped)
        assert isinstance(stopped, Stopped)
        assert 0.3 < stopped.heard_s < 1.0
        heard = (await caption(client, "avatar")).text
        assert heard
        assert len(heard) < len(STORY) / 2
        assert STORY.startswith(heard.rstrip(" .,"))
        while (beat := await client.beat()) is not None and beat.segment:
            pass
        for _ in range(10):
            beat = await client.beat()
            assert beat is not None
            assert not beat.segment

    play(scene, STORY, word_s=0.4)


STORY = "Once upon a time there was a king who had a very long story to tell to everybody who would listen to him."


@pytest.mark.heavy
def test_it_is_seen_to_think() -> None:
    async def main() -> None:
        talk = talking(lambda: ScriptedMind(["Yes."], first_s=0.3), "scripted")
        async with Calls(Leases(Terms(capacity=1)), Stage(), talk=talk) as calls, LocalDoor(calls).connect() as client:
            client.send(Say("Well?"))
            for state in ("idle", "thinking", "speaking", "idle"):
                assert await client.event(Status) == Status(state)  # type: ignore[arg-type]
            client.hang_up()
            assert await client.event(Ended) == Ended(Ending.LEFT)

    asyncio.run(main())
