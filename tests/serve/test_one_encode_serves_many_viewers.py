"""The pump: one encode, many viewers, sound and picture in one place, and nobody waits for a slow one."""

from __future__ import annotations

import asyncio
import itertools
import weakref
from collections.abc import Awaitable, Callable
from fractions import Fraction

import av
import numpy as np
import pytest

from streamdiff.serve.protocol import Ending
from streamdiff.serve.pump import Beat, Pump, Viewer
from streamdiff.session import Session
from tests.serve.scripted import ScriptedStream


def on_air(stream: ScriptedStream, scene: Callable[[Pump], Awaitable[None]]) -> Ending:
    """Run a scene beside a pump; why the pump ended."""

    async def play() -> Ending:
        async with Session(stream) as session:
            pump = Pump(session)
            running = asyncio.create_task(pump.run())
            await asyncio.wait_for(scene(pump), 30)
            stream.close()
            return await asyncio.wait_for(running, 5)

    return asyncio.run(play())


async def take(viewer: Viewer, count: int) -> list[Beat]:
    beats: list[Beat] = []
    while len(beats) < count:
        beat = await viewer.next(5.0)
        assert beat is not None
        beats.append(beat)
    return beats


def test_viewers_get_the_same_packets_and_begin_with_a_keyframe() -> None:
    async def scene(pump: Pump) -> None:
        first = Viewer(pump)
        await take(first, 3)
        second = Viewer(pump)
        theirs = await take(second, 4)
        ours = {beat.index: beat for beat in await take(first, 5)}
        assert theirs[0].picture is not None
        assert theirs[0].picture.is_key
        shared = [beat for beat in theirs if beat.index in ours]
        assert shared
        assert all(ours[beat.index].picture is beat.picture for beat in shared)
        assert pump.num_keys == 2  # one for each that came

    on_air(ScriptedStream(), scene)


@pytest.mark.heavy
def test_what_is_sent_decodes_to_what_was_shown() -> None:
    async def scene(pump: Pump) -> None:
        pump.session.say("five words that are spoken")
        beats = await take(Viewer(pump), 12)
        vp8, opus = av.CodecContext.create("vp8", "r"), av.CodecContext.create("libopus", "r")
        for beat in beats:
            assert beat.picture is not None
            (decoded,) = vp8.decode(av.Packet(beat.picture.data))  # type: ignore[attr-defined]
            seen = decoded.to_ndarray(format="rgb24").astype(int)
            assert abs(seen - beat.frame_HWC).mean() < 4
        packets = [sound.opus for beat in beats for sound in beat.sounds]
        sound_S = np.concatenate(
            [f.to_ndarray().ravel() for packet in packets if packet for f in opus.decode(av.Packet(packet))]  # type: ignore[attr-defined]
        ).astype(float)
        assert abs(sound_S).max() > 0.1 * (1 if abs(sound_S).max() <= 1.5 else 32_767)

    on_air(ScriptedStream(side=64), scene)


