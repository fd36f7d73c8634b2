"""Frames come for ever, each with exactly its own 40 ms of sound, and the sound is that of the voice."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from fractions import Fraction

import numpy as np
import pytest

from streamdiff.avatar.engine import AvatarEngine
from streamdiff.avatar.stream import AvatarStream
from streamdiff.stream import Segment, Shown
from streamdiff.voice import ExternalAudio
from tests.avatar.tiny_avatar import Bars, Tones, tiny_motion

TEXT = "One two three. Four and five, and six. Seven?"


def until_done(stream: AvatarStream, segment: Segment) -> list[Shown]:
    frames: list[Shown] = []
    while not segment.done:
        frames.append(stream.next(20))
    return frames


def voice_sound(text: str) -> np.ndarray:
    return np.concatenate([chunk.samples_S for chunk in Tones().speak(text)])


def heard(frames: list[Shown], segment: Segment) -> np.ndarray:
    return np.concatenate([frame.sound_S for frame in frames if frame.segment == segment.id])


@pytest.fixture
def stream() -> Iterator[AvatarStream]:
    with AvatarStream(Bars(), voice=Tones(), motion=tiny_motion()) as stream:
        yield stream


def test_an_avatar_without_words_idles_for_ever(stream: AvatarStream) -> None:
    frames = [stream.next(20) for _ in range(60)]
    assert [frame.index for frame in frames] == list(range(60))
    assert frames[25].pts == Fraction(1)
    assert all(frame.state == "idle" and frame.segment == 0 for frame in frames)
    assert all(frame.sound_S.shape == (960,) and not frame.sound_S.any() for frame in frames)
    assert len({frame.motion_AE[0].tobytes() for frame in frames}) == 60


def test_the_frames_of_a_text_carry_all_of_its_sound(stream: AvatarStream) -> None:
    stream.next(20)
    segment = stream.say(TEXT)
    frames = until_done(stream, segment)
    expected_S = voice_sound(TEXT)
    sound_S = heard(frames, segment)
    assert len(sound_S) == -(-len(expected_S) // 960) * 960
    assert np.array_equal(sound_S[: len(expected_S)], expected_S)
    assert not sound_S[len(expected_S) :].any()
    assert [frame.ends_segment for frame in frames] == [False] * (len(frames) - 1) + [True]
    assert frames[0].state == "speaking"


def test_texts_are_heard_one_after_the_other(stream: AvatarStream) -> None:
    segments = [stream.say(f"Number {i} is here.") for i in range(3)]
    frames = until_done(stream, segments[-1])
    order = [key for key, _ in itertools.groupby(frame.segment for frame in frames)]
    assert order == [1, 2, 3]
    assert [frame.segment for frame in frames if frame.ends_segment] == [1, 2, 3]


@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 24_000, 44_100])
@pytest.mark.parametrize("block_s", [0.01, 0.02, 0.1, 3.0])
def test_sound_from_outside_is_heard_as_it_came(stream: AvatarStream, rate_hz: int, block_s: float) -> None:
    sound_S = (0.3 * np.sin(np.arange(int(1.3 * rate_hz)) * 0.07)).astype(np.float32)
    expected_S = ExternalAudio().push(sound_S, rate_hz, last=True).samples_S
    block = int(block_s * rate_hz)
    segment = None
    for at in range(0, len(sound_S), block):
        segment = stream.push_audio(sound_S[at : at + block], rate_hz)
    stream.end()
    assert segment is not None
    sound_out_S = heard(until_done(stream, segment), segment)
    assert np.array_equal(sound_out_S[: len(expected_S)], expected_S)
    assert not sound_out_S[len(expected_S) :].any()


def test_sound_is_shown_while_it_still_comes(stream: AvatarStream) -> None:
    """A frame needs 80 ms of sound beyond its own, and no more."""
    sound_S = np.full(960, 0.1, np.float32)
    for _ in range(3):
        segment = stream.push_audio(sound_S)
    assert stream.next(20).segment == segment.id
    stream.push_audio(sound_S)
    assert stream.next(20).segment == segment.id
    with pytest.raises(TimeoutError, match=r"end\(\)"):
        stream.next(0.2)
    stream.end()
    assert stream.next(20).segment == segment.id


@pytest.mark.heavy
def test_a_text_that_grows_is_spoken_while_it_grows() -> None:
    with AvatarStream(Bars(), voice=Tones(), motion=tiny_motion()) as stream:
        gate = iter(["The first sentence is here. ", "Then the second one. ", "And the third. "])
        taken: list[str] = []

        def growing() -> Iterator[str]:
            for piece in gate:
                taken.append(piece)
                yield piece
                while len(taken) == 1 and stream.metrics.speaking_frames == 0:
                    time.sleep(0.005)

        stream._realtime = True  # Idling is allowed: the text waits for the picture.
        segment = stream.say(growing())
        frames = until_done(stream, segment)
        assert heard(frames, segment).any()
        assert len(taken) == 3


def test_ten_hours_of_text_hold_back_the_voice() -> None:
    voice = Tones()
    with AvatarStream(Bars(), voice=voice, motion=tiny_motion()) as stream:
        sentence = "This evening is long and so is this text. "
        segment = stream.say(sentence for _ in range(36_000 // 2))
        frames = [stream.next(20) for _ in range(100)]
        assert all(frame.segment == segment.id for frame in frames)
        spoken_s = voice.num_spoken * len(sentence.strip()) * 0.06
        # Shown, queued, held by the motion, and two sentences in the air.
        assert spoken_s < 4 + 12 + 2 + 3 * len(sentence) * 0.06
        stream.interrupt()
        assert segment.wait(5)


def test_queues_never_hold_more_than_three_frames() -> None:
    with AvatarStream(Bars(), voice=Tones(), motion=tiny_motion()) as stream:
        stream.say(TEXT)
        for _ in range(20):
            stream.next(20)
            time.sleep(0.01)
            assert stream.queued_frames <= 3
        assert stream.metrics.longest_queue <= 3


@pytest.mark.heavy
def test_in_real_time_frames_come_at_their_rate() -> None:
    with AvatarStream(Bars(), voice=Tones(), motion=tiny_motion(), realtime=True) as stream:
        stream.next(20)
        began = time.monotonic()
        for _ in range(25):
            stream.next(20)
        assert 0.9 < time.monotonic() - began < 2.0


@pytest.mark.heavy
def test_in_real_time_words_overtake_idle_frames() -> None:
    """Idle frames that are made and not yet seen do not delay the first word."""
    with AvatarStream(Bars(), voice=Tones(), motion=tiny_motion(), realtime=True) as stream:
        for _ in range(5):
            stream.next(20)
        deadline = time.monotonic() + 5
        while stream.queued_frames < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        segment = stream.say("Hello there!")
        while segment.voiced_s is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.3)
        assert stream.next(20).segment == segment.id


def test_the_async_face_says_the_same() -> None:
    engine = AvatarEngine(Bars(), voice=Tones(), motion=tiny_motion())

    async def words() -> AsyncIterator[str]:
        for piece in ["Hello ", "my friend. ", "How are you?"]:
            await asyncio.sleep(0)
            yield piece

    async def run() -> tuple[list[Shown], Segment]:
        taken: list[Shown] = []
        async with engine.open(realtime=False) as session:
            segment = session.say(words())
            async for frame in session:
                taken.append(frame)
                if segment.done:
                    break
        return taken, segment

    frames, segment = asyncio.run(asyncio.wait_for(run(), 30))
    expected_S = voice_sound("Hello my friend. How are you?")
    assert np.array_equal(heard(frames, segment)[: len(expected_S)], expected_S)
    assert engine.size == (16, 16)


def paused(num_frames: int = 60) -> np.ndarray:
    """Words, a pause from frame 20 to frame 50, and words."""
    sound_S = np.random.default_rng(3).uniform(0.1, 0.5, num_frames * 960).astype(np.float32)
    sound_S[20 * 960 : 50 * 960] = 0.0
    return sound_S


@pytest.mark.heavy
@pytest.mark.parametrize("stall_s", [0.0, 0.6])
def test_live_sound_makes_up_for_a_stall_in_its_next_pause(stall_s: float) -> None:
    sound_S = paused()
    with AvatarStream(Bars(), voice=Tones(), motion=tiny_motion(), realtime=True) as stream:
        frames = [stream.next(20) for _ in range(4)]
        segment = stream.push_audio(sound_S[: 30 * 960])
        while segment.num_shown < 10:
            frames.append(stream.next(20))
        time.sleep(stall_s)
        stream.push_audio(sound_S[30 * 960 :])
        while segment.num_shown < 40 - int(stall_s * 25):
            frames.append(stream.next(20))
        stream.end()
        frames += until_done(stream, segment)
        skipped = stream.metrics.skipped_frames
    heard_S = heard(frames, segment)
    # Words come whole; of the pause, what was lost by the stall is left out, and no more.
    assert np.array_equal(heard_S[heard_S != 0], sound_S[sound_S != 0])
    assert len(heard_S) == len(sound_S) - 960 * skipped
    if stall_s:
        assert stall_s * 25 - 4 <= skipped <= 28
    elif stream.metrics.late_frames == 0:
        assert skipped == 0


@pytest.mark.heavy
def test_silence_that_was_pushed_whole_is_heard_whole() -> None:
    sound_S = paused()
    with AvatarStream(Bars(), voice=Tones(), motion=tiny_motion(), realtime=True) as stream:
        stream.next(20)
        segment = stream.push_audio(sound_S, last=True)
        frames = [stream.next(20) for _ in range(8)]
        time.sleep(0.4)
        frames += until_done(stream, segment)
    assert np.array_equal(heard(frames, segment), sound_S)
