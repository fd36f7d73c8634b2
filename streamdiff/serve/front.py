"""One port, several processes: takes connections and passes each on to the worker that holds its session.

A worker's sessions, tickets and avatars of users carry its number in their names, so a request says by itself where it
belongs; one that names nothing goes where most seats are free. The process in front reads the head of a request and
copies bytes: it loads no model, decodes no picture and believes no name. Pictures and sound do not pass through it:
WebRTC goes from the worker to the browser by itself.

A worker that ends unasked is replaced. Its sessions have ended with it: whoever asks for one gets 410, with the reason
``failed``; a WebSocket is closed with status 1011.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import secrets
import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

from streamdiff.errors import InputError
from streamdiff.serve.gate import Denied, Gate, bearer, is_loopback
from streamdiff.serve.head import MAX_HEAD_BYTES, Head, parse_head
from streamdiff.serve.leases import Refused
from streamdiff.serve.limits import Limits
from streamdiff.serve.protocol import Ending
from streamdiff.serve.shift import Lost, Shift
from streamdiff.serve.sums import Sums
from streamdiff.serve.worker import METERS, SEATS, TICKET

logger = logging.getLogger(__name__)

_NAMED = re.compile(rb"w(\d{1,3})g(\d{1,6})\.[A-Za-z0-9_-]{16,64}")
_SUMMED = ("/readyz", "/metrics", "/v1/info")
_BEGINS = ("/v1/sessions", "/v1/realtime/calls", "/v1/realtime")
_SIMLI, _SIMLI_BEGINS = "/compose/token", "/compose/webrtc/p2p"
_HEAD_S, _BODY_S, _REQUEST_S, _CONNECT_S = 10.0, 10.0, 180.0, 5.0
_MOST_BODY_READ = 16_384
"""A body of at most this size is searched for a name: an avatar that a user has brought."""
_MOST_CONNECTIONS = 4_096
_COPY_BYTES = 65_536
_FORWARDED = b"x-forwarded-for"
_KEY_PREFIX = "openai-insecure-api-key."
_CLOSED = b"\x88\x02\x03\xf3"
"""A WebSocket's close frame: 1011, internal error."""


