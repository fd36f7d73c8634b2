"""The command line: argv and environment enter here, once, and become values.

streamdiff generate --image FACE --audio VOICE --out OUT.mp4
torchrun --nproc-per-node 5 -m streamdiff generate --image FACE --audio VOICE --out OUT.mp4
streamdiff doctor
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TypeVar

# cuBLAS needs a workspace of its own to give the same bits twice; it reads this when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# torch.compile keeps what it made in /tmp unless told otherwise; Triton keeps its kernels in ~/.triton by itself.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.expanduser("~/.cache/streamdiff/inductor"))
# A lost rank is reported in our words; the library's stack trace of it helps nobody.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# Until everything is imported, Ctrl-C ends the process as it would any other: there is nothing to close yet.
_interrupt = signal.getsignal(signal.SIGINT)
with contextlib.suppress(ValueError):  # not the main thread: signals are somebody else's business
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from tqdm import tqdm

from streamdiff import __version__, checkpoint, demo, doctor, flow, presets
from streamdiff.cli import avatar as avatar_commands
from streamdiff.cli import serve as serve_command
from streamdiff.cli import train as train_commands
from streamdiff.config import sparse
from streamdiff.engine import Weights
from streamdiff.errors import ConfigError, InputError, StreamdiffError
from streamdiff.estimate import describe, forecast
from streamdiff.generate import Job, Made, check, engine_for, generate, schedule_for
from streamdiff.models.served.options import Precision, StepOptions
from streamdiff.pipeline.group import World
from streamdiff.pipeline.watch import Limits
from streamdiff.trace import JsonLines, Observer, Silent
from streamdiff_kernels import BACKENDS

if TYPE_CHECKING:
    from streamdiff.avatar.bundle import IdentityBundle

_T = TypeVar("_T")
with contextlib.suppress(ValueError):
    signal.signal(signal.SIGINT, _interrupt)


def world_from_environment() -> World | None:
    """What torchrun says of this process; None outside of it."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    return World(
        rank=int(os.environ["RANK"]),
        size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        host=os.environ.get("MASTER_ADDR", "127.0.0.1"),
        port=int(os.environ.get("MASTER_PORT", "29500")),
        agent_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "False") == "True",
        attempt=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="streamdiff", description="Pipeline-parallel streaming diffusion for live avatars."
    )
    root.add_argument("--version", action="version", version=f"streamdiff {__version__}")
    root.add_argument("-v", "--verbose", action="store_true", help="log what happens, on stderr")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands)
    avatar_commands.register(commands, fit=_fit)
    train_commands.register(commands)
    serve_parser = commands.add_parser("serve", help=serve_command.HELP, description=serve_command.DESCRIPTION)
    serve_command.add_arguments(serve_parser)
    serve_parser.set_defaults(run=serve_command.run)
    doctor_parser = commands.add_parser("doctor", help="what this machine can do, and why not more")
    doctor_parser.set_defaults(run=run_doctor)
    return root


def _fit(video: str | Path, *, size: int, minutes: float, device: str) -> tuple[IdentityBundle, object]:
    from streamdiff.training.avatar.fit import fit_bundle  # no other command needs what training imports

    return fit_bundle(video, size=size, minutes=minutes, device=device)


