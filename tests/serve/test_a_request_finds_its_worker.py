"""What the process in front reads of a request, and how counters of several processes are added up."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from streamdiff.serve.front import _NAMED
from streamdiff.serve.head import parse_head
from streamdiff.serve.leases import Leases, Terms
from streamdiff.serve.sums import Sums

HEAD = b"GET /v1/sessions/x?a=b HTTP/1.1\r\nHost: h\r\nConnection: keep-alive\r\nX-A:  1 \r\n\r\n"
SOCKET = b"GET /v1/realtime HTTP/1.1\r\nHost: h\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\r\n"


def test_a_request_is_passed_on_for_one_answer() -> None:
    head = parse_head(HEAD)
    assert head is not None
    assert (head.method, head.path, head.get("x-a"), head.body_bytes) == ("GET", "/v1/sessions/x", "1", 0)
    passed = head.passed_on()
    assert passed == b"GET /v1/sessions/x?a=b HTTP/1.1\r\nHost: h\r\nX-A: 1\r\nConnection: close\r\n\r\n"
    socket = parse_head(SOCKET)
    assert socket is not None
    assert socket.upgrades
    assert b"\r\nConnection: Upgrade\r\n" in socket.passed_on()


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n",
        b"GET / HTTP/2\r\n\r\n",
        b"GET  / HTTP/1.1\r\n\r\n",
        b"GET /a b HTTP/1.1\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nA : b\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: b\r\n folded\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: b\nC: d\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01" * 9 + b"\r\n\r\n",
    ],
)
def test_what_two_servers_might_read_differently_is_refused(data: bytes) -> None:
    assert parse_head(data) is None


@settings(max_examples=60)
@given(
    st.one_of(
        st.binary(max_size=300),
        st.lists(
            st.sampled_from([b"GET", b" ", b"/a", b"HTTP/1.1", b"\r\n", b"A:", b"b", b"\n", b"\x00", b"\xff", b":"]),
            max_size=30,
        ).map(b"".join),
        st.lists(st.tuples(st.from_regex(rb"[A-Za-z-]{1,8}", fullmatch=True), st.binary(max_size=12)), max_size=6).map(
            lambda fields: b"GET /a HTTP/1.1\r\n" + b"".join(k + b": " + v + b"\r\n" for k, v in fields)
        ),
    )
)
def test_what_is_passed_on_reads_as_what_came(data: bytes) -> None:
    head = parse_head(data + b"\r\n")
    if head is not None:
        again = parse_head(head.passed_on())
        assert again is not None
        assert (again.method, again.target) == (head.method, head.target)
        hop = (b"connection", b"keep-alive", b"proxy-connection")
        assert again.fields[:-1] == tuple((k, v) for k, v in head.fields if k.lower() not in hop)
        assert head.passed_on().count(b"\r\n") == len(again.fields) + 2


@pytest.mark.parametrize(
    ("size", "read"), [(b"12", 12), (b"-1", None), (b"1_0", None), (b"9" * 20, None), (b"\xb2", None)]
)
def test_the_size_of_a_body_is_a_number(size: bytes, read: int | None) -> None:
    head = parse_head(b"POST / HTTP/1.1\r\nContent-Length: " + size + b"\r\n\r\n")
    assert head is not None
    assert head.body_bytes == read


def test_an_id_says_which_worker_holds_it() -> None:
    lease = Leases(Terms(capacity=1), prefix="w12g3.").acquire("ann")
    for place in (
        f"/v1/sessions/{lease.id}/offer",
        f"/v1/realtime?call_id={lease.id}",
        f'{{"avatar":"brought-{lease.id}"}}',
    ):
        found = _NAMED.search(place.encode())
        assert found is not None
        assert (found[1], found[2]) == (b"12", b"3")
    assert _NAMED.search(b"/v1/sessions/w1g1.short") is None


def counted(opened: int, sessions: int, ms: float) -> str:
    registry = CollectorRegistry()
    Counter("opened", "Opened.", ["reason"], registry=registry).labels("left").inc(opened)
    Gauge("sessions", "Now.", registry=registry).set(sessions)
    Histogram("ms", "Time.", buckets=(10, 100), registry=registry).observe(ms)
    return generate_latest(registry).decode()


def test_counters_add_up_and_never_fall() -> None:
    sums = Sums()
    sums.heard(0, counted(3, 1, 5))
    sums.heard(1, counted(4, 2, 50))
    lines = sums.text().decode().splitlines()
    for line in (
        'opened_total{reason="left"} 7.0',
        "sessions 3.0",
        'ms_bucket{le="10.0"} 1.0',
        "ms_count 2.0",
        "ms_sum 55.0",
    ):
        assert line in lines
    sums.lost(0)
    lines = sums.text().decode().splitlines()
    assert 'opened_total{reason="left"} 7.0' in lines
    assert "sessions 2.0" in lines
    sums.heard(0, counted(1, 1, 5))
    sums.lost(0)
    sums.lost(0)
    lines = sums.text().decode().splitlines()
    for line in ('opened_total{reason="left"} 8.0', "sessions 2.0", "ms_count 3.0"):
        assert line in lines
