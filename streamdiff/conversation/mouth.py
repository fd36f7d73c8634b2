"""What was heard of a reply: from seconds played to words, by the times of the voice's phonemes.

`TimedVoice` goes between an engine and its voice and remembers, for the utterances of late, where each sentence and
each of its phonemes begins. Where a voice gives no times (or a stream has none), the share of the sound that was played
is the share of the words, at the speed at which this voice has spoken so far.
"""

from __future__ import annotations

import dataclasses
import re
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from streamdiff.errors import InputError
from streamdiff.voice.open import open_voice
from streamdiff.voice.speaker import without_lead
from streamdiff.voice.speech import SpeechChunk, Synthesizer
from streamdiff.voice.text import sentences

_REMEMBERED = 64
_LEAD_S = 0.010
_LETTERS_PER_S = 15.0
"""Of English read aloud, spaces included; what is assumed before a voice has said anything."""


class Mouth(Protocol):
    """Knows how a reply is said."""

    def heard(self, segment: int, text: str, played_s: float) -> int:
        """Letters of ``text``, cut between words, that were heard when ``played_s`` of a segment were played."""
        ...

    def spoken(self, text: str, duration_s: float) -> None:
        """A whole text took so long."""
        ...


@dataclass(slots=True)
class _Sentence:
    text: str
    start_s: float
    ends_s: list[float] = field(default_factory=list)
    """Of its phonemes, from the start of the utterance."""
    duration_s: float = 0.0


class ProportionalMouth:
    """Letters in proportion to seconds, at the speed of what was spoken before."""

    def __init__(self, letters_per_s: float = _LETTERS_PER_S) -> None:
        self._letters, self._seconds = letters_per_s, 1.0

    def heard(self, segment: int, text: str, played_s: float) -> int:
        """Letters of ``text`` that were heard."""
        del segment
        return whole_words(text, played_s * self._letters / self._seconds)

    def spoken(self, text: str, duration_s: float) -> None:
        """Learn the speed of the voice; a second of the assumption weighs as much as a second of sound."""
        if duration_s > 0.2 and text:
            self._letters += len(text)
            self._seconds += duration_s


class TimedVoice:
    """A `Synthesizer` that says what another one says, and a `Mouth` that knows when.

    An utterance begins with at most 10 ms of silence: an answer is heard 20 ms earlier than in a film.

    Args:
        voice: the voice proper; give this object to the engine in its place.
    """

    def __init__(self, voice: Synthesizer) -> None:
        self._voice = voice
        self._lock = threading.Lock()
        self._spoken: deque[tuple[int, list[_Sentence]]] = deque(maxlen=_REMEMBERED)
        self._otherwise = ProportionalMouth()

    @property
    def rate_hz(self) -> int:
        """Samples per second."""
        return self._voice.rate_hz

    def speak(self, text: str | Iterable[str], *, segment: int = 0) -> Iterator[SpeechChunk]:
        """See `Synthesizer.speak`; each sentence is its own chunk, or several."""
        if isinstance(text, str) and not any(c.isalnum() for c in text):
            raise InputError(f"nothing to say in {text[:40]!r}: it holds no letter and no digit; give words")
        return self._speak(text, segment)

    def _speak(self, text: str | Iterable[str], segment: int) -> Iterator[SpeechChunk]:
        timeline = self._begin(segment)
        unspoken: InputError | None = None
        at_s = 0.0
        for sentence in sentences(text):
            timed = _Sentence(sentence, at_s)
            try:
                for part in self._voice.speak(sentence, segment=segment):
                    chunk = part if at_s else _prompt(part)
                    if len(chunk.samples_S):
                        phonemes = chunk.phonemes or ()
                        timed.ends_s += [at_s + p.end_s for p in phonemes if p.symbol.isalpha()]
                        at_s += chunk.duration_s
                        timed.duration_s = at_s - timed.start_s
                        self._note(timeline, timed)
                        yield SpeechChunk(chunk.samples_S, chunk.rate_hz, chunk.phonemes, segment)
            except InputError as error:
                unspoken = error
        if not timeline:
            raise unspoken or InputError("nothing to say: the text has ended without a word; give words")
        yield SpeechChunk(np.zeros(0, np.float32), self.rate_hz, (), segment, last=True)

    def _begin(self, segment: int) -> list[_Sentence]:
        timeline: list[_Sentence] = []
        with self._lock:
            self._spoken.append((segment, timeline))
        return timeline

    def _note(self, timeline: list[_Sentence], sentence: _Sentence) -> None:
        with self._lock:
            if sentence not in timeline:
                timeline.append(sentence)

    def heard(self, segment: int, text: str, played_s: float) -> int:
        """Letters of ``text`` that were heard; by proportion where this segment is not known."""
        with self._lock:
            # Streams that share a voice number their segments alike: the text tells them apart.
            for number, timeline in reversed(self._spoken):
                begins = _places(timeline, text) if number == segment else None
                if begins:
                    heard = [s for s in timeline if s.start_s < played_s]
                    return (
                        whole_words(text, begins[len(heard) - 1] + _letters_heard(heard[-1], played_s)) if heard else 0
                    )
        return self._otherwise.heard(segment, text, played_s)

    def spoken(self, text: str, duration_s: float) -> None:
        """See `ProportionalMouth.spoken`."""
        self._otherwise.spoken(text, duration_s)


def open_mouth(name: str = "heart") -> TimedVoice:
    """A voice by the name that a command line gives (see `voice.open.open_voice`), which knows when each word is heard.

    Raises:
        ConfigError, InputError, BackendError: as `open_voice`.
    """
    return TimedVoice(open_voice(name))


def _prompt(chunk: SpeechChunk) -> SpeechChunk:
    """The first chunk of an utterance, with little silence before its first sound."""
    samples_S, phonemes = without_lead(chunk.samples_S, list(chunk.phonemes or ()), chunk.rate_hz, _LEAD_S)
    timed = None if chunk.phonemes is None else tuple(phonemes)
    return dataclasses.replace(chunk, samples_S=samples_S, phonemes=timed)


def _places(timeline: list[_Sentence], text: str) -> list[int] | None:
    """Where each sentence begins in a text; None if one of them is not in it."""
    places: list[int] = []
    at = 0
    for sentence in timeline:
        at = text.find(sentence.text[:16], at)
        if at < 0:
            return None
        places.append(at)
        at += 1
    return places


def _letters_heard(sentence: _Sentence, played_s: float) -> float:
    if played_s >= sentence.start_s + sentence.duration_s:
        return len(sentence.text)
    if sentence.ends_s:
        return len(sentence.text) * bisect_right(sentence.ends_s, played_s) / len(sentence.ends_s)
    return len(sentence.text) * (played_s - sentence.start_s) / max(sentence.duration_s, 1e-6)


def whole_words(text: str, letters: float) -> int:
    """The end of the last word that lies within so many letters, give or take half a letter.

    >>> "Good morning to you."[: whole_words("Good morning to you.", 14)]
    'Good morning'
    """
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    return max((end for end in ends if end <= letters + 0.5), default=0)
