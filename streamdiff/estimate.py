"""What a job will need and how fast it will be, before anything large is loaded."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import torch

from streamdiff.config import EngineConfig
from streamdiff.engine import Engine
from streamdiff.errors import BackendError
from streamdiff.models import cost
from streamdiff.models.audio import AudioChunk
from streamdiff.models.served.options import Precision, StepOptions
from streamdiff.models.vae_cost import vae_flops
from streamdiff.pipeline.decode import PRIMING_LATENTS
from streamdiff.pipeline.schedule import Costs, Role, Schedule, rank_costs_us, render

_TEXT_ENCODER_BYTES = 11_400_000_000
"""The published umT5-xxl encoder in bfloat16; it is loaded into host memory."""
_SPEECH_ENCODER_BYTES = 1_300_000_000
"""wav2vec2-large in float32."""

_DENSE_SHARE = 0.52
_CONV_SHARE = 0.27
"""Shares of a large matrix product's speed that a denoising step and the decoder reach. From Live Avatar, table 3: a
bfloat16 step of 121 TFLOP in 0.333 s and a decode of 27 TFLOP in 0.148 s, where products run at about 700 TFLOP/s."""

_MEASURED_CHUNKS = 3
"""Timed after the window is full."""
_PATIENCE_S = 60.0
"""A measurement that would take longer is predicted instead."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Seconds per chunk, and where the numbers come from."""

    costs: Costs
    basis: str


def _flops(config: EngineConfig) -> tuple[int, int]:
    """Operations of one chunk: in one denoising step, and in the decoder."""
    decode = config.frames_per_chunk * vae_flops(config.vae, "decoder", *config.latent_hw)
    return cost.step_flops(config).total, decode


def predicted_costs(config: EngineConfig, dense_flops_per_s: float = 700e12) -> Costs:
    """Costs in proportion to the operations; arithmetic, so the same on every rank and machine."""
    step, decode = _flops(config)
    return Costs(
        step_s=(step / (_DENSE_SHARE * dense_flops_per_s),) * config.num_steps,
        decode_s=decode / (_CONV_SHARE * dense_flops_per_s),
    )


def forecast(engine: Engine, *, assumed_flops_per_s: float | None = None) -> Forecast:
    """Costs on this machine: measured where model and picture are small, predicted from a matrix product elsewhere.

    With ``assumed_flops_per_s``, costs on a device that multiplies matrices that fast.

    Raises BackendError when the engine's options cannot run here.
    """
    shares = f"a step is taken to reach {_DENSE_SHARE:.0%} of that and the decoder {_CONV_SHARE:.0%} (not measured)"
    if engine.options.precision is Precision.FP8:
        shares += "; eight-bit products are counted at the speed of sixteen-bit ones"
    if assumed_flops_per_s is not None:
        return Forecast(
            predicted_costs(engine.config, assumed_flops_per_s),
            f"predicted for a device that multiplies at {assumed_flops_per_s / 1e12:g} TFLOP/s; {shares}",
        )
    engine.options.check(engine.config.dit, engine.device, engine.dtype)
    rate = _matmul_rate(engine.device, engine.dtype)
    predicted = predicted_costs(engine.config, rate)
    obstacle = _obstacle(engine, predicted)
    if obstacle is None:
        return Forecast(_measured(engine), f"measured here, on {engine.device}")
    return Forecast(
        predicted, f"predicted, as {obstacle}: a matrix product runs at {rate / 1e12:.2f} TFLOP/s here; {shares}"
    )


