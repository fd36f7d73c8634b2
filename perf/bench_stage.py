"""One denoising step of the 14B model at its true shapes, on one GPU: time, share of the ceiling, memory, energy.

    python perf/bench_stage.py                        bfloat16 and eight bits, as one graph and without
    python perf/bench_stage.py --precision fp8        one of them
    python perf/bench_stage.py --compile              torch.compile instead of our kernels, too (minutes, once)
    python perf/bench_stage.py --layers 8             fewer layers; 40 are extrapolated, and the result says so
    python perf/bench_stage.py --window 2             the sparse history: sink, previous chunk, own chunk
    python perf/bench_stage.py --predict              nothing is run: what `roofline` expects of an H200
    python perf/bench_stage.py --tiny                 the same on a toy model, anywhere

Weights are random: time does not depend on them, and a matrix product of zeros would run faster than a real one. The
window is full, as it is for all but the first chunks. ``step`` is `ServedStep` alone, inputs copied in and velocity
copied out; ``chunk`` is all that a rank does for a chunk: sound, rotations, sink, step, Euler. Ceilings are measured
first, the floor is that of `roofline`; nothing is timed unless the replayed graph equals the eager step bit for bit.
Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
from measure import Timing, machine_card, pick_device, report, time_call
from roofline import ASSUMED, Ceilings, Shapes, measured_ceilings, predict, served_costs
from torch import Tensor

from streamdiff import presets
from streamdiff.config import EngineConfig
from streamdiff.models import cost
from streamdiff.models.dit import CausalDiT, initialise
from streamdiff.models.served.options import Precision, StepOptions
from streamdiff.pipeline.denoise import DenoiseStage
from streamdiff.pipeline.packet import Command, Packet, SetReference, SwitchPrompt
from streamdiff_kernels import measure_backends

PRECISIONS = {"bf16": Precision.WEIGHTS, "fp8": Precision.FP8}
COLUMNS = (
    "precision",
    "way",
    "attention",
    "layers",
    "step_ms",
    "p95_ms",
    "chunk_ms",
    "floor_ms",
    "share_%",
    "fps",
    "memory_gib",
    "of_cost",
)


def bench_config(args: argparse.Namespace) -> EngineConfig:
    if args.tiny:
        tiny = presets.tiny()
        config = dataclasses.replace(tiny, height=64, width=64, dit=dataclasses.replace(tiny.dit, num_layers=4))
    else:
        width, height = (int(side) for side in args.size.split("x"))
        config = dataclasses.replace(presets.live_avatar_14b(), width=width, height=height)
    if args.window is not None:
        config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, window_chunks=args.window))
    return config


def with_layers(config: EngineConfig, num_layers: int) -> EngineConfig:
    """The same model cut short; sound enters the layers that are left."""
    assert config.dit.audio is not None
    inject = tuple(layer for layer in config.dit.audio.inject_layers if layer < num_layers)
    audio = dataclasses.replace(config.dit.audio, inject_layers=inject)
    return dataclasses.replace(config, dit=dataclasses.replace(config.dit, num_layers=num_layers, audio=audio))


def shapes_of(config: EngineConfig) -> Shapes:
    """The model as `roofline` knows it."""
    dit, audio = config.dit, config.dit.audio
    assert audio is not None
    return Shapes(
        tokens=config.chunk_tokens,
        frames=config.frames_per_chunk,
        heads=dit.num_heads,
        head_dim=dit.head_dim,
        hidden=dit.ffn_dim,
        sink=cost.sink_tokens(config),
        window=config.memory.window_chunks,
        text=dit.text_len,
        audio=audio.num_tokens + 1,
        layers=dit.num_layers,
        injectors=len(audio.inject_layers),
    )


def floor_ms(config: EngineConfig, ceilings: Ceilings, *, eight_bits: bool) -> float | None:
    """The sum over the step of what no kernel can beat; None where a product rate is not known."""
    if eight_bits and "float8_e4m3fn" not in ceilings.product:
        return None
    return sum(c.calls * c.floor_ms(ceilings) for c in served_costs(shapes_of(config), eight_bits=eight_bits))


def random_dit(config: EngineConfig, device: torch.device) -> CausalDiT:
    """Random weights that keep the variance of what passes through them, made where they are used."""
    with torch.device("meta"):
        dit = CausalDiT(config.dit).to(torch.bfloat16)
    dit = dit.to_empty(device=device).requires_grad_(False).eval()
    if device.type == "cpu":
        initialise(dit, seed=0)
        return dit
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in dit.named_parameters():
        if name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight")):
            parameter.fill_(1.0)
        elif name.endswith("casual_audio_encoder.weights"):
            parameter.fill_(0.01)
        else:
            fan_in = parameter[0].numel() if parameter.ndim > 1 else parameter.numel()
            std = 0.02 if name.endswith(("bias", "modulation", "mask.weight")) else fan_in**-0.5
            parameter.normal_(0.0, std, generator=generator)
    return dit


class Rig:
    """A rank that owns one step, and the packets that keep it busy."""

    def __init__(self, config: EngineConfig, device: torch.device, options: StepOptions) -> None:
        self.config, self.device = config, device
        self.start_bytes = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        self.stage = DenoiseStage(random_dit(config, device), config, (1,), options=options)
        self.generator = torch.Generator(device).manual_seed(1)
        self.chunk = -1

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def packet(self) -> Packet:
        """The next chunk; the first one brings a face and a prompt."""
        config, audio = self.config, self.config.dit.audio
        assert audio is not None
        self.chunk += 1
        commands: tuple[Command, ...] = ()
        if self.chunk == 0:
            motion = self.randn(1, 16, config.motion_latents, *config.latent_hw)
            reference = self.randn(1, 16, 1, *config.latent_hw)
            commands = (
                SetReference(reference, motion),
                SwitchPrompt(self.randn(1, min(40, config.dit.text_len), config.dit.text_dim)),
            )
        return Packet(
            chunk=self.chunk,
            epoch=0,
            lead=5,
            latent_BCTHW=self.randn(1, 16, config.frames_per_chunk, *config.latent_hw),
            audio_BZEA=self.randn(1, audio.num_features, audio.feature_dim, config.video_frames_per_chunk),
            commands=commands,
        )

    def one(self) -> None:
        """One chunk through the rank."""
        self.stage.step(self.packet())

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object]) -> float:
        self.wait()
        start_s = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start_s

    def step_call(self) -> Callable[[], Tensor]:
        """The step of the latest chunk, again and again: a chunk that is written twice is the same chunk."""
        packet, stage = self.packet(), self.stage
        stage.step(packet)
        first = packet.chunk * self.config.frames_per_chunk
        own = stage._own_rotation(first)
        assert stage._text is not None
        assert packet.audio_BZEA is not None
        text, audio = stage._text, stage._weights.audio_condition(packet.audio_BZEA)
        velocity = stage._steps[0].velocity
        return lambda: velocity(packet.latent_BCTHW, own, text, audio)

    @contextlib.contextmanager
    def eagerly(self) -> Generator[None]:
        """Without graphs, for as long as the block lasts."""
        weights = self.stage._weights
        graphs, weights.graphs = weights.graphs, None
        try:
            yield
        finally:
            weights.graphs = graphs


def compare(rig: Rig) -> dict[str, Any]:
    """Whether a replay gives the bits of the eager step; nothing is timed otherwise."""
    call = rig.step_call()
    found = call().clone()
    with rig.eagerly():
        expected = call().clone()
    if not (torch.isfinite(expected).all() and expected.std() > 1e-3):
        raise SystemExit("the step computes nothing with these weights: nothing was timed")
    equal = torch.equal(found, expected)
    if not equal and rig.stage._weights.graphs is not None:
        worst = (found - expected).abs().max().item()
        raise SystemExit(f"the replayed graph differs from the eager step by {worst:.1e}: nothing was timed")
    return {"replay_equals_eager": equal, "velocity": expected.cpu()}


def memory_of(rig: Rig, precision: str, options: StepOptions) -> dict[str, Any]:
    """Peak of an eager chunk, in which every allocation is seen, against `cost.rank_bytes`."""
    need = cost.rank_bytes(
        rig.config,
        num_steps=1,
        bytes_per_value=2,
        kept_layers=options.kept_layers if precision == "fp8" else None,
        eight_bit_history=options.history is Precision.FP8,
    ).total
    found: dict[str, Any] = {"cost_gib": need / 2**30}
    if rig.device.type == "cuda":
        with rig.eagerly():
            torch.cuda.reset_peak_memory_stats(rig.device)
            rig.stage.step(rig.packet())
            rig.wait()
        peak = torch.cuda.max_memory_allocated(rig.device) - rig.start_bytes
        found |= {
            "memory_gib": peak / 2**30,
            "of_cost": peak / need,
            "reserved_gib": torch.cuda.memory_reserved(rig.device) / 2**30,
        }
    return found


class Power(threading.Thread):
    """Watts and clock of the GPU while something runs, as nvidia-smi reports them."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[float, float]] = []
        self._over = threading.Event()

    def run(self) -> None:
        command = ["nvidia-smi", "--query-gpu=power.draw,clocks.sm", "--format=csv,noheader,nounits"]
        while not self._over.wait(0.2):
            try:
                out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
                watts, mhz = (float(field) for field in out.splitlines()[0].split(","))
            except (OSError, ValueError, IndexError, subprocess.SubprocessError):
                return
            self.samples.append((watts, mhz))

    def stop(self) -> list[tuple[float, float]]:
        self._over.set()
        self.join(15)
        return self.samples


