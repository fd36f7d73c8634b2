"""The causal video DiT: weights and names of Wan2.2-S2V-14B, or of plain Wan T2V when there is no audio.

The module holds weights only. What changes during a stream is handed in: the history of the step (`LayerMemory` views
of `streamdiff.memory`), the rotations, and the conditions, each computed once for as long as it stays true:

- `Modulation` of a noise level: a rank's noise level never changes, so this is a constant of the rank;
- `TextCondition`: keys and values of the prompt in every layer, until the prompt changes;
- `AudioCondition`: scale, shift, keys and values of the sound in every injector, once per chunk for all steps.

Numbers follow the published model (sizes and names: Wan2.2 ``model_s2v.py``; causal use: Live Avatar
``causal_model_s2v.py``): the residual stream has the dtype of the weights (served, it is float32); norms, modulation,
rotary turns and time embedding are float32.

Axes: B streams, T latent frames, C channels, H height, W width, L tokens of this chunk, M tokens remembered, S sink
tokens, D model width, N heads, K head width, P prompt tokens, A audio frames or tokens, E audio width, Z layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from streamdiff import rng
from streamdiff.config import AudioInjectionConfig, DiTConfig
from streamdiff.errors import ConfigError
from streamdiff.flow import velocity_to
from streamdiff.memory import LayerMemory, SinkMemory
from streamdiff.rope import Rotation, grid_rotation, join, rotate, spread

MOTION_BUCKETS = (1, 2, 16)
"""Motion latents packed at full, half and quarter resolution, nearest first (FramePack)."""

ADAPTIVE_NORM_EPS = 1e-5
"""Of the norms that the sound moves; the others have the epsilon of the configuration."""


@dataclass(frozen=True, slots=True, eq=False)
class Modulation:
    """Scale, shift and gate of every layer at one noise level, float32."""

    layers_Z6D: Tensor
    """Per layer: shift, scale and gate of self-attention, then of the feed-forward."""
    head_2D: Tensor
    """Shift and scale of the output head."""
    sigma: float


@dataclass(frozen=True, slots=True, eq=False)
class TextCondition:
    """Keys and values of the prompt, per layer."""

    keys_ZBPNK: Tensor
    values_ZBPNK: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AudioCondition:
    """Scales, shifts, keys and values of one chunk's audio tokens per injected layer; frames are in the batch axis."""

    scales: tuple[Tensor, ...]
    """Per injector ``[B, T, 1, D]``, float32."""
    shifts: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    """Per injector ``[B * T, A, N, K]``."""
    values: tuple[Tensor, ...]

    @property
    def parts(self) -> tuple[tuple[Tensor, ...], ...]:
        return self.scales, self.shifts, self.keys, self.values


def attend(q_BLNK: Tensor, k_BMNK: Tensor, v_BMNK: Tensor) -> Tensor:
    """Plain softmax attention of every query to every key; ``[B, L, N * K]``."""
    out_BNLK = F.scaled_dot_product_attention(q_BLNK.transpose(1, 2), k_BMNK.transpose(1, 2), v_BMNK.transpose(1, 2))
    return out_BNLK.transpose(1, 2).flatten(2)


def modulate(x_BLD: Tensor, shift_D: Tensor, scale_D: Tensor, eps: float) -> Tensor:
    """Layer-norm without weights, then ``* (1 + scale) + shift``, in float32; returns the dtype of ``x``."""
    normed_BLD = F.layer_norm(x_BLD.float(), x_BLD.shape[-1:], eps=eps)
    return (normed_BLD * (1 + scale_D) + shift_D).to(x_BLD.dtype)


def add_gated(x_BLD: Tensor, y_BLD: Tensor, gate_D: Tensor) -> Tensor:
    """``x + gate * y`` in float32; returns the dtype of ``x``."""
    return (x_BLD.float() + y_BLD.float() * gate_D).to(x_BLD.dtype)


_M = TypeVar("_M", bound=nn.Module)


class Stack(nn.ModuleList, Generic[_M]):
    """A module list that knows what it holds."""

    def __iter__(self) -> Iterator[_M]:
        return cast("Iterator[_M]", super().__iter__())

    def at(self, index: int) -> _M:
        return cast("_M", self[index])


