"""The tables of perf/NUMBERS.md and of the README, made from what benches left in perf/results/.

    python perf/table.py                                            print the long one
    python perf/table.py --write [FILE...]                          put both between their markers
    python perf/table.py --check [FILE...]                          exit 1 when one is stale there
    python perf/bench_reference.py | python perf/table.py --keep reference      keep a result: its last line, and a card

A row is *measured*, with the machine it was measured on; *counted*, where arithmetic on shapes decides and a test holds
it; or *predicted*, from ceilings and shares that the row names. Results of toy shapes never count. What has neither
result nor prediction says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roofline import ASSUMED, Shapes, Shares, served_costs
from served import BY_THE_CLOCK, SERVED_ROWS, load_of, raised_priority

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results")
DOCUMENTS = (ROOT / "perf" / "NUMBERS.md", ROOT / "README.md")

Result = dict[str, Any]

DECODER_FLOP, DECODER_FLOPS = 27e12, 190e12
"""The Wan decoder's operations for a chunk at 704x384, and the rate at which Live Avatar's was seen to run."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a row can say."""

    text: str
    met: bool | None
    """Whether the goal is met; None where it cannot be told."""
    how: str


@dataclass(frozen=True, slots=True)
class Row:
    what: str
    goal: str
    command: str
    measured: Callable[[Sequence[Result]], Found | None]
    otherwise: Callable[[], Found] | None = None


def machine(result: Result) -> str:
    """The machine and the commit of a result, in few words."""
    card = result.get("card", {})
    device = card.get("device", "unknown machine")
    threads = card.get("threads")
    count = f", {threads} thread{'s' if threads != 1 else ''}" if threads and "processors" not in card else ""
    return f"measured: {device}{count}, {card.get('commit', 'unknown commit')}"


def on_gpu(result: Result) -> bool:
    """Whether a result comes from a GPU and from shapes that count."""
    small = result.get("tiny") or result.get("shapes") == "small" or result.get("preset") == "tiny"
    return "driver" in result.get("card", {}) and not small


def latest(results: Sequence[Result], bench: str, *, gpu: bool = False) -> Result | None:
    """The newest result of a bench; ``results`` come oldest first."""
    fitting = [r for r in results if r.get("bench") == bench and (not gpu or on_gpu(r))]
    return fitting[-1] if fitting else None


def _reference(dtype: str, key: str, unit: str, meets: Callable[[float], bool]) -> Callable[..., Found | None]:
    def find(results: Sequence[Result]) -> Found | None:
        result = latest(results, "reference")
        if result is None:
            return None
        row = next((row for row in result["rows"] if row["dtype"] == dtype), None)
        if row is None:
            return None
        where = f"width {result['dim']}, {result['layers']} layers, {row['tokens']} tokens"
        return Found(f"{row[key]:.2f}{unit} ({where})", meets(row[key]), machine(result))

    return find


def _simulator(results: Sequence[Result]) -> Found | None:
    result = latest(results, "pipeline")
    if result is None:
        return None
    worst = max(abs(result["period_error"]), abs(result["first_chunk_error"]))
    return Found(f"{worst:.1%} off", worst <= 0.06, machine(result))


LOADED = "loading 1.3 GiB of weights with all checks against without"


def _checks(results: Sequence[Result]) -> Found | None:
    result = latest(results, "load")
    if result is None:
        return None
    ratio, cpu = result["ratio"], result["cpu"]
    how = f"{machine(result)}, load {result['load']:.1f}"
    return Found(f"{ratio:.3f}x by the clock, {cpu:.3f}x of the CPU time", max(ratio, cpu) <= 1.05, how)


def _elements(results: Sequence[Result]) -> Found | None:
    result = latest(results, "kernels", gpu=True)
    if result is None:
        return None
    fused = [
        row
        for row in result["rows"]
        if row.get("by") == "triton" and row.get("bound") == "memory" and "share_%" in row and "attend" not in row["op"]
    ]
    if not fused:
        return None
    worst = min(fused, key=lambda row: row["share_%"])
    return Found(f"{worst['share_%']:.0f} % ({worst['op']})", worst["share_%"] >= 80, machine(result))


