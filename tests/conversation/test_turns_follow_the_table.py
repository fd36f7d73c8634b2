"""The table of turn-taking keeps what it promises whatever happens in whatever order, and its drawing is the table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamdiff.conversation.turn import TABLE, Action, Event, Phase, draw, step

HAPPENINGS = st.lists(st.sampled_from(list(Event)), max_size=60)


def _walk(happenings: list[Event]) -> list[tuple[Phase, Event, Phase, tuple[Action, ...]]]:
    phase, walked = Phase.IDLE, []
    for event in happenings:
        turn = step(phase, event)
        walked.append((phase, event, turn.phase, turn.actions))
        phase = turn.phase
    return walked


@given(HAPPENINGS)
def test_the_face_speaks_in_one_phase_only(happenings: list[Event]) -> None:
    """A model of the mouth: it is on after SPEAK, RESUME and what is said unasked, off after STOP or the end."""
    speaks = False
    starts = {Action.SPEAK, Action.RESUME, Action.EXCUSE_EAR, Action.EXCUSE_MIND, Action.NUDGE}
    for _, _, phase, actions in _walk(happenings):
        for action in actions:
            if action in (Action.STOP, Action.KEEP):
                assert speaks
                speaks = False
            speaks = speaks or action in starts
        assert speaks == (phase is Phase.SPEAKING)


@given(HAPPENINGS)
def test_what_was_stopped_is_resumed_or_cut(happenings: list[Event]) -> None:
    kept = False
    for _, _, phase, actions in _walk(happenings):
        for action in actions:
            if action is Action.STOP:
                assert not kept
                kept = True
            elif action in (Action.RESUME, Action.CUT):
                assert kept
                kept = False
            elif action in (Action.SPEAK, Action.ASK, Action.EXCUSE_EAR):
                assert not kept
        assert kept == (phase is Phase.INTERRUPTED)


@given(HAPPENINGS)
def test_nobody_is_asked_twice_at_once(happenings: list[Event]) -> None:
    asked = False
    for _, event, phase, actions in _walk(happenings):
        for action in actions:
            assert not (action is Action.ASK and asked)
            asked = (asked or action is Action.ASK) and action not in (Action.FORGET, Action.KEEP)
        asked = asked and event is not Event.MIND_FAILED
        if phase is Phase.THINKING:
            assert asked


@given(HAPPENINGS)
def test_a_transcription_runs_only_while_the_user_has_the_word(happenings: list[Event]) -> None:
    for before, _, _, actions in _walk(happenings):
        if Action.TRANSCRIBE in actions:
            assert before in (Phase.LISTENING, Phase.INTERRUPTED)


def test_every_phase_is_reached_and_left() -> None:
    reached = {turn.phase for turn in TABLE.values()}
    assert reached == set(Phase)
    for phase in Phase:
        assert any(before is phase and turn.phase is not phase for (before, _), turn in TABLE.items())


@pytest.mark.parametrize("event", [Event.BACKCHANNEL, Event.NOTHING])
def test_a_false_start_resumes(event: Event) -> None:
    assert step(Phase.INTERRUPTED, event).phase is Phase.SPEAKING
    assert Action.RESUME in step(Phase.INTERRUPTED, event).actions


def test_yes_is_an_answer_when_nobody_was_interrupted() -> None:
    assert Action.ASK in step(Phase.LISTENING, Event.BACKCHANNEL).actions


def test_an_onset_alone_does_not_stop_the_face() -> None:
    assert step(Phase.SPEAKING, Event.ONSET) == step(Phase.SPEAKING, Event.HUSH)
    assert step(Phase.SPEAKING, Event.ONSET).actions == ()


def test_the_drawing_in_the_documents_is_the_table() -> None:
    page = Path(__file__).parents[2] / "streamdiff" / "conversation" / "README.md"
    assert draw() in page.read_text(encoding="utf-8"), "run python -m streamdiff.conversation.turn, paste it"


@pytest.mark.processes
def test_the_command_prints_the_drawing() -> None:
    command = [sys.executable, "-m", "streamdiff.conversation.turn"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip() == draw()
