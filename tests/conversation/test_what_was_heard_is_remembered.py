"""From seconds played to words heard, and from a reply's tags to who speaks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamdiff.conversation.mouth import ProportionalMouth, TimedVoice, whole_words
from streamdiff.conversation.reply import Part, Reply
from streamdiff.errors import InputError
from streamdiff.voice.speech import Phoneme, SpeechChunk

TEXT = "Good morning to you. Come in and sit down, please. It is warm here."


class SlowVoice:
    """A tenth of a second for each letter; with or without times of its phonemes."""

    rate_hz = 1000

    def __init__(self, *, timed: bool = True) -> None:
        self._timed = timed

    def speak(self, text: str | Iterable[str], *, segment: int = 0) -> Iterator[SpeechChunk]:
        assert isinstance(text, str)
        letters = [c for c in text if c.isalpha()]
        if not letters:
            raise InputError("nothing to say")
        phonemes = tuple(Phoneme(c, n / 10, (n + 1) / 10) for n, c in enumerate(letters))
        yield SpeechChunk(np.ones(100 * len(letters), np.float32), 1000, phonemes if self._timed else None, segment)
        yield SpeechChunk(np.zeros(0, np.float32), 1000, (), segment, last=True)


def _spoken(voice: TimedVoice, text: str, segment: int) -> float:
    return sum(chunk.duration_s for chunk in voice.speak(text, segment=segment))


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize(
    ("played_s", "heard"),
    [
        (0.0, ""),
        (0.2, ""),
        (1.55, "Good morning to you."),
        (1.6, "Good morning to you."),
        (1.95, "Good morning to you. Come"),
        (99.0, TEXT),
    ],
)
def test_words_are_heard_by_the_times_of_the_voice(timed: bool, played_s: float, heard: str) -> None:
    voice = TimedVoice(SlowVoice(timed=timed))
    assert _spoken(voice, TEXT, 7) == pytest.approx(5.0)
    letters = voice.heard(7, TEXT, played_s)
    if timed or played_s in (0.0, 1.6, 99.0):
        assert TEXT[:letters] == (heard if played_s != 1.55 else "Good morning to")


class BreathingVoice:
    """Takes a breath of 30 ms, as voices do, before each of its sentences."""

    rate_hz = 1000

    def speak(self, text: str | Iterable[str], *, segment: int = 0) -> Iterator[SpeechChunk]:
        del text
        breath_S, word_S = np.zeros(30, np.float32), np.ones(200, np.float32)
        phonemes = (Phoneme("", 0.0, 0.03), Phoneme("a", 0.03, 0.23))
        yield SpeechChunk(np.concatenate([breath_S, word_S]), 1000, phonemes, segment)
        yield SpeechChunk(np.zeros(0, np.float32), 1000, (), segment, last=True)


def test_an_answer_begins_without_the_breath_that_a_film_begins_with() -> None:
    first, second, end = TimedVoice(BreathingVoice()).speak("One. Two.")
    assert np.array_equal(first.samples_S, np.repeat(np.array([0, 1], np.float32), [10, 200]))
    assert first.phonemes is not None
    assert [p.symbol for p in first.phonemes] == ["", "a"]
    assert np.allclose([(p.start_s, p.end_s) for p in first.phonemes], [(0.0, 0.01), (0.01, 0.21)])
    assert len(second.samples_S) == 230
    assert end.last


def test_streams_that_share_a_voice_do_not_mix_their_words() -> None:
    voice = TimedVoice(SlowVoice())
    _spoken(voice, TEXT, 1)
    _spoken(voice, "Something else entirely. And more.", 1)
    assert TEXT[: voice.heard(1, TEXT, 1.6)] == "Good morning to you."


def test_an_unknown_segment_is_cut_in_proportion() -> None:
    mouth = ProportionalMouth(10.0)
    assert TEXT[: mouth.heard(1, TEXT, 1.2)] == "Good morning"
    for _ in range(50):
        mouth.spoken("x" * 40, 2.0)
    assert TEXT[: mouth.heard(1, TEXT, 1.0)] == "Good morning to you.", "it has learnt that this voice is faster"


@given(st.text(alphabet="ab .,", max_size=60), st.floats(-1, 80))
def test_a_cut_never_splits_a_word(text: str, letters: float) -> None:
    end = whole_words(text, letters)
    assert end <= max(letters + 0.5, 0)
    assert end == 0 or not text[end - 1].isspace()
    assert end == len(text) or end == 0 or text[end].isspace()


def test_a_text_without_a_word_is_refused_as_any_voice_does() -> None:
    voice = TimedVoice(SlowVoice())
    with pytest.raises(InputError, match="nothing to say"):
        voice.speak("...")
    with pytest.raises(InputError, match="nothing to say"):
        list(voice.speak(iter(["...", "!"])))


TAGGED = "[anna] Good evening, all. [Ben]: Hello! [anna] A list [of things] follows."
SAID = [("anna", "Good evening, all."), ("ben", "Hello!"), ("anna", "A list [of things] follows.")]


@given(st.lists(st.integers(1, 9), min_size=80, max_size=80))
def test_tags_are_read_however_the_text_is_cut(lengths: list[int]) -> None:
    reply, at = Reply("ben", ("anna", "ben")), 0
    for length in lengths:
        reply.add(TAGGED[at : at + length])
        at += length
    reply.finish()
    assert [(part.speaker, part.text.strip()) for part in reply.parts] == SAID


def test_without_a_tag_the_first_face_speaks() -> None:
    reply = Reply("anna", ("anna", "ben"))
    assert reply.add("Hello there.") == [("anna", "Hello there.")]


def test_one_face_reads_brackets_as_they_are() -> None:
    reply = Reply("")
    assert reply.add("[anna] Hi [") == [("", "[anna] Hi [")]
    reply.finish()
    assert reply.text == "[anna] Hi ["


def test_the_rest_of_a_part_begins_after_what_was_heard_and_ends_when_it_is_closed() -> None:
    async def rest() -> list[str]:
        part = Part("", "Good morning")
        part.heard = 4
        asyncio.get_running_loop().call_soon(part.add, " to you.")
        asyncio.get_running_loop().call_soon(part.close)
        return [piece async for piece in part.rest()]

    assert "".join(asyncio.run(rest())) == " morning to you."
