"""Apply each mutant to a copy of the package and see whether the test that it names fails.

    python -m tests.mutants.runner [TEXT]     # only mutants with this text in their name or test

A process imports once what takes long and does not change (torch, pytest, the kernels); every mutant gets a fork of it,
which imports the mutated copy of `streamdiff` and runs one test. The checkout is never written to. The last line is
JSON; the exit status is 1 unless every mutant was killed.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

from tests.mutants.listed import MUTANTS
from tests.mutants.mutant import ROOT, Mutant

LIMIT_S = 120.0
"""How long one test may take, on a busy machine."""

SLOW_IMPORTS = ("torch", "torch._dynamo", "numpy", "pytest", "hypothesis.strategies", "diffusers", "streamdiff_kernels")


class Outcome(StrEnum):
    """What became of a mutant."""

    KILLED = "killed"
    SURVIVED = "survived"
    STALE = "stale"
    """The text that it replaces is gone, or its test is."""
    BROKEN = "broken"
    """The test did not run to its end: it hung, or could not be collected."""


PYTEST = {0: Outcome.SURVIVED, 1: Outcome.KILLED}
"""What pytest's exit status means; all others say that no test was run."""


def main(argv: Sequence[str]) -> int:
    """Run them all, and say what became of each."""
    for name in SLOW_IMPORTS:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    wanted = [m for m in MUTANTS if not argv or argv[0] in m.name or argv[0] in m.test]
    if not wanted:
        raise SystemExit(f"no mutant has {argv[0]!r} in its name or test")
    with tempfile.TemporaryDirectory(prefix="mutants") as folder:
        outcomes = run_all(Path(folder), wanted)
    counts = Counter(outcomes.values())
    summary = {str(outcome): counts[outcome] for outcome in Outcome}
    not_killed = [mutant.name for mutant, outcome in outcomes.items() if outcome is not Outcome.KILLED]
    cpu = os.times()
    print(
        json.dumps(
            {
                "mutants": len(wanted),
                **summary,
                "not_killed": not_killed,
                "cpu_s": round(cpu.children_user + cpu.children_system + cpu.user + cpu.system),
            }
        )
    )
    return int(len(not_killed) > 0)


def run_all(folder: Path, mutants: Sequence[Mutant]) -> dict[Mutant, Outcome]:
    """What becomes of every mutant in a copy of the package in ``folder``. Forks: call it where no thread runs."""
    package = folder / "streamdiff"
    shutil.copytree(ROOT / "streamdiff", package, ignore=shutil.ignore_patterns("weights"))
    (package / "weights").symlink_to(ROOT / "streamdiff" / "weights")
    log = folder / "log"
    tests = sorted({mutant.test for mutant in mutants if mutant.fault is None})
    # Without a name pytest would run them all.
    outcome = _tested(folder, tests, log) if tests else Outcome.SURVIVED
    if outcome is not Outcome.SURVIVED:
        raise SystemExit(f"the tests do not pass on the package as it is ({outcome}):\n{log.read_text()}")
    outcomes: dict[Mutant, Outcome] = {}
    for mutant in mutants:
        began_s = time.monotonic()
        outcomes[mutant] = outcome = _outcome(folder, mutant, log)
        print(f"{outcome:8} {time.monotonic() - began_s:5.1f} s  {mutant.name}", flush=True)
        if outcome is Outcome.BROKEN:
            print(log.read_text(), flush=True)
    return outcomes


def _outcome(folder: Path, mutant: Mutant, log: Path) -> Outcome:
    if mutant.fault is not None:
        return Outcome.STALE
    file = folder / "streamdiff" / mutant.file
    source = file.read_text()
    mutated = mutant.mutated(source)
    assert mutated is not None
    file.write_text(mutated)
    try:
        return _tested(folder, [mutant.test], log)
    finally:
        shutil.copy2(ROOT / "streamdiff" / mutant.file, file)


def _tested(folder: Path, tests: Sequence[str], log: Path) -> Outcome:
    """Run tests in a fork that imports the package from ``folder``."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            status = _child(folder, tests, log)
        except BaseException:  # noqa: BLE001  a fork must not run what its parent would do with an error
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    until_s = time.monotonic() + LIMIT_S * max(1, len(tests) / 10)
    while time.monotonic() < until_s:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return PYTEST.get(os.waitstatus_to_exitcode(status), Outcome.BROKEN)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return Outcome.BROKEN


def _child(folder: Path, tests: Sequence[str], log: Path) -> int:
    import hypothesis.configuration
    import pytest

    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    # The mutated file and the one it replaces may be equally long and equally old: compiled files could be mistaken.
    sys.dont_write_bytecode = True
    hypothesis.configuration.set_hypothesis_home_dir(folder / "examples")
    os.chdir(ROOT)
    paths = f"pythonpath={folder} {ROOT} {ROOT / 'kernels'} {ROOT / 'perf'}"
    # Imported before the fork, on purpose.
    early = "ignore:Module already imported so cannot be rewritten"
    options = [
        "-x",
        "-q",
        "-m",
        "",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-W",
        early,
        "-o",
        paths,
        "--hypothesis-seed=0",
    ]
    status = int(pytest.main([*options, *(str(ROOT / "tests" / test) for test in tests)]))
    imported = sys.modules.get("streamdiff")
    in_copy = imported is not None and Path(str(imported.__file__)).is_relative_to(folder)
    return status if in_copy else 71


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
