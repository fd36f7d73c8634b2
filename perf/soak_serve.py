"""Sessions come and go for a long time: is memory flat, are descriptors, and how many frames come late?

    python perf/soak_serve.py --minutes 60

`streamdiff serve` in a process of its own, and two visitors at a time. Each comes by WebSocket or by WebRTC, lets the
face speak, interrupts it perhaps, and says goodbye or vanishes. Memory and descriptors are read when nobody is there,
after every few visits. The last line is one JSON object; ``| python perf/table.py --keep soak`` keeps it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import torch
from aiortc import RTCPeerConnection, RTCSessionDescription
from bench_page import Usage, serving
from measure import machine_card, priority

VISITORS, SEATS = 2, 4
"""Who comes next may be there before the seat of who has gone is free."""
REST_VISITS = 12
"""Between two looks at the memory."""
TEXT = "This is what somebody says who has come for a moment, and who will be gone again quite soon. "


async def by_socket(http: aiohttp.ClientSession, rng: random.Random) -> str:
    """A visit over OpenAI Realtime's names; how it ended."""
    async with http.ws_connect("/v1/realtime", protocols=("realtime",), timeout=aiohttp.ClientWSTimeout()) as socket:
        session = {"type": "realtime", "streamdiff": {"video": True}}
        part = {"type": "input_text", "text": TEXT * rng.randint(1, 3)}
        item = {"type": "message", "role": "user", "content": [part]}
        await socket.send_json({"type": "session.update", "session": session})
        await socket.send_json({"type": "conversation.item.create", "item": item})
        await socket.send_json({"type": "response.create"})
        until_s, interrupt_s = time.monotonic() + rng.uniform(2, 8), time.monotonic() + rng.uniform(1, 12)
        while (now_s := time.monotonic()) < until_s:
            if now_s > interrupt_s:
                interrupt_s = until_s + 1
                await socket.send_json({"type": "response.cancel"})
            await socket.receive(timeout=20)
        if rng.random() < 0.3:
            response: Any = socket._response
            response.connection.transport.abort()
            return "socket, vanished"
    return "socket, goodbye"


async def by_webrtc(http: aiohttp.ClientSession, rng: random.Random) -> str:
    """A visit by WebRTC, as the page does; how it ended."""
    async with http.post("/v1/sessions", json={}) as answer:
        if answer.status != 201:
            return f"refused, {answer.status}"
        name = (await answer.json())["id"]
    far = RTCPeerConnection()
    try:
        for kind in ("video", "audio"):
            far.addTransceiver(kind, direction="recvonly")
        channel = far.createDataChannel("events")
        opened = asyncio.Event()
        channel.on("open", opened.set)
        far.on("track", lambda track: asyncio.ensure_future(_drain(track)))
        await far.setLocalDescription(await far.createOffer())
        async with http.post(f"/v1/sessions/{name}/offer", json={"sdp": far.localDescription.sdp}) as answer:
            await far.setRemoteDescription(RTCSessionDescription((await answer.json())["sdp"], "answer"))
        await asyncio.wait_for(opened.wait(), 30)
        channel.send(json.dumps({"type": "say", "text": TEXT * rng.randint(1, 3)}))
        await asyncio.sleep(rng.uniform(2, 6))
        channel.send(json.dumps({"type": "interrupt"}))
        await asyncio.sleep(rng.uniform(0.2, 2))
    finally:
        await far.close()
    if rng.random() < 0.3:
        return "webrtc, vanished"
    async with http.delete(f"/v1/sessions/{name}"):
        return "webrtc, goodbye"


async def _drain(track: Any) -> None:
    with contextlib.suppress(Exception):
        while True:
            await track.recv()


async def visits(url: str, number: int, rng: random.Random) -> Counter[str]:
    """So many visits, `VISITORS` at a time."""
    found: Counter[str] = Counter()
    left = iter(range(number))

    async def visitor() -> None:
        async with aiohttp.ClientSession(url) as http:
            for _ in left:
                way = by_socket if rng.random() < 0.6 else by_webrtc
                try:
                    found[await way(http, rng)] += 1
                except (aiohttp.ClientError, TimeoutError, OSError) as error:
                    found[f"failed, {type(error).__name__}"] += 1

    await asyncio.gather(*(visitor() for _ in range(VISITORS)))
    return found


async def at_rest(url: str, pid: int) -> dict[str, float]:
    """What the server holds when nobody is there."""
    async with aiohttp.ClientSession(url) as http, asyncio.timeout(120):
        while True:
            async with http.get("/readyz") as answer:
                if (await answer.json())["free"] == SEATS:
                    break
            await asyncio.sleep(0.5)
    await asyncio.sleep(6.0)  # connections of calls that are over are forgotten every five seconds
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    threads = len(os.listdir(f"/proc/{pid}/task"))
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    return {"mib": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1), "threads": threads, "descriptors": descriptors}


async def meters(url: str) -> dict[str, float]:
    """Counters of the server, summed over their labels but for the reasons of endings."""
    async with aiohttp.ClientSession(url) as http, http.get("/metrics") as answer:
        text = await answer.text()
    found: dict[str, float] = {}
    for line in text.splitlines():
        if match := re.match(r'streamdiff_(\w+?)_total(?:\{(?:\w+)="([^"]*)"\})? ([\d.e+]+)$', line):
            name = f"{match[1]} {match[2]}" if match[2] else match[1]
            found[name] = found.get(name, 0.0) + float(match[3])
    return found


async def soak(url: str, pid: int, minutes: float) -> dict[str, Any]:
    """Visits for so long; what was held at rest, and what the server counted."""
    rng, found = random.Random(0), Counter[str]()
    held: list[dict[str, float]] = []
    usage, until_s = Usage(pid), time.monotonic() + 60 * minutes
    while time.monotonic() < until_s:
        found += await visits(url, REST_VISITS, rng)
        held.append(await at_rest(url, pid))
        print(f"{sum(found.values()):>5} visits  {held[-1]}  load {os.getloadavg()[0]:.1f}", flush=True)
    counted = await meters(url)
    late = {"late": round(counted.get("late_frames", 0) / max(1.0, counted.get("frames", 1)), 5)}
    return {"minutes": minutes, "visits": dict(found), "held": held, "counted": counted, **late, "cores": usage.cores()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=60.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    card = {**machine_card(torch.device("cpu")), "load": round(os.getloadavg()[0], 2), "priority": priority()}
    options = ("--mind", "none", "--linger", "1", "--capacity", str(SEATS))
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), *options) as (url, pid):
        found = asyncio.run(soak(url.rstrip("/"), pid, args.minutes))
        ends = re.findall(r"Traceback|ERROR", (Path(folder) / "serve.log").read_text())
    print(json.dumps({"bench": "soak", "card": card, **found, "errors": len(ends)}))


if __name__ == "__main__":
    main()
