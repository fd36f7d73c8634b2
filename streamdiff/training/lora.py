"""Low-rank adapters: train a few per cent of a model, save them under the names that `checkpoint.read_lora` merges.

    parameters = adapt(dit, rank=128, alpha=64.0, seed=0)    # everything else is frozen
    ...                                                      # train `parameters`
    save_lora(dit, Path("lora.safetensors"))                 # streamdiff generate --lora lora.safetensors

The adapted layers are those of Live Avatar (`checkpoint.lora_modules`): q, k, v and o of every attention and both
layers of the feed-forward. An adapted layer computes ``W x + b + alpha / rank * B (A x)`` (Hu et al. 2021); B starts at
zero, so a fresh adapter changes nothing. Names of the base stay what they were: the factors stand beside them as
``<layer>.lora_A.weight`` and ``<layer>.lora_B.weight``.

Distillation holds three models of one shape. With adapters they are one frozen base (`twin`) and two small pairs of
factors.

Axes: D width going in, E width coming out, R rank.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamdiff import rng
from streamdiff.checkpoint import lora_modules, read_lora
from streamdiff.errors import CheckpointError, ConfigError
from streamdiff.models.dit import CausalDiT
from streamdiff.output import make_folder
from streamdiff.tensorfile import save_tensors

SERVED_ALPHA = 64.0
"""The alpha that `checkpoint.load_dit` merges with; a file holds no alpha of its own."""


class LoRALinear(nn.Linear):
    """A frozen linear layer and its low-rank part. Shares the tensors of the layer that it is made from."""

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.scale = alpha / rank
        device = base.weight.device
        self.lora_A = nn.Linear(self.in_features, rank, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        low = F.linear(input, self.lora_A.weight.to(input.dtype))
        return F.linear(input, self.weight, self.bias) + self.scale * F.linear(low, self.lora_B.weight.to(input.dtype))


def adapted_layers(dit: nn.Module) -> dict[str, LoRALinear]:
    """Every adapted layer by its name; empty for a model that `adapt` has not seen."""
    return {name: module for name, module in dit.named_modules() if isinstance(module, LoRALinear)}


def adapt(
    dit: CausalDiT, *, rank: int, alpha: float = SERVED_ALPHA, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[nn.Parameter]:
    """Freeze a model and give it adapters; returns the factors, the only parameters left to train.

    Args:
        rank: of the factors (Live Avatar: 128).
        alpha: ``alpha / rank`` scales the low-rank part (Live Avatar: 64).
        seed: A is drawn by it and by the name of its layer; B is zero.
        dtype: of the factors; the base keeps its own.

    Raises ConfigError for a rank that is not positive, or a model that has adapters.
    """
    if rank < 1 or alpha <= 0:
        raise ConfigError(f"an adapter needs rank >= 1 and alpha > 0, got rank={rank} and alpha={alpha}")
    if adapted_layers(dit):
        raise ConfigError("this model has adapters already; merge them first, or adapt a twin of its base")
    dit.requires_grad_(False)
    factors: list[nn.Parameter] = []
    for name in lora_modules(dit.config):
        base = dit.get_submodule(name)
        assert isinstance(base, nn.Linear)
        layer = LoRALinear(base, rank=rank, alpha=alpha, dtype=dtype)
        if not layer.weight.is_meta:
            with torch.no_grad():
                for factor in ("lora_A.weight", "lora_B.weight"):
                    own = layer.get_parameter(factor)
                    own.copy_(fresh_factor(f"{name}.{factor}", tuple(own.shape), seed=seed))
        dit.set_submodule(name, layer)
        factors += [*layer.lora_A.parameters(), *layer.lora_B.parameters()]
    return factors


def fresh_factor(name: str, shape: tuple[int, ...], *, seed: int) -> Tensor:
    """What a factor is before it learns, float32: A drawn by the seed and its name, B zero."""
    if name.endswith("lora_B.weight"):
        return torch.zeros(shape)
    return rng.normal(shape, "lora", seed, name) * shape[1] ** -0.5


def twin(dit: CausalDiT) -> CausalDiT:
    """Another model with the very same parameters (not copies): adapters given to one do not touch the other."""
    shared: dict[int, object] = {id(tensor): tensor for tensor in (*dit.parameters(), *dit.buffers())}
    return copy.deepcopy(dit, shared)


def lora_tensors(dit: nn.Module, *, prefix: str = "base_model.model.") -> dict[str, Tensor]:
    """The factors under their published names, scaled so that merging with `SERVED_ALPHA` gives what was trained.

    Raises ConfigError for a model without adapters.
    """
    layers = adapted_layers(dit)
    if not layers:
        raise ConfigError("this model has no adapters to save; call adapt() first, or save the whole model")
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        rank = layer.lora_A.weight.shape[0]
        tensors[f"{prefix}{name}.lora_A.weight"] = layer.lora_A.weight.detach().contiguous()
        tensors[f"{prefix}{name}.lora_B.weight"] = layer.lora_B.weight.detach() * (layer.scale * rank / SERVED_ALPHA)
    return tensors


def save_lora(dit: nn.Module, path: Path) -> None:
    """Write the adapters to a safetensors file that ``streamdiff generate --lora`` takes; complete or not at all."""
    make_folder(path.parent)
    save_tensors(lora_tensors(dit), path)


def load_lora_(dit: CausalDiT, path: Path) -> None:
    """Bring saved factors back into an adapted model, to train on or to start a second stage from.

    Raises `CheckpointError` when the file is not for this model, or of another rank.
    """
    layers = adapted_layers(dit)
    if not layers:
        raise ConfigError("this model has no adapters to load into; call adapt() with the rank of the file first")
    saved = read_lora(path, dit.config, alpha=SERVED_ALPHA)
    with torch.no_grad():
        for name, layer in layers.items():
            down_RD, up_ER = saved.factors[name]
            if down_RD.shape != layer.lora_A.weight.shape:
                raise CheckpointError(
                    f"{path} has rank {down_RD.shape[0]} but the model was adapted with rank "
                    f"{layer.lora_A.weight.shape[0]}; adapt it with rank={down_RD.shape[0]}"
                )
            layer.lora_A.weight.copy_(down_RD)
            layer.lora_B.weight.copy_(up_ER * (saved.scale / layer.scale))


def merge_(dit: CausalDiT) -> CausalDiT:
    """Fold the adapters into the weights they adapt: a plain model again, with the names of a checkpoint.

    The base's own tensors are left alone, as other models may share them. The product is summed in float32, or in
    float64 for a model of that type.
    """
    for name, layer in adapted_layers(dit).items():
        wide = torch.promote_types(layer.weight.dtype, torch.float32)
        with torch.no_grad():
            low_ED = layer.lora_B.weight.to(wide) @ layer.lora_A.weight.to(wide)
            weight_ED = (layer.weight.to(wide) + layer.scale * low_ED).to(layer.weight.dtype)
        plain = nn.Linear(layer.in_features, layer.out_features, device="meta")
        plain.weight = nn.Parameter(weight_ED, requires_grad=False)
        plain.bias = layer.bias
        dit.set_submodule(name, plain)
    return dit
