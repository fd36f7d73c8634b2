"""The light decoder has the names of the published ``taew2_1`` and computes what its architecture says."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from streamdiff.checkpoint import load_strict
from streamdiff.errors import CheckpointError, ConfigError
from streamdiff.models.tae import TAEConfig, TAEDecoder, initialise, tae_flops
from streamdiff.presets import wan21_vae


def published_shapes() -> dict[str, tuple[int, ...]]:
    """The decoder's 64 tensors in ``taew2_1.pth``, of 128 in the file."""
    shapes: dict[str, tuple[int, ...]] = {}

    def block(number: int, width: int) -> None:
        for place, in_dim in ((0, 2 * width), (2, width), (4, width)):
            shapes[f"decoder.{number}.conv.{place}.weight"] = (width, in_dim, 3, 3)
            shapes[f"decoder.{number}.conv.{place}.bias"] = (width,)

    shapes |= {"decoder.1.weight": (256, 16, 3, 3), "decoder.1.bias": (256,)}
    for number in (3, 4, 5):
        block(number, 256)
    shapes |= {"decoder.7.conv.weight": (256, 256, 1, 1), "decoder.8.weight": (128, 256, 3, 3)}
    for number in (9, 10, 11):
        block(number, 128)
    shapes |= {"decoder.13.conv.weight": (256, 128, 1, 1), "decoder.14.weight": (64, 128, 3, 3)}
    for number in (15, 16, 17):
        block(number, 64)
    shapes |= {"decoder.19.conv.weight": (128, 64, 1, 1), "decoder.20.weight": (64, 64, 3, 3)}
    shapes |= {"decoder.22.weight": (3, 64, 3, 3), "decoder.22.bias": (3,)}
    return shapes


def by_the_book(weights: Mapping[str, Tensor], latents_BCTHW: Tensor) -> Tensor:
    """The published architecture on a whole video at once, layer by layer in its published order."""
    w = {name.removeprefix("decoder."): tensor for name, tensor in weights.items()}
    B = latents_BCTHW.shape[0]

    def conv(x_FCHW: Tensor, name: str) -> Tensor:
        kernel = w[f"{name}.weight"]
        return F.conv2d(x_FCHW, kernel, w.get(f"{name}.bias"), padding=kernel.shape[-1] // 2)

    def block(x_FCHW: Tensor, number: int) -> Tensor:
        x_BTCHW = x_FCHW.unflatten(0, (B, -1))
        past_BTCHW = torch.cat([torch.zeros_like(x_BTCHW[:, :1]), x_BTCHW[:, :-1]], 1)
        y = torch.cat([x_FCHW, past_BTCHW.flatten(0, 1)], 1)
        y = conv(y, f"{number}.conv.0").relu()
        y = conv(y, f"{number}.conv.2").relu()
        return (conv(y, f"{number}.conv.4") + x_FCHW).relu()

    x = latents_BCTHW.transpose(1, 2).flatten(0, 1)
    x = conv(3 * torch.tanh(x / 3), "1").relu()
    for first, out in ((3, 8), (9, 14), (15, 20)):
        for number in range(first, first + 3):
            x = block(x, number)
        x = x.repeat_interleave(2, -2).repeat_interleave(2, -1)
        width = x.shape[1]
        x = conv(x, f"{first + 4}.conv")
        x = x.reshape(-1, width, *x.shape[2:])
        x = conv(x, str(out))
    frames_BTCHW = conv(x.relu(), "22").clamp(0, 1).unflatten(0, (B, -1))
    return frames_BTCHW[:, 3:].transpose(1, 2) * 2 - 1


def test_names_and_shapes_are_the_published_ones() -> None:
    with torch.device("meta"):
        decoder = TAEDecoder(TAEConfig())
    assert {name: tuple(t.shape) for name, t in decoder.state_dict().items()} == published_shapes()
    assert len(published_shapes()) == 64
    assert all(name.startswith(decoder.official_prefixes) for name in decoder.state_dict())


def test_a_published_file_loads_strictly() -> None:
    decoder = TAEDecoder(TAEConfig())
    weights = {name: torch.randn(shape) for name, shape in published_shapes().items()}
    load_strict(decoder, weights, what="taew2_1")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in decoder.state_dict().items())
    del weights["decoder.22.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing: decoder\.22\.bias"):
        load_strict(decoder, weights, what="taew2_1")


