"""Long runs from the command line: one at a time to disk, then all in one picture."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import machine_card, report
from PIL import Image
from plots import Panel, draw_panels, small_png
from safetensors.torch import load_file, save_file
from signals import Array, coarse

from evaluate.drift import LEVELS, SHOWN_AT_S, LongRun, beyond, long_run, summary
from evaluate.model import Model
from evaluate.people import People
from evaluate.variants import VARIANTS
from streamdiff.errors import InputError
from streamdiff.training.probe import Probe


def distances_between_people(people: People, probe: Probe, *, count: int = 8) -> dict[str, float]:
    """Half the mean distance between photographs of two persons: beyond that, it is somebody else."""
    photos = torch.stack([people.photo(n) for n in people.numbers(count)])
    who_NE = probe.read(photos).identity_NE
    colours = coarse(photos.numpy())
    pairs = list(itertools.combinations(range(count), 2))
    identity = float(np.mean([(who_NE[a] - who_NE[b]).square().mean().sqrt() for a, b in pairs]))
    colour = float(np.mean([np.abs(colours[a] - colours[b]).mean() for a, b in pairs]))
    return {"identity": identity / 2, "colour": colour / 2}


def run_long(args: argparse.Namespace, people: People, probe: Probe, model: Model) -> None:
    """A long run, its result on disk every 500 chunks."""
    engine = model.engine(adaptive_sink=args.variant != "no-adaptive")
    limits = distances_between_people(people, probe)
    number = people.numbers(1)[0]
    loop_S = np.concatenate([people.speech(number, 48.0, take=t) for t in (0, 1)])
    path = args.out / f"evaluate-long-{args.variant}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    started_s = time.perf_counter()

    def note(run: LongRun, cpu_s: float) -> None:
        facts = summary(run, limits)
        facts["beyond"] = "; ".join(beyond(facts)) if set(LEVELS) <= facts.keys() else ""
        spent = {"cpu_s": cpu_s, "wall_s": time.perf_counter() - started_s}
        _keep(path, {**_result(args, model, run, facts), **spent})
        shown = {f"{s:g}": torch.from_numpy(frame) for s, frame in run.shown.items()}
        save_file(shown, args.work / f"shown-{args.variant}.safetensors")
        sys.stderr.write(f"{args.variant}: {facts['seconds']:.0f} s of video in {cpu_s:.0f} s of processor time\n")

    long_run(engine, args.variant, photo_HWC=people.photo(number), loop_S=loop_S, opening_T=people.opening(loop_S),
             probe=probe, seconds=args.long, seed=args.seed, note=note)  # fmt: skip
    result = json.loads(path.read_text())
    columns = ("variant", "seconds", "colour_mean", "colour_slope", "colour_slope_low", "colour_slope_high",
               "identity_mean", "identity_slope", "identity_slope_low", "identity_slope_high", "sync_mean",
               "beyond")  # fmt: skip
    facts = {k: v for k, v in result.items() if k not in ("bench", "card", "rows")}
    title = f"{args.long:g} s, {args.variant}"
    report(result["bench"], title, result["rows"], result["card"], columns=columns, **facts)


def _result(args: argparse.Namespace, model: Model, run: LongRun, facts: dict[str, Any]) -> dict[str, Any]:
    """What the result file says, but for the time it took."""
    curves = {
        name: [[round(float(s), 1), round(float(v), 5)] for s, v in zip(*track, strict=True)][:: _stride(track[0])]
        for name, track in run.tracks().items()
    }
    return {
        "bench": f"evaluate-long-{args.variant}",
        "card": machine_card(torch.device("cpu")),
        "asked_s": args.long,
        "weights": str(model.name),
        "rows": [{"variant": args.variant, **facts}],
        "curves": curves,
    }


def _keep(path: Path, result: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result) + "\n")
    partial.replace(path)


def _stride(values: Array, *, most: int = 250) -> int:
    return max(1, math.ceil(len(values) / most))


def draw_long(out: Path, work: Path) -> list[dict[str, Any]]:
    """All long runs that are there in one picture, and what their frames look like over time."""
    found = {v: json.loads(path.read_text()) for v in VARIANTS if (path := out / f"evaluate-long-{v}.json").is_file()}
    if not found:
        raise InputError(f"there are no long runs in {out}; make one with --long 1000 --variant full")
    limits = next(iter(found.values()))["rows"][0]
    titles = {
        "colour": "colours: distance to the photograph (dotted: half-way to another person)",
        "identity": "identity: distance to the photograph (dotted: half-way to another person)",
        "latent_shift": "mean of latents: shift against the first 48 s, in spreads",
        "latent_spread": "spread of latents against the first 48 s, log",
        "sync": "sync with speech, correlation at lag 0",
    }
    panels = [
        Panel(
            title,
            {v: [tuple(p) for p in r["curves"][name]] for v, r in found.items()},
            mark=limits.get(f"{name}_limit"),
            low=None if name == "latent_spread" else 0.0,
        )
        for name, title in titles.items()
    ]
    pictures = out / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    draw_panels(panels, pictures / "long.png", unit="seconds of video")
    strips = {v: load_file(p) for v in found if (p := work / f"shown-{v}.safetensors").is_file()}
    if strips:
        _draw_strips(list(strips.values()), pictures / "long-frames.png")
    return [result["rows"][0] for result in found.values()]


def _draw_strips(strips: list[dict[str, torch.Tensor]], path: Path) -> None:
    """Frames of every run over time, a run to a row."""
    size, gap = 96, 3
    canvas = Image.new("RGB", (len(SHOWN_AT_S) * (size + gap), len(strips) * (size + gap)), (255, 255, 255))
    for row, frames in enumerate(strips):
        for column, s in enumerate(SHOWN_AT_S):
            if f"{s:g}" in frames:
                tile = Image.fromarray(frames[f"{s:g}"].numpy()).resize((size, size), Image.Resampling.LANCZOS)
                canvas.paste(tile, (column * (size + gap), row * (size + gap)))
    small_png(canvas, path, limit_bytes=200_000)
