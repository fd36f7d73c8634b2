"""Text to speech, and sound that comes from outside, as chunks of 24 kHz with the times of their phonemes."""

from streamdiff.voice.external import ExternalAudio, waveform
from streamdiff.voice.hibari import HibariVoice
from streamdiff.voice.kokoro import KokoroVoice
from streamdiff.voice.open import open_voice
from streamdiff.voice.resample import Resampler
from streamdiff.voice.speech import PAUSES, RATE_HZ, Phoneme, SpeechChunk, Synthesizer
from streamdiff.voice.text import sentences

__all__ = [
    "PAUSES",
    "RATE_HZ",
    "ExternalAudio",
    "HibariVoice",
    "KokoroVoice",
    "Phoneme",
    "Resampler",
    "SpeechChunk",
    "Synthesizer",
    "open_voice",
    "sentences",
    "waveform",
]
