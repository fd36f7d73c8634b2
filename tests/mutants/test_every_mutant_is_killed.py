"""A small fault in memory, flow, rope, pipeline or session makes the test fail that is said to notice it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest

from tests.mutants.listed import MUTANTS
from tests.mutants.mutant import ROOT
from tests.mutants.runner import Outcome


def test_every_mutant_changes_the_code_as_it_stands_and_names_a_test() -> None:
    """Whoever changes a line that a mutant changes writes the mutant anew: it is still a fault to be noticed."""
    assert {mutant.name: mutant.fault for mutant in MUTANTS if mutant.fault is not None} == {}
    assert Counter((mutant.file, mutant.old, mutant.new) for mutant in MUTANTS).most_common(1)[0][1] == 1
    assert len(MUTANTS) >= 60


def test_no_part_is_left_out() -> None:
    files = Counter(mutant.file.split("/")[0] for mutant in MUTANTS)
    assert min(files[part] for part in ("memory", "flow.py", "rope.py", "pipeline", "session.py")) >= 8


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_mutant_is_killed() -> None:
    command = [sys.executable, "-m", "tests.mutants.runner"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3500, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    result = json.loads(ran.stdout.splitlines()[-1])
    assert result["killed"] == result["mutants"] == len(MUTANTS)


TRIAL = """
import sys, tempfile
from pathlib import Path
from tests.mutants.mutant import Mutant
from tests.mutants.runner import run_all

grids = "flow/test_noise_becomes_data.py::test_the_four_steps_are_those_of_live_avatar"
steps = "_TRAIN_STEPS = 1000"
mutants = [
    Mutant("flow.py", steps, "_TRAIN_STEPS = 10", grids),
    Mutant("flow.py", steps, "_TRAIN_STEPS = 500 * 2", grids),
    Mutant("flow.py", "_TRAIN_STEPS = 999", "_TRAIN_STEPS = 10", grids),
    Mutant("flow.py", steps, "_TRAIN_STEPS = 11", "flow/test_noise_becomes_data.py::test_no"),
    Mutant("flow.py", steps, "_TRAIN_STEPS = steps", grids),
]
with tempfile.TemporaryDirectory() as folder:
    print(*run_all(Path(folder), mutants).values())
"""


@pytest.mark.slow
def test_the_runner_tells_the_dead_from_the_living() -> None:
    """A fault is killed and a change without one survives; text or a test that is gone is stale; a package that cannot
    be imported says nothing.
    """
    command = [sys.executable, "-c", TRIAL]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    outcomes = [Outcome.KILLED, Outcome.SURVIVED, Outcome.STALE, Outcome.STALE, Outcome.BROKEN]
    assert ran.stdout.splitlines()[-1].split() == outcomes
