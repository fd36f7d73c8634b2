"""Sound to motion: a flow-matching transformer over short windows of named coefficients.

A window is up to 8 frames that were already shown and 3 to 24 new ones; the model denoises the new ones,
given what is heard (log-mel), what is said (phonemes, when they are known), what is intended (a blink, a
look), what the avatar is doing (idle, listening, speaking) and how it moves (a style). Windows overlap:
their noise is keyed by the frame, so that two windows agree where they meet, and the seam is blended.
Nothing older than a window is remembered, so the minute thirty is made like the first second. Idle is the
same model under silence.

Flow convention as in `streamdiff.flow`: x = (1 - sigma) * data + sigma * noise; the model predicts the data.

Axes: B windows, A frames, E coefficients, G coefficients that glide, C cues of a frame, D width, N heads, K head
width.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from streamdiff import flow, rng
from streamdiff.arrays import Floats
from streamdiff.avatar import kinematics
from streamdiff.avatar.kinematics import FPS, KinematicSpec
from streamdiff.errors import CheckpointError, ConfigError, InputError
from streamdiff.voice.speech import PAUSES, RATE_HZ, Phoneme

FRAME_SAMPLES = RATE_HZ // FPS
"""Samples of sound that belong to one frame: 960."""

PHONES = ("", "other", " ", "pause", *"ɑæʌɔɛɪiʊuəɚɜAIOQWYᵊᵻaeoɐɒpbmfvwɹʃʒʧʤszʦtdnlTɾθðkɡŋjhxʔ")  # noqa: RUF001
"""Classes of phonemes; the first is silence. Punctuation is ``pause``, what is not listed is ``other``."""

_PHONE_INDEX = {symbol: i for i, symbol in enumerate(PHONES)}
_SLOTS = 2
"""Phonemes are given for each half of a frame: a /p/ lasts 50 ms."""


class State(IntEnum):
    """What the avatar is doing."""

    IDLE = 0
    LISTENING = 1
    SPEAKING = 2


STYLE_NAMES = (
    "articulation",
    "rounding",
    "spread",
    "lips",
    "smile",
    "head_x",
    "head_y",
    "head_z",
    "head_shift",
    "head_tempo",
    "brow",
    "brow_raise",
    "blink_depth",
    "squint",
    "asymmetry",
    "nod",
)
"""What a style vector says, in units in which 0 is ordinary and 1 is clearly more. See `measure_style`."""


NUM_MELS = 40
_MELS_PER_FRAME = 4
_MEL_HOP = FRAME_SAMPLES // _MELS_PER_FRAME
_MEL_WINDOW = 600
_FFT = 1024
_MEL_LOW_HZ, _MEL_HIGH_HZ = 60.0, 7600.0
_MEL_FLOOR = 1e-7


@functools.cache
def _mel_bank() -> tuple[Floats, Floats]:
    """Triangles on the mel scale ``[bins, mels]``, and the analysis window."""

    def mel(hz: float) -> float:
        return 2595.0 * math.log10(1.0 + hz / 700.0)

    edges = np.linspace(mel(_MEL_LOW_HZ), mel(_MEL_HIGH_HZ), NUM_MELS + 2)
    edges_hz = 700.0 * (10.0 ** (edges / 2595.0) - 1.0)
    bins_hz = np.arange(_FFT // 2 + 1) * RATE_HZ / _FFT
    rise = (bins_hz[:, None] - edges_hz[:-2]) / (edges_hz[1:-1] - edges_hz[:-2])
    fall = (edges_hz[2:] - bins_hz[:, None]) / (edges_hz[2:] - edges_hz[1:-1])
    bank = np.maximum(0.0, np.minimum(rise, fall))
    bank /= bank.sum(axis=0, keepdims=True)
    window = np.hanning(_MEL_WINDOW + 2)[1:-1]
    window /= math.sqrt(float((window**2).sum()))
    return bank.astype(np.float32), window.astype(np.float32)


def mel_of(samples_S: Floats) -> Floats:
    """Log-mel ``[A, 160]`` of A whole frames of sound, four spectra of 40 bands to a frame, about -2..2.

    ``samples_S`` begins 360 samples before the first frame: a spectrum looks back 25 ms and never ahead. A
    frame's numbers do not depend on how many frames are computed together.
    """
    bank, window = _mel_bank()
    num_frames = (len(samples_S) - _MEL_CONTEXT) // FRAME_SAMPLES
    if num_frames <= 0:
        return np.zeros((0, _MELS_PER_FRAME * NUM_MELS), np.float32)
    count = num_frames * _MELS_PER_FRAME
    views = np.lib.stride_tricks.sliding_window_view(samples_S, _MEL_WINDOW)[::_MEL_HOP][:count]
    power = np.abs(np.fft.rfft(views * window, _FFT)).astype(np.float32) ** 2
    # One product per frame: a larger one may add in another order, and then streamed and whole would differ.
    bands = np.concatenate([power[i : i + _MELS_PER_FRAME] @ bank for i in range(0, count, _MELS_PER_FRAME)])
    log_mel = (np.log(bands + np.float32(_MEL_FLOOR)) + np.float32(8.0)) / np.float32(4.0)
    return log_mel.reshape(num_frames, -1)


_MEL_CONTEXT = _MEL_WINDOW - _MEL_HOP
SILENT_MEL = (math.log(_MEL_FLOOR) + 8.0) / 4.0
"""The value of every band in digital silence."""


def phone_class(symbol: str) -> int:
    """Index of a phoneme symbol in `PHONES`."""
    if symbol in PAUSES and symbol:
        return _PHONE_INDEX["pause"]
    return _PHONE_INDEX.get(symbol, _PHONE_INDEX["other"])


def phones_of(phonemes: Sequence[Phoneme], num_frames: int) -> Floats:
    """Share of each half frame that each phoneme class fills, ``[A, 2 * len(PHONES)]``; silence where none
    is named.

    Times are seconds from the start of frame 0.
    """
    slots = num_frames * _SLOTS
    rate = FPS * _SLOTS
    share = np.zeros((slots, len(PHONES)), np.float32)
    for symbol, start_s, end_s in phonemes:
        start, end = max(0.0, start_s * rate), min(float(slots), end_s * rate)
        if end <= start:
            continue
        first, last = int(start), min(slots - 1, math.ceil(end) - 1)
        at = np.arange(first, last + 1)
        overlap = np.minimum(at + 1, end) - np.maximum(at, start)
        share[first : last + 1, phone_class(symbol)] += overlap
    share[:, 0] += np.maximum(0.0, 1.0 - share.sum(axis=1))
    return share.reshape(num_frames, NUM_PHONE)


NUM_MEL = _MELS_PER_FRAME * NUM_MELS
NUM_PHONE = _SLOTS * len(PHONES)
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
NUM_CUES = NUM_MEL + NUM_PHONE + 2 + len(State) + NUM_INTENT


@dataclass(frozen=True, slots=True)
class Cues:
    """What is known about each frame before it moves; without intent, which a `MotionStream` adds itself."""

    mel_AF: Floats
    phones_AP: Floats
    heard_A: NDArray[np.bool_]
    """Whether ``mel_AF`` says anything."""
    said_A: NDArray[np.bool_]
    """Whether ``phones_AP`` says anything."""
    state_A: NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.state_A)

    def __getitem__(self, at: slice) -> Cues:
        return Cues(*(getattr(self, f.name)[at] for f in fields(self)))

    @staticmethod
    def joined(parts: Sequence[Cues]) -> Cues:
        return Cues(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Cues)))

    @staticmethod
    def silence(num_frames: int, state: State = State.IDLE) -> Cues:
        """Frames without sound, known to be silent."""
        phones_AP = phones_of((), num_frames)
        mel_AF = np.full((num_frames, NUM_MEL), SILENT_MEL, np.float32)
        yes_A = np.ones(num_frames, np.bool_)
        return Cues(mel_AF, phones_AP, yes_A, yes_A.copy(), np.full(num_frames, int(state), np.int8))

    @staticmethod
    def sound(
        samples_S: Floats,
        phonemes: Sequence[Phoneme] | None,
        *,
        before_S: Floats,
        state: State = State.SPEAKING,
    ) -> Cues:
        """Whole frames of sound; ``before_S``: at least 360 samples that precede them."""
        if len(samples_S) % FRAME_SAMPLES:
            raise InputError(f"cues need whole frames of {FRAME_SAMPLES} samples, got {len(samples_S)}; pad with zeros")
        num_frames = len(samples_S) // FRAME_SAMPLES
        mel_AF = mel_of(np.concatenate([before_S[-_MEL_CONTEXT:], samples_S]))
        said = phonemes is not None
        phones_AP = phones_of(phonemes or (), num_frames)
        return Cues(
            mel_AF,
            phones_AP,
            np.ones(num_frames, np.bool_),
            np.full(num_frames, said, np.bool_),
            np.full(num_frames, int(state), np.int8),
        )

    def rows(self, intent_AI: Floats) -> Floats:
        """The numbers that the model reads, ``[A, NUM_CUES]``; what is unknown is zero."""
        heard = self.heard_A[:, None].astype(np.float32)
        said = self.said_A[:, None].astype(np.float32)
        state = np.eye(len(State), dtype=np.float32)[self.state_A]
        return np.concatenate([self.mel_AF * heard, self.phones_AP * said, heard, said, state, intent_AI], axis=1)


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
    """When to blink, where to look, how to hold the head: drawn by (seed, stream, time), with bounded state.

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


