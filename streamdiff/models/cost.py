"""What a model costs: parameters, bytes and floating-point operations, in closed form.

State the ceiling first. Every number here is arithmetic on a configuration; the tests hold it against the real modules
on the meta device, and ``perf/`` holds measurements against it. A multiply-add counts as two operations.

Axes in formulas: L tokens of a chunk, M tokens attended to, S sink tokens, P prompt tokens, D width, F hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass

from streamdiff.config import AudioInjectionConfig, DiTConfig, EngineConfig


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _attention_parameters(dim: int) -> int:
    return 4 * _linear(dim, dim) + 2 * dim


def dit_parameters(config: DiTConfig) -> int:
    """Parameters of the DiT, audio path included."""
    D, patch = config.dim, config.patch[0] * config.patch[1] * config.patch[2]
    block = 2 * _attention_parameters(D) + _linear(D, config.ffn_dim) + _linear(config.ffn_dim, D) + 2 * D + 6 * D
    trunk = (
        _linear(config.in_dim * patch, D)
        + _linear(config.text_dim, D)
        + _linear(D, D)
        + _linear(config.freq_dim, D)
        + _linear(D, D)
        + _linear(D, 6 * D)
        + _linear(D, config.out_dim * patch)
        + 2 * D
    )
    total = config.num_layers * block + trunk
    return total if config.audio is None else total + _audio_parameters(config, config.audio)


def _audio_parameters(config: DiTConfig, audio: AudioInjectionConfig) -> int:
    D = config.dim
    patch = config.patch[0] * config.patch[1] * config.patch[2]
    injectors = len(audio.inject_layers) * (_attention_parameters(D) + _linear(D, 2 * D))
    encoder = _audio_encoder_parameters(config, audio)
    packer = sum(_linear(config.in_dim * volume, D) for volume in (4, 32, 256)) if config.packs_motion else 0
    return injectors + encoder + packer + _linear(config.cond_dim * patch, D) + 3 * D


def _audio_encoder_parameters(config: DiTConfig, audio: AudioInjectionConfig) -> int:
    D, E = config.dim, audio.feature_dim
    return (
        audio.num_features
        + _linear(3 * E, D // 4 * audio.num_tokens)
        + _linear(3 * E, D // 4)
        + _linear(3 * (D // 4), D // 2)
        + _linear(3 * (D // 2), D)
        + _linear(D, D)
        + D
    )


def sink_tokens(config: EngineConfig) -> int:
    """Tokens of the reference frame and of the packed motion prefix."""
    h, w = config.latent_hw
    packed = config.frame_tokens + (h // 4) * (w // 4) + 4 * (h // 8) * (w // 8)
    return config.frame_tokens + (packed if config.motion_latents else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFlops:
    """Operations of one chunk through one denoising step, once the prompt's keys and values are known."""

    linear: int
    """Projections and feed-forward of the trunk."""
    self_attention: int
    text_attention: int
    audio: int
    """Audio tokenizer, injector projections and their attention."""
    other: int
    """Patch embedding and head."""

    @property
    def total(self) -> int:
        return self.linear + self.self_attention + self.text_attention + self.audio + self.other


def step_flops(config: EngineConfig) -> StepFlops:
    """One chunk, one step, with the window full.

    The 14B preset at 704x384: 75.7 + 39.7 + 1.3 + 4.0 TFLOP.
    """
    dit = config.dit
    L, D, Z, F = config.chunk_tokens, dit.dim, dit.num_layers, dit.ffn_dim
    M = sink_tokens(config) + config.memory.window_chunks * L
    patch = dit.patch[0] * dit.patch[1] * dit.patch[2]
    # Per layer: q, k, v, o of self-attention, q and o towards the prompt, two of the feed-forward.
    linear = Z * 2 * L * (6 * D * D + 2 * D * F)
    return StepFlops(
        linear=linear,
        self_attention=Z * 4 * L * M * D,
        text_attention=Z * 4 * L * dit.text_len * D,
        audio=0 if dit.audio is None else _audio_flops(config, dit.audio),
        other=2 * L * D * patch * (dit.in_dim + dit.out_dim),
    )


