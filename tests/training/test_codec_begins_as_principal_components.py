"""The codec that projects patches: folding is exact, its start is the best linear code, it streams, and it learns."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from streamdiff import presets, rng
from streamdiff.config import VAEConfig
from streamdiff.errors import CheckpointError, ConfigError
from streamdiff.models.vae import VAEDecoder, fold, unfold
from streamdiff.training.codec import (
    Codec,
    attention_map,
    codec_loss,
    load_codec,
    principal_start,
    save_codec,
    visibility,
)

_CONFIG = VAEConfig(
    base_dim=16,
    z_dim=6,
    dim_mult=(1,),
    num_res_blocks=1,
    temporal_downsample=(),
    patch=4,
    patch_frames=2,
    projects=True,
)


def _films(num: int, frames: int = 5) -> Tensor:
    """Soft patterns that move: smooth enough for few components, [B, 3, T, 16, 16] in -1..1."""
    axis = torch.arange(16, dtype=torch.float32)
    films: list[Tensor] = []
    for i in range(num):
        phase = rng.normal((3, 3), "film", i)
        t = torch.arange(frames, dtype=torch.float32)[:, None, None]
        films.append(
            torch.stack(
                [
                    torch.sin(0.3 * axis[None, :, None] + 0.4 * t + phase[c, 0])
                    * torch.cos(0.25 * axis[None, None, :] + phase[c, 1])
                    * 0.8
                    for c in range(3)
                ]
            )
        )
    return torch.stack(films)


def test_folding_loses_nothing_and_counts_its_channels() -> None:
    x = rng.normal((2, 3, 4, 8, 12), "fold")
    folded = fold(x, _CONFIG)
    assert folded.shape == (2, _CONFIG.patch_channels, 2, 2, 3)
    assert torch.equal(unfold(folded, _CONFIG, first=False), x)
    still = fold(x[:, :, :1], _CONFIG)
    assert torch.equal(unfold(still, _CONFIG, first=True), x[:, :, :1])
    assert torch.equal(fold(x, VAEConfig()), x)


def test_a_pixels_column_varies_slower_than_its_row() -> None:
    """The order of Wan2.2's patches: column offset, then row offset."""
    config = dataclasses.replace(VAEConfig(), patch=2)
    x = torch.arange(4.0).view(1, 1, 1, 2, 2).expand(1, 3, 1, 2, 2)
    assert fold(x, config)[0, :4, 0, 0, 0].tolist() == [0.0, 2.0, 1.0, 3.0]


def test_the_start_is_as_good_as_the_best_linear_code() -> None:
    codec = Codec(_CONFIG).eval()
    films = _films(24)
    with torch.no_grad():
        principal_start(codec, films)
        drawn = codec.decode(codec.posterior(films)[0])
    patches = fold(films[:, :, 1:], _CONFIG).movedim(1, -1).flatten(0, 3)
    weight = attention_map(16).unflatten(1, (-1, 4)).unflatten(0, (-1, 4)).mean((1, 3)).flatten()
    weight = weight.repeat(len(patches) // len(weight)).unsqueeze(1)
    mean = (weight * patches).sum(0) / weight.sum()
    _, _, basis = torch.linalg.svd((patches - mean) * weight.sqrt(), full_matrices=False)
    best = (patches - mean) @ basis[:6].T @ basis[:6] + mean
    mine = fold(drawn[:, :, 1:], _CONFIG).movedim(1, -1).flatten(0, 3)
    assert torch.allclose(mine, best, atol=2e-4)


def test_latents_of_the_start_have_unit_variance_together() -> None:
    codec = Codec(_CONFIG)
    with torch.no_grad():
        principal_start(codec, _films(24))
        mean, _ = codec.posterior(_films(24))
    assert 0.6 < float(mean[:, :, 1:].var()) < 1.6


def test_training_and_streaming_see_the_same_pictures(tmp_path: Path) -> None:
    codec = Codec(_CONFIG, seed=3).eval()
    with torch.no_grad():
        principal_start(codec, _films(8))
        for half in (codec.enc, codec.dec):
            for name, weight in half.named_parameters():
                weight.add_(0.02 * rng.normal(tuple(weight.shape), "move", name))
        films = _films(2, frames=9)
        whole = codec.posterior(films)[0]
        first, state = codec.enc.encode(films[:, :, :4])
        rest, _ = codec.enc.encode(films[:, :, 4:], state)
        assert torch.allclose(torch.cat([first, rest], 2), whole, atol=1e-5)
        drawn = codec.decode(whole).clamp(-1, 1)
        streamed, after = codec.dec.decode(whole[:, :, :2])
        more, _ = codec.dec.decode(whole[:, :, 2:], after)
        assert torch.allclose(torch.cat([streamed, more], 2), drawn, atol=1e-5)
        assert drawn.shape == films.shape

        path = tmp_path / "codec.safetensors"
        save_codec(codec, path, facts={"steps": 0})
        again = load_codec(path, _CONFIG)
        assert torch.allclose(again.posterior(films)[0], whole, atol=2e-2)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_codec(path, dataclasses.replace(_CONFIG, z_dim=8))


@pytest.mark.slow
def test_it_learns_beyond_its_start() -> None:
    codec = Codec(_CONFIG)
    films = _films(6)
    before = principal_start(codec, films)
    optimiser = torch.optim.AdamW(codec.parameters(), lr=2e-3)
    psnr = 0.0
    for step in range(60):
        noise = rng.normal((6, 6, 3, 4, 4), "noise", step)
        loss, facts = codec_loss(codec, films, noise)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        psnr = facts["psnr_db"]
    assert psnr > before + 2


def test_components_need_a_codec_that_projects() -> None:
    with pytest.raises(ConfigError, match="projects=True"):
        principal_start(Codec(VAEConfig(base_dim=8, num_res_blocks=1)), torch.zeros(1, 3, 5, 64, 64))


def test_the_portrait_preset_squeezes_as_it_says() -> None:
    vae = presets.portrait().vae
    assert (vae.spatial_factor, vae.temporal_factor, vae.patch_channels) == (16, 4, 3072)
    state = VAEDecoder(vae).initial_state(latent_h=8, latent_w=8)
    assert state.bytes < 2**20


def test_what_flickers_costs_more_than_what_is_a_little_off() -> None:
    class Off(Codec):
        def decode(self, latents_BCTHW: Tensor) -> Tensor:
            return films + error

    films, codec = _films(2), Off(_CONFIG)
    noise = torch.zeros_like(codec.posterior(films)[0])
    losses: list[float] = []
    for sign in (1.0, -1.0):
        error = 0.05 * torch.tensor([1.0, sign, 1.0, sign, 1.0]).view(1, 1, 5, 1, 1).expand_as(films)
        loss, facts = codec_loss(codec, films, noise)
        losses.append(float(loss.detach()))
        # Every second step crosses into another latent frame, and counts three times.
        assert facts["motion"] == pytest.approx(0.0 if sign > 0 else 2 * facts["pixels"] * 2, abs=1e-6)
    assert losses[1] > losses[0] + 0.05


def test_first_components_are_seen_most() -> None:
    codec, films = Codec(_CONFIG).eval(), _films(24)
    with torch.no_grad():
        principal_start(codec, films)
        seen_C = visibility(codec, codec.posterior(films[:4])[0])
    torch.testing.assert_close(seen_C.square().mean(), torch.tensor(1.0))
    assert seen_C.argmax() == 0
    assert seen_C[0] > 2 * seen_C[-1]
