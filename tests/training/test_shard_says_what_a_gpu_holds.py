"""Bytes predicted for sharded training, against the 14B model on the meta device and against what autograd keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from streamdiff import presets
from streamdiff.config import EngineConfig, MemoryConfig
from streamdiff.errors import ConfigError
from streamdiff.models.dit import CausalDiT, initialise
from streamdiff.training import lora, shard
from streamdiff.training.distil import clip_velocity, conditions
from streamdiff.training.sequence import directly, recomputed, windowed

GPUS = 8


RECIPE = shard.live_avatar_14b(GPUS)


@pytest.fixture(scope="module")
def models() -> Generator[shard.ShardedModels]:
    """As rank 0 of eight that are not there holds them: shards are cut as they would be, on the meta device."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=GPUS)
    try:
        yield shard.assemble(RECIPE, init_device_mesh("cpu", (GPUS,)))
    finally:
        dist.destroy_process_group()


def _local_bytes(tensors: list[Tensor]) -> int:
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in local)


@pytest.mark.slow
def test_the_14b_recipe_on_eight_gpus(models: shard.ShardedModels) -> None:
    predicted = shard.training_bytes(RECIPE)
    everything = [p for dit in (models.student, models.critic, models.teacher) for p in dit.parameters()]
    assert all(p.is_meta for p in everything)
    assert _local_bytes(everything) == pytest.approx(predicted.parameters, rel=0.002)

    learning = models.learning
    gradients, moments = [], []
    for parameters in learning.values():
        optimiser = torch.optim.AdamW(parameters, lr=1e-5, foreach=False)
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimiser.step()
        gradients += [p.grad for p in parameters]
        moments += [state[key] for state in optimiser.state.values() for key in ("exp_avg", "exp_avg_sq")]
    average = [p.detach().clone() for p in learning["student"]]
    assert _local_bytes(gradients) == pytest.approx(predicted.gradients, rel=0.002)
    assert _local_bytes([*moments, *average]) == pytest.approx(predicted.optimiser, rel=0.002)

    # The base is frozen, and each of the 448 adapters has two factors.
    assert len(learning["student"]) == len(learning["critic"]) == 2 * 448
    # An H100 of 80 GB: what is predicted fits, with the tenth that is left for temporaries.
    assert predicted.total < 0.9 * 80e9


@pytest.mark.slow
def test_what_is_whole_for_a_while_is_what_lies_between_layers(models: shard.ShardedModels) -> None:
    dit = models.student
    apart = {id(p) for module in shard._apart(dit) for p in module.parameters()}
    inside = {id(p) for block in dit.blocks for p in block.parameters()}
    between = [p for p in dit.parameters() if id(p) not in apart | inside]
    block = list(dit.blocks.at(0).parameters())
    whole = sum(p.numel() * p.element_size() for p in (*between, *block, *block))
    assert shard.training_bytes(RECIPE).gathered == pytest.approx(whole, rel=0.01)


def small(**changes: object) -> EngineConfig:
    full = presets.portrait()
    assert full.dit.audio is not None
    audio = dataclasses.replace(full.dit.audio, inject_layers=(0,))
    dit = dataclasses.replace(full.dit, dim=128, ffn_dim=320, num_heads=2, num_layers=3, audio=audio)
    config = dataclasses.replace(full, dit=dit, memory=MemoryConfig(window_chunks=3))
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def kept_by_autograd(config: EngineConfig, *, num_chunks: int, num_clips: int, rank: int, recompute: bool) -> int:
    """Bytes of all storages that a pass over clips keeps for its way back, weights and conditions aside."""
    dit = CausalDiT(config.dit)
    initialise(dit, seed=0)
    lora.adapt(dit, rank=rank)
    layout = windowed(num_chunks, window_chunks=config.memory.window_chunks, frames_per_chunk=config.frames_per_chunk)
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    audio, (H, W), C = config.dit.audio, config.latent_hw, config.dit.in_dim
    assert audio is not None
    heard = normal(num_clips, audio.num_features, audio.feature_dim, 4 * layout.num_frames)
    prompt = normal(num_clips, 4, config.dit.text_dim)
    visit = recomputed if recompute else directly
    with torch.no_grad():
        given = conditions(dit, normal(num_clips, C, 1, H, W), prompt, heard, layout)
    known = {t.untyped_storage().data_ptr() for t in dit.parameters()}
    known |= {t.untyped_storage().data_ptr() for t in (given.text.keys_ZBPNK, given.text.values_ZBPNK)}
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    lead_Bn = torch.full((num_clips, num_chunks), 5)
    latent = normal(num_clips, C, layout.num_frames, H, W)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        velocity = clip_velocity(dit, given, layout, lead_Bn, visit=visit)(latent, torch.full((num_clips,), 0.5))
    assert velocity.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("num_chunks", [1, 4])
@pytest.mark.parametrize("rank", [2, 16])
def test_activations_are_what_autograd_keeps(num_chunks: int, rank: int) -> None:
    """Within 5 %: left out are a mean and a deviation per token and norm, a shift and a scale per chunk and layer.

    In float32, where what is kept in the weights' type and what is kept wide are of one size.
    """
    config = small()
    real = kept_by_autograd(config, num_chunks=num_chunks, num_clips=2, rank=rank, recompute=False)
    predicted = shard.kept_activations(
        config,
        num_clips=2,
        num_chunks=num_chunks,
        seen_chunks=min(3, num_chunks),
        lora_rank=rank,
        bytes_per_value=4,
        recompute=False,
    )
    assert predicted == pytest.approx(real, rel=0.05)


def test_with_recomputation_a_layer_keeps_its_input() -> None:
    found = [
        kept_by_autograd(
            small(dit=dataclasses.replace(small().dit, num_layers=layers)),
            num_chunks=3,
            num_clips=1,
            rank=2,
            recompute=True,
        )
        for layers in (2, 6)
    ]
    config = small()
    tokens = 3 * config.chunk_tokens
    assert (found[1] - found[0]) / 4 == pytest.approx(tokens * config.dit.dim * 4, rel=0.02)
    wide, deep = (
        shard.kept_activations(
            config, num_clips=1, num_chunks=3, seen_chunks=3, lora_rank=2, bytes_per_value=4, recompute=recompute
        )
        for recompute in (False, True)
    )
    assert deep < 0.6 * wide


def test_more_gpus_hold_less_and_longer_clips_more() -> None:
    eight, sixteen = (shard.training_bytes(shard.live_avatar_14b(gpus)) for gpus in (8, 16))
    assert sixteen.parameters == pytest.approx(eight.parameters / 2, rel=1e-6)
    assert sixteen.clip_activations == eight.clip_activations > 5 * eight.chunk_activations
    longer = shard.training_bytes(dataclasses.replace(shard.live_avatar_14b(8), num_chunks=14))
    assert longer.clip_activations > 1.9 * eight.clip_activations
    assert longer.chunk_activations == eight.chunk_activations
    kept = shard.training_bytes(dataclasses.replace(shard.live_avatar_14b(8), recompute=False))
    assert kept.total > 141e9  # no GPU of today: layers must be computed again


def test_a_recipe_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one GPU"):
        shard.live_avatar_14b(0)
