"""The processes that a worker's place has, one after the other: started, watched, replaced, ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from streamdiff.errors import StreamdiffError
from streamdiff.serve.worker import SECRET_FIELD

logger = logging.getLogger(__name__)

_START_S = 300.0
_ASK_S = 5.0
_MOST_ANSWER = 4 << 20
_LEAST_PAUSE_S, _MOST_PAUSE_S = 0.5, 30.0
_SOUND_S = 30.0
"""A process that lived for so long had started well: the next one follows at once."""
_END_S = 15.0


class Lost(StreamdiffError, RuntimeError):  # noqa: N818  it says what happened
    """What a request names is not there, or not any more."""

    def __init__(self, message: str, *, status: int = 410, code: str = "worker_lost", ending: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.ending = status, code, ending


class Shift:
    """One place of a worker.

    Args:
        slot: its number.
        words: the command of its processes.
        folder: where its sockets are.
        secret: told to its processes, and to nobody else.
        on_lost: told when one ended unasked.
    """

    def __init__(
        self, slot: int, words: Sequence[str], folder: Path, secret: str, on_lost: Callable[[int], None]
    ) -> None:
        self.slot, self.generation = slot, 0
        self.is_up, self.capacity, self.why = False, 0, ""
        self.num_beginning = 0
        """Requests on their way to a session."""
        self._words, self._folder, self._secret, self._on_lost = words, folder, secret, on_lost
        self._process: asyncio.subprocess.Process | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._is_ending = False

    @property
    def _path(self) -> Path:
        return self._folder / f"{self.slot}-{self.generation}"

    async def start(self) -> int | None:
        """Start the first process; None, or the exit status of one that would not start."""
        status = await self._launch()
        if status is None:
            self._keeping = asyncio.create_task(self._keep())
        return status

    async def end(self, drain_s: float) -> None:
        """Let the process finish sentences and end; after ``drain_s`` and a little more it is killed."""
        self._is_ending = True
        process = self._process
        if process is not None and process.returncode is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), drain_s + _END_S)
            if process.returncode is None:
                process.kill()
                await process.wait()
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)

    def begun(self) -> None:
        """A request that was on its way has its answer."""
        self.num_beginning -= 1

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to it. Lost: it does not answer."""
        try:
            return await asyncio.open_unix_connection(str(self._path))
        except OSError:
            raise Lost("the worker that was asked has just ended; ask again", status=503, code="starting") from None

    async def ask(self, target: str, authorization: str = "") -> bytes:
        """The body of what it answers to the process in front; empty: it does not answer, or refuses."""
        fields = ["Host: localhost", f"{SECRET_FIELD}: {self._secret}", "Connection: close"]
        fields += [f"Authorization: {authorization}"] if authorization else []
        request = "\r\n".join([f"GET {target} HTTP/1.1", *fields, "", ""])
        try:
            async with asyncio.timeout(_ASK_S):
                reader, writer = await self.connect()
                try:
                    writer.write(request.encode("latin-1"))
                    answer = b""
                    while len(answer) < _MOST_ANSWER and (data := await reader.read(65_536)):
                        answer += data
                finally:
                    writer.close()
        except (TimeoutError, OSError, Lost):
            return b""
        head, _, body = answer.partition(b"\r\n\r\n")
        return body if head.split(b" ")[1:2] == [b"200"] else b""

    async def is_lost_soon(self) -> bool:
        """Whether its process has ended, or does so in a moment."""
        process = self._process
        with contextlib.suppress(TimeoutError):
            if process is not None and process.returncode is None:
                await asyncio.wait_for(process.wait(), 1.0)
        return process is None or process.returncode is not None

    async def _launch(self) -> int | None:
        """Start a process and wait until it takes requests; None, or its exit status."""
        self.generation += 1
        told = f"{self.slot}:{self.generation}:{self._path}"
        process = self._process = await asyncio.create_subprocess_exec(
            *self._words,
            "--worker-of",
            told,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(self._secret.encode() + b"\n")
            async with asyncio.timeout(_START_S):
                line = await process.stdout.readline()
        except BaseException as error:
            process.kill()
            await process.wait()
            if isinstance(error, TimeoutError | OSError):
                return 1
            raise
        if not line:
            return await process.wait() or 1
        said = json.loads(line)
        self.capacity, self.why, self.is_up = said["capacity"], said["why"], True
        return None

    async def _keep(self) -> None:
        """Replace the process when it ends, the more slowly the less long it lived."""
        pause_s = _LEAST_PAUSE_S
        while self._process is not None:
            began_s = time.monotonic()
            status = await self._process.wait()
            self.is_up = False
            self._path.unlink(missing_ok=True)
            self._on_lost(self.slot)
            if self._is_ending:
                return
            logger.error(
                "worker %d was lost, status %d: its sessions have ended, another one starts", self.slot, status
            )
            pause_s = _LEAST_PAUSE_S if time.monotonic() - began_s > _SOUND_S else min(_MOST_PAUSE_S, 2 * pause_s)
            await asyncio.sleep(pause_s)
            await self._launch()
