"""A conversation: an ear, a mind and one or several faces, held together by the table of `turn`.

    async with engine.open() as session, Conversation(session, open_ear(), open_mind("scripted")) as talk:
        # in three tasks:
        talk.hear(samples, 48_000)              # whenever the microphone has some
        async for shown in talk.frames():       # or talk.note(shown) for each frame that something else takes
            play(shown)
        async for event in talk.events():       # `events`: transcripts, replies, interruptions, timings
            print(event)

One task group holds everything that runs. Leaving the context ends it: no task and no thread stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from streamdiff.conversation import events as said
from streamdiff.conversation.ear import Ear
from streamdiff.conversation.events import ConversationEvent
from streamdiff.conversation.faces import Faces, Talker
from streamdiff.conversation.mind import Message, Mind, ToolCall
from streamdiff.conversation.mouth import Mouth
from streamdiff.conversation.reply import Part, Reply
from streamdiff.conversation.turn import Action, Event, Phase, step
from streamdiff.errors import BackendError, ConfigError, SessionClosed, StreamdiffError
from streamdiff.stream import Samples, Shown

logger = logging.getLogger(__name__)

_MAX_EVENTS = 1024
_MAX_HISTORY = 200
"""Messages that are kept; beyond it the oldest go, but not the system's."""
_TICK_S = 0.1
_STARVED_S = 0.3
"""A microphone that gives nothing for so long has been switched off."""
_MAX_ROUNDS = 4
"""Times in one turn that the mind may ask for functions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manners:
    """How long to wait for whom, and what is said then."""

    ear_s: float = 4.0
    """For a transcription after the pause."""
    mind_s: float = 10.0
    """For the mind's first word, and then for every further one."""
    tool_s: float = 20.0
    """For the answer to a call of a function."""
    silence_s: float | None = 30.0
    """Of the user, before the face says something of its own; None: it never does."""
    max_nudges: int = 1
    """Times that it does without an answer."""
    not_understood: str = "Sorry, I did not catch that. Could you say it again?"
    no_answer: str = "Sorry, I cannot think of an answer right now."
    nudge: str = "I am still here, whenever you like to talk."

    def __post_init__(self) -> None:
        waits = (self.ear_s, self.mind_s, self.tool_s, 1.0 if self.silence_s is None else self.silence_s)
        if min(waits) <= 0 or self.max_nudges < 0:
            raise ConfigError(f"waits must be longer than 0 s and max_nudges no less than 0, got {self}")


@dataclass(slots=True)
class _Clock:
    """When the stages of a turn ended, by the loop's clock."""

    silent_s: float
    transcribe_s: float = 0.0
    decided_s: float = 0.0
    word_s: float | None = None