def _attention(results: Sequence[Result]) -> dict[str, float] | None:
    """TFLOP/s by backend, from whichever bench ran last on a GPU."""
    result = latest(results, "stage", gpu=True)
    if result is None:
        return None
    return {row["backend"]: row["tflops"] for row in result["attention"]}


def _best_attention(results: Sequence[Result]) -> Found | None:
    rates, result = _attention(results), latest(results, "stage", gpu=True)
    if not rates or result is None:
        return None
    best = max(rates, key=rates.__getitem__)
    return Found(f"{rates[best]:.0f} TFLOP/s ({best})", rates[best] >= 600, machine(result))


def _own_attention(results: Sequence[Result]) -> Found | None:
    rates, result = _attention(results), latest(results, "stage", gpu=True)
    if not rates or result is None or "triton" not in rates:
        return None
    ratio = rates["triton"] / max(rates.values())
    return Found(f"{ratio:.2f}x ({rates['triton']:.0f} TFLOP/s)", ratio >= 0.8, machine(result))


def _stage_row(results: Sequence[Result], precision: str) -> tuple[Result, dict[str, Any]] | None:
    """The whole model at 704x384 with a window of four, replayed as a graph; the newest result that has it."""
    for result in reversed([r for r in results if r.get("bench") == "stage" and on_gpu(r)]):
        if result.get("size") != "384x704" or result.get("window") != 4:
            continue
        rows = [r for r in result["rows"] if r["precision"] == precision and r["way"].startswith("graph")]
        whole = [r for r in rows if r["layers"] == 40]
        if whole:
            return result, min(whole, key=lambda r: r["step_ms"])
    return None


def _step(precision: str, goal_ms: float) -> Callable[[Sequence[Result]], Found | None]:
    def find(results: Sequence[Result]) -> Found | None:
        found = _stage_row(results, precision)
        if found is None:
            return None
        result, row = found
        note = f" (extrapolated from {row['extrapolated_from']} layers)" if "extrapolated_from" in row else ""
        share = f", {row['share_%']:.0f} % of the floor's speed" if row.get("share_%") else ""
        return Found(f"{row['step_ms']:.0f} ms{share}{note}", row["step_ms"] <= goal_ms, machine(result))

    return find


def predicted_step_ms(*, eight_bits: bool) -> tuple[float, float]:
    """A step on an H200: what we expect, and the floor that nobody can beat there."""
    ceilings, costs = ASSUMED["h200"], served_costs(Shapes(), eight_bits=eight_bits)
    return Shares().expected_ms(costs, ceilings), sum(cost.calls * cost.floor_ms(ceilings) for cost in costs)


def _predicted_step(goal_ms: float, *, eight_bits: bool) -> Callable[[], Found]:
    def find() -> Found:
        expected_ms, floor_ms = predicted_step_ms(eight_bits=eight_bits)
        return Found(
            f"{expected_ms:.0f} ms; floor {floor_ms:.0f} ms",
            None if floor_ms <= goal_ms else False,
            "predicted: H200; products at 90 % of 780 (1400 in eight bits) TFLOP/s, attention in bfloat16 at 600, "
            "passes at 80 % of 4.3 TB/s",
        )

    return find


def _decode(kind: str, goal_ms: float) -> Callable[[Sequence[Result]], Found | None]:
    def find(results: Sequence[Result]) -> Found | None:
        result = latest(results, "decoder", gpu=True)
        rows = [] if result is None else [row for row in result["rows"] if row["decoder"] == kind]
        if result is None or not rows:
            return None
        best = min(rows, key=lambda row: row["p50_ms"])
        return Found(f"{best['p50_ms']:.1f} ms ({best['way']})", best["p50_ms"] <= goal_ms, machine(result))

    return find


def _predicted_decode() -> Found:
    return Found(
        f"{1e3 * DECODER_FLOP / DECODER_FLOPS:.0f} ms as published",
        None,
        "predicted: 27 TFLOP at the rate of Live Avatar's decoder, 190 TFLOP/s on an H800; ours is not timed",
    )


def _replay(results: Sequence[Result]) -> Found | None:
    found = _stage_row(results, "bf16")
    if found is None:
        return None
    equal = bool(found[1].get("replay_equals_eager", False))
    return Found("equal" if equal else "differs", equal, machine(found[0]))


