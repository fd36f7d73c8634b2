"""What needs no model is answered without importing torch."""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import time

import pytest

from streamdiff.cli import main
from streamdiff.cli.main import COMMANDS, parser

PROGRAM = """
import sys
from streamdiff.cli.main import main
try:
    status = main({argv!r})
except SystemExit as error:
    status = error.code
print(status, "torch" in sys.modules)
"""


QUICK = [
    (0, "--version"),
    (0, "--help"),
    *((0, f"{name} --help") for name in COMMANDS),
    (2, "generat"),
    (2, "generate --sizes 1"),
    (2, "generate --steps 0"),
    (2, "generate --partition a"),
    (2, "talk Hello. --style smile"),
    (2, "train nothing"),
]


@pytest.mark.processes
@pytest.mark.parametrize(("status", "line"), QUICK, ids=[line for _, line in QUICK])
def test_an_answer_imports_no_torch(status: int, line: str) -> None:
    program = PROGRAM.format(argv=line.split())
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == f"{status} False", done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.processes
@pytest.mark.parametrize(("line", "budget_s"), [("--version", 0.4), ("generate --steps 0", 0.6)])
def test_an_answer_takes_no_time(line: str, budget_s: float) -> None:
    """Against an interpreter that does nothing, timed in the same run: a busy machine slows both."""

    def seconds(*arguments: str) -> float:
        began_s = time.perf_counter()
        subprocess.run([sys.executable, *arguments], capture_output=True, timeout=60)
        return time.perf_counter() - began_s

    ratios = [seconds("-m", "streamdiff", *line.split()) / seconds("-c", "pass") for _ in range(5)]
    quiet_s = 0.025  # what such an interpreter takes on a quiet machine
    assert statistics.median(ratios) < budget_s / quiet_s


def test_only_the_command_that_was_asked_for_is_imported() -> None:
    whole = parser().format_help()
    assert parser(["doctor"]).format_help() == whole
    assert all(
        name in whole and command.help.split(",")[0] in " ".join(whole.split()) for name, command in COMMANDS.items()
    )


def test_a_command_ends_without_looking_for_garbage_in_all_that_it_has_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With torch that is a second of CPU time; a server without sessions took seven seconds to end on a busy one."""
    monkeypatch.setattr(main, "main", lambda: 0)
    gc.collect()
    before = gc.get_freeze_count()
    try:
        with pytest.raises(SystemExit) as ended:
            main.entry()
        assert ended.value.code == 0
        assert gc.get_freeze_count() > before + 1000
    finally:
        gc.unfreeze()
