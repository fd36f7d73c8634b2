"""English sentences to be read aloud: a small grammar, and rare words from the lexicon of the voice."""

# Lists of sentences read best as text.
# ruff: noqa: SIM905

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_SUBJECTS = (
    "the old captain|my younger brother|our neighbour|a tall woman|the whole team|every student|nobody here|"
    "the small brown dog|her best friend|the engineer|a careful reader|the morning train|this machine|my voice|"
    "the weather|their garden|the blue boat|another customer|his father|the music"
).split("|")
_VERBS = (
    "found|watched|carried|painted|remembered|changed|followed|opened|described|forgot|measured|believed|pushed|"
    "borrowed|noticed|finished|brought|chose|heard|washed"
).split("|")

_OBJECTS = (
    "a box of fresh fish|the first page of the book|some very good coffee|the bridge over the river|"
    "five or six questions|a map of the village|the heavy wooden door|those purple flowers|a quiet song|"
    "the bottom shelf|three thousand miles|both of the pictures|an unusual shape|fifty pounds of sugar|"
    "the theory behind it|a warm pair of gloves|the judge and the jury|what you said before|"
    "the shape of the valley|a joke about Washington"
).split("|")
_ENDINGS = (
    "before lunch|in the middle of the night|without a word|because it was raining|and then went home|"
    "for the second time|with a big smile|as far as I know|at half past four|near the old mill|very slowly|"
    "on the way to school|after all these years|if nobody minds|in nineteen eighty seven|just above the water"
).split("|")
_PHRASES = (
    "Hello there!|Yes, of course.|I am not sure about that.|Thank you very much.|What do you think?|Well, let me see.|"
    "How are you today?|That sounds wonderful!|Oh no, not again.|Please wait a moment.|Could you say that once more?|"
    "Good morning, everybody.|Nice to meet you.|Let me show you how it works.|Why not?|Absolutely!"
).split("|")


def sentence(generator: np.random.Generator, words: Sequence[str]) -> str:
    """A sentence of a small grammar; some nouns are drawn from ``words`` for the sake of rare sounds."""

    def pick(options: Sequence[str]) -> str:
        return options[int(generator.integers(len(options)))]

    kind = generator.random()
    if kind < 0.2:
        return pick(_PHRASES)
    thing = pick(_OBJECTS) if generator.random() < 0.6 else f"the {pick(words)} {pick(words)}"
    body = f"{pick(_SUBJECTS)} {pick(_VERBS)} {thing}"
    if generator.random() < 0.6:
        body += ("," if generator.random() < 0.3 else "") + " " + pick(_ENDINGS)
    end = "." if kind < 0.75 else "!" if kind < 0.85 else "?"
    return body[0].upper() + body[1:] + end


def lexicon_words() -> list[str]:
    """Ordinary words that the voice knows how to read, sorted."""
    import gzip

    import hibari

    path = Path(str(hibari.__file__)).parent / "assets" / "lexicon_us_gold.json.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        entries = json.load(file)
    return sorted(w for w in entries if w.isascii() and w.isalpha() and w.islower() and 4 <= len(w) <= 10)
