"""One of several processes that share a port: it listens on a socket of its own, behind `front`."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web

from streamdiff.errors import ConfigError
from streamdiff.serve.gate import Denied
from streamdiff.serve.server import HOUSE, admits_itself, serve
from streamdiff.serve.simli import TICKETS

SECRET_FIELD = "X-Streamdiff-Front"
SEATS, METERS, TICKET = "/internal/seats", "/internal/metrics", "/internal/ticket"
_SECRET: web.AppKey[str] = web.AppKey("secret", str)


@dataclass(frozen=True, slots=True)
class Link:
    """A worker's ties to the process in front."""

    slot: int
    generation: int
    """Counts the processes that this slot has had."""
    path: str
    """Of its socket."""
    secret: str
    """Only the process in front knows it: it is told on standard input, whose end means that it has gone."""

    @classmethod
    def read(cls, words: str) -> Link:
        """From ``SLOT:GENERATION:PATH`` and a line of standard input."""
        slot, _, rest = words.partition(":")
        generation, _, path = rest.partition(":")
        secret = sys.stdin.readline().strip()
        if not (slot.isdigit() and generation.isdigit() and path and secret):
            raise ConfigError("--worker-of is what a server with --workers gives its workers; leave it out")
        return cls(int(slot), int(generation), path, secret)

    @property
    def prefix(self) -> str:
        """Begins the names that only this process knows."""
        return f"w{self.slot}g{self.generation}."

    def is_up(self, capacity: int, why: str) -> None:
        """Tell the process in front that requests are taken."""
        print(json.dumps({"capacity": capacity, "why": why}), flush=True)  # noqa: T201  this is what its output is for

    async def serve(self, app: web.Application, *, drain_s: float, on_up: Callable[[int], None]) -> None:
        """Serve on the socket until told to stop, or until the process in front has gone."""
        app[_SECRET] = self.secret
        app.router.add_get(SEATS, _seats)
        app.router.add_get(METERS, _meters)
        app.router.add_get(TICKET, _ticket)
        stop, loop = asyncio.Event(), asyncio.get_running_loop()

        def listen() -> None:
            if not os.read(0, 1024):
                loop.remove_reader(0)
                stop.set()

        loop.add_reader(0, listen)
        await serve(app, host="", port=0, path=self.path, drain_s=drain_s, on_up=on_up, stop=stop)


def _check(request: web.Request) -> None:
    if not hmac.compare_digest(request.headers.get(SECRET_FIELD, "").encode(), request.app[_SECRET].encode()):
        raise Denied("not the process in front")


@admits_itself
async def _seats(request: web.Request) -> web.StreamResponse:
    """How many sessions it holds and may hold, and how many of them are one user's."""
    _check(request)
    leases, user = request.app[HOUSE].calls.leases, request.query.get("user", "")
    return web.json_response(
        {
            "capacity": leases.terms.capacity,
            "free": 0 if leases.is_draining else leases.terms.capacity - len(leases.held),
            "of_user": sum(lease.user == user for lease in leases.held),
        }
    )


@admits_itself
async def _ticket(request: web.Request) -> web.StreamResponse:
    """Whom a ticket of Simli's protocol was given to; empty: nobody."""
    _check(request)
    tickets = request.app.get(TICKETS)
    return web.json_response({"user": "" if tickets is None else tickets.user_of(request.query.get("name", ""))})


@admits_itself
async def _meters(request: web.Request) -> web.StreamResponse:
    _check(request)
    return web.Response(body=request.app[HOUSE].calls.meters.text(), content_type="text/plain")
