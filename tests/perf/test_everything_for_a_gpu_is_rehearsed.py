"""Whatever is to run on a GPU one day runs here first, on toy shapes: scripts do not rot between two machines."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "perf" / "gpu_all.sh"


def gpu_all(*arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        cwd=ROOT,
    )


def listed() -> tuple[list[str], list[str]]:
    """Parts of the default run, and the others."""
    default, _, more = gpu_all("--list").stdout.partition("not in the default run:")
    names = [[line.split()[0] for line in text.splitlines() if line] for text in (default, more)]
    return names[0], names[1]


def test_it_lists_its_parts() -> None:
    default, more = listed()
    assert {"tests", "multigpu", "kernels", "stage-bf16", "stage-fp8", "decoder", "roofline"} <= set(default)
    assert {"stage-sparse", "stage-history", "stage-compiled"} <= set(more)
    assert not set(default) & set(more)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("--tiny", "nonsense"), "there is no part nonsense"), (("--what",), "unknown option --what")],
)
def test_a_wrong_word_gets_one_line(arguments: tuple[str, ...], said: str) -> None:
    done = gpu_all(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_without_a_gpu_it_says_how_to_rehearse() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = gpu_all("card")
    assert done.returncode == 2
    assert "--tiny rehearses everything on a CPU" in done.stderr


def test_results_of_a_rehearsal_are_thrown_away() -> None:
    before = sorted((ROOT / "perf" / "results").glob("*"))
    assert gpu_all("--tiny", "nonsense").returncode == 2
    assert sorted((ROOT / "perf" / "results").glob("*")) == before


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("timeout") is None, reason="needs the coreutils")
def test_every_part_runs_on_toy_shapes(tmp_path: Path) -> None:
    parts = [*listed()[0], "stage-sparse", "stage-history"]  # what is compiled takes minutes and is tested elsewhere
    done = gpu_all("--tiny", "--out", str(tmp_path), *parts, timeout_s=580)
    assert done.returncode == 0, done.stdout[-3000:]
    summary = done.stdout.partition("== summary\n")[2].splitlines()
    assert [line.split()[0] for line in summary] == parts
    assert all(line.endswith("ok") for line in summary)
    for part in set(parts) - {"tests", "multigpu"}:
        result = json.loads((tmp_path / f"{part}.json").read_text())
        assert result["card"]["commit"]
        assert result["date"]
