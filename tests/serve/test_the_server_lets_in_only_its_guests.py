"""Over HTTP: who is let in, what is refused and how, and that nothing is allocated before."""

from __future__ import annotations

import asyncio
import hmac
import io
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import ClientSession
from aiohttp.test_utils import TestClient, TestServer
from PIL import Image

from streamdiff.errors import InputError
from streamdiff.serve.calls import Calls
from streamdiff.serve.cast import Cast, check_photo
from streamdiff.serve.gate import Denied, Gate, Guest, Loopback
from streamdiff.serve.leases import Leases, Terms
from streamdiff.serve.server import House, application, serve
from streamdiff.session import Session
from tests.serve.scripted import ScriptedStream

Visit = Callable[[TestClient, House], Awaitable[None]]


class Scripted:
    """An engine of scripted sessions."""

    def __init__(self) -> None:
        self.streams: list[ScriptedStream] = []

    def open(self) -> Session:
        self.streams.append(ScriptedStream())
        return Session(self.streams[-1])


class Passwords:
    """A gate with two guests."""

    def admit(self, token: str | None) -> Guest:
        for user in ("ann", "bob"):
            if hmac.compare_digest(token or "", f"{user}-secret"):
                return Guest(user, avatars=frozenset({"demo"}) if user == "bob" else None)
        raise Denied("no such token")


def visit(scene: Visit, *, gate: Gate | None = None, photos: bool = False, **terms: float) -> Scripted:
    """Run a scene against a server of its own."""
    engine = Scripted()

    async def main() -> None:
        load = (lambda _: engine) if photos else None
        with Cast({"demo": engine, "other": engine}, load=load) as cast:
            calls = Calls(Leases(Terms(**{"capacity": 2, **terms})), cast.open)  # type: ignore[arg-type]
            house = House(calls=calls, cast=cast, gate=gate or Loopback())
            async with calls, TestClient(TestServer(application(house))) as client:
                await asyncio.wait_for(scene(client, house), 60)
                await house.aclose()

    asyncio.run(main())
    return engine


def test_a_session_is_begun_looked_at_and_ended() -> None:
    async def scene(client: TestClient, house: House) -> None:
        answer = await client.post("/v1/sessions", json={"avatar": "demo"})
        assert answer.status == 201
        session = await answer.json()
        assert answer.headers["Location"] == f"/v1/sessions/{session['id']}"
        assert (session["fps"], session["width"], session["viewers"]) == (25, 32, 0)
        assert (await client.get(answer.headers["Location"])).status == 200
        assert (await client.delete(answer.headers["Location"])).status == 204
        assert (await client.get(answer.headers["Location"])).status == 404
        assert house.calls.leases.held == ()

    assert visit(scene).streams[0].closed


def test_the_session_after_the_last_gets_503_and_when_to_ask_again() -> None:
    async def scene(client: TestClient, house: House) -> None:
        for _ in range(2):
            assert (await client.post("/v1/sessions")).status == 201
        answer = await client.post("/v1/sessions")
        assert answer.status == 503
        assert 1 <= int(answer.headers["Retry-After"]) <= 60
        assert (await answer.json())["error"]["code"] == "capacity_exhausted"
        ready = await (await client.get("/readyz")).json()
        assert ready == {"status": "ready", "capacity": 2, "free": 0}

    assert len(visit(scene).streams) == 2


def test_a_user_with_too_many_sessions_gets_429() -> None:
    async def scene(client: TestClient, house: House) -> None:
        assert (await client.post("/v1/sessions")).status == 201
        assert (await client.post("/v1/sessions")).status == 429

    visit(scene, per_user=1)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/info"),
        ("GET", "/metrics"),
        ("POST", "/v1/sessions"),
        ("GET", "/v1/sessions/x"),
        ("DELETE", "/v1/sessions/x"),
        ("POST", "/v1/sessions/x/offer"),
        ("POST", "/v1/avatars"),
        ("POST", "/v1/nothing"),
    ],
)
def test_without_a_token_every_door_says_401_and_no_more(method: str, path: str) -> None:
    async def scene(client: TestClient, house: House) -> None:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic ann-secret"}):
            answer = await client.request(method, path, headers=headers, data=b"\0" * 1000)
            assert answer.status == 401
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert (await answer.json())["error"]["code"] == "unauthorized"
        assert house.calls.all == ()
        for path_ in ("/", "/healthz", "/readyz", "/page/page.js"):
            assert (await client.get(path_)).status == 200

    assert visit(scene, gate=Passwords()).streams == []