class Front:
    """Shares a port among workers.

    Args:
        words: the command of a worker, by its number.
        count: of workers.
        gate: says who a request is from, to hold users to ``per_user``; workers ask theirs as well.
        per_user: sessions at once of one user, of all workers together; None: no limit.
        limits: how often somebody may begin a session; None: as often as they like.
        drain_s: how long workers may finish sentences when the server ends.
    """

    def __init__(
        self,
        words: Callable[[int], Sequence[str]],
        count: int,
        *,
        gate: Gate,
        per_user: int | None = None,
        limits: Limits | None = None,
        drain_s: float = 10.0,
    ) -> None:
        self._gate, self._per_user, self._drain_s = gate, per_user, drain_s
        self._words, self._count, self._limits = words, count, limits
        self._host = ""
        self._secret = secrets.token_hex(32)
        self._sums = Sums()
        self._shifts: list[Shift] = []
        self._beginning: dict[str, asyncio.Lock] = {}
        self._connections: set[asyncio.Task[None]] = set()

    async def run(self, host: str, port: int, *, on_up: Callable[[int, int, str], None] | None = None) -> int:
        """Serve until SIGTERM or SIGINT; the exit status. ``on_up``: told the port, the seats, and why so many."""
        self._host = host
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
                loop.add_signal_handler(number, stop.set)
        with tempfile.TemporaryDirectory(prefix="streamdiff-front-") as folder:  # nobody else may open it
            self._shifts = [
                Shift(slot, self._words(slot), Path(folder), self._secret, self._sums.lost)
                for slot in range(self._count)
            ]
            try:
                server = await asyncio.start_server(self._on_connection, host, port, limit=MAX_HEAD_BYTES, backlog=512)
            except OSError as error:
                raise InputError(f"cannot listen on {host}:{port}: {error.strerror}; try another --port") from error
            try:
                status = await self._start(stop)
                if status is None:
                    if on_up is not None:
                        seats = sum(shift.capacity for shift in self._shifts)
                        on_up(server.sockets[0].getsockname()[1], seats, self._shifts[0].why)
                    await stop.wait()
                await asyncio.gather(*(shift.end(self._drain_s) for shift in self._shifts))
            finally:
                # Not waited for: since Python 3.12 that takes until the last client has read its last byte.
                server.close()
                for task in tuple(self._connections):
                    task.cancel()
        return status or 0

    async def _start(self, stop: asyncio.Event) -> int | None:
        """Start the workers, the first alone: what is wrong is said once. The status of one that would not start."""
        stopped = asyncio.create_task(stop.wait())
        for some in (self._shifts[:1], self._shifts[1:]):
            starting = asyncio.gather(*(shift.start() for shift in some))
            await asyncio.wait([starting, stopped], return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():
                starting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await starting
                return None
            if bad := next((status for status in starting.result() if status is not None), None):
                stopped.cancel()
                return bad
        stopped.cancel()
        return None

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            if len(self._connections) <= _MOST_CONNECTIONS:
                await self._answer(reader, writer)
        except (OSError, asyncio.IncompleteReadError, TimeoutError, asyncio.CancelledError):
            pass  # whoever it was has gone, or never said what it wanted
        finally:
            self._connections.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_HEAD_S):
                head = parse_head(await reader.readuntil(b"\r\n\r\n"))
        except asyncio.LimitOverrunError:
            head = None
        if head is None or head.path.startswith("/internal") or self._is_bent(head):
            await _say(writer, 400, "bad_request", "this request is not understood")
            return
        try:
            self._limit(head, writer)
            body = await self._small_body(head, reader)
            if head.method == "GET" and head.path in _SUMMED and await self._sum_up(head, writer):
                return
            named = _NAMED.search(head.target.encode("ascii") + b" " + body)
            async with contextlib.AsyncExitStack() as stack:
                shift = await self._free() if named is None else self._of(int(named[1]), int(named[2]))
                begins = head.path in _BEGINS and _NAMED.search(head.target.encode("ascii")) is None
                if begins:
                    shift.num_beginning += 1  # at once: the next request may be chosen for before this one is leased
                    stack.callback(shift.begun)
                user = self._user(head) if begins else await self._ticket_user(head, shift)
                await self._pass_on(shift, head, body, reader, writer, user, stack)
        except Lost as lost:
            await _say(writer, lost.status, lost.code, str(lost), lost.ending)
        except Refused as refused:
            await _say(writer, refused.status, refused.code, str(refused), retry_after_s=refused.retry_after_s)
        except Denied:
            await _say(writer, 401, "unauthorized", "a valid bearer token is needed")

    def _limit(self, head: Head, writer: asyncio.StreamWriter) -> None:
        """Raise TooOften where an address or a user asks too often, before a worker hears of it."""
        if self._limits is not None:
            peer = writer.get_extra_info("peername")
            forwarded = next((v.decode("latin-1") for k, v in reversed(head.fields) if k.lower() == _FORWARDED), "")
            self._limits.knock(head.method, head.path, peer[0] if peer else "", forwarded)
            if head.path in (*_BEGINS, "/v1/avatars"):
                self._limits.enter(head.method, head.path, self._user(head))
            elif head.path == _SIMLI:
                with contextlib.suppress(Denied):  # the worker refuses in words that a client of Simli knows
                    user = self._gate.admit(head.get("x-simli-api-key") or bearer(head.get("authorization"))).user
                    self._limits.enter(head.method, head.path, user)

    def _is_bent(self, head: Head) -> bool:
        """Whether a name was made to point at this machine (DNS rebinding)."""
        asked = urlsplit("//" + head.get("host")).hostname or ""
        return is_loopback(self._host) and not is_loopback(asked)

    async def _small_body(self, head: Head, reader: asyncio.StreamReader) -> bytes:
        size = head.body_bytes
        if head.method != "POST" or not size or size > _MOST_BODY_READ or head.get("expect"):
            return b""
        async with asyncio.timeout(_BODY_S):
            return await reader.readexactly(size)

    def _of(self, slot: int, generation: int) -> Shift:
        """The worker of that name. Lost: it has gone, and what it held with it."""
        shift = self._shifts[slot] if slot < len(self._shifts) else None
        if shift is None or not 0 < generation <= shift.generation:
            raise Lost("there is no such session", status=404, code="not_found")
        if shift.generation != generation or not shift.is_up:
            raise Lost("the process that held this session was lost; begin a new one", ending=Ending.FAILED.value)
        return shift

    async def _free(self) -> Shift:
        """The worker with most free seats. Lost: there is none at all."""
        seats = await self._seats("")
        if not seats:
            raise Lost("no worker is up; ask again", status=503, code="starting")
        return max(seats, key=lambda shift: (seats[shift]["free"] - shift.num_beginning, -shift.slot))

    async def _seats(self, user: str) -> dict[Shift, dict[str, int]]:
        """What each worker that is up says of its seats."""
        up = [shift for shift in self._shifts if shift.is_up]
        answers = await asyncio.gather(*(shift.ask(f"{SEATS}?user={quote(user)}") for shift in up))
        return {shift: json.loads(answer) for shift, answer in zip(up, answers, strict=True) if answer}

    def _user(self, head: Head) -> str:
        """Whom a session is begun for. Denied: nobody."""
        offered = (name.strip() for name in head.get("sec-websocket-protocol").split(","))
        keys = (name.removeprefix(_KEY_PREFIX) for name in offered if name.startswith(_KEY_PREFIX))
        return self._gate.admit(bearer(head.get("authorization")) or next(keys, None)).user

    async def _ticket_user(self, head: Head, shift: Shift) -> str:
        """Whom a session of Simli's protocol is begun for, by its ticket; empty: this is none, or nobody's.

        Lost: its worker does not say.
        """
        if head.path != _SIMLI_BEGINS or self._per_user is None:
            return ""
        name = parse_qs(urlsplit(head.target).query).get("session_token", [""])[0]
        told = await shift.ask(f"{TICKET}?name={quote(name)}")
        if not told:
            raise Lost("the worker that gave this token does not answer; ask again", status=503, code="starting")
        return json.loads(told)["user"]

    async def _pass_on(
        self,
        shift: Shift,
        head: Head,
        body: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        user: str,
        stack: contextlib.AsyncExitStack,
    ) -> None:
        """Copy a request to a worker and its answer back; of one user, one session begins at a time.

        ``stack`` is closed when the answer begins: the session, if it was to be, has its seat.
        """
        if user and self._per_user is not None:
            lock = self._beginning.setdefault(user, asyncio.Lock())
            await asyncio.wait_for(lock.acquire(), _REQUEST_S)
            stack.callback(self._let_next, user, lock)
            held = sum(seats["of_user"] for seats in (await self._seats(user)).values())
            if held >= self._per_user:
                why = f"this user holds {held} of {self._per_user} sessions; end one of them first"
                raise Lost(why, status=429, code="user_session_limit")
        async with asyncio.timeout(_CONNECT_S):
            from_worker, to_worker = await shift.connect()
        try:
            to_worker.write(head.passed_on() + body)
            copying = _Copying(reader, writer, from_worker, to_worker, stack)
            await copying.run(None if head.upgrades else _REQUEST_S)
            if head.upgrades and copying.is_cut and await shift.is_lost_soon():
                writer.write(_CLOSED)
                await writer.drain()
        finally:
            to_worker.close()

    def _let_next(self, user: str, lock: asyncio.Lock) -> None:
        lock.release()
        if not lock.locked() and len(self._beginning) > _MOST_CONNECTIONS:
            self._beginning.pop(user, None)

    async def _sum_up(self, head: Head, writer: asyncio.StreamWriter) -> bool:
        """Answer for all workers; False: one of them had better do it."""
        if head.path == "/metrics":
            self._gate.admit(bearer(head.get("authorization")))
            for shift in [shift for shift in self._shifts if shift.is_up]:
                if answer := await shift.ask(METERS):
                    self._sums.heard(shift.slot, answer.decode())
            await _reply(writer, 200, self._sums.text(), "text/plain")
            return True
        seats = await self._seats("")
        total = {name: sum(each[name] for each in seats.values()) for name in ("capacity", "free")}
        about: dict[str, object] = {"status": "ready" if seats else "starting", "workers": len(seats)}
        if head.path == "/v1/info":
            told = await next(iter(seats)).ask(head.target, head.get("authorization")) if seats else b""
            if not told:
                return False
            about = json.loads(told)
        await _reply(writer, 200 if seats else 503, json.dumps(about | total).encode(), "application/json")
        return True


