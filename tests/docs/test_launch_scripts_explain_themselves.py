"""Scripts for people say what they do, and what is wrong, before they install anything."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]


def launched(script: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "launch" / script), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", ["lock.sh", "ranks.sh", "test.sh", "train_portrait.sh"])
def test_help_shows_how_to_call_it(script: str) -> None:
    done = launched(script, "--help")
    assert done.returncode == 0, done.stderr
    assert f"bash launch/{script}" in done.stdout
    assert not [line for line in done.stdout.splitlines() if line.startswith("#") or "set -euo" in line]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "--head is needed"),
        (("--head", "absent.npz"), "there is no {here}/absent.npz"),
        (("--head",), "--head needs a value"),
        (("--head", "head.npz", "--clips", "many"), "count from 1, got many"),
        (("--head", "head.npz", "--budget", "10"), "--budget looks like 10min, 2h or 90s, got 10"),
        (("--quick",), "unknown argument --quick"),
    ],
)
def test_training_says_what_is_missing(arguments: tuple[str, ...], says: str, tmp_path: Path) -> None:
    (tmp_path / "head.npz").write_bytes(b"")
    done = launched("train_portrait.sh", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert says.format(here=tmp_path) in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["head.npz"]
