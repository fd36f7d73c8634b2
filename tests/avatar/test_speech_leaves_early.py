"""The first words of a text leave while the rest is still text, and no text makes it wait for ever."""

from __future__ import annotations

import doctest
import itertools
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamdiff.voice import HibariVoice, sentences, text
from streamdiff.voice.phonemes import _LONG_WORD, Reader, _in_pieces


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(text).failed == 0


def test_a_clause_leaves_before_the_sentence_is_written() -> None:
    written: list[str] = []

    def writing() -> Iterator[str]:
        for piece in ["Well, to be quite honest, ", "I have not ", "thought about it yet. ", "But I will."]:
            written.append(piece)
            yield piece

    first = next(sentences(writing()))
    assert first == "Well, to be quite honest,"
    assert len(written) == 1


def test_a_sentence_leaves_when_the_next_has_begun() -> None:
    pieces = iter(["It is late. ", "Go home", " now."])
    assert next(sentences(pieces)) == "It is late."
    assert next(pieces) == "Go home"


@pytest.mark.parametrize(
    "text",
    [
        "It costs 3.14 dollars.",
        "Dr. Smith met J. Doe.",
        "See www.example.org today.",
        "It is 5.30 p.m. now I think.",
    ],
)
def test_a_point_inside_a_sentence_does_not_end_it(text: str) -> None:
    assert list(sentences(text)) == [text]


def test_how_the_text_arrives_does_not_change_its_sentences() -> None:
    text = "One two three. Four, five; six! Is it seven? Eight, nine, ten... and so on and so forth. " * 3
    whole = list(sentences(text))
    assert len(whole) >= 12
    assert list(sentences([text])) == whole
    # The first cut alone may come earlier when letters drip in: a clause is spoken before its sentence is known.
    dripped = list(sentences(iter(text)))
    assert " ".join(dripped) == " ".join(whole)
    assert dripped[2:] == whole[1:] or dripped == whole


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(alphabet="ab .,!?\n—😀é3", max_size=60), max_size=8))
def test_nothing_is_lost_and_no_piece_is_long(pieces: list[str]) -> None:
    cut = list(sentences(pieces))
    assert "".join("".join(cut).split()) == "".join("".join(pieces).split())
    assert all(0 < len(piece) <= 240 for piece in cut)


def test_ten_hours_of_text_are_read_as_they_come() -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        for number in itertools.count():
            taken += 1
            yield f"This is sentence number {number} of a very long evening. "

    first = list(itertools.islice(sentences(endless()), 50))
    assert len(first) == 50
    assert taken <= 52


def test_a_short_text_that_is_known_whole_is_one_piece() -> None:
    text = "Hello there, my friend."
    assert list(sentences(text)) == [text]
    assert next(sentences(["Hello there, my "])) == "Hello there,"


def test_a_word_without_end_is_cut() -> None:
    pieces = list(sentences("a" * 100_000))
    assert all(len(piece) <= 240 for piece in pieces)
    assert sum(map(len, pieces)) == 100_000


HOSTILE = {
    "points": "." * 20_000 + "a",
    "marks": "?!" * 50_000 + " yes",
    "slashes": "/" * 5_000 + " a",
    "letters": "a" * 100_000,
    "digits": "7" * 5_000,
    "Roman": "M" * 5_000,
    "letters and digits": "a1" * 5_000,
    "hyphens": "a-" * 5_000,
    "quotes": "'" * 5_000 + "a",
    "spaces": " " * 1_000_000 + "a",
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", HOSTILE)
def test_no_text_is_read_for_long_before_its_first_sound(name: str) -> None:
    """Slashes took 103 s, marks 59 s, points 10 s."""
    voice = HibariVoice()
    began = time.process_time()
    assert len(next(voice.speak(HOSTILE[name])).samples_S)
    assert time.process_time() - began < 4


def test_only_endless_words_are_cut() -> None:
    reader = Reader()
    word = "considerations-notwithstanding-everything-else-about-it-all"
    assert len(word) == 59
    assert _LONG_WORD.sub(_in_pieces, f"Say {word} now.") == f"Say {word} now."
    cut = _LONG_WORD.sub(_in_pieces, word + "-and-more")
    assert cut.replace(" ", "") == word + "-and-more"
    assert max(map(len, cut.split())) <= 60
    assert cut.split()[0][-1] == "-"
    assert reader.phonemes(word)
