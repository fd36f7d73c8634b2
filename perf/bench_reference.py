"""Our denoising step against the eager, published way of writing it: time and peak memory, in one run.

    python perf/bench_reference.py                              width 1024, 8 layers, float32 and bfloat16, 128x128
    python perf/bench_reference.py --sizes 128x128 256x256      also larger; the more tokens, the smaller the gain
    python perf/bench_reference.py --dim 256 --layers 2         smaller

Both compute the same velocity from the same weights (checked before anything is timed); forwards alternate, so a busy
machine is unfair to neither. Memory is the largest number of bytes held in tensors made during the forward, counted
at every operation; weights and histories, which both hold, do not count. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from published import PublishedStep, complex_table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from streamdiff import presets
from streamdiff.config import DiTConfig, EngineConfig
from streamdiff.memory import SinkMemory, StepMemory
from streamdiff.models import cost
from streamdiff.models.dit import CausalDiT, initialise
from streamdiff.models.served.options import StepOptions
from streamdiff.models.served.step import ServedStep, ServedWeights


class PeakBytes(TorchDispatchMode):
    """Bytes of tensors that are alive and were made inside the block; remembers the most."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in given and storage._cdata not in self._alive:
                    self._alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self._alive.values()))
        return out


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
    with PeakBytes() as counter:
        run()
    return counter.peak


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
    times: dict[str, list[float]] = {"ours": [], "published": []}
    for repeat in range(repeats):
        for name, run in (("ours", case.ours), ("published", case.published)):
            start_s = time.perf_counter()
            run(window + repeat)
            times[name].append(time.perf_counter() - start_s)
    ours_s, published_s = (statistics.median(times[name]) for name in ("ours", "published"))
    last = window + repeats - 1
    ours_bytes, published_bytes = (
        peak_bytes(lambda: case.ours(last)),
        peak_bytes(lambda: case.published(last)),
    )
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": config.chunk_tokens,
        "max_rel_difference": worst,
        "ours_s": round(ours_s, 4),
        "published_s": round(published_s, 4),
        "speedup": round(published_s / ours_s, 3),
        "speedup_each": [round(p / o, 3) for o, p in zip(times["ours"], times["published"], strict=True)],
        "ours_peak_mib": round(ours_bytes / 2**20, 1),
        "published_peak_mib": round(published_bytes / 2**20, 1),
        "memory_ratio": round(ours_bytes / published_bytes, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sizes", nargs="+", default=["128x128"], metavar="WxH")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [
        {"size": size, **bench(bench_config(args, size), getattr(torch, name), args.repeats)}
        for size in args.sizes
        for name in args.dtypes
    ]
    print(f"width {args.dim}, {args.layers} layers, {args.threads} thread(s)")
    print(f"{'':<22}{'published':>12}{'ours':>10}{'faster':>9}{'published':>12}{'ours':>10}{'ratio':>8}")
    for row in rows:
        print(
            f"{row['size']:<10}{row['tokens']:>5} x {row['dtype']:<9}"
            f"{row['published_s']:>8.3f} s{row['ours_s']:>8.3f} s{row['speedup']:>8.2f}x"
            f"{row['published_peak_mib']:>8.0f} MiB{row['ours_peak_mib']:>6.0f} MiB{row['memory_ratio']:>7.2f}x"
        )
    print(
        json.dumps(
            {"bench": "reference", "dim": args.dim, "layers": args.layers, "threads": args.threads, "rows": rows}
        )
    )


if __name__ == "__main__":
    main()
