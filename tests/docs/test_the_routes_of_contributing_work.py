"""Who follows a route of CONTRIBUTING to its end has a kernel, a voice or a recipe that runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ROUTES = ("Add a kernel", "Add a voice", "Add a recipe")
FENCE = re.compile(r"```(python|diff|bash)\n(.*?)```", flags=re.DOTALL)


def steps(route: str) -> list[tuple[str, str]]:
    """Language and text of every block of a route."""
    (section,) = re.findall(rf"^### {route}\n(.*?)(?=^### |\Z)", TEXT, flags=re.DOTALL | re.MULTILINE)
    return FENCE.findall(section)


def insert(path: Path, lines: list[str]) -> None:
    """Put lines that begin with + behind the line of the file that the one before them, with a space, shows."""
    content = path.read_text(encoding="utf-8").splitlines()
    place = 0
    for line in lines:
        if line.startswith("+"):
            content.insert(place, line[1:])
        else:
            place = content.index(line[1:], place)
        place += 1
    path.write_text("\n".join(content) + "\n", encoding="utf-8")


def write(tree: Path, language: str, block: str) -> None:
    """Do what a block says: make a file, add to its end, or insert lines."""
    name, _, rest = block.removeprefix("# ").partition("\n")
    path = tree / name
    if language == "diff":
        insert(path, rest.splitlines())
    elif path.exists():
        path.write_text(path.read_text(encoding="utf-8") + "\n\n" + rest, encoding="utf-8")
    else:
        path.write_text(rest, encoding="utf-8")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the project; weights are large and stay where they are."""
    for folder in ("streamdiff", "kernels", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "weights"))
    (tmp_path / "streamdiff" / "weights").symlink_to(ROOT / "streamdiff" / "weights")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "bin").mkdir()
    for name, module in (("streamdiff", "streamdiff"), ("pytest", "pytest")):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("route", ROUTES)
def test_it_leads_where_it_says(route: str, tree: Path) -> None:
    blocks = steps(route)
    assert blocks[-1][0] == "bash"
    environment = {
        **os.environ,
        "PATH": f"{tree / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    for language, block in blocks:
        if language != "bash":
            write(tree, language, block)
            continue
        done = subprocess.run(
            ["bash", "-ec", block], cwd=tree, env=environment, capture_output=True, text=True, timeout=280, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("route", ROUTES)
def test_every_file_it_adds_to_is_there(route: str) -> None:
    for language, block in steps(route):
        if language == "diff":
            name, *lines = block.removeprefix("# ").splitlines()
            content = (ROOT / name).read_text(encoding="utf-8").splitlines()
            assert [line for line in lines if line.startswith(" ") and line[1:] not in content] == []
