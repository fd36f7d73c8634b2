"""Whatever is called, in whatever order: a frame per 40 ms, in order, none stale, and every segment ends once."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator

import numpy as np
import pytest

from streamdiff.avatar.engine import AvatarEngine
from streamdiff.avatar.stream import AvatarStream
from streamdiff.errors import InputError
from streamdiff.session import Session
from streamdiff.stream import Segment, Shown
from tests.avatar.tiny_avatar import Bars, Tones, tiny_motion

WORDS = ("one", "two", "three,", "four!", "five", "six?", "seven", "eight;", "nine", "ten.", "Eleven", "twelve:", "old")
RATES_HZ = (8_000, 11_025, 16_000, 24_000, 44_100, 48_000, 192_000)


def text_of(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))


def sound_of(rng: random.Random, rate_hz: int) -> np.ndarray:
    length = int(rng.choice([0.0, 0.003, 0.02, 0.04, 0.11, 0.6]) * rate_hz)
    return np.random.default_rng(rng.randrange(1 << 30)).uniform(-0.5, 0.5, length).astype(np.float32)


class Witness:
    """What must hold of frames as they come, and of segments when all is over."""

    def __init__(self) -> None:
        self.segments: dict[int, Segment] = {}
        self.epoch = 0
        self.num_frames = 0
        self._last: Shown | None = None
        self._ends: Counter[int] = Counter()

    def note(self, segment: Segment) -> None:
        self.segments[segment.id] = segment

    def see(self, frame: Shown, epoch: int) -> None:
        """``epoch``: of the last interruption that had returned before this frame was asked for."""
        self.num_frames += 1
        assert frame.index == (self._last.index + 1 if self._last else 0)
        assert frame.sound_S.shape == (960,)
        assert frame.sound_S.dtype == np.float32
        assert frame.epoch >= max(epoch, self._last.epoch if self._last else 0)
        assert (frame.segment == 0) == (frame.state != "speaking")
        if frame.segment == 0 and frame.state != "fading":
            assert not frame.sound_S.any()
        if frame.segment:
            assert self._last is None or frame.segment >= self._last.segment or not self._last.segment
            assert frame.segment in self.segments
            assert self.segments[frame.segment].epoch == frame.epoch
            assert not self._ends[frame.segment]
        if frame.ends_segment:
            self._ends[frame.segment] += 1
        self._last = frame

    def conclude(self) -> None:
        for segment in self.segments.values():
            assert segment.done, f"segment {segment.id} was forgotten"
            assert self._ends[segment.id] == (0 if segment.interrupted else 1), f"segment {segment.id}"


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(4))
def test_a_stream_that_is_called_at_random_goes_on(seed: int) -> None:
    rng = random.Random(seed)
    witness, epoch = Witness(), 0
    rate_hz: int | None = None
    with AvatarStream(Bars(), voice=Tones(), motion=tiny_motion(), seed=seed) as stream:
        for _ in range(120):
            call = rng.choice(["say", "say", "push", "push", "push", "interrupt", "listen", "end", "take", "take"])
            if call == "say":
                witness.note(stream.say(text_of(rng)))
            elif call == "push":
                rate_hz = rate_hz or rng.choice(RATES_HZ)
                last = rng.random() < 0.2
                witness.note(stream.push_audio(sound_of(rng, rate_hz), rate_hz, last=last))
                rate_hz = None if last else rate_hz
            elif call == "interrupt":
                epoch, rate_hz = stream.interrupt().epoch, None
            elif call == "listen":
                stream.listen(rng.random() < 0.5)
            else:
                # Outside real time, sound that was begun must be ended before frames are asked for.
                stream.end()
                rate_hz = None
                for _ in range(rng.randint(1, 30) if call == "take" else 1):
                    witness.see(stream.next(20), epoch)
        stream.end()
        for _ in range(20_000):
            if all(segment.done for segment in witness.segments.values()):
                break
            witness.see(stream.next(20), epoch)
        assert stream.metrics.longest_queue <= 3
    witness.conclude()
    assert witness.num_frames > 100


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_a_session_that_many_call_at_random_for_five_minutes_goes_on() -> None:
    threads = threading.active_count()
    rng = random.Random(11)
    witness = Witness()
    waits_ms: list[float] = []
    refused = 0
    returned = 0
    until_s = time.monotonic() + 300

    async def pieces() -> AsyncIterator[str]:
        for word in text_of(rng).split():
            await asyncio.sleep(rng.uniform(0, 0.05))
            yield word + " "

    async def call(session: Session) -> None:
        nonlocal refused, returned
        rate_hz: int | None = None
        while time.monotonic() < until_s:
            await asyncio.sleep(rng.choice([0.0, 0.001, 0.02, 0.1, 0.7]))
            try:
                match rng.randrange(8):
                    case 0 | 1:
                        witness.note(session.say(text_of(rng)))
                    case 2:
                        witness.note(session.say(pieces()))
                    case 3 | 4:
                        rate_hz = 16_000
                        last = rng.random() < 0.3
                        witness.note(session.push_audio(sound_of(rng, rate_hz), rate_hz, last=last))
                    case 5:
                        session.end()
                    case 6:
                        session.listen(rng.random() < 0.5)
                    case _:
                        began_s = time.perf_counter()
                        returned = max(returned, session.interrupt().epoch)
                        waits_ms.append((time.perf_counter() - began_s) * 1e3)
            except InputError:
                refused += 1  # 64 segments wait, or 60 s of sound: told, not queued for ever

    async def watch(session: Session) -> None:
        while time.monotonic() < until_s:
            known = returned
            witness.see(await asyncio.wait_for(anext(session), 20), known)
        session.interrupt()
        session.end()
        known = returned
        for _ in range(20):
            witness.see(await asyncio.wait_for(anext(session), 20), known)
        assert session.metrics.longest_queue <= 3

    async def talk() -> None:
        engine = AvatarEngine(Bars(0.002), voice=Tones(0.005), motion=tiny_motion())
        async with engine.open() as session:
            await asyncio.gather(watch(session), call(session), call(session))

    asyncio.run(talk())
    witness.conclude()
    assert witness.num_frames > 5_000  # 7,500 on a machine that has the time
    assert len(waits_ms) > 100
    assert refused < len(witness.segments)
    assert float(np.median(waits_ms)) < 2.0
    assert threading.active_count() <= threads + 1
