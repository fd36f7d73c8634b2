"""What walks from rank to rank: one chunk, its conditions, and the commands that it is the first to obey.

Everything that a chunk depends on is bound when it enters the pipeline and travels with it, so that no rank looks
anything up by a clock or a counter of its own. That is what makes one rank and many compute the same bits
(papers: exactness conditions of a pipelined stream).

Axes: B streams, T latent frames, C channels, H height, W width, Z hidden states, E audio width, A audio frames,
P prompt tokens, S waveform samples.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class SetReference:
    """Start of a stream: whose face it is. Clears every memory."""

    reference_BCTHW: Tensor
    """The sink: latent of the reference image, one frame."""
    motion_BCTHW: Tensor | None
    """FramePack motion prefix, constant for the stream; None for a model without one."""


@dataclass(frozen=True, slots=True, eq=False)
class SwitchPrompt:
    """From this chunk on, follow another prompt. The sink's keys depend on it and are computed anew."""

    text_BPC: Tensor
    """Prompt embedding, not padded."""


@dataclass(frozen=True, slots=True, eq=False)
class ReturnLatent:
    """When this chunk is finished, send its first latent frame back to the head."""


@dataclass(frozen=True, slots=True, eq=False)
class RefreshSink:
    """From this chunk on, the sink is the first latent frame of ``source_chunk``.

    The head writes the command without the latent; its link fills it in from the feedback edge.
    """

    source_chunk: int
    latent_BCTHW: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Rewind:
    """Forget ``chunk`` and all that came after it; this packet is that chunk, made anew in a new epoch."""

    chunk: int


Command = SetReference | SwitchPrompt | ReturnLatent | RefreshSink | Rewind


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Packet:
    """One chunk on its way through the noise levels."""

    chunk: int
    """Index in the stream, 0 first; grows by one, or falls back at a rewind."""
    epoch: int
    """Grows by one at every rewind; frames of an older epoch are stale."""
    lead: int
    """Latent frames by which the sink leads this chunk (rolling RoPE)."""
    latent_BCTHW: Tensor
    """Noise when it leaves the head, data when it leaves the last step."""
    audio_BZEA: Tensor | None = None
    """Hidden states of the audio encoder, one column per video frame."""
    sound_S: Tensor | None = None
    """The waveform that belongs to these frames, as it will be heard."""
    frames_THWC: Tensor | None = None
    """Decoded video, uint8 RGB; only behind the decoder."""
    commands: tuple[Command, ...] = ()
