"""Our denoising step against the eager, published way of writing it: time and peak memory, in one run.

    python perf/bench_reference.py                              width 1024, 8 layers, float32 and bfloat16, 128x128
    python perf/bench_reference.py --sizes 128x128 256x256 512x528     192, 768 and 3168 tokens a chunk
    python perf/bench_reference.py --dim 256 --layers 2         smaller

Both compute the same velocity from the same weights (checked before anything is timed), a prompt of 40 rows padded to
512; forwards alternate, so a busy machine is unfair to neither. Ratios are of CPU time of the thread that computes,
median and the middle half of all repeats; wall time stands beside. Memory is the peak of what torch's own allocator
handed out during the forward, as its profiler reports every block, also inside custom operations; weights and
histories, which both hold, do not count. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from published import PublishedStep, complex_table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from streamdiff import presets
from streamdiff.config import DiTConfig, EngineConfig
from streamdiff.memory import SinkMemory, StepMemory
from streamdiff.models import cost
from streamdiff.models.dit import CausalDiT, initialise
from streamdiff.models.served.options import StepOptions
from streamdiff.models.served.step import ServedStep, ServedWeights


def bench_config(args: argparse.Namespace, size: str) -> EngineConfig:
    tiny = presets.tiny()
    width, height = (int(side) for side in size.split("x"))
    assert tiny.dit.audio is not None
    every = max(1, args.layers // 4)
    return dataclasses.replace(
        tiny,
        dit=DiTConfig(
            dim=args.dim,
            # 13824 / 5120 of the published model, in whole tiles.
            ffn_dim=args.dim * 11 // 4,
            num_heads=args.dim // 128,
            num_layers=args.layers,
            text_dim=4096,
            text_len=512,
            audio=dataclasses.replace(
                tiny.dit.audio,
                feature_dim=1024,
                num_features=25,
                inject_layers=tuple(range(0, args.layers, every)),
            ),
        ),
        height=height,
        width=width,
    )


class Case:
    """Both ways of computing the same step, side by side."""

    def __init__(self, config: EngineConfig, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.config = config
        dit = CausalDiT(config.dit)
        initialise(dit, seed=1)
        self.dit = dit.to(dtype).requires_grad_(False)
        latent_h, latent_w = config.latent_hw
        reference = torch.randn(1, 16, 1, latent_h, latent_w, generator=generator)
        motion = torch.randn(1, 16, 19, latent_h, latent_w, generator=generator)
        self.text = torch.randn(1, 40, 4096, generator=generator)
        self.audio = torch.randn(1, 25, 1024, config.video_frames_per_chunk, generator=generator)
        self.noise = torch.randn(1, 16, config.frames_per_chunk, latent_h, latent_w, generator=generator)
        self.sigma = config.sigmas[1]
        moving = config.frame_tokens
        self.sink = SinkMemory(
            num_layers=config.dit.num_layers,
            num_streams=1,
            moving_tokens=moving,
            still_tokens=cost.sink_tokens(config) - moving,
            num_heads=config.dit.num_heads,
            head_dim=config.dit.head_dim,
            dtype=dtype,
            device="cpu",
        )
        plain = dit.text_condition(self.text)
        dit.prefill_sink(reference, motion, plain, dit.modulation(0.0), self.sink, position=30)
        self.memory = StepMemory(self.sink, chunk_tokens=config.chunk_tokens, window_chunks=config.memory.window_chunks)
        still = dit.motion_rotation(config.latent_hw)
        self.memory.take_sink(still)
        self._still_table = torch.complex(still.cos_LF.double(), still.sin_LF.double())[:, None]
        keys = torch.stack([self.sink.keys(z) for z in range(config.dit.num_layers)])
        self.theirs = PublishedStep(
            dit,
            window_tokens=config.memory.window_chunks * config.chunk_tokens,
            sink_keys=keys,
            sink_values=self.sink.values_ZBSNK,
        )
        options = StepOptions()
        self.weights = ServedWeights(dit, options)
        self.condition = self.weights.text_condition(self.text)
        self.served = ServedStep(self.weights, dit.modulation(self.sigma), self.memory, options)

    def ours(self, chunk: int) -> Tensor:
        config, dit = self.config, self.dit
        first = chunk * config.frames_per_chunk
        self.memory.admit(chunk)
        self.memory.turn_sink(dit.frame_rotation([first + 30], config.latent_hw))
        own = dit.frame_rotation(range(first, first + config.frames_per_chunk), config.latent_hw)
        return self.served(self.noise, own, self.condition, self.weights.audio_condition(self.audio))

    def published(self, chunk: int) -> Tensor:
        config = self.config
        rows, columns = config.latent_hw[0] // 2, config.latent_hw[1] // 2
        reference = complex_table([chunk * config.frames_per_chunk + 30], rows, columns, config.dit.rotary_pairs)
        tables = torch.cat([reference, self._still_table])
        return self.theirs(self.noise, self.sigma, self.text, self.audio, chunk=chunk, sink_tables=tables)


def peak_bytes(run: Callable[[], Tensor]) -> int:
    """Most bytes that torch's allocator had handed out at once, above what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
    results = watched.profiler.kineto_results
    blocks = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    alive = peak = 0
    for _, size in blocks:
        alive += size
        peak = max(peak, alive)
    return peak