class RMSNorm(nn.Module):
    """Root-mean-square norm over the full model width, across heads."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_BLD: Tensor) -> Tensor:
        x32_BLD = x_BLD.float()
        scale_BL1 = torch.rsqrt(x32_BLD.square().mean(-1, keepdim=True) + self.eps)
        return (x32_BLD * scale_BL1).to(x_BLD.dtype) * self.weight


class Attention(nn.Module):
    """Query, key, value and output projections of one attention; the caller decides who attends to what."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)

    def query(self, x_BLD: Tensor) -> Tensor:
        return self.norm_q(self.q(x_BLD)).unflatten(-1, (self.num_heads, -1))

    def key(self, x_BMD: Tensor) -> Tensor:
        return self.norm_k(self.k(x_BMD)).unflatten(-1, (self.num_heads, -1))

    def value(self, x_BMD: Tensor) -> Tensor:
        return self.v(x_BMD).unflatten(-1, (self.num_heads, -1))


class Block(nn.Module):
    """Self-attention, attention to the prompt, feed-forward."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.self_attn = Attention(config.dim, config.num_heads, config.eps)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps)
        self.cross_attn = Attention(config.dim, config.num_heads, config.eps)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, config.dim),
        )
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.dim))

    @property
    def up(self) -> nn.Linear:
        """Into the hidden width of the feed-forward."""
        return cast("nn.Linear", self.ffn[0])

    @property
    def down(self) -> nn.Linear:
        return cast("nn.Linear", self.ffn[2])

    def forward(
        self,
        x_BLD: Tensor,
        modulation_6D: Tensor,
        rotation: Rotation,
        text_k_BPNK: Tensor,
        text_v_BPNK: Tensor,
        memory: LayerMemory | None,
    ) -> Tensor:
        """Without a memory, the tokens attend to each other only."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation_6D.unbind(0)
        attention = self.self_attn
        h_BLD = modulate(x_BLD, shift1, scale1, self.eps)
        q_BLNK = rotate(attention.query(h_BLD), rotation)
        k_BLNK = rotate(attention.key(h_BLD), rotation)
        v_BLNK = attention.value(h_BLD)
        if memory is None:
            y_BLD = attend(q_BLNK, k_BLNK, v_BLNK)
        else:
            memory.own_keys_BLNK.copy_(k_BLNK)
            memory.own_values_BLNK.copy_(v_BLNK)
            y_BLD = attend(q_BLNK, memory.keys_BMNK, memory.values_BMNK)
        x_BLD = add_gated(x_BLD, attention.o(y_BLD), gate1)
        text = self.cross_attn
        y_BLD = attend(text.query(self.norm3(x_BLD)), text_k_BPNK, text_v_BPNK)
        x_BLD = x_BLD + text.o(y_BLD)
        y_BLD = self.ffn(modulate(x_BLD, shift2, scale2, self.eps))
        return add_gated(x_BLD, y_BLD, gate2)


