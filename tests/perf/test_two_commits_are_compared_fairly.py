"""Two commits, one bench, alternating: the ratio is that of the library, and the working tree is left alone."""

from __future__ import annotations

import subprocess
from pathlib import Path

import compare
import pytest

BENCH = """
import json, pathlib, speed
log = pathlib.Path({log!r})
log.write_text(log.read_text() + f"{{speed.MS}} " if log.exists() else f"{{speed.MS}} ")
print("a table")
rows = [{{"op": "walk", "step_ms": speed.MS, "count": 3}}, {{"op": "talk", "step_ms": 1.0}}]
print(json.dumps({{"bench": "toy", "rows": rows}}))
"""


def git(root: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=tester", "-c", "user.email=tester@example.org")
    subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True, timeout=60)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A slow commit, a fast commit, and an uncommitted change that is faster still."""
    root = tmp_path / "repository"
    (root / "perf").mkdir(parents=True)
    (root / "perf" / "toy.py").write_text(BENCH.format(log=str(tmp_path / "log")))
    git(tmp_path, "init", "-q", str(root))
    for number, ms in enumerate((8.0, 4.0)):
        (root / "speed.py").write_text(f"MS = {ms}\n")
        git(root, "add", ".")
        git(root, "commit", "-q", "-m", f"Take {number}")
    (root / "speed.py").write_text("MS = 2.0\n")
    return root


@pytest.mark.processes
def test_a_ratio_is_head_over_base(repository: Path, tmp_path: Path) -> None:
    rows = compare.compare(repository, "HEAD~1", "HEAD", "perf/toy.py", [], rounds=3)
    by_name = {row.name: row for row in rows}
    assert by_name["walk step_ms"].ratio == 0.5
    assert not by_name["walk step_ms"].is_noise
    assert by_name["talk step_ms"].ratio == 1.0
    assert by_name["talk step_ms"].is_noise
    assert set(by_name) == {"walk step_ms", "talk step_ms"}, "counts are not compared"
    assert (tmp_path / "log").read_text().split() == ["8.0", "4.0", "4.0", "8.0", "8.0", "4.0"], "alternating"


@pytest.mark.processes
def test_a_point_is_the_working_tree(repository: Path) -> None:
    rows = compare.compare(repository, "HEAD", ".", "perf/toy.py", [], rounds=1)
    assert {row.name: row.ratio for row in rows}["walk step_ms"] == 0.5
    listed = subprocess.run(
        ["git", "-C", str(repository), "worktree", "list"], capture_output=True, text=True, check=True, timeout=60
    )
    assert len(listed.stdout.splitlines()) == 1, "worktrees are removed"
    assert (repository / "speed.py").read_text() == "MS = 2.0\n"


def test_within_its_own_spread_a_difference_is_noise() -> None:
    assert compare.Compared("x", base=10.0, head=10.5, spread=0.06).is_noise
    assert not compare.Compared("x", base=10.0, head=10.5, spread=0.04).is_noise


@pytest.mark.processes
def test_an_unknown_commit_says_what_to_do(repository: Path) -> None:
    with pytest.raises(SystemExit, match=r"cannot check out 'nowhere'.*name a commit"):
        compare.compare(repository, "nowhere", "HEAD", "perf/toy.py", [])


@pytest.mark.processes
def test_a_bench_that_fails_is_named(repository: Path) -> None:
    (repository / "perf" / "toy.py").write_text("raise SystemExit('out of luck')\n")
    with pytest.raises(SystemExit, match=r"perf/toy.py failed in .*: out of luck"):
        compare.compare(repository, ".", ".", "perf/toy.py", [], rounds=1)
    (repository / "perf" / "toy.py").write_text("print('no numbers')\n")
    with pytest.raises(SystemExit, match="is no JSON object"):
        compare.compare(repository, ".", ".", "perf/toy.py", [], rounds=1)
