"""Numbers out of tracks and pictures: is it in step, does it drift, does it jump, how far are two crowds apart.

Plain functions of arrays, so that each can be held against a signal whose answer is known. Times are seconds, lags and
responses video frames, pictures uint8 or float grey levels 0..255.

Axes: T frames, H height, W width, C channels, N samples, F features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Synchrony:
    """How well one track follows another."""

    at_zero: float
    """Correlation without any shift."""
    best: float
    """Highest correlation within the lags that were tried."""
    lag: int
    """Where that is, frames; positive: the first track comes late."""


def correlation(a_T: Array, b_T: Array) -> float:
    """Pearson's; 0 where a track does not move."""
    a, b = a_T - a_T.mean(), b_T - b_T.mean()
    size = math.sqrt(float((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / size if size > 1e-12 else 0.0


def synchrony(seen_T: Array, heard_T: Array, *, max_lag: int = 12) -> Synchrony:
    """Compare what is seen with what is heard, at shifts of up to ``max_lag`` frames each way.

    >>> heard = np.sin(np.arange(200) ** 1.3)
    >>> synchrony(np.roll(heard, 3), heard).lag
    3
    """
    if len(seen_T) != len(heard_T) or len(seen_T) <= 2 * max_lag:
        raise ValueError(f"tracks of {len(seen_T)} and {len(heard_T)} frames cannot be compared at +-{max_lag} frames")
    found: dict[int, float] = {}
    for lag in range(-max_lag, max_lag + 1):
        late, early = max(lag, 0), max(-lag, 0)
        stop = len(seen_T) - abs(lag)
        found[lag] = correlation(seen_T[late : late + stop], heard_T[early : early + stop])
    lag = max(found, key=lambda at: (found[at], -abs(at)))
    return Synchrony(found[0], found[lag], lag)


@dataclass(frozen=True, slots=True)
class Slope:
    """A straight line through a track, per 1000 s."""

    per_1000_s: float
    low: float
    high: float
    """95 % interval."""

    @property
    def holds_zero(self) -> bool:
        return self.low <= 0.0 <= self.high


def slope(time_s: Array, value: Array, *, block_s: float, resamples: int = 1000, seed: int = 0) -> Slope:
    """Least squares, and how sure that is when neighbours are alike.

    The interval comes from a moving-block bootstrap of the residuals: stretches of ``block_s`` stay together, so that
    whatever repeats or lingers for less than that does not pass for evidence.
    """
    n = len(value)
    if n < 8:
        raise ValueError(f"a slope needs at least 8 points, got {n}")
    t = (time_s - time_s.mean()) / 1000.0
    power = float((t * t).sum())
    rise = float((t * value).sum()) / power
    fitted = value.mean() + rise * t
    residual = value - fitted
    block = int(np.clip(round(block_s / (float(time_s[-1] - time_s[0]) / (n - 1))), 1, n // 4))
    generator = np.random.default_rng(seed)
    starts = generator.integers(0, n - block + 1, (resamples, -(-n // block)))
    index = (starts[..., None] + np.arange(block)).reshape(resamples, -1)[:, :n]
    drawn = residual[index]
    drawn = drawn - drawn.mean(1, keepdims=True)
    # Few long blocks vary less than the whole: each resampled line is off by as much as blocks are few.
    widen = math.sqrt(n / max(1, n - block))
    rises = rise + widen * (drawn * t).sum(1) / power
    low, high = np.percentile(rises, (2.5, 97.5))
    return Slope(rise, float(low), float(high))


def first_crossing(time_s: Array, value: Array, threshold: float, *, held: int = 3) -> float | None:
    """When a track first goes above a threshold for ``held`` points in a row; None: never.

    >>> first_crossing(np.arange(6.0), np.array([0, 9, 0, 9, 9, 9.0]), 5.0)
    3.0
    """
    above = value > threshold
    for i in range(len(value) - held + 1):
        if above[i : i + held].all():
            return float(time_s[i])
    return None


def response(track_T: Array, switch: int, *, before: int, steady: int) -> tuple[int | None, float]:
    """Frames from ``switch`` until a track has gone half the way to where it settles, and how far that is.

    It starts from its mean over the ``before`` frames ahead of the switch and settles at that over its last ``steady``.

    >>> response(np.array([0.0] * 10 + [1.0] * 10), 8, before=8, steady=5)
    (2, 1.0)
    """
    start, end = float(track_T[switch - before : switch].mean()), float(track_T[-steady:].mean())
    way = (track_T[switch:] - start) * (1.0 if end > start else -1.0) >= abs(end - start) / 2
    return (int(way.argmax()) if way.any() else None), end - start


def rolling(track_T: Array, width: int, *, spread: bool = False) -> Array:
    """Mean, or with ``spread`` standard deviation, of the ``width`` frames around each frame."""
    padded = np.pad(track_T.astype(np.float64), (width // 2, width - 1 - width // 2), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)
    return windows.std(1) if spread else windows.mean(1)


@dataclass(frozen=True, slots=True)
class Picture:
    """What can be said of moving pictures without knowing what they show."""

    seam: float
    """Change across the borders of chunks over change elsewhere; 1: nobody can tell where they are."""
    jitter: float
    """Mean second difference over time, grey levels."""
    flicker: float
    """Mean change from frame to frame in the upper corners, where nothing moves, grey levels."""
    sharpness: float
    """Mean absolute Laplacian, grey levels."""
    saturated: float
    """Share of values at either end of the scale."""


def _steps(grey_THW: Array, order: int, *, part: int = 60) -> Array:
    """Mean size of the differences over time of this order, a part of the film at a time."""
    starts = range(0, len(grey_THW) - order, part)
    return np.concatenate([np.abs(np.diff(grey_THW[t : t + part + order], order, axis=0)).mean((1, 2)) for t in starts])


def picture(frames_THWC: NDArray[np.uint8], *, period: int) -> Picture:
    """Judge frames; chunks begin at multiples of ``period``."""
    _, H, W, _ = frames_THWC.shape
    grey = frames_THWC.mean(3, dtype=np.float32)
    change_T = _steps(grey, 1)
    second = _steps(grey, 2)
    rows, columns = H // 4, W // 10
    corners = np.concatenate([grey[:, :rows, :columns], grey[:, :rows, -columns:]], 2)
    inner = grey[:, 1:-1, 1:-1]
    laplacian = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] - 4 * inner
    return Picture(
        seam=seam_ratio(change_T, period=period),
        jitter=float(second.mean()),
        flicker=float(np.abs(np.diff(corners, axis=0)).mean()),
        sharpness=float(np.abs(laplacian).mean()),
        saturated=float(((frames_THWC == 0) | (frames_THWC == 255)).mean()),
    )


def seam_ratio(change_T: Array, *, period: int) -> float:
    """Mean change into frames ``period, 2 * period, ...`` over that into all others; ``change_T[t]`` is from t to t+1.

    >>> seam_ratio(np.array([1.0, 1, 3, 1, 1, 3, 1, 1]), period=3)
    3.0
    """
    border = (np.arange(len(change_T)) + 1) % period == 0
    inside = float(change_T[~border].mean())
    return float(change_T[border].mean()) / inside if inside > 1e-9 else 1.0


def seam(frames_THWC: NDArray[np.uint8], *, period: int) -> float:
    """Change of pictures into frames ``period, 2 * period, ...`` over that into all others (`seam_ratio`)."""
    return seam_ratio(_steps(frames_THWC.mean(3, dtype=np.float32), 1), period=period)


def per_minute(track_T: Array, *, rate_hz: float, above: float = 0.5) -> float:
    """How often a track rises above a level, a minute: blinks of a track of lids.

    >>> per_minute(np.array([0, 1, 1, 0, 0.9, 0.2] * 10), rate_hz=1)
    20.0
    """
    high = track_T > above
    return float((high[1:] & ~high[:-1]).sum() + high[0]) / (len(track_T) / rate_hz / 60)


def coarse(frames_THWC: NDArray[np.uint8], cells: int = 4) -> Array:
    """Mean colours of ``cells x cells`` parts of each frame, 0..1, ``[T, cells, cells, 3]``."""
    T, H, W, C = frames_THWC.shape
    return frames_THWC.reshape(T, cells, H // cells, cells, W // cells, C).mean((2, 4), dtype=np.float64) / 255


def frechet(a_NF: Array, b_NF: Array) -> float:
    """Frechet distance of two crowds taken for Gaussians: |mean - mean|^2 + tr(A + B - 2 (A B)^(1/2)).

    In features of a network of our own this is no FID; it can be compared with itself alone.
    """
    a, b = a_NF.astype(np.float64), b_NF.astype(np.float64)
    A, B = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(A)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ B @ root), 0, None)).sum()
    apart = float(((a.mean(0) - b.mean(0)) ** 2).sum())
    return max(0.0, apart + float(np.trace(A) + np.trace(B) - 2 * cross))


def windows(features_TF: Array, *, width: int = 12, stride: int = 6) -> Array:
    """What happens in short stretches: mean, spread and mean step of every feature, ``[N, 3 F]``."""
    out: list[Array] = []
    for t in range(0, len(features_TF) - width + 1, stride):
        part = features_TF[t : t + width]
        out.append(np.concatenate([part.mean(0), part.std(0), np.abs(np.diff(part, axis=0)).mean(0)]))
    return np.stack(out)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval of it (Student's t) over a few cases."""
    x = np.asarray(values, np.float64)
    if len(x) < 2:
        return float(x.mean()), float("nan"), float("nan")
    # Quantiles of t at 97.5 % for 1..10 degrees of freedom; beyond, the normal one is near enough.
    t = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
    half = (t[len(x) - 2] if len(x) <= 11 else 2.0) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return float(x.mean()), float(x.mean()) - half, float(x.mean()) + half
