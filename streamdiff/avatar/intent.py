"""Blinks, gaze, head pose and mood as random processes, which the motion model performs together with the sound.

Everything is drawn by (seed, stream, time); no value depends on how frames were asked for.

Axes: A frames, I numbers of an intent, L layers of a spline (slow, quick).
"""

from __future__ import annotations

import math

import numpy as np

from streamdiff import rng
from streamdiff.arrays import Floats
from streamdiff.avatar.kinematics import FPS

INTENT_NAMES = (
    "blink",
    "gaze_yaw",
    "gaze_pitch",
    "head_x",
    "head_y",
    "head_z",
    "shift_x",
    "shift_y",
    "brow",
    "squint",
    "smile",
)
"""What an intent says of each frame: closure of the lids (0..1), where to look (radians), and, in units of its own
spread, where the head rests and what the face is in the mood for."""
NUM_INTENT = len(INTENT_NAMES)
BLINK_SHAPE = (0.75, 1.0, 0.88, 0.62, 0.3, 0.12, 0.04)
"""Lid closure per frame at 25 per second: median of 57 blinks of a talking person; half closed for 0.17 s."""
_BLINK_LOG_MEAN, _BLINK_LOG_STD = 0.81, 0.94
"""Intervals between blinks are log-normal: median 2.3 s, 17 a minute, measured on 200 s of conversation."""
_BLINK_SHORTEST_S, _BLINK_LONGEST_S = 0.5, 9.0
_GAZE_LOG_MEAN, _GAZE_LOG_STD = 0.1, 0.7
_GAZE_HOME = 0.55
"""Share of looks that return to the camera."""
_GAZE_STD = (0.09, 0.05)
HEAD_STD = (0.042, 0.076, 0.067, 0.155, 0.100)
"""Spread of head rotation x, y, z (radians) and shift x, y (distances between the outer eye corners): 200 s of a seated
person in conversation (FGNET talking face), read by face landmarks and smoothed over 0.4 s."""
HEAD_TEMPO = (2.14, 1.30, 1.36, 1.51, 1.67)
"""Spread of the speed over spread of the place, per second, of the same channels."""
HEAD_CORRELATION = (
    (1.00, -0.12, 0.10, -0.02, 0.45),
    (-0.12, 1.00, -0.53, 0.60, -0.08),
    (0.10, -0.53, 1.00, -0.79, 0.13),
    (-0.02, 0.60, -0.79, 1.00, -0.26),
    (0.45, -0.08, 0.13, -0.26, 1.00),
)
_MOOD_TEMPO = (1.6, 1.6, 0.8)
_KNOTS_S = (2.0, 0.45)
"""Spacing of the knots of the slow and of the quick part of a movement."""
_SPLINE_TEMPO = 1.18
"""Speed over spread of a cubic B-spline through independent normal knots, times the spacing."""
_SPLINE_STD = 0.6924
"""Its spread: the square root of 151/315."""


