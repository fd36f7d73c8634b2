"""Files to modules, strictly: every tensor that is missing, unexpected or misshapen is named.

    load_dit(config, files, lora=...)      shards of safetensors into a `CausalDiT`, the LoRA merged on the way
    load_strict(module, tensors)           a state dict into any module

Nothing is loaded silently in part (the published loader accepts a LoRA of which no key matches).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from streamdiff.errors import CheckpointError

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
