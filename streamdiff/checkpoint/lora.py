"""A LoRA that must adapt exactly the layers it was trained for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from streamdiff.checkpoint.strict import (
    check_finite,
    dit_shapes,
    listed,
    read_safetensors,
    safetensors_shapes,
)
from streamdiff.config import DiTConfig
from streamdiff.errors import CheckpointError
from streamdiff.tensorfile import is_finite

LORA_TARGETS = ("q", "k", "v", "o", "ffn.0", "ffn.2")
_LORA_PREFIXES = ("base_model.model.", "diffusion_model.", "model.")
_LORA_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight$")


def lora_modules(config: DiTConfig) -> list[str]:
    """Linear layers that a Live Avatar LoRA adapts: 448 in the 14B model."""
    attentions = [f"blocks.{n}.{kind}" for n in range(config.num_layers) for kind in ("self_attn", "cross_attn")]
    if config.audio is not None:
        attentions += [f"audio_injector.injector.{j}" for j in range(len(config.audio.inject_layers))]
    modules = [f"{attention}.{p}" for attention in attentions for p in "qkvo"]
    return modules + [f"blocks.{n}.ffn.{i}" for n in range(config.num_layers) for i in (0, 2)]


@dataclass(frozen=True, slots=True, eq=False)
class LoRA:
    """Low-rank factors per adapted layer; the layer's weight grows by ``scale * B @ A``."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    """Module -> (A ``[rank, in]``, B ``[out, rank]``)."""
    scale: float

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """The weight called ``name`` with its low-rank part added; the product is summed in float32."""
        factors = self.factors.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if factors is None:
            return weight
        down, up = (factor.to(device=weight.device, dtype=torch.float32) for factor in factors)
        return (weight.float() + self.scale * (up @ down)).to(weight.dtype)


def read_lora(path: Path, config: DiTConfig, *, alpha: float = 64.0) -> LoRA:
    """Read a LoRA (peft names) that must adapt exactly the modules of `lora_modules`.

    ``alpha / rank`` is the scale: 64 / 128 for the published one. Raises `CheckpointError` naming every module that is
    missing, unexpected or misshapen.
    """
    rank = check_lora(path, config)
    factors: dict[str, dict[str, Tensor]] = {}
    tensors = read_safetensors(path)
    check_finite([name for name, tensor in tensors.items() if not is_finite(tensor)], what=str(path))
    for name, tensor in tensors.items():
        module, factor = _lora_factor(name) or ("", "")
        factors.setdefault(module, {})[factor] = tensor
    return LoRA({module: (pair["A"], pair["B"]) for module, pair in factors.items()}, alpha / rank)


def _lora_factor(name: str) -> tuple[str, str] | None:
    """The adapted module and the factor, ``A`` or ``B``; None for a tensor that is neither."""
    match = _LORA_FACTOR.match(name)
    if match is None:
        return None
    module = match["module"]
    for prefix in _LORA_PREFIXES:
        module = module.removeprefix(prefix)
    return module, match["factor"]


def check_lora(path: Path, config: DiTConfig) -> int:
    """Check names and shapes in the header alone; the rank of the factors."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    strangers: list[str] = []
    for name, shape in safetensors_shapes(path).items():
        split = _lora_factor(name)
        if split is None:
            strangers.append(name)
        else:
            found.setdefault(split[0], {})[split[1]] = shape
    wanted = lora_modules(config)
    halves = [module for module, pair in found.items() if len(pair) != 2]
    faults = [
        f"{len(names)} {kind}: {listed(names)}"
        for kind, names in (
            ("modules missing", set(wanted) - found.keys()),
            ("modules unexpected", found.keys() - set(wanted)),
            ("modules with only one factor", halves),
            ("tensors that are no LoRA factor", strangers),
        )
        if names
    ]
    if faults:
        raise CheckpointError(
            f"{path} is not a LoRA for this model, which has {len(wanted)} adapted modules ({'; '.join(faults)}); "
            "give the LoRA that was trained for it"
        )
    shapes = dit_shapes(config)
    if flat := [module for module, pair in found.items() if {len(shape) for shape in pair.values()} != {2}]:
        raise CheckpointError(f"{path} holds factors that are no matrices ({listed(flat)}); give a LoRA of this model")
    ranks = {pair["A"][0] for pair in found.values()}
    misshapen = [
        module
        for module, pair in found.items()
        if (pair["B"][0], pair["A"][1]) != shapes[f"{module}.weight"] or pair["A"][0] != pair["B"][1]
    ]
    if misshapen or len(ranks) != 1 or ranks == {0}:
        raise CheckpointError(
            f"{path} does not fit the model: {len(misshapen)} misshapen modules ({listed(misshapen)}), "
            f"ranks {sorted(ranks)}; give the LoRA that was trained for it"
        )
    return ranks.pop()
