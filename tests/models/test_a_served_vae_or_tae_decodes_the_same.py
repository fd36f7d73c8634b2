"""Serving a decoder changes how it runs, never what it computes."""

from __future__ import annotations

import pytest
import torch

from streamdiff.config import VAEConfig
from streamdiff.errors import ConfigError
from streamdiff.models import tae, vae
from streamdiff.models.served_decoder import ServedDecoder, pack_weights
from streamdiff.models.tae import TAEConfig, TAEDecoder
from streamdiff.models.vae import VAEDecoder, VideoDecoder


def decoder(which: str) -> VideoDecoder:
    if which == "vae":
        wan = VAEDecoder(VAEConfig(base_dim=8, num_res_blocks=1))
        vae.initialise(wan, seed=0)
        return wan.eval().requires_grad_(False)
    light = TAEDecoder(TAEConfig(widths=(16, 16, 8, 8)))
    tae.initialise(light, seed=0)
    return light.eval().requires_grad_(False)


def agrees(which: str, device: str, *, compile: bool, tolerance: float) -> None:
    """Two chunks, a rewind, and a chunk of another length, against the plain decoder."""
    plain = decoder(which).to(device)
    pack_weights(plain)
    served = ServedDecoder(decoder(which).to(device), compile=compile)
    generator = torch.Generator().manual_seed(0)
    chunks = [torch.randn(1, 16, T, 4, 6, generator=generator).to(device) for T in (2, 3, 3, 3, 1)]
    with torch.inference_mode():
        _, expected = plain.decode(chunks[0])
        _, state = served.decode(chunks[0])
        kept = state
        for turn in (chunks[1:3], chunks[3:]):  # The second turn starts from the same kept state.
            after, state = expected, kept
            for chunk in turn:
                wanted, after = plain.decode(chunk, after)
                found, state = served.decode(chunk, state)
                assert state.num_latents == after.num_latents
                assert (found - wanted).abs().max() <= tolerance
                for ours, theirs in zip(state.pasts, after.pasts, strict=True):
                    assert (ours - theirs).abs().max() <= tolerance * max(1.0, theirs.abs().max().item())


@pytest.mark.parametrize("which", ["vae", "tae"])
def test_on_a_cpu(which: str) -> None:
    agrees(which, "cpu", compile=False, tolerance=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["vae", "tae"])
def test_compiled(which: str) -> None:
    agrees(which, "cpu", compile=True, tolerance=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["vae", "tae"])
def test_a_replayed_graph_is_bit_equal_to_eager(which: str) -> None:
    agrees(which, "cuda", compile=False, tolerance=0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["vae", "tae"])
def test_a_stream_on_cuda_equals_the_whole(which: str) -> None:
    plain = decoder(which).to("cuda", torch.bfloat16)
    whole = torch.randn(1, 16, 6, 8, 6, device="cuda")
    with torch.inference_mode():
        expected, _ = plain.decode(whole)
        first, state = plain.decode(whole[:, :, :2])
        second, state = plain.decode(whole[:, :, 2:5], state)
        third, _ = plain.decode(whole[:, :, 5:], state)
    assert torch.equal(torch.cat([first, second, third], 2), expected)


def test_weights_are_packed_and_keep_their_values() -> None:
    plain, served = decoder("vae"), ServedDecoder(decoder("vae")).decoder
    for (name, theirs), ours in zip(plain.named_parameters(), served.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        if ours.dim() == 5:
            assert ours.is_contiguous(memory_format=torch.channels_last_3d)


def test_bad_input_is_still_told() -> None:
    with pytest.raises(ConfigError, match="latents must be"):
        ServedDecoder(decoder("tae")).decode(torch.zeros(1, 3, 1, 4, 4))
