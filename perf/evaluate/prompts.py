"""Whether prompts are obeyed, how soon and how far beside the truth."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from signals import Array, response, rolling

from evaluate.film import PLAIN, film
from evaluate.model import Model
from evaluate.people import People
from streamdiff.training.data.clip import PROMPTS
from streamdiff.training.probe import Probe, Reading

_MOVED: Mapping[str, Callable[[Reading], Array]] = {
    "nod": lambda r: rolling(r.column("pitch").numpy(), 25, spread=True),
    "shake": lambda r: rolling(r.column("yaw").numpy(), 25, spread=True),
    "smile": lambda r: rolling(r.column("smile").numpy(), 3),
    "aside": lambda r: rolling(np.abs(r.column("yaw").numpy()), 5),
    "hand": lambda r: rolling(r.column("hand").numpy(), 3),
}
BEFORE_CHUNKS, _ACTION_CHUNKS = 8, 14
_TURN_CHUNKS = BEFORE_CHUNKS + _ACTION_CHUNKS
_OBEYED = 0.3
"""Share of the truth's way that counts as an answer."""


def prompt_responses(args: argparse.Namespace, people: People, probe: Probe, model: Model) -> list[dict[str, Any]]:
    """One stream per person: plain, an action, plain, the next action, and so on."""
    engine = model.engine()
    found: dict[str, list[tuple[int | None, float]]] = {name: [] for name in (*_MOVED, "plain")}
    goal: dict[str, list[float]] = {name: [] for name in _MOVED}
    for number in people.numbers(args.identities):
        length_s = (_TURN_CHUNKS * len(_MOVED) + BEFORE_CHUNKS) * engine.config.chunk_s
        sound_S = people.speech(number, length_s, take=2)
        reading = probe.read(
            torch.from_numpy(film(engine, people.photo(number), sound_S, prompts=_in_turn()).frames_THWC)
        )
        for k, (name, track) in enumerate(_MOVED.items()):
            goal[name].append(_way_of_truth(people, number, name, probe))
            obeyed, returned = _answers(track(reading), k * _TURN_CHUNKS, engine.config.video_frames_per_chunk)
            found[name].append(obeyed)
            if obeyed[1] / goal[name][-1] > _OBEYED:
                found["plain"].append((returned[0], -returned[1] / obeyed[1]))
    return [_row(name, answers, goal.get(name)) for name, answers in found.items()]


def _in_turn() -> dict[int, str]:
    """Prompts by the chunk that brings them: each action, and plain speech after it."""
    prompts: dict[int, str] = {}
    for k, name in enumerate(_MOVED):
        prompts[k * _TURN_CHUNKS + BEFORE_CHUNKS] = PROMPTS[name][0]
        prompts[(k + 1) * _TURN_CHUNKS] = PLAIN
    return prompts


def _answers(values: Array, first_chunk: int, period: int) -> tuple[tuple[int | None, float], tuple[int | None, float]]:
    """Frames to half-way and the way, into an action whose turn begins at this chunk, and back out of it."""
    start, switch = first_chunk * period, (first_chunk + BEFORE_CHUNKS) * period
    stop = (first_chunk + _TURN_CHUNKS) * period
    # Half a window of a rolling spread looks ahead of its frame; both ends are cut where they would see over.
    obeyed = response(values[start + 36 : stop], switch - start - 36, before=48, steady=72)
    back = values[switch + 72 : stop + 84]
    return obeyed, response(back, stop - switch - 72, before=48, steady=36)


def _way_of_truth(people: People, number: int, action: str, probe: Probe) -> float:
    """How much further than in plain speech a column is when the truth acts."""
    track = _MOVED[action]
    acting, calm = (people.take(number, 4.0, take=3, action=each) for each in (action, "plain"))
    read = [track(probe.read(torch.from_numpy(take.frames_THWC))) for take in (acting, calm)]
    return float(read[0][12:-12].mean() - read[1][12:-12].mean())


def _row(name: str, answers: list[tuple[int | None, float]], goal: list[float] | None) -> dict[str, Any]:
    full = float(np.mean(goal)) if goal is not None else 1.0
    shares = [way / full for _, way in answers]
    times = [t for (t, _), share in zip(answers, shares, strict=True) if t is not None and share > _OBEYED]
    return {
        "prompt": name,
        "frames": float(np.median(times)) if times else None,
        "frames_low": min(times, default=None),
        "frames_high": max(times, default=None),
        "obeyed": f"{len(times)} of {len(answers)}",
        "share_of_truth": float(np.mean(shares)) if shares else None,
    }
