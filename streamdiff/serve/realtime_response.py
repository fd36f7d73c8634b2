"""One response in OpenAI Realtime's terms: the server events of what the face says in one go, in their order.

    response.created, response.output_item.added, conversation.item.added, response.content_part.added,
    response.output_audio_transcript.delta and response.output_audio.delta in turns,
    response.output_audio.done, ..., response.done

Axes: S waveform samples.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

import numpy as np

from streamdiff.arrays import Floats
from streamdiff.serve.realtime_events import RATE_HZ, new_id

Fields: TypeAlias = dict[str, Any]
Send: TypeAlias = "Callable[[Fields], bool]"
"""Takes a server event to the client, at once; False: there was no room for it."""
Outcome: TypeAlias = Literal["completed", "cancelled", "failed"]


class Response:
    """What the face says in one go: an item of the conversation, and how much of its sound was sent.

    Args:
        send: where its events go.
        sends_sound: whether sound goes there, too; False where a peer connection carries it.
    """

    def __init__(self, send: Send, *, sends_sound: bool) -> None:
        self.id, self.item_id = new_id("resp"), new_id("item")
        self.segment = 0
        """The utterance; 0: nothing was heard yet."""
        self.turn: int | None = None
        """Whose words are spoken; None: not known yet."""
        self.num_samples = 0
        """Samples of it that have left, at 24 kHz."""
        self._transcript = ""
        self._runs: list[tuple[int, float]] = []
        self._send, self._sends_sound = send, sends_sound

    @property
    def sent_ms(self) -> int:
        """Sound that has left, milliseconds."""
        return round(1e3 * self.num_samples / RATE_HZ)

    def begin(self, previous_item_id: str | None) -> None:
        """Tell that it begins."""
        self._send({"type": "response.created", "response": self._state("in_progress")})
        where = {"response_id": self.id, "output_index": 0}
        self._send({"type": "response.output_item.added", **where, "item": self._item("in_progress", ())})
        self._send(
            {
                "type": "conversation.item.added",
                "previous_item_id": previous_item_id,
                "item": self._item("in_progress", ()),
            }
        )
        part = {"type": "audio", "transcript": ""}
        self._send({"type": "response.content_part.added", **self._where, "part": part})

    def write(self, text: str) -> None:
        """More words of it are known."""
        self._transcript += text
        self._send({"type": "response.output_audio_transcript.delta", **self._where, "delta": text})

    def sound(self, samples_S: Floats, *, position_s: float, index: int) -> None:
        """The sound of a frame leaves, mono -1..1 at 24 kHz; ``position_s``, ``index``: the frame's in the stream."""
        if not self._runs or abs(self._position_s(self.num_samples) - position_s) > 1e-3:
            self._runs.append((self.num_samples, position_s))
        if not self.num_samples and not self._sends_sound:
            self._send({"type": "output_audio_buffer.started", "response_id": self.id})
        self.num_samples += len(samples_S)
        if self._sends_sound and len(samples_S):
            delta = base64.b64encode(pcm16(samples_S)).decode()
            # The client of a face must know whose sound it is; others ignore the field.
            self._send({"type": "response.output_audio.delta", **self._where, "delta": delta, "frame": index})

    def position_s(self, heard_ms: float) -> float:
        """Place in the stream, seconds, of this much of its sound; of its end where less was sent."""
        return self._position_s(min(round(heard_ms * RATE_HZ / 1e3), self.num_samples))

    def end(self, status: Outcome, *, reason: str | None = None, error: Fields | None = None) -> None:
        """Tell that it is over, and why."""
        done = "completed" if status == "completed" else "incomplete"
        part = {"type": "audio", "transcript": self._transcript}
        for event in self._endings(done, part):
            self._send(event)
        details: Fields | None = None
        if status != "completed":
            details = {"type": status} | ({"reason": reason} if reason else {}) | ({"error": error} if error else {})
        output = [self._item(done, (self._content,))]
        self._send({"type": "response.done", "response": self._state(status, output, details)})
        if not self._sends_sound and self.num_samples:
            kind = "stopped" if status == "completed" else "cleared"
            self._send({"type": f"output_audio_buffer.{kind}", "response_id": self.id})

    def _endings(self, done: str, part: Fields) -> Iterator[Fields]:
        if self._sends_sound:
            yield {"type": "response.output_audio.done", **self._where}
        yield {"type": "response.output_audio_transcript.done", **self._where, "transcript": self._transcript}
        yield {"type": "response.content_part.done", **self._where, "part": part}
        item = self._item(done, (self._content,))
        yield {"type": "response.output_item.done", "response_id": self.id, "output_index": 0, "item": item}
        yield {"type": "conversation.item.done", "previous_item_id": None, "item": item}

    def _position_s(self, samples: int) -> float:
        """Place in the stream of a sample; pauses within the utterance lie between runs."""
        first, at_s = next(((n, s) for n, s in reversed(self._runs) if n <= samples), (0, 0.0))
        return at_s + (samples - first) / RATE_HZ

    @property
    def _where(self) -> Fields:
        return {"response_id": self.id, "item_id": self.item_id, "output_index": 0, "content_index": 0}

    @property
    def _content(self) -> Fields:
        return {"type": "output_audio", "transcript": self._transcript}

    def _item(self, status: str, content: tuple[Fields, ...]) -> Fields:
        return message_item(self.item_id, "assistant", status, content)

    def _state(self, status: str, output: list[Fields] | None = None, details: Fields | None = None) -> Fields:
        return {
            "id": self.id,
            "object": "realtime.response",
            "status": status,
            "status_details": details,
            "output": output or [],
            "output_modalities": ["audio"],
            "metadata": None,
            "usage": None,
        }


def message_item(item_id: str, role: str, status: str, content: tuple[Fields, ...]) -> Fields:
    """A message of the conversation, as server events hold it."""
    return {
        "id": item_id,
        "object": "realtime.item",
        "type": "message",
        "status": status,
        "role": role,
        "content": list(content),
    }


def pcm16(samples_S: Floats) -> bytes:
    """A waveform, -1..1, as little-endian int16."""
    return np.rint(np.clip(samples_S, -1.0, 1.0) * 32_767).astype("<i2").tobytes()
