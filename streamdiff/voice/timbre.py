"""Whose voice it is: a speaker encoder, and a search for the timbre that comes close to a speaker.

Kokoro's style vector carries timbre in its first 128 numbers and prosody in the last 128. Only the first half is
fitted, and only mixtures of known voices are tried, so the result stays where the decoder was trained; rhythm and
melody are not touched. Needs no gradient: the voice is a black box that says a sentence.

Axes: S waveform samples, T spectra (100 per second), V voices, D embedding.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from streamdiff import rng
from streamdiff.arrays import Floats
from streamdiff.errors import CheckpointError, ConfigError, InputError
from streamdiff.voice.speech import KokoroVoice, Resampler, kokoro_names, kokoro_styles

_RATE_HZ = 16_000
_FFT, _HOP, _BANDS = 400, 160, 40
_PART, _PART_HOP = 160, 77
"""Spectra in a partial utterance, and between two: 1.6 s every 0.77 s."""
_LEVEL_DBFS = -30.0
_TYPICAL_PHONEMES = 60
"""Of a sentence: a voice's style depends a little on how long it speaks."""


class SpeakerEncoder(Protocol):
    """Tells who speaks: a vector that is close for one speaker and far for another."""

    def embed(self, samples_S: Floats, rate_hz: int) -> Floats:
        """A vector of length 1."""
        ...


class GE2EEncoder:
    """The speaker encoder of Resemblyzer (GE2E, Wan et al. 2018; Apache-2.0) from its ``pretrained.pt``.

    Three LSTM layers over 40 mel bands, a projection, averaged over overlapping parts of 1.6 s: 256 numbers.

    Raises:
        InputError: no such file.
        CheckpointError: a file of something else.
    """

    def __init__(self, path: str | Path) -> None:
        if not Path(path).is_file():
            raise InputError(f"no speaker encoder at {path}; it is pretrained.pt in the wheel of Resemblyzer 0.1.4")
        self._lstm = nn.LSTM(_BANDS, 256, 3, batch_first=True)
        self._linear = nn.Linear(256, 256)
        try:
            weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)["model_state"]
            self._lstm.load_state_dict({k[5:]: v for k, v in weights.items() if k.startswith("lstm.")})
            self._linear.load_state_dict({k[7:]: v for k, v in weights.items() if k.startswith("linear.")})
        except (pickle.UnpicklingError, KeyError, TypeError, RuntimeError, EOFError) as error:
            raise CheckpointError(f"{path} is not Resemblyzer's speaker encoder: {error}") from error

    @torch.inference_mode()
    def embed(self, samples_S: Floats, rate_hz: int) -> Floats:
        """The speaker ``[256]`` of at least half a second of speech; length 1."""
        if len(samples_S) < rate_hz // 2:
            raise InputError(f"a speaker is told from at least 0.5 s of speech, got {len(samples_S) / rate_hz:.2f} s")
        resampler = Resampler(rate_hz, _RATE_HZ)
        sound_S = np.concatenate([resampler.push(samples_S), resampler.finish()])
        level_db = 10 * math.log10(float(np.mean(sound_S.astype(np.float64) ** 2)) + 1e-12)
        sound_S = sound_S * 10 ** (max(0.0, _LEVEL_DBFS - level_db) / 20)
        mel_TM = torch.from_numpy(mel_spectra(sound_S))
        if len(mel_TM) < _PART:
            mel_TM = torch.nn.functional.pad(mel_TM, (0, 0, 0, _PART - len(mel_TM)))
        starts = range(0, len(mel_TM) - _PART + 1, _PART_HOP)
        parts_BTM = torch.stack([mel_TM[start : start + _PART] for start in starts])
        _, (hidden, _) = self._lstm(parts_BTM)
        embeddings_BD = torch.nn.functional.normalize(torch.relu(self._linear(hidden[-1])), dim=1)
        return torch.nn.functional.normalize(embeddings_BD.mean(0), dim=0).numpy()