@pytest.mark.parametrize(("num_streams", "num_latents", "size"), [(1, 4, (5, 7)), (2, 3, (2, 3))])
def test_it_computes_the_published_architecture(num_streams: int, num_latents: int, size: tuple[int, int]) -> None:
    decoder = TAEDecoder(TAEConfig(widths=(48, 32, 16, 16)))
    initialise(decoder, seed=4)
    with torch.no_grad():
        latents = torch.randn(num_streams, 16, num_latents, *size)
        found, _ = decoder.decode(latents)
        weights = {name: tensor.double() for name, tensor in decoder.state_dict().items()}
        expected = by_the_book(weights, latents.double())
    assert found.shape == expected.shape == (num_streams, 3, 4 * num_latents - 3, 8 * size[0], 8 * size[1])
    assert expected.std() > 0.05
    assert (found - expected).abs().max() <= 1e-5


def test_weights_that_expect_the_scale_of_the_vae() -> None:
    """``lighttaew2_1`` undoes the normalisation of latents; ``taew2_1`` takes them as the DiT leaves them."""
    statistics = {"latent_mean": wan21_vae().latent_mean, "latent_std": wan21_vae().latent_std}
    plain = TAEDecoder(TAEConfig(widths=(16, 16, 8, 8)))
    scaled = TAEDecoder(TAEConfig(widths=(16, 16, 8, 8), **statistics))
    initialise(plain, seed=1)
    initialise(scaled, seed=1)
    latents = torch.randn(1, 16, 2, 3, 3)
    mean, std = (torch.tensor(values).view(1, 16, 1, 1, 1) for values in statistics.values())
    with torch.no_grad():
        assert torch.equal(scaled.decode(latents)[0], plain.decode(latents * std + mean)[0])
        assert not torch.equal(scaled.decode(latents)[0], plain.decode(latents)[0])


@pytest.mark.parametrize(
    "config",
    [
        TAEConfig(),
        TAEConfig(widths=(12, 10, 8), num_blocks=1, temporal_upsample=(True, True)),
    ],
    ids=["taew2_1", "two-levels"],
)
@pytest.mark.parametrize("first", [True, False])
def test_it_costs_what_it_says(config: TAEConfig, first: bool) -> None:
    with torch.device("meta"):
        decoder = TAEDecoder(config)
        latent = torch.empty(1, config.z_dim, 1, 48, 88)
    state = decoder.initial_state(latent_h=48, latent_w=88)
    with FlopCounterMode(display=False) as counter:
        frames, pasts = decoder.decode_one(latent, state.pasts, first=first)
    assert counter.get_total_flops() == tae_flops(config, 48, 88)
    side = config.spatial_factor
    assert frames.shape == (1, 3, 1 if first else config.temporal_factor, 48 * side, 88 * side)
    assert [past.shape for past in pasts] == [past.shape for past in state.pasts]


def test_a_wrong_shape_is_told() -> None:
    with pytest.raises(ConfigError, match="one temporal_upsample flag stands between two widths: expected 2"):
        TAEConfig(widths=(16, 8, 8))
    with pytest.raises(ConfigError, match=r"latent_mean must have one value per latent channel \(16\), got 2"):
        TAEConfig(latent_mean=(0.0, 1.0))
    with pytest.raises(ConfigError, match="must be positive"):
        TAEConfig(num_blocks=0)
    with pytest.raises(ConfigError, match=r"latents must be \(streams, 16, frames, height, width\)"):
        TAEDecoder(TAEConfig(widths=(8, 8, 8, 8))).decode(torch.zeros(1, 8, 1, 2, 2))
