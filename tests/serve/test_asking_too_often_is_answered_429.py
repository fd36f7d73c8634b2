"""Rates: per user and per address, before anything is allocated; and no door opens without a token."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable

import jwt
import pytest
from aiohttp.test_utils import TestClient, TestServer

from streamdiff.errors import ConfigError
from streamdiff.serve import limits as limits_module
from streamdiff.serve.calls import Calls
from streamdiff.serve.cast import Cast
from streamdiff.serve.gate import Denied, Gate, Loopback
from streamdiff.serve.leases import Leases, Terms
from streamdiff.serve.limits import Limits, Rates, TooOften, _network
from streamdiff.serve.media import media
from streamdiff.serve.realtime import realtime
from streamdiff.serve.realtime_calls import realtime_calls
from streamdiff.serve.server import House, application
from streamdiff.serve.simli import simli
from streamdiff.serve.tokens import TokenGate, mint
from streamdiff.serve.whep import whep
from streamdiff.session import Session
from tests.serve.scripted import ScriptedStream

KEY = b"k" * 32


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Engine:
    opened = 0

    def open(self) -> Session:
        self.opened += 1
        return Session(ScriptedStream())


def visit(
    scene: Callable[[TestClient, House], Awaitable[None]], *, gate: Gate | None = None, limits: Limits | None = None
) -> Engine:
    engine = Engine()

    async def main() -> None:
        with Cast({"demo": engine}, load=lambda _: engine) as cast:
            calls = Calls(Leases(Terms(capacity=8)), cast.open)
            house = House(calls=calls, cast=cast, gate=gate or Loopback(), limits=limits)
            app = application(house, [realtime, realtime_calls, whep, media, simli])
            async with calls, TestClient(TestServer(app)) as client:
                await asyncio.wait_for(scene(client, house), 60)
                await house.aclose()

    asyncio.run(main())
    return engine


def test_a_bucket_fills_up_within_a_minute() -> None:
    clock = Clock()
    rates = Rates(6, clock=clock)
    for _ in range(6):
        rates.take("ann", 1)
    with pytest.raises(TooOften, match="in 10 s") as refused:
        rates.take("ann", 1)
    assert (refused.value.status, refused.value.retry_after_s) == (429, 10)
    rates.take("bob", 5)
    with pytest.raises(TooOften, match="in 40 s"):
        rates.take("bob", 5)
    clock.now_s += 10
    rates.take("ann", 1)
    with pytest.raises(TooOften):
        rates.take("ann", 1)
    clock.now_s += 3_600
    for _ in range(6):
        rates.take("ann", 1)
    with pytest.raises(TooOften):
        rates.take("ann", 1)
    rates.take("cid", 50)  # more than a bucket holds: all of it


def test_as_many_are_remembered_as_were_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_module, "_MOST_KEYS", 10)
    rates = Rates(1, clock=Clock())
    for k in range(100):
        rates.take(f"user {k}", 1)
    assert len(rates._left) == 10
    with pytest.raises(TooOften):
        rates.take("user 99", 1)


@pytest.mark.parametrize(
    ("address", "counted"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("proxy.example", ""),
    ],
)
def test_an_address_is_counted_for_whom_it_belongs_to(address: str, counted: str) -> None:
    assert _network(address) == counted


def test_only_a_known_proxy_says_who_somebody_is() -> None:
    def asked(limits: Limits, peer: str, forwarded: str) -> int:
        for k in range(100):
            try:
                limits.knock("POST", "/v1/sessions", peer, forwarded.format(k))
            except TooOften:
                return k
        return 100

    clock = Clock()
    assert asked(Limits(1, clock=clock), "192.0.2.7", "198.51.100.{}") == 4
    assert asked(Limits(1, proxies=["192.0.2.7"], clock=clock), "192.0.2.7", "198.51.100.{}") == 100
    # What a client writes itself stands before what the proxy adds.
    assert asked(Limits(1, proxies=["192.0.2.7"], clock=clock), "192.0.2.7", "198.51.100.{}, 203.0.113.9") == 4
    for wrong in ({"per_minute": 0}, {"per_minute": float("nan")}, {"per_minute": 1, "proxies": ["lb.example"]}):
        with pytest.raises(ConfigError):
            Limits(**wrong)  # type: ignore[arg-type]


def test_a_user_and_an_address_are_told_when_to_come_back() -> None:
    async def scene(client: TestClient, house: House) -> None:
        ann, bob = ({"Authorization": f"Bearer {mint(KEY, user)}"} for user in ("ann", "bob"))
        answers = [await client.post("/v1/sessions", json={}, headers=ann) for _ in range(3)]
        assert [answer.status for answer in answers] == [201, 201, 429]
        assert int(answers[2].headers["Retry-After"]) == 30
        assert (await answers[2].json())["error"]["code"] == "rate_limited"
        assert (await client.post("/v1/sessions", json={}, headers=bob)).status == 201
        assert (await client.get("/v1/realtime", headers=ann)).status == 429
        assert (await client.post("/v1/avatars", data=b"x", headers=ann)).status == 429
        # Eight a minute from one address, whoever they are; then no token is looked at.
        statuses = [(await client.post("/v1/sessions", json={})).status for _ in range(4)]
        assert statuses == [401, 401, 401, 429]
        assert (await client.get("/v1/info", headers=bob)).status == 200
        assert len(house.calls.leases.held) == 3

    assert visit(scene, gate=TokenGate(KEY), limits=Limits(2, clock=Clock())).opened == 3


def test_no_door_opens_without_a_token() -> None:
    """Every route that there is, those of all doors: 401, and nothing is leased or opened."""
    other = mint(b"x" * 32, "ann")
    public = {"/", "/page/{name}", "/healthz", "/readyz"}
    asked: list[str] = []

    async def scene(client: TestClient, house: House) -> None:
        assert client.server is not None
        for route in client.app.router.routes():  # type: ignore[attr-defined]
            path = route.resource.canonical if route.resource else ""
            if path in public:
                continue
            asked.append(path)
            for headers in ({}, {"Authorization": f"Bearer {other}"}, {"Authorization": "Bearer " + "a" * 7_000}):
                socket = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
                socket["Sec-WebSocket-Key"] = "x" * 22 + "=="
                more = socket if path in ("/v1/realtime", "/compose/webrtc/p2p") else {}
                target = path.replace("{id}", "x").replace("{viewer}", "y")
                method = "GET" if route.method == "*" else route.method
                answer = await client.request(method, target, headers={**headers, **more})
                assert answer.status == 401, (method, path)
        assert house.calls.leases.held == ()

    assert visit(scene, gate=TokenGate(KEY)).opened == 0
    assert {"/metrics", "/v1/sessions", "/v1/realtime", "/v1/realtime/calls", "/compose/token"} <= set(asked)
    assert len(asked) >= 14


def test_signatures_of_tokens_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    in_constant_time = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return in_constant_time(a, b)

    monkeypatch.setattr(jwt.algorithms.hmac, "compare_digest", compare)
    gate = TokenGate(KEY)
    assert gate.admit(mint(KEY, "ann")).user == "ann"
    with pytest.raises(Denied):
        gate.admit(mint(b"x" * 32, "ann"))
    assert [a == b for a, b in compared] == [True, False]
