"""What goes wrong at one end stays there: the others notice nothing, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
import time
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from streamdiff.serve import server
from streamdiff.serve.calls import Calls
from streamdiff.serve.cast import Cast
from streamdiff.serve.leases import Leases, Terms
from streamdiff.serve.local import LocalDoor
from streamdiff.serve.protocol import Ending, Say
from streamdiff.serve.pump import Viewer
from streamdiff.serve.server import House, application
from streamdiff.session import Session
from tests.serve.scripted import ScriptedStream, Stage


class Scripted:
    def open(self) -> Session:
        return Session(ScriptedStream())


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.heavy
def test_a_viewer_that_stops_reading_delays_nobody() -> None:
    async def main() -> None:
        async with Calls(Leases(Terms(capacity=1)), Stage()) as calls, LocalDoor(calls).connect() as client:
            frozen = Viewer(client.call.pump, most=5)
            began_s = time.monotonic()
            beats = [await client.beat() for _ in range(30)]
            assert time.monotonic() - began_s < 3.0
            indices = [beat.index for beat in beats if beat is not None]
            assert indices == list(range(indices[0], indices[0] + 30))
            assert len(frozen._beats) <= 5
            assert frozen.num_lost >= 20

    asyncio.run(main())


@pytest.mark.heavy
def test_sessions_that_come_and_go_leave_nothing_behind() -> None:
    async def visit(calls: Calls, k: int) -> None:
        async with LocalDoor(calls).connect(f"user{k}") as client:
            client.send(Say("some words"))
            await client.beat()
        await calls.end(client.call, Ending.LEFT)

    async def main() -> None:
        async with Calls(Leases(Terms(capacity=4)), Stage()) as calls:
            await asyncio.gather(*(visit(calls, k) for k in range(4)))
            gc.collect()
            tasks, threads, files = len(asyncio.all_tasks()), threading.active_count(), descriptors()
            for _ in range(5):
                await asyncio.gather(*(visit(calls, k) for k in range(4)))
            gc.collect()
            assert len(asyncio.all_tasks()) <= tasks
            # The pools may still grow to their size; no session keeps a thread.
            assert threading.active_count() <= threads + 8
            assert descriptors() <= files
            assert calls.leases.held == ()
            ended = calls.meters.registry.get_sample_value("streamdiff_sessions_ended_total", {"reason": "left"})
            assert ended == 24

    asyncio.run(main())


@pytest.mark.heavy
def test_connections_that_never_speak_are_closed_and_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 200

    async def main() -> None:
        with Cast({"demo": Scripted()}) as cast:
            house = House(calls=Calls(Leases(Terms(capacity=1)), cast.open), cast=cast)
            app = application(house)
            up: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            stop = asyncio.Event()
            serving = asyncio.create_task(
                server.serve(app, host="127.0.0.1", port=0, on_up=up.set_result, stop=stop, drain_s=0.0)
            )
            port = await asyncio.wait_for(up, 5)
            files = descriptors()
            silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(count)]
            assert descriptors() >= files + count
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            assert b"200 OK" in await asyncio.wait_for(reader.read(), 5)
            writer.close()
            # The server hangs up on each of them.
            for other, _ in silent:
                assert await asyncio.wait_for(other.read(), 10) == b""
            for _, end in silent:
                end.close()
            await asyncio.sleep(0.2)
            assert descriptors() <= files + 4
            stop.set()
            await asyncio.wait_for(serving, 10)

    monkeypatch.setattr(server, "_KEEPALIVE_S", 1.0)
    asyncio.run(main())


@pytest.mark.slow
def test_ten_thousand_requests_of_noise_change_nothing() -> None:
    async def main() -> None:
        rng = random.Random(0)
        with Cast({"demo": Scripted()}) as cast:
            house = House(calls=Calls(Leases(Terms(capacity=1)), cast.open), cast=cast)
            app: web.Application = application(house)
            async with house.calls, TestClient(TestServer(app)) as client:
                call = await house.calls.open("local")
                paths = ["/v1/sessions", "/v1/info", f"/v1/sessions/{call.id}/offer", "/v1/avatars", "/page/x", "/x"]
                files = descriptors()
                statuses: dict[int, int] = {}
                for k in range(10_000):
                    path = rng.choice(paths) + rng.choice(["", "?a=b", "/..", "%00"])
                    method = rng.choice(["GET", "POST", "PUT", "PATCH"])
                    answer = await client.request(method, path, data=rng.randbytes(rng.randrange(200)))
                    await answer.read()
                    statuses[answer.status] = statuses.get(answer.status, 0) + 1
                    if k % 50 == 0:
                        await asyncio.sleep(0)
                assert set(statuses) <= {200, 400, 404, 405, 503}, statuses
                assert house.calls.all == (call,)
                assert descriptors() <= files + 4
                assert await Viewer(call.pump).next() is not None

    asyncio.run(main())


@pytest.mark.slow
def test_a_thousand_sessions_do_not_grow_the_process() -> None:
    def resident_mb() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    async def main() -> None:
        async with Calls(Leases(Terms(capacity=20)), Stage()) as calls:

            async def visit(k: int) -> None:
                async with LocalDoor(calls).connect(f"user{k}") as client:
                    await client.beat()
                await calls.end(client.call, Ending.LEFT)

            sizes: list[float] = []
            for _ in range(50):
                await asyncio.gather(*(visit(k) for k in range(20)))
                gc.collect()
                sizes.append(resident_mb())
            assert sizes[-1] - sizes[10] < 40, sizes

    asyncio.run(main())
