"""How often somebody may begin a session or bring a photograph: token buckets, per user and per address.

An address is asked about before a token is checked, a user before a seat is leased or a body is read. Ten thousand of
each are remembered.
"""

from __future__ import annotations

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Final

from streamdiff.errors import ConfigError
from streamdiff.serve.leases import Refused

COSTS: Final = {
    ("POST", "/v1/sessions"): 1.0,
    ("POST", "/v1/realtime/calls"): 1.0,
    ("GET", "/v1/realtime"): 1.0,
    ("POST", "/compose/token"): 1.0,
    ("POST", "/v1/avatars"): 5.0,
}
"""What a request costs that makes something; a photograph keeps a core busy for seconds."""
_ADDRESS_SHARE = 4
"""People behind one address, a company's for one."""
_MOST_KEYS = 10_000


class TooOften(Refused):
    """Asked for again too soon."""

    code = "rate_limited"
    status = 429


class Rates:
    """Buckets of ``per_minute`` tokens, one per key, that fill up within a minute."""

    def __init__(self, per_minute: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = per_minute, clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """By key: tokens left, and when that was."""

    def take(self, key: str, cost: float) -> None:
        """Take so many tokens. TooOften: there are not so many; ``retry_after_s`` says when there will be."""
        now_s = self._clock()
        left, at_s = self._left.pop(key, (self._most, now_s))
        left = min(self._most, left + (now_s - at_s) * self._most / 60)
        cost = min(cost, self._most)
        enough = left >= cost
        self._left[key] = (left - cost if enough else left, now_s)
        while len(self._left) > _MOST_KEYS:
            self._left.popitem(last=False)
        if not enough:
            after_s = max(1, math.ceil((cost - left) * 60 / self._most))
            raise TooOften(f"asked too often; ask again in {after_s} s", retry_after_s=after_s)


class Limits:
    """What one user may begin in a minute, and what one address may.

    Args:
        per_minute: sessions of one user; an address may begin four times as many.
        proxies: addresses of proxies whose ``X-Forwarded-For`` is believed.

    Raises:
        ConfigError: no such rate, or no such address.
    """

    def __init__(
        self, per_minute: float, *, proxies: Collection[str] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not 0 < per_minute < 1e6:
            raise ConfigError(f"a rate is a number of sessions a minute above 0, got {per_minute:g}")
        self._users = Rates(per_minute, clock=clock)
        self._addresses = Rates(_ADDRESS_SHARE * per_minute, clock=clock)
        self._proxies = frozenset(_network(proxy) for proxy in proxies)
        if "" in self._proxies:
            raise ConfigError(f"a proxy is named by its IP address, got {', '.join(proxies)}")

    def knock(self, method: str, path: str, peer: str, forwarded: str) -> None:
        """A request whose user is not known yet; ``forwarded``: its X-Forwarded-For. TooOften: for its address."""
        if cost := COSTS.get((method, path)):
            address = _network(peer)
            if address in self._proxies and forwarded:
                address = _network(forwarded.rpartition(",")[2].strip()) or address
            self._addresses.take(address, cost)

    def enter(self, method: str, path: str, user: str) -> None:
        """The same request, once its user is known. TooOften: for this user."""
        if cost := COSTS.get((method, path)):
            self._users.take(user, cost)


def _network(address: str) -> str:
    """Whom an address is counted for: itself, or of IPv6 its /64, which one customer has; empty: it is none."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return ""
    if isinstance(found, ipaddress.IPv6Address):
        mapped = found.ipv4_mapped
        return str(mapped) if mapped else str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)
