"""A test that is skipped without a known reason does not pass for one that held."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.skips import Skips


def finished(reason: str, *, strict: bool) -> tuple[Skips, int]:
    """A session in which one test was skipped, and its exit status."""
    skips = Skips(strict=strict)
    report: Any = SimpleNamespace(skipped=True, longrepr=("test_x.py", 1, f"Skipped: {reason}"))
    skips.pytest_runtest_logreport(report)
    session: Any = SimpleNamespace(exitstatus=0)
    skips.pytest_sessionfinish(session)
    return skips, int(session.exitstatus)


@pytest.mark.parametrize(
    ("reason", "strict", "status"),
    [("no moon tonight", True, 1), ("no moon tonight", False, 0), ("needs two GPUs", True, 0)],
)
def test_an_unknown_reason_fails_a_strict_run(reason: str, strict: bool, status: int) -> None:
    skips, found = finished(reason, strict=strict)
    assert found == status
    assert skips.reasons == {reason: 1}


def test_a_failed_run_stays_failed() -> None:
    skips, _ = finished("no moon tonight", strict=True)
    session: Any = SimpleNamespace(exitstatus=2)
    skips.pytest_sessionfinish(session)
    assert session.exitstatus == 2