class Conversation:
    """One person talks with one face or several. An async context manager; all calls from its event loop.

    Args:
        session: the face, or several by name; with several, the mind writes ``[name]`` before what each says.
        ear: hears the person; closed with the conversation.
        mind: answers; closed with the conversation.
        mouth: knows when each word is heard, one or by speaker; `mouth.TimedVoice` does. None: by proportion.
        instructions: the system message.
        manners: waits and sentences.
    """

    def __init__(
        self,
        session: Talker | Mapping[str, Talker],
        ear: Ear,
        mind: Mind,
        *,
        mouth: Mouth | Mapping[str, Mouth] | None = None,
        instructions: str = "",
        manners: Manners | None = None,
    ) -> None:
        self._faces = Faces(session, mouth, self._first_sound)
        self._ear, self._mind = ear, mind
        self._manners = manners or Manners()
        self._history = [Message(role="system", text=instructions)] if instructions else []
        self._phase = Phase.IDLE
        self._unanswered: list[str] = []
        """What the user has said that no word was answered to yet."""
        self._reply: Reply | None = None
        self._heard = ""
        """What the last transcription understood."""
        self._events: deque[ConversationEvent] = deque(maxlen=_MAX_EVENTS)
        self._has_event = asyncio.Event()
        self._answers: dict[str, asyncio.Future[str]] = {}
        self._transcribing: asyncio.Task[None] | None = None
        self._thinking: asyncio.Task[None] | None = None
        self._speaking: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._clock: _Clock | None = None
        self._shift_s: dict[str, float] = {}
        self._num_nudges = 0
        self._is_closed = False
        self._group: asyncio.TaskGroup | None = None

    @property
    def phase(self) -> Phase:
        """Who has the word."""
        return self._phase

    @property
    def history(self) -> tuple[Message, ...]:
        """What was said so far; of replies, what was heard."""
        return tuple(self._history)

    async def __aenter__(self) -> Conversation:
        if self._group is not None:
            raise SessionClosed("a conversation is entered once; make a new one")
        self._loop = asyncio.get_running_loop()
        self._began_s = self._phase_s = self._sound_s = self._loop.time()
        self._group = await asyncio.TaskGroup().__aenter__()
        self._start(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._group is not None
        self._is_closed = True
        self._has_event.set()
        for task in self._tasks:
            task.cancel()
        # A group would wrap what the caller's own block raised; only a cancellation is its business.
        cancelled = kind if kind is not None and issubclass(kind, asyncio.CancelledError) else None
        try:
            await self._group.__aexit__(cancelled, error if cancelled else None, trace if cancelled else None)
        finally:
            await self._ear.aclose()
            await self._mind.aclose()

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        assert self._group is not None
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def hear(self, samples: Samples, rate_hz: int) -> None:
        """The person's microphone gave these samples; blocks in order, of any length.

        Raises:
            InputError: no waveform. SessionClosed: the conversation has ended.
        """
        self._require_open("hear")
        self._sound_s = self._loop.time()
        self._heed(self._ear.hear(samples, rate_hz))
        if self._ear.wants_partial and self._transcribing is None:
            self._transcribing = self._start(self._transcribe(partial=True))

    def tell(self, text: str) -> None:
        """The person typed this; a reply that is being spoken is interrupted by it."""
        self._require_open("tell")
        if text.strip():
            self._give_up()
            self._clock = _Clock(self._loop.time())
            self._understood(text, Event.WORDS)

    def stop(self) -> None:
        """The person wants silence: what is being said or thought of ends, and only what was heard is remembered."""
        self._require_open("stop")
        if self._phase is not Phase.LISTENING:
            self._give_up()
        self._happen(Event.STOPPED)

    def answer(self, call_id: str, result: str) -> None:
        """The result of a function that the mind asked for; ignored if it no longer waits."""
        future = self._answers.get(call_id)
        if future is not None and not future.done():
            future.set_result(result)

    def note(self, shown: Shown, speaker: str = "") -> None:
        """These frames are being shown. Call it for each, or take the frames from `frames`, which does."""
        speaker = speaker or self._faces.first
        if not (self._faces.names and shown.is_silence):
            at_s = float(shown.pts)
            shift_s = self._shift_s.setdefault(speaker, self._now() - at_s)
            self._ear.played(shown.sound_S, self._faces.face(speaker).rate_hz, at_s + shift_s)
        self._faces.note(shown, speaker)

    async def frames(self, speaker: str = "") -> AsyncIterator[Shown]:
        """The frames of a face, each noted as it is given out."""
        async for shown in self._faces.face(speaker):
            self.note(shown, speaker)
            yield shown

    async def events(self) -> AsyncIterator[ConversationEvent]:
        """What happens, until the conversation is left. For one reader; one that lags by 1,024 loses the oldest."""
        while True:
            while self._events:
                yield self._events.popleft()
            if self._is_closed:
                return
            self._has_event.clear()
            await self._has_event.wait()

    def _now(self) -> float:
        return self._loop.time() - self._began_s

    def _emit(self, kind: type[ConversationEvent], **values: Any) -> None:
        self._events.append(kind(at_s=self._now(), **values))
        self._has_event.set()

    def _require_open(self, what: str) -> None:
        if self._is_closed or self._group is None:
            raise SessionClosed(f"{what}() outside 'async with Conversation(...)'; open a new one")

    def _heed(self, events: list[Event]) -> None:
        for event in events:
            if event in (Event.WORDS, Event.BACKCHANNEL, Event.NOTHING):
                self._understood(self._heard, event)
            else:
                self._happen(event)

    def _happen(self, event: Event) -> None:
        """Look the event up, change the phase, do what the table says."""
        if event is Event.VOICED:
            self._num_nudges = 0
            self._emit(said.UserSpeechStarted)
        elif event is Event.PAUSE:
            self._clock = _Clock(self._loop.time() - self._ear.quiet_s)
        turn = step(self._phase, event)
        if turn.phase is not self._phase:
            self._phase, self._phase_s = turn.phase, self._loop.time()
            self._ear.face_speaks(self._phase is Phase.SPEAKING)
            self._emit(said.PhaseChanged, phase=self._phase)
        for action in turn.actions:
            self._do(action)

    def _do(self, action: Action) -> None:
        match action:
            case Action.ATTEND | Action.RELAX:
                self._faces.attend(action is Action.ATTEND)
            case Action.TRANSCRIBE:
                self._stop_task("_transcribing")
                self._transcribing = self._start(self._transcribe())
            case Action.DROP:
                self._stop_task("_transcribing")
            case Action.ASK:
                self._ask()
            case Action.FORGET:
                self._forget()
            case Action.SPEAK | Action.RESUME:
                self._speak(resumed=action is Action.RESUME)
            case Action.STOP:
                self._stop()
            case Action.CUT | Action.KEEP:
                self._settle(complete=action is Action.KEEP)
            case Action.EXCUSE_EAR:
                self._excuse(self._manners.not_understood)
            case Action.EXCUSE_MIND:
                self._excuse(self._manners.no_answer)
            case Action.NUDGE:
                self._excuse(self._manners.nudge)

    def _stop_task(self, name: str) -> None:
        task: asyncio.Task[None] | None = getattr(self, name)
        setattr(self, name, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()

    async def _transcribe(self, *, partial: bool = False) -> None:
        began_s = self._loop.time()
        try:
            async with asyncio.timeout(self._manners.ear_s):
                understood = await self._ear.transcribe()
        except (StreamdiffError, TimeoutError) as error:
            if not partial:
                self._give_up()
                self._fail("ear", error, Event.EAR_FAILED)
            return
        finally:
            if self._transcribing is asyncio.current_task():
                self._transcribing = None
        self._heard = understood.text
        self._emit(said.PartialTranscript, text=understood.text)
        if self._clock is not None and not partial:
            self._clock.transcribe_s = self._loop.time() - began_s
        if understood.event is not None:
            self._understood(understood.text, understood.event)

    def _give_up(self) -> None:
        """The word is taken from the user: what was heard of this turn is forgotten, and the next voice is an onset."""
        self._stop_task("_transcribing")
        self._ear.give_up()

    def _understood(self, text: str, event: Event) -> None:
        is_backchannel = event is Event.BACKCHANNEL and self._phase is Phase.INTERRUPTED
        self._num_nudges = 0
        if event is not Event.NOTHING:
            self._emit(said.Transcript, text=text, is_backchannel=is_backchannel)
            if not is_backchannel:
                self._unanswered.append(text.strip())
        if self._clock is not None:
            self._clock.decided_s = self._loop.time()
        self._happen(event)

    def _fail(self, part: str, error: BaseException, event: Event) -> None:
        reason = str(error) or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)
        logger.warning("the %s failed: %s", part, reason)
        self._emit(said.Failed, part=part, reason=reason)
        self._happen(event)

    def _ask(self) -> None:
        text = " ".join(self._unanswered)
        self._emit(said.Thinking, text=text)
        self._reply = Reply(self._faces.first, self._faces.names)
        messages = [*self._history, Message(role="user", text=text)]
        self._thinking = self._start(self._think(self._reply, messages))

    async def _think(self, reply: Reply, messages: list[Message]) -> None:
        try:
            for _ in range(_MAX_ROUNDS):
                calls = await self._read(reply, messages)
                if not calls:
                    break
                messages += (answered := [*await self._call(calls)])
                self._history += answered
            else:
                raise BackendError(f"the mind asked for functions {_MAX_ROUNDS} times and gave no answer")
            reply.finish()
            self._first_word(reply)
            if not any(c.isalnum() for c in reply.text):
                raise BackendError("the mind gave an answer without a word")
        except Exception as error:  # noqa: BLE001  somebody else's mind may raise anything; the face must go on
            reply.failure = str(error) or type(error).__name__
            if self._reply is reply:
                self._fail("mind", error, Event.MIND_FAILED)
        finally:
            reply.finish()

    def _first_word(self, reply: Reply) -> None:
        if self._phase is Phase.THINKING and self._reply is reply and any(part.has_words for part in reply.parts):
            if self._clock is not None:
                self._clock.word_s = self._loop.time()
            self._happen(Event.REPLY)

    async def _read(self, reply: Reply, messages: list[Message]) -> list[ToolCall]:
        """Add what the mind writes to the reply; what it wants to be called."""
        calls: list[ToolCall] = []
        async with contextlib.aclosing(self._mind.answer(messages)) as pieces:
            while True:
                try:
                    async with asyncio.timeout(self._manners.mind_s):
                        piece = await anext(pieces)
                except StopAsyncIteration:
                    return calls
                self._commit()
                if isinstance(piece, ToolCall):
                    calls.append(piece)
                    continue
                for speaker, text in reply.add(piece):
                    self._emit(said.ReplyText, text=text, speaker=speaker)
                self._first_word(reply)

    async def _call(self, calls: list[ToolCall]) -> list[Message]:
        """Have functions called, all at once."""
        futures = {call.id: self._loop.create_future() for call in calls}
        self._answers.update(futures)
        try:
            for call in calls:
                self._emit(said.ToolCalled, id=call.id, name=call.name, arguments=call.arguments)
            async with asyncio.timeout(self._manners.tool_s):
                results = {call_id: await future for call_id, future in futures.items()}
        finally:
            for call_id in futures:
                self._answers.pop(call_id, None)
        asked = Message(role="assistant", text="", calls=tuple(calls))
        return [asked, *(Message(role="tool", text=text, call_id=call_id) for call_id, text in results.items())]

    def _commit(self) -> None:
        """What the user said is being answered: it is history."""
        if self._unanswered:
            self._history.append(Message(role="user", text=" ".join(self._unanswered)))
            self._unanswered.clear()
        first = 1 if self._history[:1] and self._history[0].role == "system" else 0
        del self._history[first : max(first, len(self._history) - _MAX_HISTORY)]
        while len(self._history) > first and self._history[first].role == "tool":
            del self._history[first]

    def _forget(self) -> None:
        self._stop_task("_thinking")
        if self._reply is not None:
            self._reply.finish()

    def _speak(self, *, resumed: bool = False) -> None:
        assert self._reply is not None
        if resumed:
            self._emit(said.Resumed, text=self._reply.left)
        self._speaking = self._start(self._speak_all(self._reply))

    async def _speak_all(self, reply: Reply) -> None:
        try:
            await self._faces.speak(reply)
        except StreamdiffError as error:
            logger.warning("the face stopped speaking: %s", error)
            self._emit(said.Failed, part="voice", reason=str(error))
        self._happen(Event.SPOKEN)

    def _first_sound(self, part: Part) -> None:
        clock, self._clock = self._clock, None
        self._emit(said.ReplyStarted, speaker=part.speaker)
        if clock is None or clock.word_s is None:
            return
        now_s = self._loop.time()
        self._emit(
            said.TurnTiming,
            pause_s=clock.decided_s - clock.silent_s,
            transcribe_s=clock.transcribe_s,
            mind_s=clock.word_s - clock.decided_s,
            voice_s=now_s - clock.word_s,
            total_s=now_s - clock.silent_s,
        )

    def _stop(self) -> None:
        self._stop_task("_speaking")
        stopped = self._faces.stop(self._reply) if self._reply is not None else None
        if stopped is not None and self._reply is not None:
            speaker, report = stopped
            self._emit(said.Interrupted, speaker=speaker, played_s=report.played_s, heard=self._reply.heard)

    def _settle(self, *, complete: bool) -> None:
        """The reply has ended for good: what was heard of it is history."""
        reply, self._reply = self._reply, None
        if reply is None:
            return
        text = reply.text if complete else reply.heard
        if text:
            self._history.append(Message(role="assistant", text=text))
        if not complete:
            self._stop_task("_thinking")
            reply.finish()
        self._emit(said.ReplyHeard, text=text, complete=complete and not reply.failure)

    def _excuse(self, text: str) -> None:
        """Say a sentence that no mind wrote; after what is being spoken, if something is."""
        self._commit()
        if self._speaking is not None and not self._speaking.done() and self._reply is not None:
            self._reply.excuse(text)
            self._reply.finish()
            return
        self._reply = Reply(self._faces.first, self._faces.names)
        self._reply.excuse(text)
        self._reply.finish()
        self._speak()

    async def _watch(self) -> None:
        """What happens because nothing happens."""
        while True:
            await asyncio.sleep(_TICK_S)
            if self._ear.is_turn and self._loop.time() - self._sound_s > _STARVED_S:
                self._heed(self._ear.flush())
            silence_s = self._manners.silence_s
            if (
                silence_s is not None
                and self._phase is Phase.IDLE
                and self._loop.time() - self._phase_s > silence_s
                and self._num_nudges < self._manners.max_nudges
            ):
                self._num_nudges += 1
                self._happen(Event.SILENCE)
