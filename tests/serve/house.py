"""A server on a loopback port over scripted sessions, for tests of its doors."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from aiohttp import ClientSession, web

from streamdiff.conversation.ear import ScriptedEar
from streamdiff.conversation.turn import Event as Heard
from streamdiff.serve.calls import Calls, TalkFactory
from streamdiff.serve.cast import Cast
from streamdiff.serve.gate import Denied, Gate, Guest, Loopback
from streamdiff.serve.leases import Leases, Terms
from streamdiff.serve.server import Door, House, application
from streamdiff.session import Session
from tests.serve.scripted import ScriptedStream

SECRET = "ann-secret-of-letters.and_signs-0123"


class Password:
    """A gate with one guest; the secret looks like a token."""

    def admit(self, token: str | None) -> Guest:
        if not hmac.compare_digest(token or "", SECRET):
            raise Denied("no such token")
        return Guest("ann")


class Engine:
    """Makes scripted sessions and remembers them."""

    def __init__(self, **options: float) -> None:
        self.streams: list[ScriptedStream] = []
        self._options = options

    def open(self) -> Session:
        self.streams.append(ScriptedStream(**self._options))  # type: ignore[arg-type]
        return Session(self.streams[-1])


class Ear(ScriptedEar):
    """Hears one turn: a voice at the first sound, its end with the first silence."""

    def __init__(self) -> None:
        super().__init__((), ["what time is it"])
        self._spoke = self._paused = False
        self.num_heard = 0

    def another(self) -> Ear:
        return Ear()

    def hear(self, samples: Any, rate_hz: int) -> list[Heard]:
        self.num_heard += len(samples)
        assert rate_hz == 24_000
        if not self._spoke:
            self._spoke = True
            return [Heard.ONSET, Heard.VOICED]
        if not np.any(samples) and not self._paused:
            self._paused = True
            return [Heard.PAUSE]
        return []


@dataclass
class Place:
    """A server that runs."""

    house: House
    engine: Engine
    http: ClientSession
    port: int

    @property
    def base(self) -> str:
        """The URL before ``/v1``."""
        return f"http://127.0.0.1:{self.port}"


Scene = Callable[[Place], Awaitable[None]]


def play(
    scene: Scene,
    *doors: Door,
    gate: Gate | None = None,
    talk: TalkFactory | None = None,
    terms: dict[str, float] | None = None,
    avatars: Sequence[str] = ("demo", "other"),
    **options: float,
) -> Engine:
    """Run a scene against a server of its own, with these doors."""
    engine = Engine(**options)

    async def main() -> None:
        with Cast(dict.fromkeys(avatars, engine)) as cast:
            calls = Calls(Leases(Terms(**{"capacity": 2, **(terms or {})})), cast.open, talk=talk)  # type: ignore[arg-type]
            house = House(calls=calls, cast=cast, gate=gate or Loopback())
            runner = web.AppRunner(application(house, doors), access_log=None, shutdown_timeout=2.0)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            port = runner.addresses[0][1]
            try:
                async with calls, ClientSession(f"http://127.0.0.1:{port}") as http:
                    await asyncio.wait_for(scene(Place(house, engine, http, port)), 120)
                    await calls.drain(0.0)
                    await house.aclose()
            finally:
                await runner.cleanup()

    asyncio.run(main())
    return engine
