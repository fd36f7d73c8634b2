"""Shared by all training recipes: options, progress bar, stopping and finishing a run.

A recipe (`streamdiff.cli.train` lists them) is one function that adds options to a parser and one that runs. Those that
learn share `add_run_arguments`, turn options into values with `set_machine` and `plan_of`, and run by `conduct`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn
from tqdm import tqdm

from streamdiff import checkpoint, presets
from streamdiff.config import EngineConfig
from streamdiff.errors import ConfigError, InputError
from streamdiff.options import BATCH, RATE, SEED, STEPS, THREADS, duration_s
from streamdiff.output import alone_in
from streamdiff.tensorfile import save_tensors
from streamdiff.training.loop import Plan, Task, Trainer


def add_training_arguments(
    parser: argparse.ArgumentParser, *, data: str, batch: int, lr: float, preset: str = "portrait"
) -> None:
    """Options of every recipe that teaches a model of a preset."""
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help=data)
    add("--preset", default=preset, choices=sorted(presets.PRESETS), help="which model (default: %(default)s)")
    add("--init", type=Path, metavar="FILE", help="weights to begin with (default: random, or the teacher's)")
    add_run_arguments(parser, batch=batch, lr=lr)


def add_run_arguments(parser: argparse.ArgumentParser, *, batch: int, lr: float, of: str = "clips") -> None:
    """Options of every recipe that learns: how long, how fast, where to."""
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the run: checkpoint, log, curves, weights")
    add(
        "--budget",
        type=duration_s,
        metavar="TIME",
        help="how long to train, such as 10min or 2h; the learning rate is planned by it",
    )
    add("--steps", type=STEPS, metavar="N", help="how many steps to train, instead of --budget")
    add("--batch", type=BATCH, default=batch, metavar="N", help=f"{of} in a step (default: %(default)s)")
    add("--lr", type=RATE, default=lr, help="highest learning rate (default: %(default)s)")
    add("--seed", type=SEED, default=0, help="same seed, same bits (default: %(default)s)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--threads", type=THREADS, default=1, help="CPU threads; other numbers, other bits (default: %(default)s)")


def preset_of(args: argparse.Namespace) -> EngineConfig:
    """The preset asked for, and the machine set up as asked."""
    set_machine(args)
    return presets.preset(args.preset)


def set_machine(args: argparse.Namespace) -> None:
    """Check the options of `add_run_arguments`, and set up the machine as they say."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", args.device, flags=re.ASCII):
        raise ConfigError(f"--device must be cpu, cuda or cuda:N, got {args.device!r}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but torch finds no CUDA device; use --device cpu")
    torch.set_num_threads(args.threads)
    _keep_memory()


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def _keep_memory() -> None:
    """Keep what was freed, where the C library is glibc: a step frees and asks for the same tensors again.

    Otherwise each large one goes back to the kernel and comes anew, zeroed page by page: a tenth of a step of the
    portrait preset (0.70 s of CPU time, against 0.63 s; 26,000 page faults, against 200).
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**26)):
        libc.mallopt(option, value)


def plan_of(args: argparse.Namespace, *, budget: str = "40min", warmup_steps: int = 100) -> Plan:
    """How long to train; ``budget`` where neither --budget nor --steps says it."""
    if args.steps is not None and args.budget is not None:
        raise ConfigError("--steps and --budget both say how long to train; give one of them")
    if args.steps is not None:
        return Plan(steps=args.steps, warmup_steps=warmup_steps)
    return Plan(budget_s=duration_s(budget) if args.budget is None else args.budget, warmup_steps=warmup_steps)


def load_weights(module: nn.Module, path: Path) -> None:
    """Weights from a safetensors file, of whatever precision, all of them.

    Raises InputError when there is no such file, CheckpointError when it does not fit.
    """
    if not path.is_file():
        raise InputError(f"{path} is not there; give --init a safetensors file of weights")
    tensors = checkpoint.read_safetensors(path)
    checkpoint.load_strict(module, tensors, what=str(path))


def save_average(trainer: Trainer, part: str, path: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write the averaged weights of a part, with the facts of the run."""
    tensors = {name: t.to("cpu", dtype) for name, t in trainer.average(part).items()}
    save_tensors(tensors, path, {"facts": json.dumps({**trainer.facts, "steps": str(trainer.step)})})


def conduct(
    recipe: str,
    task: Task,
    args: argparse.Namespace,
    plan: Plan,
    *,
    facts: Mapping[str, object],
    finish: Callable[[Trainer], Sequence[Path]],
    sample: Callable[[Trainer], None] | None = None,
) -> int:
    """Run a task in ``--out`` with a progress bar; the exit status: 0, or 128 and the signal that stopped it.

    Args:
        facts: what a resumed run must agree on.
        finish: called when the run is complete; returns the files it wrote.
        sample: called every two minutes and at the end, to look at what has been learned so far.
    """
    named = {"recipe": recipe, **{name: str(value) for name, value in facts.items()}}
    with alone_in(args.out, "a run"):
        trainer = Trainer(task, args.out, plan, facts=named, resume=args.resume)
        return _conduct(recipe, trainer, args, finish, sample)


def _conduct(
    recipe: str,
    trainer: Trainer,
    args: argparse.Namespace,
    finish: Callable[[Trainer], Sequence[Path]],
    sample: Callable[[Trainer], None] | None,
) -> int:
    def on_sample(_step: int) -> None:
        assert sample is not None
        sample(trainer)

    # Numbers too small to be normal cost a CPU a hundred times the others.
    torch.set_flush_denormal(True)
    try:
        with _Bar(recipe, trainer) as bar:
            outcome = trainer.train(on_step=bar.on_step, on_sample=None if sample is None else on_sample)
    finally:
        torch.set_flush_denormal(False)
    if outcome.stopped_by is not None:
        again = [*sys.argv[1:], *([] if args.resume else ["--resume"])]
        sys.stderr.write(
            f"stopped after step {outcome.step} of {outcome.total or 'a number not settled yet'}; all of it is in "
            f"{trainer.checkpoint}. Go on with: streamdiff {shlex.join(again)}\n"
        )
        return 128 + (outcome.stopped_by or signal.SIGINT)
    for path in finish(trainer):
        sys.stdout.write(f"{path}: after {outcome.step} steps in {trainer.spent_s / 60:.1f} min\n")
    return 0


class _Bar:
    """A progress bar with a running mean of the loss."""

    def __init__(self, recipe: str, trainer: Trainer) -> None:
        self._bar: tqdm[NoReturn] = tqdm(
            total=trainer.total, initial=trainer.step, unit="step", desc=recipe, disable=None
        )
        self._smooth: float | None = None

    def on_step(self, step: int, total: int | None, numbers: Mapping[str, float]) -> None:
        name, loss = next(iter(numbers.items()))
        self._smooth = loss if self._smooth is None else 0.98 * self._smooth + 0.02 * loss
        self._bar.total = total
        self._bar.set_postfix_str(f"{name} {self._smooth:.4f}", refresh=False)
        self._bar.update(step - self._bar.n)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()
