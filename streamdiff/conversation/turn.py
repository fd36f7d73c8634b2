"""Turn-taking as a table: in which phase a conversation is, what may happen, and what is done about it.

``python -m streamdiff.conversation.turn`` draws the table. Nothing here waits, hears or speaks: an event goes in, a
phase and actions come out, and `loop.Conversation` does what they say. A pair that is not in the table changes nothing.

What must hold whatever happens (and is tested on random sequences): speech that was stopped is either taken up again or
cut from the history; nobody is asked twice at once; while somebody else has the word the face does not speak.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """Who has the word."""

    IDLE = "idle"
    """Nobody."""
    LISTENING = "listening"
    """The user."""
    THINKING = "thinking"
    """The mind was asked and has not said a word yet."""
    SPEAKING = "speaking"
    """The face."""
    INTERRUPTED = "interrupted"
    """The user, who began while the face spoke: it is silent, and what it had left to say is kept."""


class Event(StrEnum):
    """What can happen."""

    ONSET = "onset"
    """A voice begins that is not the face's own echo."""
    HUSH = "hush"
    """It was too short to be speech."""
    VOICED = "voiced"
    """It has lasted: somebody speaks."""
    PAUSE = "pause"
    """The user makes a short pause."""
    GOES_ON = "goes on"
    """The user goes on after the pause."""
    WORDS = "words"
    """The user's turn has ended and was understood, or text was typed."""
    BACKCHANNEL = "backchannel"
    """The user's turn has ended; it was "mm-hm", "yes", "I see"."""
    NOTHING = "nothing"
    """The user's turn has ended without a word."""
    EAR_FAILED = "ear failed"
    """What the user said could not be transcribed, or not in time."""
    REPLY = "reply"
    """The mind has said its first word."""
    MIND_FAILED = "mind failed"
    """The mind did not answer, not in time, or broke off."""
    SPOKEN = "spoken"
    """The reply was heard to its end."""
    STOPPED = "stopped"
    """The user wants silence, and says so with a button."""
    SILENCE = "silence"
    """Nobody has said anything for long."""


class Action(StrEnum):
    """What is done."""

    ATTEND = "attend"
    """Show that the face listens."""
    RELAX = "relax"
    """Show that it no longer does."""
    TRANSCRIBE = "transcribe"
    """Write down what was said so far, on suspicion that it was all."""
    DROP = "drop"
    """Forget that transcription."""
    ASK = "ask"
    """Give the mind what was said."""
    FORGET = "forget"
    """Stop the mind."""
    SPEAK = "speak"
    """Begin to speak the reply."""
    STOP = "stop"
    """Interrupt the speech; keep what was not heard of it."""
    RESUME = "resume"
    """Speak what was kept, from the word that was not heard."""
    CUT = "cut"
    """Drop what was kept: the history ends with what was heard."""
    KEEP = "keep"
    """The whole reply becomes history."""
    EXCUSE_EAR = "excuse ear"
    """Say that nothing was understood."""
    EXCUSE_MIND = "excuse mind"
    """Say that there is no answer."""
    NUDGE = "nudge"
    """Say something to a user who says nothing."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Where an event leads, and what is done on the way."""

    phase: Phase
    actions: tuple[Action, ...] = ()


def _turn(phase: Phase, *actions: Action) -> Turn:
    return Turn(phase, actions)


