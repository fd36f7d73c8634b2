"""The video VAE and the light decoder from published files."""

from __future__ import annotations

from pathlib import Path

from streamdiff.checkpoint.strict import (
    load_strict,
    read_pth,
    read_safetensors,
)
from streamdiff.models import vae
from streamdiff.models.tae import TAEDecoder
from streamdiff.models.vae import VAEDecoder, VAEEncoder


def load_vae(half: VAEEncoder | VAEDecoder, path: Path) -> None:
    """Load the encoder or the decoder from a file that holds both: ``Wan2.1_VAE.pth``, or safetensors.

    Official and diffusers names. Only the tensors of this half are asked for, and every one of them must fit.
    """
    stored = read_safetensors(path) if path.suffix == ".safetensors" else read_pth(path)
    num_res_blocks = half.config.num_res_blocks
    names = {vae.official_name(name, num_res_blocks=num_res_blocks): t for name, t in stored.items()}
    own = {name: t for name, t in names.items() if name.startswith(half.official_prefixes)}
    load_strict(half, own, what=str(path))


def load_light_decoder(decoder: TAEDecoder, path: Path) -> None:
    """Load a published light decoder (``taew2_1.pth`` or safetensors); the encoder in such files is left alone."""
    stored = read_safetensors(path) if path.suffix == ".safetensors" else read_pth(path)
    own = {name: t for name, t in stored.items() if not name.startswith("encoder.")}
    load_strict(decoder, own, what=str(path))
