"""Folding a prompt and a voice changes how cross-attention is computed, never what: one key for all rows of padding,
and values that have met the output projection.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from streamdiff.config import AudioInjectionConfig, EngineConfig
from streamdiff.errors import ConfigError
from streamdiff.models.served.block import FusedRowOps
from streamdiff.models.served.cross import FoldedAudio, FoldedText, fold_audio, fold_text, folded_length, text_keys
from streamdiff.models.served.options import Precision, StepOptions
from streamdiff.models.served.step import ServedWeights
from streamdiff.pipeline.denoise import DenoiseStage
from streamdiff.pipeline.packet import Packet, SetReference, SwitchPrompt
from streamdiff_kernels import Impl
from tests.models.step_case import Case, config_of, distance, rms_distance
from tests.models.test_a_graph_follows_the_stream import Tape

TEXT_LEN = 96
"""Rows that the model reads; a prompt of 5 to 63 is folded."""


@pytest.fixture(autouse=True)
def no_grad() -> object:
    with torch.inference_mode():
        yield


def wide(*, num_heads: int = 2) -> EngineConfig:
    """Heads of 128, as those of the published model; one audio token to a frame beside the padding one."""
    config = config_of(dim=128 * num_heads, num_layers=2)
    heard = AudioInjectionConfig(feature_dim=16, num_features=2, num_tokens=3, inject_layers=(0, 1))
    dit = dataclasses.replace(config.dit, num_heads=num_heads, text_len=TEXT_LEN, audio=heard)
    return dataclasses.replace(config, dit=dit)


def rows(case: Case, count: int) -> Tensor:
    return case.randn(case.num_streams, count, case.config.dit.text_dim)


@pytest.mark.parametrize("num_rows", [1, 5, 15, 16, 47, TEXT_LEN])
@pytest.mark.parametrize("num_streams", [1, 2])
def test_attention_is_that_of_all_padded_rows(num_rows: int, num_streams: int) -> None:
    """In float64 against torch's attention over every row, and the projection after it."""
    case = Case(wide(), num_streams=num_streams)
    dit = case.dit.double()
    text_BPC = rows(case, num_rows).double()
    length = folded_length(dit, num_rows, 128, always_most=False) or TEXT_LEN
    text = fold_text(dit, text_BPC, length)
    folded = FoldedText(text.keys_ZBNKP, text.bias_P.double(), text.outputs_ZBQD)
    h_BLD = torch.randn(num_streams, 7, dit.config.dim, dtype=torch.float64)
    weights = ServedWeights(dit, StepOptions(impl=Impl.REFERENCE, attention="sdpa"))
    for z, block in enumerate(dit.blocks):
        context_BPD = dit.text_embedding(F.pad(text_BPC, (0, 0, 0, TEXT_LEN - num_rows)))
        q, k, v = block.cross_attn.query(h_BLD), block.cross_attn.key(context_BPD), block.cross_attn.value(context_BPD)
        y_BNLK = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        expected = block.cross_attn.o(y_BNLK.transpose(1, 2).flatten(2))
        ops = FusedRowOps(Impl.REFERENCE)
        found = weights.layers[z].text(ops, h_BLD, text_keys(folded, z), dit.config.eps)
        # Scores are float32 by design, and so are the norms before them.
        assert distance(found, expected) <= 2e-6


def velocities(case: Case, options: StepOptions, text_BPC: Tensor, num_chunks: int = 4) -> list[Tensor]:
    """Through `ServedWeights`, which folds what the options let it fold."""
    memory = case.memory()
    weights = ServedWeights(case.dit, options)
    step = case.served(memory, options, weights)
    text = weights.text_condition(text_BPC)
    latents, voices = _inputs(case, num_chunks)
    heard = [weights.audio_condition(voice) for voice in voices]
    return [case.serve(step, memory, c, latents[c], heard[c], text) for c in range(num_chunks)]


def _inputs(case: Case, num_chunks: int) -> tuple[list[Tensor], list[Tensor]]:
    case._draw.manual_seed(7)
    voices = [voice for voice in case.voices(num_chunks) if voice is not None]
    return case.latents(num_chunks), voices


@pytest.mark.parametrize("num_streams", [1, 2])
def test_velocities_are_the_readable_models(num_streams: int) -> None:
    case = Case(wide(), num_streams=num_streams)
    memory, (latents, voices) = case.memory(), _inputs(case, 4)
    read = [case.read(memory, c, latents[c], case.heard(voices[c])) for c in range(4)]
    served = velocities(case, StepOptions(), case.text_BPC)
    assert max(map(distance, served, read)) <= 2e-6
    unfolded = velocities(case, StepOptions(folded_keys=0), case.text_BPC)
    assert not torch.equal(served[0], unfolded[0]), "nothing was folded"


