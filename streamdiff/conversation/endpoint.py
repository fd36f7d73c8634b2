"""End of turn: from "is this a voice?" every 32 ms to what happened; integers only.

A voice must last before it counts (128 ms when it is clear, 192 ms when it is not, 640 ms while the face speaks and it
sounds like "mm"). A pause of 96 ms starts a transcription on suspicion. How long a pause ends the turn depends on what
was said: 224 ms after a whole sentence, 704 ms after "and then".
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from streamdiff.conversation.turn import Event
from streamdiff.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long things must last, in hops of 32 ms, and how sure the detector must be."""

    begins: float = 0.5
    """Probability from which a hop may begin a voice."""
    lasts: float = 0.35
    """Probability from which a hop goes on with one."""
    clear: float = 0.9
    """Probability of a clear voice, in two hops running; the first ones of a word are seldom clear."""
    confirm_clear: int = 4
    confirm: int = 6
    confirm_hum: int = 20
    """A hum while the face speaks: "mm-hm" takes 0.3 to 0.6 s."""
    hush: int = 3
    """Quiet hops after which a voice that was not confirmed was none."""
    pause: int = 3
    goes_on: int = 2
    end_finished: int = 7
    end_unknown: int = 13
    end_unfinished: int = 22

    def __post_init__(self) -> None:
        if not 0 < self.lasts <= self.begins <= self.clear <= 1:
            raise ConfigError(f"probabilities must rise from lasts to begins to clear, got {self}")
        if not 0 < self.pause <= self.end_finished <= self.end_unknown <= self.end_unfinished:
            raise ConfigError(f"pauses must grow from pause to end_unfinished, got {self}")
        if not 0 < self.confirm_clear <= self.confirm <= self.confirm_hum:
            raise ConfigError(f"confirmations must grow from confirm_clear to confirm_hum, got {self}")


class Endpointer:
    """Follows one microphone. `push` takes a hop and says what happened; `transcribed` what was understood so far."""

    def __init__(self, patience: Patience | None = None) -> None:
        self._patience = patience or Patience()
        self._text: str | None = None
        self.reset()

    def reset(self) -> None:
        """Nobody speaks."""
        self._voiced = 0
        self._quiet = 0
        self._hums = 0
        self._clear = 0
        self._confirmed = False
        self._paused = False
        self._text = None

    @property
    def is_candidate(self) -> bool:
        """Whether a voice has begun that is not confirmed."""
        return self._voiced > 0 and not self._confirmed

    @property
    def is_turn(self) -> bool:
        """Whether somebody speaks, or has paused."""
        return self._confirmed

    @property
    def is_paused(self) -> bool:
        """Whether a transcription was asked for that still counts."""
        return self._paused

    @property
    def num_quiet(self) -> int:
        """Hops since the last one with a voice."""
        return self._quiet

    def push(self, probability: float, *, is_hum: bool = False, face_speaks: bool = False) -> Event | None:
        """One hop: probability of a voice that is no echo, whether it sounds like "mm", whether the face speaks."""
        is_voice = probability >= (self._patience.lasts if self._voiced else self._patience.begins)
        if self._confirmed:
            return self._within_turn(is_voice)
        if not is_voice:
            return self._without_voice()
        self._voiced += 1
        self._quiet = 0
        self._hums += is_hum
        self._clear = self._clear + 1 if probability >= self._patience.clear else 0
        if self._voiced >= self._needed(face_speaks):
            self._confirmed = True
            return Event.VOICED
        return Event.ONSET if self._voiced == 1 else None

    def _needed(self, face_speaks: bool) -> int:
        if face_speaks and 2 * self._hums > self._voiced:
            return self._patience.confirm_hum
        return self._patience.confirm_clear if self._clear >= 2 else self._patience.confirm

    def _without_voice(self) -> Event | None:
        self._quiet += 1
        if self._voiced and self._quiet >= self._patience.hush:
            self.reset()
            return Event.HUSH
        return None

    def _within_turn(self, is_voice: bool) -> Event | None:
        if is_voice:
            self._voiced += 1
            if not self._paused:
                self._quiet = 0
            elif self._voiced >= self._patience.goes_on:
                self._paused, self._quiet, self._text = False, 0, None
                return Event.GOES_ON
            return None
        self._quiet += 1
        self._voiced = 0
        if self._paused:
            return self._end()
        if self._quiet >= self._patience.pause:
            self._paused = True
            return Event.PAUSE
        return None

    def _end(self) -> Event | None:
        if self._text is None or self._quiet < self._wait(self._text):
            return None
        event = meaning(self._text)
        self.reset()
        return event

    def _wait(self, text: str) -> int:
        finished = is_finished(text)
        if finished is None:
            return self._patience.end_unknown
        return self._patience.end_finished if finished else self._patience.end_unfinished

    def transcribed(self, text: str) -> Event | None:
        """What was understood up to the pause, and the end of the turn if the pause has been long enough for it.

        Ignored unless the user has paused.
        """
        if not self._paused:
            return None
        self._text = text
        return self._end()


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation.

    >>> words("Mm-hmm, I see!")
    ['mm-hmm', 'i', 'see']
    """
    return [word.strip("-'") for word in re.findall(r"[\w'-]+", text.lower()) if word.strip("-'")]


_UNFINISHED = frozenset(
    words("a an the and but or nor because if when to of from with into my your our their i'm um uh er erm let's")
)
_BACKCHANNELS = frozenset(
    words(
        "mm mhm hm hmm mmm mm-hmm mm-hm mhmm m-hm uh-huh uhuh aha ah oh yes yeah yep yup ok okay right sure great nice "
        "good wow cool true exactly indeed"
    )
)
_PHRASES = ("i see", "got it", "of course", "all right", "uh huh", "mm hmm", "mm hm", "oh wow", "oh i see")


def is_finished(text: str) -> bool | None:
    """Whether a transcript looks like a whole sentence; None: cannot be told, it has no full stop.

    >>> is_finished("What time is it?"), is_finished("I would like to"), is_finished("three four five")
    (True, False, None)
    """
    text = text.strip()
    said = words(text)
    if not said or text.endswith(("!", "?", "\uff01", "\uff1f")):
        return True
    if text.endswith((",", "-", "…", "...", ":", ";")) or said[-1] in _UNFINISHED:
        return False
    return True if text.endswith((".", "。")) else None


def is_backchannel(text: str) -> bool:
    """Whether a person who says this only shows that he or she listens.

    >>> is_backchannel("Mm-hmm."), is_backchannel("Oh, I see."), is_backchannel("Yes, but stop.")
    (True, True, False)
    """
    said = " ".join(words(text))
    for phrase in _PHRASES:
        said = re.sub(rf"\b{phrase}\b", "", said)
    return bool(words(text)) and len(words(text)) <= 4 and all(word in _BACKCHANNELS for word in said.split())


def meaning(text: str) -> Event:
    """What a turn that was understood so means for turn-taking."""
    if not words(text):
        return Event.NOTHING
    return Event.BACKCHANNEL if is_backchannel(text) else Event.WORDS
