"""Ends commands at chosen moments, and says what is wrong with how they ended.

    python -m tests.hostile.moments --count 400              within two seconds, on a machine that is otherwise idle
    python -m tests.hostile.moments --count 60 --within 60   elsewhere

Times from the last signal to the last end are printed.
"""

from __future__ import annotations

import argparse
import functools
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import torch
from safetensors import safe_open

from streamdiff import presets
from streamdiff.media import VideoWriter
from streamdiff.output import part_of
from tests.generate.processes import environment, write_inputs
from tests.pipeline.ranks import free_port
from tests.training.forcing_case import write_clips

WITHIN_S = 2.0
"""From the last signal to the end of the last process."""
_START = "import sys, streamdiff, runpy; print(flush=True); runpy.run_module('streamdiff', run_name='__main__')"
"""Says when the interpreter is up: what a signal does before that is not ours."""


@dataclass(frozen=True, slots=True)
class Moment:
    """When, what and how often."""

    command: str
    """One of `COMMANDS`."""
    in_flow: bool
    """Whether to wait until something is written first."""
    after_s: float
    number: signal.Signals
    again_after_s: float | None
    """A second signal so long after the first, or None."""
    has_old: bool
    """Whether a film, or a finished run, has the name already."""


COMMANDS = ("generate", "talk", "train", "ranks")
_START_S, _FLOW_S = 8.0, 1.5
"""Moments lie within so many seconds of the start, or of the first thing written."""
NUM_RANKS = 3


def moments(seed: int, count: int, commands: Sequence[str] = COMMANDS) -> Iterator[Moment]:
    """``count`` moments, the commands in turn; the same for the same seed."""
    draw = random.Random(seed)
    for at in range(count):
        in_flow = draw.random() < 0.4
        yield Moment(
            command=commands[at % len(commands)],
            in_flow=in_flow,
            after_s=draw.uniform(0.0, _FLOW_S if in_flow else _START_S),
            number=draw.choice((signal.SIGINT, signal.SIGTERM)),
            again_after_s=draw.choice((None, None, draw.uniform(0.0, 0.08))),
            has_old=draw.random() < 0.5,
        )


def arguments(command: str, folder: Path) -> list[str]:
    """A run that goes on for minutes."""
    if command == "train":
        data = write_clips(folder / "clips", presets.tiny(), 24)
        return ["train", "forcing", "--preset", "tiny", "--batch", "1", "--chunks", "2", "--steps", "1000000",
                "--data", str(data), "--out", str(folder / "run")]  # fmt: skip
    if command == "talk":
        return ["talk", "word " * 2000, "--out", str(folder / "film.mp4")]
    return ["generate", *write_inputs(folder), "--seconds", "600", "--out", str(folder / "film.mp4")]


class Running:
    """A command, or its ranks, in a process group of their own."""

    def __init__(self, command: str, words: Sequence[str], folder: Path) -> None:
        self._said = folder / "said"
        ranks = range(NUM_RANKS) if command == "ranks" else (None,)
        port = str(free_port())
        self.processes: list[subprocess.Popen[bytes]] = []
        for rank in ranks:
            world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_RANKS),
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
            with self._said.open("ab") as said:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", _START, *words],
                        env=environment(**(world if rank is not None else {})),
                        stdout=subprocess.PIPE,
                        stderr=said,
                        stdin=subprocess.DEVNULL,
                        process_group=self.processes[0].pid if self.processes else 0,
                    )
                )
        for process in self.processes:
            assert process.stdout is not None
            process.stdout.readline()

    def wait_for_output(self, folder: Path, *, timeout_s: float = 280.0) -> None:
        """Until a chunk of the film, or a checkpoint's log, is there."""
        end_s = time.monotonic() + timeout_s
        film, log = part_of(folder / "film.mp4"), folder / "run" / "log.jsonl"
        while not (film.exists() and film.stat().st_size > 5_000) and not log.exists():
            assert time.monotonic() < end_s, self.said
            assert all(process.poll() is None for process in self.processes), self.said
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self, within_s: float) -> list[int | None]:
        """Exit statuses; None for a process that is still there."""
        end_s = time.monotonic() + within_s
        found: list[int | None] = []
        for process in self.processes:
            try:
                found.append(process.wait(max(0.0, end_s - time.monotonic())))
            except subprocess.TimeoutExpired:
                found.append(None)
        return found

    @property
    def said(self) -> str:
        return self._said.read_text(encoding="utf-8", errors="replace")

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait(30)
            assert process.stdout is not None
            process.stdout.close()


