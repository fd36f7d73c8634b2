"""What frames must come out of the engine: a serial reference that shares no memory, order or position with it.

Plain loops over chunks and steps, from the readable model (`streamdiff.models.dit`). Nothing is a ring and nothing is
evicted: every step keeps the whole keys and values of every chunk that it has seen, in a dictionary, and each chunk
looks up those that it may see. Nothing rides on anything: an event of the script changes a variable. The decoder has no
state: a stream is decoded from its first frame on, as a whole clip, and again after every rewind.

It takes from the engine the layers of the model, the decoder of whole clips and the counter that random numbers come
from (`streamdiff.rng`). What is remembered, where it sits, what is drawn under which key and what a rewind brings back
is decided here, from the published rules:

- Live Avatar (arXiv 2512.04677), section 3.2 (timestep-forcing pipeline): each step has a history of its own, of the
  noisy chunks as that step saw them; algorithm 4: chunks of a window, the sink in front of it.
- Section 3.3 (rolling sink frame): the sink is the reference at time 0; it is computed under the prompt, replaced once
  by the first latent that the model generated, and rolls ahead of the chunk. Its motion prefix stays where it is.
- TalkingMachines (arXiv 2506.03099), section 3.2: sparse attention to the first chunk, the previous one and itself.
- Self Forcing (arXiv 2506.08009), algorithm 1: a step estimates the data and adds fresh noise; or Euler's rule.
- Wan (arXiv 2503.20314), section 4.1: a causal decoder. ARCHITECTURE.md says what is ours: the decoder is primed with
  seven still latents, a rewind reaches ``slack_chunks`` behind the furthest chunk ever made, commands that were obeyed
  stay obeyed.

Axes: B streams, T frames, C channels, H height, W width, L tokens of a chunk, M tokens seen, N heads, K head width, F
rotary pairs, P prompt tokens, Z layers or hidden states, E audio width, A audio frames, S waveform samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from streamdiff import rng
from streamdiff.config import EngineConfig
from streamdiff.memory import LayerMemory
from streamdiff.models.dit import CausalDiT, TextCondition, modulate
from streamdiff.models.vae import VideoDecoder
from streamdiff.rope import Rotation

STILL_LATENTS = 7
"""Of the reference, before the first chunk."""

KeysValues = list[tuple[Tensor, Tensor]]
"""Of every layer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Moment:
    """What has happened before the next chunk enters, and what that chunk hears."""

    audio_BZEA: Tensor
    sound_S: Tensor
    back: tuple[int, ...] = ()
    """Interruptions, one after the other: each takes so many chunks back."""
    prompt_BPC: Tensor | None = None
    """The stream follows this prompt from now on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Made:
    """One chunk as it must come out."""

    chunk: int
    epoch: int
    latent_BCTHW: Tensor
    frames_THWC: Tensor
    sound_S: Tensor


def rotation(times: Iterable[float], rows: Iterable[float], columns: Iterable[float], config: EngineConfig) -> Rotation:
    """Rotary angles of tokens on a grid, in float64: position times 10000^(-i/n) for pair i of the n of its axis."""
    angles_LF = []
    axes = [10000.0 ** -(np.arange(n) / n) for n in config.dit.rotary_pairs]
    for time in times:
        for row in rows:
            for column in columns:
                angles_LF.append(np.concatenate([time * axes[0], row * axes[1], column * axes[2]]))
    angles_LF = torch.from_numpy(np.stack(angles_LF))
    return Rotation(angles_LF.cos().float(), angles_LF.sin().float())


def turned(keys_BLNK: Tensor, by: Rotation) -> Tensor:
    """Keys turned by their angles, as complex numbers in float64."""
    pairs_BLNF = torch.view_as_complex(keys_BLNK.double().unflatten(-1, (-1, 2)))
    unit_LF = torch.complex(by.cos_LF.double(), by.sin_LF.double())
    return torch.view_as_real(pairs_BLNF * unit_LF[:, None]).flatten(-2).to(keys_BLNK.dtype)


class Oracle:
    """Makes one stream, slowly.

    ``reference_BCTHW`` and ``motion_BCTHW`` are the photograph as one latent frame and as a still clip.
    """

    def __init__(
        self,
        dit: CausalDiT,
        decoder: VideoDecoder,
        config: EngineConfig,
        *,
        reference_BCTHW: Tensor,
        motion_BCTHW: Tensor,
        prompt_BPC: Tensor,
        seed: int,
        stream: int,
    ) -> None:
        self.dit, self.decoder, self.config = dit, decoder, config
        self.reference_BCTHW, self.motion_BCTHW, self.prompt_BPC = reference_BCTHW, motion_BCTHW, prompt_BPC
        self.key = (seed, stream)
        height, width = config.latent_hw
        self.rows, self.columns = range(height // 2), range(width // 2)
        self.kept: dict[tuple[int, int], KeysValues] = {}
        """(step, chunk) -> keys and values of the chunk as that step saw it."""

    @torch.inference_mode()
    def film(self, script: Sequence[Moment]) -> list[Made]:
        """Every chunk that the script makes, those that are taken back later among them."""
        config = self.config
        made: list[Made] = []
        finished: dict[int, Tensor] = {}
        chunk = epoch = 0
        furthest = -1
        refreshed = False
        begun = 0
        """First chunk of the script since the last rewind."""
        for n, moment in enumerate(script):
            if moment.back:
                self._decode(made, finished, begun)
                begun = n
                for back in moment.back:
                    chunk = min(chunk, max(chunk - back, furthest - config.memory.slack_chunks, 0))
                epoch += 1
            if moment.prompt_BPC is not None:
                self.prompt_BPC = moment.prompt_BPC
            if config.refresh_chunk is not None and chunk >= config.refresh_chunk and not refreshed:
                self.reference_BCTHW, refreshed = finished[0][:, :, :1], True
            finished = {c: latent for c, latent in finished.items() if c < chunk}
            finished[chunk] = latent = self._chunk(chunk, moment.audio_BZEA)
            made.append(Made(chunk=chunk, epoch=epoch, latent_BCTHW=latent, frames_THWC=latent, sound_S=moment.sound_S))
            furthest = max(furthest, chunk)
            chunk += 1
        self._decode(made, finished, begun)
        return made

    def _chunk(self, chunk: int, audio_BZEA: Tensor) -> Tensor:
        """One chunk from noise to data."""
        config = self.config
        text = self.dit.text_condition(self.prompt_BPC)
        sink = self._sink(text)
        audio = self.dit.audio_condition(audio_BZEA)
        shape = (1, config.dit.in_dim, config.frames_per_chunk, *config.latent_hw)
        x_BCTHW = rng.normal(shape, "noise", *self.key, chunk, 0)
        first = chunk * config.frames_per_chunk
        own = rotation(range(first, first + config.frames_per_chunk), self.rows, self.columns, config)
        for step, (sigma, sigma_next) in enumerate(zip(config.sigmas, config.sigmas[1:], strict=False)):
            seen = [self._placed(sink, chunk), *(self._remembered(step, c, chunk) for c in self._visible(chunk))]
            memory = [self._joined(layer) for layer in zip(*seen, strict=True)]
            v_BCTHW = self.dit(x_BCTHW, self.dit.modulation(sigma), text, own, audio=audio, memory=memory)
            self.kept[step, chunk] = [(layer.own_keys_BLNK, layer.own_values_BLNK) for layer in memory]
            if config.renoise and sigma_next > 0:
                noise_BCTHW = rng.normal(shape, "noise", *self.key, chunk, step + 1)
                x_BCTHW = (1 - sigma_next) * (x_BCTHW - sigma * v_BCTHW) + sigma_next * noise_BCTHW
            else:
                x_BCTHW = x_BCTHW - (sigma - sigma_next) * v_BCTHW
        return x_BCTHW

    def _visible(self, chunk: int) -> list[int]:
        """Chunks before this one that it attends to."""
        memory = self.config.memory
        if not memory.keeps_first:
            return [c for c in range(chunk) if chunk - c < memory.window_chunks]
        return [c for c in range(chunk) if c == 0 or chunk - c < memory.window_chunks - 1]

    def _remembered(self, step: int, chunk: int, now: int) -> KeysValues:
        """A chunk as this step remembers it while it works on chunk ``now``; a kept first chunk moves along."""
        config = self.config
        kept = self.kept[step, chunk]
        if chunk > 0 or not config.memory.keeps_first:
            return kept
        by = max(0, now * config.frames_per_chunk - config.memory.first_reach)
        moved = rotation([by] * config.frames_per_chunk, [0] * len(self.rows), [0] * len(self.columns), config)
        return [(turned(keys, moved), values) for keys, values in kept]

    def _placed(self, sink: KeysValues, chunk: int) -> KeysValues:
        """The sink while this chunk is denoised: the reference leads it, or waits for it; the motion prefix stays."""
        memory = self.config.memory
        lead = rng.integer(memory.sink_lead_min, memory.sink_lead_max, "lead", *self.key, chunk)
        place = self._sink_rotation(max(memory.sink_position, chunk * self.config.frames_per_chunk + lead))
        return [(turned(keys, place), values) for keys, values in sink]

    def _sink_rotation(self, position: int) -> Rotation:
        """The reference at a position, and the motion prefix before frame 0: 1, 2 and 16 latent frames, at full, half
        and quarter resolution.
        """
        parts = [rotation([position], self.rows, self.columns, self.config)]
        if self.config.motion_latents:
            for times, coarser in (([-1], 1), ([-3], 2), ([-19, -14, -9, -4], 4)):
                rows, columns = (
                    [int(x) for x in np.linspace(0, len(axis) - 1, len(axis) // coarser)]
                    for axis in (self.rows, self.columns)
                )
                parts.append(rotation(times, rows, columns, self.config))
        return Rotation(torch.cat([p.cos_LF for p in parts]), torch.cat([p.sin_LF for p in parts]))

    def _sink(self, text: TextCondition) -> KeysValues:
        """Keys, not turned, and values of reference and motion prefix: at time 0, under the prompt, without sound."""
        dit, config = self.dit, self.config
        kinds_3D = dit.trainable_cond_mask.weight
        x_BLD = dit.patch_embedding(self.reference_BCTHW).flatten(2).transpose(1, 2) + kinds_3D[1]
        if config.motion_latents:
            x_BLD = torch.cat([x_BLD, dit.frame_packer(self.motion_BCTHW) + kinds_3D[2]], dim=1)
        clean, place = dit.modulation(0.0), self._sink_rotation(config.memory.sink_position)
        kept: KeysValues = []
        for layer, block in enumerate(dit.blocks):
            shift_D, scale_D = clean.layers_Z6D[layer, :2]
            h_BLD = modulate(x_BLD, shift_D, scale_D, config.dit.eps)
            kept.append((block.self_attn.key(h_BLD), block.self_attn.value(h_BLD)))
            text_k, text_v = text.keys_ZBPNK[layer], text.values_ZBPNK[layer]
            x_BLD = block(x_BLD, clean.layers_Z6D[layer], place, text_k, text_v, None)
        return kept

    def _joined(self, parts: Sequence[tuple[Tensor, Tensor]]) -> LayerMemory:
        """All that one layer attends to, and room for the chunk's own keys and values behind it."""
        B, _, N, K = parts[0][0].shape
        L = self.config.chunk_tokens
        own = torch.full((B, L, N, K), torch.nan)
        keys_BMNK, values_BMNK = (torch.cat([*some, own], dim=1) for some in zip(*parts, strict=True))
        return LayerMemory(keys_BMNK[:, -L:], values_BMNK[:, -L:], keys_BMNK, values_BMNK)

    def _decode(self, made: list[Made], finished: dict[int, Tensor], begun: int) -> None:
        """Give all that was made since the last rewind its frames."""
        if begun == len(made):
            return
        frames = decoded(self.decoder, self.config, self.motion_BCTHW, [finished[c] for c in sorted(finished)])
        for n in range(begun, len(made)):
            made[n] = dataclasses.replace(made[n], frames_THWC=frames[made[n].chunk])


@torch.inference_mode()
def decoded(
    decoder: VideoDecoder, config: EngineConfig, motion_BCTHW: Tensor, latents: Sequence[Tensor]
) -> list[Tensor]:
    """Frames of every chunk of a stream that begins with chunk 0, from one clip; uint8 ``[T, H, W, C]`` each."""
    clip_BCTHW = torch.cat([motion_BCTHW[:, :, :STILL_LATENTS], *latents], dim=2)
    frames_BCTHW, _ = decoder.decode(clip_BCTHW)
    levels_THWC = ((frames_BCTHW[0].permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    per_chunk = config.frames_per_chunk * config.vae.temporal_factor
    still = levels_THWC.shape[0] - per_chunk * len(latents)
    return list(levels_THWC[still:].split(per_chunk))
