"""The VAE computes what diffusers' AutoencoderKLWan computes, under the names of the published file."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from torch import Tensor

from streamdiff.checkpoint import load_strict
from streamdiff.config import VAEConfig
from streamdiff.models.vae import VAEDecoder, VAEEncoder, official_name
from streamdiff.presets import wan21_vae


def published(config: VAEConfig, *, seed: int) -> AutoencoderKLWan:
    torch.manual_seed(seed)
    model = AutoencoderKLWan(
        base_dim=config.base_dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temporal_downsample),
    ).eval()
    with torch.no_grad():  # every bias and norm must matter
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def halves(config: VAEConfig, model: AutoencoderKLWan) -> tuple[VAEEncoder, VAEDecoder]:
    weights = {
        official_name(name, num_res_blocks=config.num_res_blocks): tensor for name, tensor in model.state_dict().items()
    }
    encoder, decoder = VAEEncoder(config), VAEDecoder(config)
    for half in (encoder, decoder):
        own = {name: tensor for name, tensor in weights.items() if name.startswith(half.official_prefixes)}
        load_strict(half, own, what="AutoencoderKLWan")
    return encoder, decoder


def statistics(config: VAEConfig) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(config.latent_mean or (0.0,) * config.z_dim)
    std = torch.tensor(config.latent_std or (1.0,) * config.z_dim)
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


def compare(config: VAEConfig, *, height: int, width: int, num_latents: int, num_streams: int) -> None:
    model = published(config, seed=height + width)
    encoder, decoder = halves(config, model)
    mean, std = statistics(config)
    factor = config.spatial_factor
    num_frames = 1 + config.temporal_factor * (num_latents - 1)
    with torch.no_grad():
        frames = torch.rand(num_streams, 3, num_frames, height, width) * 2 - 1
        expected = (model.encode(frames).latent_dist.mode() - mean) / std
        found, _ = encoder.encode(frames)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 1e-5

        latents = torch.randn(num_streams, config.z_dim, num_latents, height // factor, width // factor)
        expected = model.decode(latents * std + mean).sample
        found, _ = decoder.decode(latents)
        assert found.shape == expected.shape == frames.shape
        assert expected.std() > 0.05  # neither grey nor saturated: the comparison means something
        assert (found - expected).abs().max() <= 1e-5


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("height", "width", "num_latents", "num_streams"), [(16, 16, 1, 1), (40, 72, 4, 1), (88, 24, 3, 2)]
)
def test_the_published_shape_at_an_eighth_of_its_width(
    height: int, width: int, num_latents: int, num_streams: int
) -> None:
    config = VAEConfig(base_dim=12, latent_mean=wan21_vae().latent_mean, latent_std=wan21_vae().latent_std)
    compare(config, height=height, width=width, num_latents=num_latents, num_streams=num_streams)


@pytest.mark.parametrize(
    "config",
    [
        VAEConfig(base_dim=8, num_res_blocks=1),
        VAEConfig(base_dim=6, num_res_blocks=3, z_dim=4, dim_mult=(1, 3), temporal_downsample=(True,)),
        VAEConfig(base_dim=8, dim_mult=(2, 1, 3), temporal_downsample=(True, False)),
    ],
    ids=["shallow", "two-levels", "three-levels"],
)
def test_other_shapes(config: VAEConfig) -> None:
    if config.temporal_factor == 4:
        compare(config, height=24, width=40, num_latents=3, num_streams=1)
        return
    # diffusers encodes four frames at a time whatever the factor, so only its decoder can be compared.
    model = published(config, seed=3)
    _, decoder = halves(config, model)
    latents = torch.randn(1, config.z_dim, 3, 5, 7)
    with torch.no_grad():
        assert (decoder.decode(latents)[0] - model.decode(latents).sample).abs().max() <= 1e-5


@pytest.mark.slow
def test_the_published_width() -> None:
    compare(wan21_vae(), height=48, width=80, num_latents=2, num_streams=1)


def test_latent_statistics_are_the_published_ones() -> None:
    config = AutoencoderKLWan(base_dim=4).config
    assert wan21_vae().latent_mean == tuple(config["latents_mean"])
    assert wan21_vae().latent_std == tuple(config["latents_std"])


def test_names_map_one_to_one_and_agree_with_diffusers_own_map() -> None:
    with torch.device("meta"):
        theirs = AutoencoderKLWan().state_dict()
        ours = VAEEncoder(VAEConfig()).state_dict() | VAEDecoder(VAEConfig()).state_dict()
    renamed = {official_name(name): name for name in theirs}
    assert len(renamed) == len(theirs) == 194
    assert renamed.keys() == ours.keys()
    # diffusers reads the published file with a map of its own, in the other direction.
    assert convert_wan_vae_to_diffusers({name: name for name in ours}) == {
        name: official for official, name in renamed.items()
    }
    assert {name: tuple(theirs[old].shape) for name, old in renamed.items()} == {
        name: tuple(tensor.shape) for name, tensor in ours.items()
    }


def test_official_and_foreign_names_stay() -> None:
    with torch.device("meta"):
        ours = [*VAEEncoder(VAEConfig()).state_dict(), *VAEDecoder(VAEConfig()).state_dict()]
    for name in (*ours, "decoder.up_blocks.0.resnets.0.norm9.gamma", "ema.step", "conv_in", ""):
        assert official_name(name) == name


def test_each_half_has_only_its_own_tensors() -> None:
    with torch.device("meta"):
        encoder, decoder = VAEEncoder(VAEConfig()), VAEDecoder(VAEConfig())
    assert all(name.startswith(encoder.official_prefixes) for name in encoder.state_dict())
    assert all(name.startswith(decoder.official_prefixes) for name in decoder.state_dict())
    assert not encoder.state_dict().keys() & decoder.state_dict().keys()
    assert sum(p.numel() for p in encoder.parameters()) == 53_596_928
    assert sum(p.numel() for p in decoder.parameters()) == 73_295_603
