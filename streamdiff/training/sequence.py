"""The served step in differentiable form: many chunks at once, nothing written in place.

The engine denoises one chunk after the other and writes what it will remember into ring buffers, which autograd cannot
follow. This module computes the same from the same weights (`streamdiff.models.dit.CausalDiT`, whose parts it calls) in
two ways:

- `sequence_velocity`: a whole clip in one pass, every chunk at its own noise level, each seeing the chunks that its
  `Layout` names and the sink. Diffusion forcing (Chen et al. 2024, 2407.01392) learns from it.
- `chunk_velocity`: one chunk and a history that is handed in and out as values. Rollouts (self-forcing) learn from it.

Who sees whom is decided with integers in `Layout`. The chunks that a chunk sees are gathered into one dense block of
keys, ``[sink | visible chunks]``, so that attention costs what is seen, and its mask is one bit per key, not per pair:
inside a chunk, attention is bidirectional.

Keys are remembered un-rotated. Where a key stands is said when it is used, so positions may be re-indexed
(TalkingMachines, figure of the training window) and the sink may lead every chunk by another distance.

``visit(module, function, *tensors)`` runs the computation of one layer: directly, again in the backward pass
(`recomputed`), or where hooks bring a module's weights.

Axes: B clips, n chunks of a clip, T latent frames of a chunk, C channels, H height, W width, L tokens of a chunk, S
tokens of a latent frame and of the sink, M keys that a chunk sees, D model width, N heads, K head width, F rotary
pairs, P prompt tokens, Z hidden states, E audio width, A audio frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from streamdiff.errors import ConfigError
from streamdiff.models.dit import Attention, AudioCondition, Block, CausalDiT, TextCondition, add_gated, modulate

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Attention mask over chunks, each seeing itself and others, and the positions of the chunks."""

    visible: tuple[tuple[int, ...], ...]
    """Per chunk, the chunks that it attends to."""
    first_frames: tuple[int, ...]
    """Per chunk, the temporal position of its first latent frame."""
    frames_per_chunk: int

    def __post_init__(self) -> None:
        if len(self.visible) != len(self.first_frames) or not self.visible:
            raise ConfigError(
                f"a layout says of every chunk what it sees and where it stands, got {len(self.visible)} lists of "
                f"visible chunks and {len(self.first_frames)} positions"
            )
        for chunk, seen in enumerate(self.visible):
            if chunk not in seen or len(set(seen)) != len(seen) or not set(seen) <= set(range(self.num_chunks)):
                raise ConfigError(
                    f"chunk {chunk} of {self.num_chunks} cannot see {seen}; it sees itself, and others once each"
                )

    @property
    def num_chunks(self) -> int:
        return len(self.visible)

    @property
    def num_frames(self) -> int:
        return self.num_chunks * self.frames_per_chunk

    @property
    def most_visible(self) -> int:
        """The largest number of chunks that any chunk sees."""
        return max(len(seen) for seen in self.visible)


def windowed(num_chunks: int, *, window_chunks: int, frames_per_chunk: int, first_frame: int = 0) -> Layout:
    """As the engine remembers: a chunk sees itself and the ``window_chunks - 1`` before it.

    >>> windowed(4, window_chunks=2, frames_per_chunk=3).visible
    ((0,), (0, 1), (1, 2), (2, 3))
    """
    return Layout(
        visible=tuple(tuple(range(max(0, c - window_chunks + 1), c + 1)) for c in range(num_chunks)),
        first_frames=tuple(first_frame + c * frames_per_chunk for c in range(num_chunks)),
        frames_per_chunk=frames_per_chunk,
    )


def sparse(num_chunks: int, *, frames_per_chunk: int) -> Layout:
    """A chunk sees the first, the previous and itself (TalkingMachines, section 3.2).

    >>> sparse(4, frames_per_chunk=3).visible
    ((0,), (0, 1), (0, 1, 2), (0, 2, 3))
    """
    return Layout(
        visible=tuple(tuple(sorted({0, max(0, c - 1), c})) for c in range(num_chunks)),
        first_frames=tuple(c * frames_per_chunk for c in range(num_chunks)),
        frames_per_chunk=frames_per_chunk,
    )


