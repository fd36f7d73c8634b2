"""What the table says of benches of conversations, the page and the server: a text, and whether the goal is met."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

Result = dict[str, Any]


BY_THE_CLOCK = ("voice", "first_frame", "live", "paced", "interruption")
"""Rows that another priority changes: promises about them hold at the priority of everybody else."""


def raised_priority(result: dict[str, Any]) -> str | None:
    """The priority of a run before other work of its machine, as ``nice -10``; None: it had none.

    >>> raised_priority({"priority": "nice 0 of nice -16"}), raised_priority({"nice": -10})
    ('nice -16', 'nice -10')
    >>> raised_priority({"priority": "nice 0 of nice 0"}), raised_priority({})
    (None, None)
    """
    words = str(result.get("priority", result.get("nice", 0)))
    levels = [int(level) for level in re.findall(r"-?\d+", words)]
    return f"nice {min(levels)}" if levels and min(levels) < 0 else None


def load_of(result: Result) -> float:
    """Of the machine, when the bench began: waits are by the clock."""
    return result.get("load", result["card"].get("load", 0.0))


def answered(result: Result) -> tuple[str, bool] | None:
    """Turns of bench_conversation."""
    if "turns" not in result:
        return None
    ms = result["turns"]["answer"]
    text = f"{ms['p50_ms']:.0f} ms, {ms['p95_ms']:.0f} ms ({result['turns']['turns']} turns)"
    return text, ms["p50_ms"] <= 700 and ms["p95_ms"] <= 1000


def own_echo(result: Result) -> tuple[str, bool] | None:
    """Its echo."""
    if "echo" not in result:
        return None
    row = result["echo"]
    return f"{row['false stops']} in {row['minutes']:.0f} min, four rooms", row["false stops"] == 0


def in_the_page(row: str, stage: str, goal_ms: float) -> Callable[[Result], tuple[str, bool] | None]:
    """A row of bench_page; the goal is the median's."""

    def say(result: Result) -> tuple[str, bool] | None:
        if row not in result:
            return None
        ms = result[row][stage]
        text = f"{ms['p50']:.0f} ms, p95 {ms['p95']:.0f} ms ({result[row]['times']} times)"
        return text, ms["p50"] <= goal_ms

    return say


def together(result: Result) -> tuple[str, bool] | None:
    """The most sessions that bench_serve held at once."""
    last = result["rows"][-1]
    if last["sessions"] == 1 or result["config"]["scripted"]:
        return None
    text = f"{last['of_ideal']:.0%} with {last['sessions']} sessions, {last['cpu_ms']:.1f} ms of CPU a frame"
    return text, last["of_ideal"] >= 0.85


def came_and_went(result: Result) -> tuple[str, bool]:
    """soak_serve."""
    held, visits = result["held"], sum(result["visits"].values())
    half = len(held) // 2
    early, later = (sum(at["mib"] for at in part) / max(1, len(part)) for part in (held[1 : half + 1], held[half:]))
    descriptors = held[-1]["descriptors"] - held[0]["descriptors"]
    text = (
        f"{later - early:+.1f} MiB from one half to the other, {descriptors:+d} descriptors, {result['late']:.1%} late"
    )
    met = later - early < 5 and descriptors <= 0 and not result["errors"]
    return f"{text} ({visits} visits in {result['minutes']:.0f} min)", met and result["late"] <= 0.001


_TALK, _PAGE = "python perf/bench_conversation.py", "python perf/bench_page.py"
_BROWSER = ("typed text to sound in a browser", "spoken over to silence in a browser")
SERVED_ROWS = (
    ("question's end to answer's sound: median, p95", "<= 700 ms, <= 1000 ms", _TALK, "conversation", answered),
    ("stops by its own echo at -20 dB", "none in 10 min", _TALK, "conversation", own_echo),
    (_BROWSER[0], "median <= 200 ms", _PAGE, "page", in_the_page("typed", "audible", 200)),
    (_BROWSER[1], "median <= 250 ms", _PAGE, "page", in_the_page("spoken", "silent", 250)),
    ("a session alone over one among others", ">= 85 % of CPU", "python perf/bench_serve.py", "serve", together),
    ("sessions come and go", "flat, <= 0.1 % late", "python perf/soak_serve.py", "soak", came_and_went),
)
"""What, goal, command, the bench whose result it is, and what that says."""
