"""Whether what a hand hid is the same when the hand is gone."""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np
import torch
from signals import interval

from evaluate.film import PLAIN, film
from evaluate.model import Model
from evaluate.people import People
from evaluate.prompts import BEFORE_CHUNKS
from streamdiff.engine import Engine
from streamdiff.training.data.clip import PROMPTS
from streamdiff.training.faces import badge_box
from streamdiff.training.probe import Probe


def object_recovery(args: argparse.Namespace, people: People, probe: Probe, model: Model) -> list[dict[str, Any]]:
    """A badge is hidden by the raised hand for L seconds; is it the same afterwards?"""
    rows: list[dict[str, Any]] = []
    numbers = people.numbers(args.identities, badge=True)
    for variant in ("full", "no-sink"):
        engine = model.engine()
        for hidden_s in (0, 1, 3, 10):
            found = [_hidden(people, number, probe, engine, variant, hidden_s) for number in numbers]
            mean, low, high = interval([facts["change"] for facts in found])
            rows.append({
                "variant": variant,
                "hidden_s": hidden_s, "persons": len(numbers),
                "colour_change": mean,
                "low": low,
                "high": high,
                "change_while_hidden": float(np.mean([f["covered"] for f in found])) if hidden_s else None,
                "badge_there_after": float(np.mean([f["present"] for f in found])),
            })  # fmt: skip
    return rows


def _hidden(
    people: People, number: int, probe: Probe, engine: Engine, variant: str, hidden_s: float
) -> dict[str, float]:
    """One person: how much the badge's place changed, while hidden and for good, and whether a badge is still read."""
    chunk_s = engine.config.chunk_s
    up = BEFORE_CHUNKS, BEFORE_CHUNKS + (2 + math.ceil(hidden_s / chunk_s) if hidden_s else 0)
    sound_S = people.speech(number, (up[1] + 12) * chunk_s, take=4)
    prompts = {up[0]: PROMPTS["hand"][0], up[1]: PLAIN} if hidden_s else {}
    made = film(engine, people.photo(number), sound_S, prompts=prompts, variant=variant)
    box = badge_box(128)
    place = made.frames_THWC[:, box[0], box[1]].mean((1, 2), dtype=np.float64) / 255
    first, last = up[0] * 12, up[1] * 12
    before, after = place[first - 48 : first].mean(0), place[-48:].mean(0)
    reading = probe.read(torch.from_numpy(made.frames_THWC[-48:]))
    return {
        "change": float(np.abs(after - before).mean()),
        "covered": float(np.abs(place[last - 12 : last].mean(0) - before).mean()),
        "present": float((reading.column("badge") > 0.5).float().mean()),
    }
