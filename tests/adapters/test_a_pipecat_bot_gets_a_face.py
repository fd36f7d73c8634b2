"""A face in a Pipecat pipeline: sound goes in, the same sound comes out beside pictures, texts keep their place."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from streamdiff.avatar.engine import AvatarEngine
from streamdiff.errors import InputError
from streamdiff.session import Opening, Session
from streamdiff.stream import Interrupted
from tests.adapters.leftovers import nothing_left
from tests.adapters.orange import ORANGE, Orange
from tests.avatar.tiny_avatar import tiny_motion
from tests.serve.scripted import ScriptedStream

pytestmark = pytest.mark.slow  # whole pipelines, in real time

RATE_HZ = 24_000
AGREES_S = 0.040


class Run:
    """What left a pipeline with a face in it, in order."""

    def __init__(self, frames: Sequence[Any], interruptions: list[Interrupted]) -> None:
        self.frames, self.interruptions = frames, interruptions
        self.names = [type(frame).__name__ for frame in frames]

    def sound_s(self, frames: Sequence[Any] | None = None) -> float:
        sounds = [f for f in (self.frames if frames is None else frames) if type(f).__name__ == "TTSAudioRawFrame"]
        return sum(frame.num_frames / frame.sample_rate for frame in sounds)

    def place(self, name: str) -> int:
        return self.names.index(name)


def run(frames_to_send: Sequence[Any], opening: Opening | None = None) -> Run:
    """Send frames through a pipeline, and let it end; see that nothing of it is left running."""
    from pipecat.tests.utils import run_test

    from streamdiff.adapters.pipecat import SessionVideoService

    interruptions: list[Interrupted] = []

    async def main() -> Run:
        threads = set(threading.enumerate())
        async with opening or AvatarEngine(Orange(), motion=tiny_motion()).open() as session:
            real = session.interrupt

            def interrupt(played_s: float | None = None) -> Interrupted:
                interruptions.append(real(played_s))
                return interruptions[-1]

            session.interrupt = interrupt  # type: ignore[method-assign]
            async with asyncio.timeout(90):
                down, _ = await run_test(
                    SessionVideoService(session), frames_to_send=frames_to_send, start_timeout=20.0
                )
        await nothing_left(threads)
        return Run(down, interruptions)

    return asyncio.run(main())


def voice(seconds: float, context: str = "answer") -> list[Any]:
    """What a synthesiser pushes: sound in blocks of 20 ms, all there at once."""
    from pipecat.frames.frames import TTSAudioRawFrame

    samples_S = 0.3 * 32767 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * RATE_HZ)) / RATE_HZ)
    blocks = np.split(samples_S.astype(np.int16), range(480, len(samples_S), 480))
    return [TTSAudioRawFrame(block_S.tobytes(), RATE_HZ, 1, context) for block_S in blocks if len(block_S)]


def test_an_answer_is_heard_whole_and_everything_keeps_its_place() -> None:
    from pipecat.frames.frames import TextFrame, TTSStartedFrame, TTSStoppedFrame

    done = run(
        [
            TTSStartedFrame("answer"),
            *voice(0.6),
            TextFrame("six tenths"),
            *voice(0.4),
            TTSStoppedFrame("answer"),
            TTSStartedFrame("next"),
            *voice(0.5, "next"),
            TTSStoppedFrame("next"),
        ]
    )
    assert done.sound_s() == pytest.approx(1.5, abs=2 * AGREES_S)
    assert done.place("TTSStartedFrame") < done.place("TTSAudioRawFrame")
    assert done.sound_s(done.frames[: done.place("TextFrame")]) == pytest.approx(0.6, abs=AGREES_S)
    assert done.sound_s(done.frames[: done.place("TTSStoppedFrame")]) == pytest.approx(1.0, abs=AGREES_S)
    assert [n for n in done.names if n.startswith("TTSSt")] == ["TTSStartedFrame", "TTSStoppedFrame"] * 2
    contexts = [frame.context_id for frame in done.frames if type(frame).__name__ == "TTSAudioRawFrame"]
    assert contexts == sorted(contexts)
    assert set(contexts) == {"answer", "next"}
    sounds = [frame.audio for frame in done.frames if type(frame).__name__ == "TTSAudioRawFrame"]
    loud_S = np.abs(np.frombuffer(b"".join(sounds), np.int16).astype(float))
    assert loud_S[: RATE_HZ // 2].max() == pytest.approx(0.3 * 32767, rel=0.05)


def test_every_frame_has_its_picture_in_its_colours() -> None:
    from pipecat.frames.frames import TTSStoppedFrame

    done = run([*voice(0.6), TTSStoppedFrame("answer")])
    pictures = [frame for frame in done.frames if type(frame).__name__ == "OutputImageRawFrame"]
    assert len(pictures) >= 15
    assert {(frame.size, frame.format) for frame in pictures} == {((64, 64), "RGB")}
    assert tuple(np.frombuffer(pictures[-1].image, np.uint8)[:3]) == ORANGE
    for before, name in zip(done.names, done.names[1:], strict=False):
        assert name != "TTSAudioRawFrame" or before == "OutputImageRawFrame"


def test_an_interruption_leaves_only_what_was_heard() -> None:
    from pipecat.frames.frames import InterruptionFrame, TextFrame, TTSStartedFrame, TTSStoppedFrame
    from pipecat.tests.utils import SleepFrame

    done = run(
        [
            TTSStartedFrame("answer"),
            *voice(8.0),
            TextFrame("never heard"),
            TTSStoppedFrame("answer"),
            SleepFrame(1.0),
            InterruptionFrame(),
            SleepFrame(0.3),
            TTSStartedFrame("next"),
            *voice(0.4, "next"),
            TTSStoppedFrame("next"),
        ]
    )
    cut = done.place("InterruptionFrame")
    heard_s = done.sound_s(done.frames[:cut])
    assert 0.2 < heard_s < 6.0
    assert [d.played_s for d in done.interruptions] == [pytest.approx(heard_s, abs=AGREES_S)]
    assert "TextFrame" not in done.names
    assert [n for n in done.names if n.startswith("TTSSt")] == ["TTSStartedFrame", "TTSStartedFrame", "TTSStoppedFrame"]
    after = done.frames[cut:]
    assert {frame.context_id for frame in after if type(frame).__name__ == "TTSAudioRawFrame"} == {"next"}
    assert done.sound_s(after) == pytest.approx(0.4, abs=AGREES_S)


def test_what_must_not_be_dropped_survives_an_interruption() -> None:
    from pipecat.frames.frames import InterruptionFrame, TextFrame
    from pipecat.tests.utils import SleepFrame

    kept = TextFrame("a result")
    kept.interruptible = False
    done = run([*voice(8.0), TextFrame("dropped"), kept, SleepFrame(0.5), InterruptionFrame()])
    assert [frame.text for frame in done.frames if isinstance(frame, TextFrame)] == ["a result"]


def test_texts_wait_for_their_sound_also_where_frames_come_in_chunks() -> None:
    from pipecat.frames.frames import TextFrame, TTSStoppedFrame

    done = run(
        [*voice(0.96)[:1], TextFrame("end"), TTSStoppedFrame("answer")],
        Opening(lambda: ScriptedStream(frames_per_chunk=12)),
    )
    assert done.sound_s(done.frames[: done.place("TextFrame")]) >= 0.02
    assert done.sound_s(done.frames[: done.place("TTSStoppedFrame")]) == pytest.approx(0.48)


def test_the_face_listens_while_the_user_speaks() -> None:
    from pipecat.frames.frames import UserStartedSpeakingFrame, UserStoppedSpeakingFrame

    heard: list[bool] = []
    stream = ScriptedStream()
    stream.listen = heard.append  # type: ignore[method-assign]
    done = run([UserStartedSpeakingFrame(), UserStoppedSpeakingFrame()], Opening(lambda: stream))
    assert heard == [True, False]
    assert [name for name in done.names if name.startswith("User")] == [
        "UserStartedSpeakingFrame",
        "UserStoppedSpeakingFrame",
    ]


def test_sound_that_the_face_cannot_take_is_an_error_of_the_pipeline() -> None:
    from pipecat.frames.frames import ErrorFrame
    from pipecat.tests.utils import run_test

    from streamdiff.adapters.pipecat import SessionVideoService

    async def main() -> None:
        async with Session(ScriptedStream()) as session:
            session.push_audio = refuse  # type: ignore[method-assign]
            down, up = await run_test(SessionVideoService(session), frames_to_send=voice(0.02), start_timeout=20.0)
        assert [f.error for f in up if isinstance(f, ErrorFrame)] == ["the face cannot say this: too much waits"]
        assert not [frame for frame in down if hasattr(frame, "audio")]

    def refuse(*_: object) -> None:
        raise InputError("too much waits")

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_face_that_fails_is_an_error_of_a_pipeline_that_goes_on() -> None:
    from pipecat.frames.frames import ErrorFrame, TextFrame, UserStartedSpeakingFrame
    from pipecat.tests.utils import SleepFrame, run_test

    from streamdiff.adapters.pipecat import SessionVideoService

    async def main() -> None:
        stream = ScriptedStream()
        stream.fails_with = RuntimeError("the renderer broke")
        async with Session(stream) as session:
            before = [*voice(0.2), TextFrame("held"), SleepFrame(0.5)]
            frames = [*before, *voice(0.2), TextFrame("next"), SleepFrame(0.3), UserStartedSpeakingFrame()]
            down, up = await run_test(SessionVideoService(session), frames_to_send=frames, start_timeout=20.0)
        assert [type(frame) for frame in down] == [TextFrame, TextFrame, UserStartedSpeakingFrame]
        assert [f.error for f in up if isinstance(f, ErrorFrame)] == ["the face has failed: the renderer broke"]

    asyncio.run(asyncio.wait_for(main(), 60))
