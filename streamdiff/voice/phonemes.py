"""Text to phonemes (grapheme to phoneme, by hibari's rules and lexica), and phonemes to times.

Axes: P phonemes of a sentence.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamdiff.voice.packages import required_package
from streamdiff.voice.speech import PAUSES, Phoneme
from streamdiff.voice.text import quoted

logger = logging.getLogger(__name__)

_UNIT_S = 0.025
"""Kokoro, and hibari after it, count durations in 25 ms."""
_EARLY_UNITS = 2
"""The sound of a phoneme comes about 50 ms before the place that the durations give it: vowels correlate
with loudness best at -45 ms, hisses with high frequencies at -60 ms (40 sentences)."""
_STRESS = frozenset("ˈˌ")
_LENGTH = frozenset("ːʰʲ̃")


def timed_phonemes(symbols: str, durations_P: NDArray[np.integer[Any]]) -> list[Phoneme]:
    """Symbols between two silences as phonemes.

    Marks of stress and length join their vowel, and a space the sound that follows it: the network gives
    them time of their own, but a word's first consonant fills the space before it (measured on /s/ and /ʃ/).
    """
    durations_P = durations_P.copy()
    lead = min(_EARLY_UNITS, int(durations_P[0]))
    durations_P[0] -= lead
    durations_P[-1] += lead
    ends_s = np.cumsum(durations_P) * _UNIT_S
    starts_s = ends_s - durations_P * _UNIT_S
    phonemes: list[Phoneme] = []
    begun_s: float | None = None
    for symbol, start_s, end_s in zip(["", *symbols, ""], starts_s.tolist(), ends_s.tolist(), strict=True):
        pausing = bool(phonemes) and phonemes[-1].symbol in PAUSES
        if symbol and (symbol in _STRESS or (symbol == " " and not pausing)):
            begun_s = start_s if begun_s is None else begun_s
        elif symbol and phonemes and (symbol in _LENGTH or symbol == " "):
            phonemes[-1] = phonemes[-1]._replace(end_s=end_s)
        else:
            phonemes.append(Phoneme(symbol, start_s if begun_s is None else begun_s, end_s))
            begun_s = None
    return phonemes


@dataclass
class Reader:
    """Text to phonemes of the Kokoro alphabet, by the rules and the lexica inside hibari's wheel."""

    british: bool = False
    _g2p: Callable[[str], str] = field(init=False)
    vocabulary: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        hibari = required_package("hibari")
        self._g2p = required_package("hibari.g2p").G2P(british=self.british)
        path = Path(str(hibari.__file__)).parent / "assets" / "vocab.json"
        self.vocabulary = json.loads(path.read_text(encoding="utf-8"))

    def phonemes(self, sentence: str) -> str:
        sentence = _LONG_NUMBER.sub(_in_threes, sentence)
        # The rules' work grows with the cube of such strings: 5 s for 240 characters of "a1a1...", 8 s of slashes.
        sentence = _LONG_RUN.sub(lambda run: run.group()[:_MAX_RUN], sentence)
        sentence = _LONG_WORD.sub(_in_pieces, sentence)
        try:
            read = self._g2p(sentence)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            # Its rules stumble over some strings that are no language; one sentence must not end the talk.
            logger.warning("not spoken, cannot be read (%s): %s", error, quoted(sentence))
            return ""
        return "".join(c for c in read if c in self.vocabulary)


# With commas as well: the rules stop at numbers that no word names.
_LONG_NUMBER = re.compile(r"\d{13,}|\d(?:,?\d){18,}")


_MAX_RUN, _MAX_WORD = 8, 60
_LONG_RUN = re.compile(rf"[^\w\s]{{{_MAX_RUN + 1},}}")
_LONG_WORD = re.compile(rf"\S{{{_MAX_WORD + 1},}}")


def _in_pieces(match: re.Match[str]) -> str:
    """A word of endless length in words of bounded length, cut behind punctuation where there is some."""
    rest, pieces = match.group(), list[str]()
    while len(rest) > _MAX_WORD:
        cut = next((at for at in range(_MAX_WORD, _MAX_WORD // 2, -1) if not rest[at - 1].isalnum()), _MAX_WORD)
        pieces.append(rest[:cut])
        rest = rest[cut:]
    return " ".join([*pieces, rest])


def _in_threes(match: re.Match[str]) -> str:
    digits = match.group().replace(",", "")
    return " ".join(digits[i : i + 3] for i in range(0, len(digits), 3))


_MAX_PHONEMES = 400


def breaths(phonemes: str) -> Iterator[str]:
    """At most 400 phonemes at a time, cut between words where there are words."""
    while len(phonemes) > _MAX_PHONEMES:
        cut = phonemes.rfind(" ", 1, _MAX_PHONEMES)
        cut = cut if cut > 0 else _MAX_PHONEMES
        yield phonemes[:cut]
        phonemes = phonemes[cut:].lstrip()
    if any(c.isalpha() for c in phonemes):
        yield phonemes
