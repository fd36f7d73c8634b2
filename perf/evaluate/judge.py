"""What can be said of one film, and of all films together.

Axes: T frames, H height, W width, C channels, S samples, N frames or windows, F features, E columns.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from signals import Array, coarse, correlation, frechet, picture, seam, synchrony, windows

from evaluate.people import Take
from evaluate.readers import BlinkReader, WidthReader
from streamdiff.arrays import Floats
from streamdiff.training.data.articulation import articulation
from streamdiff.training.data.clip import FRAME_SAMPLES
from streamdiff.training.probe import TRUTH_SPREAD, Probe, Reading


@dataclass(slots=True)
class Crowd:
    """Features of all persons' frames, for distances between crowds."""

    frames: list[Array] = field(default_factory=list[Array])
    windows: list[Array] = field(default_factory=list[Array])

    def add(self, reading: Reading) -> None:
        self.frames.append(reading.features_NF.numpy())
        self.windows.append(windows(reading.truth_NE.numpy() / np.array(TRUTH_SPREAD)))

    def apart(self, other: Crowd) -> tuple[float, float]:
        pairs = ((self.frames, other.frames), (self.windows, other.windows))
        near, moving = (frechet(np.concatenate(a), np.concatenate(b)) for a, b in pairs)
        return near, moving


def loudness(sound_S: Floats) -> Floats:
    """Decibels per frame, from -60."""
    power = (sound_S[: len(sound_S) // FRAME_SAMPLES * FRAME_SAMPLES].reshape(-1, FRAME_SAMPLES) ** 2).mean(1)
    return np.maximum(10 * np.log10(power + 1e-9), -60.0).astype(np.float32)


def identity_distance(reading: Reading, photo: Reading, *, width: int = 12) -> Array:
    """How far from the photograph each stretch of ``width`` frames is, in spreads over people."""
    count = len(reading.identity_NE) // width
    mean_NE = reading.identity_NE[: count * width].unflatten(0, (count, width)).mean(1)
    return (mean_NE - photo.identity_NE).square().mean(1).sqrt().numpy()


def loudness_opening(sound_S: Floats) -> Floats:
    """A mouth opened by three lines of arithmetic: loudness above -52 dB, smoothed. The baseline of sync."""
    open_T = np.clip((loudness(sound_S) + 52.0) / 26.0, 0.0, 1.0)
    return np.convolve(open_T, (0.25, 0.5, 0.25), mode="same").astype(np.float32)


def width(sound_S: Floats) -> Floats:
    """How wide the truth draws its mouth to this sound, 0..1 per frame. The truth's columns do not hold it."""
    return articulation(sound_S)["wide"]


_LATENT_FRAMES = 4


def judge(
    frames_THWC: NDArray[np.uint8], take: Take, probe: Probe, *, period: int, widths: WidthReader | None = None,
    blinks: BlinkReader | None = None,
) -> tuple[dict[str, float], Reading]:  # fmt: skip
    """All that can be said of one person's film; ``period``: frames of a chunk."""
    reading = probe.read(torch.from_numpy(frames_THWC))
    photo = probe.read(take.photo_HWC[None])
    seen = reading.column("opening_cm").numpy()
    num_frames = len(seen)
    expected = take.column("opening_cm")[:num_frames]
    sync = synchrony(seen, expected)
    colour = np.abs(coarse(frames_THWC) - coarse(take.photo_HWC[None].numpy())).mean()
    facts = {
        "sync": sync.at_zero,
        "lag": float(sync.lag),
        "sync_best": sync.best,
        "loudness": synchrony(seen, loudness(take.sound_S)[:num_frames]).at_zero,
        "round": correlation(reading.column("round").numpy(), take.column("round")[:num_frames]),
        "opening": float(seen.std() / max(expected.std(), 1e-6)),
        "colour": float(colour),
        "identity": float(identity_distance(reading, photo).mean()),
        **dataclasses.asdict(picture(frames_THWC, period=period)),
        "seam_latent": seam(frames_THWC, period=_LATENT_FRAMES),
    }
    if widths is not None:
        facts["wide"] = correlation(widths.read(reading), width(take.sound_S)[:num_frames])
    if blinks is not None:
        facts["blinks"] = blinks.per_minute(frames_THWC)
    return facts, reading
