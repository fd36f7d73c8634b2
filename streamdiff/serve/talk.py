"""A conversation in a call: what the client says and types goes to `conversation`, what happens there becomes events.

Positions: what the conversation is told was played is what was *heard*, as well as the call knows it; its history then
ends with the word that the listener heard last.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from streamdiff.conversation import events as said
from streamdiff.conversation.ear import Ear, ScriptedEar, SpeechEar
from streamdiff.conversation.events import ConversationEvent
from streamdiff.conversation.loop import Conversation, Manners
from streamdiff.conversation.mind import Mind
from streamdiff.conversation.mouth import Mouth
from streamdiff.conversation.turn import Phase
from streamdiff.errors import StreamdiffError
from streamdiff.serve.calls import Call, TalkFactory
from streamdiff.serve.protocol import Caption, Ending, Hearing, Latency
from streamdiff.serve.pump import Beat
from streamdiff.stream import Can, Interrupted, Segment, Shown

logger = logging.getLogger(__name__)

_MAX_WAITING = 16
"""Texts that may wait for the conversation to begin."""
# A page says by itself that nobody speaks; a face that begins to speak unasked is for other applications.
_MANNERS = Manners(silence_s=None)


def talking(
    mind: Callable[[], Mind],
    name: str,
    *,
    ear: SpeechEar | None = None,
    mouth: Mouth | None = None,
    instructions: str = "",
) -> TalkFactory:
    """Talk with this mind in every call.

    ``ear``: hears the first caller; others get ``ear.another()``. None: nobody is heard, texts are answered.
    ``mouth``: the voice of the avatars, if it knows when each word is heard; None: words in proportion to seconds.
    """

    def begin(call: Call) -> Answers:
        listener: Ear = ScriptedEar((), ()) if ear is None else ear.another()
        return Answers(call, listener, mind(), name=name, mouth=mouth, hears=ear is not None, instructions=instructions)

    return begin


class Answers:
    """Of `calls.Talk`: a mind answers what is said and typed."""

    is_encoded = False  # a sink of the pump: the ear must know what the face says, and not take it for the user

    def __init__(
        self,
        call: Call,
        ear: Ear,
        mind: Mind,
        *,
        name: str,
        mouth: Mouth | None = None,
        hears: bool = True,
        instructions: str = "",
    ) -> None:
        self.hears, self.mind = hears, name
        self._call = call
        self._turn = 0
        self._reply = ""
        self._heard_s: float | None = None
        self._stopped = False
        self._user_speaks = False
        self._waiting: deque[str] = deque(maxlen=_MAX_WAITING)
        self._conversation = Conversation(
            _OnAir(call, self), ear, mind, mouth=mouth, instructions=instructions, manners=_MANNERS
        )
        self._is_up = False
        # A task of its own: a conversation is left in the task that entered it.
        self._task = asyncio.get_running_loop().create_task(self._run())
        call.pump.attach(self)

    @property
    def turn(self) -> int:
        """Number of the present turn; 0 before the first."""
        return self._turn

    @property
    def heard_s(self) -> float | None:
        """Position that the client said it had heard, while an interruption by the client is obeyed."""
        return self._heard_s

    def text(self, text: str) -> None:
        """Of `Talk`."""
        if self._is_up:
            self._conversation.tell(text)
        else:
            self._waiting.append(text)

    def hear(self, samples_S: NDArray[np.float32], rate_hz: int) -> None:
        """Of `Talk`."""
        if self._is_up and self.hears:
            self._conversation.hear(samples_S, rate_hz)

    def stop(self, heard_s: float | None) -> None:
        """Of `Talk`."""
        self._heard_s, self._stopped = heard_s, False
        try:
            if self._is_up:
                self._conversation.stop()
            if not self._stopped:
                self._call.interrupt(heard_s)
        finally:
            self._heard_s = None

    def interrupt(self) -> Interrupted:
        """The conversation silences its face."""
        self._stopped = True
        return self._call.interrupt(self._heard_s)

    def put(self, beat: Beat) -> None:
        """Of `Sink`."""
        if self._is_up:
            self._conversation.note(beat.shown)

    def end(self, reason: Ending) -> None:
        """Of `Sink`."""
        del reason
        self._is_up = False
        self._task.cancel()

    async def aclose(self) -> None:
        """Of `Talk`."""
        self.end(Ending.LEFT)
        await asyncio.wait([self._task], timeout=5.0)

    async def _run(self) -> None:
        try:
            async with self._conversation as talk:
                self._is_up = True
                while self._waiting:
                    talk.tell(self._waiting.popleft())
                async for event in talk.events():
                    self._on_event(event)
        except* StreamdiffError as group:
            logger.exception("session %s: the conversation broke", self._call.log_id)
            self._call.problem("conversation", f"the conversation broke: {group.exceptions[0]}")
        finally:
            self._is_up = False

    def _on_event(self, event: ConversationEvent) -> None:
        call = self._call
        match event:
            case said.UserSpeechStarted():
                call.touch()
                self._set_user_speaks(True)
            case said.PhaseChanged(phase=phase):
                if phase not in (Phase.LISTENING, Phase.INTERRUPTED):
                    self._set_user_speaks(False)
                if phase is not Phase.SPEAKING:  # that begins with its first frame
                    call.thinking(phase is Phase.THINKING)
            case said.PartialTranscript(text=text) if text.strip():
                call.emit(Caption("user", text, self._turn + 1, final=False))
            case said.Transcript(text=text) if text.strip():
                self._set_user_speaks(False)
                call.emit(Caption("user", text, self._turn + 1))
            case said.Thinking():
                self._turn += 1
                self._reply = ""
            case said.ReplyText(text=text):
                self._reply += text
                call.emit(Caption("avatar", self._reply.strip(), self._turn, final=False))
            case said.ReplyHeard(text=text) if text.strip():
                call.emit(Caption("avatar", text.strip(), self._turn))
            case said.Failed(part=part, reason=reason):
                call.problem(f"{part}_failed", f"the {part} failed: {reason}")
            case said.TurnTiming():
                self._time(event)
            case _:
                pass

    def _set_user_speaks(self, speaking: bool) -> None:
        if speaking != self._user_speaks:
            self._user_speaks = speaking
            self._call.emit(Hearing(speaking))

    def _time(self, timing: said.TurnTiming) -> None:
        for stage, seconds in (
            ("end of turn", timing.pause_s),
            ("transcript", timing.transcribe_s),
            ("first word", timing.mind_s),
            ("first sound", timing.voice_s),
            ("answer", timing.total_s),
        ):
            if seconds is not None:
                self._call.emit(Latency(stage, round(seconds * 1e3, 1), self._turn))


class _OnAir:
    """The face of a conversation, as far as the conversation is concerned: the call's session, through its pump."""

    def __init__(self, call: Call, answers: Answers) -> None:
        self._call, self._answers = call, answers

    @property
    def rate_hz(self) -> int:
        return self._call.session.rate_hz

    @property
    def can(self) -> frozenset[Can]:
        return self._call.session.can

    def say(self, text: str | Iterable[str] | AsyncIterable[str]) -> Segment:
        segment = self._call.session.say(text)
        self._call.expect(segment, self._answers.turn)
        return segment

    def listen(self, listening: bool = True) -> None:
        self._call.session.listen(listening)

    def interrupt(self, played_s: float | None = None) -> Interrupted:
        del played_s  # the call knows better what was heard
        return self._answers.interrupt()

    def __aiter__(self) -> AsyncIterator[Shown]:
        raise NotImplementedError("the pump takes the frames")
