"""The DiT from shards of safetensors, official or diffusers names, a LoRA merged on the way."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from streamdiff.checkpoint.lora import check_lora, read_lora
from streamdiff.checkpoint.strict import (
    check_finite,
    check_names_and_shapes,
    dit_shapes,
    opened,
    safetensors_shapes,
)
from streamdiff.config import DiTConfig
from streamdiff.errors import CheckpointError
from streamdiff.models.dit import CausalDiT
from streamdiff.tensorfile import FiniteCheck

_DIFFUSERS_DIT = (
    (r"condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"condition_embedder\.time_proj\.", "time_projection.1."),
    (r"condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"proj_out\.", "head.head."),
    (r"scale_shift_table$", "head.modulation"),
    (r"(blocks\.\d+\.)scale_shift_table$", r"\1modulation"),
    (r"(blocks\.\d+\.)norm2\.", r"\1norm3."),
    (r"(blocks\.\d+\.)ffn\.net\.0\.proj\.", r"\1ffn.0."),
    (r"(blocks\.\d+\.)ffn\.net\.2\.", r"\1ffn.2."),
    (r"(blocks\.\d+\.)attn1\.to_([qkv])\.", r"\1self_attn.\2."),
    (r"(blocks\.\d+\.)attn1\.to_out\.0\.", r"\1self_attn.o."),
    (r"(blocks\.\d+\.)attn1\.norm_([qk])\.", r"\1self_attn.norm_\2."),
    (r"(blocks\.\d+\.)attn2\.to_([qkv])\.", r"\1cross_attn.\2."),
    (r"(blocks\.\d+\.)attn2\.to_out\.0\.", r"\1cross_attn.o."),
    (r"(blocks\.\d+\.)attn2\.norm_([qk])\.", r"\1cross_attn.norm_\2."),
)


def official_dit_name(name: str) -> str:
    """The official Wan name of a tensor that may carry its diffusers name.

    >>> official_dit_name("blocks.3.attn1.to_out.0.weight")
    'blocks.3.self_attn.o.weight'
    >>> official_dit_name("blocks.3.self_attn.o.weight")
    'blocks.3.self_attn.o.weight'
    """
    for pattern, replacement in _DIFFUSERS_DIT:
        renamed, hits = re.subn("^" + pattern, replacement, name)
        if hits:
            return renamed
    return name


def load_dit(
    config: DiTConfig,
    folder: Path,
    *,
    lora: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> CausalDiT:
    """Load the DiT from a folder of safetensors shards, official or diffusers names, the LoRA merged on the way.

    Names, shapes and kinds are checked in the shards' headers before a byte of weights is read; each tensor then goes
    straight to its device, so the peak is the model and one tensor, and is looked at for NaN on the way.
    """
    where = _locate_dit(config, folder)
    adapter = None if lora is None else read_lora(lora, config)
    with torch.device("meta"):
        dit = CausalDiT(config)
    dit = dit.to(dtype).to_empty(device=device)
    own = dit.state_dict()
    by_shard: dict[Path, list[str]] = {}
    for name, (shard, _) in where.items():
        by_shard.setdefault(shard, []).append(name)
    with torch.no_grad(), FiniteCheck() as finite:
        for shard, names in by_shard.items():
            with opened(shard, str(device)) as file:
                for name in names:
                    weight: Tensor = file.get_tensor(where[name][1])
                    finite.copy(name, own[name], weight if adapter is None else adapter.merged(name, weight))
        check_finite(finite.broken(), what=str(folder))
    return dit.eval().requires_grad_(False)


def check_dit(config: DiTConfig, folder: Path, *, lora: Path | None = None) -> None:
    """Check names and shapes of a checkpoint and its LoRA in their headers, without reading weights."""
    _locate_dit(config, folder)
    if lora is not None:
        check_lora(lora, config)


def _locate_dit(config: DiTConfig, folder: Path) -> dict[str, tuple[Path, str]]:
    """For every tensor of the model, the shard that holds it and the name it has there."""
    where: dict[str, tuple[Path, str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in _dit_shards(folder):
        for stored, shape in safetensors_shapes(shard).items():
            name = official_dit_name(stored)
            if name in where:
                raise CheckpointError(
                    f"{folder} holds {name} twice, in {where[name][0].name} and {shard.name}; "
                    "keep the files of one checkpoint in the folder"
                )
            where[name] = (shard, stored)
            shapes[name] = shape
    check_names_and_shapes(dit_shapes(config), shapes, what=str(folder))
    return where


def _dit_shards(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; give the folder that holds the model's safetensors")
    shards = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    if not shards:
        raise CheckpointError(
            f"{folder} holds no diffusion_pytorch_model*.safetensors; "
            "give the folder of the downloaded checkpoint (Wan2.2-S2V-14B)"
        )
    return shards
