"""A running level brings any voice to the loudness that a model learned from, without waiting or raising noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from streamdiff.models.audio import Levelled, LogMelFeatures, chunks
from streamdiff.models.audio.level import SPEECH_DB, RunningLevel

RATE_HZ, FPS = 16_000, 25
FRAME = RATE_HZ // FPS


def voice(seconds: float = 6.0, level_db: float = SPEECH_DB) -> np.ndarray:
    """Syllables of noise and pauses: 3 s of speech, 0.6 s of silence, over and over; its loud parts at ``level_db``."""
    rng = np.random.default_rng(0)
    clock_S = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    syllables_S = 0.55 - 0.45 * np.cos(2 * np.pi * 4 * clock_S)
    speaks_S = (clock_S % 3.6) < 3.0
    sound_S = rng.standard_normal(len(clock_S)) * syllables_S * speaks_S
    loud = np.abs(sound_S) > 0.2
    return sound_S * 10 ** (level_db / 20) / math.sqrt(np.mean(sound_S[loud] ** 2))


def gains_db(sound_S: np.ndarray) -> np.ndarray:
    level = RunningLevel(FPS)
    frames_AS = sound_S[: len(sound_S) // FRAME * FRAME].reshape(-1, FRAME)
    return np.array([level.heed(float(power)) for power in np.square(frames_AS).mean(1)])


def features(sound_S: np.ndarray, *, levelled: bool) -> torch.Tensor:
    encoder = Levelled(LogMelFeatures()) if levelled else LogMelFeatures()
    stream = encoder.stream(FPS)
    return torch.cat([stream.push(torch.from_numpy(sound_S).float()), stream.finish()], dim=-1)[0]


@pytest.mark.parametrize("given_db", [-20.0, -12.0, -6.0, 6.0, 12.0])
def test_a_voice_at_any_level_is_heard_as_at_the_usual_one(given_db: float) -> None:
    """From half a second on; the difference is in log10 of power, of which 20 dB are 1.5 in these units."""
    usual = features(voice(), levelled=False)
    loud_A = usual[0].mean(0) > usual[0].mean(0).median()
    given = voice(level_db=SPEECH_DB + given_db)
    after = torch.arange(usual.shape[-1]) > FPS // 2
    found = (features(given, levelled=True) - usual)[0][:, loud_A & after].mean().abs().item()
    left = (features(given, levelled=False) - usual)[0][:, loud_A & after].mean().abs().item()
    assert found < 0.15
    assert left > 2 * found


def test_gains_settle_within_a_fifth_of_a_second() -> None:
    assert np.abs(gains_db(voice(level_db=SPEECH_DB - 20.0))[5:] - 20.0).max() < 4.0


def test_a_gain_has_limits() -> None:
    assert gains_db(voice(level_db=SPEECH_DB - 34.0)).max() == 24.0
    assert gains_db(voice(level_db=SPEECH_DB + 24.0)).min() == -18.0


@pytest.mark.parametrize("noise_db", [-80.0, -60.0, -45.0])
def test_noise_is_not_made_loud(noise_db: float) -> None:
    noise_S = np.random.default_rng(1).standard_normal(4 * RATE_HZ) * 10 ** (noise_db / 20)
    assert np.all(gains_db(noise_S) == 0.0)


def test_noise_between_words_does_not_change_the_gain() -> None:
    spoken_S = voice(7.2, SPEECH_DB - 12.0)
    noise_S = np.random.default_rng(1).standard_normal(len(spoken_S)) * 10 ** (-65 / 20)
    assert np.abs(gains_db(spoken_S + noise_S)[25:] - 12.0).max() < 3.0


def test_silence_stays_silence() -> None:
    assert np.all(gains_db(np.zeros(RATE_HZ)) == 0.0)


@pytest.mark.parametrize("size", [1, 333, 640, 5000])
def test_how_sound_is_cut_changes_no_bit(size: int) -> None:
    sound_S = torch.from_numpy(voice(0.5 if size == 1 else 2.0)).float()[:-100]
    whole = Levelled(LogMelFeatures()).stream(FPS)
    expected = torch.cat([whole.push(sound_S), whole.finish()], dim=-1)
    stream = Levelled(LogMelFeatures()).stream(FPS)
    parts = [stream.push(sound_S[start : start + size]) for start in range(0, len(sound_S), size)]
    assert torch.equal(torch.cat([*parts, stream.finish()], dim=-1), expected)
    assert expected.shape[-1] == -(-len(sound_S) // FRAME)


def test_the_viewer_hears_what_was_said() -> None:
    sound_S = torch.from_numpy(voice(2.0, SPEECH_DB - 20.0)).float()
    made = list(chunks([sound_S], Levelled(LogMelFeatures()), frames_per_chunk=12, fps=FPS))
    heard_S = torch.cat([chunk.sound_S for chunk in made])
    assert torch.equal(heard_S[: len(sound_S)], sound_S)


def test_faint_noise_after_silence_is_no_voice() -> None:
    noise_S = np.random.default_rng(1).standard_normal(2 * RATE_HZ) * 10 ** (-66 / 20)
    assert np.all(gains_db(np.concatenate([np.zeros(RATE_HZ), noise_S])) == 0.0)


def test_somebody_in_the_background_does_not_change_the_gain() -> None:
    """A voice 20 dB below, in the pauses of the one that is near."""
    near_S, far_S = voice(3.0), voice(2.0, SPEECH_DB - 20.0)
    found = gains_db(np.concatenate([near_S, far_S]))
    assert np.abs(found[75:] - found[74]).max() < 0.5


def test_somebody_who_moves_away_is_followed() -> None:
    found = gains_db(np.concatenate([voice(60.0), voice(15.0, SPEECH_DB - 8.0)]))
    assert abs(found[-1] - found[59 * FPS] - 8.0) < 2.0
