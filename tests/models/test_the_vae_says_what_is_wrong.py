"""Bad input to the VAE is told in one line: what, why, what to do."""

from __future__ import annotations

import pytest
import torch

from streamdiff.config import VAEConfig
from streamdiff.errors import ConfigError
from streamdiff.models.vae import VAEDecoder, VAEEncoder, from_rgb8, to_rgb8

CONFIG = VAEConfig(base_dim=4, num_res_blocks=1)


@pytest.mark.parametrize("shape", [(16, 1, 4, 4), (1, 12, 1, 4, 4)])
def test_latents_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"latents must be \(streams, 16, frames, height, width\), got"):
        VAEDecoder(CONFIG).decode(torch.zeros(shape))


def test_no_latents() -> None:
    with pytest.raises(ConfigError, match="no latent frame to decode"):
        VAEDecoder(CONFIG).decode(torch.zeros(1, 16, 0, 4, 4))


def test_frames_without_colour() -> None:
    with pytest.raises(ConfigError, match=r"frames must be \(streams, 3, frames, height, width\)"):
        VAEEncoder(CONFIG).encode(torch.zeros(1, 1, 5, 32, 32))


@pytest.mark.parametrize(("height", "width"), [(36, 32), (32, 4), (0, 32)])
def test_a_picture_that_does_not_divide(height: int, width: int) -> None:
    with pytest.raises(ConfigError, match=f"positive multiples of 8, got {height}x{width}"):
        VAEEncoder(CONFIG).encode(torch.zeros(1, 3, 1, height, width))


def test_a_state_of_another_stream() -> None:
    decoder, encoder = VAEDecoder(CONFIG), VAEEncoder(CONFIG)
    state = decoder.initial_state(latent_h=4, latent_w=4)
    with pytest.raises(ConfigError, match=r"the state belongs to .* = \(1, 4, 4\), got \(1, 4, 5\)"):
        decoder.decode(torch.zeros(1, 16, 1, 4, 5), state)
    with pytest.raises(ConfigError, match="begin with state=None"):
        encoder.encode(torch.zeros(2, 3, 1, 32, 32), encoder.initial_state(height=32, width=32))


def test_an_odd_width_cannot_be_halved() -> None:
    with pytest.raises(ConfigError, match="base_dim must be even, got 5"):
        VAEDecoder(VAEConfig(base_dim=5, dim_mult=(1, 1), temporal_downsample=(True,)))


def test_a_level_without_blocks() -> None:
    with pytest.raises(ConfigError, match="at least one residual block, got 0"):
        VAEEncoder(VAEConfig(base_dim=4, num_res_blocks=0))


def test_every_level_of_rgb_survives_the_round_trip() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(2, 2, 8, 8, 1).expand(-1, -1, -1, -1, 3)
    frames = from_rgb8(levels)
    assert frames.shape == (2, 3, 2, 8, 8)
    assert frames.min() == -1.0
    assert frames.max() == 1.0
    back = to_rgb8(frames)
    assert back.dtype == torch.uint8
    assert back.is_contiguous()
    assert torch.equal(back, levels)
    assert torch.equal(to_rgb8(frames[0]), levels[0])
    # bfloat16 keeps 8 bits of a mantissa: half a level at most.
    assert (to_rgb8(frames.bfloat16()).int() - levels.int()).abs().max() <= 1


def test_rgb_out_of_range_is_clipped_not_wrapped() -> None:
    frames = torch.tensor([-1.5, -1.0, 1.0, 1.5]).reshape(1, 1, 1, 4).expand(3, -1, -1, -1)
    assert to_rgb8(frames)[0, 0, :, 0].tolist() == [0, 0, 255, 255]