def sustained(call: Callable[[], Tensor], device: torch.device, seconds: float) -> dict[str, Any]:
    """The step back to back until the card is as warm as in a stream: its clock may fall, and so the speed."""
    power = Power()
    power.start()
    stream = torch.cuda.current_stream(device)
    marks: list[torch.cuda.Event] = []
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        for _ in range(4):
            call()
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record(stream)
        marks[-1].synchronize()
    samples = power.stop()
    late = marks[len(marks) // 2 :]
    step_ms = late[0].elapsed_time(late[-1]) / (len(late) - 1)
    found: dict[str, Any] = {"sustained_ms": step_ms, "sustained_s": seconds}
    if samples := samples[len(samples) // 2 :]:
        watts = statistics.mean(watts for watts, _ in samples)
        found |= {
            "watts": watts,
            "sm_mhz": statistics.mean(mhz for _, mhz in samples),
            "joules_per_step": watts * step_ms / 1e3,
        }
    return found


@torch.inference_mode()
def bench(
    config: EngineConfig,
    precision: str,
    args: argparse.Namespace,
    device: torch.device,
    ceilings: Ceilings,
    *,
    compiled: bool,
) -> tuple[list[dict[str, Any]], Tensor]:
    """Rows of one rank, with graph and without, and a velocity to compare precisions by."""
    history = PRECISIONS[args.history]
    options = StepOptions(precision=PRECISIONS[precision], attention=args.attention, compile=compiled, history=history)
    rig = Rig(config, device, options)
    facts: dict[str, Any] = {
        # A name of its own: what is remembered in eight bits is no result for the step that is asked for.
        "precision": precision if history is Precision.WEIGHTS else f"{precision}, history {args.history}",
        "layers": config.dit.num_layers,
        "attention": rig.stage._steps[0].velocity._backend,
        "warm_s": rig.seconds(rig.stage.warm),
        "first_chunk_s": rig.seconds(rig.one),
        "fill_ms": [1e3 * rig.seconds(rig.one) for _ in range(config.memory.window_chunks)],
    }
    checked = compare(rig)
    velocity = checked.pop("velocity")
    facts |= checked | memory_of(rig, precision, options)
    floor = floor_ms(config, ceilings, eight_bits=precision == "fp8")
    rows: list[dict[str, Any]] = []
    for way in ["graph", "eager"] if device.type == "cuda" else ["eager"]:
        with contextlib.nullcontext() if way == "graph" else rig.eagerly():
            call = rig.step_call()
            step = time_call(call, device, flush=False, budget_s=args.budget_s, max_runs=args.runs)
            chunk = time_call(rig.one, device, flush=False, budget_s=args.budget_s, max_runs=args.runs)
            hot = sustained(call, device, args.sustain_s) if way == "graph" and args.sustain_s > 0 else {}
        rows.append(row_of(config, f"{way} compiled" if compiled else way, step, chunk, floor) | facts | hot)
    return rows, velocity


def release(device: torch.device) -> None:
    """Give back what the last rank held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def row_of(config: EngineConfig, way: str, step: Timing, chunk: Timing, floor: float | None) -> dict[str, Any]:
    return {
        "way": way,
        "step": step,
        "chunk": chunk,
        "step_ms": step.p50,
        "p95_ms": step.p95,
        "p99_ms": step.p99,
        "chunk_ms": chunk.p50,
        "floor_ms": floor,
        "share_%": None if floor is None else 100 * floor / step.p50,
        # What a line gives whose slowest rank is this one.
        "fps": 1e3 * config.video_frames_per_chunk / chunk.p50,
    }


def extrapolated(
    short: dict[str, Any], shorter: dict[str, Any], config: EngineConfig, ceilings: Ceilings
) -> dict[str, Any]:
    """A row for the whole model from two that are cut short: time is linear in the number of layers."""
    whole, precision = config.dit.num_layers, short["precision"]
    step_ms, chunk_ms = (
        short[key] + (whole - short["layers"]) * (short[key] - shorter[key]) / (short["layers"] - shorter["layers"])
        for key in ("step_ms", "chunk_ms")
    )
    floor = floor_ms(config, ceilings, eight_bits=precision.startswith("fp8"))
    return {
        "precision": precision,
        "way": short["way"],
        "attention": short["attention"],
        "layers": whole,
        "extrapolated_from": [shorter["layers"], short["layers"]],
        "step_ms": step_ms,
        "chunk_ms": chunk_ms,
        "floor_ms": floor,
        "share_%": None if floor is None else 100 * floor / step_ms,
        "fps": 1e3 * config.video_frames_per_chunk / chunk_ms,
    }


def fitting_layers(config: EngineConfig, device: torch.device) -> int:
    """As many layers as the memory holds, all of them if it can."""
    whole = config.dit.num_layers
    if device.type != "cuda":
        return whole
    free, _ = torch.cuda.mem_get_info(device)

    def fits(num_layers: int) -> bool:
        need = cost.rank_bytes(with_layers(config, num_layers), num_steps=1, bytes_per_value=2).total
        return 1.1 * need + 2 * 2**30 <= free

    return next((n for n in range(whole, 1, -1) if fits(n)), 2)


def attention_times(config: EngineConfig, device: torch.device) -> list[dict[str, Any]]:
    """Every attention backend that runs here, at the shape of the step."""
    dit = config.dit
    M = cost.sink_tokens(config) + config.memory.window_chunks * config.chunk_tokens
    shape = (dit.num_heads, dit.head_dim)
    q = torch.randn(1, config.chunk_tokens, *shape, device=device).to(torch.bfloat16)
    keys, values = (torch.randn(1, M, *shape, device=device).to(torch.bfloat16) for _ in range(2))
    flops = 4 * config.chunk_tokens * M * dit.dim
    times_ms = measure_backends(q, keys, values, num_runs=11)
    return [
        {"backend": name, "ms": ms, "tflops": flops / ms / 1e9}
        for name, ms in sorted(times_ms.items(), key=lambda item: item[1])
        if ms != float("inf")
    ]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=[*PRECISIONS, "both"], default="both")
    parser.add_argument("--size", default="384x704", metavar="WxH", help="picture (default: %(default)s)")
    parser.add_argument("--window", type=int, help="chunks attended to, the own one included (default: 4)")
    parser.add_argument("--layers", type=int, help="default: as many as fit")
    parser.add_argument("--attention", default="auto", help="backend, or auto: the fastest (default)")
    parser.add_argument("--history", choices=list(PRECISIONS), default="bf16", help="what is remembered in")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile instead of our kernels")
    parser.add_argument("--predict", action="store_true", help="what is expected of an H200; nothing is run")
    parser.add_argument("--tiny", action="store_true", help="a toy model: what runs here runs there")
    parser.add_argument("--assume", choices=sorted(ASSUMED), help="use known ceilings instead of measuring")
    parser.add_argument("--runs", type=int, default=60, help="at most so many runs of each (default: %(default)s)")
    parser.add_argument("--budget-s", type=float, default=8.0, help="at most so long (default: %(default)s)")
    parser.add_argument("--sustain-s", type=float, default=10.0, help="back to back on CUDA; 0: not at all")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--save", type=Path, help="write the JSON object here too")
    return parser


def main() -> None:
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.deterministic = True
    device = pick_device(args.device)
    if device.type != "cuda":
        args.sustain_s = 0.0
    config = bench_config(args)
    if args.predict:
        predict(shapes_of(config), device, args.save)
        return
    if device.type != "cuda" and not args.tiny and args.layers is None:
        raise SystemExit("14 billion weights take 50 GiB and minutes per step on a CPU; add --tiny, or --layers 2")
    ceilings = ASSUMED[args.assume] if args.assume else measured_ceilings(device)
    attention = attention_times(config, device)
    for line in attention:
        print(f"attention {line['backend']:<12}{line['ms']:>10.3f} ms{line['tflops']:>10.2f} TFLOP/s")
    num_layers = args.layers or fitting_layers(config, device)
    lengths = [num_layers] if num_layers == config.dit.num_layers else [num_layers, max(1, num_layers // 2)]
    rows: list[dict[str, Any]] = []
    velocities: dict[str, Tensor] = {}
    for precision in PRECISIONS if args.precision == "both" else (args.precision,):
        runs: list[list[dict[str, Any]]] = []
        for length in lengths:
            found: list[dict[str, Any]] = []
            for compiled in (False, True) if args.compile else (False,):
                cut = with_layers(config, length)
                more, velocity = bench(cut, precision, args, device, ceilings, compiled=compiled)
                velocities.setdefault(precision, velocity)
                found += more
                release(device)
            runs.append(found)
        rows += [row for found in runs for row in found]
        if len(runs) == 2:
            rows += [extrapolated(*pair, config, ceilings) for pair in zip(*runs, strict=True)]
    facts: dict[str, Any] = {}
    if len(velocities) == 2:
        sixteen, eight = velocities["bf16"].double(), velocities["fp8"].double()
        facts["fp8_rms_difference"] = ((eight - sixteen).norm() / sixteen.norm()).item()
    M = cost.sink_tokens(config) + config.memory.window_chunks * config.chunk_tokens
    report(
        "stage",
        f"One step of {config.name}, {config.width}x{config.height}: {config.chunk_tokens} tokens over {M}",
        rows,
        machine_card(device),
        columns=COLUMNS,
        save=args.save,
        tiny=args.tiny,
        size=f"{config.width}x{config.height}",
        window=config.memory.window_chunks,
        tokens=config.chunk_tokens,
        rows_attended=M,
        tflop=cost.step_flops(config).total / 1e12,
        ceilings={"copy": ceilings.copy, **ceilings.product, "source": ceilings.source},
        attention=attention,
        **facts,
    )


if __name__ == "__main__":
    main()
