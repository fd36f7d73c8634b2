"""Files to modules, strictly: every tensor that is missing, unexpected or misshapen is named.

    load_dit(config, folder, lora=...)   shards of safetensors into a `CausalDiT`, the LoRA merged on the way
    load_strict(module, tensors)         a state dict into any module

Nothing is loaded silently in part (the published loader accepts a LoRA of which no key matches).
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from streamdiff import presets
from streamdiff.config import DiTConfig, EngineConfig
from streamdiff.errors import CheckpointError
from streamdiff.models import vae
from streamdiff.models.dit import CausalDiT
from streamdiff.models.tae import TAEDecoder
from streamdiff.models.vae import VAEDecoder, VAEEncoder

_SHOWN = 6
"""Tensors named one by one in an error before the rest is counted."""


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    shown = ", ".join(ordered[:_SHOWN])
    return shown if len(ordered) <= _SHOWN else f"{shown} and {len(ordered) - _SHOWN} more"


def check_names_and_shapes(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], *, what: str
) -> None:
    """Raise `CheckpointError` naming every tensor of ``found`` that does not fit ``expected``."""
    missing = expected.keys() - found.keys()
    unexpected = found.keys() - expected.keys()
    misshapen = [
        f"{name} is {list(found[name])}, must be {list(expected[name])}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    faults = [
        f"{len(names)} {kind}: {_listed(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if faults:
        raise CheckpointError(
            f"{what} does not fit the model ({'; '.join(faults)}); check that checkpoint and preset belong together"
        )


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], *, what: str) -> None:
    """Copy tensors into a module; names and shapes must match one to one."""
    own = module.state_dict()
    check_names_and_shapes(
        {name: tuple(t.shape) for name, t in own.items()},
        {name: tuple(t.shape) for name, t in tensors.items()},
        what=what,
    )
    with torch.no_grad():
        for name, target in own.items():
            target.copy_(tensors[name])


# Names


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


def shipped(config: EngineConfig) -> Path | None:
    """The folder of the weights that come with a preset; None when it has none, or its models were changed."""
    folder = Path(__file__).parent / "weights" / config.name
    if config.name not in presets.PRESETS or not any(folder.glob("diffusion_pytorch_model*.safetensors")):
        return None
    original = presets.preset(config.name)
    return folder if (original.dit, original.vae) == (config.dit, config.vae) else None


def shipped_face(config: EngineConfig) -> Path | None:
    """A face that the weights of a preset come with; None when they come without, or there are none."""
    folder = shipped(config)
    face = None if folder is None else folder / "face.png"
    return face if face is not None and face.is_file() else None


# The VAE


def load_vae(half: VAEEncoder | VAEDecoder, path: Path) -> None:
    """Load the encoder or the decoder from a file that holds both: ``Wan2.1_VAE.pth``, or safetensors.

    Official and diffusers names. Only the tensors of this half are asked for, and every one of them must fit.
    """
    stored = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pth(path)
    num_res_blocks = half.config.num_res_blocks
    names = {vae.official_name(name, num_res_blocks=num_res_blocks): t for name, t in stored.items()}
    own = {name: t for name, t in names.items() if name.startswith(half.official_prefixes)}
    load_strict(half, own, what=str(path))


def load_light_decoder(decoder: TAEDecoder, path: Path) -> None:
    """Load a published light decoder (``taew2_1.pth`` or safetensors); the encoder in such files is left alone."""
    stored = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pth(path)
    own = {name: t for name, t in stored.items() if not name.startswith("encoder.")}
    load_strict(decoder, own, what=str(path))


def _read_pth(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}; it belongs to the downloaded checkpoint, get it again")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"cannot read {path} as torch weights ({error}); download it again") from error


# The DiT


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
    rank = _check_lora(path, config)
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _read_safetensors(path).items():
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


def _check_lora(path: Path, config: DiTConfig) -> int:
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
        f"{len(names)} {kind}: {_listed(names)}"
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
    shapes = _dit_shapes(config)
    ranks = {pair["A"][0] for pair in found.values()}
    misshapen = [
        module
        for module, pair in found.items()
        if (pair["B"][0], pair["A"][1]) != shapes[f"{module}.weight"] or pair["A"][0] != pair["B"][1]
    ]
    if misshapen or len(ranks) != 1:
        raise CheckpointError(
            f"{path} does not fit the model: {len(misshapen)} misshapen modules ({_listed(misshapen)}), "
            f"ranks {sorted(ranks)}; give the LoRA that was trained for it"
        )
    return ranks.pop()


def _dit_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in CausalDiT(config).state_dict().items()}


def load_dit(
    config: DiTConfig,
    folder: Path,
    *,
    lora: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> CausalDiT:
    """Load the DiT from a folder of safetensors shards, official or diffusers names, the LoRA merged on the way.

    Names and shapes are checked in the shards' headers before a byte of weights is read; each tensor then goes straight
    to its device, so the peak is the model and one tensor.
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
    with torch.no_grad():
        for shard, names in by_shard.items():
            with safe_open(shard, framework="pt", device=str(device)) as file:
                for name in names:
                    weight: Tensor = file.get_tensor(where[name][1])
                    own[name].copy_(weight if adapter is None else adapter.merged(name, weight))
    return dit.eval().requires_grad_(False)


def check_dit(config: DiTConfig, folder: Path, *, lora: Path | None = None) -> None:
    """Check names and shapes of a checkpoint and its LoRA in their headers, without reading weights."""
    _locate_dit(config, folder)
    if lora is not None:
        _check_lora(lora, config)


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
    check_names_and_shapes(_dit_shapes(config), shapes, what=str(folder))
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


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, read from its header alone."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path} as safetensors ({error}); download it again") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path} as safetensors ({error}); check the path") from error
