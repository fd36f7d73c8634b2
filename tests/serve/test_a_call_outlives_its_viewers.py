"""Calls over the door without sockets: what a client sees, and that nobody is hurt by what another does."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from streamdiff.errors import InputError
from streamdiff.serve.calls import Calls
from streamdiff.serve.leases import Draining, Leases, NoCapacity, Terms
from streamdiff.serve.local import LocalClient, LocalDoor
from streamdiff.serve.metrics import Meters
from streamdiff.serve.protocol import (
    Bye,
    Caption,
    Ended,
    Ending,
    Interrupt,
    Latency,
    Listen,
    Problem,
    Prompt,
    Ready,
    Report,
    Say,
    Status,
    Stopped,
)
from tests.serve.scripted import Stage

Scene = Callable[[Calls, LocalDoor], Awaitable[None]]


def play(scene: Scene, stage: Stage | None = None, **terms: float) -> Meters:
    """Run a scene in a house of its own; the counters it left."""

    async def main() -> Meters:
        leases = Leases(Terms(**{"capacity": 2, **terms}))  # type: ignore[arg-type]
        async with Calls(leases, stage or Stage()) as calls:
            await asyncio.wait_for(scene(calls, LocalDoor(calls)), 60)
        assert calls.all == ()
        assert leases.held == ()
        return calls.meters

    return asyncio.run(main())


def value(meters: Meters, name: str, **labels: str) -> float:
    return meters.registry.get_sample_value(name, labels) or 0.0


async def speaking(client: LocalClient) -> None:
    """Take frames until something is heard."""
    while True:
        beat = await client.beat()
        assert beat is not None
        if beat.segment:
            return


@pytest.mark.heavy
def test_a_text_becomes_captions_sound_and_latencies() -> None:
    async def scene(calls: Calls, door: LocalDoor) -> None:
        async with door.connect("ann") as client:
            ready = await client.event()
            assert isinstance(ready, Ready)
            assert (ready.fps, ready.width, ready.can) == (25, 32, ("listen", "say"))
            assert await client.event() == Status("idle")
            client.send(Say("Two words."))
            assert await client.event(Caption) == Caption("avatar", "Two words.", 1)
            await speaking(client)
            stages = {e.stage for e in [await client.event(Latency) for _ in range(3)] if isinstance(e, Latency)}
            assert stages == {"voice", "face", "encode"}
            while (beat := await client.beat()) is not None and not beat.ends_segment:
                assert np.abs(beat.sounds[0].samples_S).max() > 5_000
            client.send(Bye())
            assert await client.event(Ended) == Ended(Ending.LEFT)

    meters = play(scene)
    assert value(meters, "streamdiff_sessions_ended_total", reason="left") == 1
    assert value(meters, "streamdiff_stage_ms_count", stage="face") == 1


def test_status_follows_what_is_heard() -> None:
    async def scene(calls: Calls, door: LocalDoor) -> None:
        async with door.connect("ann") as client:
            client.send(Say("word"))
            for state in ("idle", "speaking", "idle"):
                assert await client.event(Status) == Status(state)  # type: ignore[arg-type]
            client.send(Listen(True))
            assert await client.event(Status) == Status("listening")

    play(scene)


@pytest.mark.heavy
def test_an_interruption_says_how_much_was_heard() -> None:
    async def scene(calls: Calls, door: LocalDoor) -> None:
        async with door.connect("ann") as client:
            client.send(Report(jitter_buffer_ms=200.0))
            client.send(Say("so many words that it would take very long to say them all"))
            await speaking(client)
            for _ in range(20):
                await client.beat()
            client.send(Interrupt())
            stopped = await client.event(Stopped)
            assert isinstance(stopped, Stopped)
            assert stopped.segment == 1
            # 21 frames have left; the browser is a fifth of a second behind.
            assert 0.84 - 0.2 - 0.1 < stopped.heard_s < 0.84 + 0.04 - 0.2 + 0.1
            while (beat := await client.beat()) is not None and beat.segment:
                pass
            client.send(Interrupt())
            assert await client.event(Stopped) == Stopped(0, 0.0, 0)

    play(scene)


@pytest.mark.heavy
def test_the_browser_knows_best_what_was_heard() -> None:
    async def scene(calls: Calls, door: LocalDoor) -> None:
        async with door.connect("ann") as client:
            client.send(Say("so many words that it would take very long to say them all"))
            await speaking(client)
            began_s = client.call.pump.head.sent_s - 0.04
            for _ in range(20):
                await client.beat()
            client.send(Interrupt(heard_s=began_s + 0.5))
            stopped = await client.event(Stopped)
            assert isinstance(stopped, Stopped)
            assert abs(stopped.heard_s - 0.5) < 0.041

    play(scene)


def test_a_viewer_that_vanishes_may_come_back() -> None:
    async def scene(calls: Calls, door: LocalDoor) -> None:
        async with door.connect("ann") as client:
            call_id = client.call.id
            client.send(Say("words that go on while nobody looks at them at all"))
            await speaking(client)
        await asyncio.sleep(0.3)
        async with door.connect(call_id=call_id) as again:
            beat = await again.beat()
            assert beat is not None
            assert beat.segment == 1  # it still speaks
            assert beat.picture is not None
            assert beat.picture.is_key

    play(scene, linger_s=5.0)


@pytest.mark.heavy
def test_a_call_without_viewers_ends_and_its_seat_is_free() -> None:
    async def scene(calls: Calls, door: LocalDoor) -> None:
        async with door.connect("ann") as client:
            call_id = client.call.id
        for _ in range(100):
            await asyncio.sleep(0.05)
            if calls.find(call_id) is None and not calls.leases.held:
                break
        else:
            raise AssertionError("the call stands")
        with pytest.raises(InputError, match="no such session"):
            async with door.connect(call_id=call_id):
                pass

    stage = Stage()
    meters = play(scene, stage, linger_s=0.2)
    assert value(meters, "streamdiff_sessions_ended_total", reason="gone") == 1
    assert stage.streams[0].closed


@pytest.mark.heavy
@pytest.mark.parametrize(("terms", "reason"), [({"idle_s": 0.3}, Ending.IDLE), ({"lifetime_s": 0.3}, Ending.LIFETIME)])
def test_time_runs_out_and_the_client_is_told_why(terms: dict[str, float], reason: Ending) -> None:
    async def scene(calls: Calls, door: LocalDoor) -> None:
        async with door.connect("ann") as client:
            assert await client.event(Ended) == Ended(reason)
            while await client.beat() is not None:
                pass
            assert client.viewer.reason is reason

    play(scene, **terms)


def test_nothing_is_opened_for_who_gets_no_seat() -> None:
    stage = Stage()

    async def scene(calls: Calls, door: LocalDoor) -> None:
        async with door.connect("ann"), door.connect("bob"):
            with pytest.raises(NoCapacity):
                async with door.connect("cid"):
                    pass
            assert len(stage.streams) == 2

    meters = play(scene, stage)
    assert value(meters, "streamdiff_refused_total", reason="capacity_exhausted") == 1


def test_an_avatar_that_is_not_there_gives_the_seat_back() -> None:
    async def scene(calls: Calls, door: LocalDoor) -> None:
        for _ in range(3):  # more often than there are seats
            with pytest.raises(InputError, match="known: demo"):
                await calls.open("ann", avatar="nobody")
        assert calls.leases.held == ()

    play(scene)


def test_a_stream_that_breaks_ends_its_call_alone() -> None:
    stage = Stage()

    async def scene(calls: Calls, door: LocalDoor) -> None:
        async with door.connect("ann") as ann, door.connect("bob") as bob:
            await ann.beat()
            stage.streams[0].fails_with = ValueError("a tensor of another shape")
            assert await ann.event(Ended) == Ended(Ending.FAILED)
            for _ in range(5):
                assert await bob.beat() is not None
            async with door.connect("cid") as cid:  # ann's seat
                assert await cid.beat() is not None

    play(scene, stage)


def test_noise_hurts_nobody() -> None:
    async def scene(calls: Calls, door: LocalDoor) -> None:
        rng = random.Random(0)
        async with door.connect("ann") as ann, door.connect("bob") as bob:
            first = await bob.beat()
            for k in range(2_000):
                ann.send_raw(rng.randbytes(rng.randrange(60)))
                if k % 100 == 0:
                    await asyncio.sleep(0)
            assert isinstance(await ann.event(Problem), Problem)
            last = await bob.beat()
            assert first is not None
            assert last is not None
            assert last.index == first.index + 1
            ann.send(Say("still here"))
            await speaking(ann)

    meters = play(scene)
    assert value(meters, "streamdiff_problems_total", code="malformed") == 2_000


def test_what_a_face_cannot_do_is_a_problem_and_not_an_error() -> None:
    async def scene(calls: Calls, door: LocalDoor) -> None:
        async with door.connect("ann") as client:
            client.send(Prompt("another scene"))
            problem = await client.event(Problem)
            assert isinstance(problem, Problem)
            assert "follows no prompts" in problem.text

    play(scene)


@pytest.mark.heavy
def test_a_drain_lets_the_sentence_end_and_takes_nobody_in() -> None:
    async def scene(calls: Calls, door: LocalDoor) -> None:
        async with door.connect("ann") as client:
            client.send(Say("four words to say"))
            await speaking(client)
            draining = asyncio.create_task(calls.drain(10.0))
            await asyncio.sleep(0)
            with pytest.raises(Draining):
                await calls.open("bob")
            spoken = 1
            while (beat := await client.beat()) is not None:
                spoken += beat.segment > 0
            assert spoken == 20
            assert client.viewer.reason is Ending.DRAINED
            await draining

    play(scene)


def test_a_drain_does_not_wait_longer_than_it_may() -> None:
    async def scene(calls: Calls, door: LocalDoor) -> None:
        async with door.connect("ann") as client:
            client.send(Say("word " * 200))
            await speaking(client)
            began_s = asyncio.get_running_loop().time()
            await calls.drain(0.3)
            assert asyncio.get_running_loop().time() - began_s < 3.0
            assert client.call.lease.ended is Ending.DRAINED

    play(scene)
