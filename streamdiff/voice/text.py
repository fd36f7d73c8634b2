"""Sentence segmentation of text, or of text that is still being written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_TITLES = frozenset(
    ["mr", "mrs", "ms", "dr", "prof", "st", "sr", "jr", "vs", "no", "vol", "fig", "e.g", "i.e", "gen", "rev"]
)
# Begun at the start of a run only, and never given back: a row of points must not be read from each of its points.
_SENTENCE_END = re.compile(r"""(?:(?<![.!?…])[.!?…]++["'”’)\]]*+(?=\s)|[。！？]|\n)""")  # noqa: RUF001
_CLAUSE_END = re.compile(r"""(?:[,;:]["'”’)\]]*(?=\s)|[—–](?=\s|\w)|[，；：、])""")  # noqa: RUF001
_LAST_WORD = re.compile(r"([\w.]+)\.$")
_LONGEST = 240
_LONG_SENTENCE = 80
_SHORTEST_FIRST = 10
_PIECE = 4096


def sentences(text: str | Iterable[str]) -> Iterator[str]:
    """Cut text into pieces to be spoken in one breath, each as soon as it is complete.

    The first piece may end at a comma, so that a voice can begin; later ones end with a sentence. No piece
    is longer than 240 characters and no more than that (and one piece of input) is held back.

    >>> list(sentences(["Well, I ", "think so. Dr. Who", " agrees. Yes"]))
    ['Well, I think so.', 'Dr. Who agrees.', 'Yes']
    """
    held, first = "", True
    for piece in _pieces(text):
        held += piece
        while (end := _cut(held, first=first, final=False)) is not None:
            sentence, held = held[:end].strip(), held[end:]
            if sentence:
                yield sentence
                first = False
    while held.strip():
        end = _cut(held, first=first, final=True) or len(held)
        sentence, held = held[:end].strip(), held[end:]
        if sentence:
            yield sentence
            first = False


def _pieces(text: str | Iterable[str]) -> Iterator[str]:
    # A whole text is known to be complete: the line end says that its only sentence need not be cut at a comma.
    for part in [text + "\n"] if isinstance(text, str) else text:
        for start in range(0, len(part), _PIECE):
            yield part[start : start + _PIECE]


def _cut(held: str, *, first: bool, final: bool) -> int | None:
    """Length of the next piece, or None while it is not decided."""
    sentence = next((m.end() for m in _SENTENCE_END.finditer(held) if _ends_a_sentence(held, m)), None)
    if sentence is None and final and len(held) <= _LONGEST:
        sentence = len(held)
    if first and (sentence is None or sentence > _LONG_SENTENCE):
        clause = next((m.end() for m in _CLAUSE_END.finditer(held) if m.end() >= _SHORTEST_FIRST), None)
        if clause is not None and clause <= _LONGEST:
            return clause
    if sentence is not None and sentence <= _LONGEST:
        return sentence
    if len(held) <= _LONGEST:
        return None
    window = held[:_LONGEST]
    clauses = [m.end() for m in _CLAUSE_END.finditer(window)]
    if clauses and clauses[-1] > _LONGEST // 4:
        return clauses[-1]
    space = window.rfind(" ")
    return space + 1 if space > 0 else _LONGEST


def _ends_a_sentence(held: str, match: re.Match[str]) -> bool:
    if match.group()[0] != ".":
        return True
    word = _LAST_WORD.search(held[max(0, match.start() - 16) : match.start() + 1])
    if word is None:
        return True
    name = word.group(1)
    if "." in name:
        # "5 p.m. now", but "at 5 p.m. Then": what follows decides.
        return held[match.end() :].lstrip()[:1].isupper()
    initial = len(name) == 1 and name.isupper() and name != "I"
    return not (initial or name.lower() in _TITLES)


def quoted(text: str) -> str:
    """A text as an error or a log shows it: quoted, control characters escaped, at most 40 characters."""
    return repr(text if len(text) <= 40 else text[:37] + "...")
