"""Outside real time, the bits shown depend on the calls and not on how long anything took."""

from __future__ import annotations

import time

import numpy as np
import pytest

from streamdiff.avatar.stream import AvatarStream
from streamdiff.stream import Shown
from tests.avatar.tiny_avatar import Bars, Tones, tiny_motion


def scene(*, voice_s: float = 0.0, render_s: float = 0.0, pause_s: float = 0.0) -> list[Shown]:
    taken: list[Shown] = []

    with AvatarStream(Bars(render_s), voice=Tones(voice_s), motion=tiny_motion(), seed=4) as stream:

        def take(count: int) -> None:
            for _ in range(count):
                taken.append(stream.next(20))

        take(3)
        time.sleep(pause_s)
        first = stream.say("Hello, my dear friend. This is a second sentence. And a third one here.")
        take(20)
        time.sleep(pause_s)
        second = stream.say("More words.")
        while not second.done:
            take(1)
        assert first.done
        time.sleep(pause_s)
        take(4)
        stream.listen()
        take(6)
        stream.say("This one is cut off in the middle of it all.")
        take(13)
        time.sleep(pause_s)
        stream.interrupt()
        stream.say("Right away.")
        take(12)
        time.sleep(pause_s)
        rng = np.random.default_rng(0)
        for _ in range(12):
            stream.push_audio(rng.uniform(-0.3, 0.3, 1600).astype(np.float32), 16_000)
            take(2)
        stream.end()
        take(10)
    return taken


def same(one: list[Shown], two: list[Shown]) -> bool:
    return len(one) == len(two) and all(
        np.array_equal(a.motion_AE, b.motion_AE)
        and np.array_equal(a.frames_THWC, b.frames_THWC)
        and np.array_equal(a.sound_S, b.sound_S)
        and (a.index, a.state, a.segment, a.ends_segment, a.epoch)
        == (b.index, b.state, b.segment, b.ends_segment, b.epoch)
        for a, b in zip(one, two, strict=True)
    )


@pytest.fixture(scope="module")
def plain() -> list[Shown]:
    return scene()


@pytest.mark.heavy
@pytest.mark.parametrize(
    "slow",
    [
        {},
        {"voice_s": 0.03},
        {"render_s": 0.004},
        {"pause_s": 0.08},
        *[{"voice_s": 0.005, "render_s": 0.001, "pause_s": 0.01}] * 4,
    ],
)
def test_slow_stages_change_nothing(plain: list[Shown], slow: dict[str, float]) -> None:
    assert same(scene(**slow), plain)


def test_another_seed_is_another_motion(plain: list[Shown]) -> None:
    with AvatarStream(Bars(), motion=tiny_motion(), seed=5) as stream:
        assert not np.array_equal(stream.next(20).motion_AE, plain[0].motion_AE)
