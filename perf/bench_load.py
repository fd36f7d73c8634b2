"""What it costs to look at every weight while a checkpoint is loaded: with the checks and without, side by side.

    python perf/bench_load.py            1.1 GB of random bfloat16 weights in a temporary folder, 12 loads of each kind
    python perf/bench_load.py --layers 4 --repeats 3

The two kinds take turns, so that load meets both alike. The file lies in the page cache: a disk would only
make the share smaller. The ceiling: no check costs less than nothing, a ratio of 1. The checks have a thread of their
own, so the clock does not show them where a second core is free; CPU time shows what they cost in any case. Last line:
one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from measure import machine_card, report
from safetensors.torch import save_file
from torch import Tensor

from streamdiff.checkpoint import dit as loader
from streamdiff.checkpoint import load_dit
from streamdiff.config import DiTConfig
from streamdiff.models.dit import CausalDiT
from streamdiff.tensorfile import FiniteCheck


def write_checkpoint(config: DiTConfig, folder: Path) -> int:
    """Random weights in one file; bytes."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in CausalDiT(config).state_dict().items()}
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file({name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}, path)
    return path.stat().st_size


class Unchecked(FiniteCheck):
    """Believes what it is shown."""

    def look(self, name: str, tensor: Tensor) -> None:
        pass


def load(config: DiTConfig, folder: Path, check: type[FiniteCheck]) -> tuple[float, float]:
    """Seconds by the clock, and of CPU time."""
    loader.FiniteCheck = check
    began_s, cpu_s = time.perf_counter(), time.process_time()
    load_dit(config, folder)
    return time.perf_counter() - began_s, time.process_time() - cpu_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--repeats", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = DiTConfig(dim=1920, ffn_dim=7680, num_heads=15, num_layers=arguments.layers, text_dim=4096, text_len=512)
    kinds = {"unchecked": Unchecked, "checked": FiniteCheck}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory() as folder:
        size = write_checkpoint(config, Path(folder))
        for _ in range(arguments.repeats):
            for name, check in kinds.items():
                found[name].append(load(config, Path(folder), check))
    clock, cpu = ({name: statistics.median(t[i] for t in times) for name, times in found.items()} for i in (0, 1))
    ratio, cpu_ratio = (each["checked"] / each["unchecked"] for each in (clock, cpu))
    rows = [
        {
            "load": name,
            "clock_s": round(clock[name], 3),
            "least_s": round(min(times)[0], 3),
            "cpu_s": round(cpu[name], 3),
        }
        for name, times in found.items()
    ]
    title = f"{size / 2**30:.2f} GiB of weights; with checks {ratio:.2f} of the time, {cpu_ratio:.2f} of the CPU time"
    report(
        "load",
        title,
        rows,
        machine_card(torch.device("cpu")),
        ratio=round(ratio, 3),
        cpu=round(cpu_ratio, 3),
        bytes=size,
    )


if __name__ == "__main__":
    main()
