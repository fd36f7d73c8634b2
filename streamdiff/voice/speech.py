"""Values of text to speech: the protocol of a voice, chunks of sound, phonemes with their times.

A `Synthesizer` turns text, or text that is still being written, into `SpeechChunk`s. Sentences are cut early, so that
the first words are heard while the rest is still text.

Axes: S waveform samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from streamdiff.arrays import Floats

RATE_HZ = 24_000
"""Rate of all sound inside the coefficient path: 960 samples to a frame of 25 per second."""
PAUSES = frozenset({"", *';:,.!?—…"()“”'})


class Phoneme(NamedTuple):
    """A sound of speech and when it is heard, in seconds from the start of its chunk.

    ``symbol`` is one character of the Kokoro alphabet (IPA, with ``A I O Q W Y`` for diphthongs) or
    punctuation; ``""`` is the silence at the ends.
    """

    symbol: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class SpeechChunk:
    """A stretch of one utterance. The last chunk of an utterance may hold no sound at all."""

    samples_S: Floats
    rate_hz: int
    phonemes: tuple[Phoneme, ...] | None
    """None: nobody knows what is being said (sound from outside)."""
    segment: int = 0
    last: bool = False

    @property
    def duration_s(self) -> float:
        return len(self.samples_S) / self.rate_hz


class Synthesizer(Protocol):
    """A text-to-speech voice. Thread-safe; stop it by no longer asking for chunks."""

    @property
    def rate_hz(self) -> int: ...

    def speak(self, text: str | Iterable[str], *, segment: int = 0) -> Iterator[SpeechChunk]:
        """Chunks of speech in order; the last one has ``last`` set.

        Raises:
            InputError: a text without a word that this voice can say, found at the call or, for text still
                being written, at its end.
        """
        ...