def _add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    generate_parser = commands.add_parser(
        "generate",
        help="a photo, a voice and a prompt in, a talking video out",
        description="Make a video of the face in a photograph, saying what the voice says. Alone, or as "
        "torchrun --nproc-per-node N -m streamdiff generate ... with N from 1 to steps + 1: the bits are the same.",
    )
    add = generate_parser.add_argument
    add("--image", type=Path, help="photograph of the face (default: the demo's)")
    add("--audio", type=Path, help="voice, any sound file (default: the demo's, 4 s of it)")
    add("--prompt", default="A person is talking to the camera.", help="what happens (default: %(default)r)")
    add("--out", type=Path, default=Path("video.mp4"), help="the MP4 to write (default: %(default)s)")
    add("--preset", default="portrait", choices=sorted(presets.PRESETS), help="which model (default: %(default)s)")
    add("--checkpoint", type=Path, metavar="DIR", help="folder of weights: Wan2.2-S2V-14B, or a trained codec and DiT")
    add("--lora", type=Path, metavar="FILE", help="liveavatar.safetensors, merged while loading")
    add("--light-decoder", type=Path, metavar="FILE", help="decode with a published taew2_1: rougher, much faster")
    add("--steps", type=int, help="denoising steps (default: the preset's)")
    add("--sparse", action="store_true", help="see the first, the previous and the own chunk only: weights trained so")
    add("--seconds", type=float, help="length of the video (default: the voice's)")
    add("--size", metavar="WxH", help="picture size in pixels (default: the preset's)")
    add("--seed", type=int, default=0, help="same seed, same bits (default: %(default)s)")
    layout = generate_parser.add_argument_group("layout")
    layout.add_argument("--plan", action="store_true", help="print ranks, memory and predicted speed, and stop")
    layout.add_argument("--ranks", type=int, help="with --plan: for this many ranks")
    layout.add_argument(
        "--assume", type=float, metavar="TFLOPS", help="with --plan: for GPUs that multiply this fast (H200: about 700)"
    )
    layout.add_argument("--partition", metavar="N,N,...", help="denoising steps of each DiT rank, such as 2,1,1")
    layout.add_argument(
        "--decode", choices=["own", "shared"], help="decode on a rank of its own, or on the last DiT rank"
    )
    machine = generate_parser.add_argument_group("machine")
    machine.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    machine.add_argument(
        "--threads",
        type=int,
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
        choices=["auto", *BACKENDS],
        metavar="NAME",
        help=f"who computes attention: {', '.join(BACKENDS)}, or auto, which measures what can run here and may choose "
        "differently on each rank, with other bits (default: a fixed choice for the device)",
    )
    machine.add_argument(
        "--deadline",
        type=float,
        default=60.0,
        metavar="S",
        help="a rank silent for S seconds is lost (default: %(default)s)",
    )
    machine.add_argument(
        "--startup",
        type=float,
        metavar="S",
        help="wait S seconds for all ranks to load (default: 1800 with a checkpoint, else 180)",
    )
    machine.add_argument(
        "--trace", type=Path, metavar="DIR", help="write what each rank did when, one JSON line a span"
    )
    generate_parser.set_defaults(run=run_generate)


def job_from(args: argparse.Namespace, world: World | None) -> Job:
    """The job that the command line asks for."""
    config = presets.preset(args.preset)
    try:
        args.prompt.encode()
    except UnicodeEncodeError:
        raise ConfigError("--prompt is not text that UTF-8 can hold; write it anew") from None
    if args.steps is not None and args.steps != config.num_steps:
        if not 1 <= args.steps <= 50:
            raise ConfigError(f"--steps must lie in 1..50, got {args.steps}; 4 is what the model was made for")
        config = dataclasses.replace(config, sigmas=flow.regridded(config.sigmas, args.steps))
    if args.sparse:
        config = sparse(config)
    if args.size is not None:
        width, height = _size(args.size)
        config = dataclasses.replace(config, width=width, height=height)
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
        partition=_partition(args.partition),
        decode_alone=None if args.decode is None else args.decode == "own",
        device=_device(args.device, world),
        options=StepOptions(precision=args.precision, attention=args.attention),
        limits=Limits(
            deadline_s=args.deadline,
            startup_s=args.startup if args.startup is not None else (1800.0 if args.checkpoint else 180.0),
            outside_s=max(600.0, args.deadline),
        ),
    )


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().replace("*", "x").partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ConfigError(f"--size must look like 384x704 (width x height), got {text!r}")
    return int(width), int(height)


def _partition(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(f"--partition must look like 2,1,1, got {text!r}")
    return tuple(int(part) for part in parts)


def _device(name: str | None, world: World | None) -> str:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name, flags=re.ASCII):
        raise ConfigError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if name == "cuda":
        return f"cuda:{world.local_rank if world is not None else 0}"
    return name


