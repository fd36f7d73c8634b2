"""The HTTP side: a page, sessions and their offers, health, metrics. Doors add their routes.

    GET  /                            the page
    GET  /healthz /readyz /metrics    alive; takes sessions; Prometheus
    GET  /v1/info                     what this server holds and can do
    POST /v1/avatars                  a photograph -> an avatar of one's own
    POST /v1/sessions                 lease a seat and begin a session: 201, or 503 and 429 with Retry-After
    POST /v1/sessions/ID/offer        WebRTC: {"sdp": offer} -> {"sdp": answer}
    GET, DELETE /v1/sessions/ID

A request is admitted by the gate before anything is read or allocated for it; whoever has no valid token gets 401.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from aiohttp import web
from aiortc import RTCIceServer

from streamdiff.errors import InputError, StreamdiffError, Unsupported
from streamdiff.serve.calls import Call, Calls
from streamdiff.serve.cast import MAX_UPLOAD_BYTES, Cast
from streamdiff.serve.gate import Denied, Gate, Guest, Loopback, bearer, is_loopback
from streamdiff.serve.leases import Refused
from streamdiff.serve.limits import Limits, TooOften
from streamdiff.serve.protocol import Ending
from streamdiff.serve.webrtc import Peer, Plain, Speak
from streamdiff.trust.consent import ConsentError

logger = logging.getLogger(__name__)

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]

_PUBLIC = ("/", "/healthz", "/readyz")
_MAX_JSON_BYTES = 131_072
_MAX_PEERS = 16
"""Viewers of one session."""
_MAX_WAIT_S = 30.0
_KEEPALIVE_S = 20.0
"""A connection that says nothing for so long is closed."""
_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _CSP,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(self)",
    "Cache-Control": "no-store",
}
_SHARED = {"Access-Control-Expose-Headers": "Location, Link, Retry-After", "Vary": "Origin"}
_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST, DELETE",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, X-Consent",
    "Access-Control-Max-Age": "600",
}
"""For pages that may call (`House.origins`)."""
_PAGE = {
    "page.js": "text/javascript",
    "packets.js": "text/javascript",
    "mic.js": "text/javascript",
    "page.css": "text/css",
    "icon.svg": "image/svg+xml",
}


@dataclass(slots=True, kw_only=True)
class House:
    """What every door is given."""

    calls: Calls
    cast: Cast
    gate: Gate = field(default_factory=Loopback)
    host: str = "127.0.0.1"
    ice_servers: Sequence[RTCIceServer] = ()
    origins: frozenset[str] = frozenset()
    """Other pages that may call, as ``https://example.org``."""
    peers: dict[str, list[Peer]] = field(default_factory=dict[str, list[Peer]])
    mind: str = ""
    """Who answers; empty: texts are read aloud."""
    limits: Limits | None = None
    """How often somebody may begin a session; None: as often as they like."""

    async def begin(self, guest: Guest, *, avatar: str = "", wait_s: float = 0.0) -> Call:
        """Lease and open a session for a guest. Errors as `Calls.open`."""
        owner = self.cast.owner(avatar)
        if (owner is not None and owner != guest.user) or (owner is None and not self._may_see(guest, avatar)):
            raise InputError(f"there is no avatar {avatar[:40]!r} for you; known: {', '.join(self.cast.names)}")
        return await self.calls.open(guest.user, avatar=avatar, priority=guest.priority, wait_s=wait_s)

    def call_of(self, guest: Guest, call_id: str) -> Call:
        """The guest's call with this id. KeyError: there is none."""
        call = self.calls.find(call_id)
        if call is None or call.lease.user != guest.user:
            raise KeyError(call_id)
        return call

    async def connect(self, call: Call, offer_sdp: str) -> str:
        """Answer a WebRTC offer for a call. Errors as `join`."""
        return (await self.join(call, offer_sdp, Plain))[1]

    async def join(self, call: Call, offer_sdp: str, speak: Speak | None) -> tuple[Peer, str]:
        """A new viewer of a call, and the answer to its offer.

        ``speak``: what is spoken on its data channel; None: it only watches. Errors as `Peer.answer`; Refused: too many
        viewers.
        """
        peers = self.peers[call.id] = [peer for peer in self.peers.get(call.id, []) if not peer.is_closed]
        if len(peers) >= _MAX_PEERS:
            raise Refused(f"this session has {_MAX_PEERS} viewers already", retry_after_s=10)
        peer = Peer(call, ice_servers=self.ice_servers, speak=speak)
        peers.append(peer)
        return peer, await peer.answer(offer_sdp)

    def forget_peers(self) -> None:
        """Drop the connections of calls that are over."""
        for call_id in [known for known in self.peers if self.calls.find(known) is None]:
            if all(peer.is_closed for peer in self.peers[call_id]):
                del self.peers[call_id]

    async def aclose(self) -> None:
        """Close all connections: aiohttp would wait for ever while one stands."""
        await asyncio.gather(*(peer.aclose() for peers in self.peers.values() for peer in peers))
        self.peers.clear()

    def _may_see(self, guest: Guest, avatar: str) -> bool:
        return guest.may_see(avatar or self.cast.names[0])


