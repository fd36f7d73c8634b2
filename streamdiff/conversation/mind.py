"""The mind of a conversation: what was said so far in, the words of a reply out, as they are written.

`OpenAIMind` asks any endpoint that speaks OpenAI's ``POST /chat/completions`` with streaming (Ollama, llama.cpp, vLLM,
hosted ones). `ScriptedMind` needs no key and no network, and says so.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from streamdiff.errors import BackendError, ConfigError

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]

_LONGEST_S = 300.0
_MAX_LINE = 1 << 20
_MAX_LETTERS = 20_000
"""Of one reply: twenty minutes of speech."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """The mind asks for a function to be called."""

    id: str
    name: str
    arguments: str
    """JSON, as the mind wrote it; not checked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One entry of the history."""

    role: Role
    text: str
    calls: tuple[ToolCall, ...] = ()
    """Of an assistant that asks for functions."""
    call_id: str = ""
    """Of a tool's answer."""


class Mind(Protocol):
    """Answers. `answer` may be cancelled at any time, by closing what it returned."""

    def answer(self, messages: Sequence[Message]) -> AsyncGenerator[str | ToolCall, None]:
        """Pieces of a reply as they are written, and calls of functions at its end.

        Raises:
            BackendError: no answer, or one that broke off.
        """
        ...

    async def aclose(self) -> None:
        """Close connections; idempotent."""
        ...


HONEST = "I am a scripted voice: no language model is connected to me."


class ScriptedMind:
    """Replies from a list, or repeats what it heard; the default says in its first sentence what it is.

    Args:
        replies: in order, the last one again and again; None: the honest default.
        first_s: wait before the first word.
        gap_s: wait between two words.
    """

    def __init__(self, replies: Iterable[str] | None = None, *, first_s: float = 0.0, gap_s: float = 0.0) -> None:
        self._replies = list(replies) if replies is not None else None
        if self._replies == []:
            raise ConfigError("a scripted mind needs at least one reply; leave replies out for the default")
        self._first_s, self._gap_s = first_s, gap_s
        self._num_answers = 0

    async def answer(self, messages: Sequence[Message]) -> AsyncGenerator[str | ToolCall, None]:
        """The next reply, word by word."""
        number, self._num_answers = self._num_answers, self._num_answers + 1
        if self._first_s:
            await asyncio.sleep(self._first_s)
        for count, word in enumerate(self._reply(number, messages).split(" ")):
            if count and self._gap_s:
                await asyncio.sleep(self._gap_s)
            yield f" {word}" if count else word

    def _reply(self, number: int, messages: Sequence[Message]) -> str:
        if self._replies is not None:
            return self._replies[min(number, len(self._replies) - 1)]
        said = next((message.text for message in reversed(messages) if message.role == "user"), "")
        again = f'You said: "{said.strip()}"' if said.strip() else "I did not hear a word."
        return f"{HONEST} {again}" if number == 0 else again

    async def aclose(self) -> None:
        """Nothing to close."""