class Visit(Protocol):
    """Runs ``function(*tensors)``, which uses the weights of ``module``."""

    def __call__(self, module: nn.Module, function: Callable[..., _T], /, *tensors: Tensor) -> _T: ...


def directly(module: nn.Module, function: Callable[..., _T], /, *tensors: Tensor) -> _T:
    """Run it, keeping all activations."""
    return function(*tensors)


def recomputed(module: nn.Module, function: Callable[..., _T], /, *tensors: Tensor) -> _T:
    """Activation checkpointing: run it again in the backward pass; a third more work, one layer of activations."""
    return cast("_T", checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False))


@dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """Modulation (adaptive layer norm) by one noise level per chunk, before the layers add their own."""

    projected_Bn6D: Tensor
    embedded_BnD: Tensor

    def layer(self, block: Block) -> Tensor:
        """Shift, scale and gate of self-attention, then of the feed-forward: ``[6, B, n, 1, D]``."""
        return (block.modulation[0] + self.projected_Bn6D).permute(2, 0, 1, 3).unsqueeze(3)

    def head(self, dit: CausalDiT) -> Tensor:
        """Shift and scale of the output head: ``[2, B, n, 1, D]``."""
        return (dit.head.modulation[0] + self.embedded_BnD.unsqueeze(2)).permute(2, 0, 1, 3).unsqueeze(3)


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def modulations(dit: CausalDiT, sigma_Bn: Tensor) -> Levels:
    """`CausalDiT.modulation` for a batch of noise levels, differentiable; at least float32 under autocast too."""
    half = dit.config.freq_dim // 2
    with torch.autocast(dit.device.type, enabled=False):
        frequency_F = torch.pow(10000.0, -torch.arange(half, dtype=torch.float64, device=sigma_Bn.device) / half)
        angle_BnF = 1000.0 * sigma_Bn.to(torch.float64).unsqueeze(-1) * frequency_F
        wave_BnF = torch.cat([angle_BnF.cos(), angle_BnF.sin()], dim=-1).to(device=dit.device, dtype=dit.dtype)
        embedded_BnD = dit.time_embedding(wave_BnF)
        projected_Bn6D = dit.time_projection(embedded_BnD).unflatten(-1, (6, -1))
    return Levels(projected_Bn6D=_wide(projected_Bn6D), embedded_BnD=_wide(embedded_BnD))


def hear(dit: CausalDiT, audio_BZEA: Tensor, num_chunks: int) -> AudioCondition:
    """`CausalDiT.audio_condition` of every chunk of a clip; the chunks stand in the batch axis, clip by clip.

    Each chunk is heard alone, as in a stream: what precedes it are copies of its own first frame.
    """
    A = audio_BZEA.shape[-1]
    if A % num_chunks:
        raise ConfigError(f"{A} frames of sound do not split into {num_chunks} chunks; give whole chunks")
    chunks = audio_BZEA.unflatten(-1, (num_chunks, -1)).movedim(-2, 1).flatten(0, 1)
    return dit.audio_condition(chunks)


@dataclass(frozen=True, slots=True, eq=False)
class Remembered:
    """Keys, un-rotated, and values of a chunk or of the sink, per layer ``[B, L, N, K]``."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def detach(self) -> Remembered:
        """The same values, detached from the autograd graph."""
        return Remembered(tuple(k.detach() for k in self.keys), tuple(v.detach() for v in self.values))


_Look = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From queries, keys and values, un-rotated, ``[B, n, L, N, K]``, to what the chunks see in them, ``[B, n, L, D]``."""


