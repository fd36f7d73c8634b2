"""Eager code on a CPU takes a shorter way through a step (`EagerRowOps`); what it computes has the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from streamdiff.models.served.eager import EagerRowOps
from streamdiff.models.served.options import Precision, StepOptions
from streamdiff.models.served.step import ServedWeights
from streamdiff_kernels import plain
from tests.models.step_case import Case, config_of

NUM_CHUNKS = 4
"""Once round a ring of three, and one more."""


class Watch(TorchDispatchMode):
    """Sees every operator; counts ours."""

    def __init__(self) -> None:
        super().__init__()
        self.num_ours = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_ours += func.namespace == "streamdiff_kernels"
        return func(*args, **(kwargs or {}))


def velocities(case: Case, weights: ServedWeights, chunks: list[tuple[Tensor, Any]]) -> list[Tensor]:
    memory = case.memory(eight_bits=weights.options.history is Precision.FP8)
    step = case.served(memory, weights.options, weights)
    found = [case.serve(step, memory, c, latent, heard) for c, (latent, heard) in enumerate(chunks)]
    return [*found, memory.keys_ZBMNK.clone(), memory.values_ZBMNK.clone()]


def both(case: Case, options: StepOptions | None = None) -> tuple[list[Tensor], list[Tensor], int]:
    """What eager code computes, what watched code does, and how many of our operators were seen."""
    options = options or StepOptions()
    with torch.inference_mode():
        chunks = [
            (latent, case.heard(voice))
            for latent, voice in zip(case.latents(NUM_CHUNKS), case.voices(NUM_CHUNKS), strict=True)
        ]
        weights = ServedWeights(case.dit, options)
        eager = velocities(case, weights, chunks)
        with Watch() as watch:
            watched = velocities(case, weights, chunks)
    return eager, watched, watch.num_ours


def same(one: Tensor, other: Tensor) -> bool:
    """The same bits, also where nothing was written."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.mark.parametrize("num_streams", [1, 2])
@pytest.mark.parametrize("audio", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whatever_the_type_and_the_number_of_streams(dtype: torch.dtype, audio: bool, num_streams: int) -> None:
    case = Case(config_of(audio=audio), dtype=dtype, num_streams=num_streams)
    eager, watched, num_ours = both(case)
    assert num_ours > 10 * NUM_CHUNKS
    assert all(map(same, eager, watched))


@pytest.mark.parametrize("block_bytes", [1 << 12, 1 << 14])
def test_however_the_tokens_are_cut_into_blocks(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(config_of())
    whole, _, _ = both(case)
    monkeypatch.setattr(plain, "_BLOCK_BYTES", block_bytes)
    case = Case(config_of())
    eager, watched, _ = both(case)
    assert all(map(same, eager, watched))
    assert all(map(same, eager, whole))


@pytest.mark.parametrize(
    "options",
    [
        StepOptions(history=Precision.FP8),
        StepOptions(precision=Precision.FP8, kept_layers=1),
        StepOptions(attention="reference"),
        StepOptions(attention="sdpa"),
    ],
    ids=["history", "linears", "reference", "sdpa"],
)
def test_with_any_option(options: StepOptions) -> None:
    case = Case(config_of(), dtype=torch.bfloat16)
    eager, watched, _ = both(case, options)
    assert all(map(same, eager, watched))


def test_the_shorter_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name in ("norm_modulate", "residual_norm_modulate", "norm_rope_write", "attend", "attend_all", "rms_norm"):
        real = getattr(EagerRowOps, name)

        def noting(self: EagerRowOps, *args: Any, _name: str = name, _real: Any = real, **kwargs: Any) -> Any:
            taken.append(_name)
            return _real(self, *args, **kwargs)

        monkeypatch.setattr(EagerRowOps, name, noting)
    case = Case(config_of())
    both(case)
    layers = case.config.dit.num_layers
    assert taken.count("norm_rope_write") == layers * NUM_CHUNKS, "not by the watched code"
    assert taken.count("attend_all") == (layers + 2) * NUM_CHUNKS


def test_two_noise_levels_keep_their_constants_apart() -> None:
    """Scales are known by identity: another level, or another layer, must not find them."""
    ops = EagerRowOps()
    x_BLD = torch.randn(1, 4, 8)
    for level in range(5):
        scale_1D, shift_1D = torch.full((1, 8), level / 3), torch.full((1, 8), -level / 3)
        for _ in range(2):
            found = ops.norm_modulate(x_BLD, scale_1D, shift_1D, 1e-6, torch.float32, eight_bits=False)
            assert isinstance(found, Tensor)
            assert torch.equal(found, plain.norm_modulate(x_BLD, scale_1D[None], shift_1D[None], 1e-6))