def test_bfloat16_loses_nothing_by_it() -> None:
    """Root mean square against float32 weights of the same values: folding rounds less often."""
    exact, rounded = Case(wide()), Case(wide(), dtype=torch.bfloat16)
    expected = velocities(exact, StepOptions(folded_keys=0), exact.text_BPC)
    plain = velocities(rounded, StepOptions(folded_keys=0), rounded.text_BPC)
    folded = velocities(rounded, StepOptions(), rounded.text_BPC)
    plain_error = max(map(rms_distance, plain, expected))
    assert 0 < max(map(rms_distance, folded, expected)) <= 1.05 * plain_error


def test_eight_bits_fold_their_prompt_and_leave_sound() -> None:
    case = Case(wide(), dtype=torch.bfloat16)
    exact = Case(wide())
    expected = velocities(exact, StepOptions(folded_keys=0), exact.text_BPC)
    options = StepOptions(precision=Precision.FP8, kept_layers=0)
    weights = ServedWeights(Case(wide(), dtype=torch.bfloat16).dit, options)
    assert isinstance(weights.text_condition(case.text_BPC), FoldedText)
    assert not isinstance(weights.audio_condition(_inputs(case, 1)[1][0]), FoldedAudio)
    assert max(map(rms_distance, velocities(case, options, case.text_BPC), expected)) <= 0.06


@pytest.mark.parametrize(
    ("num_rows", "most", "always_most", "length"),
    [
        (1, 64, False, 16),
        (15, 64, False, 16),  # and one for the padding
        (16, 64, False, 32),
        (5, 64, True, 64),
        (63, 64, True, 64),
        (64, 64, True, None),
        (79, 128, False, 80),
        (95, 128, False, None),  # as many as there are rows
        (5, 0, False, None),
    ],
)
def test_a_prompt_is_folded_where_that_is_shorter(
    num_rows: int, most: int, always_most: bool, length: int | None
) -> None:
    assert folded_length(Case(wide()).dit, num_rows, most, always_most=always_most) == length


def test_narrow_heads_are_left_as_they_are() -> None:
    """The packaged models keep their bits."""
    case = Case(config_of())
    assert folded_length(case.dit, 1, 64, always_most=False) is None
    weights = ServedWeights(case.dit, StepOptions())
    (voice,) = case.voices(1)
    assert voice is not None
    assert not isinstance(weights.audio_condition(voice), FoldedAudio)


def test_a_count_below_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="folded_keys"):
        StepOptions(folded_keys=-1)


def test_recorded_steps_follow_from_a_short_prompt_to_a_long_one_and_back() -> None:
    """A long prompt is not folded: it has buffers and recordings of its own, and neither goes stale."""
    case = Case(wide())
    eager_memory, memory = case.memory(), case.memory()
    eager_weights, weights = ServedWeights(case.dit, StepOptions()), ServedWeights(case.dit, StepOptions())
    weights.graphs = Tape()
    step, eager = case.served(memory, weights=weights), case.served(eager_memory, weights=eager_weights)
    latents, voices = _inputs(case, 6)
    forms = set[bool]()
    for c, count in enumerate([5, 9, 80, 84, 12, 90]):
        prompt = rows(case, count)
        text, plain = weights.text_condition(prompt), eager_weights.text_condition(prompt)
        forms.add(isinstance(text, FoldedText))
        found = case.serve(step, memory, c, latents[c], weights.audio_condition(voices[c]), text)
        expected = case.serve(eager, eager_memory, c, latents[c], eager_weights.audio_condition(voices[c]), plain)
        assert distance(found, expected) <= 2e-6, c
    assert forms == {True, False}


def test_the_sink_of_a_stage_does_not_depend_on_folding() -> None:
    """It is prefilled from the prompt itself."""
    case = Case(wide())
    sinks = []
    for options in (StepOptions(), StepOptions(folded_keys=0)):
        stage = DenoiseStage(case.dit, case.config, [0], options=options)
        first = (SetReference(case.reference, case.motion), SwitchPrompt(case.text_BPC))
        latent, voice = (part[0] for part in _inputs(case, 1))
        stage.step(Packet(chunk=0, epoch=0, lead=30, latent_BCTHW=latent, audio_BZEA=voice, commands=first))
        sinks.append(torch.stack([stage.sink.keys(z) for z in range(2)]))
    assert torch.equal(*sinks)


def test_folded_sound_is_computed_once_for_all_steps() -> None:
    case = Case(wide())
    audio = case.heard(_inputs(case, 1)[1][0])
    assert audio is not None
    folded = fold_audio(case.dit, audio)
    assert folded.scales is audio.scales
    assert [v.shape for v in folded.values] == [(k.shape[0], k.shape[1] * k.shape[3], 256) for k in folded.keys]
