"""An interruption is heard in the next frame, seen within 160 ms, and nothing older is ever shown after it."""

from __future__ import annotations

import statistics
import time

import numpy as np
import pytest

from streamdiff.avatar.kinematics import arkit64
from streamdiff.avatar.stream import AvatarStream
from streamdiff.stream import Shown
from tests.avatar.tiny_avatar import Bars, Tones, tiny_motion

LONG = "A long sentence that goes on and on. " * 6


@pytest.fixture(params=[0, 1, 2, 3, 7, 16, 33])
def interrupted(request: pytest.FixtureRequest) -> tuple[list[Shown], list[Shown]]:
    """Frames before and after an interruption, after some frames of speech."""
    with AvatarStream(Bars(), voice=Tones(), motion=tiny_motion()) as stream:
        stream.next(20)
        stream.say(LONG)
        before = [stream.next(20) for _ in range(request.param)]
        time.sleep(0.05)
        stream.interrupt()
        after = [stream.next(20) for _ in range(30)]
    return before, after


def test_the_sound_ends_within_one_frame(interrupted: tuple[list[Shown], list[Shown]]) -> None:
    _, after = interrupted
    assert not after[0].sound_S[240:].any()
    assert not any(frame.sound_S.any() for frame in after[1:])


def test_the_sound_fades_rather_than_clicks(interrupted: tuple[list[Shown], list[Shown]]) -> None:
    before, after = interrupted
    if before:
        whole_S = np.concatenate([before[-1].sound_S, after[0].sound_S])
        steepest = 0.3 * 2 * np.pi * 850 / 24_000
        assert np.abs(np.diff(whole_S)).max() < 1.1 * steepest


def test_the_mouth_is_at_rest_within_160_ms(interrupted: tuple[list[Shown], list[Shown]]) -> None:
    _, after = interrupted
    spec = arkit64()
    mouth = [i for i, name in enumerate(spec.names) if name.startswith(("jaw", "mouth"))]
    assert np.abs(after[3].motion_AE[0][mouth]).max() == 0.0
    assert [frame.state for frame in after[:5]] == ["fading"] * 4 + ["idle"]


def test_nothing_stale_is_shown(interrupted: tuple[list[Shown], list[Shown]]) -> None:
    before, after = interrupted
    assert {frame.epoch for frame in after} == {1}
    assert {frame.segment for frame in after} == {0}
    indices = [frame.index for frame in [*before, *after]]
    assert indices == list(range(indices[0], indices[0] + len(indices)))


def test_the_report_counts_what_was_heard() -> None:
    with AvatarStream(Bars(), voice=Tones(), motion=tiny_motion()) as stream:
        segment = stream.say(LONG)
        for _ in range(10):
            stream.next(20)
        report = stream.interrupt()
        assert (report.segment, report.played_s, report.epoch) == (segment.id, 0.4, 1)
        assert 0 <= report.dropped <= 5
        assert segment.done
        assert segment.interrupted
        quiet = stream.interrupt()
        assert (quiet.segment, quiet.played_s, quiet.epoch) == (0, 0.0, 2)


def test_everything_waiting_is_called_off() -> None:
    voice = Tones(delay_s=0.02)
    with AvatarStream(Bars(), voice=voice, motion=tiny_motion()) as stream:
        segments = [stream.say(LONG) for _ in range(5)]
        stream.push_audio(np.full(48_000, 0.1, np.float32))
        stream.next(20)
        stream.interrupt()
        for _ in range(5):
            stream.next(20)
        assert all(segment.wait(5) and segment.interrupted for segment in segments)
        spoken = voice.num_spoken
        for _ in range(20):
            assert not stream.next(20).sound_S.any()
        time.sleep(0.1)
        assert voice.num_spoken <= spoken + 1


def test_words_after_an_interruption_are_heard_whole() -> None:
    with AvatarStream(Bars(), voice=Tones(), motion=tiny_motion()) as stream:
        stream.say(LONG)
        for _ in range(9):
            stream.next(20)
        stream.interrupt()
        segment = stream.say("Sorry.")
        frames = []
        while not segment.done:
            frames.append(stream.next(20))
        sound_S = np.concatenate([frame.sound_S for frame in frames if frame.segment == segment.id])
        expected_S = Tones().chunk("Sorry.").samples_S
        assert np.array_equal(sound_S[: len(expected_S)], expected_S)


def test_pushed_sound_after_an_interruption_is_a_new_segment() -> None:
    with AvatarStream(Bars(), motion=tiny_motion()) as stream:
        one = stream.push_audio(np.full(9600, 0.1, np.float32))
        stream.next(20)
        stream.interrupt()
        two = stream.push_audio(np.full(9600, 0.1, np.float32), last=True)
        assert two.id == one.id + 1
        while not two.done:
            stream.next(20)


def test_a_hundred_interruptions_leave_the_stream_alive() -> None:
    with AvatarStream(Bars(), voice=Tones(), motion=tiny_motion()) as stream:
        last = -1
        for number in range(100):
            stream.say("Hello again.")
            if number % 3 == 0:
                frame = stream.next(20)
                assert frame.index == last + 1
                last = frame.index
            stream.interrupt()
        assert stream.next(20).epoch == 100


@pytest.mark.heavy
def test_an_interruption_costs_the_same_however_much_waits() -> None:
    def cost_s(num_texts: int) -> float:
        costs = []
        for _ in range(7):
            with AvatarStream(Bars(), voice=Tones(), motion=tiny_motion()) as stream:
                for _ in range(num_texts):
                    stream.say(LONG)
                stream.next(20)
                began = time.perf_counter()
                stream.interrupt()
                costs.append(time.perf_counter() - began)
        return statistics.median(costs)

    assert cost_s(60) < 5 * cost_s(1) + 0.002
