"""The rule by which a drawn mouth follows the sound, so that what is right is known for every frame of every voice.

Loudness between 0.1 and 3 kHz opens it, a low spectrum rounds it, hisses draw it wide. Real lips do more.

Axes: T frames, S samples at 16 kHz, V vertices.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from streamdiff.arrays import Floats
from streamdiff.avatar.head3d import HeadModel
from streamdiff.training.data.clip import FRAME_SAMPLES, RATE_HZ

_LIP_TOP, _LIP_BOTTOM = 5533, 5517
"""Vertices of the light model: middle of the inner lips."""


def articulation(samples_S: Floats) -> dict[str, Floats]:
    """What the mouth does with a sound of -26 dBFS, per frame: ``open``, ``round`` and ``wide``, each 0..1.

    Frame t hears from 60 ms before its middle to 20 ms after it, so never beyond its own end.
    """
    num_frames = len(samples_S) // FRAME_SAMPLES
    hop, window = RATE_HZ // 100, 400
    padded = np.pad(samples_S.astype(np.float64), (window // 2, window))
    starts = np.arange(num_frames * 4 + 4) * hop
    pieces = padded[np.minimum(starts[:, None] + np.arange(window), len(padded) - 1)] * np.hanning(window)
    power = np.abs(np.fft.rfft(pieces, 512)) ** 2 / (np.hanning(window) ** 2).sum()
    hz = np.fft.rfftfreq(512, 1 / RATE_HZ)

    def band(low: float, high: float) -> NDArray[np.float64]:
        return power[:, (hz >= low) & (hz < high)].sum(1) / 256 + 1e-9

    voice, hiss = band(100, 3000), band(4000, 8000)
    loud = np.clip((10 * np.log10(voice) + 52.0) / 26.0, 0, 1)
    inside = (hz >= 200) & (hz < 3000)
    centre_hz = (power[:, inside] * hz[inside]).sum(1) / (power[:, inside].sum(1) + 1e-9)
    low = np.clip((750.0 - centre_hz) / 450.0, 0, 1) * loud
    hissing = np.clip((10 * np.log10(hiss / voice) + 2.0) / 8.0, 0, 1) * (hiss > 1e-6)
    tracks = {"open": loud * (1 - 0.7 * low * 0.5) * (1 - 0.6 * hissing), "round": low, "wide": hissing}
    weights = np.array([0.5, 0.8, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4])
    weights /= weights.sum()
    out: dict[str, Floats] = {}
    for name, track in tracks.items():
        # Visit 4 t + 2 is the middle of frame t; six visits before it count, and two after.
        reach = np.pad(track, (6, 8), mode="edge")
        middle = np.arange(num_frames) * 4 + 2
        out[name] = (reach[middle[:, None] + np.arange(9)] * weights).sum(1).astype(np.float32)
    return out


def mouth_weights(heard: Mapping[str, Floats]) -> dict[str, Floats]:
    """ARKit weights ``[T]`` of what `articulation` heard."""
    opened, rounded, wide = heard["open"], heard["round"], heard["wide"]
    spread = opened * (1 - rounded)
    weights = {
        "jawOpen": 0.55 * opened,
        "mouthFunnel": 0.55 * rounded * np.sqrt(np.maximum(opened, 0)),
        "mouthPucker": 0.5 * rounded,
    }
    for side in ("Left", "Right"):
        weights["mouthLowerDown" + side] = 0.35 * spread + 0.15 * wide
        weights["mouthUpperUp" + side] = 0.15 * spread + 0.08 * wide
        weights["mouthStretch" + side] = 0.3 * wide
    return weights


def opening_cm(head: HeadModel, weights: Mapping[str, Floats]) -> Floats:
    """Distance of the inner lips ``[T]`` that these weights make on the mean head."""
    rest = float(head.neutral_V3[_LIP_BOTTOM, 1] - head.neutral_V3[_LIP_TOP, 1])
    total = np.full_like(next(iter(weights.values())), rest)
    for name, track in weights.items():
        delta = head.shapes[name]
        total = total + track * np.float32(delta[_LIP_BOTTOM, 1] - delta[_LIP_TOP, 1])
    return np.maximum(total, 0.0).astype(np.float32)
