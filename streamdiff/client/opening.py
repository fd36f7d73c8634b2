"""Opening a connection to a server, and what can be wrong with that, each with its own error."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from urllib.parse import urlencode, urlsplit

import aiohttp

from streamdiff.errors import InputError, StreamdiffError

MAX_MESSAGE_BYTES = 1 << 23
"""A keyframe of 4096x4096 is smaller."""
_HEARTBEAT_S = 15.0
"""A server that does not answer a ping within half of it is lost."""


class NoServer(StreamdiffError, ConnectionError):  # noqa: N818  it says what happened
    """Nobody answers at this address, or somebody who is no `streamdiff serve`."""


class Denied(StreamdiffError, PermissionError):  # noqa: N818
    """The server wants a valid token, or may not show this face."""


class Busy(StreamdiffError, RuntimeError):  # noqa: N818
    """No seat is free, or this user holds too many or asks too often. ``retry_after_s``: seconds to wait."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def address(url: str, **query: str | None) -> str:
    """Of the Realtime door of a server.

    >>> address("http://127.0.0.1:8100/", avatar="ann lee", call_id=None)
    'http://127.0.0.1:8100/v1/realtime?avatar=ann+lee'

    Raises:
        InputError: no URL of a server.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query:
        raise InputError(f"a server's URL looks like http://127.0.0.1:8100, got {url[:80]!r}")
    base = url.rstrip("/").removesuffix("/v1")
    asked = urlencode({key: value for key, value in query.items() if value})
    return f"{base}/v1/realtime" + (f"?{asked}" if asked else "")


async def dial(
    http: aiohttp.ClientSession, where: str, *, token: str | None, timeout_s: float
) -> aiohttp.ClientWebSocketResponse:
    """A WebSocket to the server at this `address`.

    Raises:
        NoServer, Denied, Busy: see there. InputError: the server does not know what was asked for.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        async with asyncio.timeout(timeout_s):
            return await http.ws_connect(
                where, headers=headers, max_msg_size=MAX_MESSAGE_BYTES, heartbeat=_HEARTBEAT_S, autoclose=True
            )
    except aiohttp.WSServerHandshakeError as error:
        raise _refusal(error.status, error.headers or {}, where) from None
    except (aiohttp.ClientError, OSError) as error:
        message = f"no server answers at {where}: {error}; start one with `streamdiff serve`"
        if isinstance(error, TimeoutError):
            message = f"no server answered at {where} in {timeout_s:g} s"
        raise NoServer(message) from error


def _refusal(status: int, headers: Mapping[str, str], where: str) -> StreamdiffError:
    if status == 401:
        return Denied("the server wants a valid token: connect(url, token=...); `streamdiff serve --mint` makes one")
    if status == 403:
        return Denied("the server may not show this face to you: no consent, or it does not answer to this address")
    if status in (429, 503):
        after = headers.get("Retry-After", "")
        after_s = int(after) if after.isdecimal() and len(after) < 6 else 10
        what = "this user has too many sessions, or asks too often" if status == 429 else "all sessions are taken"
        return Busy(f"{what}; ask again in {after_s} s", retry_after_s=after_s)
    if status == 400:
        return InputError(f"the server has no such avatar for you: {where}")
    if status == 404 and "call_id=" in where:
        return InputError("the server knows no such session (any more); begin a new one")
    return NoServer(f"{where} answers with HTTP {status}: is it a `streamdiff serve` of this version?")
