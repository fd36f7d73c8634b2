"""What a caller may do to a session at any moment, on either path, and what must hold all the same."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest

from streamdiff.errors import RankFailed, SessionClosed, StreamdiffError
from streamdiff.pipeline import stream as video
from streamdiff.session import Opening, Session
from streamdiff.stream import Shown, Stream
from tests.session.faces import collect, open_avatar, open_video, run, tone, video_engine

BOTH = pytest.mark.parametrize("open_face", [open_video, open_avatar], ids=["video", "avatar"])


def names_of_threads() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name != "MainThread")


def wait_for_threads(before: list[str]) -> list[str]:
    """Threads that are left over, once those that are about to end have ended."""
    until_s = time.monotonic() + 2.0
    while len(names_of_threads()) > len(before) and time.monotonic() < until_s:
        time.sleep(0.01)
    return names_of_threads()


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_cancelled_task_leaves_no_thread(num_ranks: int) -> None:
    before = names_of_threads()

    async def watch() -> None:
        async with open_video(num_ranks=num_ranks, live=True) as session:
            async for _ in session:
                pass

    async def scene() -> None:
        task = asyncio.create_task(watch())
        async with asyncio.timeout(30.0):
            while not any(name.startswith("rank") for name in names_of_threads()):
                await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(scene())
    assert wait_for_threads(before) == before


@pytest.mark.heavy
@BOTH
def test_a_session_that_nobody_waits_for_any_more_is_closed(open_face: Callable[..., Opening]) -> None:
    """Opening was cancelled, and the loop ended before the stream was made."""
    before = names_of_threads()
    opened: list[Stream] = []

    async def scene() -> None:
        opening = open_face(live=True)
        make = opening._make

        def slowly() -> Stream:
            time.sleep(0.3)
            opened.append(make())
            return opened[-1]

        opening._make = slowly
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(opening, 0.05)

    run(scene())
    until_s = time.monotonic() + 20.0
    while not opened and time.monotonic() < until_s:
        time.sleep(0.01)
    assert wait_for_threads(before) == before
    with pytest.raises(SessionClosed):
        opened[0].next(0.1)


def test_closing_that_was_cancelled_can_be_waited_for_again() -> None:
    before = names_of_threads()

    async def scene() -> None:
        session = await open_video(num_ranks=3, live=True)
        await collect(session, 1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(session.aclose(), 0.0)
        await session.aclose()
        assert not any(name.startswith("rank") for name in names_of_threads())

    run(scene())
    assert wait_for_threads(before) == before


@pytest.mark.heavy
@BOTH
def test_a_wait_that_is_given_up_loses_nothing(open_face) -> None:
    async def scene() -> None:
        async with open_face(live=True) as session:
            shown: list[Shown] = []
            given_up = 0
            while len(shown) < 6:
                try:
                    shown.append(await asyncio.wait_for(anext(session), 0.004))
                except TimeoutError:
                    given_up += 1
            assert given_up > 0
        step = len(shown[0].frames_THWC)
        assert [s.index for s in shown] == [step * n for n in range(6)]

    run(scene())


@BOTH
def test_the_callers_buffer_is_its_own(open_face) -> None:
    async def scene() -> None:
        async with open_face() as session:
            buffer_S = np.zeros(session.rate_hz // 10, np.float32)
            for n in range(10):
                buffer_S[:] = 0.05 * (n + 1)
                session.push_audio(buffer_S)
                buffer_S[:] = -1.0
            session.finish()
            heard_S = np.concatenate([s.sound_S for s in await collect(session)])
        expected_S = np.repeat(0.05 * np.arange(1, 11, dtype=np.float32), session.rate_hz // 10)
        assert np.allclose(heard_S[: len(expected_S)], expected_S, atol=1e-6)

    run(scene())


@pytest.mark.parametrize("rate_hz", [8_000, 48_000])
@BOTH
def test_any_rate_and_any_kind_of_number_is_taken(open_face, rate_hz: int) -> None:
    sound_S = 0.5 * np.sin(2 * np.pi * 200 * np.arange(rate_hz) / rate_hz)

    async def scene() -> None:
        async with open_face() as session:
            session.push_audio((sound_S * 32767).astype(np.int16), rate_hz, last=True)
            session.finish()
            heard_S = np.concatenate([s.sound_S for s in await collect(session)])
            clock_S = np.arange(session.rate_hz) / session.rate_hz
        expected_S = 0.5 * np.sin(2 * np.pi * 200 * clock_S)
        inner = slice(session.rate_hz // 50, -session.rate_hz // 50)
        assert np.abs(heard_S[: session.rate_hz][inner] - expected_S[inner]).max() < 5e-3

    run(scene())


def longest_hole_s(heard_S: np.ndarray, rate_hz: int) -> float:
    """The longest silence between the first and the last sample that is heard."""
    loud = np.flatnonzero(np.abs(heard_S) > 1e-4)
    return float(np.diff(loud).max() - 1) / rate_hz


@pytest.mark.slow
@pytest.mark.parametrize("jitter_s", [0.0, 0.06])
def test_no_silence_is_put_into_running_speech(jitter_s: float) -> None:
    """Blocks of 20 ms come with jitter below the size of the playout buffer; noise has no silence of its own."""
    rate_hz = 16_000
    noise_S = np.random.default_rng(0).uniform(0.1, 0.2, 4 * rate_hz).astype(np.float32)

    async def push(session: Session) -> None:
        late_s = np.random.default_rng(1).uniform(0, jitter_s, 200)
        start_s = time.monotonic()
        for n, block_S in enumerate(np.split(noise_S, 200)):
            await asyncio.sleep(max(0.0, start_s + 0.02 * (n + 1) + late_s[n] - time.monotonic()))
            session.push_audio(block_S)
        session.end()

    async def scene() -> None:
        async with open_video(live=True, playout_s=0.15) as session:
            feeding = asyncio.create_task(push(session))
            heard: list[Shown] = []
            async for shown in session:
                heard.append(shown)
                if shown.ends_segment:
                    break
            await feeding
            heard_S = np.concatenate([s.sound_S for s in heard])
            assert longest_hole_s(heard_S, rate_hz) == 0.0
            assert np.array_equal(heard_S[np.abs(heard_S) > 0], noise_S)
            assert session.metrics.underruns == 0

    run(scene())


@pytest.mark.slow
def test_sound_that_stops_is_a_pause_and_not_many_holes() -> None:
    async def scene() -> None:
        async with open_video(live=True) as session:
            noise_S = np.full(16_000, 0.2, np.float32)
            session.push_audio(noise_S)  # and then nothing for two seconds, though the utterance goes on
            shown = await collect(session, 5)
            session.push_audio(noise_S, last=True)
            while not shown[-1].ends_segment:
                shown += await collect(session, 1)
            assert session.metrics.underruns >= 1
        heard_S = np.concatenate([s.sound_S for s in shown])
        edges = np.flatnonzero(np.diff((np.abs(heard_S) > 0).astype(int)))
        assert np.count_nonzero(heard_S) == 32_000
        assert len(edges) in (3, 4)  # two stretches of sound, whole

    run(scene())


@pytest.mark.slow
def test_a_consumer_that_paused_catches_up_in_the_pauses_of_the_voice() -> None:
    rate_hz = 16_000
    second_S = np.concatenate([np.full(rate_hz // 2, 0.2, np.float32), np.zeros(rate_hz // 2, np.float32)])

    pushed = 0

    async def push(session: Session, seconds: int) -> None:
        nonlocal pushed
        start_s = time.monotonic()
        for n, block_S in enumerate(np.split(np.tile(second_S, seconds), 25 * seconds)):
            await asyncio.sleep(max(0.0, start_s + 0.04 * (n + 1) - time.monotonic()))
            session.push_audio(block_S)
            pushed += 1

    def behind_s(session: Session, shown: list[Shown]) -> float:
        """Sound that was pushed and neither shown nor left out."""
        return (pushed - session.metrics.skipped_frames) / 25 - 0.48 * sum(not s.is_silence for s in shown)

    async def scene() -> None:
        async with open_video(live=True) as session:
            feeding = asyncio.create_task(push(session, 16))
            shown = await collect(session, 4)
            at_first_s = behind_s(session, shown)
            await asyncio.sleep(2.5)  # the consumer stands still
            shown += await collect(session, 4)
            assert max(s.late_s for s in shown) > 0.5
            assert session.metrics.late_frames > 0
            shown += await collect(session, 14)
            assert session.metrics.skipped_frames >= 12
            assert behind_s(session, shown) < at_first_s + 0.35
            feeding.cancel()

    run(scene())


@pytest.mark.heavy
@BOTH
def test_idle_sessions_take_nobodys_threads(open_face) -> None:
    """Neither those of the loop's executor nor, for longer than it lasts, the interpreter."""

    async def scene() -> None:
        sessions = [await open_face() for _ in range(12)]
        waiting = [asyncio.create_task(anext(session)) for session in sessions]
        await asyncio.sleep(0.05)
        began_s = time.monotonic()
        assert await asyncio.wait_for(asyncio.to_thread(lambda: 7), 5.0) == 7
        assert time.monotonic() - began_s < 2.0
        await asyncio.gather(*(session.aclose() for session in sessions))
        await asyncio.gather(*waiting, return_exceptions=True)

    run(scene())


