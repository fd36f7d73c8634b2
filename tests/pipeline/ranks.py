"""Real ranks for tests: N processes with a World each, a time limit, and what became of every one.

    def job(world, factor):             # a function of a module that the processes can import
        return factor * world.rank

    outcomes = run_ranks(job, 3, 10, timeout_s=60)
    assert [outcome.value for outcome in outcomes] == [0, 10, 20]

Processes are forked from a server that has imported the engine once, so a rank starts in some 30 ms. They end with
``os._exit`` as the command line does: a thread may be stuck in a dead connection. Whatever is left is killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from streamdiff.pipeline.group import World

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["torch.distributed", "numpy", "streamdiff.generate", "streamdiff.cli.main", "streamdiff.training.shard"]
)


@dataclass(frozen=True)
class Outcome:
    """How one rank ended."""

    rank: int
    exitcode: int | None
    """0: returned; 1: raised; negative: killed by that signal; None: still running when time was up."""
    value: Any = None
    error: str = ""
    """Type and message of what it raised."""
    blamed: int | None = None
    """``rank`` of a RankFailed."""
    wall_s: float = 0.0
    """Seconds after the start of all ranks at which this one ended."""


class Ranks:
    """Running ranks; a context manager that kills what is left."""

    def __init__(self, function: Callable[..., Any], size: int, args: Sequence[object]) -> None:
        port = free_port()
        self.start_s = time.monotonic()
        self._pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(size):
            ours, theirs = PROCESSES.Pipe()
            world = World(rank=rank, size=size, local_rank=rank, port=port)
            process = PROCESSES.Process(target=_run, args=(function, world, tuple(args), theirs, sys.path), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def signal(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.processes[rank].pid, number)

    def wait(self, timeout_s: float, *, without: Sequence[int] = ()) -> list[Outcome]:
        """Wait for all ranks but those in ``without``, at most ``timeout_s`` from now."""
        end_s = time.monotonic() + timeout_s
        said: dict[int, tuple[Any, ...]] = {}
        ended_s: dict[int, float] = {}
        due = [rank for rank in range(len(self.processes)) if rank not in without]
        while len(ended_s) < len(due) and time.monotonic() < end_s:
            for rank in due:
                if rank not in said and self._pipes[rank].poll():
                    try:
                        said[rank] = self._pipes[rank].recv()
                    except EOFError:
                        said[rank] = (None, "", None)
                if rank not in ended_s and not self.processes[rank].is_alive():
                    ended_s[rank] = time.monotonic() - self.start_s
            time.sleep(0.005)
        outcomes: list[Outcome] = []
        for rank in due:
            if rank not in said and self._pipes[rank].poll():
                with contextlib.suppress(EOFError):
                    said[rank] = self._pipes[rank].recv()
            value, error, blamed = said.get(rank, (None, "", None))
            wall_s = ended_s.get(rank, time.monotonic() - self.start_s)
            outcomes.append(Outcome(rank, self.processes[rank].exitcode, value, error, blamed, wall_s))
        return outcomes

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exc: object) -> None:
        for process, pipe in zip(self.processes, self._pipes, strict=True):
            if process.is_alive():
                process.kill()
            process.join(5)
            pipe.close()


def run_ranks(function: Callable[..., Any], size: int, *args: object, timeout_s: float = 60.0) -> list[Outcome]:
    """Run ``function(world, *args)`` on ``size`` ranks and wait for all of them."""
    with Ranks(function, size, args) as ranks:
        return ranks.wait(timeout_s)


def values(outcomes: Sequence[Outcome]) -> list[Any]:
    """What the ranks returned; fails with the first error when one did not."""
    for outcome in outcomes:
        assert outcome.exitcode == 0, f"rank {outcome.rank} ended with {outcome.exitcode}: {outcome.error}"
    return [outcome.value for outcome in outcomes]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_line(path: Path, count: int, timeout_s: float = 30.0) -> None:
    """Wait until a rank has written ``count`` lines to a file."""
    end_s = time.monotonic() + timeout_s
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < end_s, f"{path} has not reached {count} lines in {timeout_s} s"
        time.sleep(0.01)


def _run(
    function: Callable[..., Any], world: World, args: tuple[object, ...], pipe: Connection, path: list[str]
) -> None:
    sys.path[:] = path
    import torch

    torch.set_num_threads(1)
    try:
        pipe.send((function(world, *args), "", None))
        code = 0
    except BaseException as error:  # noqa: BLE001  the outcome of the test
        notes = "\n".join(getattr(error, "__notes__", []))
        pipe.send((None, f"{type(error).__name__}: {error}\n{notes}", getattr(error, "rank", None)))
        if os.environ.get("RANKS_TRACE"):
            traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
