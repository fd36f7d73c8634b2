"""Speech to learn from: at one level, read by a synthetic voice or taken from recordings. S samples at 16 kHz."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from streamdiff.arrays import Floats
from streamdiff.errors import CheckpointError, InputError
from streamdiff.facts import printable
from streamdiff.media.sound import read_audio
from streamdiff.tensorfile import read_npz
from streamdiff.training.data.clip import RATE_HZ
from streamdiff.training.sentences import lexicon_words, sentence

_LEVEL_DB = -26.0
_MAX_BYTES = 1 << 30


def leveled(samples_S: Floats, level_db: float = _LEVEL_DB) -> Floats:
    """Speech brought to ``level_db`` dBFS, measured where it is loud; silence stays silence."""
    hop = RATE_HZ // 100
    power = (samples_S[: len(samples_S) // hop * hop].reshape(-1, hop).astype(np.float64) ** 2).mean(1)
    loud = power[power > power.max(initial=0.0) * 1e-3]
    if len(loud) == 0 or loud.mean() < 1e-12:
        return samples_S.astype(np.float32)
    gain = 10 ** (level_db / 20) / math.sqrt(float(loud.mean()))
    return np.clip(samples_S * gain, -1, 1).astype(np.float32)


def recordings_of(paths: Sequence[Path]) -> list[Floats]:
    """Waveforms at 16 kHz, levelled: sound files, or the takes of ``facegood_audio2rig.npz`` but the last."""
    found: list[Floats] = []
    for path in paths:
        if path.suffix == ".npz":
            found += [leveled(take_S) for take_S in _takes(path)]
        else:
            found.append(leveled(torch.cat(list(read_audio(path, RATE_HZ))).numpy()))
    return found


def _takes(path: Path) -> list[Floats]:
    """Sound of all takes but the last, which is never trained on."""
    try:
        arrays = read_npz(path, most_bytes=_MAX_BYTES, prefix="audio_")
        if wrong := [name for name, take in arrays.items() if take.ndim != 1 or take.dtype != np.int16]:
            raise CheckpointError(f"{printable(wrong[0])} is no sound of 16-bit samples")
    except CheckpointError as error:
        raise InputError(f"{path} is not an archive of recordings: {error}; its takes are called audio_*") from error
    return [arrays[name].astype(np.float32) / 32768 for name in sorted(arrays)[:-1]]


class Voices:
    """Speech by number: sentences read by hibari-tts in many pitches and throats, and stretches of given recordings."""

    def __init__(self, recordings: Sequence[Floats] = (), *, recorded_share: float = 0.4) -> None:
        from streamdiff.voice import HibariVoice

        self._voice = HibariVoice()
        self._words = lexicon_words()
        self._recordings = list(recordings)
        self._share = recorded_share if recordings else 0.0

    def sound(self, num_samples: int, generator: np.random.Generator) -> Floats:
        """Speech at -26 dBFS, with the pauses that speech has."""
        if generator.random() < self._share:
            long = self._recordings[int(generator.integers(len(self._recordings)))]
            first = int(generator.integers(max(1, len(long) - num_samples)))
            samples = long[first : first + num_samples]
            return leveled(np.pad(samples, (0, num_samples - len(samples))))
        return leveled(self._read(num_samples, generator))

    def _read(self, num_samples: int, generator: np.random.Generator) -> Floats:
        voice = self._voice
        voice.pitch = float(np.clip(np.exp(generator.normal(-0.1, 0.32)), 0.45, 1.8))
        voice.tract = float(np.clip(voice.pitch**0.25 * np.exp(0.06 * generator.standard_normal()), 0.78, 1.25))
        voice.speed = float(np.clip(np.exp(generator.normal(0.0, 0.15)), 0.7, 1.5))
        parts: list[Floats] = [np.zeros(int(generator.uniform(0, 0.8) * RATE_HZ), np.float32)]
        while sum(map(len, parts)) < num_samples:
            for chunk in voice.speak(sentence(generator, self._words)):
                parts.append(_at_16_khz(chunk.samples_S))
            parts.append(np.zeros(int(generator.uniform(0.05, 0.9) * RATE_HZ), np.float32))
        return np.concatenate(parts)[:num_samples]


def _at_16_khz(samples_S: Floats) -> Floats:
    from streamdiff import voice

    resampler = voice.Resampler(voice.RATE_HZ, RATE_HZ)
    return np.concatenate([resampler.push(samples_S), resampler.finish()]).astype(np.float32)