class FinalLayer(nn.Module):
    """Norm, modulation and projection back to latent patches."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        t, h, w = config.patch
        self.head = nn.Linear(config.dim, config.out_dim * t * h * w)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))

    def forward(self, x_BLD: Tensor, modulation_2D: Tensor) -> Tensor:
        shift_D, scale_D = modulation_2D.unbind(0)
        return self.head(modulate(x_BLD, shift_D, scale_D, self.eps))


class _CausalConv1d(nn.Module):
    """Convolution over time that sees the present and the past; the past before the first frame repeats it."""

    def __init__(self, in_dim: int, out_dim: int, *, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_dim, out_dim, 3, stride=stride)

    def forward(self, x_BAE: Tensor) -> Tensor:
        x_BEA = F.pad(x_BAE.transpose(1, 2), (2, 0), mode="replicate")
        return self.conv(x_BEA).transpose(1, 2)


class _AudioTokenizer(nn.Module):
    """Four video frames of audio features to one latent frame of audio tokens (``MotionEncoder_tc``)."""

    def __init__(self, config: AudioInjectionConfig, dim: int) -> None:
        super().__init__()
        if dim % 4:
            raise ConfigError(f"the audio encoder splits dim by 4, got dim={dim}")
        self.num_tokens = config.num_tokens
        self.conv1_local = _CausalConv1d(config.feature_dim, dim // 4 * config.num_tokens, stride=1)
        self.conv1_global = _CausalConv1d(config.feature_dim, dim // 4, stride=1)
        self.conv2 = _CausalConv1d(dim // 4, dim // 2, stride=2)
        self.conv3 = _CausalConv1d(dim // 2, dim, stride=2)
        self.final_linear = nn.Linear(dim, dim)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def _stack(self, x_BAE: Tensor) -> Tensor:
        """The two strided convolutions, shared by the local and the global path."""
        for layer in (None, self.conv2, self.conv3):
            x_BAE = x_BAE if layer is None else layer(x_BAE)
            x_BAE = F.silu(F.layer_norm(x_BAE, x_BAE.shape[-1:], eps=1e-6))
        return x_BAE

    def forward(self, x_BAE: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[B, A, E]`` to one global vector ``[B, T, D]`` and local tokens ``[B, T, num_tokens + 1, D]``."""
        B = x_BAE.shape[0]
        local = self.conv1_local(x_BAE).unflatten(-1, (self.num_tokens, -1)).transpose(1, 2).flatten(0, 1)
        local_BTAD = self._stack(local).unflatten(0, (B, -1)).transpose(1, 2)
        padding_BTAD = self.padding_tokens.expand(B, local_BTAD.shape[1], -1, -1)
        global_BTD = self.final_linear(self._stack(self.conv1_global(x_BAE)))
        return global_BTD, torch.cat([local_BTAD, padding_BTAD], dim=2)


