"""Encoded clips on disk, and batches of them: what the video model learns from.

Axes: N clips on disk, B clips of a batch, T latent frames, C channels, H height, W width, Z hidden states of the speech
encoder, E their width, A video frames, P prompt tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from streamdiff import rng
from streamdiff.config import EngineConfig
from streamdiff.errors import ConfigError, InputError
from streamdiff.facts import parse_json
from streamdiff.models.text import TextEncoder

LATENTS = "latents.safetensors"


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """A batch of encoded clips and their conditions."""

    latent_BCTHW: Tensor
    """Normalised, ``n * frames_per_chunk`` latent frames."""
    reference_BCTHW: Tensor
    """One latent frame that shows who it is."""
    audio_BZEA: Tensor
    """What is heard while they are seen."""
    text_BPC: Tensor
    """Prompt embeddings, padded with zeros to the same length."""
    elsewhere_BCTHW: Tensor | None = None
    """One latent frame from any moment of the same clip, as an adaptive sink; None: take one of ``latent_BCTHW``."""

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device, float32."""
        elsewhere = self.elsewhere_BCTHW
        return Batch(
            latent_BCTHW=self.latent_BCTHW.to(device, torch.float32),
            reference_BCTHW=self.reference_BCTHW.to(device, torch.float32),
            audio_BZEA=self.audio_BZEA.to(device, torch.float32),
            text_BPC=self.text_BPC.to(device, torch.float32),
            elsewhere_BCTHW=None if elsewhere is None else elsewhere.to(device, torch.float32),
        )


def embedded_prompts(encoder: TextEncoder, prompts: list[str]) -> Tensor:
    """Embeddings of several prompts, padded with zeros to the longest, ``[len(prompts), P, C]``.

    The model pads with zeros as well (`CausalDiT.text_condition`), so a batch is read as its prompts are.
    """
    rows = [encoder.encode(prompt)[0] for prompt in prompts]
    longest = max(len(row) for row in rows)
    return torch.stack([F.pad(row, (0, 0, 0, longest - len(row))) for row in rows])


def _prompts(text: str) -> list[str]:
    """A list of prompts in JSON; ValueError: something else."""
    found = parse_json(text)
    if not isinstance(found, list) or not all(isinstance(prompt, str) for prompt in found):
        raise ValueError("its prompts are no list of words")
    return found