def _turn(x_LNK: Tensor, turn_LF: Tensor) -> Tensor:
    """`streamdiff.rope.rotate` with leading axes of any number, as one complex product.

    Nine times as fast on a CPU, forward and backward, as the form that the engine shares with its kernels.
    """
    x_LNF = torch.view_as_complex(_wide(x_LNK).unflatten(-1, (-1, 2)))
    return torch.view_as_real(x_LNF * turn_LF.unsqueeze(-2)).flatten(-2)


def _turns(dit: CausalDiT, times: Sequence[int], latent_hw: tuple[int, int]) -> Tensor:
    """Complex rotation of whole latent frames, ``[len(times) * S, F]``."""
    rotation = dit.frame_rotation(times, latent_hw)
    return torch.complex(rotation.cos_LF, rotation.sin_LF)


def _attend(q_BLNK: Tensor, k_BMNK: Tensor, v_BMNK: Tensor, seen_BM: Tensor | None) -> Tensor:
    """Softmax attention to the keys that are seen; ``[B, L, D]``."""
    mask_B11M = None if seen_BM is None else seen_BM[:, None, None]
    # A CPU's attention in sixteen bits takes five times as long to go back through as in thirty-two.
    dtype = v_BMNK.dtype if v_BMNK.is_cuda else torch.promote_types(v_BMNK.dtype, torch.float32)
    q_BNLK, k_BNMK, v_BNMK = (x.to(dtype).transpose(1, 2) for x in (q_BLNK, k_BMNK, v_BMNK))
    with torch.autocast(v_BMNK.device.type, enabled=False):
        y_BNLK = F.scaled_dot_product_attention(q_BNLK, k_BNMK, v_BNMK, attn_mask=mask_B11M)
    return y_BNLK.transpose(1, 2).flatten(2).to(v_BMNK.dtype)


