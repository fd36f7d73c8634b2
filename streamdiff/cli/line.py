"""``streamdiff line``: one rank of a line that outlives its driver."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from streamdiff import presets, signals
from streamdiff.cli.machine import alike_on_every_rank, device_named, world_from_environment
from streamdiff.errors import ConfigError
from streamdiff.models.served.options import Precision, StepOptions
from streamdiff.options import THREADS, Whole

DESCRIPTION = (
    "Load models once and wait for a program that lets streams join (streamdiff.line.join). Alone, or as torchrun "
    "--nproc-per-node N --max-restarts 100 -m streamdiff line ... on one machine. Ends by a signal; when the program "
    "ends, it waits for the next one."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``streamdiff line``."""
    add = parser.add_argument
    add("--name", default="line", help="by which programs find this line (default: %(default)s)")
    add("--seats", type=Whole(1, 1024), default=4, help="streams at once (default: %(default)s)")
    add("--slack", type=Whole(0, 1024), metavar="CHUNKS", help="how far an interruption can take back (default: all)")
    add("--preset", default="portrait", choices=sorted(presets.PRESETS), help="which model (default: %(default)s)")
    add("--checkpoint", type=Path, metavar="DIR", help="folder of weights: Wan2.2-S2V-14B, or a trained codec and DiT")
    add("--lora", type=Path, metavar="FILE", help="liveavatar.safetensors, merged while loading")
    add("--light-decoder", type=Path, metavar="FILE", help="decode with a published taew2_1: rougher, much faster")
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
    machine.add_argument("--attention", metavar="NAME", help="attention backend: one that `streamdiff doctor` lists")


def run(args: argparse.Namespace) -> NoReturn:
    """Wait as a rank until a signal ends it."""
    world = alike_on_every_rank(world_from_environment)
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    if world is not None and not world.is_local:
        raise ConfigError("the ranks of a line are on one machine; start them with torchrun --standalone")
    device = alike_on_every_rank(lambda: device_named(args.device, world))
    import torch

    from streamdiff.engine import Engine, Weights
    from streamdiff.estimate import available_bytes
    from streamdiff.line import Shape, wait_as_rank

    alike_on_every_rank(lambda: available_bytes(device))  # says so where there is no such device
    signals.handle()
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.deterministic = True
    engine = alike_on_every_rank(
        lambda: Engine(
            presets.preset(args.preset),
            weights=Weights(folder=args.checkpoint, lora=args.lora, light_decoder=args.light_decoder),
            device=device,
            options=StepOptions(precision=args.precision, attention=args.attention),
        )
    )
    wait_as_rank(engine, Shape(seats=args.seats, num_ranks=size, slack_chunks=args.slack), rank, name=args.name)
