"""What a stream shows is what the serial reference makes of the same calls: speech, prompts, interruptions at any
moment, with any number of chunks under way and in the player's buffer.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from streamdiff.pipeline.playout import Heard, Playout
from tests.engine.oracle_case import Case
from tests.engine.session_case import Act, Interrupt, Make, Prompt, Say, Scene, Show

acts = st.lists(
    st.builds(Say, st.integers(1, 4))
    | st.builds(Make, st.integers(1, 3))
    | st.builds(Show, st.integers(1, 3))
    | st.builds(Prompt, st.integers(0, 2))
    | st.builds(Interrupt, st.integers(0, 2)),
    min_size=4,
    max_size=14,
)
cases = st.builds(
    Case,
    num_steps=st.integers(1, 2),
    window=st.integers(1, 3),
    slack=st.integers(0, 3),
    refresh=st.none() | st.integers(1, 3),
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.heavy
@settings(max_examples=12, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(case=cases, acts=acts)
def test_whatever_is_said_and_interrupted(case: Case, acts: list[Act]) -> None:
    Scene(case).play(acts)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@settings(max_examples=200)
@given(case=cases, acts=acts)
def test_whatever_is_said_and_interrupted_in_many_ways(case: Case, acts: list[Act]) -> None:
    Scene(case).play(acts)


@pytest.mark.heavy
def test_what_was_made_ahead_is_taken_back() -> None:
    Scene(Case(slack=4)).play([Say(7), Show(3), Make(3), Prompt(1), Interrupt(), Say(2), Show(1), Interrupt(1), Say(1)])


@pytest.mark.heavy
def test_what_the_player_holds_is_made_anew() -> None:
    again = [Say(3), Show(1), Interrupt(1), Say(2)]
    Scene(Case(slack=3)).play([Say(5), Show(3), Make(1), Interrupt(2), Interrupt(), *again])


@pytest.mark.heavy
def test_what_memory_does_not_reach_is_lost_and_never_shown() -> None:
    Scene(Case(slack=1)).play([Say(6), Show(1), Make(4), Interrupt(), Say(2), Show(1), Make(1), Interrupt(), Say(1)])


@pytest.mark.heavy
def test_an_utterance_that_was_heard_to_its_end_is_not_interrupted() -> None:
    Scene(Case()).play([Say(2), Show(2), Interrupt(), Say(1), Show(1), Interrupt(1), Say(1)])


@pytest.mark.heavy
def test_two_interruptions_before_anything_is_shown() -> None:
    Scene(Case(slack=5)).play([Say(4), Make(3), Interrupt(), Say(3), Make(2), Interrupt(), Say(2)])


def test_what_one_interruption_made_stale_stays_so_after_a_later_one() -> None:
    """The second takes back less than the first, whose stale speech is still on its way."""
    scene = Scene(Case(num_steps=1), live=True)
    assert scene.line is not None
    speech_S = np.full(scene.stream.rate_hz, 0.5, np.float32)
    scene.stream.push_audio(speech_S, last=True)
    scene.line.make()
    assert scene.stream.interrupt().cut_s == 0
    scene.line.make()  # silence, which is never stale
    scene.stream.push_audio(speech_S, last=True)
    scene.line.make()
    assert scene.stream.interrupt().cut_s == scene.chunk_s
    shown = scene.stream.next()
    assert shown is not None
    assert (shown.index, shown.segment, shown.sound_S.any()) == (0, 0, False)


def test_an_interruption_ends_the_utterance_that_is_being_pushed() -> None:
    stream = Scene(Case()).stream
    speech_S = np.full(stream.rate_hz, 0.5, np.float32)
    first = stream.push_audio(speech_S)
    assert stream.push_audio(speech_S) is first
    stream.interrupt()
    assert stream.push_audio(speech_S, last=True).id == first.id + 1


def test_speech_that_was_begun_and_interrupted_is_not_heard_in_the_next() -> None:
    Scene(Case(num_steps=1)).play([Say(3), Make(1), Interrupt(), Say(1), Interrupt(), Say(2), Show(1)])


def test_sound_that_was_cut_before_an_interruption_is_not_heard_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, cut = Scene(Case()).stream, Playout.next

    def interrupted(playout: Playout) -> Heard | None:
        heard = cut(playout)
        if stream.metrics.interruptions == 0:
            stream.interrupt()
            stream.push_audio(np.full(stream.rate_hz, 0.25, np.float32), last=True)
        return heard

    monkeypatch.setattr(Playout, "next", interrupted)
    stream.push_audio(np.full(stream.rate_hz, 0.5, np.float32), last=True)
    shown = stream.next()
    assert shown is not None
    assert (shown.index, shown.segment) == (0, 2)
    assert (shown.sound_S == 0.25).all()


def test_after_a_loss_the_next_interruption_says_where_the_stream_goes_on() -> None:
    Scene(Case(num_steps=1, slack=0)).play([Say(3), Make(3), Interrupt(), Interrupt(), Say(1)])
