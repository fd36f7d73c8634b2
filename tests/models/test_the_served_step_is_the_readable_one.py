"""Serving a step changes how it is computed, never what: `ServedStep` against `CausalDiT.forward`, chunk by chunk."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from streamdiff.errors import BackendError, ConfigError
from streamdiff.memory import LayerMemory
from streamdiff.models.served.options import Precision, StepOptions
from streamdiff.models.served.step import ServedWeights
from streamdiff_kernels import Impl
from tests.models.step_case import Case, config_of, distance, rms_distance

FLOAT32 = 2e-6
"""Of the largest value; seen: 4e-7. The order of sums differs, and biases of the embedding are added up first."""
EIGHT_BITS = 0.06
"""Root mean square, all layers in eight bits; seen: 0.027. One rounding to e4m3 is 0.026 of a value, on average."""

NUM_CHUNKS = 6
"""Twice round a ring of three."""


@pytest.fixture(autouse=True)
def no_grad() -> object:
    with torch.inference_mode():
        yield


def both(case: Case, options: StepOptions | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Velocities of every chunk, as read and as served. The readable model goes first: serving moves its weights."""
    latents, voices = case.latents(NUM_CHUNKS), case.voices(NUM_CHUNKS)
    heard = [case.heard(voice) for voice in voices]
    memory = case.memory()
    read = [case.read(memory, c, latents[c], heard[c]) for c in range(NUM_CHUNKS)]
    memory = case.memory()
    step = case.served(memory, options)
    return read, [case.serve(step, memory, c, latents[c], heard[c]) for c in range(NUM_CHUNKS)]


@pytest.mark.parametrize("impl", [Impl.TORCH, Impl.REFERENCE])
@pytest.mark.parametrize("num_streams", [1, 2])
@pytest.mark.parametrize("audio", [True, False])
def test_in_float32(audio: bool, num_streams: int, impl: Impl) -> None:
    case = Case(config_of(audio=audio), num_streams=num_streams)
    read, served = both(case, StepOptions(impl=impl))
    assert max(map(distance, served, read)) <= FLOAT32


@pytest.mark.parametrize(("frames_per_chunk", "window_chunks"), [(1, 1), (1, 4), (3, 2)])
def test_with_any_chunk_and_window(frames_per_chunk: int, window_chunks: int) -> None:
    case = Case(config_of(frames_per_chunk=frames_per_chunk, window_chunks=window_chunks, num_layers=2))
    read, served = both(case)
    assert max(map(distance, served, read)) <= FLOAT32


def test_a_sparse_history_is_a_short_ring() -> None:
    """Attention to {sink, previous chunk, own chunk} over a long ring, picked and joined, is a window of two."""
    long, short = (Case(config_of(window_chunks=window)) for window in (4, 2))
    latents, voices = short.latents(NUM_CHUNKS), short.voices(NUM_CHUNKS)
    ring, memory = long.memory(), short.memory()
    step = short.served(memory)
    L, S = long.config.chunk_tokens, ring.sink_tokens
    for c in range(NUM_CHUNKS):
        own, sink = long.rotations(c)
        slot = ring.admit(c)
        ring.turn_sink(sink)
        # The readable model writes its own keys through `own_keys`, so the join is made of views of one copy.
        slots = [(c - 1) % 4, slot.index] if c else [slot.index]
        rows = torch.cat([torch.arange(S), *(S + s * L + torch.arange(L) for s in slots)])
        layers = []
        for keys, values in zip(ring.keys_ZBMNK, ring.values_ZBMNK, strict=True):
            picked = keys[:, rows], values[:, rows]
            layers.append(LayerMemory(picked[0][:, -L:], picked[1][:, -L:], *picked))
        heard = long.heard(voices[c])
        read = long.dit(latents[c], long.modulation, long.text, own, audio=heard, memory=layers)
        for z, layer in enumerate(layers):
            ring.keys_ZBMNK[z][:, S + slot.index * L :][:, :L] = layer.own_keys_BLNK
            ring.values_ZBMNK[z][:, S + slot.index * L :][:, :L] = layer.own_values_BLNK
        assert distance(short.serve(step, memory, c, latents[c], heard), read) <= FLOAT32


def test_without_a_motion_prefix() -> None:
    read, served = both(Case(config_of(motion=False)))
    assert max(map(distance, served, read)) <= FLOAT32