def _obstacle(engine: Engine, predicted: Costs) -> str | None:
    """Why costs cannot be measured here and now, or None when they can."""
    if not engine.is_small:
        return "the model is large"
    config, device = engine.config, str(engine.device)
    alone = Role(rank=0, encodes=True, steps=(0,), decodes=True)
    need = role_bytes(config, alone, device=device, from_folder=False, options=engine.options)
    have = available_bytes(device)
    if have is not None and need > have:
        return f"measuring takes {_size(need)} and {device} has {_size(have)} free"
    # The chunks, and the decoding of the still picture before them.
    seconds = (config.memory.window_chunks + _MEASURED_CHUNKS) * (predicted.step_s[0] + predicted.decode_s)
    seconds += PRIMING_LATENTS / config.frames_per_chunk * predicted.decode_s
    return f"measuring takes about {seconds:.0f} s" if seconds > _PATIENCE_S else None


def _clock(device: torch.device) -> Callable[[], float]:
    """Seconds when all that was asked of the device so far is done: a launch returns long before its work has run."""

    def now_s() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now_s


def _measured(engine: Engine) -> Costs:
    # Nothing is returned from one step alone, so the sink stays what it is.
    memory = dataclasses.replace(engine.config.memory, adaptive_sink=False)
    config = dataclasses.replace(engine.config, memory=memory)
    engine = Engine(config, weights=engine.weights, device=engine.device, dtype=engine.dtype, options=engine.options)
    now_s = _clock(engine.device)
    image_HWC = torch.zeros(config.height, config.width, 3, dtype=torch.uint8)
    step = engine.stage(Role(rank=0, encodes=True, steps=(0,), decodes=False))
    decode = engine.stage(Role(rank=1, encodes=False, steps=(), decodes=True))
    audio = config.dit.audio
    heard = AudioChunk(
        torch.zeros(
            1,
            audio.num_features if audio else 1,
            audio.feature_dim if audio else 1,
            config.video_frames_per_chunk,
        ),
        torch.zeros(1),
    )
    # The window fills first; what comes after that is timed.
    window = config.memory.window_chunks
    step_s: list[float] = []
    decode_s: list[float] = []
    packets = engine.intake(image_HWC, "").packets([heard] * (window + _MEASURED_CHUNKS))
    for packet in packets:
        start_s = now_s()
        stepped = step.step(packet)
        middle_s = now_s()
        decode.step(stepped)
        step_s.append(middle_s - start_s)
        decode_s.append(now_s() - middle_s)
    return Costs(step_s=(min(step_s[window:]),) * config.num_steps, decode_s=min(decode_s[window:]))


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product, the best of a few tries in about a second."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=dtype)
    best_s = float("inf")
    now_s = _clock(device)
    for _ in range(4):
        start_s = now_s()
        torch.mm(a, a)
        best_s = min(best_s, now_s() - start_s)
    return 2 * side**3 / best_s


def _bytes_per_value(device: str) -> int:
    """bfloat16 on CUDA, float32 elsewhere, as `Engine` loads weights."""
    return 2 if device.startswith("cuda") else 4


class _EightBits(TypedDict):
    """As `cost.rank_bytes` takes it."""

    kept_layers: int | None
    eight_bit_history: bool


def _eight_bits(options: StepOptions) -> _EightBits:
    kept_layers = options.kept_layers if options.precision is Precision.FP8 else None
    return {"kept_layers": kept_layers, "eight_bit_history": options.history is Precision.FP8}


def role_bytes(
    config: EngineConfig, role: Role, *, device: str, from_folder: bool, options: StepOptions | None = None
) -> int:
    """Memory that a rank needs on its device, largest moment first: what it loads and what it remembers."""
    on_cuda = device.startswith("cuda")
    bytes_per_value = _bytes_per_value(device)
    total = 0
    if role.steps:
        total += cost.rank_bytes(
            config,
            num_steps=len(role.steps),
            bytes_per_value=bytes_per_value,
            **_eight_bits(options or StepOptions()),
        ).total
        total += 0 if on_cuda else cost.packed_bytes(config.dit, bytes_per_value)
    frame = config.height * config.width * bytes_per_value
    if role.decodes:
        # Two frames of every wide layer are remembered, now and for each chunk that can be taken back; one latent
        # frame's activations come on top.
        remembered = 2 * config.vae.base_dim * frame * 12
        total += remembered * (config.memory.slack_chunks + 2) + 6 * 4 * config.vae.base_dim * frame
        total += PRIMING_LATENTS * 4 * 3 * frame
    if role.encodes and from_folder:
        total += _SPEECH_ENCODER_BYTES
        if not on_cuda:
            total += _TEXT_ENCODER_BYTES
    return total


