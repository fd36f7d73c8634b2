"""Sync under other conditions than plain, levelled speech: while an action holds, and at other levels of sound."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from signals import interval, synchrony

from evaluate.film import film
from evaluate.model import Model
from evaluate.people import People, Take
from streamdiff.arrays import Floats
from streamdiff.training.data.clip import PROMPTS
from streamdiff.training.probe import Probe

GAINS_DB = (-30, -20, -12, -6, 0, 6, 12)
_MOST_S = 20.0


def actions(args: argparse.Namespace, people: People, probe: Probe, model: Model) -> list[dict[str, Any]]:
    """Sync while a prompt holds, beside what is read of the truth doing the same: turned heads are harder to read."""
    engine, rows = model.engine(), list[dict[str, Any]]()
    for action, texts in PROMPTS.items():
        takes = [people.take(n, min(args.seconds, _MOST_S), take=5, action=action)
                 for n in people.numbers(args.identities)]  # fmt: skip
        films = [film(engine, t.photo_HWC, t.sound_S, prompts={0: texts[0]}, seed=args.seed) for t in takes]
        row = _sync([f.frames_THWC for f in films], takes, probe)
        truth = _sync([t.frames_THWC for t in takes], takes, probe)
        rows.append({"action": action, **row, "truth": truth["sync"], "persons": len(takes)})
    return rows


def gains(args: argparse.Namespace, people: People, probe: Probe, model: Model) -> list[dict[str, Any]]:
    """Sync with the same speech made louder or quieter before the model hears it; 0 dB is -26 dBFS."""
    engine, rows = model.engine(), list[dict[str, Any]]()
    takes = [people.take(n, min(args.seconds, _MOST_S), take=5) for n in people.numbers(args.identities)]
    for gain_db in GAINS_DB:
        films = [film(engine, t.photo_HWC, louder(t.sound_S, gain_db), seed=args.seed) for t in takes]
        rows.append({"gain_db": gain_db, **_sync([f.frames_THWC for f in films], takes, probe), "persons": len(takes)})
    return rows


def louder(sound_S: Floats, gain_db: float) -> Floats:
    """The same sound at another level, clipped where it does not fit."""
    return np.clip(sound_S * 10 ** (gain_db / 20), -1.0, 1.0).astype(np.float32)


def _sync(films: Sequence[NDArray[np.uint8]], takes: Sequence[Take], probe: Probe) -> dict[str, float]:
    """Mean of sync at lag 0 over persons, with its interval."""
    found: list[float] = []
    for frames, take in zip(films, takes, strict=True):
        seen = probe.read(torch.from_numpy(frames)).column("opening_cm").numpy()
        found.append(synchrony(seen, take.column("opening_cm")[: len(seen)]).at_zero)
    mean, low, high = interval(found)
    return {"sync": mean, "low": low, "high": high}