class Intent:
    """Random processes of blinks, gaze, posture and mood, drawn by (seed, stream, time), with bounded state.

    Blinks and looks are renewal processes; posture and mood are smooth Gaussian processes (splines through keyed
    knots), stationary by construction: whatever is slow cannot drift, in any minute. The model performs all of this
    together with the sound. ``tempo`` speeds posture up.
    """

    def __init__(self, seed: int, stream: int, *, tempo: float = 1.0) -> None:
        self._key = (seed, stream)
        self._blinks: list[int] = []
        self._num_blinks = 0
        self._looks: list[tuple[int, float, float]] = [(0, 0.0, 0.0)]
        self._next_look = 0
        self._knots: dict[tuple[int, int], Floats] = {}
        tempos = np.array([*HEAD_TEMPO, *_MOOD_TEMPO]) * tempo
        slow, quick = (_SPLINE_TEMPO / spacing_s for spacing_s in _KNOTS_S)
        share = np.clip((tempos**2 - slow**2) / (quick**2 - slow**2), 0.0, 1.0)
        self._share_L8 = np.sqrt(np.stack([1 - share, share])) / _SPLINE_STD
        self._mix_88 = np.eye(len(tempos))
        self._mix_88[:5, :5] = np.linalg.cholesky(np.array(HEAD_CORRELATION))

    def rows(self, first: int, count: int) -> Floats:
        """``[count, 11]`` (`INTENT_NAMES`) for frames from ``first`` on.

        ``first`` must not fall by more than 4 s from one call to the next.
        """
        self._reach(first + count)
        self._blinks = [b for b in self._blinks if b > first - 4 * FPS] or self._blinks[-1:]
        while len(self._looks) > 1 and self._looks[1][0] <= first - 4 * FPS:
            self._looks.pop(0)
        rows_AI = np.zeros((count, NUM_INTENT), np.float32)
        for onset in self._blinks:
            for i, closed in enumerate(BLINK_SHAPE):
                if first <= onset + i < first + count:
                    rows_AI[onset + i - first, 0] = closed
        for onset, yaw, pitch in self._looks:
            rows_AI[max(0, onset - first) :, 1:3] = (yaw, pitch)
        rows_AI[:, 3:] = self._held(first, count)
        return rows_AI

    def _held(self, first: int, count: int) -> Floats:
        """Posture and mood ``[count, 8]``."""
        at_s = (np.arange(first, first + count) + 0.5) / FPS
        total = np.zeros((count, len(self._mix_88)))
        for layer, spacing_s in enumerate(_KNOTS_S):
            place = at_s / spacing_s
            left = np.floor(place).astype(np.int64)
            lowest = int(left[0]) - 1
            knots = np.stack([self._knot(layer, k) for k in range(lowest, int(left[-1]) + 3)])
            u = (place - left)[:, None]
            basis = ((1 - u) ** 3, 3 * u**3 - 6 * u**2 + 4, -3 * u**3 + 3 * u**2 + 3 * u + 1, u**3)
            for i, weight in enumerate(basis):
                total += weight / 6 * knots[left - 1 + i - lowest] * self._share_L8[layer]
            for key in [key for key in self._knots if key[0] == layer and key[1] < lowest - 4 / spacing_s]:
                del self._knots[key]
        return (total @ self._mix_88.T).astype(np.float32)

    def _knot(self, layer: int, k: int) -> Floats:
        if (layer, k) not in self._knots:
            drawn = rng.normal((len(self._mix_88),), "posture", *self._key, layer, k)
            self._knots[layer, k] = drawn.numpy()
        return self._knots[layer, k]

    def _reach(self, frame: int) -> None:
        while not self._blinks or self._blinks[-1] < frame:
            wait_s = math.exp(_BLINK_LOG_MEAN + _BLINK_LOG_STD * self._draw("blink", self._num_blinks))
            wait_s = min(max(wait_s, _BLINK_SHORTEST_S), _BLINK_LONGEST_S)
            last = self._blinks[-1] if self._blinks else 0
            self._blinks.append(last + max(len(BLINK_SHAPE) + 1, round(wait_s * FPS)))
            self._num_blinks += 1
        while self._looks[-1][0] < frame:
            k = self._next_look
            wait_s = math.exp(_GAZE_LOG_MEAN + _GAZE_LOG_STD * self._draw("wait", k))
            onset = self._looks[-1][0] + max(4, round(wait_s * FPS))
            home = rng.seed_of("home", *self._key, k) % 1000 < _GAZE_HOME * 1000
            yaw, pitch = (0.0, 0.0) if home else (s * self._draw(a, k) for s, a in zip(_GAZE_STD, "yp", strict=True))
            self._looks.append((onset, yaw, pitch))
            self._next_look += 1

    def _draw(self, what: str, k: int) -> float:
        return float(rng.normal((1,), "intent", what, *self._key, k))
