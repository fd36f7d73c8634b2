"""A call in OpenAI Realtime's words: client events become commands, the call's events and beats become server events.

No sockets: `Wire` takes what is to be sent. A WebSocket carries sound and, where the client asked for them, encoded
pictures; beside a peer connection, which carries both, only the rest is sent.

One response is open at a time: what the face says from the first word to the last. It begins when it is asked for, when
an answer is thought of, or with the first sound of an utterance that nobody asked for here.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from streamdiff.arrays import Floats
from streamdiff.errors import SessionClosed
from streamdiff.serve.calls import Call
from streamdiff.serve.protocol import Caption, Ending, Event, Hearing, Interrupt, Problem, Say, Status, Stopped
from streamdiff.serve.pump import Beat
from streamdiff.serve.realtime_events import (
    RATE_HZ,
    AppendAudio,
    BadEvent,
    CancelResponse,
    ClearAudio,
    ClearOutput,
    ClientEvent,
    CommitAudio,
    CreateItem,
    CreateResponse,
    TruncateItem,
    UpdateSession,
    new_id,
    parse,
)
from streamdiff.serve.realtime_response import Fields, Outcome, Response, message_item
from streamdiff.serve.websocket import CLOSE_CODES
from streamdiff.voice.resample import Resampler

_ANSWER_S = 120.0
"""A response of which nothing was heard for so long has failed."""
_KEPT_ITEMS = 64
_MAX_ASKED = 16
"""Texts that may wait for a response.create."""
_MAX_BAD = 64
"""Events that cannot be followed, before the connection is closed."""
_MIN_COMMIT_S = 0.1
_HUSH_S = 0.8
"""Silence that an ear takes for the end of a turn (`conversation.endpoint.Patience`: at most 0.7 s)."""
_FATAL = ("refused", "closed", "conversation")
"""Problems after which a text that was to be answered will not be."""


class Wire(Protocol):
    """The way to the client. No call blocks or raises."""

    def send(self, event: Fields) -> bool:
        """Take an event there; False: there is no room, for a picture."""
        ...

    def drop_sound(self) -> None:
        """Forget sound that has not left: it will not be played."""
        ...

    def close(self, code: int, reason: str) -> None:
        """End the connection after what was sent."""
        ...


class Realtime:
    """One client of a call. A sink of the call's pump.

    Args:
        call: what it talks to.
        wire: where server events go.
        model: what the client calls the model; told back.
        sends_media: whether sound and pictures go over the wire.
    """

    def __init__(self, call: Call, wire: Wire, *, model: str = "", sends_media: bool = True) -> None:
        self.is_encoded = False
        self.num_bad = 0
        self._call, self._wire, self._model, self._sends_media = call, wire, model, sends_media
        self._needs_key = True
        self._response: Response | None = None
        self._late: asyncio.TimerHandle | None = None
        self._asked: deque[str] = deque(maxlen=_MAX_ASKED)
        self._typed: deque[str] = deque(maxlen=_MAX_ASKED)
        self._items: dict[str, Response] = {}
        self._last_item: str | None = None
        self._words: dict[int, _Words] = {}
        self._last_turn = 0
        self._thinks = False
        self._stops = False
        self._truncating: tuple[Response, int] | None = None
        self._user_item = new_id("item")
        self._microphone = _Microphone(call)
        self._began_s = time.monotonic()
        self._was_told_deaf = False
        rate_hz = call.pump.rate_hz
        self._resampler = None if rate_hz == RATE_HZ else Resampler(rate_hz, RATE_HZ)

    def start(self) -> None:
        """Tell the client what the session is, and everything from now on."""
        self._emit({"type": "session.created", "session": self._session})
        self._call.subscribe(self._on_event)
        self._call.pump.attach(self, is_viewer=self._sends_media)
        self._call.watched()

    def close(self) -> None:
        """The client has gone; the call stands. Idempotent."""
        self._microphone.close()
        self._finish_timer()
        self._call.unsubscribe(self._on_event)
        self._call.pump.detach(self)
        self._call.watched()

    def receive(self, data: str | bytes) -> None:
        """A message of the client. What cannot be followed is answered by an error event."""
        try:
            event_id, event = parse(data)
            self._obey(event, event_id)
        except BadEvent as error:
            self.num_bad += 1
            self._error(str(error), code=error.code, param=error.param, event_id=error.event_id)
            if error.is_broken or self.num_bad > _MAX_BAD:
                self._wire.close(1008, "no realtime events")

    def put(self, beat: Beat) -> None:
        """Of `Sink`."""
        if beat.segment:
            response = self._speaking(beat.segment)
            sound_S = self._at_24k(beat.shown.sound_S, ends=beat.ends_segment)
            response.sound(sound_S, position_s=float(beat.pts), index=beat.index)
        if self.is_encoded:
            self._picture(beat)
        if beat.segment and beat.ends_segment:
            self._finish("completed")

    def end(self, reason: Ending) -> None:
        """Of `Sink`: tell why the session is over, and close the connection."""
        if self._response is not None:
            self._finish("failed", error={"type": "server_error", "code": "session_ended", "message": reason.value})
        self._emit({"type": "streamdiff.session.ended", "reason": reason.value})
        self._wire.close(CLOSE_CODES.get(reason, 1001), reason.value)
        self._microphone.close()

    def _obey(self, event: ClientEvent, event_id: str | None) -> None:
        self._call.touch()
        match event:
            case UpdateSession(video):
                self._update(video)
            case AppendAudio(pcm):
                self._hear(pcm, event_id)
            case CommitAudio():
                self._commit(event_id)
            case ClearAudio():
                self._microphone.clear()
                self._emit({"type": "input_audio_buffer.cleared"})
            case CreateItem(text, item_id):
                self._create(text, item_id)
            case CreateResponse(text):
                self._respond(text, event_id)
            case CancelResponse() | ClearOutput():
                self._cancel(event, event_id)
            case TruncateItem():
                self._truncate(event, event_id)

    def _update(self, video: bool | None) -> None:
        if video and not self._sends_media:
            raise BadEvent("pictures come over the peer connection", code="unsupported", param="session.streamdiff")
        if video is not None and video != self.is_encoded:
            self.is_encoded = self._needs_key = video
            self._call.watched()
        self._emit({"type": "session.updated", "session": self._session})

    def _hear(self, pcm: bytes, event_id: str | None) -> None:
        if not self._call.talk.hears:
            if not self._was_told_deaf:
                self._was_told_deaf = True
                self._error("this server understands no microphone", code="unsupported", event_id=event_id)
            return
        if not self._microphone.push(pcm):
            raise BadEvent(
                f"more than {_Microphone.MOST_S:.0f} s of sound wait; send it as it is spoken",
                code="input_audio_buffer_full",
                event_id=event_id,
            )

    def _commit(self, event_id: str | None) -> None:
        if not self._microphone.commit():
            message = f"the input audio buffer holds less than {_MIN_COMMIT_S * 1e3:.0f} ms of sound"
            raise BadEvent(message, code="input_audio_buffer_commit_empty", event_id=event_id)
        self._tell_committed()

    def _tell_committed(self) -> None:
        self._emit(
            {
                "type": "input_audio_buffer.committed",
                "item_id": self._user_item,
                "previous_item_id": self._last_item,
            }
        )

    def _create(self, text: str, item_id: str | None) -> None:
        if len(self._asked) == _MAX_ASKED:
            raise BadEvent(f"{_MAX_ASKED} texts wait already; ask for a response", code="too_many_items")
        item = message_item(item_id or new_id("item"), "user", "completed", ({"type": "input_text", "text": text},))
        self._asked.append(text)
        self._add_item(item)

    def _respond(self, text: str | None, event_id: str | None) -> None:
        if self._response is not None:
            raise BadEvent(
                f"response {self._response.id} is not over; cancel it first, or wait for response.done",
                code="conversation_already_has_active_response",
                event_id=event_id,
            )
        if text is None:
            text = "\n".join(self._asked)
            self._asked.clear()
        if not text:
            if self._microphone.is_committed:
                return  # a mind answers what was heard by itself
            raise BadEvent("there is nothing to answer; create an item first", code="no_input", event_id=event_id)
        self._typed.append(text)
        self._open_response()
        self._call.do(Say(text))

    def _cancel(self, event: CancelResponse | ClearOutput, event_id: str | None) -> None:
        response = self._response
        if isinstance(event, CancelResponse) and (response is None or event.response_id not in (None, response.id)):
            raise BadEvent("there is no such response to cancel", code="response_cancel_not_active", event_id=event_id)
        self._stop(None)
        if isinstance(event, ClearOutput) and response is None:
            self._emit({"type": "output_audio_buffer.cleared", "response_id": None})

    def _truncate(self, event: TruncateItem, event_id: str | None) -> None:
        response = self._items.get(event.item_id)
        if response is None:
            message = f"there is no item {event.item_id} of the assistant's"
            raise BadEvent(message, code="item_not_found", param="item_id", event_id=event_id)
        heard_ms = min(event.audio_end_ms, response.sent_ms)
        if response is not self._response or not response.segment:
            self._truncated(response, heard_ms)
            return
        self._stop(response.position_s(heard_ms))

    def _stop(self, heard_s: float | None) -> None:
        self._stops = True
        try:
            self._call.do(Interrupt(heard_s))
        finally:
            self._stops = False

    def _on_event(self, event: Event) -> None:
        match event:
            case Caption(role="avatar"):
                self._captioned(event)
            case Caption(role="user"):
                self._understood(event)
            case Hearing(speaking):
                self._hearing(speaking)
            case Status(state):
                self._thinking(state == "thinking", speaks=state == "speaking")
            case Stopped():
                self._stopped(event)
            case Problem(code, text):
                self._problem(code, text)
            case _:
                pass

    def _captioned(self, caption: Caption) -> None:
        is_new = caption.turn not in self._words
        words = self._words.setdefault(caption.turn, _Words())
        if len(caption.text) > len(words.text):  # what was heard in the end is less: told in milliseconds
            words.text = caption.text
        while len(self._words) > _MAX_ASKED:
            self._words.pop(next(iter(self._words)))
        if is_new and self._response is None:
            self._open_response()  # somebody else has asked
        self._write()

    def _thinking(self, thinks: bool, *, speaks: bool) -> None:
        thought, self._thinks = self._thinks, thinks
        if thinks and self._response is None:
            self._open_response()
        elif thought and not (thinks or speaks) and self._response is not None and not self._response.segment:
            self._finish("cancelled", reason="turn_detected")  # it was not the end of the user's turn

    def _write(self) -> None:
        """Tell the open response the words that it does not have yet."""
        response = self._response
        if response is None:
            return
        if response.turn is None:
            untold = (turn for turn, words in self._words.items() if words.is_untold and turn >= self._last_turn)
            response.turn = min(untold, default=None)
        words = self._words.get(response.turn or 0)
        if words is not None and words.is_untold:
            self._last_turn = response.turn or 0
            new = words.text[len(words.told) :] if words.text.startswith(words.told) else words.text
            words.told = words.text
            response.write(new)

    def _understood(self, caption: Caption) -> None:
        where = {"item_id": self._user_item, "content_index": 0}
        kind = "conversation.item.input_audio_transcription"
        if not caption.final:
            self._emit({"type": f"{kind}.delta", **where, "delta": caption.text})
            return
        if caption.text in self._typed:
            self._typed.remove(caption.text)
            return
        if not self._microphone.is_committed:
            self._tell_committed()
        self._microphone.end_turn()
        content = {"type": "input_audio", "transcript": caption.text}
        self._add_item(message_item(self._user_item, "user", "completed", (content,)))
        usage = {"type": "duration", "seconds": 0}
        self._emit({"type": f"{kind}.completed", **where, "transcript": caption.text, "usage": usage})
        self._user_item = new_id("item")

    def _hearing(self, speaking: bool) -> None:
        elapsed_s = time.monotonic() - self._began_s
        at_ms = self._microphone.heard_ms if self._sends_media else round(1e3 * elapsed_s)
        if speaking:
            kind, at = "speech_started", {"audio_start_ms": at_ms}
        else:
            kind, at = "speech_stopped", {"audio_end_ms": at_ms}
        self._emit({"type": f"input_audio_buffer.{kind}", **at, "item_id": self._user_item})

    def _stopped(self, stopped: Stopped) -> None:
        self._wire.drop_sound()
        response = self._response
        # A mind that is asked in the moment in which its last answer ends stops that one, and thinks on.
        if response is None or not (response.segment or self._stops or not self._call.talk.mind):
            return
        self._finish("cancelled", reason="client_cancelled" if self._stops else "turn_detected")
        if response.segment and stopped.segment == response.segment:
            self._truncated(response, min(response.sent_ms, round(1e3 * stopped.heard_s)))

    def _truncated(self, response: Response, heard_ms: int) -> None:
        self._emit(
            {
                "type": "conversation.item.truncated",
                "item_id": response.item_id,
                "content_index": 0,
                "audio_end_ms": heard_ms,
            }
        )

    def _problem(self, code: str, text: str) -> None:
        self._error(text, code=code, kind="invalid_request_error" if code == "refused" else "server_error")
        if self._response is not None and not self._response.segment and code in _FATAL:
            self._finish("failed", error={"type": "server_error", "code": code, "message": text})

    def _speaking(self, segment: int) -> Response:
        """The response that an utterance belongs to."""
        response = self._response
        if response is not None and response.segment not in (0, segment):
            self._finish("completed")
            response = None
        if response is None:
            response = self._open_response()
        if not response.segment:
            response.segment = segment
            self._finish_timer()
        return response

    def _open_response(self) -> Response:
        response = self._response = Response(self._emit, sends_sound=self._sends_media)
        response.begin(self._last_item)
        self._last_item = response.item_id
        self._items[response.item_id] = response
        while len(self._items) > _KEPT_ITEMS:
            self._items.pop(next(iter(self._items)))
        self._late = asyncio.get_running_loop().call_later(_ANSWER_S, self._give_up)
        self._write()
        return response

    def _give_up(self) -> None:
        message = f"nothing was answered in {_ANSWER_S:.0f} s"
        self._finish("failed", error={"type": "server_error", "code": "no_answer", "message": message})

    def _finish(self, status: Outcome, *, reason: str | None = None, error: Fields | None = None) -> None:
        response, self._response = self._response, None
        self._finish_timer()
        if response is not None:
            if status == "cancelled" and response.turn in self._words:
                self._words[response.turn].is_over = True
            response.end(status, reason=reason, error=error)

    def _finish_timer(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _add_item(self, item: Fields) -> None:
        previous, self._last_item = self._last_item, item["id"]
        for kind in ("added", "done"):
            self._emit({"type": f"conversation.item.{kind}", "previous_item_id": previous, "item": item})

    def _at_24k(self, sound_S: Floats, *, ends: bool) -> Floats:
        if self._resampler is None or not self._sends_media:
            return sound_S
        out_S = self._resampler.push(sound_S)
        return np.concatenate([out_S, self._resampler.finish()]) if ends else out_S

    def _picture(self, beat: Beat) -> None:
        picture = beat.picture
        if picture is None or (self._needs_key and not picture.is_key):
            self._call.pump.request_key()
            return
        self._needs_key = not self._emit(
            {
                "type": "streamdiff.video.delta",
                "response_id": self._response.id if self._response else None,
                "codec": self._call.pump.codec,
                "is_key": picture.is_key,
                "frame": beat.index,
                "pts_s": round(float(beat.pts), 6),
                "at_s": round(float(beat.at), 6),
                "delta": base64.b64encode(picture.data).decode(),
            }
        )

    def _error(
        self,
        message: str,
        *,
        code: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        event_id: str | None = None,
    ) -> None:
        error = {"type": kind, "code": code, "message": message, "param": param, "event_id": event_id}
        self._emit({"type": "error", "error": error})

    def _emit(self, event: Fields) -> bool:
        return self._wire.send({"event_id": new_id("event"), **event})

    @property
    def _session(self) -> Fields:
        """The session as it is, whatever was asked for."""
        ready = self._call.ready
        pcm = {"type": "audio/pcm", "rate": RATE_HZ}
        detection = {"type": "server_vad", "create_response": True, "interrupt_response": True} if ready.hears else None
        return {
            "type": "realtime",
            "object": "realtime.session",
            "id": ready.session,
            "model": self._model,
            "output_modalities": ["audio"],
            "instructions": "",
            "tools": [],
            "tool_choice": "none",
            "max_output_tokens": "inf",
            "audio": {
                "input": {"format": pcm, "transcription": None, "noise_reduction": None, "turn_detection": detection},
                "output": {"format": pcm, "voice": "", "speed": 1.0},
            },
            "streamdiff": {
                "video": self.is_encoded,
                "codec": self._call.pump.codec,
                "fps": ready.fps,
                "width": ready.width,
                "height": ready.height,
                "can": list(ready.can),
                "hears": ready.hears,
                "mind": ready.mind,
            },
        }


@dataclass(slots=True)
class _Words:
    """What the face says in one turn, as far as it is known, and what of it was told."""

    text: str = ""
    told: str = ""
    is_over: bool = False
    """Whether it was interrupted: nothing more of it will be spoken."""

    @property
    def is_untold(self) -> bool:
        """Whether there is more to tell."""
        return self.text != self.told and not self.is_over


class _Microphone:
    """What the client sends faster than it is spoken waits here, so that hearing it delays nobody else."""

    MOST_S = 60.0
    _PIECE = RATE_HZ // 10
    _PIECE_S = 0.02
    """A piece of 0.1 s is heard every 20 ms at most."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._pcm = bytearray()
        self._heard = self._uncommitted = 0
        self._task: asyncio.Task[None] | None = None
        self.is_committed = False
        """Whether what was said last was committed, and no sound has come since."""

    @property
    def heard_ms(self) -> int:
        """Sound that was heard since the session began."""
        return round(1e3 * self._heard / RATE_HZ)

    def push(self, pcm: bytes) -> bool:
        """Hear these samples; False: too many wait."""
        if len(self._pcm) + len(pcm) > 2 * RATE_HZ * self.MOST_S:
            return False
        self._pcm += pcm
        self._uncommitted += len(pcm) // 2
        self.is_committed = False
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._feed())
        return True

    def commit(self) -> bool:
        """Whoever spoke has finished; False: nobody did."""
        if self._uncommitted < _MIN_COMMIT_S * RATE_HZ:
            return False
        self.push(bytes(2 * round(_HUSH_S * RATE_HZ)))
        self._uncommitted, self.is_committed = 0, True
        return True

    def end_turn(self) -> None:
        """What was heard so far was understood."""
        self._uncommitted = 0

    def clear(self) -> None:
        """Forget what waits."""
        self._pcm.clear()
        self._uncommitted = 0

    def close(self) -> None:
        """Hear nothing more; idempotent."""
        self._pcm.clear()
        if self._task is not None:
            self._task.cancel()

    async def _feed(self) -> None:
        while self._pcm:
            piece = bytes(self._pcm[: 2 * self._PIECE])
            del self._pcm[: 2 * self._PIECE]
            self._heard += len(piece) // 2
            with contextlib.suppress(SessionClosed):
                self._call.hear((np.frombuffer(piece, "<i2") / 32_768).astype(np.float32), RATE_HZ)
            if self._pcm:
                await asyncio.sleep(self._PIECE_S)