@dataclass(frozen=True, slots=True, kw_only=True)
class MotionConfig:
    """Shape of the motion model and of its windows."""

    spec: str = "arkit64"
    dim: int = 256
    num_layers: int = 4
    num_heads: int = 4
    hidden: int = 768
    history: int = 8
    """Frames already shown that a window sees."""
    lengths: tuple[int, ...] = (3, 8, 24)
    """New frames in a window, rising; the shortest fits live sound with 80 ms of look-ahead."""
    sigmas: tuple[float, ...] = (1.0, 0.5, 0.0)

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ConfigError(f"dim must split into {self.num_heads} heads, got {self.dim}")
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)) or self.lengths[0] < 1:
            raise ConfigError(f"lengths must rise from 1 on, got {self.lengths}")
        if len(self.sigmas) < 2 or list(self.sigmas) != sorted(set(self.sigmas), reverse=True):
            raise ConfigError(f"sigmas must fall from noise to data, got {self.sigmas}; try (1.0, 0.5, 0.0)")
        if self.sigmas[0] != 1.0 or self.sigmas[-1] != 0.0:
            raise ConfigError(f"sigmas must start at 1 and end at 0, got {self.sigmas}")

    @property
    def window(self) -> int:
        """Frames in the longest window."""
        return self.history + self.lengths[-1]


