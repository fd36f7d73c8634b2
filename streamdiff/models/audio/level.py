"""A running level: speech is brought to the loudness that a model learned from, while it is still arriving.

Axes: B streams (1 here), Z hidden states per moment, E width of one, A video frames, S waveform samples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from streamdiff.media import frame_boundary
from streamdiff.models.audio.encoder import AudioEncoder, FeatureStream, as_sound, require_fps

SPEECH_DB = -26.0
"""dBFS of the speech that our own models learned from, measured where it is loud."""
_MOST_GAIN_DB, _LEAST_GAIN_DB = 24.0, -18.0
_QUIETEST_DB = -62.0
"""Frames below this are no speech, however quiet the rest is: noise must not be made loud."""
_ABOVE_NOISE_DB, _BELOW_PEAK_DB = 12.0, 12.0
"""A frame counts when it is so far above the noise and not farther below the loudest frames."""
_NOISE_RISE_DB, _PEAK_FALL_DB = 1.5, 2.5
"""Per second: how fast a new noise and a softer voice are believed."""
_MEMORY_S = 4.0


class RunningLevel:
    """Gain that brings a voice to `SPEECH_DB`, frame by frame; 0 dB until it has spoken.

    The level is the mean, in dB, of frames that are neither noise nor the tails of words, over some four seconds of
    them. Only the past counts, so nothing is delayed, and no gain is larger than 24 dB.
    """

    def __init__(self, fps: int) -> None:
        self._fps = fps
        self._noise_db = self._peak_db = math.nan
        self._level_db = SPEECH_DB
        self._num_heard = 0

    def heed(self, power: float) -> float:
        """Gain in dB for the frame with this mean square."""
        frame_db = 10 * math.log10(power + 1e-10)
        if math.isnan(self._noise_db):
            self._noise_db = self._peak_db = frame_db
        self._noise_db = min(frame_db, self._noise_db + _NOISE_RISE_DB / self._fps)
        self._peak_db = max(frame_db, self._peak_db - _PEAK_FALL_DB / self._fps)
        is_speech = frame_db > max(_QUIETEST_DB, self._noise_db + _ABOVE_NOISE_DB, self._peak_db - _BELOW_PEAK_DB)
        if is_speech:
            self._num_heard = min(self._num_heard + 1, round(_MEMORY_S * self._fps))
            self._level_db += (frame_db - self._level_db) / self._num_heard
        return min(max(SPEECH_DB - self._level_db, _LEAST_GAIN_DB), _MOST_GAIN_DB)


class Levelled:
    """An audio encoder that hears speech at a running level; what the viewer hears stays as it was given.

    Args:
        encoder: hears the levelled sound.
    """

    def __init__(self, encoder: AudioEncoder) -> None:
        self.encoder = encoder

    @property
    def rate_hz(self) -> int:
        """See `AudioEncoder`."""
        return self.encoder.rate_hz

    @property
    def num_features(self) -> int:
        """See `AudioEncoder`."""
        return self.encoder.num_features

    @property
    def feature_dim(self) -> int:
        """See `AudioEncoder`."""
        return self.encoder.feature_dim

    @property
    def lookahead_s(self) -> float:
        """See `AudioEncoder`."""
        return self.encoder.lookahead_s

    def stream(self, fps: int) -> FeatureStream:
        """See `AudioEncoder`."""
        require_fps(fps, self.rate_hz)
        return _LevelledStream(self.encoder.stream(fps), fps, self.rate_hz)


class _LevelledStream:
    """Scales whole video frames of sound, so that how the sound was cut changes nothing; gains move linearly."""

    def __init__(self, inner: FeatureStream, fps: int, rate_hz: int) -> None:
        self._inner, self._fps, self._rate_hz = inner, fps, rate_hz
        self._level = RunningLevel(fps)
        self._waiting_S = torch.zeros(0)
        self._num_frames = 0
        self._gain = 1.0

    def push(self, samples_S: Tensor) -> Tensor:
        self._waiting_S = torch.cat([self._waiting_S, as_sound(samples_S)])
        scaled: list[Tensor] = [torch.zeros(0)]
        while len(self._waiting_S) >= (size := self._frame_samples()):
            scaled.append(self._scaled(self._waiting_S[:size]))
            self._waiting_S = self._waiting_S[size:].clone()
            self._num_frames += 1
        return self._inner.push(torch.cat(scaled))

    def finish(self) -> Tensor:
        rest_S, self._waiting_S = self._waiting_S, torch.zeros(0)
        last = self._inner.push(self._scaled(rest_S)) if len(rest_S) else self._inner.push(rest_S)
        return torch.cat([last, self._inner.finish()], dim=-1)

    def _frame_samples(self) -> int:
        first, end = (frame_boundary(self._num_frames + n, self._fps, self._rate_hz) for n in (0, 1))
        return end - first

    def _scaled(self, frame_S: Tensor) -> Tensor:
        """One frame, its gain moving from the last one's to its own."""
        gain = 10 ** (self._level.heed(float(frame_S.double().square().mean())) / 20)
        ramp_S = torch.linspace(self._gain, gain, len(frame_S) + 1, dtype=torch.float64)[1:]
        self._gain = gain
        return (frame_S * ramp_S).float()
