"""`streamdiff serve --workers`, with real processes: one is killed, and nobody else notices."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, WSMsgType, WSServerHandshakeError

from streamdiff.trust.audit import verify_log

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]
READY = re.compile(r"(http://\S+)")
PATIENCE_S = 120.0


@contextmanager
def serving(folder: Path, *options: str) -> Generator[tuple[str, subprocess.Popen[str]]]:
    words = ["--port", "0", "--mind", "none", "--workers", "2", "--capacity", "4", *options]
    with (
        (folder / "log").open("w+") as log,
        subprocess.Popen(
            [sys.executable, "-m", "streamdiff", "serve", *words], stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            found = READY.match(process.stdout.readline())
            log.seek(0)
            assert found, log.read()
            yield found[1].rstrip("/"), process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            finally:
                process.kill()


def children(process: subprocess.Popen[str]) -> list[int]:
    """Workers, oldest first: every one is given its number on its command line."""
    found: list[tuple[str, int]] = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                words = (folder / "cmdline").read_bytes().decode().split("\0")
            except (OSError, ValueError):
                continue
            if parent == process.pid and "--worker-of" in words:
                found.append((words[words.index("--worker-of") + 1], int(folder.name)))
    return [pid for _, pid in sorted(found)]


async def until(claim: Callable[[], Awaitable[Any]]) -> Any:
    until_s = time.monotonic() + PATIENCE_S
    while not (value := await claim()):
        assert time.monotonic() < until_s
        await asyncio.sleep(0.1)
    return value


async def begin(client: ClientSession, body: dict[str, object] | None = None) -> tuple[int, dict[str, Any]]:
    async with client.post("/v1/sessions", json=body or {}) as answer:
        return answer.status, {**await answer.json(), "retry": answer.headers.get("Retry-After")}


async def metric(client: ClientSession, name: str) -> float:
    async with client.get("/metrics") as answer:
        text = await answer.text()
    return sum(float(line.split()[-1]) for line in text.splitlines() if re.match(rf"{name}[ {{]", line))


@asynccontextmanager
async def watching(client: ClientSession, call_id: str) -> AsyncIterator[Any]:
    async with client.ws_connect(f"/v1/realtime?call_id={call_id}", protocols=("realtime",)) as socket:
        assert "session.created" in (await socket.receive_str(timeout=PATIENCE_S))
        yield socket


def test_a_killed_worker_is_replaced_and_nobody_else_notices(tmp_path: Path) -> None:
    async def scene(url: str, process: subprocess.Popen[str]) -> None:
        async with ClientSession(url) as client:
            begun = [await begin(client) for _ in range(5)]
            assert [status for status, _ in begun] == [201, 201, 201, 201, 503]
            assert int(begun[4][1]["retry"]) >= 1
            ids = [state["id"] for _, state in begun[:4]]
            assert sorted(name.partition(".")[0] for name in ids) == ["w0g1", "w0g1", "w1g1", "w1g1"]
            assert await metric(client, "streamdiff_sessions") == 4
            async with client.get("/v1/info") as answer:
                told = await answer.json()
                assert (told["capacity"], told["free"], told["avatars"]) == (4, 0, ["demo"])
            lost, spared = ([name for name in ids if name.startswith(worker)] for worker in ("w0", "w1"))
            async with watching(client, lost[0]) as hit, watching(client, spared[0]) as other:
                os.kill(children(process)[0], signal.SIGKILL)
                message = await hit.receive(timeout=PATIENCE_S)
                while message.type is WSMsgType.TEXT:
                    message = await hit.receive(timeout=PATIENCE_S)
                assert (message.type, message.data) == (WSMsgType.CLOSE, 1011)
                await other.send_json({"type": "response.cancel"})
                assert (await other.receive(timeout=PATIENCE_S)).type is WSMsgType.TEXT
            async with client.get(f"/v1/sessions/{lost[1]}") as answer:
                assert answer.status == 410
                assert (await answer.json())["error"]["reason"] == "failed"
            for name in spared:
                async with client.get(f"/v1/sessions/{name}") as answer:
                    assert answer.status == 200
            await until(lambda: is_whole(client))
            assert await metric(client, "streamdiff_sessions_opened_total") == 4
            status, state = await begin(client)
            assert (status, state["id"].partition(".")[0]) == (201, "w0g2")
            async with client.get(f"/v1/sessions/{lost[1]}") as answer:
                assert answer.status == 410

    async def is_whole(client: ClientSession) -> bool:
        async with client.get("/readyz") as answer:
            return (await answer.json())["capacity"] == 4

    with serving(tmp_path, "--audit", str(tmp_path / "a.jsonl"), "--mark", "AI generated") as (url, process):
        asyncio.run(asyncio.wait_for(scene(url, process), 240))
        pids = children(process)
    assert process.returncode == 0
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    verdict = verify_log(tmp_path / "a.jsonl")
    assert verdict.fault == ""
    assert len([note for note in verdict.notes if "has no end" in note]) == 2  # those of the worker that was killed


def test_limits_and_tokens_hold_for_all_workers_together(tmp_path: Path) -> None:
    from streamdiff.serve.tokens import mint

    key = b"k" * 32
    (tmp_path / "key").write_bytes(key)

    async def scene(url: str, process: subprocess.Popen[str]) -> None:
        async with ClientSession(url) as stranger:
            for path in ("/metrics", "/v1/info", "/internal/seats", "/v1/realtime"):
                async with stranger.get(path) as answer:
                    assert answer.status in (400, 401), path
            assert (await begin(stranger))[0] == 401
        ann, bob = ({"Authorization": f"Bearer {mint(key, user)}"} for user in ("ann", "bob"))
        async with ClientSession(url, headers=ann) as client, ClientSession(url, headers=bob) as other:
            begun = await asyncio.gather(*(begin(client) for _ in range(6)))
            assert sorted(status for status, _ in begun) == [201, 429, 429, 429, 429, 429]
            name = next(state["id"] for status, state in begun if status == 201)
            async with other.get(f"/v1/sessions/{name}") as answer:
                assert answer.status == 404
            assert (await begin(other))[0] == 201
            # A server whose process in front is killed ends as well.
            pids = children(process)
            process.kill()
            await until(lambda: all_gone(pids))

    async def all_gone(pids: list[int]) -> bool:
        return not any(Path(f"/proc/{pid}").exists() for pid in pids)

    with serving(tmp_path, "--per-user", "1", "--token-key", str(tmp_path / "key"), "--drain", "1") as (url, process):
        asyncio.run(asyncio.wait_for(scene(url, process), 240))


def test_a_user_of_simlis_protocol_is_counted_across_workers(tmp_path: Path) -> None:
    from streamdiff.serve.tokens import mint

    key = b"k" * 32
    (tmp_path / "key").write_bytes(key)
    ann, bob = (mint(key, user) for user in ("ann", "bob"))

    async def ticket(client: ClientSession) -> str:
        async with client.post("/compose/token", json={"faceId": "demo"}, headers={"x-simli-api-key": ann}) as answer:
            assert answer.status == 200
            return (await answer.json())["session_token"]

    async def scene(url: str) -> None:
        async with (
            ClientSession(url) as client,
            ClientSession(url, headers={"Authorization": f"Bearer {bob}"}) as other,
        ):
            first = await ticket(client)
            # One seat of that worker is taken, so the next ticket comes from the other one.
            status, state = await begin(other)
            second = await ticket(client)
            assert status == 201
            assert [name[:2] for name in (state["id"], first, second)] == ["w0", "w0", "w1"]
            way = "/compose/webrtc/p2p?session_token="
            async with client.ws_connect(way + first):
                for name, why in ((second, 429), ("w1g1." + "x" * 32, 401)):
                    with pytest.raises(WSServerHandshakeError) as refused:
                        await client.ws_connect(way + name)
                    assert refused.value.status == why
                async with client.get("/readyz") as answer:
                    assert (await answer.json())["free"] == 2
            # The ticket was not used up by being refused.
            await until(lambda: connects(client, way + second))

    async def connects(client: ClientSession, path: str) -> bool:
        try:
            async with client.ws_connect(path):
                return True
        except WSServerHandshakeError as error:
            if error.status != 429:
                raise
            return False

    options = ["--per-user", "1", "--simli", "--token-key", str(tmp_path / "key"), "--drain", "1", "--rate", "1000"]
    with serving(tmp_path, *options) as (url, _):
        asyncio.run(asyncio.wait_for(scene(url), 240))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--capacity", "1"], "without a seat"),
        (["--workers", "0"], "--workers: must be a whole number"),
        (["--mark", "\n"], "a mark is"),
    ],
)
def test_what_is_wrong_is_said_once(tmp_path: Path, options: list[str], why: str) -> None:
    words = [sys.executable, "-m", "streamdiff", "serve", "--mind", "none", "--port", "0", "--workers", "2", *options]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert why in done.stderr