class CausalAudioEncoder(nn.Module):
    """Weighted mean over the speech encoder's hidden states, then causal convolutions to audio tokens."""

    def __init__(self, config: AudioInjectionConfig, dim: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.full((1, config.num_features, 1, 1), 0.01))
        self.encoder = _AudioTokenizer(config, dim)

    def mix(self, features_BZEA: Tensor) -> Tensor:
        """Weighted mean of the hidden states, ``[B, A, E]``, summed in float32."""
        weights_Z = F.silu(self.weights.float()).flatten()
        mixed_BAE = torch.einsum("z,bzea->bae", weights_Z / weights_Z.sum(), features_BZEA.float())
        return mixed_BAE.to(self.weights.dtype)

    def forward(self, features_BZEA: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(self.mix(features_BZEA))


class _AdaptiveNorm(nn.Module):
    """Adaptive layer norm without weights: scale and shift are projected from the global audio vector."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)

    def forward(self, global_BTD: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = self.linear(F.silu(global_BTD)).float().unsqueeze(2).chunk(2, dim=-1)
        return shift, scale


class AudioInjector(nn.Module):
    """One adaptive norm and one cross-attention per injected layer."""

    def __init__(self, config: DiTConfig, num_injectors: int) -> None:
        super().__init__()
        self.injector = Stack[Attention](
            Attention(config.dim, config.num_heads, config.eps) for _ in range(num_injectors)
        )
        self.injector_adain_layers = Stack[_AdaptiveNorm](_AdaptiveNorm(config.dim) for _ in range(num_injectors))


class FramePacker(nn.Module):
    """Packs the motion prefix: near latents finely, far ones coarsely (FramePack)."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_dim, dim, (1, 2, 2), stride=(1, 2, 2))
        self.proj_2x = nn.Conv3d(in_dim, dim, (2, 4, 4), stride=(2, 4, 4))
        self.proj_4x = nn.Conv3d(in_dim, dim, (4, 8, 8), stride=(4, 8, 8))

    def forward(self, motion_BCTHW: Tensor) -> Tensor:
        """Motion latents, at most the last 19 used, to tokens ``[B, L, D]``, nearest first."""
        missing = sum(MOTION_BUCKETS) - motion_BCTHW.shape[2]
        if missing > 0:
            motion_BCTHW = F.pad(motion_BCTHW, (0, 0, 0, 0, missing, 0))
        far, middle, near = motion_BCTHW[:, :, -sum(MOTION_BUCKETS) :].split(MOTION_BUCKETS[::-1], dim=2)
        tokens = (self.proj(near), self.proj_2x(middle), self.proj_4x(far))
        return torch.cat([t.flatten(2).transpose(1, 2) for t in tokens], dim=1)


class CausalDiT(nn.Module):
    """Predicts the velocity of one chunk from its noisy latent, its history and its conditions.

    Tensor names are those of the official checkpoint (1260 for the 14B S2V model, 1095 of them the plain Wan trunk).
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        D = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, D, config.patch, stride=config.patch)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, D), nn.GELU(approximate="tanh"), nn.Linear(D, D))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, D), nn.SiLU(), nn.Linear(D, D))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.blocks = Stack[Block](Block(config) for _ in range(config.num_layers))
        self.head = FinalLayer(config)
        self.injector_of: dict[int, int] = {}
        if config.audio is not None:
            self.cond_encoder = nn.Conv3d(config.cond_dim, D, config.patch, stride=config.patch)
            self.trainable_cond_mask = nn.Embedding(3, D)
            self.casual_audio_encoder = CausalAudioEncoder(config.audio, D)
            self.audio_injector = AudioInjector(config, len(config.audio.inject_layers))
            if config.packs_motion:
                self.frame_packer = FramePacker(config.in_dim, D)
            self.injector_of = {layer: j for j, layer in enumerate(config.audio.inject_layers)}

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    def modulation(self, sigma: float) -> Modulation:
        """Constants of one noise level; the model knows it as time 1000 * sigma."""
        half = self.config.freq_dim // 2
        frequency_F = torch.pow(10000.0, -torch.arange(half, dtype=torch.float64) / half)
        angle_F = 1000.0 * sigma * frequency_F
        wave_1F = torch.cat([angle_F.cos(), angle_F.sin()])[None].to(device=self.device, dtype=torch.float32)
        embedded_1D = _in_float32(self.time_embedding, wave_1F)
        projected_6D = _in_float32(self.time_projection, embedded_1D).view(6, self.config.dim)
        layers = torch.stack([block.modulation[0].float() for block in self.blocks])
        return Modulation(
            layers_Z6D=layers + projected_6D,
            head_2D=self.head.modulation[0].float() + embedded_1D,
            sigma=sigma,
        )

    def text_condition(self, text_BPC: Tensor) -> TextCondition:
        """Keys and values of a prompt embedding, which is padded with zeros to ``text_len`` and attended whole."""
        missing = self.config.text_len - text_BPC.shape[1]
        if missing < 0:
            raise ConfigError(
                f"the prompt has {text_BPC.shape[1]} tokens but the model reads {self.config.text_len}; "
                "shorten the prompt"
            )
        padded_BPC = F.pad(text_BPC.to(device=self.device, dtype=self.dtype), (0, 0, 0, missing))
        context_BPD = self.text_embedding(padded_BPC)
        return TextCondition(
            keys_ZBPNK=torch.stack([block.cross_attn.key(context_BPD) for block in self.blocks]),
            values_ZBPNK=torch.stack([block.cross_attn.value(context_BPD) for block in self.blocks]),
        )

    def audio_condition(self, audio_BZEA: Tensor) -> AudioCondition:
        """Encode one chunk's audio features for every injected layer: see `AudioCondition`.

        The chunk's features are preceded by ``motion_frames`` copies of their first frame, so no sound reaches across
        chunks but through the speech encoder (Live Avatar, 4.1). What copies give is known after the first of them, as
        every convolution continues its first input to the left: it is enough to keep their number modulo 4, the phase
        of the two strides.
        """
        audio = self._require_audio()
        mixed_BAE = self.casual_audio_encoder.mix(audio_BZEA.to(device=self.device))
        copies = (audio.motion_frames - 1) % 4 + 1
        padded_BAE = torch.cat([mixed_BAE[:, :1].expand(-1, copies, -1), mixed_BAE], dim=1)
        # Served, the encoder is float32 whatever the rest is (`ServedWeights`).
        global_BTD, local_BTAD = (x.to(self.dtype) for x in self.casual_audio_encoder.encoder(padded_BAE))
        global_BTD, tokens = global_BTD[:, 1:], local_BTAD[:, 1:].flatten(0, 1)
        moved = [norm(global_BTD) for norm in self.audio_injector.injector_adain_layers]
        injectors = self.audio_injector.injector
        return AudioCondition(
            scales=tuple(scale for _, scale in moved),
            shifts=tuple(shift for shift, _ in moved),
            keys=tuple(injector.key(tokens) for injector in injectors),
            values=tuple(injector.value(tokens) for injector in injectors),
        )

    def motion_rotation(self, latent_hw: tuple[int, int]) -> Rotation:
        """Rotation of the packed motion prefix; it never moves."""
        h, w = latent_hw
        rows, columns, pairs = h // 2, w // 2, self.config.rotary_pairs
        parts = []
        far = 0
        for level, bucket in enumerate(MOTION_BUCKETS):
            scale = 2**level
            far += bucket
            times = [-(far - t) for t in spread(bucket // scale, bucket)]
            parts.append(grid_rotation(times, spread(rows // scale, rows), spread(columns // scale, columns), pairs))
        return _moved(join(parts), self.device)

    def frame_rotation(self, times: Sequence[int], latent_hw: tuple[int, int]) -> Rotation:
        """Rotation of whole latent frames at the given temporal positions."""
        _, ph, pw = self.config.patch
        rows, columns = latent_hw[0] // ph, latent_hw[1] // pw
        return grid_rotation(times, range(rows), range(columns), self.config.rotary_pairs, device=self.device)

    def prefill_sink(
        self,
        reference_BCTHW: Tensor,
        motion_BCTHW: Tensor | None,
        text: TextCondition,
        clean: Modulation,
        sink: SinkMemory,
        *,
        position: int,
    ) -> None:
        """Compute keys and values of the sink in every layer and keep them, un-rotated, in ``sink``.

        The sink sees itself and the prompt, at time 0 (``clean``), and no sound; the reference sits at ``position``.
        """
        latent_hw = (reference_BCTHW.shape[3], reference_BCTHW.shape[4])
        x_BSD = self._embed(reference_BCTHW) + self._token_kind(1)
        rotation = self.frame_rotation([position], latent_hw)
        if motion_BCTHW is not None:
            motion_BSD = self.frame_packer(motion_BCTHW.to(device=self.device, dtype=self.dtype))
            x_BSD = torch.cat([x_BSD, motion_BSD + self._token_kind(2)], dim=1)
            rotation = join([rotation, self.motion_rotation(latent_hw)])
        if x_BSD.shape[1] != sink.sink_tokens:
            raise ConfigError(
                f"the sink has {x_BSD.shape[1]} tokens but its memory was made for {sink.sink_tokens}; "
                "latents of another size, or a motion prefix too many or too few"
            )
        for layer, block in enumerate(self.blocks):
            shift, scale = clean.layers_Z6D[layer, 0], clean.layers_Z6D[layer, 1]
            normed_BSD = modulate(x_BSD, shift, scale, self.config.eps)
            sink.write(layer, block.self_attn.key(normed_BSD), block.self_attn.value(normed_BSD))
            if layer + 1 < len(self.blocks):
                x_BSD = block(
                    x_BSD,
                    clean.layers_Z6D[layer],
                    rotation,
                    text.keys_ZBPNK[layer],
                    text.values_ZBPNK[layer],
                    None,
                )

    def forward(
        self,
        latent_BCTHW: Tensor,
        modulation: Modulation,
        text: TextCondition,
        rotation: Rotation,
        *,
        audio: AudioCondition | None = None,
        memory: Sequence[LayerMemory] | None = None,
    ) -> Tensor:
        """Velocity of one chunk, float32, shaped like its latent.

        With a memory, writes this chunk's keys and values into it and attends to all it holds; without one the chunk
        attends to itself, which is how the plain Wan model reads a whole clip.
        """
        _, _, T, H, W = latent_BCTHW.shape
        x_BLD = self.embed_video(latent_BCTHW)
        for layer, block in enumerate(self.blocks):
            x_BLD = block(
                x_BLD,
                modulation.layers_Z6D[layer],
                rotation,
                text.keys_ZBPNK[layer],
                text.values_ZBPNK[layer],
                None if memory is None else memory[layer],
            )
            if layer in self.injector_of and audio is not None:
                x_BLD = self._inject(x_BLD, audio, self.injector_of[layer])
        output_BCTHW = self.unpatchify(self.head(x_BLD, modulation.head_2D), T, H, W)
        return self.velocity(latent_BCTHW, output_BCTHW, modulation.sigma)

    def embed_video(self, latent_BCTHW: Tensor) -> Tensor:
        """Tokens of a chunk ``[B, L, D]``, marked as video."""
        x_BLD = self._embed(latent_BCTHW)
        if self.config.audio is None:
            return x_BLD
        # The pose input is absent, which is not the same as nothing: its bias still counts.
        bias_D = self.cond_encoder.bias
        assert bias_D is not None
        return x_BLD + bias_D + self._token_kind(0)

    def velocity(self, latent_BCTHW: Tensor, output_BCTHW: Tensor, sigma: float | Tensor) -> Tensor:
        """Velocity from the output of the final layer, which predicts it or the data (`DiTConfig.predicts_data`)."""
        return velocity_to(latent_BCTHW.float(), output_BCTHW, sigma) if self.config.predicts_data else output_BCTHW

    def unpatchify(self, patches_BLD: Tensor, T: int, H: int, W: int) -> Tensor:
        """Patches ``[B, L, C * patch]`` back to a latent ``[B, C, T, H, W]``, float32."""
        pt, ph, pw = self.config.patch
        grid = patches_BLD.float().unflatten(1, (T // pt, H // ph, W // pw)).unflatten(-1, (pt, ph, pw, -1))
        return grid.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(grid.shape[0], -1, T, H, W)

    def _inject(self, x_BLD: Tensor, audio: AudioCondition, injector: int) -> Tensor:
        """Audio cross-attention: the tokens of a latent frame attend to the audio tokens of the same frame."""
        attention = self.audio_injector.injector.at(injector)
        T = audio.scales[injector].shape[1]
        frames_BTLD = x_BLD.unflatten(1, (T, -1))
        normed = modulate(frames_BTLD, audio.shifts[injector], audio.scales[injector], ADAPTIVE_NORM_EPS)
        heard = attend(attention.query(normed.flatten(0, 1)), audio.keys[injector], audio.values[injector])
        return x_BLD + attention.o(heard).view_as(x_BLD)

    def _embed(self, latent_BCTHW: Tensor) -> Tensor:
        patches = self.patch_embedding(latent_BCTHW.to(device=self.device, dtype=self.dtype))
        return patches.flatten(2).transpose(1, 2).contiguous()

    def _token_kind(self, kind: int) -> Tensor:
        """Learnt mark of video (0), reference (1) and motion (2) tokens; nothing in a model without audio."""
        if self.config.audio is None:
            return torch.zeros((), dtype=self.dtype, device=self.device)
        return self.trainable_cond_mask.weight[kind]

    def _require_audio(self) -> AudioInjectionConfig:
        if self.config.audio is None:
            raise ConfigError("this model has no audio injectors; use a preset that has them, such as tiny")
        return self.config.audio


def _in_float32(module: nn.Module, x: Tensor) -> Tensor:
    """What a module computes with its weights widened to float32, for tables that are made once."""
    narrow = {name: parameter for name, parameter in module.named_parameters() if parameter.dtype != torch.float32}
    if not narrow:
        return module(x)
    return functional_call(module, {name: parameter.float() for name, parameter in narrow.items()}, (x,))


def _moved(rotation: Rotation, device: torch.device) -> Rotation:
    return Rotation(rotation.cos_LF.to(device), rotation.sin_LF.to(device))


def initialise(module: nn.Module, *, seed: int) -> None:
    """Fill a module with random weights that depend on the seed and on each tensor's name only.

    Matrices keep the variance of their input, norms start at one, biases are small and not zero, so that a wrong bias
    is noticed.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight")):
                parameter.fill_(1.0)
            elif name.endswith("casual_audio_encoder.weights"):
                parameter.fill_(0.01)
            else:
                fan_in = parameter[0].numel() if parameter.ndim > 1 else parameter.numel()
                std = 0.02 if name.endswith(("bias", "modulation", "padding_tokens", "mask.weight")) else fan_in**-0.5
                parameter.copy_(std * rng.normal(tuple(parameter.shape), "weights", seed, name))
