"""Who may come in. A gate is asked before anything is allocated for a request.

`Loopback` lets everybody in who sits at this machine; on any other address the server starts only with a gate that
checks tokens.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Protocol

from streamdiff.errors import StreamdiffError


class Denied(StreamdiffError, PermissionError):  # noqa: N818  it says what happened
    """No valid token. Doors answer 401 and say nothing more."""


@dataclass(frozen=True, slots=True)
class Guest:
    """Who came in."""

    user: str
    """Whom sessions are counted for."""
    priority: int = 0
    avatars: frozenset[str] | None = None
    """The avatars that may be shown to them; None: all."""

    def may_see(self, avatar: str) -> bool:
        """Whether this avatar may be shown to them."""
        return self.avatars is None or avatar in self.avatars


class Gate(Protocol):
    """Decides who comes in."""

    def admit(self, token: str | None) -> Guest:
        """The guest with this bearer token (None: the request has none).

        Raises:
            Denied: no valid token; takes as long for one wrong token as for another.
        """
        ...


class Loopback:
    """Everybody on this machine is one and the same guest."""

    def admit(self, token: str | None) -> Guest:
        """Of `Gate`."""
        del token
        return Guest("local")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0"), is_loopback("[::1]")
    (True, True, False, True)
    """
    host = host.removeprefix("[").removesuffix("]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bearer(header: str | None) -> str | None:
    """The token in an Authorization header.

    >>> bearer("Bearer abc"), bearer("Basic abc"), bearer(None)
    ('abc', None, None)
    """
    scheme, _, token = (header or "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None
