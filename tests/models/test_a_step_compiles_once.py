"""One compilation of the block serves all layers, steps and chunks of a stream."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._inductor.utils import run_and_get_code

from streamdiff.models.served.options import Precision, StepOptions
from tests.models.step_case import Case, config_of, distance, rms_distance

pytestmark = pytest.mark.heavy

NUM_CHUNKS = 100
COMPILED = StepOptions(compile=True)
EIGHT = StepOptions(compile=True, precision=Precision.FP8, kept_layers=0)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.inference_mode():
        yield
    torch._dynamo.reset()


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    """Graphs are found and counted, and run as they are: the compiler behind them would take minutes."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    return counter


@pytest.mark.parametrize("options", [COMPILED, EIGHT])
def test_a_hundred_chunks_add_no_graph(counter: CompileCounter, options: StepOptions) -> None:
    dtype = torch.bfloat16 if options is EIGHT else torch.float32
    case = Case(config_of(num_layers=2, frames_per_chunk=1), dtype=dtype)
    memory, eager_memory = case.memory(), case.memory()
    eager = case.served(eager_memory) if options is COMPILED else None
    step = case.served(memory, options)
    latents, voices = case.latents(NUM_CHUNKS), case.voices(NUM_CHUNKS)
    step.warm(latents[0], case.rotations(0)[0], case.text, case.heard(voices[0]))
    warmed = counter.frame_count
    # The fill level is an integer here: seen once it is a constant, seen twice it is a variable.
    assert warmed <= 2
    for c in range(NUM_CHUNKS):
        audio = case.heard(voices[c])
        found = case.serve(step, memory, c, latents[c], audio)
        if eager is not None and c % 10 == 0:
            expected = case.serve(eager, eager_memory, c, latents[c], audio)
            assert distance(found, expected) <= 2e-6
        elif eager is not None:
            case.serve(eager, eager_memory, c, latents[c], audio)
    assert counter.frame_count == warmed


def test_a_second_step_of_the_rank_adds_no_graph(counter: CompileCounter) -> None:
    case = Case(config_of(num_layers=2, frames_per_chunk=1))
    memories = [case.memory(), case.memory()]
    steps = [case.served(memory, COMPILED) for memory in memories]
    latent, voice = case.latents(1)[0], case.heard(case.voices(1)[0])
    steps[0].warm(latent, case.rotations(0)[0], case.text, voice)
    warmed = counter.frame_count
    steps[1].warm(latent, case.rotations(0)[0], case.text, voice)
    assert counter.frame_count == warmed


@pytest.mark.slow
@pytest.mark.parametrize("options", [COMPILED, EIGHT])
def test_compiled_for_real_it_computes_the_same(options: StepOptions) -> None:
    eight = options is EIGHT
    dtype = torch.bfloat16 if eight else torch.float32
    config = config_of(num_layers=2)
    latents, voices = Case(config).latents(5), Case(config).voices(5)
    velocities: list[list[Tensor]] = []
    for chosen in (StepOptions(precision=options.precision, kept_layers=0), options):
        case = Case(config, dtype=dtype)
        memory = case.memory()
        step = case.served(memory, chosen)
        velocities.append([case.serve(step, memory, c, latents[c], case.heard(voices[c])) for c in range(5)])
    if eight:
        # A value near the border between two neighbours falls to either side.
        assert max(map(rms_distance, *velocities)) <= 0.035
    else:
        assert max(map(distance, *velocities)) <= 5e-6


@pytest.mark.slow
def test_the_compiled_block_writes_the_ring_in_place() -> None:
    case = Case(config_of(num_layers=2))
    memory = case.memory()
    step = case.served(memory, COMPILED)
    arguments = (0, case.latents(1)[0], case.heard(case.voices(1)[0]))
    _, sources = run_and_get_code(lambda: case.serve(step, memory, *arguments))
    B, M, N, K = memory.keys_ZBMNK[0].shape
    assert sources
    assert not any(f"empty_strided_cpu(({B}, {M}, {N}, {K})" in source for source in sources)
    assert not any(f"empty_strided_cpu(({M}, {N}, {K})" in source for source in sources)
