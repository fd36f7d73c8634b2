"""Serving lays weights out anew without holding any of them twice, and a rank needs the memory that `cost` says."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from streamdiff import presets
from streamdiff.models import cost
from streamdiff.models.dit import CausalDiT
from streamdiff.models.served.options import Precision, StepOptions
from streamdiff.models.served.step import ServedWeights
from tests.models.step_case import Case, config_of, rms_distance
from tests.models.step_on_paper import Watched, packet, stage_on_paper

EIGHT = StepOptions(precision=Precision.FP8, kept_layers=0)


def tensors_within(thing: object, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor that hangs on an object of ours, however deep."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
        return
    if isinstance(thing, nn.Module):
        yield from (*thing.parameters(), *thing.buffers())
        return
    if isinstance(thing, (list, tuple)):
        parts: list[object] = list(thing)
    elif isinstance(thing, dict):
        parts = list(thing.values())
    elif type(thing).__module__.startswith("streamdiff.models.served"):
        names = [*getattr(thing, "__dict__", {}), *getattr(thing, "__slots__", ())]
        parts = [getattr(thing, name) for name in names]
    else:
        return
    for part in parts:
        yield from tensors_within(part, seen)


def bytes_of(*things: object) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for x in things for t in tensors_within(x)}
    return sum(storages.values())


def test_q_k_and_v_become_views_of_one_matrix() -> None:
    case = Case(config_of())
    before = bytes_of(case.dit)
    weights = ServedWeights(case.dit, StepOptions())
    attention = case.dit.blocks.at(0).self_attn
    places = {linear.weight.untyped_storage().data_ptr() for linear in (attention.q, attention.k, attention.v)}
    assert len(places) == 1
    # New are the bias of the embedding, and each layer's norm3 weight less one.
    D = case.config.dit.dim
    assert bytes_of(case.dit, weights) - before == 4 * D + case.config.dit.num_layers * 4 * D


def test_the_readable_model_computes_the_same_bits_afterwards() -> None:
    case = Case(config_of())
    latent = case.latents(1)[0]
    before = case.read(case.memory(), 0, latent, None)
    names = set(case.dit.state_dict())
    ServedWeights(case.dit, StepOptions())
    assert torch.equal(case.read(case.memory(), 0, latent, None), before)
    assert set(case.dit.state_dict()) == names


def test_only_a_small_model_is_laid_out_once_more_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(config_of())
    weights = cost.dit_parameters(case.config.dit) * 4
    for most, expected in ((weights, weights), (weights - 1, 0)):
        monkeypatch.setattr(cost, "MOST_PACKED_BYTES", most)
        assert cost.packed_bytes(case.config.dit, 4) == expected
        assert ServedWeights(case.dit, StepOptions()).layers[0].qkv._packs == (expected > 0)
    assert cost.packed_bytes(presets.live_avatar_14b().dit, 2) == 0


@pytest.mark.heavy
def test_what_is_in_eight_bits_is_nowhere_in_sixteen() -> None:
    case = Case(config_of(), dtype=torch.bfloat16)
    before = bytes_of(case.dit)
    weights = ServedWeights(case.dit, EIGHT)
    gc.collect()
    dit, Z = case.config.dit, case.config.dit.num_layers
    D, F = dit.dim, dit.ffn_dim
    injectors = 2
    quantised = Z * (6 * D * D + 2 * D * F) + injectors * 2 * D * D
    scales = 4 * (Z * (7 * D + F) + injectors * 2 * D)
    # In float32: the encoder of sound, and copies of the embedding (64 values of a patch) and of the head.
    encoder = sum(p.numel() for p in case.dit.casual_audio_encoder.parameters())
    wide = 2 * encoder + 4 * (64 * D + D) + 4 * (64 * D + 64)
    assert bytes_of(case.dit, weights) == before - quantised + scales + wide + Z * 2 * 4 * D
    need = cost.rank_bytes(case.config, num_steps=1, bytes_per_value=2, kept_layers=0)
    assert need.weights == before - quantised + scales + wide


def test_the_sink_can_still_be_made_from_eight_bits() -> None:
    case = Case(config_of(), dtype=torch.bfloat16)
    before = case.sink.values_ZBSNK.clone()
    ServedWeights(case.dit, EIGHT)
    assert 1e-3 < rms_distance(case._sink().values_ZBSNK, before) < 0.06


@pytest.mark.slow
@pytest.mark.parametrize(("kept", "num_steps"), [(None, 1), (1, 4)])
def test_a_14b_rank_needs_what_cost_says(kept: int | None, num_steps: int) -> None:
    """Every allocation of a chunk with a full window, counted on paper at 704x384, against the closed form."""
    config = presets.live_avatar_14b()
    precision = Precision.WEIGHTS if kept is None else Precision.FP8
    options = StepOptions(graph=False, precision=precision, kept_layers=kept or 0)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode(), Watched() as watched:
        patch.setattr(Tensor, "pin_memory", lambda self: self)
        stage = stage_on_paper(config, options, steps=range(num_steps))
        stage.step(packet(config, 0))
        watched.begin()
        stage.step(packet(config, 1))
        peak = watched.peak_bytes
    need = cost.rank_bytes(config, num_steps=num_steps, bytes_per_value=2, kept_layers=kept)
    assert peak == pytest.approx(need.total, rel=0.005)
    assert stage.memory_bytes == need.history + need.pristine_sink


def test_a_14b_rank_of_one_step_fits() -> None:
    """Live Avatar reports about 80 GB a rank, and under 48 GB in eight bits."""
    config = presets.live_avatar_14b()
    sixteen = cost.rank_bytes(config, num_steps=1, bytes_per_value=2).total
    eight = cost.rank_bytes(config, num_steps=1, bytes_per_value=2, kept_layers=1).total
    assert eight < 40e9 < sixteen < 49e9


@pytest.mark.heavy
def test_the_model_on_paper_has_its_full_size() -> None:
    config = presets.live_avatar_14b()
    with Watched() as watched, torch.device("meta"):
        dit = CausalDiT(config.dit).to(torch.bfloat16)
        gc.collect()
        assert (
            watched.bytes_alive == 2 * sum(p.numel() for p in dit.parameters()) == 2 * cost.dit_parameters(config.dit)
        )
