"""The command line of the evaluation."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import machine_card, report, show

from evaluate import __doc__ as method
from evaluate.conditions import actions, gains
from evaluate.long_runs import draw_long, run_long
from evaluate.model import Model
from evaluate.objects import object_recovery
from evaluate.people import People
from evaluate.prompts import prompt_responses
from evaluate.quality import COLUMNS, quality
from evaluate.variants import VARIANTS
from streamdiff.errors import ConfigError, InputError
from streamdiff.training.probe import Probe, load_probe

RESULTS = Path(__file__).resolve().parents[1] / "results"

PARTS: Mapping[str, Callable[[argparse.Namespace, People, Probe, Model], list[dict[str, Any]]]] = {
    "actions": actions,
    "gains": gains,
    "prompts": prompt_responses,
    "objects": object_recovery,
}
"""What is judged of the first model beside the table of quality."""


def arguments() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python perf/evaluate", description=method, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--head", type=Path, metavar="FILE", help="ict_facekit.npz, the 3D head of the drawn persons")
    add("--speech", type=Path, metavar="FILE", help="facegood_audio2rig.npz; without it all speech is synthetic")
    add("--model", action="append", type=Model.parse, metavar="NAME=FOLDER[,steps=N][,sigmas=A/B][,euler|renoise]",
        help="a row of the table; the first is judged in full (default: the shipped weights)")  # fmt: skip
    add("--probe", type=Path, metavar="FILE", help="weights of the reading network (default: the shipped ones)")
    add("--identities", type=int, default=4, help="how many persons (default: %(default)s)")
    add("--seconds", type=float, default=60.0, help="speech of each person (default: %(default)s)")
    add("--only", default="quality,actions,gains,prompts,objects", metavar="PARTS",
        help="parts to run; rows and parts that are not run stay in the result (default: %(default)s)")  # fmt: skip
    add("--long", type=float, metavar="SECONDS", help="one long run instead")
    add("--variant", choices=VARIANTS, default="full", help="of the long run")
    add("--draw", action="store_true", help="draw the long runs that are there")
    add("--seed", type=int, default=0, help="of the streams (default: %(default)s)")
    add("--work", type=Path, default=Path("out/evaluate"), metavar="DIR",
        help="keeps drawn persons (default: %(default)s)")  # fmt: skip
    add("--out", type=Path, default=RESULTS, metavar="DIR", help="where results go (default: perf/results)")
    return parser


def main() -> int:
    """Run what the arguments ask for. Raises ConfigError and InputError for what cannot be done."""
    args = arguments().parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.draw:
        columns = ("variant", "seconds", "colour_mean", "colour_slope", "identity_mean", "identity_slope", "sync_mean")
        report("evaluate-long", "Long runs", draw_long(args.out, args.work), machine_card(torch.device("cpu")),
               columns=columns)  # fmt: skip
        return 0
    if args.head is None:
        raise ConfigError("--head is needed to draw persons; give ict_facekit.npz")
    if unknown := set(args.only.split(",")) - {"quality", *PARTS}:
        raise ConfigError(f"--only takes quality, {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    people = People(args.head, args.speech, args.work)
    probe = load_probe(args.probe) if args.probe is not None else load_probe()
    models = args.model or [Model("portrait")]
    if args.long is not None:
        run_long(args, people, probe, models[0])
    else:
        judge_all(args, people, probe, models)
    return 0


def judge_all(args: argparse.Namespace, people: People, probe: Probe, models: Sequence[Model]) -> None:
    """Every part that is asked for; rows are kept by their name, parts whole, where they are not judged anew."""
    parts = args.only.split(",")
    path = args.out / "evaluate.json"
    before: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    asked: dict[str, Any] = {"seconds": args.seconds, "identities": args.identities, "seed": args.seed}
    facts = asked if "quality" in parts else {name: before.get(name, asked[name]) for name in asked}
    card = machine_card(torch.device("cpu"))
    rows = quality(args, people, probe, models) if "quality" in parts else []
    rows = [row | {"commit": card["commit"]} for row in rows]
    fresh = {row["row"] for row in rows}
    rows += [row for row in before.get("rows", []) if row["row"] not in fresh]
    for part, measure in PARTS.items():
        facts[part] = measure(args, people, probe, models[0]) if part in parts else before.get(part, [])
        if facts[part]:
            show(facts[part])
    title = f"{args.identities} unseen persons, {args.seconds:g} s of unseen speech each"
    report("evaluate", title, rows, card, columns=COLUMNS, save=path, **facts)


def run() -> int:
    """`main`, with errors in one line; the exit status: 0 done, 2 for a usage error."""
    try:
        return main()
    except (ConfigError, InputError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