@functools.cache
def made_film() -> bytes:
    """A short film, to have the name already."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        with VideoWriter(path, width=64, height=64, fps=25, rate_hz=16_000) as writer:
            writer.write(torch.zeros(12, 64, 64, 3, dtype=torch.uint8), torch.zeros(writer.samples_due(12)))
        return path.read_bytes()


def frames_of(film: Path) -> int:
    """Frames of a film; raises for a damaged one."""
    with av.open(str(film)) as container:
        return sum(1 for _ in container.decode(video=0))


def faults(moment: Moment, old_film: bytes, *, within_s: float = WITHIN_S) -> list[str]:
    """End a command at a moment; what is wrong with how it ended. Nothing, as a rule."""
    return ended(moment, old_film, within_s=within_s)[0]


def ended(moment: Moment, old_film: bytes, *, within_s: float = WITHIN_S) -> tuple[list[str], float]:
    """As `faults`, and seconds from the last signal to the end of the last process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        film = folder / "film.mp4"
        if moment.has_old:
            film.write_bytes(old_film)
        words = arguments(moment.command, folder)
        running = Running(moment.command, words, folder)
        try:
            if moment.in_flow:
                running.wait_for_output(folder)
            time.sleep(moment.after_s)
            early = [process.poll() for process in running.processes]
            running.signal(moment.number)
            if moment.again_after_s is not None:
                time.sleep(moment.again_after_s)
                running.signal(moment.number)
            signalled_s = time.monotonic()
            statuses = running.wait(within_s)
            took_s = time.monotonic() - signalled_s
        finally:
            running.kill()
        found = [f"ended by itself: {status}" for status in early if status is not None]
        # Before a command handles signals they end it themselves, which a shell shows as the same status.
        right = (128 + moment.number, -moment.number)
        found += [f"exit status {status}" for status in statuses if status not in right]
        found += [running.said[-2000:]] if "Traceback" in running.said or found else []
        return found + _faults_of_files(moment, folder, old_film), took_s


def _faults_of_files(moment: Moment, folder: Path, old_film: bytes) -> list[str]:
    film = folder / "film.mp4"
    found: list[str] = []
    if moment.has_old and film.read_bytes() != old_film:
        found.append("the old film is gone")
    for path in (film, part_of(film)):
        try:
            if path.exists() and frames_of(path) == 0 and path == film:
                found.append("a film without frames")
        except (OSError, ValueError) as error:
            if path == film or path.stat().st_size > 5_000:
                found.append(f"{path.name} does not play: {error}")
    checkpoint = folder / "run" / "checkpoint.safetensors"
    if checkpoint.exists():
        with safe_open(checkpoint, framework="pt") as file:
            found += [] if "step" in (file.metadata() or {}) else ["a checkpoint without its step"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=400, help="how many moments (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="other moments (default: %(default)s)")
    parser.add_argument("--within", type=float, default=WITHIN_S, metavar="SECONDS", help="(default: %(default)s)")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=COMMANDS)
    args = parser.parse_args()
    took_s: dict[str, list[float]] = {}
    bad = 0
    for number, moment in enumerate(moments(args.seed, args.count, args.commands)):
        wrong, seconds = ended(moment, made_film(), within_s=args.within)
        twice = "" if moment.again_after_s is None else " twice"
        took_s.setdefault(f"{moment.command} {moment.number.name}{twice}", []).append(seconds)
        bad += bool(wrong)
        print(f"{number} {moment}: {seconds:.2f} s {wrong or 'as it should be'}", flush=True)
    for kind, times in sorted(took_s.items()):
        print(f"{kind}: {len(times)} times, median {statistics.median(times):.2f} s, longest {max(times):.2f} s")
    print(f"{args.count - bad} of {args.count}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