HOUSE: web.AppKey[House] = web.AppKey("house", House)
GUEST: web.RequestKey[Guest] = web.RequestKey("guest", Guest)
Door: TypeAlias = Callable[[web.Application], None]
"""Adds the routes of one door; ``app[HOUSE]`` is there. A handler with the attribute ``admits_itself`` is not asked for
a token in a header: it must do that itself, before anything else.
"""


def admits_itself(handler: Handler) -> Handler:
    """Mark a handler that takes its token from elsewhere than the Authorization header."""
    handler.admits_itself = True  # type: ignore[attr-defined]
    return handler


def admit(request: web.Request, token: str | None) -> Guest:
    """Who comes with this token. Denied: nobody; TooOften: they do not so soon."""
    house = request.app[HOUSE]
    guest = house.gate.admit(token)
    if house.limits is not None:
        house.limits.enter(request.method, request.path, guest.user)
    return guest


def guest_of(request: web.Request) -> Guest:
    """Who was admitted with this request."""
    return request[GUEST]


def application(house: House, doors: Sequence[Door] = ()) -> web.Application:
    """The whole server as an aiohttp application."""
    app = web.Application(middlewares=[_guarded, _admitted], client_max_size=MAX_UPLOAD_BYTES + 1024)
    app[HOUSE] = house
    add = app.router
    add.add_get("/", _page)
    add.add_get("/page/{name}", _page_file)
    add.add_get("/healthz", _health)
    add.add_get("/readyz", _ready)
    add.add_get("/metrics", _metrics)
    add.add_get("/v1/info", _info)
    add.add_post("/v1/avatars", _bring)
    add.add_post("/v1/sessions", _begin)
    add.add_get("/v1/sessions/{id}", _look)
    add.add_delete("/v1/sessions/{id}", _leave)
    add.add_post("/v1/sessions/{id}/offer", _offer)
    for door in doors:
        door(app)
    return app