TABLE: dict[tuple[Phase, Event], Turn] = {
    (Phase.IDLE, Event.ONSET): _turn(Phase.LISTENING, Action.ATTEND),
    # It began while the face still spoke.
    (Phase.IDLE, Event.VOICED): _turn(Phase.LISTENING, Action.ATTEND),
    (Phase.IDLE, Event.WORDS): _turn(Phase.THINKING, Action.ASK),
    (Phase.IDLE, Event.SILENCE): _turn(Phase.SPEAKING, Action.NUDGE),
    (Phase.LISTENING, Event.HUSH): _turn(Phase.IDLE, Action.RELAX),
    (Phase.LISTENING, Event.PAUSE): _turn(Phase.LISTENING, Action.TRANSCRIBE),
    (Phase.LISTENING, Event.GOES_ON): _turn(Phase.LISTENING, Action.DROP),
    (Phase.LISTENING, Event.WORDS): _turn(Phase.THINKING, Action.RELAX, Action.ASK),
    # With nobody to interrupt, "yes" is an answer.
    (Phase.LISTENING, Event.BACKCHANNEL): _turn(Phase.THINKING, Action.RELAX, Action.ASK),
    (Phase.LISTENING, Event.NOTHING): _turn(Phase.IDLE, Action.RELAX),
    (Phase.LISTENING, Event.EAR_FAILED): _turn(Phase.SPEAKING, Action.RELAX, Action.EXCUSE_EAR),
    (Phase.THINKING, Event.ONSET): _turn(Phase.THINKING, Action.ATTEND),
    (Phase.THINKING, Event.HUSH): _turn(Phase.THINKING, Action.RELAX),
    # The turn had not ended after all: what follows is added to what was said.
    (Phase.THINKING, Event.VOICED): _turn(Phase.LISTENING, Action.FORGET),
    (Phase.THINKING, Event.WORDS): _turn(Phase.THINKING, Action.FORGET, Action.ASK),
    (Phase.THINKING, Event.REPLY): _turn(Phase.SPEAKING, Action.RELAX, Action.SPEAK),
    (Phase.THINKING, Event.MIND_FAILED): _turn(Phase.SPEAKING, Action.RELAX, Action.EXCUSE_MIND),
    (Phase.SPEAKING, Event.VOICED): _turn(Phase.INTERRUPTED, Action.STOP, Action.ATTEND),
    (Phase.SPEAKING, Event.WORDS): _turn(Phase.THINKING, Action.STOP, Action.CUT, Action.FORGET, Action.ASK),
    (Phase.THINKING, Event.STOPPED): _turn(Phase.IDLE, Action.RELAX, Action.FORGET),
    (Phase.SPEAKING, Event.STOPPED): _turn(Phase.IDLE, Action.STOP, Action.CUT, Action.FORGET),
    (Phase.INTERRUPTED, Event.STOPPED): _turn(Phase.IDLE, Action.RELAX, Action.DROP, Action.CUT, Action.FORGET),
    (Phase.SPEAKING, Event.MIND_FAILED): _turn(Phase.SPEAKING, Action.EXCUSE_MIND),
    (Phase.SPEAKING, Event.SPOKEN): _turn(Phase.IDLE, Action.KEEP),
    (Phase.INTERRUPTED, Event.PAUSE): _turn(Phase.INTERRUPTED, Action.TRANSCRIBE),
    (Phase.INTERRUPTED, Event.GOES_ON): _turn(Phase.INTERRUPTED, Action.DROP),
    (Phase.INTERRUPTED, Event.WORDS): _turn(Phase.THINKING, Action.RELAX, Action.CUT, Action.FORGET, Action.ASK),
    (Phase.INTERRUPTED, Event.BACKCHANNEL): _turn(Phase.SPEAKING, Action.RELAX, Action.RESUME),
    (Phase.INTERRUPTED, Event.NOTHING): _turn(Phase.SPEAKING, Action.RELAX, Action.RESUME),
    (Phase.INTERRUPTED, Event.EAR_FAILED): _turn(
        Phase.SPEAKING, Action.RELAX, Action.CUT, Action.FORGET, Action.EXCUSE_EAR
    ),
}


def step(phase: Phase, event: Event) -> Turn:
    """What an event does in a phase.

    >>> step(Phase.SPEAKING, Event.VOICED).phase.value, [a.value for a in step(Phase.SPEAKING, Event.VOICED).actions]
    ('interrupted', ['stop', 'attend'])
    >>> step(Phase.SPEAKING, Event.HUSH) == Turn(Phase.SPEAKING)
    True
    """
    return TABLE.get((phase, event), Turn(phase))


def draw() -> str:
    """The table in Markdown: a row per event, a column per phase; an empty cell changes nothing."""
    rows = [["", *Phase], ["---"] * (len(Phase) + 1)]
    rows += [[f"**{event}**", *(_cell(phase, event) for phase in Phase)] for event in Event]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(phase: Phase, event: Event) -> str:
    turn = TABLE.get((phase, event))
    if turn is None:
        return ""
    actions = ", ".join(turn.actions)
    return actions if turn.phase == phase else f"{actions} → *{turn.phase}*"


if __name__ == "__main__":
    print(draw())  # noqa: T201  the table is what this command is for
