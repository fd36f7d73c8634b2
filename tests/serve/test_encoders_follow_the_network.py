"""Encoders keep to what the network carries: H.264 at once and without a keyframe, VP8 seldom and with one."""

from __future__ import annotations

import numpy as np
import pytest

from streamdiff.errors import ConfigError
from streamdiff.serve.encoder import SoundEncoder, VideoEncoder, full_bitrate

FPS = 25


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def moving(index: int) -> np.ndarray:
    """A picture that moves and sparkles: it takes all the bits that it is given."""
    rng = np.random.default_rng(index)
    wave = 127 + 100 * np.sin(np.add.outer(np.arange(128), np.arange(128) + 4 * index) / 9)
    return np.clip(wave[..., None] + rng.normal(0, 12, (128, 128, 3)), 0, 255).astype(np.uint8)


def sent(encoder: VideoEncoder, clock: Clock, frames: range) -> tuple[float, int]:
    """Bits per second of these frames, and keyframes among them."""
    keys, num = encoder.num_keys, 0
    for index in frames:
        clock.now_s = index / FPS
        num += len(encoder.encode(moving(index), index).data)
    return 8 * num * FPS / len(frames), encoder.num_keys - keys


def test_h264_follows_without_a_keyframe() -> None:
    clock = Clock()
    encoder = VideoEncoder(128, 128, FPS, codec="h264", clock=clock)
    before, _ = sent(encoder, clock, range(75))
    encoder.aim(encoder.most / 3)
    sent(encoder, clock, range(75, 125))
    after, keys = sent(encoder, clock, range(125, 200))
    assert before == pytest.approx(encoder.most, rel=0.3)
    assert after == pytest.approx(encoder.most / 3, rel=0.3)
    assert keys == 0


@pytest.mark.heavy
def test_vp8_is_opened_anew_for_a_large_change_and_not_too_often() -> None:
    clock = Clock()
    encoder = VideoEncoder(128, 128, FPS, clock=clock)
    sent(encoder, clock, range(260))  # 10.4 s
    assert encoder.num_keys == 1
    encoder.aim(encoder.most * 0.8)
    assert sent(encoder, clock, range(260, 280))[1] == 0  # not worth a keyframe
    encoder.aim(encoder.most / 3)
    assert sent(encoder, clock, range(280, 300))[1] == 1
    encoder.aim(encoder.most)
    assert sent(encoder, clock, range(300, 500))[1] == 0  # not yet
    after, _ = sent(encoder, clock, range(400, 500))
    assert after == pytest.approx(encoder.most / 3, rel=0.35)
    assert sent(encoder, clock, range(500, 560))[1] == 1


@pytest.mark.parametrize("codec", ["vp8", "h264"])
def test_a_keyframe_is_made_when_it_is_asked_for_and_only_then(codec: str) -> None:
    encoder = VideoEncoder(64, 64, FPS, codec=codec)  # type: ignore[arg-type]
    frame = np.full((64, 64, 3), 90, np.uint8)
    assert [encoder.encode(frame, k, key=k == 40).is_key for k in range(80)] == [k in (0, 40) for k in range(80)]


def test_no_face_gets_less_than_it_needs_or_more_than_it_can_use() -> None:
    assert full_bitrate(256, 256) == 800_000
    assert 1_500_000 < full_bitrate(512, 512) < 2_200_000
    encoder = VideoEncoder(128, 128, FPS)
    encoder.aim(1.0)
    assert encoder._aim == 100_000
    encoder.aim(1e9)
    assert encoder._aim == encoder.most


def test_what_cannot_be_encoded_says_so() -> None:
    with pytest.raises(ConfigError, match="even sides"):
        VideoEncoder(255, 256, FPS)
    with pytest.raises(ConfigError, match="vp8 or h264"):
        VideoEncoder(256, 256, FPS, codec="av1")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Opus takes"):
        SoundEncoder(22_050)
