"""What is decided when a chunk enters the pipeline: its noise, its conditions, and the commands it brings.

Everything that could make two runs differ is bound here, once, and travels with the packet. Prompts and interruptions
may come from another thread at any moment; they take effect at the next chunk that enters.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

from torch import Tensor

from streamdiff import flow
from streamdiff.config import EngineConfig
from streamdiff.errors import ConfigError
from streamdiff.memory import sink_lead
from streamdiff.models.audio import AudioChunk
from streamdiff.pipeline.packet import (
    Command,
    Packet,
    RefreshSink,
    ReturnLatent,
    Rewind,
    SetReference,
    SwitchPrompt,
)

SOURCE_CHUNK = 0
"""The chunk whose first latent becomes the adaptive sink."""


class Intake:
    """Makes the packets of one stream."""

    def __init__(
        self,
        config: EngineConfig,
        reference: SetReference,
        text_BPC: Tensor,
        *,
        seed: int = 0,
        stream: int = 0,
    ) -> None:
        self._config = config
        self._seed = seed
        self._stream = stream
        self._lock = threading.Lock()
        self._first: list[Command] = [reference, SwitchPrompt(text_BPC)]
        self._prompt: Tensor | None = None
        self._rewind: int | None = None
        self._chunk = 0
        self._epoch = 0
        self._asked = False
        self._refreshed = False
        self._oldest = 0
        """The earliest chunk that can be made anew: what is kept depends on the furthest chunk ever made."""
        latent_h, latent_w = config.latent_hw
        self._shape = (1, config.dit.in_dim, config.frames_per_chunk, latent_h, latent_w)

    @property
    def epoch(self) -> int:
        """Epoch of the next packet; frames of an older one are stale."""
        with self._lock:
            return self._epoch + (self._rewind is not None)

    @property
    def next_chunk(self) -> int:
        with self._lock:
            return self._chunk if self._rewind is None else self._rewind

    def switch_prompt(self, text_BPC: Tensor) -> None:
        """Follow another prompt from the next chunk that enters."""
        with self._lock:
            self._prompt = text_BPC

    def rewind(self, chunk: int) -> None:
        """Make ``chunk`` and what follows anew, in a new epoch, from the next packet on.

        Raises ConfigError when the pipeline does not remember that far.
        """
        with self._lock:
            next_chunk = self._chunk if self._rewind is None else self._rewind
            if not self._oldest <= chunk <= next_chunk:
                raise ConfigError(
                    f"cannot rewind to chunk {chunk}: chunk {next_chunk} is next and {self._oldest} the earliest "
                    f"that is still kept; use a larger memory.slack_chunks ({self._config.memory.slack_chunks} now)"
                )
            if chunk < self._chunk:
                self._rewind = chunk

    def take_back(self, chunk: int) -> int:
        """Rewind towards ``chunk``, as far as the pipeline remembers; the chunk that is made next.

        Unlike `rewind` it always begins a new epoch, so that everything under way becomes stale.
        """
        with self._lock:
            next_chunk = self._chunk if self._rewind is None else self._rewind
            self._rewind = min(max(chunk, self._oldest), next_chunk)
            return self._rewind

    def packets(self, heard: Iterable[AudioChunk]) -> Iterator[Packet]:
        """One packet for every chunk of sound, for as long as there is any."""
        for sound in heard:
            yield self.packet(sound)

    def packet(self, sound: AudioChunk) -> Packet:
        """The next packet, with this sound."""
        config = self._config
        commands: list[Command] = []
        with self._lock:
            if self._rewind is not None:
                self._chunk, self._rewind = self._rewind, None
                self._epoch += 1
                commands.append(Rewind(self._chunk))
                if self._chunk <= SOURCE_CHUNK and not self._refreshed:
                    self._asked = False  # the source is made anew, and must be asked for anew
            commands, self._first = [*self._first, *commands], []
            if self._prompt is not None:
                commands.append(SwitchPrompt(self._prompt))
                self._prompt = None
            chunk, epoch = self._chunk, self._epoch
            self._chunk += 1
            self._oldest = max(self._oldest, self._chunk - config.memory.slack_chunks - 1)
            refresh = config.refresh_chunk
            if refresh is not None and chunk == SOURCE_CHUNK and not self._asked:
                commands.append(ReturnLatent())
                self._asked = True
            if refresh is not None and chunk >= refresh and not self._refreshed:
                commands.append(RefreshSink(SOURCE_CHUNK))
                self._refreshed = True
        return Packet(
            chunk=chunk,
            epoch=epoch,
            lead=sink_lead(
                seed=self._seed,
                stream=self._stream,
                chunk=chunk,
                low=config.memory.sink_lead_min,
                high=config.memory.sink_lead_max,
            ),
            latent_BCTHW=flow.initial_noise(self._shape, seed=self._seed, stream=self._stream, chunk=chunk),
            audio_BZEA=sound.audio_BZEA,
            sound_S=sound.sound_S,
            commands=tuple(commands),
        )