def mel_spectra(sound_S: Floats) -> Floats:
    """Power in 40 mel bands ``[T, 40]`` at 16 kHz, 100 per second, as librosa computes it by default.

    Slaney's scale (linear to 1 kHz) and area normalisation, periodic Hann window, zeros beyond the ends.
    """
    padded_S = np.pad(sound_S.astype(np.float32), _FFT // 2)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_FFT) / _FFT)
    views = np.lib.stride_tricks.sliding_window_view(padded_S, _FFT)[::_HOP]
    power = np.abs(np.fft.rfft(views * window)) ** 2
    hz = np.arange(_FFT // 2 + 1) * _RATE_HZ / _FFT
    edges_hz = _slaney_hz(np.linspace(0.0, _slaney_mel(_RATE_HZ / 2), _BANDS + 2))
    rise = (hz[:, None] - edges_hz[:-2]) / np.diff(edges_hz)[:-1]
    fall = (edges_hz[2:] - hz[:, None]) / np.diff(edges_hz)[1:]
    bank = np.maximum(0.0, np.minimum(rise, fall)) * (2.0 / (edges_hz[2:] - edges_hz[:-2]))
    return (power @ bank).astype(np.float32)


_LINEAR_HZ_PER_MEL, _LOG_FROM_HZ, _LOG_STEP = 200.0 / 3, 1000.0, math.log(6.4) / 27.0


def _slaney_mel(hz: float) -> float:
    if hz < _LOG_FROM_HZ:
        return hz / _LINEAR_HZ_PER_MEL
    return _LOG_FROM_HZ / _LINEAR_HZ_PER_MEL + math.log(hz / _LOG_FROM_HZ) / _LOG_STEP


def _slaney_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    knee = _LOG_FROM_HZ / _LINEAR_HZ_PER_MEL
    return np.where(mel < knee, mel * _LINEAR_HZ_PER_MEL, _LOG_FROM_HZ * np.exp((mel - knee) * _LOG_STEP))


def fit_timbre(
    voices_V256: Floats,
    similarity: Callable[[Floats], float],
    *,
    num_rounds: int = 12,
    population: int = 16,
    seed: int = 0,
) -> tuple[Floats, float]:
    """Fit the timbre half of a style to a speaker, inside the hull of known voices.

    Only mixtures of known timbres are tried (weights on the simplex, cross-entropy search), so the result
    cannot leave the region that the decoder was trained on; the prosody half is not touched.

    Args:
        voices_V256: styles of the known voices.
        similarity: of the speech made with a timbre ``[128]`` to the speaker; higher is better.
        num_rounds, population: ``num_rounds * population`` calls of ``similarity`` at most.

    Returns:
        The best timbre ``[128]`` and its similarity, never worse than the best single voice.
    """
    if voices_V256.ndim != 2 or voices_V256.shape[1] != 256:
        raise ConfigError(f"styles are [voices, 256], got {voices_V256.shape}")
    timbres_VD = voices_V256[:, :128]
    num_voices = len(timbres_VD)
    generator = np.random.default_rng(rng.seed_of("timbre", seed))
    single = [similarity(timbre) for timbre in timbres_VD]
    best = int(np.argmax(single))
    best_timbre, best_score = timbres_VD[best].astype(np.float32), float(single[best])
    # Logits of a softmax; the start favours the voices that are already close.
    order = np.argsort(np.argsort(single)).astype(np.float64)
    mean_V, spread_V = order / max(1, num_voices - 1) * 2.0, np.full(num_voices, 1.5)
    for _ in range(num_rounds):
        logits = mean_V + spread_V * generator.standard_normal((population, num_voices))
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        candidates = (weights @ timbres_VD).astype(np.float32)
        scores = np.array([similarity(candidate) for candidate in candidates])
        elite = np.argsort(scores)[-max(2, population // 4) :]
        mean_V = 0.3 * mean_V + 0.7 * logits[elite].mean(axis=0)
        spread_V = np.maximum(0.3 * spread_V + 0.7 * logits[elite].std(axis=0), 0.1)
        if scores[elite[-1]] > best_score:
            best_timbre, best_score = candidates[elite[-1]], float(scores[elite[-1]])
    return best_timbre, best_score


def adapt_timbre(
    voice: KokoroVoice,
    voices_V256: Floats,
    recording_S: Floats,
    rate_hz: int,
    encoder: SpeakerEncoder,
    *,
    text: str = "This is how I sound today, more or less.",
    num_rounds: int = 6,
    population: int = 12,
    seed: int = 0,
) -> float:
    """Give ``voice`` the timbre of a recording, as far as mixtures of known voices reach; the similarity, -1..1.

    Its prosody stays: the durations of its phonemes come from the other half of the style (an int8 export rounds them
    together, and may move one by 25 ms).
    """
    target_D = encoder.embed(recording_S, rate_hz)
    phonemes = voice.phonemes(text)

    def similarity(timbre: Floats) -> float:
        voice.timbre = timbre
        samples_S, _ = voice.say_phonemes(phonemes)
        return float(encoder.embed(samples_S, voice.rate_hz) @ target_D)

    before = voice.timbre
    try:
        best, score = fit_timbre(voices_V256, similarity, num_rounds=num_rounds, population=population, seed=seed)
    except BaseException:
        voice.timbre = before
        raise
    voice.timbre = best
    return score


def fit_voice(
    model_path: str | Path,
    voices_path: str | Path,
    recording_S: Floats,
    rate_hz: int,
    encoder: SpeakerEncoder,
    *,
    base: str | None = None,
    num_rounds: int = 6,
    seed: int = 0,
) -> tuple[Floats, float]:
    """The styles ``[P, 256]`` of a new Kokoro voice: the timbre of a recording, the prosody of ``base``.

    Also how similar its speech is to the recording, -1..1. Files and errors as `KokoroVoice`.
    """
    voice = KokoroVoice(model_path, voices_path, voice=base)
    known = [kokoro_styles(voices_path, name) for name in kokoro_names(voices_path)]
    voices_V256 = np.stack([styles_P256[min(_TYPICAL_PHONEMES, len(styles_P256) - 1)] for styles_P256 in known])
    score = adapt_timbre(voice, voices_V256, recording_S, rate_hz, encoder, num_rounds=num_rounds, seed=seed)
    assert voice.timbre is not None
    styles_P256 = voice.styles_P256.copy()
    styles_P256[:, :128] = voice.timbre
    return styles_P256, score
