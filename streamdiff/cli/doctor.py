"""``streamdiff doctor``: what this machine can do, and why not more."""

from __future__ import annotations

import argparse


def add_arguments(_parser: argparse.ArgumentParser) -> None:
    """It has no options."""


def run(_args: argparse.Namespace) -> int:
    """Print every finding; exit status 1 if one is an error."""
    from streamdiff import doctor

    findings = doctor.examine()
    for finding in findings:
        print(f"{finding.verdict.value:2}  {finding.subject:<10} {finding.text}")
    worst = [f for f in findings if f.verdict is doctor.Verdict.ERROR]
    return int(bool(worst))
