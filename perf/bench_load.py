"""What it costs to look at every weight while a checkpoint is loaded: with the checks and without, side by side.

    python perf/bench_load.py            1.3 GiB of bfloat16 weights in a temporary folder, 12 loads of each kind
    python perf/bench_load.py --cold     drop the file from the page cache before every load
    python perf/bench_load.py --layers 4 --repeats 3

Every load is one of a process of its own, as a rank loads its weights once: memory is new to it. The two kinds take
turns, so that load meets both alike. The ceiling: no check costs less than nothing, a ratio of 1. Weights are normal
with a deviation of 0.02, as models are trained to; ``--largest`` makes one in a thousand greater than two, which sends
every block to the slower of the two looks. The clock depends on who else computes; CPU time shows what the checks cost
in any case. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
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


def write_checkpoint(config: DiTConfig, folder: Path, *, largest: bool = False) -> int:
    """Random weights in one file; bytes."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in CausalDiT(config).state_dict().items()}
    tensors = {name: (0.02 * torch.randn(shape, generator=generator)).bfloat16() for name, shape in shapes.items()}
    if largest:
        for tensor in tensors.values():
            tensor.view(-1)[::1000] = 3.0
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file(tensors, path)
    return path.stat().st_size


class Unchecked(FiniteCheck):
    """Believes what it is shown."""

    def copy(self, name: str, target: Tensor, source: Tensor) -> None:
        target.copy_(source)


def load(config: DiTConfig, folder: Path, check: type[FiniteCheck]) -> tuple[float, float]:
    """Seconds by the clock, and of CPU time, of a load in a process of its own."""
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        loader.FiniteCheck = check
        began_s, cpu_s = time.perf_counter(), time.process_time()
        load_dit(config, folder)
        found = (time.perf_counter() - began_s, time.process_time() - cpu_s)
        os.write(there, json.dumps(found).encode())
        os._exit(0)
    os.close(there)
    with os.fdopen(here, "rb") as said:
        clock_s, cpu_s = json.loads(said.read())
    os.waitpid(child, 0)
    return clock_s, cpu_s


def forget(folder: Path) -> None:
    """Have the system drop the files of a folder from its page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--largest", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = DiTConfig(dim=1920, ffn_dim=7680, num_heads=15, num_layers=arguments.layers, text_dim=4096, text_len=512)
    kinds = {"unchecked": Unchecked, "checked": FiniteCheck}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_checkpoint(config, folder, largest=arguments.largest)
        load(config, folder, Unchecked)  # the first reads the file from the disk
        for _ in range(arguments.repeats):
            for kind, check in kinds.items():
                if arguments.cold:
                    forget(folder)
                found[kind].append(load(config, folder, check))
    state = "cold" if arguments.cold else "warm"
    tell(found, size, f"page cache {state}{', large weights' if arguments.largest else ''}")


def tell(found: dict[str, list[tuple[float, float]]], size: int, what: str) -> None:
    """The table, and the line for machines: medians, and the ratio of the medians."""
    clock, cpu = ({name: statistics.median(t[i] for t in times) for name, times in found.items()} for i in (0, 1))
    ratio, cpu_ratio = (each["checked"] / each["unchecked"] for each in (clock, cpu))
    rows = [
        {
            "load": name,
            "clock_s": round(clock[name], 3),
            "least_s": round(min(times)[0], 3),
            "cpu_s": round(cpu[name], 3),
            "least_cpu_s": round(min(t[1] for t in times), 3),
        }
        for name, times in found.items()
    ]
    title = f"{size / 2**30:.2f} GiB, {what}; with checks {ratio:.2f} of the time, {cpu_ratio:.2f} of the CPU time"
    facts = {"ratio": round(ratio, 3), "cpu": round(cpu_ratio, 3), "bytes": size, "load": os.getloadavg()[0]}
    report("load", title, rows, machine_card(torch.device("cpu")), **facts)


if __name__ == "__main__":
    main()
