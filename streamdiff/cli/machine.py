"""What the command line finds out about the machine: environment, world of ranks, device, signals; and leaving it."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from streamdiff.errors import ConfigError, InputError, StreamdiffError

if TYPE_CHECKING:
    from streamdiff.pipeline.group import World

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1


def set_environment() -> None:
    """Say what libraries read from the environment when they are first imported; what the user has set stays."""
    # cuBLAS needs a workspace of its own to give the same bits twice; it reads this when CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # torch.compile keeps what it made in /tmp unless told otherwise; Triton keeps its kernels in ~/.triton by itself.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.expanduser("~/.cache/streamdiff/inductor"))
    # A lost rank is reported in our words; the library's stack trace of it helps nobody.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if os.environ.get("STREAMDIFF_OFFLINE", "0") not in ("", "0"):
        from streamdiff.avatar.fetch import refuse_downloads

        refuse_downloads()


def is_rank() -> bool:
    """Whether torchrun has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world_from_environment() -> World | None:
    """What torchrun says of this process; None outside of it."""
    if not is_rank():
        return None
    from streamdiff.pipeline.group import World

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    in_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "False") == "True"
    local_size = os.environ.get("LOCAL_WORLD_SIZE")
    is_local = None if local_size is None else int(local_size) == size
    if is_local:
        # Connections between ranks of one machine are nobody else's; gloo's are told in `pipeline.transport`.
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    return World(
        rank=rank,
        size=size,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        host=os.environ.get("MASTER_ADDR", "127.0.0.1"),
        port=int(os.environ.get("MASTER_PORT", "29500")),
        agent_store=in_agent,
        attempt=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        run=os.environ.get("TORCHELASTIC_RUN_ID", ""),
        is_local=is_local,
        place=_place() if "TORCHELASTIC_RUN_ID" in os.environ and is_local else None,
        secret=_secret(),
    )


def _place() -> Path:
    """A name that the ranks of one launcher share, and those of no other."""
    from streamdiff.pipeline.meeting import private_folder

    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")
    words = [str(os.getppid()), _started(os.getppid()), *(os.environ.get(name, "") for name in names)]
    return private_folder() / f"{hashlib.sha256(' '.join(words).encode()).hexdigest()[:32]}.json"


def _started(pid: int) -> str:
    """When a process was started, where the system says so: its number is given again one day."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _secret() -> bytes | None:
    """What ranks on several machines share: the content of a file, or of a variable."""
    name, text = os.environ.get("STREAMDIFF_SECRET_FILE"), os.environ.get("STREAMDIFF_SECRET")
    if name is None:
        return None if text is None else text.encode()
    try:
        with Path(name).open("rb") as file:
            return file.read(4096).strip()
    except OSError as error:
        raise InputError(f"cannot read STREAMDIFF_SECRET_FILE {name}: {error.strerror}; put it there") from None


def warn_of_the_network(world: World | None) -> None:
    """Say loudly that ranks on several machines talk where others may listen."""
    if world is None or world.is_local or world.rank != 0:
        return
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    interfaces = ", ".join(f"{name}={os.environ.get(name, 'not set: the system chooses')}" for name in names)
    say(
        f"WARNING: {world.size} ranks on several machines meet at {world.host}:{world.port}. What they make travels "
        "unencrypted, and torch's store and gloo take connections from anybody: use a private network. Verdicts and "
        f"heartbeats are signed. Interfaces: {interfaces}."
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


def open_standard_streams() -> None:
    """Give closed standard streams to nobody: else the next file opened, a film perhaps, would take their number, and
    libraries write their complaints into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    if sys.stdout is None:  # pyright: ignore[reportUnnecessaryComparison]
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:  # pyright: ignore[reportUnnecessaryComparison]
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def end_with_the_launcher() -> None:
    """As a rank of torchrun: be told to stop (SIGTERM) when it dies, also while modules are imported. Linux only."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        # It may have died before this. In a container the launcher can be the first process itself.
        if os.getppid() == 1 and b"torch" not in Path("/proc/1/cmdline").read_bytes():
            os.kill(os.getpid(), signal.SIGTERM)


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
        leave_at_once(status)
    return status


def leave_at_once(status: int) -> NoReturn:
    """End the process without waiting for threads."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
