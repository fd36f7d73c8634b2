"""Linear readers of what the probe was not taught, or does not see: the width of a mouth, and blinks.

Both are ridge regressions on frames of the truth that are not judged. What they say of the judged truth shows how well
they read.

Axes: T frames, H height, W width, N frames of several films, F features, P pixels of the box of the eyes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from signals import Array, per_minute

from streamdiff.training.data.clip import FPS
from streamdiff.training.probe import Reading


def ridge_regression(x_NF: Array, y_N: Array, *, ridge: float) -> Array:
    """Weights ``[F]`` of least squares; ``ridge``: of the mean variance of the features."""
    gram = x_NF.T @ x_NF / len(x_NF)
    gram = gram + ridge * float(np.trace(gram)) / len(gram) * np.eye(len(gram))
    return np.linalg.solve(gram, x_NF.T @ y_N / len(x_NF))


class WidthReader:
    """Reads how wide a mouth is drawn from the probe's features."""

    def __init__(self, features_NF: Array, width_N: Array, *, ridge: float = 1e-3) -> None:
        x = features_NF.astype(np.float64)
        self._mean_F, self._offset = x.mean(0), float(width_N.mean())
        self._weights_F = ridge_regression(x - self._mean_F, width_N - self._offset, ridge=ridge)

    def read(self, reading: Reading) -> Array:
        return (reading.features_NF.numpy() - self._mean_F) @ self._weights_F + self._offset


_ROWS, _COLUMNS = slice(40, 68), slice(36, 92)
"""Where the eyes of a drawn head lie in 128x128 pixels."""
_AROUND = 25
_SHUT = 0.25


class BlinkReader:
    """Reads blinks from the pixels of one person's eyes, against what they showed within half a second around.

    The probe's own column of blinks is blind: it never exceeds 0.03 on the truth, which blinks every four seconds.

    Args:
        frames_THWC: another film of the truth of the same person, 128x128 pixels.
        blink_T: how far the lids are shut in it, 0..1.
    """

    def __init__(self, frames_THWC: NDArray[np.uint8], blink_T: Array, *, ridge: float = 0.03) -> None:
        self._weights_P = ridge_regression(_eyes(frames_THWC), blink_T, ridge=ridge)

    def read(self, frames_THWC: NDArray[np.uint8]) -> Array:
        """How far the lids are shut, about 0..1."""
        return _eyes(frames_THWC) @ self._weights_P

    def per_minute(self, frames_THWC: NDArray[np.uint8]) -> float:
        """Blinks a minute."""
        return per_minute(self.read(frames_THWC), rate_hz=FPS, above=_SHUT)


def _eyes(frames_THWC: NDArray[np.uint8]) -> Array:
    """Grey levels ``[T, P]`` of the box of the eyes, in squares of two pixels, less their median over a second."""
    grey = frames_THWC[:, _ROWS, _COLUMNS].mean(3, dtype=np.float64)
    T, H, W = grey.shape
    x_TP = grey.reshape(T, H // 2, 2, W // 2, 2).mean((2, 4)).reshape(T, -1)
    padded = np.pad(x_TP, ((_AROUND // 2, _AROUND // 2), (0, 0)), mode="edge")
    return x_TP - np.median(np.lib.stride_tricks.sliding_window_view(padded, _AROUND, axis=0), axis=-1)