def _rehearsed() -> Found:
    return Found("not measured", None, "on a CPU, a recording that reads fixed addresses equals the eager step: pytest")


def _memory(results: Sequence[Result]) -> Found | None:
    found = _stage_row(results, "bf16")
    if found is None or "of_cost" not in found[1]:
        return None
    ratio = found[1]["of_cost"]
    return Found(f"{ratio:.3f}x", abs(ratio - 1) <= 0.02, machine(found[0]))


def _counted_memory() -> Found:
    return Found(
        "within 0.5 %",
        None,
        "counted: every allocation of a chunk at 14B, without data (`tests/models/test_a_step_holds_nothing_twice.py`)",
    )


def _not_measured() -> Found:
    return Found("not measured", None, "no GPU was at hand")


def _avatar(
    row: str, say: Callable[[dict[str, Any]], tuple[str, bool | None]], *, size: int = 256, minutes: float = 0
) -> Callable[[Sequence[Result]], Found | None]:
    """A row of the avatar's bench, from the newest run that has it: rows are measured in runs of their own."""

    def find(results: Sequence[Result]) -> Found | None:
        runs = [r for r in results if r.get("bench") == "avatar" and row in r and r.get("size") == size]
        runs = [r for r in runs if r[row].get("minutes", 0) >= minutes]
        if not runs:
            return None
        text, met = say(runs[-1][row])
        how = f"{machine(runs[-1])}, {runs[-1]['cores']} cores, load {runs[-1]['load']:.1f}"
        if (priority := raised_priority(runs[-1])) is not None:
            how += f", {priority}"
            if row in BY_THE_CLOCK:
                short, bracket, details = text.partition(" (")
                text, met = f"{short} at {priority}{bracket}{details}", None
        return Found(text, met, how)

    return find


def _voice(row: dict[str, Any]) -> tuple[str, bool]:
    ms = row["ms"]
    return f"{ms['median']:.0f} ms, {ms['p95']:.0f} ms ({ms['count']} calls)", ms["median"] <= 40 and ms["p95"] <= 80


def _p95(key: str, goal_ms: float) -> Callable[[dict[str, Any]], tuple[str, bool]]:
    def say(row: dict[str, Any]) -> tuple[str, bool]:
        ms = row[key]
        return f"{ms['p95']:.0f} ms (median {ms['median']:.0f}, {ms['count']} times)", ms["p95"] <= goal_ms

    return say


def _by_the_clock(row: dict[str, Any]) -> tuple[str, bool]:
    share = row["late_frames"] / row["frames"]
    text = f"{row['fps']:.2f} FPS, {row['late_frames']} of {row['frames']} frames late, {row['cores']:.2f} cores"
    return text, row["fps"] >= 24.9 and share <= 0.001 and row["cores"] <= 1


def _as_fast_as_it_goes(row: dict[str, Any]) -> tuple[str, None]:
    return f"{row['fps']:.0f} FPS, {row['cpu_ms_per_frame']:.1f} ms of CPU a frame", None


def _lips(row: dict[str, Any]) -> tuple[str, bool]:
    text = f"r {row['r']:.2f}, peak at lag {row['lag_frames']} ({row['frames']} frames)"
    return text, row["r"] >= 0.85 and row["lag_frames"] == 0


def _sound_to_lips(row: dict[str, Any]) -> tuple[str, bool]:
    lag = row["loudness_to_lips_lag_frames"]
    return f"{lag} frames (loudness to opening, r {row['loudness_to_lips_r']:.2f})", abs(lag) <= 1


def _same_pixels(row: dict[str, Any]) -> tuple[str, bool]:
    same = row["probe_identical"]
    return f"{'identical' if same else 'different'} after {row['minutes']} min", same


def _likeness(row: dict[str, Any]) -> tuple[str, bool | None]:
    if row.get("cosine_min") is None:
        return "not measured", None
    text = f"lowest minute {row['cosine_lowest_minute']:.3f}, lowest picture {row['cosine_min']:.3f}, distance at most"
    return f"{text} {row['distance_max']:.2f} (0.6 is another person)", row["cosine_lowest_minute"] >= 0.8


