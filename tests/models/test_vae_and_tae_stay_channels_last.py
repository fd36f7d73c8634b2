"""Activations keep the channels-last layout from end to end: no convolution falls back to another one.

A layout lost once is lost for all that follows, and costs a tiny model half its speed. Axes of one element
leave strides open, which is where it gets lost: hence one stream and one latent frame.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from streamdiff.config import VAEConfig
from streamdiff.models import tae, vae
from streamdiff.models.tae import TAEConfig, TAEDecoder
from streamdiff.models.vae import VAEDecoder, VAEEncoder, VideoDecoder

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="on a CPU, only oneDNN keeps the layout"
)


def packed(x: Tensor) -> bool:
    """Whether the strides are those of a dense (F, H, W, C) or (B, T, H, W, C), axes of one included."""
    x = x.movedim(1, -1)
    expected = [1]
    for size in reversed(x.shape[1:]):
        expected.insert(0, expected[0] * size)
    return list(x.stride()) == expected


def watch(module: nn.Module) -> list[str]:
    """Collects the names of convolutions whose output is not packed."""
    unpacked: list[str] = []
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Conv3d)):

            def check(_layer: nn.Module, _inputs: object, output: Tensor, name: str = name) -> None:
                if not packed(output):
                    unpacked.append(name)

            layer.register_forward_hook(check)
    return unpacked


def decoders() -> list[VideoDecoder]:
    wan, light = VAEDecoder(VAEConfig(base_dim=8)), TAEDecoder(TAEConfig(widths=(16, 16, 8, 8)))
    vae.initialise(wan, seed=0)
    tae.initialise(light, seed=0)
    return [wan, light]


@pytest.mark.parametrize("num_streams", [1, 2])
@pytest.mark.parametrize("which", [0, 1], ids=["vae", "tae"])
def test_decoders(which: int, num_streams: int) -> None:
    decoder = decoders()[which]
    unpacked = watch(decoder)
    with torch.no_grad():
        _, state = decoder.decode(torch.randn(num_streams, 16, 1, 4, 6))
        _, state = decoder.decode(torch.randn(num_streams, 16, 2, 4, 6), state)
    assert unpacked == []
    assert all(packed(past) for past in state.pasts)


@pytest.mark.parametrize("num_streams", [1, 2])
def test_encoder(num_streams: int) -> None:
    encoder = VAEEncoder(VAEConfig(base_dim=8))
    unpacked = watch(encoder)
    with torch.no_grad():
        _, state = encoder.encode(torch.randn(num_streams, 3, 9, 32, 48))
    assert unpacked == []
    assert all(packed(past) for past in state.pasts)


def test_frames_become_rgb_without_a_transposition() -> None:
    with torch.no_grad():
        frames, _ = decoders()[0].decode(torch.randn(1, 16, 2, 4, 6))
    assert packed(frames)