class _Copying:
    """Bytes both ways until the worker's answer has ended."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        from_worker: asyncio.StreamReader,
        to_worker: asyncio.StreamWriter,
        began: contextlib.AsyncExitStack,
    ) -> None:
        self._up, self._down = (reader, to_worker), (from_worker, writer)
        self._began = began
        self.is_cut = False
        """The worker's side ended while the client's was open."""

    async def run(self, timeout_s: float | None) -> None:
        """Copy, for at most ``timeout_s``; None: until one of the two ends it."""
        up = asyncio.create_task(self._copy(*self._up))
        down = asyncio.create_task(self._copy(*self._down, first=self._began))
        try:
            wants = {down} if timeout_s is not None else {up, down}
            await asyncio.wait(wants, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            self.is_cut = down.done() and not up.done()
        finally:
            for task in (up, down):
                task.cancel()
            await asyncio.gather(up, down, return_exceptions=True)
            await self._began.aclose()

    @staticmethod
    async def _copy(
        source: asyncio.StreamReader, sink: asyncio.StreamWriter, first: contextlib.AsyncExitStack | None = None
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(_COPY_BYTES):
                if first is not None:
                    await first.aclose()  # the session, if it was to be, has its seat
                sink.write(data)
                await sink.drain()


async def _say(
    writer: asyncio.StreamWriter, status: int, code: str, message: str, ending: str = "", retry_after_s: int = 5
) -> None:
    error = {"code": code, "message": message} | ({"reason": ending} if ending else {})
    await _reply(writer, status, json.dumps({"error": error}).encode(), "application/json", retry_after_s)


async def _reply(writer: asyncio.StreamWriter, status: int, body: bytes, kind: str, retry_after_s: int = 5) -> None:
    retry = f"Retry-After: {retry_after_s}\r\n" if status in (429, 503) else ""
    head = (
        f"HTTP/1.1 {status} {'OK' if status == 200 else 'Error'}\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(body)}\r\nCache-Control: no-store\r\n{retry}Connection: close\r\n\r\n"
    )
    writer.write(head.encode("ascii") + body)
    await writer.drain()
