"""Fit a voice's timbre to a recording: a search among mixtures of known voices.

Kokoro's style vector carries timbre in its first 128 numbers and prosody in the last 128. Only the first half is
fitted, and only mixtures of known voices are tried, so the result stays where the decoder was trained; rhythm and
melody are not touched. Needs no gradient: the voice is a black box that says a sentence.

Axes: S waveform samples, P phonemes of a sentence, V voices, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from streamdiff import rng
from streamdiff.arrays import Floats
from streamdiff.errors import ConfigError
from streamdiff.voice.encoder import SpeakerEncoder
from streamdiff.voice.kokoro import KokoroVoice, kokoro_names, kokoro_styles

_TYPICAL_PHONEMES = 60
"""Of a sentence: a voice's style depends a little on how long it speaks."""


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
