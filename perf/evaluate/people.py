"""Persons and speech that no training saw, and what these persons really look like while they speak.

Axes: T frames, H height, W width, C channels, S samples, E columns of truth.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamdiff import rng
from streamdiff.arrays import Floats
from streamdiff.avatar.head3d import HeadModel
from streamdiff.errors import InputError
from streamdiff.training.data.articulation import articulation, mouth_weights, opening_cm
from streamdiff.training.data.clip import FPS, FRAME_SAMPLES, RATE_HZ, TRUTH
from streamdiff.training.data.score import compose
from streamdiff.training.data.speech import Voices, leveled
from streamdiff.training.faces import Build, Look, Painter

FIRST_NUMBER = 1_000_000
"""Number of the first person to judge by; training uses small ones."""


@dataclass(frozen=True, slots=True, eq=False)
class Take:
    """A person who speaks: the photograph, the sound, and what that person really looks like meanwhile."""

    photo_HWC: Tensor
    sound_S: Floats
    frames_THWC: NDArray[np.uint8]
    truth_TE: Floats

    def column(self, name: str) -> Floats:
        return self.truth_TE[:, TRUTH.index(name)]


class People:
    """Drawn persons by number, their speech and their truth; what is drawn is kept in ``work``.

    ``recordings`` is an archive as ``facegood_audio2rig.npz``, of which the last take is used.
    """

    def __init__(self, head_file: Path, recordings: Path | None, work: Path) -> None:
        self.head = HeadModel.load(head_file)
        self._work = work
        work.mkdir(parents=True, exist_ok=True)
        self._recorded: Floats | None = None
        if recordings is not None:
            try:
                with np.load(recordings, allow_pickle=False) as arrays:
                    last = sorted(name for name in arrays.files if name.startswith("audio_"))[-1]
                    self._recorded = leveled(arrays[last].astype(np.float32) / 32768)
            except (OSError, ValueError, IndexError) as error:
                raise InputError(f"{recordings} is not an archive of recordings: {error}") from error

    def look(self, number: int, member: int = 0) -> Look:
        return Look.draw(np.random.default_rng(rng.seed_of("look", 0, number, member)))

    def numbers(self, count: int, *, badge: bool = False) -> list[int]:
        """Numbers of persons never seen in training; ``badge``: who wear one."""
        numbers = (n for n in itertools.count(FIRST_NUMBER + 500) if self.look(n).has_badge or not badge)
        return list(itertools.islice(numbers, count))

    def speech(self, number: int, seconds: float, *, take: int = 0) -> Floats:
        """Unseen speech at -26 dBFS: every second person speaks from the recording, the others read new sentences."""
        num_samples = round(seconds * FPS) * FRAME_SAMPLES
        if self._recorded is not None and (number + take) % 2 == 0:
            first = rng.integer(0, len(self._recorded) // RATE_HZ, "judged speech", number, take) * RATE_HZ
            return leveled(np.take(self._recorded, np.arange(first, first + num_samples), mode="wrap"))
        generator = np.random.default_rng(rng.seed_of("judged speech", number, take))
        return Voices().sound(num_samples, generator)

    def opening(self, sound_S: Floats) -> Floats:
        """How far the truth opens its mouth to this sound, cm per frame."""
        return opening_cm(self.head, mouth_weights(articulation(sound_S)))

    def photo(self, number: int) -> Tensor:
        """The person at rest, ``[H, W, 3]``."""
        painter, look, generator = self._person(number)
        score = compose(self.head, np.zeros(12 * FRAME_SAMPLES, np.float32), generator, action="plain", calm=True)
        return torch.from_numpy(painter.dress(painter.body(score.photo), look))

    def take(self, number: int, seconds: float, *, take: int = 0, action: str = "plain") -> Take:
        """This person speaking for so long, from ``work`` if it was drawn before."""
        path = self._work / f"take-{number}-{take}-{action}-{seconds:g}s.safetensors"
        if path.is_file():
            kept = load_file(path)
            return Take(kept["photo"], kept["sound"].numpy(), kept["frames"].numpy(), kept["truth"].numpy())
        made = self._drawn(number, seconds, take, action)
        arrays = {"sound": made.sound_S, "frames": made.frames_THWC, "truth": made.truth_TE}
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        partial = path.with_suffix(".partial")
        save_file({"photo": made.photo_HWC, **tensors}, partial)
        partial.replace(path)
        return made

    def _drawn(self, number: int, seconds: float, take: int, action: str) -> Take:
        sound_S = self.speech(number, seconds, take=take)
        painter, look, _ = self._person(number)
        generator = np.random.default_rng(rng.seed_of("judged motion", number, take, action))
        score = compose(self.head, sound_S, generator, action=action, calm=True)
        frames = np.stack([painter.dress(painter.body(pose), look) for pose in score.poses])
        return Take(self.photo(number), sound_S, frames, score.truth_TE)

    def _person(self, number: int) -> tuple[Painter, Look, np.random.Generator]:
        generator = np.random.default_rng(rng.seed_of("drawn clip", 0, number))
        build = Build.draw(generator, len(self.head.identity_KV3))
        return Painter(self.head, build, size=128), self.look(number), generator
