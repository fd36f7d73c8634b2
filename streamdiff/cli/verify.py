"""``streamdiff verify``: whether a file is what it says; and ``--sign``, which lets a film say it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from streamdiff import __version__
from streamdiff.facts import printable

if TYPE_CHECKING:
    from streamdiff.trust.credentials import FilmSigner

HELP = "whether a film or an audit log is what it says"
DESCRIPTION = (
    "Check the content credentials (C2PA) of a film, or the chain of an audit log (.jsonl) of `streamdiff serve`. "
    "Exit status: 0 trusted film or whole log, 1 tampered with, 2 cannot be read, 3 whole, but signed by somebody whom "
    "--trust does not name, 4 unsigned."
)
LOG_SUFFIX = ".jsonl"
STATUS = {"trusted": 0, "tampered": 1, "valid": 3, "unsigned": 4}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``streamdiff verify``."""
    parser.add_argument("file", type=Path, metavar="FILE", help="a film, or an audit log")
    parser.add_argument("--trust", type=Path, metavar="ROOTS", help="of a film: certificates (PEM) of roots to trust")
    parser.add_argument("--head", metavar="N:HASH", help="of an audit log: the head that was kept elsewhere")


def add_sign_argument(parser: argparse.ArgumentParser, what: str = "sign the finished film") -> None:
    """The option that signs a film."""
    parser.add_argument(
        "--sign",
        type=Path,
        nargs=2,
        metavar=("CERT", "KEY"),
        help=f"{what} (C2PA) with this certificate chain and private key, PEM",
    )


def signer_from(args: argparse.Namespace) -> FilmSigner | None:
    """Who signs, checked before the film is made; None: nobody."""
    if args.sign is None:
        return None
    from streamdiff.trust.credentials import FilmSigner

    return FilmSigner(*args.sign)


def sign(signer: FilmSigner | None, film: Path) -> None:
    """Sign a finished film, if somebody signs."""
    if signer is not None:
        signer.sign(film, version=__version__)


def run(args: argparse.Namespace) -> int:
    """``streamdiff verify``."""
    if args.file.suffix == LOG_SUFFIX:
        return _verify_log(args.file, args.head)
    from streamdiff.trust.credentials import verify_film

    found = verify_film(args.file, roots=args.trust)
    who = f": signed by {found.signer}" if found.signer else ""
    with_what = f", made with {found.tool}" if found.tool else ""
    sys.stdout.write(f"{printable(args.file, 300)}: {found.state.value}{who}{with_what}\n")
    sys.stdout.writelines(f"  {why}\n" for why in found.why)
    return STATUS[found.state.value]


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
