"""Tensors read from files, and held to a module: every name and shape that does not fit is said."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from streamdiff.config import DiTConfig
from streamdiff.errors import CheckpointError
from streamdiff.models.dit import CausalDiT

_SHOWN = 6
"""Tensors named one by one in an error before the rest is counted."""


def listed(names: Iterable[str]) -> str:
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
        f"{len(names)} {kind}: {listed(names)}"
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


def dit_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in CausalDiT(config).state_dict().items()}


def read_pth(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}; it belongs to the downloaded checkpoint, get it again")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"cannot read {path} as torch weights ({error}); download it again") from error


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, read from its header alone."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path} as safetensors ({error}); download it again") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path} as safetensors ({error}); check the path") from error
