"""Mutate good files for as long as asked, and hold whoever reads them to what holds for any input.

    python -m tests.hostile.fuzz --minutes 10                      every kind, ten minutes each: before a release
    python -m tests.hostile.fuzz --minutes 3 bundles sounds        some kinds; --seed 7: other files
    python -m tests.hostile.fuzz sounds --only 1234                one case again, and where its file lies

Files are changed as somebody would who knows the format (`tests.hostile.mutations`): hashes, lengths and checksums are
right again, so that a change reaches the code behind them. Every case is drawn from kind, seed and number alone, and
runs in the jail of the tests: exit status 2 and one line, or a sensible result, in 10 s of CPU time and 1 GiB. A file
that gets more is written to ``--keep``; put it into ``tests/hostile/found/KIND/``, where a test reads it ever after.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.hostile.case import Case, Content, run_with_status
from tests.hostile.jail import Jail
from tests.hostile.kinds import KINDS, LONGEST_S, Good
from tests.hostile.mutations import mutated

FOUND = Path(__file__).parent / "found"


@dataclass(frozen=True, slots=True)
class Mutant:
    """One case, and the file that it is about."""

    case: Case
    file: str
    data: bytes


@cache
def _good(kind: str) -> tuple[Good, ...]:
    return tuple(KINDS[kind].good())


@cache
def _beside(kind: str) -> dict[str, Content]:
    return dict(KINDS[kind].beside())


def mutant(kind: str, seed: int, number: int) -> Mutant:
    """A case of a kind of file; the same for the same numbers."""
    draw = random.Random(f"{kind} {seed} {number}")
    good = draw.choice(_good(kind))
    others = [other.data for other in _good(kind) if other.format == good.format]
    data = mutated(good.data, good.format, draw, others)
    if draw.random() < 0.9:
        data = KINDS[kind].finish(data)
    return _mutant(kind, f"{kind} {seed} {number}", good.name, data, draw.choice(KINDS[kind].readers(good.name)))


def _mutant(kind: str, name: str, file: str, data: bytes, argv: tuple[str, ...]) -> Mutant:
    files = {**_beside(kind), file: data}
    return Mutant(Case(name, argv, files, stdin=file if KINDS[kind].stdin else None, most_s=LONGEST_S), file, data)


def kept() -> Iterator[Mutant]:
    """What was found once, by everybody who reads it."""
    for path in sorted(FOUND.glob("*/*")):
        kind, file = path.parent.name, path.name.partition("--")[2].replace("+", "/")
        for number, argv in enumerate(dict.fromkeys(KINDS[kind].readers(file))):
            yield _mutant(kind, f"{kind}/{path.name} {number}", file, path.read_bytes(), argv)


def fuzz(kind: str, numbers: Iterable[int], jail: Jail, *, seed: int = 0, seconds: float = 1e9, keep: Path | None = None
         ) -> tuple[Counter[str], dict[str, str]]:  # fmt: skip
    """Run cases of a kind until the time is over; how they ended, and by name what was wrong."""
    _good(kind)  # takes a while for some, and is no part of the time
    ends_s, ended, faults = time.monotonic() + seconds, Counter[str](), dict[str, str]()
    with tempfile.TemporaryDirectory() as folder:
        for number in itertools.takewhile(lambda _: time.monotonic() < ends_s, numbers):
            found = mutant(kind, seed, number)
            status, fault = run_with_status(jail, found.case, Path(folder) / "case")
            ended["wrong" if fault else "refused" if status else "made"] += 1
            if not fault:
                continue
            faults[found.case.name] = fault
            print(f"{found.case.name}: {' '.join(found.case.argv)}\n  {fault}", flush=True)
            if keep is not None:
                _keep(found, keep / kind)
    return ended, faults


def _keep(found: Mutant, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{found.case.name.replace(' ', '-')}--{found.file.replace('/', '+')}"
    (folder / name).write_bytes(found.data)
    print(f"  {folder / name}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"any of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--minutes", type=float, default=1.0, help="of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="other files (default: %(default)s)")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this case alone; its file is kept")
    parser.add_argument("--keep", type=Path, default=Path("fuzz"), help="where files go (default: %(default)s)")
    args = parser.parse_args()
    if wrong := [kind for kind in args.kinds if kind not in KINDS]:
        parser.error(f"no kind {wrong[0]!r}; there are {', '.join(KINDS)}")
    bad = 0
    with Jail() as jail:
        for kind in args.kinds or KINDS:
            if args.only is not None:
                _keep(mutant(kind, args.seed, args.only), args.keep / kind)
            numbers = itertools.count() if args.only is None else (args.only,)
            ended, faults = fuzz(kind, numbers, jail, seed=args.seed, seconds=60 * args.minutes, keep=args.keep)
            bad += len(faults)
            print(f"{kind}: {ended.total()} cases, {dict(ended)}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