@pytest.mark.heavy
def test_sound_leaves_in_blocks_of_20_ms_without_a_gap() -> None:
    for rate_hz in (16_000, 24_000):

        async def scene(pump: Pump) -> None:
            beats = await take(Viewer(pump, is_encoded=False), 6)
            assert [beat.pts for beat in beats] == [Fraction(beats[0].index + k, 25) for k in range(6)]
            sounds = [sound for beat in beats for sound in beat.sounds]
            assert {len(sound.samples_S) for sound in sounds} == {pump.rate_hz // 50}
            # A block's place is its frame's place: both tracks are on one clock.
            for beat in beats:
                assert Fraction(beat.sounds[0].first, pump.rate_hz) == beat.pts
            assert [s.first for s in sounds] == [sounds[0].first + k * pump.rate_hz // 50 for k in range(12)]
            assert all(sound.opus is None for sound in sounds)
            assert all(beat.picture is None for beat in beats)

        on_air(ScriptedStream(rate_hz=rate_hz), scene)


@pytest.mark.heavy
def test_a_stream_that_falls_behind_moves_picture_and_sound_on_the_viewers_clock() -> None:
    stream = ScriptedStream()

    async def scene(pump: Pump) -> None:
        viewer = Viewer(pump, is_encoded=False)
        (before,) = await take(viewer, 1)
        stream.stall_s = 0.5
        beats = await take(viewer, 12)
        (late,) = [beat for beat in beats if beat.shown.late_s]
        behind = round((beats[-1].at - beats[-1].pts) * 50)
        assert before.at == before.pts
        assert abs(behind / 50 - late.shown.late_s) <= 0.011
        assert 0.4 < behind / 50 < 1.0
        assert [beat.index for beat in beats] == list(range(before.index + 1, before.index + 13))
        for beat in beats:
            assert Fraction(beat.sounds[0].first, pump.rate_hz) == beat.at
            # The viewers' clock goes as fast as ours.
            assert abs(float(beat.at - before.at) - (beat.left_s - before.left_s)) < 0.2

    on_air(stream, scene)


def test_an_encoder_goes_with_its_session_and_what_it_counted_stays() -> None:
    async def scene(pump: Pump) -> None:
        await take(Viewer(pump), 3)
        encoder = weakref.ref(pump._video)
        pump.stop(Ending.LEFT)
        assert pump.num_keys == 1
        async with asyncio.timeout(10):  # a frame may be in its hands
            while encoder() is not None:
                await asyncio.sleep(0.01)

    on_air(ScriptedStream(), scene)


def test_nothing_is_encoded_while_nobody_looks() -> None:
    async def scene(pump: Pump) -> None:
        await take(Viewer(pump, is_encoded=False), 3)
        assert pump.num_keys == 0
        viewer = Viewer(pump)
        await take(viewer, 2)
        viewer.close()
        assert pump.num_viewers == 0
        assert pump.num_keys == 1

    on_air(ScriptedStream(), scene)


@pytest.mark.heavy
def test_a_slow_viewer_loses_frames_and_goes_on_at_a_keyframe() -> None:
    async def scene(pump: Pump) -> None:
        quick, slow = Viewer(pump), Viewer(pump, most=3)
        beats = await take(quick, 12)
        assert [beat.index for beat in beats] == list(range(beats[0].index, beats[0].index + 12))
        assert slow.num_lost > 0
        await take(slow, 1)
        seen = [beat.index for beat in beats]
        for _ in range(60):
            (beat,) = await take(slow, 1)
            if beat.index > seen[-1] and beat.picture is not None and beat.picture.is_key:
                return
        raise AssertionError("the slow viewer never got a keyframe after it had lost frames")

    on_air(ScriptedStream(), scene)


@pytest.mark.heavy
def test_keyframes_are_made_at_most_twice_a_second() -> None:
    async def scene(pump: Pump) -> None:
        viewer = Viewer(pump)
        keys = 0
        for _ in range(30):
            pump.request_key()
            (beat,) = await take(viewer, 1)
            assert beat.picture is not None
            keys += beat.picture.is_key
        assert 2 <= keys <= 4

    on_air(ScriptedStream(), scene)


@pytest.mark.heavy
def test_a_chunk_of_frames_is_spread_over_its_time() -> None:
    async def scene(pump: Pump) -> None:
        beats = await take(Viewer(pump, is_encoded=False), 12)
        gaps_s = [b.left_s - a.left_s for a, b in itertools.pairwise(beats)]
        assert sorted(gaps_s)[len(gaps_s) // 2] > 0.02
        assert [beat.index for beat in beats] == list(range(beats[0].index, beats[0].index + 12))
        assert all(len(beat.sounds) == 2 for beat in beats)

    on_air(ScriptedStream(frames_per_chunk=6), scene)


@pytest.mark.heavy
def test_an_interruption_takes_back_what_has_not_left() -> None:
    async def scene(pump: Pump) -> None:
        viewer = Viewer(pump, is_encoded=False)
        pump.session.say("many words that would be heard for a long time")
        while not (await take(viewer, 1))[0].segment:
            pass
        (last,) = await take(viewer, 1)
        while viewer._beats:  # on a busy machine more have left than were looked at
            (last,) = await take(viewer, 1)
        done = pump.interrupt()
        assert done.segment == last.segment
        assert done.dropped > 0
        after = await take(viewer, 8)
        assert [beat.index for beat in after] == list(range(last.index + 1, last.index + 9))
        assert all(beat.segment == 0 for beat in after)
        assert float(done.resumes_s) >= float(last.pts)

    on_air(ScriptedStream(frames_per_chunk=12), scene)


def test_a_stream_that_breaks_ends_the_pump_with_a_reason() -> None:
    stream = ScriptedStream()

    async def scene(pump: Pump) -> None:
        viewer = Viewer(pump)
        await take(viewer, 2)
        stream.fails_with = ValueError("a tensor of another shape")
        while await viewer.next(5.0) is not None:
            pass
        assert viewer.reason is Ending.FAILED
        late = Viewer(pump)
        assert await late.next(1.0) is None

    assert on_air(stream, scene) is Ending.FAILED


def test_all_viewers_get_what_the_slowest_network_carries() -> None:
    async def scene(pump: Pump) -> None:
        a, b = Viewer(pump), Viewer(pump)
        pump.limit(a, 5e6)
        pump.limit(b, 150_000)
        assert pump._video is None or pump._video._aim == 150_000
        await take(a, 2)
        assert pump._video is not None
        assert pump._video._aim == 150_000
        b.close()
        assert pump._video._aim == pump._video.most

    on_air(ScriptedStream(side=128), scene)