def run_generate(args: argparse.Namespace) -> int:
    world = world_from_environment()
    job = _alike_on_every_rank(lambda: _checked_job(args, world))
    if not 1 <= args.threads <= 1024:
        raise ConfigError(f"--threads must lie in 1..1024, got {args.threads}; at least 1, at most the cores you have")
    if args.ranks is not None and (not args.plan or args.ranks < 1):
        raise ConfigError("--ranks belongs to --plan and counts from 1; to run on more ranks, start them with torchrun")
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.deterministic = True
    rank = 0 if world is None else world.rank
    num_ranks = args.ranks or (1 if world is None else world.size)
    if args.plan:
        if rank == 0:
            engine = engine_for(job, plan_only=True)
            if args.assume is not None and not 0 < args.assume < 1e6:
                raise ConfigError(f"--assume takes TFLOP/s above 0, got {args.assume}; try 700, as an H200")
            assumed = None if args.assume is None else 1e12 * args.assume
            found = forecast(engine, assumed_flops_per_s=assumed)
            device = job.device if assumed is None else "cuda"
            print(describe(schedule_for(job, num_ranks), found, engine, device=device))
        return 0
    notice = None
    if engine_for(job).weights.folder is None:
        notice = f"The preset {job.config.name} has random weights: it paints noise; try --preset portrait."
    with _observer(args.trace, rank) as observer, _Bar(notice) as bar:
        made = generate(job, world, progress=bar.update, observer=observer)
    if made is not None:
        _report(made, job, num_ranks)
    return 0


def _checked_job(args: argparse.Namespace, world: World | None) -> Job:
    job = job_from(args, world)
    if not args.plan:
        check(job, schedule_for(job, 1 if world is None else world.size))
    return job


def _alike_on_every_rank(find: Callable[[], _T]) -> _T:
    """What every rank finds out for itself, wrong arguments above all, is said by the first of them alone."""
    try:
        return find()
    except StreamdiffError as error:
        if os.environ.get("RANK", "0") != "0":
            _leave(error.exit_code)
        raise


def _report(made: Made, job: Job, num_ranks: int) -> None:
    print(
        f"{made.path}: {made.num_frames} frames, {made.duration_s:.2f} s of video; first chunk after "
        f"{made.first_frame_s:.2f} s, then {made.fps:.1f} frames/s over all ({job.config.name}, "
        f"{num_ranks} {'rank' if num_ranks == 1 else 'ranks'}, {job.device})"
    )


@contextlib.contextmanager
def _observer(folder: Path | None, rank: int) -> Generator[Observer]:
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
                _say(self._notice)
            self._bar = tqdm(total=total, unit="frame", desc="streaming", disable=None)
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()


def run_doctor(_args: argparse.Namespace) -> int:
    findings = doctor.examine()
    for finding in findings:
        print(f"{finding.verdict.value:2}  {finding.subject:<10} {finding.text}")
    worst = [f for f in findings if f.verdict is doctor.Verdict.ERROR]
    return int(bool(worst))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    """SIGTERM leaves as an exception, so that files are closed on the way out."""
    raise SystemExit(128 + signal.SIGTERM)


def _leave(status: int) -> int:
    """Leave early. As one rank of many, at once: a thread may be stuck in a connection whose other end is gone, and the
    interpreter would wait for it or crash on it. Files are closed by now.
    """
    if world_from_environment() is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status: 0 done, 2 for what calling again differently mends, 1 for the rest."""
    args = parser().parse_args(argv)
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return args.run(args)
    except StreamdiffError as error:
        _say(f"error: {error}")
        for note in getattr(error, "__notes__", []):
            _say(note)
        if args.verbose:
            logging.getLogger(__name__).exception("the error in full")
        return _leave(error.exit_code)
    except KeyboardInterrupt:
        _say("interrupted; what was written so far is whole")
        return _leave(130)
    except BrokenPipeError:
        # Whoever read our output has gone; nothing is left to say, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _leave(1)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
        if status == 128 + signal.SIGTERM:
            _say("terminated; what was written so far is whole")
        return _leave(status)
