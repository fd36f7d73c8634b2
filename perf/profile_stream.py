"""Who did what when, in the words of the schedule: a trace for https://ui.perfetto.dev, and shares in a table.

    streamdiff generate ... --trace out/trace                 every rank writes one line a span
    python perf/profile_stream.py out/trace                   all ranks on one time line -> out/trace/stream.json

    python perf/profile_stream.py --step --tiny               one step under torch's profiler, any machine
    python perf/profile_stream.py --step --precision fp8      the 14B step on a GPU, kernel by kernel

The ranks of one machine share its monotonic clock, so their spans need no aligning; arrows follow each chunk from rank
to rank. (The name `profile` belongs to a module of Python's own that torch imports.) Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

PHASES = ("step", "wait", "send")
"""What fills the time of a rank's loop; ``denoise``, ``decode`` and ``sink`` lie within ``step``."""


@dataclass(frozen=True, slots=True)
class Line:
    """One span of one rank, seconds on the machine's monotonic clock."""

    rank: int
    name: str
    start_s: float
    end_s: float
    labels: dict[str, int | str] = field(default_factory=dict[str, int | str])

    @property
    def chunk(self) -> int | None:
        chunk = self.labels.get("chunk")
        return chunk if isinstance(chunk, int) else None


def read(folder: Path) -> list[Line]:
    """The lines of every ``rank*.jsonl`` in a folder, in order of time."""
    files = sorted(folder.glob("rank*.jsonl"))
    if not files:
        raise SystemExit(f"error: there is no rank*.jsonl in {folder}; make some with streamdiff generate --trace")
    lines: list[Line] = []
    for path in files:
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                span = json.loads(text)
                rank, name, start_s, end_s = (span.pop(key) for key in ("rank", "name", "start_s", "end_s"))
            except (json.JSONDecodeError, KeyError, AttributeError):
                raise SystemExit(f"error: line {number} of {path} is no span: {text[:60]!r}") from None
            lines.append(Line(rank, name, start_s, end_s, span))
    return sorted(lines, key=lambda line: (line.start_s, -line.end_s))


