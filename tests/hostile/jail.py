"""Run the command line on hostile inputs: every case in a process of its own, with a clock, a scale and a list of what
it reached for.

A server imports the package once and forks for every case, so a case costs milliseconds and not the two seconds of an
import. The child is the real command: its own standard streams, its own folder, its own end of the interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

MOST_S, MOST_BYTES = 10.0, 1 << 30
"""What a case may take: seconds by the clock of an idle machine (CPU time is compared), and resident bytes."""
_PATIENCE_S = 60.0
"""By the clock of a busy machine; beyond it the case counts as one that hangs."""
_START_S = 540.0
"""For imports and everything that is run once, on a machine that is busier still."""
_FILE_BYTES = 1 << 28
_ADDRESS_BYTES = 12 << 30
_REACHES = ("socket.connect", "socket.getaddrinfo", "socket.sendto", "subprocess.Popen", "os.system", "os.exec")
_WARM = (
    ["generate", "--seconds", "0.1", "--out", "generate.mp4"],
    ["talk", "Hello.", "--out", "talk.mp4", "--no-sheet"],
    ["avatar", "inspect", "nothing.avatar"],
    ["serve", "--mint", "somebody", "--token-key", "nothing"],
    ["train", "motion", "--help"],
    ["train", "forcing", "--help"],
    ["train", "data", "--help"],
)
"""Run once in the server, so that nothing is imported in a case."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a command ended."""

    status: int
    """Exit status; minus the signal that ended it."""
    out: str
    err: str
    cpu_s: float
    peak_bytes: int
    reached: tuple[str, ...]
    """Hosts and programs that it reached for."""
    hung: bool

    @property
    def lines(self) -> list[str]:
        """What standard error says, line by line, beside the log."""
        return [line for line in self.err.splitlines() if line.strip() and not line.startswith("WARNING ")]

    def fault(self) -> str:
        """What no input may do to a command, or nothing: a traceback, a hang, much time or memory, many words."""
        said = self.err[-600:]
        if self.hung:
            return f"hangs: {said}"
        if "Traceback" in self.err or self.status not in (0, 2):
            return f"ends with {self.status}: {said}"
        if self.status == 2 and (len(self.lines) != 1 or "error: " not in self.lines[0]):
            return f"says {len(self.lines)} lines: {said}"
        if self.cpu_s > MOST_S:
            return f"takes {self.cpu_s:.1f} s"
        if self.peak_bytes > MOST_BYTES:
            return f"takes {self.peak_bytes / 2**30:.2f} GiB"
        return f"reaches for {self.reached}" if self.reached else ""


class Jail:
    """A process that runs commands in children; use as a context manager."""

    def __enter__(self) -> Jail:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.jail"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(_ROOT), str(_KERNELS)])},
            cwd=_ROOT,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(timeout=_PATIENCE_S + 30)
        self._server.stdout.close()

    def run(self, argv: Sequence[str], folder: Path, *, stdin: Path | None = None) -> Ending:
        """``streamdiff ARGV``, or ``read KIND FILE``, in a folder; standard input is a file, or empty."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        asked = {"argv": list(argv), "folder": str(folder), "stdin": None if stdin is None else str(stdin)}
        self._server.stdin.write(json.dumps(asked).encode() + b"\n")
        self._server.stdin.flush()
        ready, _, _ = select.select([self._server.stdout], [], [], _START_S + _PATIENCE_S)
        assert ready, f"the jail itself hangs on {argv}"
        told = json.loads(self._server.stdout.readline())
        return Ending(**{**told, "reached": tuple(told["reached"])})


_ROOT = Path(__file__).parents[2]
_KERNELS = _ROOT / "kernels"


def _serve() -> int:
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    _warm_up()
    while line := requests.readline():
        asked = json.loads(line)
        with _Streams(asked) as streams:
            child = os.fork()
            if child == 0:
                requests.close()
                answers.close()
                _leave(_command(asked, streams))
            ending = _ending(child, streams)
        # Only now: whoever asked may remove the folder at once.
        answers.write(json.dumps(ending).encode() + b"\n")
        answers.flush()
    return 0


def _warm_up() -> None:
    from streamdiff.cli.main import main
    from tests.hostile import readers

    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        os.chdir(folder)
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            for argv in _WARM:
                with contextlib.suppress(SystemExit):
                    main(argv)
            for kind in readers.READERS:
                readers.main(kind, "nothing")
        os.chdir(_ROOT)
    logging.root.handlers.clear()  # they write to the standard error of before
    gc.collect()
    gc.freeze()  # so that collections in children touch, and copy, nothing of it


class _Streams:
    """The standard streams of a child, as files."""

    def __init__(self, asked: dict[str, Any]) -> None:
        folder = Path(asked["folder"])
        self.paths = [folder / f".{name}" for name in ("out", "err", "reached")]
        self.stdin = asked["stdin"] or os.devnull

    def __enter__(self) -> _Streams:
        for path in self.paths:
            path.write_bytes(b"")
        return self

    def __exit__(self, *exc: object) -> None:
        if os.getpid() == _PID:
            for path in self.paths:
                path.unlink(missing_ok=True)


_PID = os.getpid()


def _command(asked: dict[str, Any], streams: _Streams) -> int:
    """In the child: become the command."""
    os.setsid()
    os.chdir(asked["folder"])
    for number, (path, mode) in enumerate(
        [(streams.stdin, os.O_RDONLY), (streams.paths[0], os.O_WRONLY), (streams.paths[1], os.O_WRONLY)]
    ):
        descriptor = os.open(path, mode)
        os.dup2(descriptor, number)
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_BYTES, _FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_BYTES, _ADDRESS_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    reached = os.open(streams.paths[2], os.O_WRONLY | os.O_APPEND)

    def note(event: str, args: tuple[object, ...]) -> None:
        if event in _REACHES:
            os.write(reached, f"{event} {args!r}"[:300].replace("\n", " ").encode() + b"\n")

    sys.addaudithook(note)
    sys.argv = ["streamdiff", *asked["argv"]]
    from streamdiff.cli.main import main
    from tests.hostile import readers

    try:
        return readers.main(*asked["argv"][1:]) if asked["argv"][0] == "read" else main(asked["argv"])
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001  as the interpreter would
        traceback.print_exc()
        return 1


def _leave(status: int) -> None:
    """End as the interpreter would, but without taking down all that the server has imported: half a second a case."""
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _ending(child: int, streams: _Streams) -> dict[str, Any]:
    began, hung = time.monotonic(), False
    while True:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            break
        if not hung and time.monotonic() - began > _PATIENCE_S:
            hung = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it may have left behind
    out, err, reached = (path.read_bytes()[:200_000].decode("utf-8", "replace") for path in streams.paths)
    return {
        "status": os.waitstatus_to_exitcode(status),
        "out": out,
        "err": err,
        "cpu_s": used.ru_utime + used.ru_stime,
        "peak_bytes": used.ru_maxrss * 1024,
        "reached": reached.splitlines(),
        "hung": hung,
    }


if __name__ == "__main__":
    sys.exit(_serve())