def _flat_memory(row: dict[str, Any]) -> tuple[str, bool]:
    memory = row["memory_mib"]
    half = len(memory) // 2
    grown = sum(memory[half:]) / len(memory[half:]) - sum(memory[1 : half + 1]) / half if half else 0.0
    text = f"{grown:+.1f} MiB from one half to the other, at most {row['longest_queue']} frames waiting"
    return text, grown < 5 and row["longest_queue"] <= 3


def _seams(row: dict[str, Any]) -> tuple[str, bool]:
    return f"{row['jerk_ratio']:.2f}", row["jerk_ratio"] <= 1.2


def _turns(row: dict[str, Any]) -> tuple[str, bool]:
    begin, end = row["speed_begin_over_p95"], row["speed_end_over_p95"]
    return f"{begin:.2f} and {end:.2f} of the 95th percentile elsewhere", max(begin, end) <= 1


def _interruption(row: dict[str, Any]) -> tuple[str, bool]:
    silent, rest, stale = row["silent_after_ms_of_sound"], row["rest_after_ms"], row["stale_frames"]
    text = f"silent after {silent} ms of sound, at rest after {rest} ms, {stale} stale frames"
    return text, silent <= 40 and rest <= 160 and not stale


def _words(row: dict[str, Any]) -> tuple[str, bool | None]:
    if row.get("wer") is None:
        return "not measured", None
    return f"{row['wer']:.1%} of {row['words']} words ({row['by']})", row["wer"] <= 0.05


def _wrong_input(row: dict[str, Any]) -> tuple[str, bool]:
    sensible = row["inputs"] - row["errors"]
    text = f"{row['errors']} clear errors, {sensible} sensible results, the slowest after {row['slowest_s']:.1f} s"
    return text, row["slowest_s"] < 30


def _trained(name: str, *, gpu: bool) -> Callable[[Sequence[Result]], Found | None]:
    """A row of the training's bench."""

    def find(results: Sequence[Result]) -> Found | None:
        runs = [r for r in results if r.get("bench") == "train" and on_gpu(r) == gpu]
        rows = [row for row in runs[-1]["rows"] if row["row"] == name] if runs else []
        if not rows:
            return None
        pace = f", {rows[0]['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in rows[0] else ""
        return Found(f"{rows[0]['s']:.2f} s{pace}", None, machine(runs[-1]))

    return find


def _served(bench: str, say: Callable[[Result], tuple[str, bool] | None]) -> Callable[..., Found | None]:
    def find(results: Sequence[Result]) -> Found | None:
        result = latest(results, bench)
        said = None if result is None else say(result)
        return Found(*said, f"{machine(result)}, load {load_of(result):.1f}") if result and said else None

    return find


AVATAR = "python perf/bench_avatar.py"
AVATAR_ROWS = (
    ("text to first voice, 12-100 characters: median, p95", "<= 40 ms, <= 80 ms", "voice", _voice, {}),
    ("text to first speaking frame, p95", "<= 120 ms", "first_frame", _p95("realtime_ms", 120), {}),
    ("live sound to picture, look-ahead and compute, p95", "<= 150 ms", "live", _p95("ms", 150), {}),
    ("talking by the clock for 10 min, 256x256", ">= 25 FPS, <= 1 core", "paced --minutes 10", _by_the_clock, {}),
    ("the same without a clock, 256x256", "reported", "sustained", _as_fast_as_it_goes, {}),
    ("the same without a clock, 512x512", "reported", "sustained --size 512", _as_fast_as_it_goes, {"size": 512}),
    ("lips, commanded against read back", "r >= 0.85 at lag 0", "lips", _lips, {}),
    ("sound to lips", "within 1 frame", "lips", _sound_to_lips, {}),
    ("pixels of a probe at the start and after 30 min", "identical", "identity --minutes 30", _same_pixels, {}),
    ("likeness to the photo, every minute of 30", "cosine >= 0.80", "identity --minutes 30", _likeness, {}),
    ("memory over 30 min; queues", "flat; <= 3 frames", "memory --minutes 30", _flat_memory, {}),
    ("jerk where windows meet over jerk elsewhere", "<= 1.2", "seams", _seams, {}),
    ("speed where speech begins and ends", "continuous", "seams", _turns, {}),
    ("interruption", "40 ms, 160 ms, none", "interruption", _interruption, {}),
    ("words of the voice that a recogniser mishears, 50 sentences", "<= 5 %", "words", _words, {}),
    ("wrong input: 15 kinds", "no hang", "wrong_input", _wrong_input, {}),
)