def test_the_histories_are_the_same() -> None:
    case = Case(config_of())
    latents, voices = case.latents(NUM_CHUNKS), case.voices(NUM_CHUNKS)
    one, other = case.memory(), case.memory()
    step = case.served(other)
    for c in range(NUM_CHUNKS):
        audio = case.heard(voices[c])
        case.read(one, c, latents[c], audio)
        case.serve(step, other, c, latents[c], audio)
    assert distance(other.keys_ZBMNK, one.keys_ZBMNK) <= FLOAT32
    assert distance(other.values_ZBMNK, one.values_ZBMNK) <= FLOAT32


@pytest.mark.parametrize("audio", [True, False])
def test_in_bfloat16_it_rounds_no_worse(audio: bool) -> None:
    """Both are measured against float32 with the same weights: the served step may not lose more than the readable."""
    exact, _ = both(Case(config_of(audio=audio)))
    read, served = both(Case(config_of(audio=audio), dtype=torch.bfloat16))
    losses = [(rms_distance(s, e), rms_distance(r, e)) for s, r, e in zip(served, read, exact, strict=True)]
    assert max(loss for loss, _ in losses) <= 0.02
    for ours, theirs in losses:
        assert ours <= 1.1 * theirs


@pytest.mark.parametrize("num_streams", [1, 2])
@pytest.mark.parametrize("audio", [True, False])
def test_in_eight_bits(audio: bool, num_streams: int) -> None:
    case = Case(config_of(audio=audio), dtype=torch.bfloat16, num_streams=num_streams)
    read, served = both(case, StepOptions(precision=Precision.FP8, kept_layers=0))
    losses = list(map(rms_distance, served, read))
    assert max(losses) <= EIGHT_BITS
    assert min(losses) >= 1e-3, "nothing was rounded to eight bits"


def test_eight_bits_mean_the_same_to_every_implementation() -> None:
    options = [StepOptions(impl=i, precision=Precision.FP8, kept_layers=0) for i in (Impl.TORCH, Impl.REFERENCE)]
    (_, one), (_, other) = (both(Case(config_of(), dtype=torch.bfloat16), o) for o in options)
    # A value near the border between two neighbours falls to either side; seen: 0.018.
    assert max(map(rms_distance, one, other)) <= 0.035


@pytest.mark.heavy
def test_the_ends_of_the_model_keep_their_precision() -> None:
    """Three layers with one kept at each end round less than three in eight bits, and two kept ends round nothing."""
    losses = []
    for kept in (0, 1, 2):
        case = Case(config_of(), dtype=torch.bfloat16)
        read, served = both(case, StepOptions(precision=Precision.FP8, kept_layers=kept))
        losses.append(max(map(rms_distance, served, read)))
    plain_read, plain_served = both(Case(config_of(), dtype=torch.bfloat16))
    plain = max(map(rms_distance, plain_served, plain_read))
    assert losses[0] > losses[1] > losses[2] == plain


def test_a_rewound_chunk_is_computed_the_same() -> None:
    case = Case(config_of())
    latents = case.latents(NUM_CHUNKS)
    memory = case.memory()
    step = case.served(memory)
    first = [case.serve(step, memory, c, latents[c], None) for c in range(NUM_CHUNKS)]
    memory.rewind(NUM_CHUNKS - 1)
    assert torch.equal(case.serve(step, memory, NUM_CHUNKS - 1, latents[-1], None), first[-1])


def test_eight_bits_need_bfloat16_weights() -> None:
    with pytest.raises(BackendError, match="load them as bfloat16"):
        ServedWeights(Case(config_of()).dit, StepOptions(precision=Precision.FP8))


def test_eight_bits_need_widths_of_sixteen() -> None:
    config = config_of()
    odd = dataclasses.replace(config, dit=dataclasses.replace(config.dit, ffn_dim=120))
    with pytest.raises(BackendError, match="multiples of 16, got dim=64 and ffn_dim=120"):
        ServedWeights(Case(odd, dtype=torch.bfloat16).dit, StepOptions(precision=Precision.FP8))


def test_weights_are_quantised_once() -> None:
    case = Case(config_of(), dtype=torch.bfloat16)
    options = StepOptions(precision=Precision.FP8, kept_layers=0)
    ServedWeights(case.dit, options)
    with pytest.raises(BackendError, match="quantised for serving before; share one ServedWeights"):
        ServedWeights(case.dit, options)


def test_a_backend_that_cannot_run_is_an_error() -> None:
    case = Case(config_of())
    with pytest.raises(RuntimeError, match="cannot run: it needs a CUDA device"):
        case.served(case.memory(), StepOptions(attention="sdpa-flash"))


def test_kept_layers_are_counted() -> None:
    with pytest.raises(ConfigError, match="kept_layers counts layers"):
        StepOptions(kept_layers=-1)
