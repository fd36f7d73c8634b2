"""Base class of the voices: text to sentences to phonemes to chunks of speech.

Axes: S waveform samples, P phonemes of a sentence.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import numpy as np

from streamdiff.arrays import Floats
from streamdiff.errors import InputError
from streamdiff.voice.phonemes import Reader, breaths
from streamdiff.voice.speech import RATE_HZ, Phoneme, SpeechChunk
from streamdiff.voice.text import quoted, sentences

logger = logging.getLogger(__name__)

_LEAD_S = 0.03


def without_lead(
    samples_S: Floats, phonemes: list[Phoneme], rate_hz: int, lead_s: float = _LEAD_S
) -> tuple[Floats, list[Phoneme]]:
    """Trim leading silence, 30 ms unless otherwise asked for."""
    window = rate_hz // 200
    first_end = int(phonemes[0].end_s * rate_hz) if phonemes else len(samples_S)
    loud_B = np.abs(samples_S[: len(samples_S) // window * window]).reshape(-1, window).max(axis=1)
    threshold = 0.02 * float(loud_B.max(initial=0.0))
    onset = min(int(np.argmax(loud_B > threshold)) * window, first_end)
    cut = max(0, onset - int(lead_s * rate_hz))
    cut_s = cut / rate_hz
    moved = [Phoneme(p.symbol, max(0.0, p.start_s - cut_s), max(0.0, p.end_s - cut_s)) for p in phonemes]
    return samples_S[cut:], moved


class Speaker:
    """Base class of the voices; a voice says phonemes, the rest is here."""

    rate_hz = RATE_HZ

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def phonemes(self, sentence: str) -> str:
        """Phonemes of one sentence, as the voice will say it; empty when it cannot say any of it."""
        return self._reader.phonemes(sentence)

    def say_phonemes(self, phonemes: str, *, breath: int = 0) -> tuple[Floats, tuple[Phoneme, ...]]:
        """The sound ``[S]`` of a phoneme string and the times of its phonemes."""
        raise NotImplementedError

    def speak(self, text: str | Iterable[str], *, segment: int = 0) -> Iterator[SpeechChunk]:
        """Chunks of speech, one per sentence, then an empty one that is ``last``; see `Synthesizer`."""
        if isinstance(text, str) and not any(c.isalnum() for c in text):
            raise InputError(f"nothing to say in {quoted(text)}: it holds no letter and no digit; give words")
        return self._chunks(text, segment)

    def _chunks(self, text: str | Iterable[str], segment: int) -> Iterator[SpeechChunk]:
        breath = 0
        unread = ""
        for sentence in sentences(text):
            phonemes = self.phonemes(sentence)
            if not any(c.isalpha() for c in phonemes):
                unread = unread or sentence
                logger.info("not spoken, no phonemes for it: %s", quoted(sentence))
                continue
            for part in breaths(phonemes):
                samples_S, timed = self.say_phonemes(part, breath=breath)
                yield SpeechChunk(samples_S, self.rate_hz, timed, segment)
                breath += 1
        if breath == 0:
            raise InputError(
                f"nothing to say in {quoted(unread)}: this voice knows no phoneme of it; give English words"
            )
        yield SpeechChunk(np.zeros(0, np.float32), self.rate_hz, (), segment, last=True)