def quartiles(values: list[float]) -> list[float]:
    """First quartile, median, third quartile."""
    return [round(q, 3) for q in statistics.quantiles(values, n=4)]


@torch.inference_mode(False)
@torch.no_grad()
def bench(config: EngineConfig, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    case = Case(config, dtype)
    window = config.memory.window_chunks
    worst = 0.0
    for chunk in range(window):
        ours, theirs = case.ours(chunk), case.published(chunk)
        worst = max(worst, ((ours - theirs).abs().max() / theirs.abs().max()).item())
    limit = 1e-4 if dtype == torch.float32 else 5e-2
    if not worst < limit:
        raise SystemExit(f"the two ways disagree by {worst:.1e} in {dtype}, more than {limit:.0e}: nothing was timed")
    cpu: dict[str, list[float]] = {"ours": [], "published": []}
    wall: dict[str, list[float]] = {"ours": [], "published": []}
    for repeat in range(repeats):
        for name, run in (("ours", case.ours), ("published", case.published)):
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            run(window + repeat)
            cpu[name].append(time.process_time() - cpu_s)
            wall[name].append(time.perf_counter() - wall_s)
    last = window + repeats - 1
    ours_bytes, published_bytes = (
        peak_bytes(lambda: case.ours(last)),
        peak_bytes(lambda: case.published(last)),
    )
    ratios = quartiles([p / o for o, p in zip(cpu["ours"], cpu["published"], strict=True)])
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": config.chunk_tokens,
        "max_rel_difference": worst,
        **{f"{name}_cpu_s": round(statistics.median(cpu[name]), 4) for name in cpu},
        **{f"{name}_wall_s": round(statistics.median(wall[name]), 4) for name in wall},
        "repeats": repeats,
        "speedup": ratios[1],
        "speedup_quartiles": ratios,
        "ours_peak_mib": round(ours_bytes / 2**20, 1),
        "published_peak_mib": round(published_bytes / 2**20, 1),
        "memory_ratio": round(ours_bytes / published_bytes, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sizes", nargs="+", default=["128x128"], metavar="WxH")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [
        {"size": size, **bench(bench_config(args, size), getattr(torch, name), args.repeats)}
        for size in args.sizes
        for name in args.dtypes
    ]
    load, nice = round(os.getloadavg()[0], 1), os.nice(0)
    print(f"width {args.dim}, {args.layers} layers, {args.threads} thread(s), load {load}, nice {nice}, CPU time")
    print(f"{'':<22}{'published':>12}{'ours':>10}{'faster, middle half':>24}{'published':>12}{'ours':>10}{'ratio':>8}")
    for row in rows:
        low, median, high = row["speedup_quartiles"]
        print(
            f"{row['size']:<10}{row['tokens']:>5} x {row['dtype']:<9}"
            f"{row['published_cpu_s']:>8.3f} s{row['ours_cpu_s']:>8.3f} s{median:>9.2f}x  {low:.2f} .. {high:.2f}"
            f"{row['published_peak_mib']:>8.0f} MiB{row['ours_peak_mib']:>6.0f} MiB{row['memory_ratio']:>7.2f}x"
        )
    facts = {"dim": args.dim, "layers": args.layers, "threads": args.threads, "load": load, "nice": nice}
    print(json.dumps({"bench": "reference", **facts, "rows": rows}))


if __name__ == "__main__":
    main()