class _Layer(nn.Module):
    def __init__(self, config: MotionConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.shift = nn.Parameter(torch.zeros(6, dim))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.up = nn.Linear(dim, config.hidden)
        self.down = nn.Linear(config.hidden, dim)

    def forward(self, x_BAD: Tensor, modulation_B6D: Tensor) -> Tensor:
        B, A, D = x_BAD.shape
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (modulation_B6D + self.shift)[:, :, None].unbind(1)
        h_BAD = F.layer_norm(x_BAD, (D,)) * (1 + scale_1) + shift_1
        q_BNAK, k_BNAK, v_BNAK = self.qkv(h_BAD).view(B, A, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attended_BNAK = F.scaled_dot_product_attention(q_BNAK, k_BNAK, v_BNAK)
        x_BAD = x_BAD + gate_1 * self.out(attended_BNAK.transpose(1, 2).reshape(B, A, D))
        h_BAD = F.layer_norm(x_BAD, (D,)) * (1 + scale_2) + shift_2
        return x_BAD + gate_2 * self.down(F.gelu(self.up(h_BAD), approximate="tanh"))


class MotionModel(nn.Module):
    """Predicts the data of a window from its noisy frames: adaptive-norm transformer, one token per frame.

    Coefficients inside are normalised: ``(motion - mean) / std`` per coefficient.
    """

    mean_E: Tensor
    std_E: Tensor

    def __init__(self, config: MotionConfig) -> None:
        super().__init__()
        self.config = config
        self.spec = spec_named(config.spec)
        num_coefs, dim = self.spec.num_coefs, config.dim
        self.enter = nn.Linear(num_coefs + 1, dim)
        self.cue = nn.Sequential(nn.Linear(NUM_CUES, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.place = nn.Parameter(torch.randn(config.window, dim) * 0.02)
        self.level = nn.Sequential(nn.Linear(64, dim), nn.SiLU())
        self.style = nn.Linear(len(STYLE_NAMES), dim, bias=False)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.leave = nn.Linear(dim, num_coefs)
        self.register_buffer("mean_E", torch.zeros(num_coefs))
        self.register_buffer("std_E", torch.ones(num_coefs))
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        for layer in self.layers:
            assert isinstance(layer, _Layer)
            with torch.no_grad():
                layer.shift[2].fill_(0.5)
                layer.shift[5].fill_(0.5)

    def cue_tokens(self, cues_BAC: Tensor, style_BS: Tensor) -> tuple[Tensor, Tensor]:
        """What does not change from step to step: cue tokens ``[B, A, D]`` and the style ``[B, D]``."""
        return self.cue(cues_BAC) + self.place[: cues_BAC.shape[1]], self.style(style_BS)

    def forward(self, x_BAE: Tensor, sigma_B: Tensor, tokens: tuple[Tensor, Tensor]) -> Tensor:
        """Data ``[B, A, E]`` from history (clean) and new frames (noisy at ``sigma_B``), both normalised."""
        cues_BAD, style_BD = tokens
        is_new_A = torch.arange(x_BAE.shape[1], device=x_BAE.device) >= self.config.history
        flag_BA1 = is_new_A.to(x_BAE.dtype)[None, :, None].expand(x_BAE.shape[0], -1, 1)
        x_BAD = self.enter(torch.cat([x_BAE, flag_BA1], -1)) + cues_BAD
        condition_BD = F.silu(self.level(_waves(sigma_B)) + style_BD)
        modulation_B6D = self.modulation(condition_BD).view(x_BAE.shape[0], 6, -1)
        for layer in self.layers:
            x_BAD = layer(x_BAD, modulation_B6D)
        return self.leave(F.layer_norm(x_BAD, (x_BAD.shape[-1],)))

    def normal(self, motion: Tensor) -> Tensor:
        """Normalised coefficients."""
        return (motion - self.mean_E) / self.std_E

    def motion(self, normal: Tensor) -> Tensor:
        """Coefficients in their own units."""
        return normal * self.std_E + self.mean_E

    def denoise(
        self,
        noise_BAE: Tensor,
        history_BAE: Tensor,
        cues_BAC: Tensor,
        style_BS: Tensor,
        sigmas: Sequence[float] | None = None,
    ) -> Tensor:
        """New frames from noise: an Euler walk down ``sigmas`` (normalised in and out).

        The walk follows the velocity ``(x - data) / sigma``, so the last step lands on the model's own
        answer.
        """
        grid = sigmas or self.config.sigmas
        tokens = self.cue_tokens(cues_BAC, style_BS)
        x_BAE = noise_BAE
        for sigma, sigma_next in itertools.pairwise(grid):
            level_B = torch.full((len(x_BAE),), sigma, device=x_BAE.device)
            whole_BAE = torch.cat([history_BAE, x_BAE], 1)
            data_BAE = self(whole_BAE, level_B, tokens)[:, history_BAE.shape[1] :]
            velocity_BAE = (x_BAE - data_BAE) / sigma
            x_BAE = flow.euler_step(x_BAE, velocity_BAE, sigma=sigma, sigma_next=sigma_next)
        return x_BAE


def _waves(sigma_B: Tensor) -> Tensor:
    angles = sigma_B[:, None] * torch.exp(torch.linspace(0.0, 6.0, 32, device=sigma_B.device))[None]
    return torch.cat([angles.sin(), angles.cos()], 1)


def spec_named(name: str) -> KinematicSpec:
    """A layout of `kinematics` by its name."""
    specs = {"arkit64": kinematics.arkit64, "full256": kinematics.full256}
    if name not in specs:
        raise ConfigError(f"no motion layout {name!r}; the model moves {', '.join(specs)}")
    return specs[name]()


def seam_weights(num_frames: int) -> Tensor:
    """Share of the newer window in each frame of a seam: a raised cosine strictly between 0 and 1.

    >>> seam_weights(1)
    tensor([0.5000])
    """
    at_A = torch.arange(1, num_frames + 1, dtype=torch.float32) / (num_frames + 1)
    return 0.5 - 0.5 * torch.cos(math.pi * at_A)


def blended(old_AE: Tensor, new_AE: Tensor, weight_A: Tensor, spec: KinematicSpec) -> Tensor:
    """``old`` turning into ``new``: linear in every coefficient, but for the rotation on a great circle."""
    out_AE = torch.lerp(old_AE, new_AE, weight_A[:, None])
    rotation = spec.part("rotation")
    out_AE[:, rotation] = _slerp(old_AE[:, rotation], new_AE[:, rotation], weight_A)
    return out_AE


def _slerp(old_A3: Tensor, new_A3: Tensor, weight_A: Tensor) -> Tensor:
    q_A4, p_A4 = _quaternion(old_A3), _quaternion(new_A3)
    p_A4 = torch.where((q_A4 * p_A4).sum(-1, keepdim=True) < 0, -p_A4, p_A4)
    angle_A1 = torch.acos((q_A4 * p_A4).sum(-1, keepdim=True).clamp(-1.0, 1.0))
    w_A1 = weight_A[:, None]
    small = angle_A1 < 1e-4
    safe_A1 = torch.where(small, torch.ones_like(angle_A1), angle_A1)
    left = torch.where(small, 1 - w_A1, torch.sin((1 - w_A1) * safe_A1) / torch.sin(safe_A1))
    right = torch.where(small, w_A1, torch.sin(w_A1 * safe_A1) / torch.sin(safe_A1))
    return _rotation_vector(F.normalize(left * q_A4 + right * p_A4, dim=-1))


def _quaternion(vector_A3: Tensor) -> Tensor:
    angle_A1 = vector_A3.norm(dim=-1, keepdim=True)
    # sin(a/2)/a by torch.sinc, which is defined at zero.
    return torch.cat([torch.cos(angle_A1 / 2), vector_A3 * 0.5 * torch.sinc(angle_A1 / (2 * math.pi))], -1)


def _rotation_vector(quaternion_A4: Tensor) -> Tensor:
    sine_A1 = quaternion_A4[:, 1:].norm(dim=-1, keepdim=True)
    half_A1 = torch.atan2(sine_A1, quaternion_A4[:, :1])
    return quaternion_A4[:, 1:] * torch.where(sine_A1 > 1e-9, 2 * half_A1 / sine_A1.clamp_min(1e-9), 2.0)


GLIDE_S = 0.08
"""Delay of head and brows behind lips, lids and eyes: two frames, which nobody sees."""


class _Glide:
    """A critically damped follower: two equal one-pole filters in a row, which never overshoot.

    The model's head and brows move as fast and as far as they should, but tremble on the way: three and four times the
    jerk of what they were trained on. Turns are small enough (0.4 rad) for rotation vectors to be followed as numbers.
    """

    def __init__(self, rest_G: Tensor, delay_s: float, *, kept: int) -> None:
        # Each pole trails by (1 - share) / share frames.
        self._share = 1.0 / (1.0 + delay_s * FPS / 2)
        self._rest_2G = torch.stack([rest_G, rest_G])
        self._past: deque[Tensor] = deque([self._rest_2G] * (kept + 1), maxlen=kept + 1)

    def follow(self, wanted_G: Tensor) -> Tensor:
        """The next values, on the way to those that are wanted."""
        first_G, second_G = self._past[-1]
        first_G = torch.lerp(first_G, wanted_G, self._share)
        second_G = torch.lerp(second_G, first_G, self._share)
        self._past.append(torch.stack([first_G, second_G]))
        return second_G

    def rewind(self, num_frames: int) -> None:
        """Forget the last frames; at most as many as are kept."""
        for _ in range(num_frames):
            self._past.pop()
            self._past.appendleft(self._rest_2G)


class MotionStream:
    """The endless motion of one avatar, a frame at a time; state no older than a window.

    The same seed and the same calls give the same bits.

    Args:
        model: see `load_motion`.
        seed, stream: key of the noise and of the intents.
        style: values by name of `STYLE_NAMES`; what is not named is 0.
        hop: frames shown from a window before the next is computed. From the shortest window only one is
            shown: live sound is worth a new look at every frame.
        seam: frames over which a window turns into the next, at most a third of the window.
        sigmas: noise levels to walk down; None: those of the model.
        glide_s: how far head and brows trail what the model says, so that they do not tremble; 0: not at all. The rest
            of the face does not wait for them.
    """

    def __init__(
        self,
        model: MotionModel,
        *,
        seed: int = 0,
        stream: int = 0,
        style: Mapping[str, float] | None = None,
        hop: int = 8,
        seam: int = 4,
        sigmas: Sequence[float] | None = None,
        glide_s: float = GLIDE_S,
    ) -> None:
        if hop < 1 or seam < 0:
            raise ConfigError(f"hop must be at least 1 and seam not negative, got {hop} and {seam}")
        if not 0 <= glide_s <= 1:
            raise ConfigError(f"a head may trail by 0..1 s, not by {glide_s:g}")
        self.model = model
        self.spec = model.spec
        self._seed, self._stream, self._hop, self._seam = seed, stream, hop, seam
        self._sigmas = tuple(sigmas) if sigmas else model.config.sigmas
        self._device = model.mean_E.device
        self._style_1S = torch.from_numpy(style_vector(style or {}))[None].to(self._device)
        self._intent = Intent(seed, stream, tempo=tempo_of(style or {}))
        self._rest_E, self._low_E, self._high_E = (
            torch.from_numpy(values_E.copy()).to(self._device)
            for values_E in (self.spec.rest_E, self.spec.low_E, self.spec.high_E)
        )
        mouth = [name.startswith(("jaw", "mouth", "tongue", "cheekPuff", "noseSneer")) for name in self.spec.names]
        self._is_mouth_E = torch.tensor(mouth, device=self._device)
        parts = [range(self.spec.num_coefs)[self.spec.part(name)] for name in ("rotation", "translation", "scale")]
        brows = [i for i, name in enumerate(self.spec.names) if name.startswith("brow")]
        self._gliding_G = torch.tensor([*itertools.chain(*parts), *brows], device=self._device)
        self._glide = _Glide(self._rest_E[self._gliding_G], glide_s, kept=MAX_REWIND)
        trail = model.config.history + MAX_REWIND
        self._trail_AE = self._rest_E.repeat(trail, 1)
        self._past = Cues.silence(trail)
        self._ahead = Cues.silence(0)
        self._plan_AE = self._trail_AE[:0]
        self._plan_from = 0
        self._stale = True
        self._settle_from = 0
        self._settling: list[Tensor] = []
        self.next_frame = 0
        """Index of the frame that `emit` gives next."""

    @property
    def num_cued(self) -> int:
        """Frames, from the next on, whose cues are known."""
        return len(self._ahead)

    def push(self, cues: Cues) -> None:
        """Say what happens in the frames after those already known."""
        self._ahead = Cues.joined([self._ahead, cues])

    def revise(self, cues: Cues, *, after: int = 0) -> None:
        """Replace what was said about the future, from ``after`` frames ahead of the next one."""
        self._ahead = Cues.joined([self._ahead[slice(0, after)], cues])
        if self._plan_from + len(self._plan_AE) > self.next_frame + after:
            self._stale = True

    def skip(self, num_frames: int) -> None:
        """Forget the cues of the next frames: what comes after them comes now."""
        self._ahead = self._ahead[slice(num_frames, None)]
        self._stale = True

    def rewind(self, num_frames: int) -> None:
        """Take back the last frames, at most `MAX_REWIND`, because nobody has seen them; their cues lie
        ahead again.

        What was planned is forgotten too, so that what follows depends on what was seen and not on how far
        ahead the stream had run.
        """
        limit = min(MAX_REWIND, self.next_frame)
        if not 0 <= num_frames <= limit:
            raise ConfigError(f"motion goes back 0..{limit} frames, not {num_frames}")
        if num_frames:
            kept = len(self._past) - num_frames
            self._ahead = Cues.joined([self._past[slice(kept, None)], self._ahead])
            self._past = Cues.joined([Cues.silence(num_frames), self._past[slice(0, kept)]])
            self._trail_AE = torch.cat([self._rest_E.repeat(num_frames, 1), self._trail_AE[:kept]])
            self._glide.rewind(num_frames)
            self.next_frame -= num_frames
        self._plan_AE, self._stale = self._plan_AE[:0], True

    def settle(self, num_frames: int | None = None) -> None:
        """Bring the mouth to rest within the next frames (None: `SETTLE_FRAMES`), from wherever it is."""
        num_frames = SETTLE_FRAMES if num_frames is None else num_frames
        self._plan_AE = self._plan_AE[:0]
        self._stale = True
        weights = seam_weights(num_frames - 1).tolist() if num_frames > 1 else []
        shown_E = self._trail_AE[-1]
        self._settle_from = self.next_frame
        self._settling = [torch.lerp(shown_E, self._rest_E, weight) for weight in [*weights, 1.0]]

    @torch.inference_mode()
    def emit(self) -> Tensor:
        """The next frame ``[E]``, inside its ranges. Needs the cues of ``lengths[0]`` frames ahead."""
        if self._stale or self.next_frame - self._plan_from >= self._worth():
            self._compute()
        frame_E = self._plan_AE[self.next_frame - self._plan_from].clamp(self._low_E, self._high_E)
        settled = self.next_frame - self._settle_from
        if 0 <= settled < len(self._settling):
            frame_E = torch.where(self._is_mouth_E, self._settling[settled], frame_E)
            # The plan does not know that the mouth was taken from it: the next window begins at what was
            # shown.
            if settled == len(self._settling) - 1:
                self._plan_AE, self._stale = self._plan_AE[:0], True
        self._trail_AE = torch.cat([self._trail_AE[1:], frame_E[None]])
        self._past = Cues.joined([self._past[slice(1, None)], self._ahead[slice(0, 1)]])
        self._ahead = self._ahead[slice(1, None)]
        self.next_frame += 1
        # What the model remembers is its own: only what is seen glides.
        return frame_E.index_copy(0, self._gliding_G, self._glide.follow(frame_E[self._gliding_G]))

    def _worth(self) -> int:
        """How many frames of the plan are shown before it is made anew."""
        length = len(self._plan_AE)
        return 1 if length <= self.model.config.lengths[0] else min(self._hop, length)

    def _compute(self) -> None:
        config = self.model.config
        fitting = [n for n in config.lengths if n <= len(self._ahead)]
        if not fitting:
            raise InputError(
                f"motion needs the cues of {config.lengths[0]} frames ahead, got {len(self._ahead)}; push "
                "silence if nothing follows"
            )
        length, first, history = fitting[-1], self.next_frame, config.history
        intent_AI = self._intent.rows(first - history, history + length)
        past = self._past[slice(len(self._past) - history, None)]
        rows_AC = Cues.joined([past, self._ahead[slice(0, length)]]).rows(intent_AI)
        cues_BAC = torch.from_numpy(rows_AC)[None].to(self._device)
        noise_BAE = frame_noise(first, length, self.spec.num_coefs, self._seed, self._stream)[None].to(self._device)
        history_BAE = self.model.normal(self._trail_AE[-history:])[None]
        new_BAE = self.model.denoise(noise_BAE, history_BAE, cues_BAC, self._style_1S, self._sigmas)
        new_AE = self.model.motion(new_BAE[0])
        old_AE = self._plan_AE[max(0, first - self._plan_from) :]
        seam = min(self._seam, len(old_AE), length // 3)
        if seam:
            weight_A = seam_weights(seam).to(self._device)
            new_AE = torch.cat([blended(old_AE[:seam], new_AE[:seam], weight_A, self.spec), new_AE[seam:]])
        self._plan_AE, self._plan_from, self._stale = new_AE, first, False


MAX_REWIND = 16
"""Frames that a `MotionStream` can take back; more than a path ever has under way."""
SETTLE_FRAMES = 4
"""Frames from an interruption to the mouth at rest: 160 ms."""


def frame_noise(first: int, count: int, num_coefs: int, seed: int, stream: int) -> Tensor:
    """Noise ``[count, E]`` of the frames from ``first`` on: a frame's noise is the same in every window."""
    return torch.stack([rng.normal((num_coefs,), "motion", seed, stream, first + i) for i in range(count)])


_STYLE_ORDINARY: Mapping[str, tuple[float, float]] = {
    "articulation": (0.35, 0.1),
    "rounding": (0.33, 0.06),
    "spread": (0.2, 0.07),
    "lips": (0.25, 0.07),
    "smile": (0.09, 0.06),
    "head_x": (0.024, 0.012),
    "head_y": (0.042, 0.02),
    "head_z": (0.033, 0.015),
    "head_shift": (0.055, 0.025),
    "head_tempo": (1.9, 0.4),
    "brow": (0.05, 0.02),
    "brow_raise": (0.065, 0.05),
    "blink_depth": (0.93, 0.1),
    "squint": (0.1, 0.07),
    "asymmetry": (0.0, 0.08),
    "nod": (0.02, 0.02),
}
"""Ordinary value and unit of every style dimension, in the units of `style_statistics`."""


def style_vector(style: Mapping[str, float]) -> Floats:
    """Style values by name as the vector that the model reads; each is kept within -3..3."""
    unknown = sorted(set(style) - set(STYLE_NAMES))
    if unknown:
        raise ConfigError(f"no style {unknown[0]!r}; a style names {', '.join(STYLE_NAMES)}")
    vector = np.array([style.get(name, 0.0) for name in STYLE_NAMES], np.float32)
    return np.clip(vector, -3.0, 3.0)


def style_units(statistics: Mapping[str, float]) -> dict[str, float]:
    """Statistics of a clip in style units: 0 is ordinary."""
    return {
        name: (statistics[name] - ordinary) / unit
        for name, (ordinary, unit) in _STYLE_ORDINARY.items()
        if name in statistics
    }


def tempo_of(style: Mapping[str, float]) -> float:
    """How fast posture changes, as a factor."""
    return min(max(1.0 + 0.2 * style.get("head_tempo", 0.0), 0.5), 2.0)


def measure_style(motion_AE: Floats, spec: KinematicSpec) -> dict[str, float]:
    """The style of a clip of at least ten seconds, in the units of `STYLE_NAMES`: a person's motion profile.

    Nods cannot be told from other head movement afterwards and are left ordinary.
    """
    spec.check(motion_AE)
    if len(motion_AE) < 10 * FPS:
        raise InputError(f"a style is measured on at least 10 s of motion, got {len(motion_AE) / FPS:.1f} s")

    def column(name: str) -> Floats:
        return motion_AE[:, spec.index(name)]

    def pair(name: str) -> Floats:
        return motion_AE[:, spec.indices([name + "Left", name + "Right"])].mean(axis=1)

    def p95(values: Floats) -> float:
        return float(np.percentile(values, 95))

    rotation_A3 = motion_AE[:, spec.part("rotation")]
    moving = float(rotation_A3.std())
    tempo = float((np.diff(rotation_A3, axis=0) * FPS).std()) / moving if moving > 1e-4 else 1.5
    left, right = column("mouthLowerDownLeft"), column("mouthLowerDownRight")
    total = float((left + right).sum())
    shift_A2 = motion_AE[:, spec.part("translation")]
    brows = (column("browInnerUp") + pair("browOuterUp")) / 2
    blinks = np.sort(pair("eyeBlink"))[-max(4, len(motion_AE) // 100) :]
    statistics = {
        "articulation": p95(column("jawOpen")),
        "rounding": p95(motion_AE[:, spec.indices(["mouthPucker", "mouthFunnel"])].mean(axis=1)),
        "spread": p95(pair("mouthStretch")),
        "lips": p95(pair("mouthLowerDown")),
        "smile": float(np.median(pair("mouthSmile"))),
        "head_x": float(rotation_A3[:, 0].std()),
        "head_y": float(rotation_A3[:, 1].std()),
        "head_z": float(rotation_A3[:, 2].std()),
        "head_shift": float(np.sqrt(shift_A2.var(axis=0).mean())),
        "head_tempo": tempo,
        "brow": float(brows.std()),
        "brow_raise": float(np.median(brows)),
        "blink_depth": float(blinks.mean()),
        "squint": float(np.median(pair("eyeSquint"))),
        "asymmetry": float((left - right).sum() / total) if total > 1e-3 else 0.0,
    }
    return {name: float(np.clip(value, -3, 3)) for name, value in style_units(statistics).items()}


_FORMAT = "streamdiff.motion.1"


def save_motion(model: MotionModel, path: str | Path, *, facts: Mapping[str, Any] | None = None) -> None:
    """Write a model as fp16 safetensors with its shape, and any facts worth keeping, in the metadata."""
    from safetensors.torch import save_file

    tensors = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in model.state_dict().items()}
    # Means and deviations set the scale of everything: not a place to round.
    tensors |= {name: getattr(model, name).detach().cpu().float().contiguous() for name in ("mean_E", "std_E")}
    metadata = {"format": _FORMAT, "config": json.dumps(asdict(model.config)), "phones": json.dumps(PHONES)}
    metadata["facts"] = json.dumps(facts or {}, sort_keys=True)
    save_file(tensors, str(path), metadata)


def load_motion(path: str | Path | None = None, *, device: str | torch.device = "cpu") -> MotionModel:
    """The motion model from a file; None: the one that ships with the package.

    Raises:
        InputError: no such file.
        CheckpointError: a file of something else, or of another shape.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path) if path is not None else weights_path()
    if not path.is_file():
        raise InputError(
            f"no motion weights at {path}; check the path, or train: python -m streamdiff.training.avatar.motion"
        )
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} holds no motion model: its format is {metadata.get('format')!r}, not {_FORMAT!r}"
        )
    if tuple(json.loads(metadata["phones"])) != PHONES:
        raise CheckpointError(f"{path} was trained on another list of phonemes; train again")
    config = MotionConfig(**{k: _frozen(v) for k, v in json.loads(metadata["config"]).items()})
    model = MotionModel(config)
    expected = model.state_dict()
    wrong = sorted(
        name
        for name in expected.keys() | tensors.keys()
        if name not in tensors or name not in expected or tensors[name].shape != expected[name].shape
    )
    if wrong:
        raise CheckpointError(f"{path} does not fit its own config: {', '.join(wrong)}")
    model.load_state_dict(tensors)
    return model.to(device).eval().requires_grad_(requires_grad=False)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def weights_path() -> Path:
    """Where the packaged weights lie."""
    return Path(__file__).parent.parent / "weights" / "motion_arkit64.safetensors"
