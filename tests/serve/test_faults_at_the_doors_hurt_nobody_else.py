"""Viewers vanish, readers stall, connections never speak: a neighbour notices nothing, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
from pathlib import Path

import aiohttp
import pytest

from streamdiff.serve.protocol import Say
from streamdiff.serve.pump import Viewer
from streamdiff.serve.realtime import realtime
from tests.serve.house import Place, play

ROUNDS = 4
SILENT = 200
VIDEO = {"type": "session.update", "session": {"type": "realtime", "streamdiff": {"video": True}}}


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class Neighbour:
    """Somebody who talks to a face of their own all the while, and looks at every frame."""

    def __init__(self, place: Place) -> None:
        self.indices: list[int] = []
        self._place = place

    async def watch(self) -> None:
        call = await self._place.house.calls.open("neighbour")
        viewer = Viewer(call.pump)
        call.watched()
        while (beat := await viewer.next()) is not None:
            self.indices.append(beat.index)
            if not beat.segment and beat.index % 25 == 0:
                call.do(Say("a few words"))


async def vanish(place: Place) -> None:
    """A viewer whose machine is switched off in mid-sentence."""
    async with aiohttp.ClientSession() as http:
        connection = await http.ws_connect(f"{place.base}/v1/realtime")
        await connection.send_json(VIDEO)
        item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "word " * 100}]}
        await connection.send_json({"type": "response.create", "response": {"input": [item]}})
        while json.loads((await connection.receive()).data)["type"] != "streamdiff.video.delta":
            pass
        assert connection._response.connection is not None
        connection._response.connection.transport.abort()


async def raw(place: Place, request: str) -> socket.socket:
    plug = socket.socket()
    plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    plug.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(plug, ("127.0.0.1", place.port))
    await loop.sock_sendall(plug, request.encode())
    return plug


async def stall(place: Place) -> None:
    """A viewer that asks for everything and reads nothing."""
    upgrade = (
        f"GET /v1/realtime HTTP/1.1\r\nHost: 127.0.0.1:{place.port}\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    before = set(place.house.calls.all)
    plug = await raw(place, upgrade)
    await until(lambda: len(place.house.calls.all) > len(before))
    (call,) = set(place.house.calls.all) - before
    call.do(Say("word " * 200))
    await until(lambda: call.pump.num_viewers == 0)
    plug.close()


async def never_speak(place: Place, count: int) -> None:
    """Connections that send nothing, half a request, or an upgrade and not a word after it."""
    plugs = [await raw(place, "GET /v1/realtime HTTP/1.1\r\nHost: " if k % 2 else "") for k in range(count)]
    async with aiohttp.ClientSession() as http:
        sockets = [await http.ws_connect(f"{place.base}/v1/realtime") for _ in range(3)]
        for _ in range(count // 10):
            with pytest.raises(aiohttp.WSServerHandshakeError, match="503"):
                await http.ws_connect(f"{place.base}/v1/realtime")
        for connection in sockets:  # they are told that they were idle
            async with asyncio.timeout(30):
                async for _ in connection:
                    pass
            assert connection.close_code == 1001
    for plug in plugs:
        plug.close()


async def until(claim: object) -> None:
    assert callable(claim)
    async with asyncio.timeout(60):
        while not claim():
            await asyncio.sleep(0.02)


@pytest.mark.slow
def test_nobody_else_notices_and_memory_and_descriptors_stay_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    # A slow reader is given up after a second, so that a round takes seconds.
    monkeypatch.setattr("streamdiff.serve.websocket._MOST_SOUND_S", 1.0)
    monkeypatch.setattr("streamdiff.serve.websocket._SEND_BUFFER", 8_192)
    monkeypatch.setattr("streamdiff.serve.websocket._STALL_S", 1.0)
    sizes: list[tuple[int, int, float]] = []

    async def scene(place: Place) -> None:
        neighbour = Neighbour(place)
        watching = asyncio.create_task(neighbour.watch())
        await until(lambda: neighbour.indices)
        for _ in range(ROUNDS):
            await asyncio.gather(*(vanish(place) for _ in range(3)))
            await until(lambda: len(place.house.calls.leases.held) == 1)
            await stall(place)
            await until(lambda: len(place.house.calls.leases.held) == 1)
            await never_speak(place, SILENT)
            await until(lambda: len(place.house.calls.leases.held) == 1)
            await asyncio.sleep(1.0)  # aborted transports are let go
            gc.collect()
            sizes.append((descriptors(), len(asyncio.all_tasks()), resident_mb()))
        assert not watching.done()
        watching.cancel()
        first, last = neighbour.indices[0], neighbour.indices[-1]
        assert neighbour.indices == list(range(first, last + 1))
        assert last > 25 * ROUNDS
        count = place.house.calls.meters.registry.get_sample_value
        ended = {why: count("streamdiff_sessions_ended_total", {"reason": why}) or 0 for why in ("gone", "idle")}
        # Three vanish, one does not read (on a busy machine it is idle before it is given up), three say nothing.
        assert sum(ended.values()) == 7 * ROUNDS
        assert ended["gone"] >= 3 * ROUNDS

    play(scene, realtime, terms={"capacity": 4, "idle_s": 6.0, "linger_s": 1.0}, side=64)
    (files, tasks, size_mb), later = sizes[0], sizes[1:]
    assert max(size[0] for size in later) <= files + 8
    assert max(size[1] for size in later) <= tasks + 8
    assert max(size[2] for size in later) <= size_mb + 20
