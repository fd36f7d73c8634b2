"""A face on a server: say something, watch and hear it, interrupt it."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import aiohttp
import numpy as np
from numpy.typing import NDArray

from streamdiff.client.frames import RATE_HZ, Frames, Shown
from streamdiff.client.opening import NoServer, address, dial
from streamdiff.errors import InputError, SessionClosed, StreamdiffError, Unsupported

logger = logging.getLogger(__name__)

Event: TypeAlias = Mapping[str, Any]
"""A server event of OpenAI Realtime, as JSON has it."""

_MAX_FRAMES = 50
"""Frames that wait to be taken: two seconds."""
_MAX_EVENTS = 1_024
_MAX_SAYS = 64
_MAX_TEXT = 4_000
_ANSWER_S = 10.0
_MEDIA = ("response.output_audio.delta", "streamdiff.video.delta")
_CHUNK = RATE_HZ // 2


@asynccontextmanager
async def connect(
    url: str,
    *,
    token: str | None = None,
    avatar: str | None = None,
    session: str | None = None,
    timeout_s: float = _ANSWER_S,
) -> AsyncGenerator[Face]:
    """A session of the server at ``url``; leaving ends it.

    Args:
        url: such as ``http://127.0.0.1:8100``.
        token: bearer token, where the server wants one.
        avatar: which face; None: the server's first.
        session: id of a session that stands, to join it; its owner ends it.
        timeout_s: for the connection and the first answer.

    Raises:
        NoServer: nobody answers there. Denied: the token. Busy: no seat; ``retry_after_s`` says when to ask again.
        InputError: a URL that is none, or an avatar or a session that the server does not know.
    """
    where = address(url, avatar=avatar, call_id=session)
    async with aiohttp.ClientSession() as http:
        face = Face(await dial(http, where, token=token, timeout_s=timeout_s))
        try:
            await face.begin(timeout_s)
            yield face
        finally:
            await face.aclose()


class Face:
    """A session on a server; `connect` makes it. All calls from its event loop.

    ``async for shown in face`` gives frames with their sound as they come, until the session ends. Who takes them too
    slowly loses the oldest (`num_lost`).
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.num_lost = 0
        """Frames that came and were not taken in time."""
        self.session: Mapping[str, Any] = {}
        """What the server says of the session: ``id``, ``fps``, ``width``, ``height``, ``hears``, ``mind``."""
        self._socket = socket
        self._frames: Frames | None = None
        self._shown: deque[Shown] = deque()
        self._events: deque[Event] = deque(maxlen=_MAX_EVENTS)
        self._says: deque[str] = deque()
        self._response: str | None = None
        self._item: str | None = None
        self._asked: tuple[str, str] | None = None
        self._taken: tuple[str, int] | None = None
        self._waiting: dict[str, asyncio.Future[int]] = {}
        self._end: StreamdiffError | None = None
        self._reason = ""
        self._num_asked = 0
        self._closed = False
        self._changed = asyncio.Event()
        self._ready = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._sends: asyncio.Queue[dict[str, Any]] = asyncio.Queue(256)

    async def begin(self, timeout_s: float) -> None:
        """Wait for the server's first event; `connect` does. NoServer: it does not come."""
        self._task = asyncio.create_task(self._run())
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            raise NoServer(f"the server took the connection and said nothing in {timeout_s:g} s") from None
        if not self.session:
            raise self._end or NoServer("the server closed the connection at once")

    def say(self, text: str) -> None:
        """Speak this, or answer it where a mind is connected, after what is being said.

        Raises:
            InputError: nothing to say, too long, or too much waiting. SessionClosed: the session is over.
        """
        self._require_open("say")
        text = text.strip()
        if not 0 < len(text) <= _MAX_TEXT:
            raise InputError(f"a text must hold 1 to {_MAX_TEXT} characters, got {len(text)}")
        if len(self._says) >= _MAX_SAYS:
            raise InputError(f"{_MAX_SAYS} texts wait already; wait until some are spoken")
        self._says.append(text)
        self._next()

    def hear(self, samples_S: NDArray[Any], rate_hz: int = RATE_HZ) -> None:
        """A microphone gave these samples, mono: float -1..1 or int16; blocks in order, 24 kHz.

        Raises:
            Unsupported: the server hears nobody. InputError: another rate. SessionClosed: the session is over.
        """
        self._require_open("hear")
        if not self.session["hears"]:
            raise Unsupported("this server understands no microphone; start it with an ear (streamdiff serve --ear)")
        if rate_hz != RATE_HZ or samples_S.ndim != 1:
            raise InputError(f"a microphone is heard at {RATE_HZ} Hz, mono; resample it first")
        if samples_S.dtype != np.int16:
            samples_S = np.rint(np.clip(samples_S, -1, 1) * 32_767).astype(np.int16)
        for start in range(0, len(samples_S), _CHUNK):
            pcm = samples_S[start : start + _CHUNK].astype("<i2").tobytes()
            self._send({"type": "input_audio_buffer.append", "audio": base64.b64encode(pcm).decode()})

    async def interrupt(self, heard_s: float | None = None) -> float:
        """Stop speaking, and forget what waits to be said; how much of the utterance was heard, seconds.

        ``heard_s``: how much of it was; None: as much as was taken by iteration. Frames of it that wait are dropped.

        Raises:
            SessionClosed: the session is over.
        """
        self._require_open("interrupt")
        self._says.clear()
        waiting = [shown.item_id for shown in self._shown if shown.item_id]
        self._shown = deque(shown for shown in self._shown if not shown.item_id)
        item_id = self._item if self._response is not None else waiting[-1] if waiting else None
        if self._asked is not None and item_id is None:
            self._send({"type": "response.cancel"})
        if item_id is None:
            return 0.0
        heard_ms = round(1e3 * (self._taken_of(item_id) / RATE_HZ if heard_s is None else max(0.0, heard_s)))
        answer = self._waiting[item_id] = asyncio.get_running_loop().create_future()
        self._send(
            {
                "type": "conversation.item.truncate",
                "item_id": item_id,
                "content_index": 0,
                "audio_end_ms": heard_ms,
            }
        )
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await answer / 1e3
        except TimeoutError:
            raise SessionClosed(f"the server did not say in {_ANSWER_S:g} s that it is silent; connect anew") from None
        finally:
            self._waiting.pop(item_id, None)

    async def events(self) -> AsyncIterator[Event]:
        """What the server tells beside media, until the session ends; one that lags by 1,024 loses the oldest.

        Raises:
            SessionClosed: it ended otherwise than by saying goodbye.
        """
        while True:
            while self._events:
                yield self._events.popleft()
            if self._closed:
                break
            await self._changed.wait()
        self._raise_end()

    def __aiter__(self) -> Face:
        return self

    async def __anext__(self) -> Shown:
        while not self._shown:
            if self._closed:
                self._raise_end()
                raise StopAsyncIteration
            await self._changed.wait()
        shown = self._shown.popleft()
        if shown.item_id is not None:
            self._taken = (shown.item_id, self._taken_of(shown.item_id) + len(shown.sound_S))
        return shown

    def _taken_of(self, item_id: str) -> int:
        """Samples of an utterance that were taken."""
        return self._taken[1] if self._taken is not None and self._taken[0] == item_id else 0

    async def aclose(self) -> None:
        """Say goodbye, which ends a session of one's own; idempotent."""
        self._finish(None)
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=_ANSWER_S)
        if not self._socket.closed:
            try:
                async with asyncio.timeout(5.0):
                    await self._socket.close()
            except (TimeoutError, ConnectionError):
                logger.debug("the server did not say goodbye")

    async def _run(self) -> None:
        """Read and write until the connection is over."""
        end: StreamdiffError | None = None
        writing = asyncio.create_task(self._write())
        try:
            await self._read()
        except InputError as error:
            end = SessionClosed(f"the server is not understood: {error}")
        finally:
            writing.cancel()
            self._finish(end or self._loss())

    async def _read(self) -> None:
        async for message in self._socket:
            if message.type is not aiohttp.WSMsgType.TEXT:
                raise InputError("it sends bytes")
            try:
                event = json.loads(message.data)
            except (ValueError, RecursionError):
                raise InputError("it sends what is no JSON") from None
            if not isinstance(event, dict) or not isinstance(event.get("type"), str):
                raise InputError("it sends what is no event")
            self._on_event(event)

    async def _write(self) -> None:
        while True:
            event = await self._sends.get()
            try:
                await self._socket.send_str(json.dumps(event))
            except ConnectionError:
                return  # reading ends, too, and knows why

    def _on_event(self, event: dict[str, Any]) -> None:
        kind = event["type"]
        if self._frames is not None and kind in _MEDIA:
            self._media(event)
            return
        match kind:
            case "session.created":
                self._began(event.get("session"))
            case "response.created":
                self._response, self._item = str(_of(event, "response").get("id")), None
            case "response.done":
                self._response = self._asked = None
                self._next()
            case "conversation.item.truncated":
                answer, end_ms = self._waiting.get(str(event.get("item_id"))), event.get("audio_end_ms")
                if answer is not None and not answer.done() and isinstance(end_ms, int):
                    answer.set_result(end_ms)
            case "streamdiff.session.ended":
                self._reason = str(event.get("reason"))[:40]
            case "error":
                self._refused(_of(event, "error"))
            case _:
                pass
        self._events.append(event)
        self._wake()

    def _refused(self, error: Mapping[str, Any]) -> None:
        if self._asked is None or error.get("event_id") != self._asked[0]:
            return
        if error.get("code") == "conversation_already_has_active_response":
            self._says.appendleft(self._asked[1])  # somebody else was faster: when that is over
        self._asked = None

    def _began(self, session: object) -> None:
        told: dict[str, Any] = session if isinstance(session, dict) else {}
        face = _of(told, "streamdiff")
        numbers = [face.get(name) for name in ("width", "height", "fps")]
        if not all(type(number) is int for number in numbers) or not isinstance(told.get("id"), str):
            raise InputError("it does not say what the session is")
        width, height, fps = numbers
        self._frames = Frames(width, height, fps)  # type: ignore[arg-type]
        self.session = {"id": told["id"], "hears": face.get("hears") is True, "mind": str(face.get("mind", ""))} | {
            "width": width,
            "height": height,
            "fps": fps,
        }
        self._send({"type": "session.update", "session": {"type": "realtime", "streamdiff": {"video": True}}})
        self._ready.set()

    def _media(self, event: dict[str, Any]) -> None:
        assert self._frames is not None
        if event["type"] == _MEDIA[0]:
            self._frames.sound(event)
            self._item = event["item_id"]
            return
        for shown in self._frames.picture(event):
            if len(self._shown) >= _MAX_FRAMES:
                self._shown.popleft()
                self.num_lost += 1
            self._shown.append(shown)
        self._wake()

    def _next(self) -> None:
        """Have the next text spoken, if nothing is being said."""
        if self._says and self._response is None and self._asked is None and self.session:
            self._num_asked += 1
            event_id, text = f"say_{self._num_asked}", self._says.popleft()
            self._asked = event_id, text
            message = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}
            self._send({"type": "response.create", "event_id": event_id, "response": {"input": [message]}})

    def _send(self, event: dict[str, Any]) -> None:
        try:
            self._sends.put_nowait(event)
        except asyncio.QueueFull:
            raise InputError("the server takes nothing; what is sent to it piles up") from None

    def _require_open(self, what: str) -> None:
        if self._closed:
            raise SessionClosed(f"{what}() after the session ended ({self._reason or 'closed'}); connect anew")

    def _loss(self) -> StreamdiffError | None:
        """Why the connection is over, unless that is as it should be."""
        if self._reason in ("left", "finished"):
            return None
        if self._reason:
            return SessionClosed(f"the server ended the session: {self._reason}")
        code = self._socket.close_code
        session = f"connect(url, session={self.session['id']!r})" if self.session else "connect(url)"
        if code == 1013:
            return SessionClosed("the server gave this client up: it reads too slowly; take frames as they come")
        return SessionClosed(f"the connection was lost (code {code}); {session} joins it again while the server waits")

    def _finish(self, end: StreamdiffError | None) -> None:
        if self._closed:
            return
        self._closed, self._end = True, end
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(end or SessionClosed("the session has ended; connect anew"))
        self._ready.set()
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _raise_end(self) -> None:
        if self._end is not None:
            raise self._end


def _of(event: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = event.get(key)
    return value if isinstance(value, dict) else {}