class OpenAIMind:
    """A chat model behind an OpenAI-compatible endpoint. Needs ``aiohttp`` (extra ``think``).

    Args:
        base_url: up to and including the version, such as ``http://127.0.0.1:11434/v1``.
        model: its name there.
        api_key: sent as a bearer token; never logged.
        tools: functions the model may ask for, in OpenAI's form; passed on unread.
        options: further fields of the request, such as ``{"temperature": 0.7}``.
        connect_s: to connect; ``first_s``: to the first piece; ``gap_s``: between two.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str = "default",
        api_key: str = "",
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
        connect_s: float = 3.0,
        first_s: float = 10.0,
        gap_s: float = 10.0,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ConfigError(f"an endpoint's URL begins with http:// or https://, got {base_url!r}")
        try:
            import aiohttp
        except ImportError as error:
            raise BackendError("asking a model needs aiohttp; pip install 'streamdiff[think]'") from error
        self._aiohttp: Any = aiohttp
        self._url = base_url.rstrip("/") + "/chat/completions"
        self._fixed = {**(options or {}), "model": model, "stream": True}
        if tools:
            self._fixed["tools"] = [dict(tool) for tool in tools]
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # A line that is too long is no ClientError.
        too_long = self._aiohttp.http_exceptions.HttpProcessingError
        self._failures = (aiohttp.ClientError, too_long, OSError, TimeoutError, ValueError)
        self._connect_s, self._first_s, self._gap_s = connect_s, first_s, gap_s
        self._client: Any = None

    async def answer(self, messages: Sequence[Message]) -> AsyncGenerator[str | ToolCall, None]:
        """Pieces of the reply as they arrive, and calls of functions at its end; see `Mind`."""
        calls: dict[int, dict[str, str]] = {}
        num_letters = 0
        async for delta in self._deltas([_plain(message) for message in messages]):
            piece = delta.get("content")
            if isinstance(piece, str) and piece:
                num_letters += len(piece)
                if num_letters > _MAX_LETTERS:
                    raise BackendError(
                        f"{self._url} wrote more than {_MAX_LETTERS} letters; ask it for shorter replies"
                    )
                yield piece
            _collect(calls, delta.get("tool_calls"))
        for number in sorted(calls):
            yield ToolCall(**calls[number])

    async def _deltas(self, messages: list[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
        if self._client is None:
            self._client = self._aiohttp.ClientSession(headers=self._headers, read_bufsize=_MAX_LINE)
        timeout = self._aiohttp.ClientTimeout(total=_LONGEST_S, connect=self._connect_s, sock_read=self._gap_s)
        body = {**self._fixed, "messages": messages}
        try:
            async with asyncio.timeout(self._first_s) as first:
                async with self._client.post(self._url, json=body, timeout=timeout) as response:
                    if response.status != 200:
                        said = (await response.content.read(500)).decode("utf-8", "replace")
                        raise BackendError(f"{self._url} answered {response.status}: {said}; check model and key")
                    async for line in response.content:
                        event = sse_json(line)
                        if event is None:
                            continue
                        if "error" in event:
                            raise BackendError(f"{self._url} broke off: {str(event['error'])[:300]}; see its log")
                        first.reschedule(None)
                        for choice in (event.get("choices") or [])[:1]:
                            yield choice.get("delta") or {}
        except self._failures as error:
            what = str(error)[:300] or type(error).__name__
            raise BackendError(f"{self._url} did not answer: {what}; is it an OpenAI-compatible server?") from error

    async def aclose(self) -> None:
        """Close the connection."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()


def sse_json(line: bytes) -> dict[str, Any] | None:
    """The object in a line of server-sent events; None for comments, empty lines and the end.

    Raises:
        ValueError: a data line that holds no JSON object.

    >>> sse_json(b'data: {"a": 1}'), sse_json(b": ping"), sse_json(b"data: [DONE]")
    ({'a': 1}, None, None)
    """
    field, _, value = line.partition(b":")
    value = value.strip()
    if field.strip() != b"data" or value in (b"", b"[DONE]"):
        return None
    event = json.loads(value)
    if not isinstance(event, dict):
        raise ValueError(f"a data line that is no object: {value[:80]!r}")
    return event


def _collect(calls: dict[int, dict[str, str]], deltas: Any) -> None:
    """Join the pieces in which calls of functions arrive."""
    for delta in deltas if isinstance(deltas, list) else []:
        call = calls.setdefault(int(delta.get("index") or 0), {"id": "", "name": "", "arguments": ""})
        function = delta.get("function") or {}
        call["id"] = call["id"] or str(delta.get("id") or "")
        call["name"] += str(function.get("name") or "")
        call["arguments"] += str(function.get("arguments") or "")


def _plain(message: Message) -> dict[str, Any]:
    """A message in OpenAI's form."""
    plain: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.calls:
        plain["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.calls
        ]
    if message.call_id:
        plain["tool_call_id"] = message.call_id
    return plain


def open_mind(name: str = "scripted", *, model: str = "default", api_key: str = "") -> Mind:
    """A mind by the name that a command line gives: ``scripted``, or the base URL of an OpenAI-compatible endpoint.

    Raises:
        ConfigError: a name that is neither. BackendError: aiohttp is not installed.
    """
    if name == "scripted":
        return ScriptedMind()
    if name.startswith(("http://", "https://")):
        return OpenAIMind(name, model=model, api_key=api_key)
    raise ConfigError(f"a mind is 'scripted' or the URL of an OpenAI-compatible endpoint, got {name!r}")