def available_bytes(device: str) -> int | None:
    """Memory that is free on a device now; None when the machine does not say."""
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise BackendError(
                f"{device} was asked for but torch sees no CUDA device; try --device cpu, or `streamdiff doctor`"
            )
        free, _ = torch.cuda.mem_get_info(device)
        return free
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def describe(schedule: Schedule, found: Forecast, engine: Engine, *, device: str) -> str:
    """The plan in words and numbers, for people; memory is counted for ``device``."""
    config = engine.config
    rank_s = [us / 1e6 for us in rank_costs_us(schedule, found.costs)]
    period_s, first_s = max(rank_s), sum(rank_s)
    fps = config.video_frames_per_chunk / period_s
    bytes_per_value = _bytes_per_value(device)
    step = cost.step_flops(config)
    audio = "with audio" if config.dit.audio else "no audio"
    kept = cost.snapshot_bytes(
        config, bytes_per_value=bytes_per_value, eight_bit_history=engine.options.history is Precision.FP8
    )
    lines = [
        f"{config.name}: {cost.dit_parameters(config.dit) / 1e9:.3f} B parameters ({audio}), "
        f"{config.width}x{config.height} at {config.fps} fps, chunks of {config.video_frames_per_chunk} frames "
        f"({config.chunk_s:.2f} s), {config.num_steps} steps",
        f"one step of one chunk: {step.total / 1e12:.3g} TFLOP over {config.chunk_tokens} tokens; "
        f"a hop carries {hop_kib(config):.0f} KiB",
        f"a line of processes that heals copies {_size(kept)} to the host per chunk and step, "
        f"{_size(round(kept / config.chunk_s))}/s for a live stream (off: heals=False)",
        "",
        f"{'rank':<6}{'does':<28}{'s/chunk':>9}{'busy':>7}{'memory':>11}{'weights':>11}{'history':>11}",
    ]
    for role, seconds in zip(schedule.roles, rank_s, strict=True):
        total = role_bytes(
            config,
            role,
            device=device,
            from_folder=engine.encoder_folder is not None or not engine.is_small,
            options=engine.options,
        )
        parts = cost.rank_bytes(
            config,
            num_steps=max(1, len(role.steps)),
            bytes_per_value=bytes_per_value,
            **_eight_bits(engine.options),
        )
        dit = [_size(parts.weights), _size(parts.history + parts.pristine_sink)] if role.steps else ["-", "-"]
        lines.append(
            f"{role.rank:<6}{role!s:<28}{seconds:>9.3f}{seconds / period_s:>7.0%}"
            f"{_size(total):>11}{dit[0]:>11}{dit[1]:>11}"
        )
    lines += [
        "",
        render(schedule, num_chunks=4),
        "",
        f"predicted: {fps:.1f} frames/s, "
        f"{'faster' if fps >= config.fps else 'slower'} than the {config.fps} that are shown; "
        f"first chunk after {first_s:.2f} s, one chunk every {period_s:.3f} s",
        f"basis: {found.basis}",
    ]
    if schedule.bubble_ticks:
        lines.append(
            f"the sink refresh at chunk {schedule.refresh_chunk} costs a bubble of {schedule.bubble_ticks} ticks"
        )
    return "\n".join(lines)


def hop_kib(config: EngineConfig) -> float:
    return cost.hop_bytes(config) / 1024


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 / 10 else f"{num_bytes / 2**20:.1f} MiB"
