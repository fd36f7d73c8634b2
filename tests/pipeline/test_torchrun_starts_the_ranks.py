"""Under torchrun the launcher hosts the store, and stops all ranks when one dies; the dead one is still named."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.ranks import free_port

HERE = Path(__file__).parent


def torchrun(num_ranks: int, culprit: int, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}"),
            *(f"--master-port={free_port()}", str(HERE / "under_torchrun.py"), str(culprit), *more),
        ],
        env={
            "PATH": str(Path(sys.executable).parent),
            "PYTHONPATH": ":".join(sys.path),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_a_stream_runs_to_its_end() -> None:
    done = torchrun(3, culprit=-1)
    assert done.returncode == 0, done.stderr
    assert f"delivered {list(range(12))}" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the sockets of a process")
def test_ranks_listen_to_nobody_outside_their_machine() -> None:
    done = torchrun(3, culprit=-1)
    found = re.findall(r"rank (\d) listens at (.*)", done.stdout)
    assert sorted(found) == [(str(rank), "['127.0.0.1']") for rank in range(3)], done.stdout


IN_THE_AGENTS_STORE = ("--in-the-agents-store",)
"""As ranks on several machines."""


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), IN_THE_AGENTS_STORE], ids=["own store", "the agent's store"])
@pytest.mark.parametrize("culprit", range(3))
def test_the_dead_rank_is_named_by_the_others(culprit: int, more: tuple[str, ...]) -> None:
    done = torchrun(3, culprit, *more)
    assert done.returncode != 0
    for rank in {0, 1, 2} - {culprit}:
        assert f"rank {rank} says: rank {culprit} " in done.stderr, done.stderr