def _audio_flops(config: EngineConfig, audio: AudioInjectionConfig) -> int:
    L, D, T = config.chunk_tokens, config.dit.dim, config.frames_per_chunk
    tokens = audio.num_tokens + 1
    injector = 2 * L * 2 * D * D + 4 * L * tokens * D + 2 * T * tokens * 2 * D * D + 2 * T * D * 2 * D
    frames = audio.motion_frames + config.video_frames_per_chunk
    half = (frames - 1) // 2 + 1
    quarter = (half - 1) // 2 + 1
    paths = audio.num_tokens + 1
    tokenizer = (
        paths * 2 * 3 * (frames * audio.feature_dim * (D // 4) + half * (D // 4) * (D // 2) + quarter * (D // 2) * D)
        + 2 * quarter * D * D
    )
    return len(audio.inject_layers) * injector + tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBytes:
    """Memory of one DiT rank."""

    weights: int
    history: int
    """Keys and values of the window and the sink, and the spill, for every step of the rank."""
    pristine_sink: int
    prompt: int
    """Keys and values of the prompt, in every layer."""
    activations: int
    """Largest set of intermediate tensors alive at once; an estimate, the only one in this module."""

    @property
    def total(self) -> int:
        return self.weights + self.history + self.pristine_sink + self.prompt + self.activations


MOST_PACKED_BYTES = 1 << 30
"""A model of at most so many bytes is kept a second time on a CPU, as its matrix products like it."""


def packed_bytes(config: DiTConfig, bytes_per_value: int) -> int:
    """What laying out the weights for a CPU takes beside them, at most; 0: they are too large for that."""
    weights = dit_parameters(config) * bytes_per_value
    return weights if weights <= MOST_PACKED_BYTES else 0


def rank_bytes(
    config: EngineConfig,
    *,
    num_steps: int,
    bytes_per_value: int,
    kept_layers: int | None = None,
    eight_bit_history: bool = False,
) -> RankBytes:
    """Memory of a rank that owns ``num_steps`` steps; 2 bytes per value for bfloat16, 4 for float32.

    ``kept_layers``: the layers between so many at each end serve their linears in eight bits; None: no layer does.
    ``eight_bit_history``: keys and values of every step lie in eight bits, with a float32 scale per layer and head.
    """
    dit = config.dit
    L, S = config.chunk_tokens, sink_tokens(config)
    kv_per_token = 2 * dit.num_layers * dit.dim * bytes_per_value
    remembered_per_token = 2 * dit.num_layers * dit.dim if eight_bit_history else kv_per_token
    scales = 2 * dit.num_layers * dit.num_heads * 4 if eight_bit_history else 0
    remembered = S + (config.memory.window_chunks + config.memory.slack_chunks) * L
    # A first chunk that is kept moves along: its keys are there once more, as they were written.
    first_keys = L * kv_per_token // 2 if config.memory.keeps_first else 0
    # The stream in float32, its normed copies in this layer and the next, a branch, and the hidden layer before and
    # after GELU.
    activations = L * (max(4, bytes_per_value) * dit.dim + bytes_per_value * (3 * dit.dim + 2 * dit.ffn_dim))
    weights = dit_parameters(dit) * bytes_per_value + _kept_in_float32(dit, bytes_per_value)
    return RankBytes(
        weights=weights - _saved_by_eight_bits(dit, bytes_per_value, kept_layers),
        history=num_steps * (remembered * remembered_per_token + first_keys + scales),
        pristine_sink=S * kv_per_token,
        prompt=max(dit.text_len * kv_per_token, _folded_prompt_values(dit) * bytes_per_value),
        activations=activations,
    )


def _kept_in_float32(config: DiTConfig, bytes_per_value: int) -> int:
    """What smaller weights take more when they are served: the encoder of sound, and embedding and head once more."""
    if bytes_per_value >= 4:
        return 0
    patch = config.patch[0] * config.patch[1] * config.patch[2]
    encoder = 0 if config.audio is None else _audio_encoder_parameters(config, config.audio)
    copies = _linear(config.in_dim * patch, config.dim) + _linear(config.dim, config.out_dim * patch)
    return encoder * (4 - bytes_per_value) + copies * 4


def _folded_prompt_values(config: DiTConfig) -> int:
    """The longest prompt that the default `StepOptions` fold: keys, and the values of all heads through the output."""
    folded = 64
    if config.head_dim < 64 or config.text_len <= folded:
        return 0
    return config.num_layers * folded * config.dim * (1 + config.num_heads)


def _saved_by_eight_bits(config: DiTConfig, bytes_per_value: int, kept_layers: int | None) -> int:
    """q, k, v and o of self-attention, q and o towards prompt and sound, and the feed-forward; one scale per output."""
    if kept_layers is None:
        return 0
    D, F = config.dim, config.ffn_dim
    between = range(kept_layers, config.num_layers - kept_layers)
    injected = 0 if config.audio is None else sum(z in between for z in config.audio.inject_layers)
    values = len(between) * (6 * D * D + 2 * D * F) + injected * 2 * D * D
    rows = len(between) * (7 * D + F) + injected * 2 * D
    return values * (bytes_per_value - 1) - rows * 4


def snapshot_bytes(config: EngineConfig, *, bytes_per_value: int, eight_bit_history: bool = False) -> int:
    """What a line that heals copies to the host for one chunk and one step: the chunk's keys and values, once.

    The 14B preset at 704x384 in bfloat16: 2.42 GiB, in eight bits half of that.
    """
    return (
        2 * config.dit.num_layers * config.chunk_tokens * config.dit.dim * (1 if eight_bit_history else bytes_per_value)
    )


def hop_bytes(config: EngineConfig) -> int:
    """What moves from rank to rank for one chunk: the latent and the sound's hidden states, float32."""
    h, w = config.latent_hw
    latent = config.dit.in_dim * config.frames_per_chunk * h * w
    audio = config.dit.audio
    heard = 0 if audio is None else audio.num_features * audio.feature_dim * config.video_frames_per_chunk
    return 4 * (latent + heard)