STAGE = "python perf/bench_stage.py"
ROWS = (
    Row(
        "step against the published way of writing it, CPU, float32",
        ">= 1.5x faster",
        "python perf/bench_reference.py",
        _reference("float32", "speedup", "x", lambda x: x >= 1.5),
    ),
    Row(
        "the same in bfloat16",
        ">= 1.5x faster",
        "python perf/bench_reference.py",
        _reference("bfloat16", "speedup", "x", lambda x: x >= 1.5),
    ),
    Row(
        "peak memory of that step, float32",
        "<= 0.6x",
        "python perf/bench_reference.py",
        _reference("float32", "memory_ratio", "x", lambda x: x <= 0.6),
    ),
    Row(
        "the same in bfloat16",
        "<= 0.6x",
        "python perf/bench_reference.py",
        _reference("bfloat16", "memory_ratio", "x", lambda x: x <= 0.6),
    ),
    Row("simulator against real ranks", "within 6 %", "python perf/bench_pipeline.py", _simulator),
    Row("14B step, 704x384, bfloat16", "<= 190 ms", STAGE, _step("bf16", 190), _predicted_step(190, eight_bits=False)),
    Row("14B step, 704x384, FP8", "<= 120 ms", STAGE, _step("fp8", 120), _predicted_step(120, eight_bits=True)),
    Row("replayed graph against eager", "equal bits", STAGE, _replay, _rehearsed),
    Row("memory of a rank against `cost.py`", "within 2 %", STAGE, _memory, _counted_memory),
    Row("fused passes, share of copy bandwidth", ">= 80 %", "python perf/bench_kernels.py", _elements, _not_measured),
    Row("best attention, 3168 x 15312, 40 x 128", ">= 600 TFLOP/s", STAGE, _best_attention, _not_measured),
    Row("our Triton attention against it", ">= 0.8x", STAGE, _own_attention, _not_measured),
    Row(
        "decode 12 frames, Wan VAE",
        "<= 80 ms",
        "python perf/bench_decoder.py",
        _decode("vae", 80),
        _predicted_decode,
    ),
    Row(LOADED, "<= 1.05x", "python perf/bench_load.py", _checks),
    Row("decode 12 frames, light", "<= 8 ms", "python perf/bench_decoder.py", _decode("tae", 8), _not_measured),
    *(
        Row(f"portrait: {what}, {where}", "reported", f"python perf/bench_train.py{option}", _trained(name, gpu=gpu))
        for gpu, where, option in ((False, "one CPU thread", " --device cpu"), (True, "GPU", ""))
        for what, name in (
            ("step of diffusion forcing", "forcing step"),
            ("step of distillation", "distil step"),
            ("step of the codec", "codec step"),
            ("a second of video", "a second of video, served"),
        )
    ),
    *(Row(what, goal, command, _served(bench, say)) for what, goal, command, bench, say in SERVED_ROWS),
    *(
        Row(
            f"avatar: {what}",
            goal,
            f"{AVATAR} --only {call}",
            _avatar(call.split()[0], say, minutes=float(call.partition("--minutes ")[2] or 0), **settings),
        )
        for what, goal, call, say, settings in AVATAR_ROWS
    ),
)


HEADLINES = {
    "step against the published way of writing it, CPU, float32": "a denoising step against the published code",
    "peak memory of that step, float32": "its peak memory",
    "simulator against real ranks": "the simulator against real ranks",
    "portrait: a second of video, one CPU thread": "`generate`: CPU time for a second of video",
    "avatar: text to first voice, 12-100 characters: median, p95": "`talk`: text to first voice, median, p95",
    "avatar: text to first speaking frame, p95": "text to first speaking frame, p95",
    "avatar: live sound to picture, look-ahead and compute, p95": "live sound to picture, p95",
    "avatar: talking by the clock for 10 min, 256x256": "ten minutes by the clock",
    "avatar: pixels of a probe at the start and after 30 min": "the same expression, 30 minutes later: pixels",
    "avatar: words of the voice that a recogniser mishears, 50 sentences": "words that a recogniser mishears",
}
"""Rows that the README shows, and their names there."""


