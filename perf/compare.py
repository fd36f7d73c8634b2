"""Two commits side by side: the same bench, alternating in one run, and the ratio of every number.

    python perf/compare.py HEAD~1 HEAD perf/bench_stage.py --tiny
    python perf/compare.py main . perf/bench_reference.py --dim 256 --layers 2     "." is the working tree as it stands
    python perf/compare.py --rounds 5 --of 'share|ms' HEAD~1 HEAD perf/bench_kernels.py --only norm

Each commit is checked out beside the repository (git worktree) and imported from there; the bench is HEAD's for both,
unless ``--own-bench``. Runs go base, head, head, base, ..., so that a machine that slows down is unfair to neither. A
ratio is head / base of the medians; one that lies within what either side differs from itself is marked ``~``. Last
line: one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
METRICS = r"(ms|_s|fps|/s|tflops|mib|gib|speedup|memory_ratio)$"
"""Names of numbers that are worth a ratio."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One number of a bench on both sides."""

    name: str
    base: float
    head: float
    spread: float
    """Largest relative distance between two runs of one side."""

    @property
    def ratio(self) -> float:
        return self.head / self.base if self.base else float("nan")

    @property
    def is_noise(self) -> bool:
        return abs(self.ratio - 1) <= self.spread


def numbers(result: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a bench's result by a name that says where it stands; a row is named by its words.

    >>> dict(numbers({"rows": [{"op": "norm", "ms": 2.0}], "fps": 3}))
    {'norm ms': 2.0, 'fps': 3.0}
    """
    if isinstance(result, dict):
        for key, value in result.items():
            if key != "card":
                yield from numbers(value, prefix if key == "rows" else f"{prefix}{key} ")
    elif isinstance(result, list):
        for index, item in enumerate(result):
            words = [str(index)]
            if isinstance(item, dict):
                words = [str(v) for k, v in item.items() if isinstance(v, str) or k == "layers"]
            yield from numbers(item, prefix + "".join(f"{word} " for word in words))
    elif isinstance(result, (int, float)) and not isinstance(result, bool):
        yield prefix.strip(), float(result)


@contextlib.contextmanager
def checked_out(root: Path, commit: str) -> Generator[Path]:
    """A folder that holds the commit, for as long as the block lasts."""
    if commit == ".":
        yield root
        return
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        place = Path(folder) / "tree"
        command = ["git", "-C", str(root), "worktree", "add", "--quiet", "--detach", str(place), commit]
        made = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        if made.returncode:
            said = made.stderr.strip().splitlines() or ["git said nothing"]
            raise SystemExit(
                f"error: cannot check out {commit!r}: {said[-1]}; name a commit, or . for the working tree"
            )
        try:
            yield place
        finally:
            remove = ["git", "-C", str(root), "worktree", "remove", "--force", str(place)]
            subprocess.run(remove, capture_output=True, check=False, timeout=120)


def run(tree: Path, bench_root: Path, bench: str, arguments: list[str], timeout_s: float) -> dict[str, float]:
    """One run of the bench against the library in ``tree``; the numbers of its last line."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "kernels")])}
    command = [sys.executable, str(bench_root / bench), *arguments]
    done = subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, check=False, timeout=timeout_s
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        raise SystemExit(f"error: {bench} failed in {tree}: {said[-1]}")
    try:
        return dict(numbers(json.loads(done.stdout.strip().splitlines()[-1])))
    except (IndexError, json.JSONDecodeError):
        raise SystemExit(f"error: the last line of {bench} is no JSON object; is it a bench?") from None


def compare(
    root: Path,
    base: str,
    head: str,
    bench: str,
    arguments: list[str],
    *,
    rounds: int = 3,
    of: str = METRICS,
    own_bench: bool = False,
    timeout_s: float = 600.0,
) -> list[Compared]:
    """Run the bench ``rounds`` times on either side and pair what both report."""
    found: dict[str, list[dict[str, float]]] = {"base": [], "head": []}
    with checked_out(root, base) as base_tree, checked_out(root, head) as head_tree:
        trees = {"base": base_tree, "head": head_tree}
        for turn in range(rounds):
            for side in ("base", "head") if turn % 2 == 0 else ("head", "base"):
                bench_root = trees[side] if own_bench else head_tree
                found[side].append(run(trees[side], bench_root, bench, arguments, timeout_s))
    wanted = re.compile(of)
    rows: list[Compared] = []
    for name in found["head"][0]:
        series = [[result[name] for result in found[side] if name in result] for side in ("base", "head")]
        if wanted.search(name) and all(len(values) == rounds for values in series):
            medians = [statistics.median(values) for values in series]
            spread = max((max(v) - min(v)) / abs(m) if m else 0.0 for v, m in zip(series, medians, strict=True))
            rows.append(Compared(name, *medians, spread))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side (default: %(default)s)")
    parser.add_argument("--of", default=METRICS, metavar="REGEX", help="which numbers (default: times, rates, bytes)")
    parser.add_argument("--own-bench", action="store_true", help="each side runs its own version of the bench")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="of one run (default: %(default)s)")
    parser.add_argument("base")
    parser.add_argument("head")
    parser.add_argument("bench", help="path of the bench in the repository")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the bench")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    rows = compare(
        ROOT,
        args.base,
        args.head,
        args.bench,
        args.arguments,
        rounds=args.rounds,
        of=args.of,
        own_bench=args.own_bench,
        timeout_s=args.timeout_s,
    )
    if not rows:
        raise SystemExit(f"error: no number of {args.bench} matches {args.of!r} on both sides; widen --of")
    width = max(len(row.name) for row in rows)
    print(f"{args.bench} {' '.join(args.arguments)}: {args.rounds} runs each, alternating")
    print(f"{'':<{width}}{args.base:>14}{args.head:>14}{'ratio':>9}{'spread':>9}")
    for row in rows:
        mark = "~" if row.is_noise else " "
        print(f"{row.name:<{width}}{row.base:>14.4g}{row.head:>14.4g}{row.ratio:>8.3f}{mark}{row.spread:>8.1%}")
    print(
        json.dumps(
            {
                "bench": "compare",
                "of": [args.bench, *args.arguments],
                "base": args.base,
                "head": args.head,
                "rounds": args.rounds,
                "rows": [{**asdict(row), "ratio": row.ratio, "is_noise": row.is_noise} for row in rows],
            }
        )
    )


if __name__ == "__main__":
    main()
