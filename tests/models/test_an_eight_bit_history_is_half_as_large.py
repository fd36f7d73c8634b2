"""Keys and values remembered in eight bits: half the memory, a small error that does not grow, the same going back."""

from __future__ import annotations

import functools

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import streamdiff_kernels as kernels
from streamdiff.errors import BackendError
from streamdiff.memory import StepMemory
from streamdiff.models import cost
from streamdiff.models.served.history import history_scales
from streamdiff.models.served.options import Precision, StepOptions
from streamdiff.pipeline.denoise import DenoiseStage
from streamdiff_kernels import Impl, reference
from streamdiff_kernels.reference import quantise_heads
from tests.models.step_case import Case, config_of, rms_distance

EIGHT = StepOptions(history=Precision.FP8)
NUM_CHUNKS = 12
"""Four times round a ring of three."""
ATTENTION_LIMIT = 0.04
"""The same of one layer's attention; seen: 0.029 in the first of eight layers, 0.016 to 0.009 in the others."""
LIMIT = 0.005
"""Root mean square of a step's velocity, relative; seen: 0.0017. Rounding to e4m3 is 0.026 of a value, but attention
averages over keys, and the residual stream passes by."""


@pytest.fixture(autouse=True)
def no_grad() -> object:
    with torch.inference_mode():
        yield


def velocities(case: Case, options: StepOptions, num_chunks: int = NUM_CHUNKS) -> tuple[list[Tensor], StepMemory]:
    latents, voices = Case(case.config).latents(num_chunks), Case(case.config).voices(num_chunks)
    memory = case.memory(eight_bits=options.history is Precision.FP8)
    step = case.served(memory, options)
    return [case.serve(step, memory, c, latents[c], case.heard(voices[c])) for c in range(num_chunks)], memory


@pytest.mark.parametrize("impl", [Impl.TORCH, Impl.REFERENCE])
def test_the_error_is_small_and_does_not_grow(impl: Impl) -> None:
    case = Case(config_of())
    wide, _ = velocities(case, StepOptions(impl=impl))
    narrow, _ = velocities(case, StepOptions(impl=impl, history=Precision.FP8))
    errors = [rms_distance(found, expected) for found, expected in zip(narrow, wide, strict=True)]
    assert min(errors) > 1e-4
    assert max(errors) <= LIMIT
    assert max(errors[-4:]) < 1.5 * max(errors[:4])


def test_what_is_kept_is_the_quantised_history() -> None:
    """The first layer's keys and values, which nothing before them has rounded, sink and chunks alike."""
    case = Case(config_of(num_layers=2, audio=False))
    _, wide = velocities(case, StepOptions(), 2)
    _, narrow = velocities(case, EIGHT, 2)
    assert narrow.key_scale_ZBN is not None
    assert narrow.value_scale_ZBN is not None
    filled = slice(0, narrow.length_on_host)
    for exact, bits, scale in (
        (wide.keys_ZBMNK, narrow.keys_ZBMNK, narrow.key_scale_ZBN),
        (wide.values_ZBMNK, narrow.values_ZBMNK, narrow.value_scale_ZBN),
    ):
        want8 = quantise_heads(exact[0][:, filled], scale[0])
        # A value on the border between two neighbours may fall to either.
        assert (bits[0][:, filled].float() != want8.float()).float().mean() < 1e-3


@pytest.mark.parametrize("sigma", [1.0, 0.0089286])
def test_nothing_exceeds_its_scale(sigma: float) -> None:
    """Sink and chunks, at both ends of the noise levels; and no scale is wider than the widths of the model ask for."""
    case = Case(config_of(num_layers=4), sigma=sigma)
    _, wide = velocities(case, StepOptions(), 4)
    modulations = case.modulation, case.dit.modulation(0.0)
    for kept_ZBMNK, scale_ZN in zip(
        (wide.keys_ZBMNK, wide.values_ZBMNK), history_scales(case.dit, modulations), strict=True
    ):
        share_ZN = kept_ZBMNK[:, :, : wide.length_on_host].abs().amax((1, 2, 4)) / (448 * scale_ZN)
        assert share_ZN.max() <= 1
        assert share_ZN.min() >= 0.5 / case.config.dit.dim**0.5


