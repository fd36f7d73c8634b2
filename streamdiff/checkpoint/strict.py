"""Tensors read from files, and held to a module: every name and shape that does not fit is said."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from streamdiff.config import DiTConfig
from streamdiff.errors import CheckpointError, StreamdiffError
from streamdiff.facts import printable
from streamdiff.models.dit import CausalDiT
from streamdiff.tensorfile import FLOATS, FiniteCheck, map_pickled

_REAL = (torch.float64, *FLOATS)
_REAL_NAMES = ("F64", "F32", "F16", "BF16")

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
    """Copy tensors into a module; names and shapes must match one to one, kinds too, and numbers must be finite."""
    own = module.state_dict()
    check_names_and_shapes(
        {name: tuple(t.shape) for name, t in own.items()},
        {name: tuple(t.shape) for name, t in tensors.items()},
        what=what,
    )
    check_kinds({name: tensors[name].dtype for name in own}, own, what=what)
    with torch.no_grad(), FiniteCheck() as finite:
        for name, target in own.items():
            finite.copy(name, target, tensors[name])
        check_finite(finite.broken(), what=what)


def check_kinds(found: Mapping[str, torch.dtype], own: Mapping[str, Tensor], *, what: str) -> None:
    """Raise `CheckpointError` naming every tensor of another kind: weights are real numbers, counts integers."""
    wrong = [
        f"{name} holds {str(kind).removeprefix('torch.')}"
        for name, kind in found.items()
        if (kind not in _REAL if own[name].is_floating_point() else kind != own[name].dtype)
    ]
    if wrong:
        raise CheckpointError(f"{what} does not fit the model ({listed(wrong)}); weights are floating-point numbers")


def check_finite(broken: Sequence[str], *, what: str) -> None:
    """Raise `CheckpointError` naming the tensors that were found to hold NaN or infinity."""
    if broken:
        raise CheckpointError(f"{what} holds NaN or infinity ({listed(broken)}); download it again, or train anew")


def dit_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in CausalDiT(config).state_dict().items()}


def read_pth(path: Path) -> dict[str, Tensor]:
    try:
        return map_pickled(path)
    except CheckpointError as error:
        raise CheckpointError(f"cannot read {path} as torch weights: {error}; download it again") from error


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file of weights, read from its header alone. Raises `CheckpointError`."""
    shapes: dict[str, tuple[int, ...]] = {}
    other: list[str] = []
    with opened(path) as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_slice(name)
            shapes[name] = tuple(tensor.get_shape())
            if (kind := tensor.get_dtype()) not in _REAL_NAMES:
                other.append(f"{name} holds {kind}")
    if other:
        raise CheckpointError(f"{path} holds no weights ({listed(other)}); weights are floating-point numbers")
    return shapes


def read_safetensors(path: Path) -> dict[str, Tensor]:
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@contextmanager
def opened(path: Path, device: str = "cpu") -> Generator[Any]:
    """A safetensors file, open; whatever is wrong with it inside of the context is a `CheckpointError`."""
    if not path.is_file():
        why = "it is no regular file" if path.exists() else "there is no such file"
        raise CheckpointError(f"cannot read {path} as safetensors: {why}; check the path")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except StreamdiffError:
        raise
    except Exception as error:
        # A stranger's bytes may fail anywhere inside the reader.
        why = printable(error, 200)
        raise CheckpointError(f"cannot read {path} as safetensors ({why}); download it again") from error
