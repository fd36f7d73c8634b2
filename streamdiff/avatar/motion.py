"""Motion stream: overlapping windows of the motion model, blended, one frame at a time.

Windows' noise is keyed by the frame, so that two windows agree where they meet, and the seam is blended. Nothing older
than a window is remembered, so the minute thirty is made like the first second. Idle is the same model under silence.

Axes: B windows, A frames, E coefficients, G coefficients that glide, C cues of a frame.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from streamdiff import rng
from streamdiff.avatar.cues import Cues, State
from streamdiff.avatar.intent import Intent
from streamdiff.avatar.kinematics import FPS, KinematicSpec
from streamdiff.avatar.seal import AHEAD, PAST, Lips, heard_seal, load_seals, said_seal
from streamdiff.avatar.style import style_vector, tempo_of
from streamdiff.avatar.window import MotionModel
from streamdiff.errors import ConfigError, InputError


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
        self._lips = Lips(self.spec)
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
        closed = self._closed()
        self._past = Cues.joined([self._past[slice(1, None)], self._ahead[slice(0, 1)]])
        self._ahead = self._ahead[slice(1, None)]
        self.next_frame += 1
        # What the model remembers is its own: only what is seen glides, and closes its lips.
        seen_E = frame_E.index_copy(0, self._gliding_G, self._glide.follow(frame_E[self._gliding_G]))
        return self._lips.close(seen_E, closed)

    def _closed(self) -> float:
        """How far a p, b or m closes the lips of the next frame, 0..1."""
        now = self._ahead[slice(0, 1)]
        if now.said_A[0]:
            return said_seal(now.phones_AP[0])
        if not now.heard_A[0] or now.state_A[0] != State.SPEAKING:
            return 0.0
        past = self._past[slice(len(self._past) - PAST, None)]
        return heard_seal(load_seals(), Cues.joined([past, self._ahead[slice(0, AHEAD + 1)]]))

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
