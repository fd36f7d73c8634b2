"""No file is longer than a sitting, few functions are longer than a screen half, and files are not cut by banners.

A file that needs a banner comment to be found one's way in holds two ideas: the second one is a file of its own.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LONGEST_FILE = 600
LONGEST_OF_NINE_IN_TEN = 25
"""Lines of a function, its signature and docstring among them."""
FOLDERS = ("streamdiff", "kernels", "perf", "tests")

RULE = re.compile(r"\s*#\s*[-=#*~_]{3}")


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def may_be_long(path: Path) -> bool:
    """Kernels repeat what a compiler wants repeated; the VAE is one published network."""
    name = path.relative_to(ROOT).as_posix()
    return name.startswith(("kernels/", "streamdiff/models/vae"))


def function_lines(source: str) -> list[int]:
    nodes = ast.walk(ast.parse(source))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [1 + (node.end_lineno or node.lineno) - node.lineno for node in functions]


def nine_in_ten(lengths: list[int]) -> int:
    """The 90th percentile."""
    return sorted(lengths)[int(0.9 * len(lengths))]


def banners(source: str) -> Iterator[tuple[int, str]]:
    """Rules drawn in comments, and comments between two empty lines, which can only be titles."""
    lines = ["", *source.splitlines(), ""]
    for number in range(1, len(lines) - 1):
        before, line, after = lines[number - 1 : number + 2]
        alone = line.lstrip().startswith("# ") and not before.strip() and not after.strip()
        if alone or RULE.match(line):
            yield number, line.strip()


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_is_long(folder: str) -> None:
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in files(folder)}
    assert lengths
    held = {name: length for name, length in lengths.items() if not may_be_long(ROOT / name)}
    assert {name: n for name, n in held.items() if n > LONGEST_FILE} == {}


@pytest.mark.heavy
@pytest.mark.parametrize("folder", ["streamdiff", "tests"])
def test_nine_functions_in_ten_are_short(folder: str) -> None:
    lengths = [length for path in files(folder) for length in function_lines(path.read_text())]
    assert nine_in_ten(lengths) <= LONGEST_OF_NINE_IN_TEN


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_is_cut_by_banners(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT).as_posix()}:{number} {line}"
        for path in files(folder)
        for number, line in banners(path.read_text())
    ]
    assert found == []


def test_what_is_counted_is_what_a_reader_would_count() -> None:
    source = "\n\n# Cat\n\n\n# --- reading\ndef f(\n    x\n):\n    # why\n    return x  # - 1\n\n\n# A reason\nb = 1\n"
    assert function_lines(source) == [5]
    assert list(banners(source)) == [(3, "# Cat"), (6, "# --- reading")]
    assert nine_in_ten(list(range(1, 11))) == 10