def _layer(
    dit: CausalDiT,
    index: int,
    x_BnLD: Tensor,
    levels: Levels,
    text: TextCondition,
    audio: AudioCondition | None,
    look: _Look,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer and the sound injected after it; returns also its keys and values."""
    block = dit.blocks.at(index)
    shift1, scale1, gate1, shift2, scale2, gate2 = levels.layer(block).unbind(0)
    k_BnLNK, v_BnLNK, h_BnLD = _remember(block.self_attn, x_BnLD, shift1, scale1, block.eps)
    y_BnLD = look(block.self_attn.query(h_BnLD), k_BnLNK, v_BnLNK)
    x_BnLD = add_gated(x_BnLD, block.self_attn.o(y_BnLD), gate1)
    q_BLNK = block.cross_attn.query(block.norm3(x_BnLD)).flatten(1, 2)
    y_BLD = _attend(q_BLNK, text.keys_ZBPNK[index], text.values_ZBPNK[index], None)
    x_BnLD = x_BnLD + block.cross_attn.o(y_BLD.view_as(x_BnLD))
    x_BnLD = add_gated(x_BnLD, block.ffn(modulate(x_BnLD, shift2, scale2, block.eps)), gate2)
    if audio is not None and index in dit.injector_of:
        x_BnLD = dit._inject(x_BnLD.flatten(0, 1), audio, dit.injector_of[index]).view_as(x_BnLD)
    return x_BnLD, k_BnLNK, v_BnLNK


def _remember(
    attention: Attention, x_BnLD: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    h_BnLD = modulate(x_BnLD, shift, scale, eps)
    return attention.key(h_BnLD), attention.value(h_BnLD), h_BnLD


def remember_sink(
    dit: CausalDiT,
    reference_BCTHW: Tensor,
    text: TextCondition,
    *,
    position: int = 0,
    visit: Visit = directly,
) -> Remembered:
    """Keys and values of the sink, as `CausalDiT.prefill_sink` makes them without a motion prefix.

    The reference, one latent frame, sees itself and the prompt, at time 0, and hears nothing.
    """
    _, _, T, H, W = reference_BCTHW.shape
    levels = modulations(dit, torch.zeros(1, 1, device=dit.device))
    x_BnLD = (dit._embed(reference_BCTHW) + dit._token_kind(1)).unsqueeze(1).to(dit.dtype)
    turn_LF = _turns(dit, range(position, position + T), (H, W))

    def look(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y_BLD = _attend(_turn(q, turn_LF).flatten(0, 1), _turn(k, turn_LF).flatten(0, 1), v.flatten(0, 1), None)
        return y_BLD.unsqueeze(1)

    def last_layer(x_BnLD: Tensor) -> tuple[Tensor, Tensor]:
        block = dit.blocks.at(dit.config.num_layers - 1)
        shift, scale = levels.layer(block)[:2]
        return _remember(block.self_attn, x_BnLD, shift, scale, block.eps)[:2]

    keys: list[Tensor] = []
    values: list[Tensor] = []
    for index, block in enumerate(dit.blocks):
        if index + 1 < dit.config.num_layers:

            def run(x_BnLD: Tensor, index: int = index) -> tuple[Tensor, Tensor, Tensor]:
                return _layer(dit, index, x_BnLD, levels, text, None, look)

            x_BnLD, k, v = visit(block, run, x_BnLD)
        else:
            k, v = visit(block, last_layer, x_BnLD)
        keys.append(k.squeeze(1))
        values.append(v.squeeze(1))
    return Remembered(tuple(keys), tuple(values))


def sequence_velocity(
    dit: CausalDiT,
    latent_BCTHW: Tensor,
    sigma_Bn: Tensor,
    text: TextCondition,
    audio: AudioCondition | None,
    layout: Layout,
    *,
    sink: Remembered | None = None,
    lead_Bn: Tensor | None = None,
    sees_sink_B: Tensor | None = None,
    visit: Visit = directly,
) -> Tensor:
    """Velocity of every chunk of a clip at its own noise level, float32, shaped like the latent.

    Args:
        latent_BCTHW: noisy latents, ``layout.num_frames`` of them.
        sigma_Bn: noise level of each chunk.
        audio: what each chunk hears (`hear`).
        sink: what every chunk sees besides (`remember_sink`), ``lead_Bn`` latent frames (int64, on the CPU) ahead of
            its first frame.
        sees_sink_B: False for clips that have to do without the sink.
    """
    B, _, frames, H, W = latent_BCTHW.shape
    n = layout.num_chunks
    _check_fit(layout, latent_BCTHW, sigma_Bn)
    levels = modulations(dit, sigma_Bn)
    x_BnLD = dit.embed_video(latent_BCTHW).unflatten(1, (n, -1)).to(dit.dtype)
    times = [first + t for first in layout.first_frames for t in range(layout.frames_per_chunk)]
    own_nLF = _turns(dit, times, (H, W)).unflatten(0, (n, -1))
    sink_BnSF = None if sink is None else _sink_turns(dit, layout.first_frames, lead_Bn, (B, n), (H, W))
    gather = _Gather(layout, (B, n), sink is not None, sees_sink_B)
    seen_BM = gather.seen(x_BnLD.shape[2] // layout.frames_per_chunk, dit.device)
    # The sink's keys stand elsewhere for every chunk; its values are the same for all.
    key_rows, value_rows = (gather.index(0 if sink is None else each, dit.device) for each in (n, 1))
    for index, block in enumerate(dit.blocks):

        def run(x_BnLD: Tensor, index: int = index) -> Tensor:
            def look(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                sink_k = sink_v = None
                if sink is not None and sink_BnSF is not None:
                    sink_k = _turn(sink.keys[index].unsqueeze(1), sink_BnSF)
                    sink_v = sink.values[index].unsqueeze(1)
                k_BMNK = _gathered(sink_k, _turn(k, own_nLF), key_rows, frames)
                v_BMNK = _gathered(sink_v, v, value_rows, frames)
                return _attend(_turn(q, own_nLF).flatten(0, 1), k_BMNK, v_BMNK, seen_BM).unflatten(0, (B, n))

            return _layer(dit, index, x_BnLD, levels, text, audio, look)[0]

        x_BnLD = visit(block, run, x_BnLD)
    sigma_BT = sigma_Bn.repeat_interleave(layout.frames_per_chunk, 1)
    return _velocity(dit, x_BnLD, levels, latent_BCTHW, sigma_BT[:, None, :, None, None])


def _check_fit(layout: Layout, latent_BCTHW: Tensor, sigma_Bn: Tensor) -> None:
    """Raise ConfigError when latents and noise levels are not those of this layout."""
    B, n, frames = len(latent_BCTHW), layout.num_chunks, latent_BCTHW.shape[2]
    if frames != layout.num_frames or sigma_Bn.shape != (B, n):
        raise ConfigError(
            f"a layout of {n} chunks of {layout.frames_per_chunk} latent frames got {frames} frames and noise levels "
            f"of shape {tuple(sigma_Bn.shape)}; it takes {layout.num_frames} frames and ({B}, {n})"
        )


def _velocity(dit: CausalDiT, x_BnLD: Tensor, levels: Levels, latent_BCTHW: Tensor, sigma: Tensor) -> Tensor:
    """Output head: the velocity from the last layer's tokens; ``sigma`` broadcasts over the latents."""
    _, _, T, H, W = latent_BCTHW.shape
    patches_BnLC = dit.head(x_BnLD, levels.head(dit))
    said_BCTHW = dit.unpatchify(patches_BnLC.flatten(1, 2), T, H, W)
    return dit.velocity(latent_BCTHW, said_BCTHW, sigma.to(said_BCTHW))


def _sink_turns(
    dit: CausalDiT,
    first_frames: Sequence[int],
    lead_Bn: Tensor | None,
    shape: tuple[int, int],
    latent_hw: tuple[int, int],
) -> Tensor:
    """Rotation of the sink for each chunk of each clip, ``[B, n, S, F]``."""
    if lead_Bn is None or lead_Bn.shape != shape:
        got = None if lead_Bn is None else tuple(lead_Bn.shape)
        raise ConfigError(f"a sink needs its lead before every chunk: lead_Bn of shape {shape}, got {got}")
    times = (lead_Bn + torch.tensor(first_frames)).flatten().tolist()
    return _turns(dit, times, latent_hw).unflatten(0, (*shape, -1))


class _Gather:
    """Gathers the keys and values visible to each chunk, latent frame by latent frame, in one copy."""

    def __init__(self, layout: Layout, shape: tuple[int, int], sink: bool, sees_sink_B: Tensor | None) -> None:
        B, n = shape
        T, most = layout.frames_per_chunk, layout.most_visible
        # Chunks that see less than the others are filled up with themselves, masked.
        frames = [[c * T + t for c in (*seen, *[0] * (most - len(seen))) for t in range(T)] for seen in layout.visible]
        real = [[i < len(seen) for i in range(most) for _ in range(T)] for seen in layout.visible]
        self._frames_nM = torch.tensor(frames)
        self.whole = all(map(all, real)) and sees_sink_B is None
        self._seen_BnM = torch.tensor(real).expand(B, n, -1)
        if sink:
            sees_B = torch.ones(B, dtype=torch.bool) if sees_sink_B is None else sees_sink_B.cpu()
            self._seen_BnM = torch.cat([sees_B.view(B, 1, 1).expand(B, n, 1), self._seen_BnM], dim=2)

    def seen(self, frame_tokens: int, device: torch.device) -> Tensor | None:
        """Which keys a chunk sees, ``[B * n, M]``, or None if all."""
        return None if self.whole else self._seen_BnM.repeat_interleave(frame_tokens, 2).flatten(0, 1).to(device)

    def index(self, num_sinks: int, device: torch.device) -> Tensor:
        """Rows to gather from ``num_sinks`` (0, 1, or one per chunk) frames of sink and the frames of the clip."""
        rows_nM = self._frames_nM + num_sinks
        if num_sinks:
            first_n1 = torch.arange(len(rows_nM)).unsqueeze(1) % num_sinks
            rows_nM = torch.cat([first_n1, rows_nM], dim=1)
        return rows_nM.flatten().to(device)


def _gathered(sink_BnSNK: Tensor | None, own_BnLNK: Tensor, index_M: Tensor, num_frames: int) -> Tensor:
    """Keys or values visible to every chunk, ``[B * n, M, N, K]``."""
    B, n, _, N, K = own_BnLNK.shape
    frames = own_BnLNK.reshape(B, num_frames, -1)
    if sink_BnSNK is not None:
        frames = torch.cat([sink_BnSNK.flatten(2), frames], dim=1)
    return frames.index_select(1, index_M).view(B * n, -1, N, K)


def chunk_velocity(
    dit: CausalDiT,
    latent_BCTHW: Tensor,
    sigma_B: Tensor,
    text: TextCondition,
    audio: AudioCondition | None,
    *,
    first_frame: int,
    history: Sequence[tuple[int, Remembered]] = (),
    sink: Remembered | None = None,
    lead_B: Tensor | None = None,
    sees_sink_B: Tensor | None = None,
    visit: Visit = directly,
) -> tuple[Tensor, Remembered]:
    """Velocity of one chunk, float32, and its keys and values for the chunks to come.

    Args:
        sigma_B: its noise level.
        audio: what it hears (`hear` with one chunk).
        first_frame: temporal position of its first latent frame.
        history: what it sees besides itself, each with the temporal position of its first latent frame.
        sink: as in `sequence_velocity`, ``lead_B`` latent frames ahead.
    """
    B, _, T, H, W = latent_BCTHW.shape
    levels = modulations(dit, sigma_B.unsqueeze(1))
    x_BnLD = dit.embed_video(latent_BCTHW).unsqueeze(1).to(dit.dtype)
    own_LF = _turns(dit, range(first_frame, first_frame + T), (H, W))
    before = [(_turns(dit, range(first, first + T), (H, W)), remembered) for first, remembered in history]
    seen_BM: Tensor | None = None
    if sink is not None:
        lead_B1 = None if lead_B is None else lead_B.unsqueeze(1)
        before.insert(0, (_sink_turns(dit, (first_frame,), lead_B1, (B, 1), (H, W)).squeeze(1), sink))
        if sees_sink_B is not None:
            S, M = sink.keys[0].shape[1], sum(r.keys[0].shape[1] for _, r in before) + x_BnLD.shape[2]
            seen_BM = sees_sink_B.to(dit.device).unsqueeze(1) | (torch.arange(M, device=dit.device) >= S)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for index, block in enumerate(dit.blocks):

        def run(x_BnLD: Tensor, index: int = index) -> tuple[Tensor, Tensor, Tensor]:
            def look(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                all_k = [_turn(r.keys[index], turn_LF) for turn_LF, r in before] + [_turn(k, own_LF).squeeze(1)]
                all_v = [r.values[index] for _, r in before] + [v.squeeze(1)]
                q_BLNK = _turn(q, own_LF).squeeze(1)
                return _attend(q_BLNK, torch.cat(all_k, dim=1), torch.cat(all_v, dim=1), seen_BM).unsqueeze(1)

            return _layer(dit, index, x_BnLD, levels, text, audio, look)

        x_BnLD, own_k, own_v = visit(block, run, x_BnLD)
        keys.append(own_k.squeeze(1))
        values.append(own_v.squeeze(1))
    velocity_BCTHW = _velocity(dit, x_BnLD, levels, latent_BCTHW, sigma_B[:, None, None, None, None])
    return velocity_BCTHW, Remembered(tuple(keys), tuple(values))
