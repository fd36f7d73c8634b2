"""What is captured once serves every chunk: inputs arrive, conditions change, the ring turns, and nothing goes stale.

A CUDA graph is a recording of addresses. `Tape` records in the same sense on a CPU: it runs the function again on the
tensors it saw and writes the result where it was, and knows nothing of what the caller handed over since.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from streamdiff.errors import MemoryOrderError
from streamdiff.memory import StepMemory
from streamdiff.models.dit import AudioCondition, TextCondition
from streamdiff.models.served.options import StepOptions
from streamdiff.models.served.step import ServedStep, ServedWeights
from streamdiff.pipeline.denoise import DenoiseStage
from streamdiff.pipeline.packet import Packet, SetReference, SwitchPrompt
from tests.models.step_case import Case, config_of

T = TypeVar("T")
NUM_CHUNKS = 7


def tensors_of(result: object) -> list[Tensor]:
    if isinstance(result, AudioCondition):
        result = result.parts
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


class Tape:
    """Graphs of a device that is no GPU."""

    def __init__(self) -> None:
        self.captures = 0
        self.replays = 0

    def capture(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        self.captures += 1
        result = function()

        def replay() -> None:
            self.replays += 1
            for mine, new in zip(tensors_of(result), tensors_of(function()), strict=True):
                mine.copy_(new)

        return result, replay


@pytest.fixture(autouse=True)
def no_grad() -> object:
    with torch.inference_mode():
        yield


def recorded(case: Case, memory: StepMemory) -> tuple[ServedStep, ServedWeights, Tape]:
    weights = ServedWeights(case.dit, StepOptions())
    weights.graphs = tape = Tape()
    return case.served(memory, weights=weights), weights, tape


def warm(case: Case, step: ServedStep) -> None:
    silence, voice = case.latents(1)[0], case.heard(case.voices(1)[0])
    step.warm(silence, case.rotations(0)[0], case.text, voice)


def test_a_recorded_stream_equals_an_eager_one() -> None:
    """A prompt switch in the middle, twice round the ring, bit for bit."""
    case = Case(config_of())
    eager_memory, memory = case.memory(), case.memory()
    eager = case.served(eager_memory)
    step, _, tape = recorded(case, memory)
    latents, voices = case.latents(NUM_CHUNKS), case.voices(NUM_CHUNKS)
    prompts = [case.text, case.dit.text_condition(case.randn(1, 3, case.config.dit.text_dim))]
    for c in range(NUM_CHUNKS):
        arguments = (c, latents[c], case.heard(voices[c]), prompts[c >= 4])
        assert torch.equal(case.serve(step, memory, *arguments), case.serve(eager, eager_memory, *arguments)), c
    assert torch.equal(memory.keys_ZBMNK, eager_memory.keys_ZBMNK)
    assert tape.captures == case.config.memory.window_chunks, "one graph per fill level, where it is an integer"


def test_conditions_live_where_graphs_read_them() -> None:
    """Text and sound through `ServedWeights` are computed in place, and an earlier one is not needed any more."""
    case = Case(config_of())
    eager_memory, memory = case.memory(), case.memory()
    eager = case.served(eager_memory)
    step, weights, _ = recorded(case, memory)
    addresses = set[int]()
    for c, (latent, voice) in enumerate(zip(case.latents(NUM_CHUNKS), case.voices(NUM_CHUNKS), strict=True)):
        assert voice is not None
        prompt = case.randn(1, 3, case.config.dit.text_dim)
        text, audio = weights.text_condition(prompt), weights.audio_condition(voice)
        addresses.add(text.keys_ZBPNK.data_ptr())
        found = case.serve(step, memory, c, latent, audio, text)
        expected = case.serve(eager, eager_memory, c, latent, case.heard(voice), case.dit.text_condition(prompt))
        assert torch.equal(found, expected), c
    assert len(addresses) == 1


def test_foreign_and_own_conditions_may_alternate() -> None:
    case = Case(config_of())
    eager_memory, memory = case.memory(), case.memory()
    eager = case.served(eager_memory)
    step, weights, _ = recorded(case, memory)
    for c, (latent, voice) in enumerate(zip(case.latents(NUM_CHUNKS), case.voices(NUM_CHUNKS), strict=True)):
        assert voice is not None
        heard = case.heard(voice)
        audio = heard if c % 2 == 0 else weights.audio_condition(voice)
        found = case.serve(step, memory, c, latent, audio)
        assert torch.equal(found, case.serve(eager, eager_memory, c, latent, heard)), c


def test_a_velocity_outlives_the_next_chunk() -> None:
    case = Case(config_of(audio=False))
    memory = case.memory()
    step, *_ = recorded(case, memory)
    latents = case.latents(2)
    first = case.serve(step, memory, 0, latents[0], None)
    kept = first.clone()
    case.serve(step, memory, 1, latents[1], None)
    assert torch.equal(first, kept)


def test_a_warm_step_captures_nothing_more() -> None:
    case = Case(config_of())
    memory = case.memory()
    step, _, tape = recorded(case, memory)
    warm(case, step)
    warmed = tape.captures
    assert warmed == case.config.memory.window_chunks
    for c, (latent, voice) in enumerate(zip(case.latents(NUM_CHUNKS), case.voices(NUM_CHUNKS), strict=True)):
        case.serve(step, memory, c, latent, case.heard(voice))
    assert tape.captures == warmed
    assert tape.replays == warmed + NUM_CHUNKS


def test_a_warm_step_computes_what_a_cold_one_does() -> None:
    case = Case(config_of())
    cold_memory, memory = case.memory(), case.memory()
    cold, (step, *_) = case.served(cold_memory), recorded(case, memory)
    warm(case, step)
    for c, (latent, voice) in enumerate(zip(case.latents(NUM_CHUNKS), case.voices(NUM_CHUNKS), strict=True)):
        arguments = (c, latent, case.heard(voice))
        assert torch.equal(case.serve(step, memory, *arguments), case.serve(cold, cold_memory, *arguments)), c


def test_warming_leaves_a_memory_as_it_was() -> None:
    case = Case(config_of())
    memory = StepMemory(case.sink, chunk_tokens=case.config.chunk_tokens, window_chunks=3)
    memory.take_sink(case.dit.motion_rotation(case.config.latent_hw))
    before = (memory.keys_ZBMNK.clone(), memory.values_ZBMNK.clone(), memory.length.clone(), memory.slot_index.clone())
    step, *_ = recorded(case, memory)
    warm(case, step)
    after = (memory.keys_ZBMNK, memory.values_ZBMNK, memory.length, memory.slot_index)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert memory.length_on_host == memory.sink_tokens
    assert memory.ring.latest == -1


def test_a_step_is_not_warmed_in_the_middle_of_a_stream() -> None:
    case = Case(config_of())
    memory = case.memory()
    step, *_ = recorded(case, memory)
    case.serve(step, memory, 0, case.latents(1)[0], case.heard(case.voices(1)[0]))
    with pytest.raises(MemoryOrderError, match="holds up to chunk 0; warm it before the first chunk"):
        warm(case, step)
    memory.clear()
    warm(case, step)


def packets(case: Case) -> list[Packet]:
    config = case.config
    latents, voices = case.latents(NUM_CHUNKS), case.voices(NUM_CHUNKS)
    start = (
        SetReference(case.reference, case.motion),
        SwitchPrompt(case.text_BPC),
    )
    other = (SwitchPrompt(case.randn(1, 4, config.dit.text_dim)),)
    commands = {0: start, 4: other}
    return [
        Packet(chunk=c, epoch=0, lead=5, latent_BCTHW=latents[c], audio_BZEA=voices[c], commands=commands.get(c, ()))
        for c in range(NUM_CHUNKS)
    ]


def test_a_whole_stage_may_be_warmed_and_recorded() -> None:
    """Two steps that share weights, graphs and inputs, against a stage without any of it."""
    case = Case(config_of())
    stream = packets(case)
    plain = DenoiseStage(case.dit, case.config, (1, 2))
    expected = [plain.step(packet).latent_BCTHW for packet in stream]
    stage = DenoiseStage(case.dit, case.config, (1, 2))
    stage._weights.graphs = tape = Tape()
    stage.warm()
    captures = tape.captures
    assert captures == 1 + 2 * case.config.memory.window_chunks, "the sound, and two steps at each fill level"
    for buffer in (stage.sink.values_ZBSNK, *(memory.keys_ZBMNK for memory in stage.memories)):
        assert not buffer.any(), "the rehearsal leaves nothing behind"
    found = [stage.step(packet).latent_BCTHW for packet in stream]
    assert tape.captures == captures
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(MemoryOrderError, match="warm it before the first chunk"):
        stage.warm()


def test_streams_that_share_weights_keep_their_own_prompt_and_sound() -> None:
    """Two stages of one engine, recorded, whose packets come in turns, each against itself alone."""
    case, other = Case(config_of()), Case(config_of(), seed=1)
    weights = ServedWeights(case.dit, StepOptions())
    weights.graphs = Tape()
    stages = [DenoiseStage(case.dit, case.config, (1, 2), weights=weights) for _ in range(2)]
    for stage in stages:
        stage.warm()
    streams = [packets(case), packets(other)]
    found = [
        [stage.step(p).latent_BCTHW for stage, p in zip(stages, pair, strict=True)]
        for pair in zip(*streams, strict=True)
    ]
    for number, stream in enumerate(streams):
        alone = DenoiseStage(case.dit, case.config, (1, 2))
        for chunk, packet in enumerate(stream):
            assert torch.equal(found[chunk][number], alone.step(packet).latent_BCTHW), (number, chunk)


def test_a_tape_would_show_a_stale_input() -> None:
    """So the tests above can fail: a recording reads the tensors it saw, not those handed over later."""
    case = Case(config_of(audio=False))
    memory = case.memory()
    step, weights, _ = recorded(case, memory)
    latents = case.latents(2)
    case.serve(step, memory, 0, latents[0], None)
    memory.rewind(0)
    inputs = weights.inputs
    stale = TextCondition(case.text.keys_ZBPNK + 1, case.text.values_ZBPNK)
    inputs._last = (None, stale, None)  # as if this prompt had been copied
    first = case.serve(step, memory, 0, latents[0], None, case.text)
    memory.rewind(0)
    inputs._last = (None, stale, None)
    assert torch.equal(case.serve(step, memory, 0, latents[0], None, stale), first)
