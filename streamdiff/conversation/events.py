"""What a conversation tells whoever shows it: frozen values, in the order in which they happened."""

from __future__ import annotations

from dataclasses import dataclass

from streamdiff.conversation.turn import Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationEvent:
    """Something happened."""

    at_s: float
    """Seconds since the conversation began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseChanged(ConversationEvent):
    """Somebody else has the word, or nobody."""

    phase: Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class UserSpeechStarted(ConversationEvent):
    """The user speaks; confirmed, no echo."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialTranscript(ConversationEvent):
    """What the user has said so far; later ones may say otherwise."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript(ConversationEvent):
    """What the user has said in this turn."""

    text: str
    is_backchannel: bool = False
    """Nothing is answered to it, for the face goes on speaking."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking(ConversationEvent):
    """The mind was asked."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCalled(ConversationEvent):
    """The mind asks for a function to be called; answer with `Conversation.answer`."""

    id: str
    name: str
    arguments: str
    """JSON, as the mind wrote it; not checked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyText(ConversationEvent):
    """The mind has written this much more of its reply."""

    text: str
    speaker: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyStarted(ConversationEvent):
    """The first sound of a reply, or of another speaker's part of it, was shown."""

    speaker: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyHeard(ConversationEvent):
    """A reply has ended for good."""

    text: str
    """What of it was heard."""
    complete: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Interrupted(ConversationEvent):
    """The user spoke over the face, which has fallen silent."""

    speaker: str
    played_s: float
    """How much of its utterance was played."""
    heard: str
    """The words that were heard in them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed(ConversationEvent):
    """It was a false start, or a "mm-hm": the face goes on where it was interrupted."""

    text: str
    """What is left, as far as it is written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(ConversationEvent):
    """The ear or the mind has failed; the face says a sentence about it."""

    part: str
    """``ear`` or ``mind``."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnTiming(ConversationEvent):
    """How long each stage of a turn took, seconds; None where it did not happen.

    They overlap: transcription begins within the pause. ``total_s`` is what a person notices.
    """

    pause_s: float
    """From the user's last voiced sound to the decision that the turn has ended, transcription included."""
    transcribe_s: float
    """The transcription that counted, within the pause."""
    mind_s: float | None
    """From there to the mind's first word."""
    voice_s: float | None
    """From there to the first sound of the reply in the viewer's frames."""
    total_s: float | None
    """From the user's last voiced sound to the first sound of the reply."""
