"""A live session speaks what it hears, lives on in silence, stops when interrupted, and ends when told."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
import torch

from streamdiff.config import AudioInjectionConfig
from streamdiff.engine import Engine
from streamdiff.errors import InputError, SessionClosed
from streamdiff.session import Session, Shown
from tests.engine.stream_case import small_config

LIMIT_S = 60.0


def new_engine(slack: int = 3) -> Engine:
    config = small_config(2)
    audio = AudioInjectionConfig(feature_dim=64, num_features=3, num_tokens=2, inject_layers=(0,))
    return Engine(
        dataclasses.replace(
            config,
            dit=dataclasses.replace(config.dit, audio=audio),
            memory=dataclasses.replace(config.memory, slack_chunks=slack),
        )
    )


def open_session(engine: Engine, *, num_ranks: int = 1, live: bool = False) -> Session:
    image_HWC = torch.zeros(engine.config.height, engine.config.width, 3, dtype=torch.uint8)
    return engine.open(image_HWC, "a person talks", num_ranks=num_ranks, live=live)


def tone(seconds: float) -> torch.Tensor:
    return 0.3 * torch.sin(torch.arange(int(16_000 * seconds)) * 0.1)


async def collect(session: Session, count: int | None = None) -> list[Shown]:
    shown: list[Shown] = []
    async for chunk in session:
        shown.append(chunk)
        if len(shown) == count:
            break
    return shown


def run(coroutine) -> None:
    torch.set_num_threads(1)
    asyncio.run(asyncio.wait_for(coroutine, LIMIT_S))


@pytest.mark.heavy
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_it_says_exactly_what_was_pushed(num_ranks: int) -> None:
    async def scene() -> None:
        async with open_session(new_engine(), num_ranks=num_ranks) as session:
            sound = tone(2.0)
            for block in sound.split(700):
                session.push_audio(block)
            session.end_audio()
            shown = await collect(session)
        assert [s.chunk for s in shown] == list(range(5))
        spoken = torch.cat([s.sound_S for s in shown])
        assert torch.equal(spoken[: len(sound)], sound)
        assert not spoken[len(sound) :].any()
        assert all(s.frames_THWC.shape == (12, 64, 64, 3) for s in shown)

    run(scene())


@pytest.mark.heavy
def test_the_same_sound_gives_the_same_frames_on_one_rank_and_three() -> None:
    async def film(num_ranks: int) -> list[Shown]:
        async with open_session(new_engine(), num_ranks=num_ranks) as session:
            session.push_audio(tone(1.5))
            session.end_audio()
            return await collect(session)

    async def scene() -> None:
        one, three = await film(1), await film(3)
        assert len(one) == len(three)
        assert all(torch.equal(a.frames_THWC, b.frames_THWC) for a, b in zip(one, three, strict=True))

    run(scene())


@pytest.mark.heavy
def test_silence_keeps_a_live_stream_going() -> None:
    async def scene() -> None:
        async with open_session(new_engine(), live=True) as session:
            shown = await collect(session, 3)
        assert [s.chunk for s in shown] == [0, 1, 2]
        assert not torch.cat([s.sound_S for s in shown]).any()

    run(scene())


@pytest.mark.heavy
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_an_interruption_resumes_where_the_shown_ends(num_ranks: int) -> None:
    async def scene() -> None:
        async with open_session(new_engine(slack=20), num_ranks=num_ranks) as session:
            session.push_audio(tone(10.0))
            shown: list[Shown] = []
            async for chunk in session:
                shown.append(chunk)
                if len(shown) == 4:
                    assert session.interrupt() == 1
                    session.push_audio(torch.full((16_000,), 0.25))
                    session.end_audio()
        assert [s.chunk for s in shown] == [*range(4), 4, 5, 6]
        assert [s.epoch for s in shown] == [0] * 4 + [1] * 3
        after = torch.cat([s.sound_S for s in shown[4:]])
        assert torch.equal(after[:16_000], torch.full((16_000,), 0.25))
        assert not after[16_000:].any()  # nothing stale

    run(scene())


@pytest.mark.heavy
def test_an_interruption_beyond_memory_goes_back_as_far_as_it_can() -> None:
    async def scene() -> None:
        async with open_session(new_engine(slack=0), num_ranks=3) as session:
            session.push_audio(tone(10.0))
            shown: list[Shown] = []
            async for chunk in session:
                shown.append(chunk)
                if len(shown) == 2:
                    await asyncio.sleep(1.0)  # the pipeline fills up behind the chunks shown
                    session.interrupt()
                    session.end_audio()
        chunks = [s.chunk for s in shown]
        assert chunks == sorted(chunks)
        assert all(s.epoch == (0 if i < 2 else 1) for i, s in enumerate(shown))

    run(scene())


@pytest.mark.heavy
def test_a_new_prompt_changes_the_picture() -> None:
    async def film(switch: bool) -> list[Shown]:
        async with open_session(new_engine()) as session:
            if switch:
                await session.prompt("something else entirely")
            session.push_audio(tone(1.0))
            session.end_audio()
            return await collect(session)

    async def scene() -> None:
        same, other = await film(False), await film(True)
        assert not torch.equal(same[-1].frames_THWC, other[-1].frames_THWC)

    run(scene())


def test_wrong_sound_says_so() -> None:
    async def scene() -> None:
        async with open_session(new_engine()) as session:
            with pytest.raises(InputError, match="mono float"):
                session.push_audio(torch.zeros(2, 100))
            with pytest.raises(InputError, match="mono float"):
                session.push_audio(torch.zeros(100, dtype=torch.int16))
            with pytest.raises(InputError, match="not numbers"):
                session.push_audio(torch.tensor([0.0, float("nan")]))
            with pytest.raises(InputError, match="as it is heard"):
                session.push_audio(torch.zeros(16_000 * 601))

    run(scene())


def test_a_closed_session_says_so() -> None:
    async def scene() -> None:
        session = open_session(new_engine())
        async with session:
            session.end_audio()
            with pytest.raises(SessionClosed, match="voice has ended"):
                session.push_audio(tone(0.1))
        with pytest.raises(SessionClosed, match="after the session ended"):
            session.interrupt()
        with pytest.raises(SessionClosed, match="after the session ended"):
            session.push_audio(tone(0.1))
        await session.aclose()

    run(scene())


@pytest.mark.heavy
def test_closing_in_the_middle_stops_every_thread() -> None:
    import threading

    before = threading.active_count()

    async def scene() -> None:
        async with open_session(new_engine(), num_ranks=3, live=True) as session:
            await collect(session, 2)

    run(scene())
    assert threading.active_count() <= before + 1
