"""The default voice: hibari-tts, 7.9 MB, its weights inside its wheel.

Axes: S waveform samples, P phonemes of a sentence.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from streamdiff import rng
from streamdiff.arrays import Floats
from streamdiff.errors import BackendError, ConfigError
from streamdiff.voice.onnx import onnx_session, onnx_with_outputs
from streamdiff.voice.packages import required_package
from streamdiff.voice.phonemes import Reader, timed_phonemes
from streamdiff.voice.speaker import Speaker, without_lead
from streamdiff.voice.speech import RATE_HZ, Phoneme


class HibariVoice(Speaker):
    """English speech in milliseconds on one CPU thread (hibari-tts 0.2.1, distilled from Kokoro; Apache-2.0).

    The same text gives the same samples, whatever was said before.

    Args:
        voice: a name of ``hibari.voices.VOICES``. "heart" is inside the wheel; hibari fetches others once.
        speed: 0.5 (slow) .. 2.
        pitch: factor on the fundamental frequency, 0.4..2.5.
        tract: factor on the formants, 0.7..1.4; below 1 sounds like a longer throat.
        seed: of the breath noise.
        num_threads: of the network.

    Raises:
        BackendError: hibari-tts is not installed, or a voice cannot be fetched.
        ConfigError: an unknown voice or a factor out of range.
    """

    def __init__(
        self,
        voice: str = "heart",
        *,
        speed: float = 1.0,
        pitch: float = 1.0,
        tract: float = 1.0,
        seed: int = 0,
        num_threads: int = 1,
    ) -> None:
        for name, value, low, high in (
            ("speed", speed, 0.5, 2.0),
            ("pitch", pitch, 0.4, 2.5),
            ("tract", tract, 0.7, 1.4),
        ):
            if not low <= value <= high:
                raise ConfigError(f"{name} of a voice must lie in {low}..{high}, got {value}")
        voices = required_package("hibari.voices")
        if voice not in voices.VOICES:
            raise ConfigError(f"no voice {voice!r}; hibari has {', '.join(voices.VOICES)}")
        super().__init__(Reader(british=bool(voices.VOICES[voice]["british"])))
        self._dsp = required_package("hibari.dsp")
        self.speed, self.pitch, self.tract, self.seed = speed, pitch, tract, seed
        try:
            model = Path(voices.voice_path(voice)).read_bytes()
        except (OSError, RuntimeError, ValueError) as error:
            raise BackendError(f"the voice {voice!r} cannot be fetched: {error}; use 'heart'") from error
        self._session = onnx_session(onnx_with_outputs(model, ["/Clip_output_0"]), num_threads)
        # The lexica, the net for unknown words and the network's own buffers are made on first use: a third
        # of a second that no listener should hear.
        for text in ("Warm up with a zorbnik, please.", "Go!"):
            for _ in self.speak(text):
                pass

    def say_phonemes(self, phonemes: str, *, breath: int = 0) -> tuple[Floats, tuple[Phoneme, ...]]:
        """The sound ``[S]`` of a phoneme string (at most 400 symbols) and the times of its phonemes."""
        vocabulary = self._reader.vocabulary
        ids = [0, *(vocabulary[c] for c in phonemes), 0]
        speed = np.full(1, self.speed, np.float32)
        *spectra, durations_P = self._session.run(None, {"ids": np.asarray([ids], np.int64), "speed": speed})
        harmonic, phase, noise, residual, residual_phase, pitch_hz = (value[0] for value in spectra)
        if self.pitch != 1.0:
            pitch_hz = pitch_hz * np.float32(self.pitch)
        if self.tract != 1.0:
            harmonic, phase, noise, residual, residual_phase = (
                _stretched(x, self.tract) for x in (harmonic, phase, noise, residual, residual_phase)
            )
        generator = np.random.default_rng(rng.seed_of("voice", self.seed, breath, phonemes))
        samples_S = self._dsp.synth(harmonic, phase, noise, residual, residual_phase, pitch_hz, generator)
        timed = timed_phonemes(phonemes, np.rint(durations_P).astype(np.int64).reshape(-1))
        samples_S, timed = without_lead(samples_S.astype(np.float32, copy=False), timed, RATE_HZ)
        return np.ascontiguousarray(samples_S), tuple(timed)


def _stretched(spectrum: Floats, factor: float) -> Floats:
    """Move formants: bin k of the result is bin k / factor of the spectrum ``[bins, time]``."""
    num_bins = spectrum.shape[0]
    source = np.minimum(np.rint(np.arange(num_bins) / factor).astype(np.int64), num_bins - 1)
    return spectrum[source]
