"""A session of the video model speaks what it is given, lives on in silence, stops when interrupted, ends when told."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest

from streamdiff.errors import InputError, SessionClosed, Unsupported
from tests.session.faces import collect, open_video, run, tone, video_engine


@pytest.mark.heavy
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_it_says_exactly_what_was_pushed(num_ranks: int) -> None:
    async def scene() -> None:
        async with open_video(num_ranks=num_ranks) as session:
            sound_S = tone(2.0)
            for block_S in np.split(sound_S, range(700, len(sound_S), 700)):
                session.push_audio(block_S)
            session.finish()
            shown = await collect(session)
        assert [s.index for s in shown] == [12 * chunk for chunk in range(5)]
        spoken_S = np.concatenate([s.sound_S for s in shown])
        assert np.array_equal(spoken_S[: len(sound_S)], sound_S)
        assert not spoken_S[len(sound_S) :].any()
        assert all(s.frames_THWC.shape == (12, 64, 64, 3) for s in shown)
        assert [s.segment for s in shown] == [1] * 5
        assert [s.ends_segment for s in shown] == [False] * 4 + [True]

    run(scene())


@pytest.mark.heavy
def test_the_same_sound_gives_the_same_frames_on_one_rank_and_three() -> None:
    async def film(num_ranks: int) -> list[np.ndarray]:
        async with open_video(num_ranks=num_ranks) as session:
            session.push_audio(tone(1.5))
            session.finish()
            return [s.frames_THWC for s in await collect(session)]

    async def scene() -> None:
        one, three = await film(1), await film(3)
        assert len(one) == len(three) == 4
        assert all(np.array_equal(a, b) for a, b in zip(one, three, strict=True))

    run(scene())


@pytest.mark.heavy
def test_silence_keeps_a_live_stream_going() -> None:
    async def scene() -> None:
        async with open_video(live=True) as session:
            shown = await collect(session, 3)
        assert [s.index for s in shown] == [0, 12, 24]
        assert all(s.is_silence and not s.sound_S.any() for s in shown)

    run(scene())


@pytest.mark.heavy
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_an_interruption_resumes_where_the_shown_ends(num_ranks: int) -> None:
    async def scene() -> None:
        async with open_video(slack=20, num_ranks=num_ranks) as session:
            session.push_audio(tone(10.0))
            shown = await collect(session, 4)
            interrupted = session.interrupt()
            assert (interrupted.epoch, interrupted.segment) == (1, 1)
            assert interrupted.played_s == pytest.approx(4 * 0.48)
            assert float(interrupted.resumes_s) == pytest.approx(4 * 0.48)
            session.push_audio(np.full(16_000, 0.25, np.float32))
            session.finish()
            shown += await collect(session)
        assert [s.index // 12 for s in shown] == [*range(4), 4, 5, 6]
        assert [s.epoch for s in shown] == [0] * 4 + [1] * 3
        after_S = np.concatenate([s.sound_S for s in shown[4:]])
        assert np.array_equal(after_S[:16_000], np.full(16_000, 0.25, np.float32))
        assert not after_S[16_000:].any()  # nothing stale

    run(scene())


@pytest.mark.heavy
def test_an_interruption_beyond_memory_goes_back_as_far_as_it_can() -> None:
    async def scene() -> None:
        async with open_video(slack=0, num_ranks=3) as session:
            session.push_audio(tone(10.0))
            shown = await collect(session, 2)
            await asyncio.sleep(1.0)  # the pipeline fills up behind the chunks shown
            interrupted = session.interrupt()
            assert interrupted.resumes_s > interrupted.cut_s
            session.push_audio(tone(0.1))
            session.finish()
            shown += await collect(session)
        assert [s.index for s in shown] == sorted(s.index for s in shown)
        assert shown[2].pts == interrupted.resumes_s
        assert [s.epoch for s in shown] == [0, 0, 1]

    run(scene())


@pytest.mark.heavy
def test_a_new_prompt_changes_the_picture_and_is_told() -> None:
    async def film(switch: bool) -> list[np.ndarray]:
        async with open_video() as session:
            if switch:
                await session.prompt("something else entirely")
            session.push_audio(tone(1.0))
            session.finish()
            shown = await collect(session)
        assert {s.prompt for s in shown} == {"something else entirely" if switch else "a person talks"}
        return [s.frames_THWC for s in shown]

    async def scene() -> None:
        same, other = await film(False), await film(True)
        assert not np.array_equal(same[-1], other[-1])

    run(scene())


@pytest.mark.heavy
def test_an_utterance_looks_the_same_in_however_many_blocks_it_comes() -> None:
    """And the one before it, which is padded to its chunk, leaves no trace in how it is heard."""

    async def film(blocks: int, pause_s: float) -> list[np.ndarray]:
        async with open_video() as session:
            for seed in (1, 2):
                for block_S in np.array_split(tone(0.7, seed), blocks):
                    session.push_audio(block_S)
                    await asyncio.sleep(pause_s)
                session.end()
            session.finish()
            return [s.frames_THWC for s in await collect(session)]

    async def scene() -> None:
        at_once, in_blocks = await film(1, 0.0), await film(7, 0.03)
        assert len(at_once) == len(in_blocks) == 4
        assert all(np.array_equal(a, b) for a, b in zip(at_once, in_blocks, strict=True))

    run(scene())


@pytest.mark.heavy
def test_what_it_cannot_do_says_so() -> None:
    async def scene() -> None:
        async with open_video() as session:
            with pytest.raises(Unsupported, match="prompt"):
                session.listen()
            with pytest.raises(Unsupported, match="voice"):
                session.say("Hello")
            with pytest.raises(InputError, match="NaN"):
                session.push_audio(np.array([0.0, np.nan], np.float32))
            with pytest.raises(InputError, match="as it is heard"):
                session.push_audio(np.zeros(16_000 * 601, np.float32))

    run(scene())


@pytest.mark.heavy
def test_a_closed_session_says_so() -> None:
    async def scene() -> None:
        async with open_video() as session:
            session.finish()
            with pytest.raises(SessionClosed, match="after finish"):
                session.push_audio(tone(0.1))
        with pytest.raises(SessionClosed, match="after the session ended"):
            session.interrupt()
        with pytest.raises(SessionClosed, match="after the session ended"):
            session.push_audio(tone(0.1))
        await session.aclose()

    run(scene())


@pytest.mark.heavy
def test_closing_in_the_middle_stops_every_thread() -> None:
    before = threading.active_count()

    async def scene() -> None:
        async with open_video(num_ranks=3, live=True) as session:
            await collect(session, 2)

    run(scene())
    until_s = time.monotonic() + 1.0
    while threading.active_count() > before and time.monotonic() < until_s:
        time.sleep(0.01)  # the thread that closed it has told so, and is about to end
    assert threading.active_count() <= before


@pytest.mark.heavy
def test_weights_are_loaded_once_for_all_ranks_and_sessions() -> None:
    engine = video_engine()
    told: list[tuple[int, int, str]] = []
    engine.load(lambda *progress: told.append(progress))
    assert [done for done, _, _ in told] == list(range(len(told)))
    assert told[-1][0] == told[-1][1]
    parts = dict(engine._parts)

    async def scene() -> None:
        async with open_video(engine, num_ranks=3) as one, open_video(engine, num_ranks=2) as two:
            for session in (one, two):
                session.push_audio(tone(0.5))
                session.finish()
                assert len(await collect(session)) == 2
        assert {name: id(part) for name, part in engine._parts.items()} == {n: id(p) for n, p in parts.items()}

    run(scene())
