"""End of turn: hops of 32 ms in, what happened out. Integers only; no sound."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamdiff.conversation.endpoint import Endpointer, Patience, is_backchannel, is_finished, meaning
from streamdiff.conversation.turn import Event
from streamdiff.errors import ConfigError

VOICE, QUIET = 0.97, 0.02
HOP_S = 0.032


def _feed(endpointer: Endpointer, *runs: tuple[float, int], text: str = "") -> list[tuple[int, Event]]:
    """Runs of a probability; a pause is transcribed at once. Pairs of hop and event."""
    events: list[tuple[int, Event]] = []
    at = 0
    for probability, num in runs:
        for _ in range(num):
            event = endpointer.push(probability)
            at += 1
            events += [(at, event)] if event is not None else []
            if event is Event.PAUSE and text:
                assert endpointer.transcribed(text) is None
    return events


@pytest.mark.parametrize(
    ("text", "pause_s", "event"),
    [
        ("What time is it?", 0.224, Event.WORDS),
        ("I think so.", 0.224, Event.WORDS),
        ("three four five", 0.416, Event.WORDS),
        ("I would like to", 0.704, Event.WORDS),
        ("I would like to.", 0.704, Event.WORDS),
        ("Well, because,", 0.704, Event.WORDS),
        ("Mm-hmm.", 0.224, Event.BACKCHANNEL),
    ],
)
def test_a_pause_is_as_long_as_what_was_said_asks_for(text: str, pause_s: float, event: Event) -> None:
    events = _feed(Endpointer(), (VOICE, 20), (QUIET, 60), text=text)
    assert events[-1] == (20 + round(pause_s / HOP_S), event)
    assert [e for _, e in events] == [Event.ONSET, Event.VOICED, Event.PAUSE, event]


def test_a_turn_does_not_end_before_it_was_transcribed() -> None:
    endpointer = Endpointer()
    _feed(endpointer, (VOICE, 20), (QUIET, 60))
    assert endpointer.is_turn
    assert endpointer.transcribed("Hello.") is Event.WORDS, "the pause has been long enough by now"
    assert not endpointer.is_turn


def test_a_noise_without_words_ends_as_nothing() -> None:
    endpointer = Endpointer()
    _feed(endpointer, (VOICE, 20), (QUIET, 60))
    assert endpointer.transcribed("...") is Event.NOTHING


def test_going_on_drops_the_transcript() -> None:
    endpointer = Endpointer()
    events = _feed(endpointer, (VOICE, 20), (QUIET, 5), (VOICE, 3), text="I went.")
    assert events[-1][1] is Event.GOES_ON
    assert endpointer.transcribed("I went.") is None, "it came too late: the person has gone on"
    assert [e for _, e in _feed(endpointer, (QUIET, 40))] == [Event.PAUSE], "what was said before does not end it"


def test_one_loud_hop_in_a_pause_is_not_going_on() -> None:
    events = _feed(Endpointer(), (VOICE, 20), (QUIET, 4), (VOICE, 1), (QUIET, 20), text="I went.")
    assert [e for _, e in events] == [Event.ONSET, Event.VOICED, Event.PAUSE, Event.WORDS]


@pytest.mark.parametrize(("probability", "num_hops"), [(0.97, 4), (0.6, 6)])
def test_a_voice_counts_when_it_has_lasted(probability: float, num_hops: int) -> None:
    assert _feed(Endpointer(), (probability, 30)) == [(1, Event.ONSET), (num_hops, Event.VOICED)]


def test_a_click_is_hushed() -> None:
    assert _feed(Endpointer(), (VOICE, 3), (QUIET, 10)) == [(1, Event.ONSET), (6, Event.HUSH)]


def test_a_hum_does_not_stop_the_face_for_640_ms() -> None:
    endpointer = Endpointer()
    events = [endpointer.push(VOICE, is_hum=True, face_speaks=True) for _ in range(25)]
    assert events.index(Event.VOICED) == 19
    endpointer.reset()
    assert [endpointer.push(VOICE, is_hum=True) for _ in range(4)][-1] is Event.VOICED, "to a silent face it is speech"


@given(st.lists(st.tuples(st.sampled_from([VOICE, 0.6, 0.4, QUIET]), st.booleans()), max_size=300), st.data())
def test_whatever_comes_each_turn_begins_and_ends_once(hops: list[tuple[float, bool]], data: st.DataObject) -> None:
    endpointer = Endpointer()
    begun = confirmed = paused = False
    for probability, is_hum in hops:
        event = endpointer.push(probability, is_hum=is_hum, face_speaks=is_hum)
        if event is Event.ONSET:
            assert not begun
            begun = True
        elif event is Event.HUSH:
            assert begun
            assert not confirmed
            begun = False
        elif event is Event.VOICED:
            assert begun
            assert not confirmed
            confirmed = True
        elif event is Event.PAUSE:
            assert confirmed
            assert not paused
            paused = True
            if data.draw(st.booleans()):
                assert endpointer.transcribed("Yes, please.") is None
        elif event is Event.GOES_ON:
            assert paused
            paused = False
        elif event is not None:
            assert event is Event.WORDS
            assert paused
            begun = confirmed = paused = False


@pytest.mark.parametrize("text", ["mm-hmm", "Uh-huh.", "Yeah.", "Oh, I see.", "Got it!", "Right, right."])
def test_listeners_noises_are_backchannels(text: str) -> None:
    assert is_backchannel(text)
    assert meaning(text) is Event.BACKCHANNEL


@pytest.mark.parametrize("text", ["Yes, but stop.", "No.", "Wait.", "", "Right now I mean", "yes yes yes yes yes"])
def test_other_words_are_not(text: str) -> None:
    assert not is_backchannel(text)


def test_a_question_is_finished_whatever_its_last_word() -> None:
    assert is_finished("Where is it from?") is True
    assert is_finished("Where is it from") is False


def test_patience_that_does_not_grow_is_refused() -> None:
    with pytest.raises(ConfigError, match="grow"):
        Patience(end_finished=30)
    with pytest.raises(ConfigError, match="rise"):
        Patience(lasts=0.8)
