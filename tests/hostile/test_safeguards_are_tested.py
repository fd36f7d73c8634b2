"""No guard can be taken out without a test that fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.hostile.safeguards import SAFEGUARDS, Safeguard

ROOT = Path(__file__).resolve().parents[2]
_NO_TEST_FAILED, _NONE_RAN = 0, 5


def _pytest(root: Path, guard: Safeguard) -> subprocess.CompletedProcess[str]:
    choice = ["-k", guard.choice] if guard.choice else []
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-m", "not long and not gpu", *choice]
    return subprocess.run(
        [*command, f"tests/{guard.tests}"],
        cwd=root, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project, with weights and kernels by name."""
    root = tmp_path_factory.mktemp("project")
    ignored = shutil.ignore_patterns("__pycache__", "weights")
    for folder in ("streamdiff", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
    (root / "streamdiff" / "weights").symlink_to(ROOT / "streamdiff" / "weights")
    for name in ("kernels", "launch", "perf", "pyproject.toml"):
        (root / name).symlink_to(ROOT / name)
    return root


def test_every_guard_is_where_the_list_says() -> None:
    for guard in SAFEGUARDS:
        source = (ROOT / "streamdiff" / guard.file).read_text(encoding="utf-8")
        assert source.count(guard.guard) > guard.nth, f"{guard.name}: not in {guard.file}; bring the list up to date"
        assert (ROOT / "tests" / guard.tests).is_file(), guard.name
    assert max(Counter((g.file, g.guard, g.nth) for g in SAFEGUARDS).values()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("guard", SAFEGUARDS, ids=lambda guard: f"{Path(guard.file).stem}: {guard.name}")
def test_without_it_a_test_fails(copy: Path, guard: Safeguard) -> None:
    path = copy / "streamdiff" / guard.file
    source = path.read_text(encoding="utf-8")
    before, *rest = source.split(guard.guard)
    pieces = [before, *rest]
    at = guard.nth + 1
    path.write_text(guard.guard.join(pieces[:at]) + guard.gone + guard.guard.join(pieces[at:]), encoding="utf-8")
    try:
        done = _pytest(copy, guard)
    finally:
        path.write_text(source, encoding="utf-8")
    assert done.returncode not in (_NO_TEST_FAILED, _NONE_RAN), f"nobody misses it:\n{done.stdout[-2000:]}"
    assert " failed" in done.stdout or "FAILED" in done.stdout, (
        f"it does not even run:\n{done.stdout[-3000:]}{done.stderr[-2000:]}"
    )


@pytest.mark.slow
def test_with_all_of_them_no_test_fails(copy: Path) -> None:
    """Else any copy would fail, and the tests above could not."""
    for guard in {(g.tests, g.choice): g for g in SAFEGUARDS}.values():
        done = _pytest(copy, guard)
        assert done.returncode == _NO_TEST_FAILED, done.stdout[-3000:]
