"""``streamdiff verify``: whether a file is what it says."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from streamdiff.errors import ConfigError
from streamdiff.facts import printable

HELP = "whether a film or an audit log is what it says"
DESCRIPTION = (
    "Check a file. An audit log of `streamdiff serve --audit` (.jsonl): whether a record was changed, removed "
    "or cut off. Exit status: 0 whole, 1 altered, 2 cannot be read."
)
LOG_SUFFIX = ".jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``streamdiff verify``."""
    parser.add_argument("file", type=Path, metavar="FILE", help="an audit log")
    parser.add_argument("--head", metavar="N:HASH", help="of an audit log: the head that was kept elsewhere")


def run(args: argparse.Namespace) -> int:
    """``streamdiff verify``."""
    if args.file.suffix == LOG_SUFFIX:
        return _verify_log(args.file, args.head)
    raise ConfigError(f"{args.file} is no {LOG_SUFFIX}; give an audit log")


def _verify_log(path: Path, head: str | None) -> int:
    from streamdiff.trust.audit import parse_head, verify_log

    verdict = verify_log(path, None if head is None else parse_head(head))
    lines = [f"note: {note}" for note in verdict.notes]
    if verdict.fault:
        lines.append(f"{printable(path, 300)}: altered: {verdict.fault}")
    else:
        lines.append(f"{printable(path, 300)}: whole: {verdict.num_records} records, head {verdict.head}")
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if verdict.fault else 0
