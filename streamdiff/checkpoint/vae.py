"""The video VAE and the light decoder from published files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from streamdiff.checkpoint.strict import (
    check_names_and_shapes,
    load_strict,
    read_pth,
    read_safetensors,
)
from streamdiff.models import vae
from streamdiff.models.tae import TAEDecoder
from streamdiff.models.vae import VAEDecoder, VAEEncoder


def load_vae(half: VAEEncoder | VAEDecoder, path: Path) -> None:
    """Load the encoder or the decoder from a file that holds both: ``Wan2.1_VAE.pth``, or safetensors.

    Official and diffusers names. Every tensor of this half must be there and fit; the other half may be missing, and
    nothing else may be in the file.
    """
    stored = read_safetensors(path) if path.suffix == ".safetensors" else read_pth(path)
    num_res_blocks = half.config.num_res_blocks
    names = {vae.official_name(name, num_res_blocks=num_res_blocks): t for name, t in stored.items()}
    own = {name: t for name, t in names.items() if name.startswith(half.official_prefixes)}
    _check_other_half(half, {name: tuple(t.shape) for name, t in names.items() if name not in own}, what=str(path))
    load_strict(half, own, what=str(path))


def _check_other_half(half: VAEEncoder | VAEDecoder, rest: Mapping[str, tuple[int, ...]], *, what: str) -> None:
    with torch.device("meta"):
        other = VAEDecoder(half.config) if isinstance(half, VAEEncoder) else VAEEncoder(half.config)
    expected = {name: tuple(t.shape) for name, t in other.state_dict().items()}
    check_names_and_shapes({name: expected[name] for name in rest if name in expected}, rest, what=what)


def load_light_decoder(decoder: TAEDecoder, path: Path) -> None:
    """Load a published light decoder (``taew2_1.pth`` or safetensors); the encoder in such files is left alone."""
    stored = read_safetensors(path) if path.suffix == ".safetensors" else read_pth(path)
    own = {name: t for name, t in stored.items() if not name.startswith("encoder.")}
    load_strict(decoder, own, what=str(path))
