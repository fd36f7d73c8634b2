"""How everything here is measured: which machine, how long, and what the machine could do at best.

    python perf/measure.py            the card and the ceilings of this machine

A bench imports `machine_card`, `time_call`, `copy_bandwidth`, `product_rate` and `report`; it prints a table for eyes
and, as its last line, one JSON object for machines.

Times on CUDA come from events, one pair per call, with the second-level cache flushed before each unless the bench says
otherwise; the host does not wait between calls. Times on a CPU come from the wall clock, or from the clock of the
calling thread (``clock="thread"``), which other people's work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from streamdiff_kernels import plain

FLUSH_BYTES = 256 << 20
"""More than the second-level cache of any GPU at hand (H200: 50 MB)."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Percentiles of one call's duration, in milliseconds."""

    p50: float
    p95: float
    p99: float
    best: float
    num_runs: int


def priority() -> str:
    """How nice this process is; on Linux also its session, whose share counts first where sessions are grouped."""
    try:
        group = " of " + Path("/proc/self/autogroup").read_text(encoding="ascii").split(" ", 1)[1].strip()
    except (OSError, IndexError):
        group = ""
    return f"nice {os.nice(0)}{group}"


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest-rank percentile.

    >>> percentile([4.0, 1.0, 3.0, 2.0], 50), percentile([4.0, 1.0, 3.0, 2.0], 99)
    (2.0, 4.0)
    """
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def timing_of(times_ms: Sequence[float]) -> Timing:
    return Timing(*(percentile(times_ms, p) for p in (50, 95, 99)), min(times_ms), len(times_ms))


def time_call(
    call: Callable[[], object],
    device: torch.device,
    *,
    warmup: int = 3,
    max_runs: int = 100,
    budget_s: float = 1.0,
    flush: bool = True,
    clock: Literal["wall", "thread"] = "wall",
) -> Timing:
    """Duration of a call: as many runs as fit into ``budget_s``, at least 3 and at most ``max_runs``."""
    for _ in range(max(1, warmup)):
        call()
    if device.type == "cuda":
        return timing_of(_cuda_times_ms(call, device, max_runs, budget_s, flush))
    now = time.perf_counter if clock == "wall" else time.thread_time
    times_ms: list[float] = []
    while len(times_ms) < 3 or (len(times_ms) < max_runs and sum(times_ms) < 1e3 * budget_s):
        start_s = now()
        call()
        times_ms.append(1e3 * (now() - start_s))
    return timing_of(times_ms)


def _cuda_times_ms(
    call: Callable[[], object], device: torch.device, max_runs: int, budget_s: float, flush: bool
) -> list[float]:
    scratch = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device) if flush else None

    stream = torch.cuda.current_stream(device)

    def timed(count: int) -> list[float]:
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for before, after in marks:
            if scratch is not None:
                scratch.zero_()
            before.record(stream)
            call()
            after.record(stream)
        torch.cuda.synchronize(device)
        return [before.elapsed_time(after) for before, after in marks]

    first = timed(3)
    runs = int(1e3 * budget_s / max(1e-3, percentile(first, 50)))
    return timed(min(max_runs, max(3, runs)))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy: the ceiling of an op that only moves data."""
    size = (1 << 30) if device.type == "cuda" else (256 << 20)
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    timing = time_call(lambda: target.copy_(source), device, max_runs=30, flush=False)
    return 2 * size / (timing.best / 1e3)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product of random numbers: the ceiling of arithmetic in ``dtype``."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    if dtype == torch.float8_e4m3fn:
        ones = torch.ones(1, n, device=device)

        def call() -> object:
            return plain.linear_fp8(a[None], ones, b, ones[0], None, torch.bfloat16)

    elif device.type == "cpu" and plain.onednn_missing(dtype) is None:

        def call() -> object:
            return plain.product(a, b, None)

    else:

        def call() -> object:
            return a @ b.t()

    return 2 * n**3 / (time_call(call, device, max_runs=20, flush=False).best / 1e3)


def machine_card(device: torch.device) -> dict[str, Any]:
    """Which machine, which software, which commit."""
    card: dict[str, Any] = {
        "device": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _run("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty") or "unknown",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        card |= {
            "device": properties.name,
            "processors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
            "clocks_mhz": _run("nvidia-smi", "--query-gpu=clocks.max.sm,clocks.max.mem", "--format=csv,noheader").split(
                "\n"
            )[0],
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return card


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout.strip()
    except OSError:
        return ""


def show(rows: Sequence[dict[str, Any]], *, columns: Sequence[str] | None = None) -> None:
    """A table of ``columns`` (default: all) for eyes."""
    names = list(columns) if columns is not None else list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) if cells else len(name) for i, name in enumerate(names)]
    for line in (names, *cells):
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        sys.stdout.write("  ".join([first, *rest]).rstrip() + "\n")


def report(
    bench: str,
    title: str,
    rows: Sequence[dict[str, Any]],
    card: dict[str, Any],
    *,
    columns: Sequence[str] | None = None,
    save: Path | None = None,
    **facts: Any,
) -> None:
    """A table of ``columns`` (default: all) for eyes, then one JSON object; ``save`` writes that object too."""
    out = sys.stdout
    out.write(f"{title}\n{card['device']}, torch {card['torch']}, commit {card['commit']}\n\n")
    show(rows, columns=columns)
    result = {"bench": bench, "card": card, **facts, "rows": [_plain(row) for row in rows]}
    text = json.dumps(result)
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        save.write_text(text + "\n")
    out.write("\n" + text + "\n")


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {
        key: dataclasses.asdict(v) if dataclasses.is_dataclass(v) and not isinstance(v, type) else v
        for key, v in row.items()
    }


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Timing):
        return f"{value.p50:.3f}"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 10 else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}"
    return str(value)


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--save", type=Path, help="write the JSON object here too")
    args = parser.parse_args()
    device = pick_device(args.device)
    rows: list[dict[str, Any]] = [{"ceiling": "copy", "value": copy_bandwidth(device) / 1e9, "unit": "GB/s"}]
    types = [torch.float32, torch.bfloat16]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        types.append(torch.float8_e4m3fn)
    for dtype in types:
        name = str(dtype).removeprefix("torch.")
        rows.append({"ceiling": f"product {name}", "value": product_rate(device, dtype) / 1e12, "unit": "TFLOP/s"})
    report("ceilings", "What this machine can do", rows, machine_card(device), save=args.save)


if __name__ == "__main__":
    main()
