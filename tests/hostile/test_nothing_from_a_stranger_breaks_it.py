"""Whatever is given to a command: exit status 2 and one line, or a sensible result; in 10 s of CPU time and 1 GiB.

Cases are made by generators (`tests/hostile/pictures.py` and its neighbours). Each runs in a process of its own
(`tests/hostile/jail.py`), which counts time, memory, and what it reached for.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.case import Case, run
from tests.hostile.jail import Jail

KINDS = {"pictures": 250, "sounds": 400, "weights": 260, "options": 500}
"""What strangers give, and how many cases of it there are at least."""


@pytest.fixture(scope="module")
def jail() -> Iterator[Jail]:
    with Jail() as jail:
        yield jail


def cases_of(kind: str) -> Iterator[Case]:
    yield from importlib.import_module(f"tests.hostile.{kind}").cases()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_refused_in_one_line_or_something_sensible_comes_of_it(kind: str, jail: Jail, tmp_path: Path) -> None:
    names: set[str] = set()
    faults: list[str] = []
    for case in cases_of(kind):
        assert case.name not in names, "two cases have one name"
        names.add(case.name)
        if fault := run(jail, case, tmp_path / "case"):
            faults.append(f"{case.name}: {fault}")
    assert len(names) >= KINDS[kind]
    assert faults == []