def test_attention_of_every_layer_is_near_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries with a scale each, keys and values with one for each head, as the Triton kernel multiplies them."""
    case = Case(config_of(num_layers=8, dim=256))
    asked: list[tuple[Tensor, Tensor, Tensor]] = []
    attend = kernels.attend

    def listen(q: Tensor, keys: Tensor, values: Tensor, length: int | Tensor | None = None, **how: object) -> Tensor:
        if keys.shape[1] == total:
            rows = slice(0, int(length if length is not None else total))
            asked.append((q.double(), keys[:, rows].double(), values[:, rows].double()))
        return attend(q, keys, values, length, **how)  # type: ignore[arg-type]

    total = case.memory().keys_ZBMNK.shape[2]
    monkeypatch.setattr(kernels, "attend", listen)
    velocities(case, StepOptions(impl=Impl.REFERENCE), 4)
    scales = history_scales(case.dit, (case.modulation, case.dit.modulation(0.0)))
    errors: list[float] = []
    for layer, (q, keys, values) in enumerate(asked[-8:]):
        rounded_q = reference.dequantise_rows(*reference.quantise_rows(q)).double()
        ring = [
            reference.dequantise_heads(reference.quantise_heads(x, s[layer][None]), s[layer][None]).double()
            for x, s in zip((keys, values), scales, strict=True)
        ]
        rows = [(0, keys.shape[1])]
        exact, _ = reference.attend(q, keys, values, rows)
        errors.append(rms_distance(reference.attend(rounded_q, *ring, rows)[0], exact))
    assert len(errors) == 8
    assert min(errors) > 1e-3
    assert max(errors) <= ATTENTION_LIMIT


def test_going_back_gives_the_same_bits() -> None:
    case = Case(config_of(window_chunks=2))
    latents = case.latents(5)
    memory = case.memory(eight_bits=True)
    step = case.served(memory, EIGHT)
    voices = [case.heard(voice) for voice in case.voices(5)]
    first = [case.serve(step, memory, c, latents[c], voices[c]) for c in range(5)]
    memory.rewind(3)
    again = [case.serve(step, memory, c, latents[c], voices[c]) for c in (3, 4)]
    assert torch.equal(again[0], first[3])
    assert torch.equal(again[1], first[4])


def test_nothing_is_left_after_a_wipe() -> None:
    case = Case(config_of())
    _, memory = velocities(case, EIGHT, 4)
    memory.wipe()
    for ring in (memory.keys_ZBMNK, memory.values_ZBMNK):
        assert not ring.view(torch.uint8).any()


@pytest.mark.heavy
def test_a_compiler_sees_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    case = Case(config_of(num_layers=2))
    eager, _ = velocities(case, EIGHT)
    traced, _ = velocities(case, StepOptions(history=Precision.FP8, compile=True))
    assert 0 < counter.frame_count <= 2
    # The same roundings; a value on a border may fall to either side.
    assert max(map(rms_distance, traced, eager)) <= 1e-3
    torch._dynamo.reset()


def test_memory_is_counted_to_the_byte_and_is_about_half() -> None:
    case = Case(config_of(dim=256), dtype=torch.bfloat16)
    config = case.config
    wide, narrow = (
        DenoiseStage(case.dit, config, (0, 1), options=StepOptions(history=history))
        for history in (Precision.WEIGHTS, Precision.FP8)
    )
    for stage, eight_bits in ((wide, False), (narrow, True)):
        counted = cost.rank_bytes(config, num_steps=2, bytes_per_value=2, eight_bit_history=eight_bits)
        assert sum(memory.num_bytes for memory in stage.memories) == counted.history
    halves = sum(m.num_bytes for m in narrow.memories) / sum(m.num_bytes for m in wide.memories)
    assert halves == pytest.approx(0.5, rel=1e-3)


def test_a_gpu_reads_it_as_it_is_kept_or_not_at_all() -> None:
    case, gpu = Case(config_of()), torch.device("cuda", 0)
    for name in (None, "auto", "triton"):
        options = StepOptions(history=Precision.FP8, attention=name)
        assert options.resolved_attention(gpu, torch.bfloat16, 128) == "triton"
        options.check(case.config.dit, gpu, torch.bfloat16)
    with pytest.raises(BackendError, match="would widen the whole eight-bit history"):
        StepOptions(history=Precision.FP8, attention="sdpa").check(case.config.dit, gpu, torch.bfloat16)


def test_auto_finds_a_backend_for_it() -> None:
    case = Case(config_of(num_layers=2, audio=False))
    chosen, _ = velocities(case, StepOptions(history=Precision.FP8, attention="auto"), 2)
    plain, _ = velocities(case, EIGHT, 2)
    assert max(map(rms_distance, chosen, plain)) <= 1e-5
