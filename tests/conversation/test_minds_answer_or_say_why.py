"""An OpenAI-compatible endpoint is read as it streams; whatever it does wrong comes out as one error of ours."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from streamdiff.conversation.mind import HONEST, Message, OpenAIMind, ScriptedMind, ToolCall, open_mind
from streamdiff.errors import BackendError, ConfigError

aiohttp = pytest.importorskip("aiohttp")
web = pytest.importorskip("aiohttp.web")

ASKED = [Message(role="system", text="Be brief."), Message(role="user", text="Hi.")]


def _chunk(**delta: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": delta}]}).encode() + b"\n\n"


async def _answers(handler: Callable[[Any], Awaitable[Any]], **options: Any) -> list[str | ToolCall]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    mind = OpenAIMind(f"http://127.0.0.1:{port}/v1/", **options)
    try:
        return [piece async for piece in mind.answer(ASKED)]
    finally:
        await mind.aclose()
        await runner.cleanup()


def _streaming(*lines: bytes, then_s: float = 0.0) -> tuple[Callable[[Any], Awaitable[Any]], list[Any]]:
    seen: list[Any] = []

    async def handler(request: Any) -> Any:
        seen.append((dict(request.headers), await request.json()))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for line in lines:
            await response.write(line)
        await asyncio.sleep(then_s)
        return response

    return handler, seen


def test_words_come_as_they_are_written() -> None:
    handler, seen = _streaming(
        b": ping\n\n", _chunk(role="assistant"), _chunk(content="Good "), _chunk(content="day."), b"data: [DONE]\n\n"
    )
    pieces = asyncio.run(_answers(handler, model="small", api_key="k", options={"temperature": 0}))
    assert pieces == ["Good ", "day."]
    ((headers, body),) = seen
    assert headers["Authorization"] == "Bearer k"
    assert body == {
        "model": "small",
        "stream": True,
        "temperature": 0,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}],
    }


def test_calls_of_functions_are_joined_from_their_pieces() -> None:
    def part(index: int, **fields: Any) -> bytes:
        return _chunk(tool_calls=[{"index": index, **fields}])

    handler, seen = _streaming(
        part(0, id="c0", function={"name": "weather", "arguments": ""}),
        part(1, id="c1", function={"name": "time", "arguments": "{}"}),
        part(0, function={"arguments": '{"city": '}),
        part(0, function={"arguments": '"Bern"}'}),
    )
    pieces = asyncio.run(_answers(handler, tools=[{"type": "function", "function": {"name": "weather"}}]))
    assert pieces == [
        ToolCall(id="c0", name="weather", arguments='{"city": "Bern"}'),
        ToolCall(id="c1", name="time", arguments="{}"),
    ]
    assert seen[0][1]["tools"] == [{"type": "function", "function": {"name": "weather"}}]


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        ([b"data: {broken\n\n"], "did not answer"),
        ([b"data: [1]\n\n"], "no object"),
        ([_chunk(content="Well"), b'data: {"error": {"message": "overloaded"}}\n\n'], "overloaded"),
        ([_chunk(content="x" * 30_000)], "more than 20000 letters"),
        ([b"data: " + b"x" * (3 << 20) + b"\n\n"], "did not answer"),
    ],
)
def test_nonsense_is_an_error_that_says_why(lines: list[bytes], match: str) -> None:
    with pytest.raises(BackendError, match=match):
        asyncio.run(_answers(_streaming(*lines)[0]))


def test_a_refusal_is_told() -> None:
    async def refuse(request: Any) -> Any:
        return web.Response(status=401, text="no such key")

    with pytest.raises(BackendError, match=r"401: no such key"):
        asyncio.run(_answers(refuse))


@pytest.mark.heavy
def test_an_endpoint_that_is_silent_is_given_up() -> None:
    with pytest.raises(BackendError, match="did not answer"):
        asyncio.run(_answers(_streaming(b": ping\n\n", then_s=1.0)[0], first_s=0.3))
    with pytest.raises(BackendError, match="did not answer"):
        asyncio.run(_answers(_streaming(_chunk(content="Well"), then_s=1.0)[0], gap_s=0.3))


@pytest.mark.heavy
def test_an_answer_may_take_longer_than_its_first_word() -> None:
    async def slowly(request: Any) -> Any:
        response = web.StreamResponse()
        await response.prepare(request)
        for number in range(4):
            await response.write(_chunk(content=str(number)))
            await asyncio.sleep(0.2)
        return response

    assert asyncio.run(_answers(slowly, first_s=0.5)) == ["0", "1", "2", "3"]


def test_an_endpoint_that_is_not_there_is_told() -> None:
    async def ask() -> None:
        mind = OpenAIMind("http://127.0.0.1:9/v1")
        try:
            async for _ in mind.answer(ASKED):
                pass
        finally:
            await mind.aclose()

    with pytest.raises(BackendError, match="is it an OpenAI-compatible server"):
        asyncio.run(ask())


def test_the_scripted_mind_is_honest_in_its_first_sentence() -> None:
    async def twice() -> list[str]:
        mind = ScriptedMind()
        said = [[str(piece) async for piece in mind.answer(ASKED)] for _ in range(2)]
        return ["".join(pieces) for pieces in said]

    first, second = asyncio.run(twice())
    assert first == f'{HONEST} You said: "Hi."'
    assert second == 'You said: "Hi."'


def test_a_mind_is_opened_by_name() -> None:
    assert isinstance(open_mind(), ScriptedMind)
    assert isinstance(open_mind("http://127.0.0.1:1/v1"), OpenAIMind)
    with pytest.raises(ConfigError, match="scripted"):
        open_mind("gpt")