def load(folder: Path) -> list[Result]:
    """Every kept result, oldest first by the date it carries, then by name."""
    found: list[tuple[str, str, Result]] = []
    for path in folder.glob("*.json"):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise SystemExit(f"error: {path} is no result: {error}; keep results with --keep") from None
        found.append((result.get("date", ""), path.name, result))
    return [result for _, _, result in sorted(found, key=lambda item: item[:2])]


def table(results: Sequence[Result]) -> str:
    """Markdown."""
    lines = ["| what | goal | result | met | how it is known | command |", "|---|---|---|---|---|---|"]
    for row in ROWS:
        found = _found(row, results)
        met = {True: "yes", False: "no", None: "open"}[found.met]
        lines.append(f"| {row.what} | {row.goal} | {found.text} | {met} | {found.how} | `{row.command}` |")
    return "\n".join(lines)


def headlines(results: Sequence[Result]) -> str:
    """Markdown: the rows of the README; only what was measured has a place there."""
    rows = {row.what: row for row in ROWS}
    lines = ["| what | goal | result |", "|---|---|---|"]
    for what, name in HEADLINES.items():
        found = _found(rows[what], results)
        text = found.text if found.how.startswith("measured") else "not measured"
        lines.append(f"| {name} | {rows[what].goal} | {text.partition(' (')[0]} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[Sequence[Result]], str]] = {"results": table, "headlines": headlines}


def _found(row: Row, results: Sequence[Result]) -> Found:
    return row.measured(results) or (row.otherwise() if row.otherwise else _none_kept())


def _none_kept() -> Found:
    return Found("not measured", None, "no result is kept")


def with_table(text: str, name: str, made: str) -> str:
    """A document with the table between its markers replaced."""
    begin, end = markers(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(f"error: the document needs one {begin} and, after it, one {end}")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{made}\n{end}{rest.partition(end)[2]}"


def markers(name: str) -> tuple[str, str]:
    """The comments that a table stands between."""
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def with_tables(text: str, results: Sequence[Result]) -> str:
    """A document with all tables replaced that it has a place for; it has one at least."""
    places = [name for name in TABLES if any(marker in text for marker in markers(name))]
    for name in places or TABLES:
        text = with_table(text, name, TABLES[name](results))
    return text


def keep(output: str, folder: Path, name: str, *, date: str, commit: str | None) -> Path:
    """Write the result that a bench printed, with a card where it has none; what libraries say later is passed over."""
    lines = [line for line in output.splitlines() if line.startswith('{"bench"')]
    try:
        result = json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):
        raise SystemExit("error: no line is a bench's JSON object; did it fail?") from None
    if "card" not in result:
        import torch
        from measure import machine_card

        result["card"] = {**machine_card(torch.device("cpu")), "threads": result.get("threads", 1)}
    if commit is not None and result["card"].get("commit") in (None, "", "unknown"):
        result["card"]["commit"] = commit
    if str(result["card"].get("commit", "")).endswith("-dirty"):
        raise SystemExit("error: the tree is not as it was committed; commit, and measure again")
    result["date"] = date
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results (default: perf/results)")
    files = "FILE (default: perf/NUMBERS.md and README.md)"
    parser.add_argument("--write", type=Path, nargs="*", metavar="FILE", help=f"put the tables into {files}")
    parser.add_argument("--check", type=Path, nargs="*", metavar="FILE", help=f"exit 1 if one is stale in {files}")
    parser.add_argument("--keep", metavar="NAME", help="read a bench's output and keep its result under this name")
    parser.add_argument("--commit", help="with --keep: what the card says where there is no repository")
    args = parser.parse_args()
    if args.keep is not None:
        from datetime import UTC, datetime

        output = sys.stdin.read()
        sys.stdout.write(output)
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        keep(output, args.results, args.keep, date=date, commit=args.commit)
        return
    results = load(args.results)
    if args.write is None and args.check is None:
        print(table(results))
        return
    for document in (args.write if args.write is not None else args.check) or DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        fresh = with_tables(text, results)
        if args.write is not None:
            document.write_text(fresh, encoding="utf-8")
        elif fresh != text:
            raise SystemExit(f"error: a table in {document} is stale; python perf/table.py --write {document}")


if __name__ == "__main__":
    main()
