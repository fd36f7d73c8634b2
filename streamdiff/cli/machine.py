"""What the command line finds out about the machine: environment, world of ranks, device, signals; and leaving it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from streamdiff.errors import ConfigError, StreamdiffError

if TYPE_CHECKING:
    from streamdiff.pipeline.group import World

T = TypeVar("T")


def set_environment() -> None:
    """Say what libraries read from the environment when they are first imported; what the user has set stays."""
    # cuBLAS needs a workspace of its own to give the same bits twice; it reads this when CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # torch.compile keeps what it made in /tmp unless told otherwise; Triton keeps its kernels in ~/.triton by itself.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.expanduser("~/.cache/streamdiff/inductor"))
    # A lost rank is reported in our words; the library's stack trace of it helps nobody.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def is_rank() -> bool:
    """Whether torchrun has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world_from_environment() -> World | None:
    """What torchrun says of this process; None outside of it."""
    if not is_rank():
        return None
    from streamdiff.pipeline.group import World

    return World(
        rank=int(os.environ["RANK"]),
        size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        host=os.environ.get("MASTER_ADDR", "127.0.0.1"),
        port=int(os.environ.get("MASTER_PORT", "29500")),
        agent_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "False") == "True",
        attempt=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )


def device_named(name: str | None, world: World | None) -> str:
    """The device of this process: cpu or cuda:N; None takes a GPU where there is one. Raises ConfigError."""
    if name is None:
        import torch

        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name, flags=re.ASCII):
        raise ConfigError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if name == "cuda":
        return f"cuda:{world.local_rank if world is not None else 0}"
    return name


def alike_on_every_rank(find: Callable[[], T]) -> T:
    """What every rank finds out for itself, wrong arguments above all, is said by the first of them alone."""
    try:
        return find()
    except StreamdiffError as error:
        if os.environ.get("RANK", "0") != "0":
            leave(error.exit_code)
        raise


def leave_signals_alone() -> None:
    """Let signals end the process as they would any other: while modules are imported there is nothing to close."""
    with contextlib.suppress(ValueError):  # not the main thread: signals are somebody else's business
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def handle_signals() -> None:
    """From here on SIGINT and SIGTERM leave as exceptions, so that files are closed on the way out."""
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def say(text: str) -> None:
    """A line on standard error, if anybody is there to read it."""
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        return


def leave(status: int) -> int:
    """Leave early. As one rank of many, at once: a thread may be stuck in a connection whose other end is gone, and the
    interpreter would wait for it or crash on it. Files are closed by now.
    """
    if is_rank():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status