@pytest.mark.processes
@pytest.mark.parametrize("end", ["pass", pytest.param("raise KeyboardInterrupt", marks=pytest.mark.slow)])
def test_an_unread_session_does_not_keep_the_interpreter(end: str) -> None:
    program = f"""
import asyncio
from tests.session.faces import open_video, open_avatar

async def main():
    video, avatar = await open_video(num_ranks=2, live=True), await open_avatar(live=True)
    asyncio.ensure_future(anext(video))
    await anext(avatar)
    {end}

asyncio.run(main())
"""
    began_s = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, text=True)
    assert time.monotonic() - began_s < 45
    assert (done.returncode != 0) == (end != "pass"), done.stderr
    assert "Fatal" not in done.stderr


@pytest.mark.heavy
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_rank_that_hangs_fails_the_session_in_time_and_for_good(
    num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = threading.Event()

    async def scene() -> None:
        engine = video_engine()

        class Hanging:
            def __init__(self, stage) -> None:
                self._stage = stage

            def step(self, packet):
                if packet.chunk == 2:
                    free.wait(30)
                return self._stage.step(packet)

        built = engine.stage
        monkeypatch.setattr(type(engine), "stage", lambda self, role, **how: Hanging(built(role, **how)))
        async with open_video(engine, num_ranks=num_ranks, live=True, deadline_s=2.5) as session:
            assert len(await collect(session, 2)) == 2
            began_s = time.monotonic()
            for _ in range(3):
                with pytest.raises(RankFailed, match="rank 0"):
                    await anext(session)
            assert 0.3 < time.monotonic() - began_s < 12.0
            with pytest.raises(RankFailed):
                session.push_audio(tone(0.1))
        free.set()

    try:
        run(scene())
    finally:
        free.set()


@pytest.mark.slow
def test_a_face_lives_on_at_any_rate_of_interruptions() -> None:
    async def scene() -> None:
        async with open_video(live=True, num_ranks=2) as session:

            async def interrupt() -> None:
                while True:
                    await asyncio.sleep(0.05)
                    session.push_audio(tone(0.05))
                    session.interrupt()

            storm = asyncio.create_task(interrupt())
            began_s = time.monotonic()
            shown = await collect(session, 8)
            assert time.monotonic() - began_s < 8 * 0.48 + 3.0
            assert [s.index for s in shown] == [12 * n for n in range(8)]
            assert session.metrics.interruptions > 20
            storm.cancel()

    run(scene())


@pytest.mark.heavy
def test_an_interruption_with_nothing_stale_costs_nothing() -> None:
    async def scene() -> None:
        async with open_video(live=True) as session:
            await collect(session, 2)
            interrupted = session.interrupt()
            assert (interrupted.dropped, interrupted.segment, interrupted.epoch) == (0, 0, 1)
            assert session._stream._rewinds == []  # type: ignore[attr-defined]
            shown = await collect(session, 2)
            assert [s.index for s in shown] == [24, 36]

    run(scene())


@pytest.mark.heavy
@BOTH
def test_ending_an_utterance_does_not_end_the_stream(open_face) -> None:
    async def scene() -> None:
        async with open_face(live=True) as session:
            session.push_audio(tone(0.7, rate_hz=session.rate_hz))
            session.end()
            await collect(session, 2)
            session.interrupt()
            again = session.push_audio(tone(0.7, rate_hz=session.rate_hz), last=True)
            async for shown in session:
                if shown.ends_segment:
                    break
            assert again.done
            assert not again.interrupted
            session.finish()
            await collect(session)  # and this does

    run(scene())


@pytest.mark.heavy
@BOTH
def test_two_sessions_of_one_engine_do_not_move_alike(open_face, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamdiff.avatar.engine import AvatarEngine
    from tests.avatar.tiny_avatar import Bars, Tones, tiny_motion

    engine = video_engine() if open_face is open_video else AvatarEngine(Bars(), voice=Tones(), motion=tiny_motion())

    def another(stream: int | None) -> Opening:
        return (
            open_video(engine, stream=stream) if open_face is open_video else engine.open(stream=stream, realtime=False)
        )

    async def film(stream: int | None) -> np.ndarray:
        async with another(stream) as session:
            session.push_audio(tone(1.0, rate_hz=session.rate_hz))
            session.finish()
            return np.concatenate([s.frames_THWC for s in await collect(session)])

    async def scene() -> None:
        one, two = await film(None), await film(None)
        assert not np.array_equal(one, two)
        assert np.array_equal(await film(0), one)  # asked for, it is the same again

    run(scene())


@pytest.mark.heavy
@pytest.mark.parametrize("open_face", [partial(open_video, slack=8), open_avatar], ids=["video", "avatar"])
def test_a_player_with_a_buffer_neither_repeats_nor_skips(open_face) -> None:
    """It holds four frames or chunks that it has not played; after an interruption it drops them, and goes on."""

    async def scene() -> None:
        async with open_face() as session:
            old_S = np.full(12 * session.rate_hz, 0.5, np.float32)
            session.push_audio(old_S, last=True)
            held = await collect(session, 8)
            await asyncio.sleep(0.1)  # the line runs as far ahead as it may
            played_s = float(held[4].pts)  # four are played, four are held
            interrupted = session.interrupt(played_s)
            assert float(interrupted.cut_s) == float(interrupted.resumes_s) == played_s
            assert interrupted.played_s == pytest.approx(played_s)
            kept = [s for s in held if s.pts < interrupted.cut_s]
            session.push_audio(np.full(session.rate_hz, 0.26, np.float32), last=True)
            session.finish()
            kept += await collect(session)
        step = len(held[0].frames_THWC)
        assert [s.index for s in kept] == [step * n for n in range(len(kept))]
        heard_S = np.concatenate([s.sound_S for s in kept])
        assert np.count_nonzero(heard_S == 0.26) == session.rate_hz
        # What follows the cut may fade from the last sample that was heard.
        assert np.count_nonzero(heard_S == 0.5) - round(played_s * session.rate_hz) in (0, 1)

    run(scene())


class _Failing:
    def __iter__(self) -> Iterator[str]:
        yield "This much was written. "
        raise ValueError("the writer has gone")


def test_a_text_whose_writer_fails_says_so_and_the_face_lives_on() -> None:
    async def growing():
        yield "This much was written. "
        raise ValueError("the writer has gone")

    async def scene() -> None:
        async with open_avatar() as session:
            for text in (growing(), _Failing()):
                segment = session.say(text)
                while not segment.done:
                    await anext(session)
                assert isinstance(segment.error, StreamdiffError)
                assert "the writer has gone" in str(segment.error)
            again = session.say("Still here.")
            while not again.done:
                await anext(session)
            assert again.error is None

    run(scene())


def test_the_playout_buffer_has_the_size_it_says() -> None:
    assert 0.04 <= video.PLAYOUT_S <= 0.15