def test_guests_see_their_own_sessions_and_avatars_only() -> None:
    async def scene(client: TestClient, house: House) -> None:
        ann, bob = ({"Authorization": f"Bearer {user}-secret"} for user in ("ann", "bob"))
        theirs = (await client.post("/v1/sessions", headers=ann)).headers["Location"]
        assert (await client.get(theirs, headers=ann)).status == 200
        assert (await client.get(theirs, headers=bob)).status == 404
        assert (await client.delete(theirs, headers=bob)).status == 404
        assert (await (await client.get("/v1/info", headers=bob)).json())["avatars"] == ["demo"]
        assert (await client.post("/v1/sessions", headers=bob, json={"avatar": "other"})).status == 400

    visit(scene, gate=Passwords())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:80"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 201),
        ({}, 201),
    ],
)
def test_pages_of_other_sites_cannot_use_a_server_on_this_machine(headers: dict[str, str], status: int) -> None:
    async def scene(client: TestClient, house: House) -> None:
        assert (await client.post("/v1/sessions", headers=headers)).status == status

    visit(scene)


@pytest.mark.parametrize(
    "body", [b"[]", b"{", b'{"avatar": 1}', b'{"wait_s": 1e9}', b'{"x": 1}', b'{"avatar": "nobody"}', b"[" * 100_000]
)
def test_a_body_that_is_none_of_ours_is_a_sentence_and_not_a_session(body: bytes) -> None:
    async def scene(client: TestClient, house: House) -> None:
        answer = await client.post("/v1/sessions", data=body)
        assert answer.status == 400
        assert (await answer.json())["error"]["message"]
        assert house.calls.leases.held == ()

    assert visit(scene).streams == []


def test_an_offer_that_is_none_is_refused_and_the_session_lives() -> None:
    async def scene(client: TestClient, house: House) -> None:
        path = (await client.post("/v1/sessions")).headers["Location"]
        for sdp in ("", "v=0", "\0" * 50, "v=0\r\no=- 0 0 IN IP4 0.0.0.0\r\ns=-\r\nt=0 0\r\nm=video x y z\r\n"):
            answer = await client.post(f"{path}/offer", json={"sdp": sdp})
            assert answer.status == 400, await answer.text()
        assert (await client.post(f"{path}/offer", json={"sdp": "x" * 200_000})).status == 400
        assert (await client.get(path)).status == 200

    visit(scene)


def test_the_page_may_load_nothing_from_elsewhere() -> None:
    async def scene(client: TestClient, house: House) -> None:
        answer = await client.get("/")
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        text = await answer.text()
        assert "style=" not in text
        assert "onclick" not in text
        assert "<script>" not in text
        for name in ("../server.py", "%2e%2e/server.py", "index.html", ""):
            assert (await client.get(f"/page/{name}")).status == 404

    visit(scene)


def test_metrics_are_what_prometheus_reads() -> None:
    async def scene(client: TestClient, house: House) -> None:
        await client.post("/v1/sessions")
        text = await (await client.get("/metrics")).text()
        assert "streamdiff_sessions 1.0" in text
        assert "streamdiff_capacity 2.0" in text

    visit(scene)


def photo(width: int = 200, height: int = 200, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"GIF89a" + bytes(50), "give a JPEG"),
        (b"", "give a JPEG"),
        (photo(kind="BMP"), "give a JPEG"),
        (photo()[:40], "give a JPEG"),
        (photo(40, 400), "64 pixels a side"),
        (photo(8_000, 4_000), "24 megapixels"),
        (bytes(10_000_001), "10 MB"),
    ],
)
def test_a_file_that_is_no_photograph_is_refused_before_it_is_decoded(data: bytes, says: str) -> None:
    with pytest.raises(InputError, match=says):
        check_photo(data)


