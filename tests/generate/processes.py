"""Runs `streamdiff generate` in real processes, as a person or a launcher would.

All but torchrun fork from a server that has imported the engine once: each command has a process of its own, without
the seconds that importing takes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tests.pipeline.ranks import PROCESSES, free_port

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 240


def environment(**extra: str) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **extra}


def write_inputs(folder: Path, *, seconds: float = 2.0) -> list[str]:
    """A picture and a chirping voice, and the arguments that name them."""
    image, audio = folder / "face.png", folder / "voice.wav"
    ramp = np.linspace(0, 255, 160, dtype=np.uint8)
    Image.fromarray(np.stack([np.tile(ramp, (160, 1))] * 3, axis=-1)).save(image)
    moment = np.arange(int(16_000 * seconds)) / 16_000
    sound = 0.3 * np.sin(2 * np.pi * (200 + 80 * np.sin(3 * moment)) * moment)
    with wave.open(str(audio), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes((sound * 32_767).astype("<i2").tobytes())
    return ["--image", str(image), "--audio", str(audio)]


def run_alone(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = Command(["generate", *arguments], environment())
    try:
        return command.end(TIMEOUT_S)
    finally:
        command.kill()


def run_torchrun(num_ranks: int, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
    command = [*launcher, "--master-port", str(free_port()), "-m", "streamdiff", "generate", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


class Command:
    """`streamdiff ARGUMENTS` in a process of its own, which may be signalled."""

    def __init__(self, arguments: Sequence[str], variables: Mapping[str, str]) -> None:
        self._arguments = ["streamdiff", *arguments]
        self._said = tempfile.TemporaryDirectory()
        self._files = [Path(self._said.name) / name for name in ("stdout", "stderr")]
        self._process = PROCESSES.Process(
            target=_command, args=(self._arguments, dict(variables), [str(path) for path in self._files]), daemon=True
        )
        self._process.start()

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def end(self, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Wait for it, and say how it ended."""
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._arguments, timeout_s)
        stdout, stderr = (path.read_text(encoding="utf-8") if path.exists() else "" for path in self._files)
        self._said.cleanup()
        return subprocess.CompletedProcess(self._arguments, self._process.exitcode, stdout, stderr)

    def kill(self) -> None:
        if self._process.is_alive():
            self._process.kill()
            self._process.join(5)
        self._said.cleanup()


def _command(arguments: list[str], variables: dict[str, str], files: list[str]) -> None:
    os.environ.clear()
    os.environ.update(variables)
    for number, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = arguments
    from streamdiff.cli.main import main

    status = main(arguments[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@dataclass
class Ranks:
    """Ranks started one by one, without a launcher that would stop them."""

    processes: list[Command]

    @classmethod
    def start(cls, num_ranks: int, arguments: Sequence[str], *, world_size: int | None = None) -> Ranks:
        port = str(free_port())
        world = {"WORLD_SIZE": str(world_size or num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = ["generate", *arguments]
        return cls([Command(command, environment(RANK=str(r), LOCAL_RANK=str(r), **world)) for r in range(num_ranks)])

    def end(self, ranks: Sequence[int], *, within_s: float) -> dict[int, tuple[int, str]]:
        """Exit status and stderr of these ranks, all of which must end in time."""
        end_s = time.monotonic() + within_s
        results: dict[int, tuple[int, str]] = {}
        for rank in ranks:
            done = self.processes[rank].end(max(0.1, end_s - time.monotonic()))
            results[rank] = (done.returncode, done.stderr)
        return results

    def kill(self) -> None:
        for process in self.processes:
            process.kill()


def wait_for_bytes(path: Path, num_bytes: int, *, timeout_s: float = 120.0) -> None:
    """Wait until a growing file has reached a size."""
    end_s = time.monotonic() + timeout_s
    while not path.exists() or path.stat().st_size < num_bytes:
        assert time.monotonic() < end_s, f"{path} did not reach {num_bytes} bytes in {timeout_s} s"
        time.sleep(0.05)
