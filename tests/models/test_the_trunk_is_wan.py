"""The trunk without audio computes what diffusers' Wan transformer computes."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel

from streamdiff.checkpoint import load_strict, official_dit_name
from streamdiff.config import DiTConfig
from streamdiff.models.dit import CausalDiT


def published(config: DiTConfig, seed: int) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        patch_size=config.patch,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_dim,
        out_channels=config.out_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=config.eps,
        rope_max_seq_len=64,
    ).eval()
    with torch.no_grad():  # every bias and norm must matter
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("heads", "width", "layers", "size", "seed"),
    [(2, 16, 1, (1, 4, 4), 0), (3, 22, 2, (3, 6, 10), 1), (4, 32, 3, (5, 8, 2), 2)],
)
def test_velocity_equals_diffusers(heads: int, width: int, layers: int, size: tuple[int, int, int], seed: int) -> None:
    config = DiTConfig(
        dim=heads * width,
        ffn_dim=96,
        num_heads=heads,
        num_layers=layers,
        text_dim=24,
        text_len=9,
        freq_dim=32,
    )
    theirs = published(config, seed)
    ours = CausalDiT(config)
    load_strict(ours, {official_dit_name(k): v for k, v in theirs.state_dict().items()}, what="diffusers model")
    latent = torch.randn(2, 16, *size)
    prompt = torch.randn(2, 5, 24)
    sigma = 0.6
    with torch.no_grad():
        padded = torch.nn.functional.pad(prompt, (0, 0, 0, 4))
        expected = theirs(latent, torch.full((2,), 1000 * sigma), padded, return_dict=False)[0]
        found = ours(
            latent,
            ours.modulation(sigma),
            ours.text_condition(prompt),
            ours.frame_rotation(range(size[0]), size[1:]),
        )
    assert ((found - expected).abs().max() / expected.abs().max()).item() <= 1e-5
