"""A door without sockets, for tests: the same calls and messages, and nothing in between.

async with LocalDoor(calls).connect("ann") as client:
    client.send(Say("Hello."))
    beat = await client.beat()
    event = await client.event()

Messages go through JSON and back, as they do over a wire.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from streamdiff.errors import InputError
from streamdiff.serve.calls import Call, Calls
from streamdiff.serve.protocol import Command, Ending, Event, parse, render
from streamdiff.serve.pump import Beat, Viewer

_MAX_EVENTS = 1_000


class LocalDoor:
    """Lets clients of the same process in."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    @asynccontextmanager
    async def connect(
        self, user: str = "local", *, avatar: str = "", call_id: str | None = None, is_encoded: bool = True
    ) -> AsyncGenerator[LocalClient]:
        """A client of a new call, or with ``call_id`` of one that stands. Leaving ends the connection, not the call.

        Raises:
            Refused, InputError: see `Calls.open`.
        """
        call = await self._calls.open(user, avatar=avatar) if call_id is None else self._calls.find(call_id)
        if call is None:
            raise InputError("there is no such session; open a new one")
        client = LocalClient(call, is_encoded=is_encoded)
        try:
            yield client
        finally:
            client.close()


class LocalClient:
    """One viewer of one call."""

    def __init__(self, call: Call, *, is_encoded: bool = True) -> None:
        self.call = call
        self.viewer = Viewer(call.pump, is_encoded=is_encoded)
        self._events: deque[Event] = deque(maxlen=_MAX_EVENTS)
        self._changed = asyncio.Event()
        call.subscribe(self._on_event)
        call.watched()

    def send(self, command: Command) -> None:
        """Send a command."""
        self.send_raw(render(command))

    def send_raw(self, data: str | bytes) -> None:
        """Send bytes that may be no command."""
        try:
            command = parse(data)
        except InputError as error:
            self.call.problem("malformed", str(error))
            return
        self.call.do(command)

    async def beat(self, timeout_s: float = 10.0) -> Beat | None:
        """The next frame; None after the end, and ``viewer.reason`` says why. TimeoutError when none comes."""
        return await self.viewer.next(timeout_s)

    async def event(self, kind: type[Event] | None = None, timeout_s: float = 10.0) -> Event:
        """The next event (of this kind; others are passed over). TimeoutError when none comes."""
        async with asyncio.timeout(timeout_s):
            while True:
                while self._events:
                    event = self._events.popleft()
                    if kind is None or isinstance(event, kind):
                        return event
                self._changed.clear()
                await self._changed.wait()

    def hang_up(self) -> None:
        """End the call."""
        self.call.wants_end = Ending.LEFT

    def close(self) -> None:
        """Stop watching; the call stands."""
        self.call.unsubscribe(self._on_event)
        self.viewer.close()
        self.call.watched()

    def _on_event(self, event: Event) -> None:
        self._events.append(event)
        self._changed.set()