class LatentClips:
    """Encoded clips on disk: ``latents.safetensors``, as ``streamdiff train encode`` writes it.

    Tensors ``latent`` [N, C, T, H, W] and ``reference`` [N, C, H, W] (float16, normalised), ``audio`` [N, Z, E, A]
    (float16; A = T * temporal_factor video frames, those of the first latent frame first), ``prompt`` [N] (index into
    the JSON list ``prompts`` of the metadata); and ``visibility`` [C] (`codec.visibility`), which may be missing.
    Clips are read when they are drawn; the file stays on disk.

    Args:
        held_out: how many clips at the end are never drawn by `batch`; `held_out_batch` gives them.

    Raises:
        InputError: no such file, or not of this shape, or of another preset.
    """

    def __init__(self, folder: Path, config: EngineConfig, encoder: TextEncoder, *, held_out: int = 0) -> None:
        path = folder / LATENTS
        if not path.is_file():
            raise InputError(f"{path} is not there; write it with `streamdiff train encode --out {folder}`")
        self.path = path
        self._config = config
        try:
            self._file = safe_open(path, framework="pt")
            about = self._file.metadata() or {}
            shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()}  # noqa: SIM118
            prompts = _prompts(about["prompts"])
            preset = about.get("config", config.name)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(
                f"{path} is no file of encoded clips ({error}); write it with `streamdiff train encode`"
            ) from error
        if preset != config.name:
            raise InputError(
                f"{path} was encoded for the preset {preset!r}, not {config.name!r}; give --preset {preset}"
            )
        self._check(shapes)
        self.num_clips, _, self.num_frames = shapes["latent"][:3]
        self._slices = {name: self._file.get_slice(name) for name in ("latent", "reference", "audio")}
        self.visibility_C = self._file.get_tensor("visibility").float() if "visibility" in shapes else None
        """How much an error in each channel is seen, or None in files that do not say so."""
        self._prompt_N = self._file.get_tensor("prompt").tolist()
        if not all(0 <= p < len(prompts) for p in self._prompt_N):
            raise InputError(f"{path} names a prompt beyond its list of {len(prompts)}; write it again")
        self.prompts = prompts
        texts = embedded_prompts(encoder, [*prompts, ""])
        self._text_NPC, self.empty_text_1PC = texts[:-1], texts[-1:]
        if not 0 <= held_out < self.num_clips:
            raise InputError(f"{path} has {self.num_clips} clips: too few to hold {held_out} of them out; encode more")
        self.held_out = held_out

    def _check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        audio, (H, W), C = self._config.dit.audio, self._config.latent_hw, self._config.dit.in_dim
        if audio is None:
            raise ConfigError(f"the preset {self._config.name!r} hears nothing; take one with audio injectors")
        missing = {"latent", "reference", "audio", "prompt"} - shapes.keys()
        if missing:
            raise InputError(
                f"{self.path} has no tensor {sorted(missing)[0]!r}; write it with `streamdiff train encode`"
            )
        N, T = (*shapes["latent"], 0, 0, 0)[0:3:2]
        expected = {
            "latent": (N, C, T, H, W),
            "reference": (N, C, H, W),
            "audio": (N, audio.num_features, audio.feature_dim, T * self._config.vae.temporal_factor),
            "prompt": (N,),
        }
        for name, shape in expected.items():
            if shapes[name] != shape:
                raise InputError(
                    f"{self.path}: {name} is {list(shapes[name])} but the preset {self._config.name!r} wants "
                    f"{list(shape)}; encode the clips with this preset"
                )

    def batch(self, size: int, num_chunks: int, *, seed: int, step: int) -> Batch:
        """Clips drawn for this step, each cut at a latent frame drawn for it."""
        generator = torch.Generator().manual_seed(rng.seed_of("clips", seed, step))
        chosen_B = torch.randint(0, self.num_clips - self.held_out, (size,), generator=generator)
        return self._cut(chosen_B.tolist(), num_chunks, generator)

    def held_out_batch(self, num_chunks: int) -> Batch:
        """The clips that are held out, cut at latent frames that never change."""
        generator = torch.Generator().manual_seed(rng.seed_of("held out"))
        return self._cut(list(range(self.num_clips - self.held_out, self.num_clips)), num_chunks, generator)

    def _cut(self, chosen: list[int], num_chunks: int, generator: torch.Generator) -> Batch:
        length, factor = num_chunks * self._config.frames_per_chunk, self._config.vae.temporal_factor
        if length > self.num_frames:
            most = self.num_frames // self._config.frames_per_chunk
            raise InputError(f"{self.path} has clips of {self.num_frames} latent frames: at most --chunks {most}")
        first_B = torch.randint(0, self.num_frames - length + 1, (len(chosen),), generator=generator).tolist()
        other_B = torch.randint(0, self.num_frames, (len(chosen),), generator=generator).tolist()
        latent, reference, audio = (self._slices[name] for name in ("latent", "reference", "audio"))
        return Batch(
            latent_BCTHW=torch.stack([latent[i, :, t : t + length] for i, t in zip(chosen, first_B, strict=True)]),
            reference_BCTHW=torch.stack([reference[i] for i in chosen]).unsqueeze(2),
            audio_BZEA=torch.stack(
                [audio[i, :, :, t * factor : (t + length) * factor] for i, t in zip(chosen, first_B, strict=True)]
            ),
            text_BPC=self._text_NPC[[self._prompt_N[i] for i in chosen]],
            elsewhere_BCTHW=torch.stack([latent[i, :, t : t + 1] for i, t in zip(chosen, other_B, strict=True)]),
        )
