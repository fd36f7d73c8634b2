"""ARCHITECTURE shows the floors that import-linter holds, in their order."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


def layers() -> list[list[str]]:
    """Floors of the import contract, top first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    found = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [layer.split(" | ") for layer in found]


def test_floors_are_those_of_the_contract() -> None:
    (drawn,) = re.findall(r"## Floors\n.*?```\n(.*?)-{10}", TEXT, flags=re.DOTALL)
    # The names of a floor end where its explanation begins, at two spaces or more.
    names = [re.split(r" {2,}", line)[0].split(" | ") for line in drawn.strip().splitlines()]
    assert names == layers()


def test_the_glossary_has_twelve_words() -> None:
    (glossary,) = re.findall(r"## Glossary\n(.*?)\n## ", TEXT, flags=re.DOTALL)
    words = re.findall(r"^\| (\w+) \|", glossary, flags=re.MULTILINE)
    assert len(set(words) - {"word"}) == 12
