"""What an audio encoder is: sound in, hidden states out, one column per video frame, while it is still arriving.

Axes: B streams (1 here), Z hidden states per moment, E width of one, A video frames, S waveform samples.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from streamdiff.errors import ConfigError, InputError

SPEECH_HZ = 16_000
"""Samples per second of the sound that every encoder here takes, and of the sound in a video that was made with one."""


WINDOW_SAMPLES = 400
"""Samples of the window that log-mel features are computed on; a video frame is no shorter."""


class FeatureStream(Protocol):
    """The encoder's side of one voice."""

    def push(self, samples_S: Tensor) -> Tensor:
        """Hear the next samples; returns the columns [1, Z, E, A] that became ready, often none (A = 0)."""
        ...

    def finish(self) -> Tensor:
        """The sound has ended: returns the columns [1, Z, E, A] of the frames it touches that are left."""
        ...


class AudioEncoder(Protocol):
    """Sound to hidden states; holds weights only, so any number of streams can be open."""

    @property
    def rate_hz(self) -> int:
        """Samples per second of the sound it takes."""
        ...

    @property
    def num_features(self) -> int:
        """Z, hidden states per moment."""
        ...

    @property
    def feature_dim(self) -> int:
        """E, width of one hidden state."""
        ...

    @property
    def lookahead_s(self) -> float:
        """Sound that must have been heard beyond a frame (or a hop of frames) before its columns come out."""
        ...

    def stream(self, fps: int) -> FeatureStream:
        """Begin to listen to one voice for a video of ``fps`` frames per second."""
        ...


def require_fps(fps: int, rate_hz: int) -> None:
    """Raise ConfigError for a frame rate whose frames are shorter than a window of sound."""
    if not 1 <= fps <= rate_hz // WINDOW_SAMPLES:
        raise ConfigError(f"fps must lie in 1..{rate_hz // WINDOW_SAMPLES}, got {fps}")


def as_sound(samples_S: Tensor) -> Tensor:
    """Mono samples as float32 on the CPU; raises InputError for other shapes, NaN and infinity."""
    if samples_S.ndim != 1:
        raise InputError(f"sound is pushed as one row of mono samples, got shape {list(samples_S.shape)}")
    if not bool(torch.isfinite(samples_S).all()):
        raise InputError("the sound holds NaN or infinity; check the source")
    return samples_S.detach().to("cpu", torch.float32)
