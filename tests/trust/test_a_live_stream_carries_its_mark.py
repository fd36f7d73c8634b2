"""The visible mark of a live stream: on every frame, for every viewer, readable, and cheap."""

from __future__ import annotations

import asyncio

import av
import numpy as np
import pytest

from streamdiff.errors import ConfigError
from streamdiff.serve.calls import Calls
from streamdiff.serve.encoder import VideoEncoder
from streamdiff.serve.leases import Leases, Terms
from streamdiff.serve.local import LocalDoor
from streamdiff.serve.mark import Mark, mark_of
from tests.serve.scripted import Stage

WORDS = "AI generated"


def flat(value: int, side: int = 256) -> np.ndarray:
    return np.full((1, side, side, 3), value, np.uint8)


@pytest.mark.parametrize("value", [0, 90, 128, 200, 255])
@pytest.mark.parametrize("side", [256, 512])
def test_the_words_stand_out_from_any_picture_and_nothing_else_changes(value: int, side: int) -> None:
    frames_THWC = flat(value, side)
    change = np.abs(Mark(WORDS, side, side).on(frames_THWC).astype(int) - frames_THWC).max(-1)[0]
    assert (frames_THWC == value).all()
    assert np.count_nonzero(change > 80) > 0.0025 * side * side
    assert change[: side - side // 8].max() == 0
    rows, columns = np.nonzero(change)
    assert columns.max() - columns.min() > 0.2 * side
    assert rows.max() - rows.min() > side / 25


def test_blending_is_what_the_definition_says() -> None:
    rng = np.random.default_rng(1)
    frames_THWC = rng.integers(0, 256, (2, 64, 64, 3), np.uint8)
    mark = Mark("AI", 64, 64)
    opaque = mark.on(np.zeros_like(frames_THWC)).astype(float)
    clear = 255 - (mark.on(np.full_like(frames_THWC, 255)).astype(float) - opaque)  # opacity, 0..255
    expected = frames_THWC * (1 - clear / 255) + opaque
    assert np.abs(mark.on(frames_THWC) - expected).max() <= 1.5


def test_the_words_survive_the_encoder() -> None:
    frame_THWC = Mark(WORDS, 256, 256).on(flat(110))
    bright = frame_THWC[0, ..., 0] > 200
    encoder = VideoEncoder(256, 256, 25)
    encoder.aim(0)
    decoder = av.CodecContext.create("vp8", "r")
    pictures = [encoder.encode(frame_THWC[0], k, key=k == 0).data for k in range(5)]
    seen = [f.to_ndarray(format="rgb24") for data in pictures for f in decoder.decode(av.Packet(data))][-1]
    assert seen[bright].mean() > 110 + 50


def test_what_cannot_be_drawn_is_refused() -> None:
    for text in ("", "  ", "a\nb", "x" * 81):
        with pytest.raises(ConfigError, match="one line of 1 to 80"):
            Mark(text, 256, 256)
    with pytest.raises(ConfigError, match="does not fit"):
        Mark("many words that nobody could read here", 64, 64)
    assert mark_of(WORDS, 256, 256) is mark_of(WORDS, 256, 256)


def test_long_words_are_drawn_smaller() -> None:
    change = Mark("Synthetic media, made by a model", 256, 256).on(flat(0)).max(-1)[0]
    assert np.nonzero(change)[1].max() < 256


@pytest.mark.parametrize("is_encoded", [True, False])
def test_every_frame_of_a_session_is_marked(is_encoded: bool) -> None:
    async def main() -> None:
        calls = Calls(Leases(Terms(capacity=1)), Stage(side=64), mark="AI")
        async with calls, LocalDoor(calls).connect(is_encoded=is_encoded) as client:
            for _ in range(3):
                beat = await client.beat()
                assert beat is not None
                assert (beat.frame_HWC[:50] == 60).all()
                assert beat.frame_HWC[50:].max() > 150

    asyncio.run(asyncio.wait_for(main(), 60))