def chrome_trace(lines: Sequence[Line]) -> dict[str, Any]:
    """The spans as a Chrome trace: a process per rank, an arrow for every chunk that was handed on."""
    zero_s = min(line.start_s for line in lines)

    def microseconds(moment_s: float) -> float:
        return round(1e6 * (moment_s - zero_s), 3)

    events: list[dict[str, Any]] = []
    for rank in sorted({line.rank for line in lines}):
        does = sorted({line.name for line in lines if line.rank == rank} - set(PHASES))
        name = f"rank {rank}" + (f": {', '.join(does)}" if does else "")
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": name}})
        events.append({"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}})
    for line in lines:
        step = line.labels.get("step")
        events.append(
            {
                "ph": "X",
                "name": line.name if step is None else f"{line.name} step {step}",
                "cat": line.name,
                "pid": line.rank,
                "tid": 0,
                "ts": microseconds(line.start_s),
                "dur": round(1e6 * (line.end_s - line.start_s), 3),
                "args": line.labels,
            }
        )
    for identity, (before, after) in enumerate(_hand_overs(lines)):
        arrow = {"name": f"chunk {after.chunk}", "cat": "chunk", "id": identity, "tid": 0}
        events.append({**arrow, "ph": "s", "pid": before.rank, "ts": microseconds(before.start_s)})
        events.append({**arrow, "ph": "f", "bp": "e", "pid": after.rank, "ts": microseconds(after.start_s)})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _hand_overs(lines: Sequence[Line]) -> Iterable[tuple[Line, Line]]:
    """A rank's ``send`` and the next rank's ``step`` of the same chunk; made anew after a rewind, it is another one."""
    ranks = sorted({line.rank for line in lines})
    for rank, following in pairwise(ranks):
        sent = [line for line in lines if line.rank == rank and line.name == "send" and line.chunk is not None]
        taken = [line for line in lines if line.rank == following and line.name == "step"]
        for before, after in zip(sent, taken, strict=False):
            if before.chunk == after.chunk:
                yield before, after


def shares(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Per rank: what its time went into, from its first step to its last; medians per chunk."""
    rows: list[dict[str, Any]] = []
    for rank in sorted({line.rank for line in lines}):
        own = [line for line in lines if line.rank == rank]
        steps = [line for line in own if line.name == "step"]
        if not steps:
            continue
        first_s, last_s = steps[0].start_s, max(line.end_s for line in steps)
        row: dict[str, Any] = {"rank": rank, "chunks": len(steps)}
        for name in PHASES:
            within = [line for line in own if line.name == name and line.start_s >= first_s and line.end_s <= last_s]
            spent_s = sum(line.end_s - line.start_s for line in within)
            row[f"{name}_%"] = 100 * spent_s / (last_s - first_s) if last_s > first_s else 0.0
        for name in sorted({line.name for line in own} - {"wait", "send"}):
            times_ms = [1e3 * (line.end_s - line.start_s) for line in own if line.name == name]
            row[f"{name}_ms"] = statistics.median(times_ms)
        rows.append(row)
    return rows


def stream_facts(lines: Sequence[Line]) -> dict[str, Any]:
    """Of the line as a whole: the period, the slowest rank, and how long a chunk takes from end to end."""
    steps = [line for line in lines if line.name == "step"]
    ranks = sorted({line.rank for line in steps})
    if not ranks:
        raise SystemExit("error: these traces hold no step; was the stream longer than nothing?")
    entered = [line.start_s for line in steps if line.rank == ranks[0]]
    left = [line.end_s for line in steps if line.rank == ranks[-1]]
    through_ms = sorted(1e3 * (after - before) for before, after in zip(entered, left, strict=False))
    half = left[len(left) // 2 :]
    busy = {rank: statistics.median(s.end_s - s.start_s for s in steps if s.rank == rank) for rank in ranks}
    return {
        "ranks": len(ranks),
        "chunks": len(left),
        "period_ms": 1e3 * statistics.median(b - a for a, b in pairwise(half)) if len(half) > 1 else None,
        "first_chunk_ms": 1e3 * (left[0] - entered[0]),
        "through_p50_ms": statistics.median(through_ms),
        "slowest_rank": max(busy, key=busy.__getitem__),
    }


WORDS = (
    ("attention", r"attend|attention|flash|fmha|sdpa"),
    ("ring", r"qk_norm|rope|rotate|ring"),
    ("eight bits", r"quantise|fp8|e4m3"),
    ("norm and residual", r"norm|residual|modulate|gate"),
    ("linear", r"gemm|linear|addmm|\bmm\b|matmul|scaled_mm|nvjet|cutlass|product|xmma"),
    ("copy", r"copy|memcpy|memset|clone|\bcat\b|fill|zero"),
)
"""What an operation or a kernel belongs to, by its name; the first that matches."""


def word_of(name: str) -> str:
    """The part of a step that an operation belongs to.

    >>> word_of("aten::addmm"), word_of("streamdiff_kernels::qk_norm_rope_write"), word_of("aten::silu")
    ('linear', 'ring', 'other')
    """
    return next((word for word, pattern in WORDS if re.search(pattern, name, re.IGNORECASE)), "other")


@torch.inference_mode()
def profile_step(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Chunks of one rank under torch's profiler: time by part of the step, and a trace."""
    from bench_stage import PRECISIONS, Rig, bench_config, fitting_layers, with_layers
    from measure import machine_card, pick_device

    from streamdiff.models.served.options import StepOptions

    device = pick_device(args.device)
    config = bench_config(args)
    config = with_layers(config, args.layers or fitting_layers(config, device))
    options = StepOptions(precision=PRECISIONS[args.precision], attention=args.attention, graph=not args.eager)
    rig = Rig(config, device, options)
    rig.stage.warm()
    for _ in range(config.memory.window_chunks + 1):
        rig.one()
    rig.wait()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(args.chunks):
            with torch.profiler.record_function(f"chunk {rig.chunk + 1}"):
                rig.one()
        rig.wait()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(args.out))
    spent_us: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in profiler.key_averages():
        own_us = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        # On a GPU the operation and its kernel both carry the kernel's time; the kernel alone is counted.
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if event.key.startswith("chunk ") or own_us <= 0 or (device.type == "cuda" and not on_device):
            continue
        spent_us[word_of(event.key)] += own_us
        calls[word_of(event.key)] += event.count
    total_us = sum(spent_us.values())
    rows = [
        {
            "part": word,
            "ms_per_chunk": us / 1e3 / args.chunks,
            "share_%": 100 * us / total_us,
            "calls": calls[word] // args.chunks,
        }
        for word, us in sorted(spent_us.items(), key=lambda item: -item[1])
    ]
    facts = {
        "card": machine_card(device),
        "tiny": args.tiny,
        "precision": args.precision,
        "layers": config.dit.num_layers,
        "window": config.memory.window_chunks,
        "attention": rig.stage._steps[0].velocity._backend,
    }
    return rows, facts


def show(rows: Sequence[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(key for row in rows for key in row))
    cells = [names, *[[_cell(row.get(name)) for name in names] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="folder of rank*.jsonl")
    parser.add_argument("--out", type=Path, help="trace to write (default: FOLDER/stream.json, or out/step.json)")
    step = parser.add_argument_group("one step")
    step.add_argument("--step", action="store_true", help="profile a step of random weights instead")
    step.add_argument("--tiny", action="store_true", help="of a toy model")
    step.add_argument("--precision", choices=["bf16", "fp8"], default="bf16")
    step.add_argument("--attention", default="auto")
    step.add_argument("--eager", action="store_true", help="without graphs: operations keep their names on a GPU")
    step.add_argument("--size", default="384x704", metavar="WxH")
    step.add_argument("--window", type=int)
    step.add_argument("--layers", type=int)
    step.add_argument("--chunks", type=int, default=3)
    step.add_argument("--device", default="auto")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.step:
        args.out = args.out or Path("out/step.json")
        rows, facts = profile_step(args)
        show(rows)
        print(f"\n{args.out}: open it in https://ui.perfetto.dev")
        print(json.dumps({"bench": "profile", **facts, "rows": rows}))
        return
    if args.folder is None:
        parser.error("give a folder of traces, or --step")
    lines = read(args.folder)
    out = args.out or args.folder / "stream.json"
    out.write_text(json.dumps(chrome_trace(lines)), encoding="utf-8")
    rows, facts = shares(lines), stream_facts(lines)
    show(rows)
    period = f"one chunk every {facts['period_ms']:.1f} ms, " if facts["period_ms"] is not None else ""
    print(
        f"\n{facts['chunks']} chunks through {facts['ranks']} ranks: {period}{facts['through_p50_ms']:.1f} ms from end "
        f"to end, rank {facts['slowest_rank']} is the slowest\n{out}: open it in https://ui.perfetto.dev"
    )
    print(json.dumps({"bench": "stream", **facts, "rows": rows}))


if __name__ == "__main__":
    main()
