"""One forward of the causal S2V DiT as the published code runs it: eagerly, everything anew every time.

The yardstick of `perf/bench_reference.py`. Same weights and same result as our step, with the published order of work
(Live Avatar, ``causal_model_s2v.py``):

- the prompt's embedding, keys and values, the sound's tokens and the time embedding are computed in every forward;
- scale, shift and gate are repeated for every token in float32 before they are used;
- rotary tables are complex128, built for every forward; queries, keys and the whole sink turn in complex128 per layer;
- keys and values of ring and sink are concatenated in every layer.

Attention itself is torch's, in both. ``wide`` is the most exact reading of this arithmetic with rounded weights: sums
of the residual stream promoted to float32 by their gates, as under autocast, and time embedding, head and encoder of
sound in float32. It is for comparing exactness; what is timed is rounded to the type of the weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from streamdiff.models.dit import Attention, CausalDiT


def complex_table(times: list[int], rows: int, columns: int, pairs: tuple[int, int, int]) -> Tensor:
    """Unit complex numbers ``[L, 1, F]``, complex128."""
    axes = []
    for positions, count, shape in (
        (times, pairs[0], (-1, 1, 1)),
        (range(rows), pairs[1], (1, -1, 1)),
        (range(columns), pairs[2], (1, 1, -1)),
    ):
        frequency = 1.0 / torch.pow(10000, torch.arange(count, dtype=torch.float64) / count)
        angles = torch.outer(torch.tensor(list(positions), dtype=torch.float64), frequency)
        table = torch.polar(torch.ones_like(angles), angles).view(*shape, count)
        axes.append(table.expand(len(times), rows, columns, count))
    return torch.cat(axes, dim=-1).reshape(len(times) * rows * columns, 1, -1)


def turn(x_BLNK: Tensor, table_L1F: Tensor) -> Tensor:
    """Rotary turn in complex128."""
    pairs = torch.view_as_complex(x_BLNK.to(torch.float64).unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * table_L1F).flatten(-2).float()


class PublishedStep:
    """History and forward of one step in the published manner."""

    def __init__(
        self, dit: CausalDiT, *, window_tokens: int, sink_keys: Tensor, sink_values: Tensor, wide: bool = False
    ) -> None:
        config = dit.config
        self.stream = torch.float32 if wide else dit.dtype
        _, B, _, N, K = sink_keys.shape
        self.dit = dit
        self.keys = [torch.zeros(B, window_tokens, N, K, dtype=dit.dtype) for _ in range(config.num_layers)]
        self.values = [torch.zeros(B, window_tokens, N, K, dtype=dit.dtype) for _ in range(config.num_layers)]
        self.sink_keys, self.sink_values = sink_keys, sink_values

    @torch.no_grad()
    def __call__(
        self,
        latent: Tensor,
        sigma: float,
        text: Tensor,
        audio: Tensor,
        *,
        chunk: int,
        sink_tables: Tensor,
    ) -> Tensor:
        """Velocity of one chunk; ``sink_tables`` is the sink's complex rotation at this chunk, ``[S, 1, F]``."""
        dit = self.dit
        config = dit.config
        assert config.audio is not None
        _, _, T, H, W = latent.shape
        rows, columns = H // 2, W // 2
        # Sound.
        padded = torch.cat([audio[..., :1].repeat(1, 1, 1, config.audio.motion_frames), audio], dim=-1)
        global_BTD, local_BTAD = (
            x.to(dit.dtype) for x in _in_type(dit.casual_audio_encoder, self.stream, padded.to(self.stream))
        )
        skip = (config.audio.motion_frames + 3) // 4
        global_BTD, tokens = global_BTD[:, skip:].clone(), local_BTAD[:, skip:]
        # Video tokens and their tables.
        x = dit.patch_embedding(latent.to(dit.dtype))
        x = x + dit.cond_encoder(torch.zeros_like(latent).to(dit.dtype))
        x = x.flatten(2).transpose(1, 2)
        L = x.shape[1]
        table = complex_table(list(range(chunk * T, (chunk + 1) * T)), rows, columns, config.rotary_pairs)
        x = (x + dit.trainable_cond_mask(torch.zeros(1, L, dtype=torch.long)).to(x.dtype)).to(self.stream)
        # Time: one embedding per latent frame, repeated for every token.
        half = config.freq_dim // 2
        angles = torch.outer(
            torch.full((T,), 1000 * sigma, dtype=torch.float64),
            torch.pow(10000, -torch.arange(half, dtype=torch.float64) / half),
        )
        wave = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.stream)
        e = _in_type(dit.time_embedding, self.stream, wave)
        e0 = _in_type(dit.time_projection, self.stream, e).float().view(1, T, 6, config.dim)
        # Prompt.
        context = F.pad(text, (0, 0, 0, config.text_len - text.shape[1]))
        context = dit.text_embedding(context.to(dit.dtype))
        for z, block in enumerate(dit.blocks):
            modulated = (block.modulation.float().unsqueeze(1) + e0).chunk(6, dim=2)
            per_token = [m.squeeze(2).repeat_interleave(L // T, dim=1) for m in modulated]
            h = F.layer_norm(x.float(), (config.dim,), eps=config.eps) * (1 + per_token[1]) + per_token[0]
            x = x + (
                self._self_attention(z, block.self_attn, h.to(dit.dtype), table, sink_tables, chunk) * per_token[2]
            )
            x = x.to(self.stream)
            x = x + _cross_attention(block.cross_attn, _in_type(block.norm3, self.stream, x).to(dit.dtype), context)
            h = F.layer_norm(x.float(), (config.dim,), eps=config.eps) * (1 + per_token[4]) + per_token[3]
            x = (x + block.ffn(h.to(dit.dtype)) * per_token[5]).to(self.stream)
            if z in dit.injector_of:
                j = dit.injector_of[z]
                frames = x.clone().unflatten(1, (T, -1)).flatten(0, 1)
                shift, scale = (
                    dit.audio_injector.injector_adain_layers[j].linear(F.silu(global_BTD[0])).chunk(2, dim=-1)
                )
                normed = F.layer_norm(frames, (config.dim,), eps=1e-5) * (1 + scale[:, None]) + shift[:, None]
                heard = _cross_attention(dit.audio_injector.injector[j], normed.to(dit.dtype), tokens.flatten(0, 1))
                x = x + heard.reshape_as(x)
        em = (dit.head.modulation.float() + e.float().unsqueeze(1)).chunk(2, dim=1)
        normed = F.layer_norm(x.float(), (config.dim,), eps=config.eps).unflatten(1, (T, -1))
        h = (normed * (1 + em[1].unsqueeze(0)) + em[0].unsqueeze(0)).flatten(1, 2)
        return dit.unpatchify(_in_type(dit.head.head, self.stream, h.to(self.stream)), T, H, W)

    def _self_attention(
        self, z: int, attention: Attention, h: Tensor, table: Tensor, sink_tables: Tensor, chunk: int
    ) -> Tensor:
        q, k, v = attention.query(h), attention.key(h), attention.value(h)
        q, k = turn(q, table).to(v.dtype), turn(k, table).to(v.dtype)
        size, L = self.keys[z].shape[1], k.shape[1]
        start = chunk * L % size
        filled = min(size, (chunk + 1) * L)
        self.keys[z][:, start : start + L] = k
        self.values[z][:, start : start + L] = v
        keys = torch.cat([self.keys[z][:, :filled], turn(self.sink_keys[z], sink_tables).to(v.dtype)], dim=1)
        values = torch.cat([self.values[z][:, :filled], self.sink_values[z]], dim=1)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2))
        return attention.o(y.transpose(1, 2).flatten(2))


def _in_type(module: nn.Module, dtype: torch.dtype, x: Tensor) -> Any:
    """A module's answer with its weights in this type."""
    if next(module.parameters()).dtype == dtype:
        return module(x)
    return functional_call(module, {name: p.to(dtype) for name, p in module.named_parameters()}, (x,))


def _cross_attention(attention: Attention, x: Tensor, context: Tensor) -> Tensor:
    q, k, v = attention.query(x), attention.key(context), attention.value(context)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return attention.o(y.transpose(1, 2).flatten(2))
