"""``streamdiff generate``: a photo, a voice and a prompt in, a talking video out.

streamdiff generate --image FACE --audio VOICE --out OUT.mp4
torchrun --nproc-per-node 5 -m streamdiff generate --image FACE --audio VOICE --out OUT.mp4
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from streamdiff import presets, signals
from streamdiff.cli.machine import alike_on_every_rank, device_named, say, warn_of_the_network, world_from_environment
from streamdiff.cli.verify import add_sign_argument, sign, signer_from
from streamdiff.config import sparse
from streamdiff.errors import ConfigError, InputError
from streamdiff.models.served.options import Precision, StepOptions
from streamdiff.options import DAY_S, SECONDS, SEED, THREADS, Number, Whole

if TYPE_CHECKING:
    from tqdm import tqdm

    from streamdiff.generate import Job, Made
    from streamdiff.pipeline.group import World
    from streamdiff.trace import Observer

DESCRIPTION = (
    "Make a video of the face in a photograph, saying what the voice says. Alone, or as torchrun --nproc-per-node N "
    "-m streamdiff generate ... with N from 1 to steps + 1: the bits are the same. On several machines all ranks need "
    "one secret, the content of the file that STREAMDIFF_SECRET_FILE names, and a private network."
)


_LARGEST_SIDE = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``streamdiff generate``."""
    add = parser.add_argument
    add("--image", type=Path, help="photograph of the face (default: the demo's)")
    add("--audio", type=Path, help="voice, any sound file (default: the demo's, 4 s of it)")
    add("--prompt", default="A person is talking to the camera.", help="what happens (default: %(default)r)")
    add("--out", type=Path, default=Path("video.mp4"), help="the MP4 to write (default: %(default)s)")
    add("--preset", default="portrait", choices=sorted(presets.PRESETS), help="which model (default: %(default)s)")
    add("--checkpoint", type=Path, metavar="DIR", help="folder of weights: Wan2.2-S2V-14B, or a trained codec and DiT")
    add("--lora", type=Path, metavar="FILE", help="liveavatar.safetensors, merged while loading")
    add("--light-decoder", type=Path, metavar="FILE", help="decode with a published taew2_1: rougher, much faster")
    add("--steps", type=Whole(1, 50), help="denoising steps (default: the preset's)")
    add("--sparse", action="store_true", help="see the first, the previous and the own chunk only: weights trained so")
    add("--seconds", type=SECONDS, help="length of the video (default: the voice's)")
    add("--size", metavar="WxH", help="picture size in pixels (default: the preset's)")
    add("--seed", type=SEED, default=0, help="same seed, same bits (default: %(default)s)")
    add_sign_argument(parser)
    layout = parser.add_argument_group("layout")
    layout.add_argument("--plan", action="store_true", help="print ranks, memory and predicted speed, and stop")
    layout.add_argument("--ranks", type=Whole(1, 1024), help="with --plan: for this many ranks")
    layout.add_argument(
        "--assume",
        type=Number(0, 1e6, above=True),
        metavar="TFLOPS",
        help="with --plan: for GPUs that multiply this fast (H200: about 700)",
    )
    layout.add_argument("--partition", metavar="N,N,...", help="denoising steps of each DiT rank, such as 2,1,1")
    layout.add_argument(
        "--decode", choices=["own", "shared"], help="decode on a rank of its own, or on the last DiT rank"
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    machine.add_argument(
        "--threads",
        type=THREADS,
        default=1,
        help="CPU threads of a rank; other numbers, other bits (default: %(default)s)",
    )
    machine.add_argument(
        "--precision",
        type=Precision,
        default=Precision.WEIGHTS,
        choices=list(Precision),
        help="arithmetic of the DiT's large layers: that of the weights, or eight bits on CUDA from capability 8.9 on "
        "(default: %(default)s)",
    )
    machine.add_argument(
        "--attention",
        metavar="NAME",
        help="attention backend: one that `streamdiff doctor` lists, or auto, which measures what can run here and may "
        "choose differently on each rank, with other bits (default: a fixed choice for the device)",
    )
    machine.add_argument(
        "--deadline",
        type=Number(0, DAY_S, above=True),
        default=60.0,
        metavar="S",
        help="a rank silent for S seconds is lost (default: %(default)s)",
    )
    machine.add_argument(
        "--startup",
        type=Number(0, DAY_S, above=True),
        metavar="S",
        help="wait S seconds for all ranks to load (default: 1800 with a checkpoint, else 180)",
    )
    machine.add_argument(
        "--trace", type=Path, metavar="DIR", help="write what each rank did when, one JSON line a span"
    )


def job_from(args: argparse.Namespace, world: World | None) -> Job:
    """The job that the command line asks for. Numbers and names are checked before anything slow is imported."""
    partition, size = _partition(args.partition), _size(args.size)
    try:
        args.prompt.encode()
    except UnicodeEncodeError:
        raise ConfigError("--prompt is not text that UTF-8 can hold; write it anew") from None
    from streamdiff import checkpoint, demo, flow
    from streamdiff.engine import Weights
    from streamdiff.generate import Job
    from streamdiff.pipeline.watch import Limits

    config = presets.preset(args.preset)
    if args.steps is not None and args.steps != config.num_steps:
        config = dataclasses.replace(config, sigmas=flow.regridded(config.sigmas, args.steps))
    if args.sparse:
        config = sparse(config)
    if size is not None:
        config = dataclasses.replace(config, width=size[0], height=size[1])
    demo_audio = args.audio is None
    return Job(
        config=config,
        image=args.image or checkpoint.shipped_face(config) or demo.demo_image(),
        audio=args.audio if args.audio is not None else demo.demo_audio(),
        out=args.out,
        prompt=args.prompt,
        weights=Weights(folder=args.checkpoint, lora=args.lora, light_decoder=args.light_decoder),
        seconds=4.0 if args.seconds is None and demo_audio else args.seconds,
        seed=args.seed,
        partition=partition,
        decode_alone=None if args.decode is None else args.decode == "own",
        device=device_named(args.device, world),
        options=StepOptions(precision=args.precision, attention=args.attention),
        limits=Limits(
            deadline_s=args.deadline,
            startup_s=args.startup if args.startup is not None else (1800.0 if args.checkpoint else 180.0),
            outside_s=max(600.0, args.deadline),
        ),
    )


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    width, _, height = text.lower().replace("*", "x").partition("x")
    if not all(re.fullmatch(r"\d{1,5}", side, flags=re.ASCII) for side in (width, height)):
        raise ConfigError(f"--size must look like 384x704 (width x height), got {text!r}")
    if max(int(width), int(height)) > _LARGEST_SIDE:
        raise ConfigError(f"--size is at most {_LARGEST_SIDE} pixels a side, got {text}")
    return int(width), int(height)


def _partition(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    if not all(re.fullmatch(r" ?\d{1,3}", part, flags=re.ASCII) for part in parts):
        raise ConfigError(f"--partition must look like 2,1,1, got {text!r}")
    return tuple(int(part) for part in parts)


def run(args: argparse.Namespace) -> int:
    """``streamdiff generate``."""
    world = alike_on_every_rank(world_from_environment)
    alike_on_every_rank(lambda: _check_numbers(args))
    job = alike_on_every_rank(lambda: job_from(args, world))
    signer = alike_on_every_rank(lambda: signer_from(args))
    import torch

    signals.handle()
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.deterministic = True
    rank = 0 if world is None else world.rank
    num_ranks = args.ranks or (1 if world is None else world.size)
    if args.plan:
        if rank == 0:
            _print_plan(job, num_ranks, args.assume)
        return 0
    from streamdiff.generate import generate, prepare

    warn_of_the_network(world)
    prepared = alike_on_every_rank(lambda: prepare(job, num_ranks))
    notice = None
    if prepared.engine.weights.folder is None:
        notice = f"The preset {job.config.name} has random weights: it paints noise; try --preset portrait."
    with _observer(args.trace, rank) as observer, _Bar(notice) as bar:
        made = generate(prepared, world, progress=bar.update, observer=observer)
    if made is not None:
        sign(signer, made.path)
        _report(made, job, num_ranks)
    return 0


def _check_numbers(args: argparse.Namespace) -> None:
    if args.ranks is not None and not args.plan:
        raise ConfigError("--ranks belongs to --plan; to run on more ranks, start them with torchrun")


def _print_plan(job: Job, num_ranks: int, assumed_tflops: float | None) -> None:
    from streamdiff.estimate import describe, forecast
    from streamdiff.generate import engine_for, schedule_for

    engine = engine_for(job, plan_only=True)
    found = forecast(engine, assumed_flops_per_s=None if assumed_tflops is None else 1e12 * assumed_tflops)
    device = job.device if assumed_tflops is None else "cuda"
    print(describe(schedule_for(job, num_ranks), found, engine, device=device))


def _report(made: Made, job: Job, num_ranks: int) -> None:
    print(
        f"{made.path}: {made.num_frames} frames, {made.duration_s:.2f} s of video; first chunk after "
        f"{made.first_frame_s:.2f} s, then {made.fps:.1f} frames/s over all ({job.config.name}, "
        f"{num_ranks} {'rank' if num_ranks == 1 else 'ranks'}, {job.device})"
    )


@contextlib.contextmanager
def _observer(folder: Path | None, rank: int) -> Generator[Observer]:
    from streamdiff.trace import JsonLines, Silent

    if folder is None:
        yield Silent()
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lines = JsonLines(folder / f"rank{rank}.jsonl", rank=rank)
    except OSError as error:
        raise InputError(f"cannot write traces to {folder}: {error.strerror}; choose another folder") from error
    with lines:
        yield lines


class _Bar:
    """A progress bar that appears with the first frames, on the rank that writes them."""

    def __init__(self, notice: str | None) -> None:
        self._notice = notice
        self._bar: tqdm[NoReturn] | None = None

    def update(self, done: int, total: int) -> None:
        if self._bar is None:
            if self._notice is not None:
                say(self._notice)
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="frame", desc="streaming", disable=None)
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()
