"""Wrong calls and failing stages end in a clear error, and never in a wait without end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from torch import Tensor

from streamdiff.avatar.engine import AvatarEngine
from streamdiff.avatar.stream import AvatarStream
from streamdiff.errors import InputError, SessionClosed, Unsupported
from streamdiff.voice import SpeechChunk
from tests.avatar.tiny_avatar import Bars, Tones, tiny_motion


def test_words_need_a_voice_and_letters() -> None:
    with AvatarStream(Bars(), motion=tiny_motion()) as stream, pytest.raises(Unsupported, match="needs a voice"):
        stream.say("Hello")
    with AvatarStream(Bars(), voice=Tones(), motion=tiny_motion()) as stream:
        for text in ("", "  ", "😀", "..."):
            with pytest.raises(InputError, match="nothing to say"):
                stream.say(text)
        assert stream.next(20).state == "idle"


def test_a_queue_of_texts_is_bounded() -> None:
    with AvatarStream(Bars(), voice=Tones(1.0), motion=tiny_motion()) as stream:
        for _ in range(64):
            stream.say("Hello")
        with pytest.raises(InputError, match="64 segments"):
            stream.say("Hello")
        stream.interrupt()


def test_a_backlog_of_sound_is_bounded() -> None:
    with AvatarStream(Bars(), motion=tiny_motion()) as stream:
        minute_S = np.zeros(60 * 24_000, np.float32)
        taken = 0
        with contextlib.suppress(InputError):  # ten minutes are kept, and one or two may be on their way
            while taken < 20:
                stream.push_audio(minute_S)
                taken += 1
        assert 10 <= taken <= 12
        with pytest.raises(InputError, match="take frames"):
            stream.push_audio(minute_S)


def test_broken_sound_is_refused_and_the_avatar_lives_on() -> None:
    with AvatarStream(Bars(), motion=tiny_motion()) as stream:
        for broken in (np.full(100, np.nan, np.float32), np.zeros((2, 2, 2), np.float32)):
            with pytest.raises(InputError):
                stream.push_audio(broken)
        assert stream.next(20).state == "idle"


def test_a_closed_stream_says_so() -> None:
    stream = AvatarStream(Bars(), voice=Tones(), motion=tiny_motion())
    stream.next(20)
    segment = stream.say("Hello")
    stream.close()
    stream.close()
    assert segment.wait(1)
    for call in (
        lambda: stream.say("Hello"),
        lambda: stream.push_audio(np.zeros(10, np.float32)),
        stream.interrupt,
        stream.next,
    ):
        with pytest.raises(SessionClosed):
            call()
    assert list(stream.frames()) == []


def test_closing_does_not_wait_for_a_caller() -> None:
    with AvatarStream(Bars(), voice=Tones(), motion=tiny_motion()) as stream:
        stream.say("Nobody takes a frame of this text, which is long. " * 20)
    assert not any(thread.is_alive() for thread in stream._threads)


class BrokenVoice(Tones):
    """Fails after its first sentence, as a voice may that meets what it cannot read."""

    def speak(self, text: str | Iterable[str], *, segment: int = 0) -> Iterator[SpeechChunk]:
        yield self.chunk("Hm", segment)
        raise InputError("this voice cannot read that; give it words")


def test_a_text_that_fails_ends_its_segment_and_not_the_avatar() -> None:
    with AvatarStream(Bars(), voice=BrokenVoice(), motion=tiny_motion()) as stream:
        segment = stream.say("Hello there")
        frames = []
        while not segment.done:
            frames.append(stream.next(20))
        assert isinstance(segment.error, InputError)
        assert frames[-1].ends_segment
        assert stream.next(20).state == "idle"


class BrokenRenderer(Bars):
    """Draws three frames and dies."""

    def render(self, motion_AE: Tensor | np.ndarray) -> Tensor:
        if self.num_drawn >= 3:
            raise RuntimeError("the device has gone away")
        return super().render(motion_AE)


def test_a_stage_that_dies_is_heard_of() -> None:
    with AvatarStream(BrokenRenderer(), motion=tiny_motion()) as stream:
        with pytest.raises(RuntimeError, match="gone away"):
            list(stream.frames())
        with pytest.raises(RuntimeError, match="gone away"):
            stream.interrupt()


@pytest.mark.heavy
def test_an_async_text_that_never_ends_can_be_interrupted() -> None:
    engine = AvatarEngine(Bars(), voice=Tones(), motion=tiny_motion())

    async def stuck():
        yield "Let me think. Well, "
        await asyncio.sleep(3600)

    async def run() -> None:
        async with engine.open(realtime=True) as session:
            segment = session.say(stuck())
            for _ in range(10):
                await anext(session)
            session.interrupt()
            again = session.say("I am back.")
            while not again.done:
                await anext(session)
            assert segment.interrupted

    asyncio.run(asyncio.wait_for(run(), 30))
