"""A voice cut into the chunks of a stream: hidden states, and the very samples that will be heard with them.

Axes: B streams (1 here), Z hidden states per moment, E width of one, A video frames, S waveform samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from streamdiff.errors import ConfigError
from streamdiff.media import frame_boundary
from streamdiff.models.audio.encoder import (
    AudioEncoder,
    as_sound,
    require_fps,
)


class AudioChunk(NamedTuple):
    """What one chunk of video hears; unpacks as ``audio_BZEA, sound_S``."""

    audio_BZEA: Tensor
    """Hidden states, one column per video frame, float32 on the encoder's device."""
    sound_S: Tensor
    """The waveform of the same frames, float32 on the CPU."""


class AudioChunker:
    """Cuts a live voice into chunks: features and the very samples that will be heard with them.

    Args:
        encoder: see `AudioEncoder`.
        frames_per_chunk: video frames in a chunk.
        fps: video frames per second.
    """

    def __init__(self, encoder: AudioEncoder, *, frames_per_chunk: int, fps: int) -> None:
        require_fps(fps, encoder.rate_hz)
        if frames_per_chunk < 1:
            raise ConfigError(f"a chunk holds at least one frame, got frames_per_chunk={frames_per_chunk}")
        self._rate_hz = encoder.rate_hz
        self._stream = encoder.stream(fps)
        self._fps = fps
        self._frames_per_chunk = frames_per_chunk
        self._features: list[Tensor] = []
        self._num_columns = 0
        self._sound: list[Tensor] = []
        self._num_samples = 0
        self._num_chunks = 0

    def push(self, samples_S: Tensor) -> list[AudioChunk]:
        """Hear the next samples; returns the chunks that became ready, in order."""
        samples_S = as_sound(samples_S)
        self._sound.append(samples_S)
        self._num_samples += len(samples_S)
        return self._cut(self._stream.push(samples_S))

    def finish(self) -> list[AudioChunk]:
        """The voice has ended: silence fills its last chunk."""
        num_chunks = 0
        while self._boundary(num_chunks := self._num_chunks + num_chunks) < self._num_samples:
            num_chunks = num_chunks - self._num_chunks + 1
        silence_S = torch.zeros(self._boundary(num_chunks) - self._num_samples)
        return [*self.push(silence_S), *self._cut(self._stream.finish())]

    def _boundary(self, chunk: int) -> int:
        return frame_boundary(chunk * self._frames_per_chunk, self._fps, self._rate_hz)

    def _cut(self, columns_BZEA: Tensor) -> list[AudioChunk]:
        A = self._frames_per_chunk
        if columns_BZEA.shape[-1]:
            self._features.append(columns_BZEA)
            self._num_columns += columns_BZEA.shape[-1]
        if self._num_columns < A:
            return []
        features_BZEA = torch.cat(self._features, dim=-1)
        sound_S = torch.cat(self._sound)
        chunks: list[AudioChunk] = []
        while features_BZEA.shape[-1] >= A:
            samples = self._boundary(self._num_chunks + 1) - self._boundary(self._num_chunks)
            chunks.append(AudioChunk(features_BZEA[..., :A].contiguous(), sound_S[:samples].clone()))
            features_BZEA, sound_S = features_BZEA[..., A:], sound_S[samples:]
            self._num_chunks += 1
        self._features, self._sound = [features_BZEA.clone()], [sound_S.clone()]
        self._num_columns = features_BZEA.shape[-1]
        return chunks


def chunks(
    audio_blocks: Iterable[Tensor], encoder: AudioEncoder, *, frames_per_chunk: int, fps: int
) -> Iterator[AudioChunk]:
    """Chunks of a voice that is pulled, block by block; memory does not grow with its length.

    Equal to pushing the same blocks through an `AudioChunker`. The last chunk ends in silence.
    """
    chunker = AudioChunker(encoder, frames_per_chunk=frames_per_chunk, fps=fps)
    for block_S in audio_blocks:
        yield from chunker.push(block_S)
    yield from chunker.finish()