def test_a_photograph_needs_consent_and_belongs_to_its_user(monkeypatch: pytest.MonkeyPatch) -> None:
    async def create(source: object, bundle: object) -> None:
        bundle.write_bytes(source.read_bytes())  # type: ignore[attr-defined]

    monkeypatch.setattr("streamdiff.serve.cast._create", create)

    async def scene(client: TestClient, house: House) -> None:
        ann, bob = ({"Authorization": f"Bearer {user}-secret"} for user in ("ann", "bob"))
        refused = await client.post("/v1/avatars", headers=ann, data=photo())
        assert refused.status == 400
        assert "agrees" in (await refused.json())["error"]["message"]
        brought = await client.post("/v1/avatars", headers=ann | {"X-Consent": "yes"}, data=photo())
        assert brought.status == 201
        avatar = (await brought.json())["avatar"]
        assert avatar not in (await (await client.get("/v1/info", headers=ann)).json())["avatars"]
        assert (await client.post("/v1/sessions", headers=bob, json={"avatar": avatar})).status == 400
        assert (await client.post("/v1/sessions", headers=ann, json={"avatar": avatar})).status == 201

    visit(scene, gate=Passwords(), photos=True)


@pytest.mark.heavy
def test_a_server_drains_and_then_refuses_connections() -> None:
    async def main() -> None:
        engine = Scripted()
        with Cast({"demo": engine}) as cast:
            house = House(calls=Calls(Leases(Terms(capacity=1)), cast.open), cast=cast)
            stop, up = asyncio.Event(), asyncio.get_running_loop().create_future()
            serving = asyncio.create_task(
                serve(application(house), host="127.0.0.1", port=0, on_up=up.set_result, stop=stop, drain_s=5.0)
            )
            base = f"http://127.0.0.1:{await asyncio.wait_for(up, 5)}"
            async with ClientSession() as http:
                assert (await http.post(f"{base}/v1/sessions")).status == 201
                engine.streams[0].say("some words to end with")
                await asyncio.sleep(0.2)
                stop.set()
                await asyncio.sleep(0.1)
                assert (await http.get(f"{base}/readyz")).status == 503
                assert (await http.get(f"{base}/healthz")).status == 200
                await asyncio.wait_for(serving, 10)
                with pytest.raises(OSError, match=r"Cannot connect|refused"):
                    await http.get(f"{base}/healthz")
        assert engine.streams[0].closed
        assert engine.streams[0].metrics.frames >= 25  # the sentence was heard to its end

    asyncio.run(main())


def test_a_page_that_may_call_is_answered_as_cors_asks_and_no_other() -> None:
    mine, evil = "https://mine.example", "https://evil.example"
    asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}

    async def scene(client: TestClient, house: House) -> None:
        house.origins = frozenset({mine})
        async with client.options("/v1/sessions", headers={"Origin": mine, **asking}) as answer:
            assert (answer.status, await answer.read()) == (204, b"")
            assert answer.headers["Access-Control-Allow-Origin"] == mine
            allowed = {name.strip().lower() for name in answer.headers["Access-Control-Allow-Headers"].split(",")}
            assert {"authorization", "content-type"} <= allowed
            assert "POST" in answer.headers["Access-Control-Allow-Methods"]
        # The request itself: also where it is refused, or the page could not read why.
        for token, status in (("", 401), ("ann-secret", 201)):
            headers = {"Origin": mine, "Authorization": f"Bearer {token}"}
            async with client.post("/v1/sessions", headers=headers) as answer:
                assert answer.status == status
                assert answer.headers["Access-Control-Allow-Origin"] == mine
                assert "Location" in answer.headers["Access-Control-Expose-Headers"]
                assert answer.headers["Vary"] == "Origin"
        assert "Access-Control-Allow-Credentials" not in answer.headers
        for headers in ({"Origin": evil, **asking}, {"Origin": evil}):
            async with client.options("/v1/sessions", headers=headers) as answer:
                assert answer.status == 403
                assert "Access-Control-Allow-Origin" not in answer.headers
        async with client.get("/healthz") as answer:
            assert "Access-Control-Allow-Origin" not in answer.headers

    visit(scene, gate=Passwords())