async def serve(
    app: web.Application,
    *,
    host: str,
    port: int,
    path: str | None = None,
    drain_s: float = 10.0,
    on_up: Callable[[int], None] | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve until SIGTERM, SIGINT or ``stop``; then let every face finish its sentence, for at most ``drain_s``.

    ``path``: listen on this Unix socket instead. ``on_up``: told the port once requests are taken (port 0: any that is
    free).
    """
    house = app[HOUSE]
    stop = stop or asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):  # not the main thread, or Windows
            loop.add_signal_handler(number, stop.set)
    runner = web.AppRunner(app, access_log=None, keepalive_timeout=_KEEPALIVE_S, shutdown_timeout=2.0)
    await runner.setup()
    try:
        async with house.calls:
            try:
                tcp = web.TCPSite(runner, host, port, backlog=512) if path is None else None
                await (tcp or web.UnixSite(runner, path or "", backlog=512)).start()
            except OSError as error:
                raise InputError(f"cannot listen on {host}:{port}: {error.strerror}; try another --port") from error
            if on_up is not None:
                on_up(0 if tcp is None else runner.addresses[0][1])
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), 5.0)
                house.forget_peers()
            logger.info("draining: %d sessions", len(house.calls.all))
            await house.calls.drain(drain_s)
            await asyncio.sleep(0.2)  # the last events are on their way
            await house.aclose()
    finally:
        await runner.cleanup()


@web.middleware
async def _guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn errors into answers, and refuse what another page makes a browser send."""
    try:
        _check_origin(request)
        response = _preflight(request) or await handler(request)
    except Refused as error:
        if isinstance(error, TooOften):
            request.app[HOUSE].calls.meters.refused.labels(error.code).inc()
        response = _error(error.status, error.code, str(error))
        response.headers["Retry-After"] = str(error.retry_after_s)
    except Denied:
        request.app[HOUSE].calls.meters.denied.inc()
        response = _error(401, "unauthorized", "a valid bearer token is needed")
        response.headers["WWW-Authenticate"] = "Bearer"
    except ConsentError as error:
        response = _error(403, "no_consent", str(error))
    except (InputError, Unsupported) as error:
        response = _error(400, "bad_request", str(error))
    except StreamdiffError as error:
        logger.exception("%s %s failed", request.method, request.path)
        response = _error(500, "failed", str(error))
    except web.HTTPException as error:
        if error.status < 400:
            raise
        response = _error(error.status, (error.reason or "error").lower().replace(" ", "_"), error.reason)
        response.headers.update({k: v for k, v in error.headers.items() if k == "Allow"})
    if not response.prepared:
        response.headers.update(_HEADERS)
        if (origin := request.headers.get("Origin")) in request.app[HOUSE].origins:
            response.headers.update({**_SHARED, "Access-Control-Allow-Origin": origin or ""})
    return response


def _preflight(request: web.Request) -> web.Response | None:
    """The answer to a browser that asks whether another page may send a request (CORS); None: it does not ask that.

    Nobody is admitted by it, and nothing done: a preflight brings no token.
    """
    asks = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
    if not asks or request.headers.get("Origin") not in request.app[HOUSE].origins:
        return None
    return web.Response(status=204, headers=_PREFLIGHT)


@web.middleware
async def _admitted(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Ask the gate before anything is read, and before that whether this address has asked too often."""
    if (limits := request.app[HOUSE].limits) is not None:
        forwarded = ",".join(request.headers.getall("X-Forwarded-For", ()))
        limits.knock(request.method, request.path, request.remote or "", forwarded)
    route = request.match_info.handler
    is_public = request.path in _PUBLIC or request.path.startswith("/page/")
    if not is_public and not getattr(route, "admits_itself", False):
        request[GUEST] = admit(request, bearer(request.headers.get("Authorization")))
    return await handler(request)


def _check_origin(request: web.Request) -> None:
    """Refuse pages of other sites, and names that were bent to point at this machine (DNS rebinding)."""
    house = request.app[HOUSE]
    asked = urlsplit("//" + request.headers.get("Host", ""))
    if is_loopback(house.host) and not is_loopback(asked.hostname or ""):
        raise web.HTTPForbidden(reason="This server answers to localhost only")
    origin = request.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc != asked.netloc and origin not in house.origins:
        raise web.HTTPForbidden(reason="Requests from other pages are not answered")


def _error(status: int, code: str, message: str | None) -> web.Response:
    return web.json_response({"error": {"code": code, "message": message or code}}, status=status)


async def _json(request: web.Request, *known: str) -> Mapping[str, Any]:
    """The body as a JSON object with no other fields than these.

    Raises:
        InputError: it is none.
    """
    if (request.content_length or 0) > _MAX_JSON_BYTES:
        raise InputError(f"a body of {request.content_length} bytes; at most {_MAX_JSON_BYTES} are read")
    try:
        async with asyncio.timeout(10.0):
            raw = await request.content.read(_MAX_JSON_BYTES + 1)
        while len(raw) <= _MAX_JSON_BYTES and not request.content.at_eof():
            async with asyncio.timeout(10.0):
                raw += await request.content.readany()
        body = json.loads(raw) if raw else {}
    except (ValueError, RecursionError, TimeoutError):
        raise InputError("the body is no JSON, or it never came") from None
    if len(raw) > _MAX_JSON_BYTES or not isinstance(body, dict) or set(body) - set(known):
        raise InputError(f"the body must be a JSON object with no other fields than {', '.join(known)}")
    return body


async def _page(request: web.Request) -> web.StreamResponse:
    del request
    return web.Response(body=_file("index.html"), content_type="text/html", charset="utf-8")


async def _page_file(request: web.Request) -> web.StreamResponse:
    name = request.match_info["name"]
    if name not in _PAGE:
        raise web.HTTPNotFound
    return web.Response(body=_file(name), content_type=_PAGE[name], charset="utf-8")


def _file(name: str) -> bytes:
    return (files("streamdiff.serve") / "page" / name).read_bytes()


async def _health(request: web.Request) -> web.StreamResponse:
    del request
    return web.json_response({"status": "alive"})


async def _ready(request: web.Request) -> web.StreamResponse:
    leases = request.app[HOUSE].calls.leases
    free = leases.terms.capacity - len(leases.held)
    status = 503 if leases.is_draining else 200
    body = {"status": "draining" if leases.is_draining else "ready", "capacity": leases.terms.capacity, "free": free}
    return web.json_response(body, status=status)


async def _metrics(request: web.Request) -> web.StreamResponse:
    return web.Response(body=request.app[HOUSE].calls.meters.text(), content_type="text/plain")


async def _info(request: web.Request) -> web.StreamResponse:
    house, guest = request.app[HOUSE], guest_of(request)
    terms = house.calls.leases.terms
    return web.json_response(
        {
            "capacity": terms.capacity,
            "free": house.calls.leases.num_free,
            "avatars": [name for name in house.cast.names if guest.may_see(name)],
            "takes_photos": house.cast.takes_photos,
            "mind": house.mind,
            "idle_s": terms.idle_s,
            "lifetime_s": terms.lifetime_s,
            "ice_servers": [
                {"urls": s.urls, "username": s.username, "credential": s.credential} for s in house.ice_servers
            ],
        }
    )


async def _bring(request: web.Request) -> web.StreamResponse:
    house, guest = request.app[HOUSE], guest_of(request)
    if request.headers.get("X-Consent") != "yes":
        raise InputError("say that the person in the photograph agrees: send the header X-Consent: yes")
    if (request.content_length or 0) > MAX_UPLOAD_BYTES:
        raise InputError(f"a photograph may have {MAX_UPLOAD_BYTES // 10**6} MB")
    try:
        async with asyncio.timeout(30.0):
            photo = await request.read()
    except TimeoutError:
        raise InputError("the photograph did not come in 30 s") from None
    return web.json_response({"avatar": await house.cast.bring(photo, guest.user)}, status=201)


async def _begin(request: web.Request) -> web.StreamResponse:
    house = request.app[HOUSE]
    body = await _json(request, "avatar", "wait_s")
    avatar, wait_s = body.get("avatar", ""), body.get("wait_s", 0)
    if not isinstance(avatar, str) or type(wait_s) not in (int, float) or not 0 <= wait_s <= _MAX_WAIT_S:
        raise InputError(f"avatar must be a name and wait_s a number from 0 to {_MAX_WAIT_S:g}")
    call = await house.begin(guest_of(request), avatar=avatar, wait_s=wait_s)
    headers = {"Location": f"/v1/sessions/{call.id}"}
    return web.json_response(_state(call), status=201, headers=headers)


async def _look(request: web.Request) -> web.StreamResponse:
    return web.json_response(_state(_call(request)))


async def _leave(request: web.Request) -> web.StreamResponse:
    await request.app[HOUSE].calls.end(_call(request), Ending.LEFT)
    return web.Response(status=204)


async def _offer(request: web.Request) -> web.StreamResponse:
    call = _call(request)
    offer_sdp = (await _json(request, "sdp")).get("sdp")
    if not isinstance(offer_sdp, str):
        raise InputError("sdp must be the text of an offer")
    return web.json_response({"sdp": await request.app[HOUSE].connect(call, offer_sdp)})


def _call(request: web.Request) -> Call:
    try:
        return request.app[HOUSE].call_of(guest_of(request), request.match_info["id"])
    except KeyError:
        raise web.HTTPNotFound(reason="There is no such session") from None


def _state(call: Call) -> dict[str, object]:
    ready = call.ready
    return {
        "id": call.id,
        "fps": ready.fps,
        "rate_hz": ready.rate_hz,
        "width": ready.width,
        "height": ready.height,
        "can": ready.can,
        "hears": ready.hears,
        "mind": ready.mind,
        "viewers": call.pump.num_viewers,
        "codec": call.pump.codec,
    }
