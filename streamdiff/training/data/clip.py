"""A clip of one face with its sound and its prompt, and what is known of it.

Axes: T frames, H height, W width, C channels, S samples at 16 kHz, E columns of truth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from streamdiff.arrays import Floats
from streamdiff.training.faces import Picture

FPS = 25
RATE_HZ = 16_000
FRAME_SAMPLES = RATE_HZ // FPS
NUM_FRAMES = 97
"""One frame for the codec to begin with, and 24 latent frames of four."""
TRUTH = ("opening_cm", "round", "blink", "pitch", "yaw", "roll", "gaze_x", "gaze_y", "smile", "hand", "badge")
"""Columns of truth: distance of the inner lips on the mean head; shapes and gaze as shares; angles in radians; how far
the hand is raised; whether there is a badge."""

PROMPTS: Mapping[str, tuple[str, ...]] = {
    "plain": ("A person is talking to the camera.", "Someone speaks calmly.", "A person talks."),
    "nod": ("A person is nodding.", "Someone nods while speaking.", "A person talks and nods."),
    "shake": ("A person shakes the head.", "Someone is shaking their head.", "A person talks and shakes the head."),
    "smile": ("A person is smiling.", "Someone speaks with a smile.", "A person talks, smiling happily."),
    "aside": ("A person looks to the side.", "Someone is looking aside.", "A person talks, turned to the side."),
    "hand": ("A person raises a hand.", "Someone holds up a hand.", "A person talks with a raised hand."),
}
ALL_PROMPTS = tuple(text for texts in PROMPTS.values() for text in texts)


@dataclass(frozen=True, slots=True)
class Clip:
    """A few seconds of one face."""

    frames_THWC: Picture
    photo_HWC: Picture
    """Another moment of the same face: at rest, mouth shut."""
    sound_S: Floats
    prompt: str
    truth_TE: Floats | None
    """Columns `TRUTH`; None when nobody knows."""


class ClipSource(Protocol):
    """Clips by number."""

    @property
    def size(self) -> int:
        """Height and width of a frame."""
        ...

    def __len__(self) -> int: ...

    def clip(self, index: int) -> Clip: ...
