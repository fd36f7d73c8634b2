"""Decoded frames leave the device as uint8, the same bits as the decoder's, and through memory that copies fast."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from streamdiff import presets
from streamdiff.config import VAEConfig
from streamdiff.models import vae
from streamdiff.models.served.decoder import ServedDecoder
from streamdiff.models.vae import VAEDecoder, to_rgb8
from streamdiff.pipeline.decode import PRIMING_LATENTS, DecodeStage
from streamdiff.pipeline.packet import Packet, SetReference

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)
CONFIG = dataclasses.replace(
    presets.tiny(), vae=VAEConfig(base_dim=4, num_res_blocks=1), height=64, width=64, motion_latents=0
)


@pytest.mark.heavy
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_served_and_warmed_decoder_gives_the_plain_ones_bytes(device: str) -> None:
    decoder = VAEDecoder(CONFIG.vae)
    vae.initialise(decoder, seed=0)
    decoder = decoder.to(device).eval().requires_grad_(False)
    stage = DecodeStage(ServedDecoder(decoder), CONFIG)
    stage.warm()
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(1, 16, 1, *CONFIG.latent_hw, generator=generator)
    latents = [torch.randn(1, 16, 3, *CONFIG.latent_hw, generator=generator).to(device) for _ in range(3)]
    with torch.inference_mode():
        _, state = decoder.decode(reference.expand(-1, -1, PRIMING_LATENTS, -1, -1).to(device))
        for chunk, latent in enumerate(latents):
            commands = (SetReference(reference, None),) if chunk == 0 else ()
            packet = Packet(chunk=chunk, epoch=0, lead=4, latent_BCTHW=latent, commands=commands)
            found = stage.step(packet).frames_THWC
            expected, state = decoder.decode(latent, state)
            assert found is not None
            assert found.dtype == torch.uint8
            assert found.device.type == "cpu"
            assert found.is_pinned() == (device == "cuda")
            assert torch.equal(found, to_rgb8(expected)[0].cpu())
