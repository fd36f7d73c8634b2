"""Log-mel features as a streaming audio encoder: no weights and no look-ahead.

Axes: B streams (1 here), Z hidden states per moment, E width of one, A video frames, S waveform samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamdiff.errors import ConfigError
from streamdiff.media import frame_boundary
from streamdiff.media.mel import mel_bank
from streamdiff.models.audio.encoder import (
    SPEECH_HZ,
    WINDOW_SAMPLES,
    FeatureStream,
    as_sound,
    require_fps,
)


class LogMelFeatures:
    """Log-mel spectrum and energy, twice per video frame, with first and second differences: no weights.

    The two moments end half-way through the frame and at its end, so no sound beyond the frame is heard
    (look-ahead 0 ms). Their spectra stand side by side: E = 2 * (num_bands + 1). Z = 3: level, change since
    the frame before, change of that change. Values have about zero mean and unit variance on speech at
    -26 dBFS and lie within -4..4 for any sound.

    Streamed and whole encodings are the same bits: every frame is computed by itself, by the same calls.

    Args:
        num_bands: triangular bands, equally spaced in mel between 60 and 7600 Hz.
    """

    rate_hz = SPEECH_HZ
    num_features = 3
    lookahead_s = 0.0

    def __init__(self, num_bands: int = 31) -> None:
        if not 4 <= num_bands <= 80:
            raise ConfigError(f"num_bands must lie in 4..80 (a band needs a bin), got {num_bands}")
        self.feature_dim = 2 * (num_bands + 1)
        self._bank = _mel_bank(num_bands, _FFT_SAMPLES, self.rate_hz, low_hz=60.0, high_hz=7600.0)
        self._window_S = torch.hann_window(WINDOW_SAMPLES, periodic=False, dtype=torch.float64).float()
        self._window_power = float(self._window_S.square().sum())

    def stream(self, fps: int) -> FeatureStream:
        return _LogMelStream(self, fps)

    def encode_whole(self, samples_S: Tensor, fps: int) -> Tensor:
        """All columns [1, Z, E, A] of a sound at once; the same bits as streaming it."""
        stream = self.stream(fps)
        return torch.cat([stream.push(samples_S), stream.finish()], dim=-1)

    def levels(self, moments_AMS: Tensor) -> Tensor:
        """Spectra and energies of each frame's windows of sound, side by side and scaled: [A, M, S] to [A, E].

        Each window carries one sample more in front, for the pre-emphasis.
        """
        emphasised_AMS = (moments_AMS[..., 1:] - 0.97 * moments_AMS[..., :-1]) * self._window_S
        # Frame by frame, for a product's bits may depend on the number of its rows.
        bands = [
            torch.fft.rfft(frame_MS, n=_FFT_SAMPLES).abs().square() / self._window_power @ self._bank
            for frame_MS in emphasised_AMS
        ]
        bands_AME = (torch.stack(bands) + _FLOOR).log10()
        energy_AM1 = (moments_AMS[..., 1:].square().mean(dim=-1, keepdim=True) + _FLOOR).log10()
        bands_AME = (bands_AME - _BAND_MEAN) / _BAND_STD
        energy_AM1 = (energy_AM1 - _ENERGY_MEAN) / _ENERGY_STD
        return torch.cat([bands_AME, energy_AM1], dim=-1).flatten(1)


_FFT_SAMPLES = 1024
_FLOOR = 1e-7
# Mean and deviation of log10 power on speech at -26 dBFS; perf/audio_context.py --calibrate measures them.
_BAND_MEAN, _BAND_STD = -5.3, 1.35
_ENERGY_MEAN, _ENERGY_STD = -3.7, 1.3
_CHANGE_STD = (1.0, 0.72, 1.07)
_BOUND = 4.0
_MOST_AT_ONCE = 64
"""Frames that are encoded together, so that memory does not grow with what is pushed."""


class _LogMelStream:
    def __init__(self, encoder: LogMelFeatures, fps: int) -> None:
        require_fps(fps, encoder.rate_hz)
        self._encoder = encoder
        self._fps = fps
        self._history_samples = WINDOW_SAMPLES + 1
        self._kept_S = torch.zeros(self._history_samples)
        self._kept_from = -self._history_samples
        self._num_frames = 0
        self._last_1E: Tensor | None = None
        self._last_change_1E = torch.zeros(1, encoder.feature_dim)

    def push(self, samples_S: Tensor) -> Tensor:
        self._kept_S = torch.cat([self._kept_S, as_sound(samples_S)])
        columns = [torch.zeros(self._encoder.num_features, 0, self._encoder.feature_dim)]
        while num_ready := self._num_ready():
            columns.append(self._next_columns(num_ready))
        return torch.cat(columns, dim=1).transpose(1, 2)[None]

    def finish(self) -> Tensor:
        num_samples = self._kept_from + len(self._kept_S)
        if num_samples == self._boundary(self._num_frames):
            return self.push(torch.zeros(0))
        missing = self._boundary(self._num_frames + 1) - num_samples
        return self.push(torch.zeros(missing))

    def _boundary(self, frame: int) -> int:
        return frame_boundary(frame, self._fps, self._encoder.rate_hz)

    def _num_ready(self) -> int:
        """Frames that are heard and not encoded yet, as far as they are encoded at once."""
        num_heard, count = self._kept_from + len(self._kept_S), 0
        while count < _MOST_AT_ONCE and self._boundary(self._num_frames + count + 1) <= num_heard:
            count += 1
        return count

    def _next_columns(self, count: int) -> Tensor:
        """The columns of the next frames, [Z, A, E]."""
        moments: list[Tensor] = []
        for frame in range(self._num_frames, self._num_frames + count):
            start, end = self._boundary(frame), self._boundary(frame + 1)
            moments += [self._before(start + (end - start) // 2), self._before(end)]
        levels_AE = self._encoder.levels(torch.stack(moments).unflatten(0, (count, 2)))
        last_1E = levels_AE[:1] if self._last_1E is None else self._last_1E
        changes_AE = levels_AE - torch.cat([last_1E, levels_AE[:-1]])
        turns_AE = changes_AE - torch.cat([self._last_change_1E, changes_AE[:-1]])
        self._last_1E, self._last_change_1E = levels_AE[-1:], changes_AE[-1:]
        self._num_frames += count
        forget = self._boundary(self._num_frames) - self._history_samples - self._kept_from
        if forget > 0:
            self._kept_S, self._kept_from = self._kept_S[forget:].clone(), self._kept_from + forget
        parts = zip((levels_AE, changes_AE, turns_AE), _CHANGE_STD, strict=True)
        return torch.stack([part / std for part, std in parts]).clamp(-_BOUND, _BOUND)

    def _before(self, sample: int) -> Tensor:
        """The window of sound that ends at a sample."""
        end = sample - self._kept_from
        return self._kept_S[end - self._history_samples : end]


def _mel_bank(num_bands: int, fft_samples: int, rate_hz: int, *, low_hz: float, high_hz: float) -> Tensor:
    """Triangles in mel, each summing to one: [bins, bands]."""
    bank = mel_bank(num_bands, fft_samples, rate_hz, low_hz=low_hz, high_hz=high_hz, slopes="mel")
    assert bool((bank.sum(0) > 0).all()), "a band without a bin"
    return torch.from_numpy(bank / bank.sum(0)).float()
