"""WHEP (draft-ietf-wish-whep): further viewers of a session, with any player that speaks it.

    POST   /v1/sessions/ID/whep          an offer (application/sdp) -> 201, the answer; Location: this viewer
    DELETE /v1/sessions/ID/whep/VIEWER   it leaves

A viewer sees and hears, and says nothing. Trickle ICE and ICE restarts are not done: PATCH is answered with 405, and an
offer holds all its candidates.
"""

from __future__ import annotations

from aiohttp import web
from aiortc import RTCIceServer

from streamdiff.serve.calls import Call
from streamdiff.serve.realtime_calls import SDP, read_offer
from streamdiff.serve.server import HOUSE, guest_of


def whep(app: web.Application) -> None:
    """A `Door`: adds ``/v1/sessions/ID/whep``."""
    app.router.add_post("/v1/sessions/{id}/whep", _watch)
    app.router.add_delete("/v1/sessions/{id}/whep/{viewer}", _leave)


async def _watch(request: web.Request) -> web.StreamResponse:
    house, call = request.app[HOUSE], _call(request)
    peer, answer_sdp = await house.join(call, await read_offer(request), None)
    response = web.Response(body=answer_sdp.encode(), status=201, content_type=SDP)
    response.headers["Location"] = f"/v1/sessions/{call.id}/whep/{peer.id}"
    for server in house.ice_servers:
        response.headers.add("Link", _link(server))
    return response


async def _leave(request: web.Request) -> web.StreamResponse:
    house, call = request.app[HOUSE], _call(request)
    for peer in house.peers.get(call.id, []):
        if peer.id == request.match_info["viewer"] and not peer.is_closed:
            await peer.aclose()
            return web.Response(status=200)
    raise web.HTTPNotFound(reason="There is no such viewer")


def _call(request: web.Request) -> Call:
    try:
        return request.app[HOUSE].call_of(guest_of(request), request.match_info["id"])
    except KeyError:
        raise web.HTTPNotFound(reason="There is no such session") from None


def _link(server: RTCIceServer) -> str:
    """An ICE server as a link header."""
    urls = server.urls if isinstance(server.urls, str) else server.urls[0]
    login = ""
    if server.username and server.credential:
        login = f'; username="{server.username}"; credential="{server.credential}"; credential-type="password"'
    return f'<{urls}>; rel="ice-server"{login}'
