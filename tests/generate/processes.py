"""Runs `streamdiff generate` in real processes, as a person or a launcher would."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

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
    command = [sys.executable, "-m", "streamdiff", "generate", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def run_torchrun(num_ranks: int, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
    command = [*launcher, "--master-port", str(free_port()), "-m", "streamdiff", "generate", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Ranks:
    """Ranks started one by one, without a launcher that would stop them."""

    processes: list[subprocess.Popen[str]]

    @classmethod
    def start(cls, num_ranks: int, arguments: Sequence[str], *, world_size: int | None = None) -> Ranks:
        port = str(free_port())
        world = {"WORLD_SIZE": str(world_size or num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "streamdiff", "generate", *arguments]
        return cls(
            [
                subprocess.Popen(
                    command,
                    env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **world),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                for rank in range(num_ranks)
            ]
        )

    def end(self, ranks: Sequence[int], *, within_s: float) -> dict[int, tuple[int, str]]:
        """Exit status and stderr of these ranks, all of which must end in time."""
        end_s = time.monotonic() + within_s
        results: dict[int, tuple[int, str]] = {}
        for rank in ranks:
            _, stderr = self.processes[rank].communicate(timeout=max(0.1, end_s - time.monotonic()))
            results[rank] = (self.processes[rank].returncode, stderr)
        return results

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


def wait_for_bytes(path: Path, num_bytes: int, *, timeout_s: float = 120.0) -> None:
    """Wait until a growing file has reached a size."""
    end_s = time.monotonic() + timeout_s
    while not path.exists() or path.stat().st_size < num_bytes:
        assert time.monotonic() < end_s, f"{path} did not reach {num_bytes} bytes in {timeout_s} s"
        time.sleep(0.05)
