"""Sound becomes hidden states, one column per video frame, while it is still arriving.

An `AudioEncoder` opens a `FeatureStream`; sound is pushed into it in blocks of any size, and columns come out
in order. What comes out does not depend on how the sound was cut into blocks. `AudioChunker` cuts the result,
and the sound itself, into the chunks of a stream.
"""

from streamdiff.models.audio.chunker import AudioChunk, AudioChunker, chunks
from streamdiff.models.audio.encoder import SPEECH_HZ, AudioEncoder, FeatureStream
from streamdiff.models.audio.level import Levelled
from streamdiff.models.audio.log_mel import LogMelFeatures
from streamdiff.models.audio.wav2vec2 import Wav2Vec2Features

__all__ = [
    "SPEECH_HZ",
    "AudioChunk",
    "AudioChunker",
    "AudioEncoder",
    "FeatureStream",
    "Levelled",
    "LogMelFeatures",
    "Wav2Vec2Features",
    "chunks",
]
