"""Sound of any rate, type and block size enters by one door; a broken one is told at once."""

from __future__ import annotations

import numpy as np
import pytest

from streamdiff.errors import InputError
from streamdiff.voice import RATE_HZ, ExternalAudio, Resampler, waveform

RATES = [8_000, 11_025, 16_000, 22_050, 24_000, 44_100, 48_000, 96_000, 192_000, 44_101]


def tone(rate_hz: int, seconds: float = 0.5, hz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(int(rate_hz * seconds)) / rate_hz)).astype(np.float32)


@pytest.mark.parametrize("rate_hz", RATES)
def test_blocks_do_not_change_a_bit(rate_hz: int) -> None:
    rng = np.random.default_rng(rate_hz)
    sound_S = rng.uniform(-1, 1, rate_hz // 5).astype(np.float32)
    whole = ExternalAudio()
    expected_S = whole.push(sound_S, rate_hz, last=True).samples_S
    blocks, at, door = [], 0, ExternalAudio()
    while at < len(sound_S):
        size = int(rng.integers(1, 2000))
        blocks.append(door.push(sound_S[at : at + size], rate_hz, last=at + size >= len(sound_S)).samples_S)
        at += size
    assert np.array_equal(np.concatenate(blocks), expected_S)


@pytest.mark.parametrize("rate_hz", RATES)
def test_a_tone_keeps_its_place_and_length(rate_hz: int) -> None:
    sound_S = ExternalAudio().push(tone(rate_hz), rate_hz, last=True).samples_S
    expected_S = tone(RATE_HZ)
    assert abs(len(sound_S) - len(expected_S)) <= 2
    middle = slice(RATE_HZ // 10, RATE_HZ * 4 // 10)
    assert np.abs(sound_S[middle] - expected_S[middle]).max() < 2e-3


def test_what_lies_above_the_new_range_is_removed() -> None:
    sound_S = ExternalAudio().push(tone(96_000, hz=20_000.0), 96_000, last=True).samples_S
    assert np.abs(sound_S[1000:-1000]).max() < 1e-3


def test_a_stream_is_behind_by_less_than_two_milliseconds() -> None:
    for rate_hz in RATES:
        resampler = Resampler(rate_hz)
        heard = len(resampler.push(tone(rate_hz, 0.2))) / RATE_HZ
        assert 0.2 - heard < 0.0022


def test_integers_bytes_and_channels_mean_the_same() -> None:
    mono_S = tone(16_000)
    whole = np.round(mono_S * 32767).astype(np.int16)
    expected_S = waveform(whole)
    assert np.abs(expected_S - mono_S).max() < 1e-4
    assert np.array_equal(waveform(whole.tobytes()), expected_S)
    assert np.array_equal(waveform(np.stack([whole, whole], axis=1)), expected_S)
    assert np.abs(waveform(np.round(mono_S * 127 + 128).astype(np.uint8)) - mono_S).max() < 0.02


def test_a_change_of_rate_loses_nothing() -> None:
    door = ExternalAudio()
    parts = [
        door.push(tone(16_000), 16_000).samples_S,
        door.push(tone(48_000), 48_000).samples_S,
        door.push(np.zeros(0, np.float32), 48_000, last=True).samples_S,
    ]
    assert abs(sum(map(len, parts)) - RATE_HZ) <= 4


@pytest.mark.parametrize(
    ("samples", "rate_hz", "says"),
    [
        (np.full(10, np.nan, np.float32), 16_000, "NaN"),
        (np.full(10, 20_000.0, np.float32), 16_000, "divide"),
        (np.zeros((2, 3, 4), np.float32), 16_000, "shape"),
        (np.zeros((2, 16_000), np.float32), 16_000, "shape"),
        (np.array(["a"]), 16_000, "float"),
        (b"abc", 16_000, "int16"),
        (np.zeros(10, np.float32), 4_000, "8000..192000"),
        (np.zeros(10, np.float32), 384_000, "8000..192000"),
    ],
)
def test_broken_sound_is_refused(samples: object, rate_hz: int, says: str) -> None:
    with pytest.raises(InputError, match=says):
        ExternalAudio().push(samples, rate_hz)  # type: ignore[arg-type]
