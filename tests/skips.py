"""Skips that are expected where everything is installed; with ``--no-other-skips`` any other one fails the run.

A test that is skipped holds nothing. What may be skipped, and why, stands in `EXPECTED`; all skips are counted and
named at the end of the run.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest

EXPECTED = {
    r"does not compute in \S+ here": "a backend of attention lacks a data type on this processor",
    r"chromium|browser": "a browser is the system's, and not every system may install one",
    r"needs (a|two) GPUs?|there is a GPU here|there is one": "one side of a choice that the machine makes",
    r"asks Linux|on Linux only": "what Linux alone says of a process",
    r"the table was made by triton": "register counts belong to one compiler",
    r"triton \S+ is not unpacked": "a second compiler of 640 MB, beside the one that torch asks for",
}
"""Pattern of the reason that a test gives, and why it is no loss."""


class Skips:
    """Counts skips by reason; a plugin of the process that reports."""

    def __init__(self, *, strict: bool) -> None:
        self._strict = strict
        self.reasons: Counter[str] = Counter()

    @property
    def unexpected(self) -> list[str]:
        """Reasons that no pattern knows."""
        return [reason for reason in self.reasons if not any(re.search(pattern, reason) for pattern in EXPECTED)]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._count(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._count(report)

    def _count(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.reasons[reason.removeprefix("Skipped: ")] += 1

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._strict and self.unexpected and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for reason, count in sorted(self.reasons.items()):
            known = "" if reason not in self.unexpected else "  (unexpected: tests/skips.py)"
            terminalreporter.write_line(f"skipped {count}: {reason}{known}")
