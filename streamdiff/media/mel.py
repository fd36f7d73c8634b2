"""Mel filter banks: triangles over the bins of a Fourier transform, equally spaced in pitch."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Scale = Literal["htk", "slaney"]

_LINEAR_HZ_PER_MEL, _LOG_FROM_HZ, _LOG_STEP = 200.0 / 3, 1000.0, math.log(6.4) / 27.0


def mel_bank(
    num_bands: int,
    fft_samples: int,
    rate_hz: int,
    *,
    low_hz: float,
    high_hz: float,
    scale: Scale = "htk",
    slopes: Literal["hz", "mel"] = "hz",
) -> NDArray[np.float64]:
    """Triangles ``[bins, bands]``, float64, each from its neighbours' peaks to its own; not normalised.

    Args:
        scale: ``htk`` (2595 log10(1 + f / 700), O'Shaughnessy 1987) or ``slaney`` (linear to 1 kHz, then logarithmic;
            the default of librosa).
        slopes: whether a triangle's sides are straight over Hz (librosa, torchaudio) or over mel (HTK, Kaldi).
    """
    bins_hz = np.arange(fft_samples // 2 + 1) * rate_hz / fft_samples
    ends = [float(_mel_of(np.float64(hz), scale)) for hz in (low_hz, high_hz)]
    corners = np.linspace(ends[0], ends[1], num_bands + 2)
    at, corners = (bins_hz, _hz_of(corners, scale)) if slopes == "hz" else (_mel_of(bins_hz, scale), corners)
    rise = (at[:, None] - corners[:-2]) / (corners[1:-1] - corners[:-2])
    fall = (corners[2:] - at[:, None]) / (corners[2:] - corners[1:-1])
    return np.maximum(0.0, np.minimum(rise, fall))


def band_widths_hz(num_bands: int, *, low_hz: float, high_hz: float, scale: Scale = "htk") -> NDArray[np.float64]:
    """Width ``[bands]`` of each triangle at its foot, Hz: what Slaney's area normalisation divides by."""
    ends = [float(_mel_of(np.float64(hz), scale)) for hz in (low_hz, high_hz)]
    corners_hz = _hz_of(np.linspace(ends[0], ends[1], num_bands + 2), scale)
    return corners_hz[2:] - corners_hz[:-2]


def _mel_of(hz: NDArray[np.float64] | np.float64, scale: Scale) -> NDArray[np.float64]:
    hz = np.asarray(hz, np.float64)
    if scale == "htk":
        return 2595.0 * np.log10(1.0 + hz / 700.0)
    above = np.maximum(hz, _LOG_FROM_HZ)
    return np.where(
        hz < _LOG_FROM_HZ,
        hz / _LINEAR_HZ_PER_MEL,
        _LOG_FROM_HZ / _LINEAR_HZ_PER_MEL + np.log(above / _LOG_FROM_HZ) / _LOG_STEP,
    )


def _hz_of(mel: NDArray[np.float64], scale: Scale) -> NDArray[np.float64]:
    if scale == "htk":
        return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)
    knee = _LOG_FROM_HZ / _LINEAR_HZ_PER_MEL
    return np.where(mel < knee, mel * _LINEAR_HZ_PER_MEL, _LOG_FROM_HZ * np.exp((mel - knee) * _LOG_STEP))
