"""Films of the command line that are kept: what their bytes were, and small pictures and the loudness of each.

    python -m tests.generate.kept_films          make them anew and write what is kept: only in a commit that says why

Bytes are compared where processor and libraries are those that a hash was made with (`fingerprint`). A film made
elsewhere differs in a few grey levels; it is held to the pictures.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from tests.generate.processes import TIMEOUT_S, environment

KEPT = Path(__file__).with_name("kept")
HASHES = KEPT / "films.json"
FILMS: Mapping[str, tuple[str, ...]] = {
    "portrait": ("generate", "--seconds", "2"),
    "tiny": ("generate", "--preset", "tiny", "--seconds", "2"),
    "talk": ("talk", "Hello there, this is a test.", "--no-sheet"),
}
LIBRARIES = ("torch", "numpy", "av", "pillow", "onnxruntime", "hibari-tts", "matplotlib", "moonshine-voice")
"""What arithmetic, pictures, film and voice come from, and the demo's inputs."""
THUMBNAIL, EVERY = 32, 8


@dataclass(frozen=True)
class Look:
    """A film, seen from afar."""

    num_frames: int
    thumbnails_NHW3: npt.NDArray[np.uint8]
    """Every eighth frame, as means over squares."""
    loudness_N: npt.NDArray[np.float64]
    """RMS of the sound between two thumbnails."""


def fingerprint() -> str:
    """Processor and libraries: what the last bits of a float depend on."""
    facts = [f"{name} {_version(name)}" for name in LIBRARIES]
    return "; ".join([platform.machine(), _processor(), torch.backends.cpu.get_cpu_capability(), *facts])


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    first = [line for line in lines if line.startswith(("vendor_id", "cpu family", "model\t"))][:3]
    return " ".join(line.partition(":")[2].strip() for line in first)


def make(name: str, path: Path) -> None:
    """Make a film with the command line, in a process of its own."""
    command = [sys.executable, "-m", "streamdiff", *FILMS[name], "--out", str(path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def look(path: Path) -> Look:
    """Decode a film and keep what is worth comparing."""
    with av.open(str(path)) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    with av.open(str(path)) as film:
        sound_S = np.concatenate([frame.to_ndarray()[0] for frame in film.decode(audio=0)])
    pieces = np.array_split(sound_S.astype(np.float64), len(frames[::EVERY]))
    loudness = [float(np.sqrt(np.mean(piece**2))) for piece in pieces]
    return Look(len(frames), np.stack([_small(frame) for frame in frames[::EVERY]]), np.array(loudness))


def _small(frame_HW3: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    height, width = (size // THUMBNAIL for size in frame_HW3.shape[:2])
    squares = frame_HW3.reshape(THUMBNAIL, height, THUMBNAIL, width, 3)
    return np.round(squares.mean((1, 3))).astype(np.uint8)


def kept_look(name: str) -> Look:
    with Image.open(KEPT / f"{name}.png") as picture:
        strip_HW3 = np.asarray(picture.convert("RGB"))
    facts = json.loads(HASHES.read_text(encoding="utf-8"))[name]
    thumbnails = strip_HW3.reshape(THUMBNAIL, -1, THUMBNAIL, 3).swapaxes(0, 1)
    return Look(facts["frames"], thumbnails, np.array(facts["loudness"]))


def kept_hashes(name: str) -> dict[str, str]:
    """SHA-256 of a film by fingerprint."""
    return json.loads(HASHES.read_text(encoding="utf-8"))[name]["sha256"]


def main() -> None:
    KEPT.mkdir(exist_ok=True)
    facts = {}
    for name in FILMS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "film.mp4"
            make(name, path)
            seen = look(path)
            facts[name] = {
                "command": "streamdiff " + " ".join(FILMS[name]),
                "frames": seen.num_frames,
                "loudness": [round(value, 4) for value in seen.loudness_N.tolist()],
                "sha256": {fingerprint(): sha256(path)},
            }
        strip_HW3 = seen.thumbnails_NHW3.swapaxes(0, 1).reshape(THUMBNAIL, -1, 3)
        Image.fromarray(strip_HW3).save(KEPT / f"{name}.png", optimize=True)
    HASHES.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
