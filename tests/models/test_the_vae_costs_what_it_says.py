"""Closed forms of FLOPs, bytes and state hold on the real modules, without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from streamdiff.config import VAEConfig
from streamdiff.models.vae import VAEDecoder, VAEEncoder
from streamdiff.models.vae_cost import vae_bytes, vae_flops

CONFIGS = [
    VAEConfig(),
    VAEConfig(base_dim=8, num_res_blocks=1),
    VAEConfig(base_dim=10, dim_mult=(1, 2, 3), temporal_downsample=(True, False)),
]


@pytest.mark.heavy
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("config", CONFIGS, ids=["wan21", "shallow", "three-levels"])
def test_decoder(config: VAEConfig, first: bool) -> None:
    with torch.device("meta"):
        decoder = VAEDecoder(config)
        latent = torch.empty(1, config.z_dim, 1, 48, 88)
    state = decoder.initial_state(latent_h=48, latent_w=88)
    with FlopCounterMode(display=False) as counter:
        frames, pasts = decoder.decode_one(latent, state.pasts, first=first)
    assert counter.get_total_flops() == vae_flops(config, "decoder", 48, 88, first=first)
    factor = config.spatial_factor
    assert frames.shape == (1, 3, 1 if first else config.temporal_factor, 48 * factor, 88 * factor)
    assert [past.shape for past in pasts] == [past.shape for past in state.pasts]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("config", CONFIGS, ids=["wan21", "shallow", "three-levels"])
def test_encoder(config: VAEConfig, first: bool) -> None:
    factor = config.spatial_factor
    with torch.device("meta"):
        encoder = VAEEncoder(config)
        frames = torch.empty(1, 3, 1 if first else config.temporal_factor, 48 * factor, 88 * factor)
    state = encoder.initial_state(height=48 * factor, width=88 * factor)
    with FlopCounterMode(display=False) as counter:
        latent, pasts = encoder.encode_one(frames, state.pasts, first=first)
    assert counter.get_total_flops() == vae_flops(config, "encoder", 48, 88, first=first)
    assert latent.shape == (1, config.z_dim, 1, 48, 88)
    assert [past.shape for past in pasts] == [past.shape for past in state.pasts]


def test_a_chunk_of_the_published_decoder_takes_27_teraflop() -> None:
    """The figure counted on the published module (704x384, 12 frames)."""
    assert 3 * vae_flops(VAEConfig(), "decoder", 88, 48) == pytest.approx(27.4e12, rel=0.01)


def test_traffic_covers_weights_input_and_output() -> None:
    config = VAEConfig()
    with torch.device("meta"):
        decoder = VAEDecoder(config)
    gammas = sum(p.numel() for name, p in decoder.named_parameters() if name.endswith("gamma"))
    weights = sum(p.numel() for p in decoder.parameters()) - gammas
    # A frame of one pixel costs little but weights; a large one in proportion to its pixels.
    small = vae_bytes(config, "decoder", 1, 1, element_bytes=1)
    assert weights < small < weights + 64 * (8 + 4) * 96 * 40
    large = vae_bytes(config, "decoder", 48, 88) - vae_bytes(config, "decoder", 24, 88)
    assert large == vae_bytes(config, "decoder", 96, 88) - vae_bytes(config, "decoder", 72, 88)


def test_modules_hold_weights_only() -> None:
    """No buffers: `to_empty` and a cast to bfloat16 must find nothing to spoil."""
    for module in (VAEDecoder(VAEConfig(base_dim=4)), VAEEncoder(VAEConfig(base_dim=4))):
        assert list(module.buffers()) == []
