"""SECURITY.md: every defence names a test file that is there, and every test of trust and hostility is named."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def rows() -> list[list[str]]:
    lines = [line for line in TEXT.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_every_defence_names_tests_that_are_there() -> None:
    assert len(rows()) >= 9
    for who, *_, held in rows():
        named = re.findall(r"\]\((tests/[a-z0-9_/]+\.py)\)", held)
        assert named, who
        for path in named:
            assert "def test_" in (ROOT / path).read_text(encoding="utf-8"), path


def test_every_test_of_trust_is_named() -> None:
    for path in (ROOT / "tests" / "trust").glob("test_*.py"):
        assert path.name in TEXT


def test_readers_of_the_readme_find_it() -> None:
    assert "](SECURITY.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
