"""What each of two ranks does in `test_shard_trains_as_one`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from streamdiff import presets, rng
from streamdiff.config import DiTConfig
from streamdiff.models.dit import CausalDiT, initialise
from streamdiff.pipeline.group import World
from streamdiff.training import lora, shard
from streamdiff.training.distil import ClipModel, Cut, accumulate, clip_velocity, conditions, critic_loss, roll_out
from streamdiff.training.sequence import Visit, directly, windowed
from tests.pipeline.ranks import free_port as free_port

FULL = presets.portrait().dit
assert FULL.audio is not None
CONFIG: DiTConfig = dataclasses.replace(
    FULL, dim=48, ffn_dim=64, num_heads=2, num_layers=3, audio=dataclasses.replace(FULL.audio, inject_layers=(0, 2))
)
LAYOUT = windowed(3, window_chunks=2, frames_per_chunk=2)
CLIPS = 4


def model(rank: int = 0) -> CausalDiT:
    dit = CausalDiT(CONFIG)
    initialise(dit, seed=7)
    if rank:
        lora.adapt(dit, rank=rank, seed=2)
        with torch.no_grad():
            for layer in lora.adapted_layers(dit).values():
                layer.lora_B.weight.copy_(0.05 * rng.normal(tuple(layer.lora_B.weight.shape), "B"))
    return dit


def inputs(rows: slice) -> dict[str, Tensor]:
    audio = CONFIG.audio
    assert audio is not None
    shapes = {
        "latent": (CLIPS, CONFIG.in_dim, LAYOUT.num_frames, 4, 4),
        "noise": (CLIPS, CONFIG.in_dim, LAYOUT.num_frames, 4, 4),
        "reference": (CLIPS, CONFIG.in_dim, 1, 4, 4),
        "text": (CLIPS, 5, CONFIG.text_dim),
        "audio": (CLIPS, audio.num_features, audio.feature_dim, 4 * LAYOUT.num_frames),
    }
    found = {name: rng.normal(shape, "shard", name)[rows] for name, shape in shapes.items()}
    found["sigma"] = torch.tensor([0.9, 0.3, 0.6, 0.8])[rows]
    found["lead"] = torch.tensor([[4, 5, 6], [9, 8, 7], [4, 4, 4], [6, 5, 9]])[rows]
    return found


def flow_gradient(dit: CausalDiT, rows: slice, visit: Visit) -> float:
    """Flow matching on whole clips."""
    given = inputs(rows)

    def loss() -> Tensor:
        known = conditions(dit, given["reference"], given["text"], given["audio"], LAYOUT, visit=visit)
        velocity = clip_velocity(dit, known, LAYOUT, given["lead"], visit=visit)
        return critic_loss(velocity, given["latent"], given["noise"], given["sigma"])

    value = shard.enter(dit, loss)
    value.backward()
    return float(value.detach())


def rollout_gradient(dit: CausalDiT, rows: slice, visit: Visit) -> float:
    """A rollout, and a gradient brought home chunk by chunk."""
    given = inputs(rows)
    cut = Cut(
        shard.enter(
            dit, lambda: conditions(dit, given["reference"], given["text"], given["audio"], LAYOUT, visit=visit)
        )
    )
    inner = ClipModel(dit, cut.tree, LAYOUT, given["lead"], visit=visit)

    def whole(noisy: Tensor, *, sigma: float, chunk: int, history):
        return shard.enter(dit, lambda: inner(noisy, sigma=sigma, chunk=chunk, history=history))

    rollout = roll_out(
        whole,
        lambda chunk, step: rng.normal((CLIPS, CONFIG.in_dim, 2, 4, 4), "roll", chunk, step)[rows],
        sigmas=(1.0, 0.6, 0.0),
        visible=LAYOUT.visible,
        exit_step=1,
        renoise=True,
    )
    gradient = (rollout.data_BCTHW - given["latent"]) / rollout.data_BCTHW.numel()
    value = float(gradient.abs().sum())
    accumulate(whole, rollout, gradient)
    cut.go_on()
    return value


GRADIENTS: dict[str, Callable[[CausalDiT, slice, Visit], float]] = {"flow": flow_gradient, "rollout": rollout_gradient}


Clip = Callable[[list[torch.nn.Parameter]], float]


def descend(dit: CausalDiT, which: str, rows: slice, visit: Visit, clip: Clip) -> tuple[float, float]:
    """Two steps of descent; loss and length of the gradient of the last."""
    learning = [p for p in dit.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learning, lr=1e-2, betas=(0.9, 0.95), eps=1e-2)
    lengths = 0.0
    loss = 0.0
    for _ in range(2):
        optimiser.zero_grad()
        loss = GRADIENTS[which](dit, rows, visit)
        lengths = clip(learning)
        optimiser.step()
    return loss, lengths


def alone(which: str, rank: int, longest: float) -> tuple[dict[str, Tensor], float, float]:
    dit = model(rank)

    def clip(parameters: list[torch.nn.Parameter]) -> float:
        return float(torch.nn.utils.clip_grad_norm_(parameters, longest))

    loss, length = descend(dit, which, slice(0, CLIPS), directly, clip)
    return {name: tensor.detach() for name, tensor in dit.state_dict().items()}, loss, length


Found = tuple[dict[str, Any], float, float, int]
"""Whole state (rank 0 only), loss, length of the gradient, values held by this rank."""


def _share(world: World) -> slice:
    share = CLIPS // world.size
    return slice(world.rank * share, (world.rank + 1) * share)


def job(world: World, cases: Sequence[tuple[str, int, float, bool]]) -> list[Found]:
    """The same as `alone`, on this rank's share of the clips, for several cases."""
    found: list[Found] = []
    with shard.processes(world, timeout_s=120.0) as mesh:
        for which, rank, longest, again in cases:
            dit = model(rank)
            shard.shard(dit, mesh)
            visit = shard.enter_recomputed if again else shard.enter

            def clip(parameters: list[torch.nn.Parameter], longest: float = longest) -> float:
                return shard.clip(parameters, longest)

            loss, length = descend(dit, which, _share(world), visit, clip)
            held = sum(p.to_local().numel() for p in dit.parameters())  # type: ignore[attr-defined]
            state = {name: t.numpy() for name, t in shard.whole_state(dit).items()}
            found.append((state, loss, length, held))
    return found


def accumulated(world: World) -> list[list[Any]]:
    """Two backward passes that both send, and two of which only the second does; the gradients of both."""
    found: list[list[Any]] = []
    with shard.processes(world, timeout_s=120.0) as mesh:
        for sends_first in (True, False):
            dit = model(2)
            shard.shard(dit, mesh)
            with shard.gathering_gradients(dit, send=sends_first):
                flow_gradient(dit, _share(world), shard.enter)
            flow_gradient(dit, _share(world), shard.enter)
            gradients = [p.grad.full_tensor() for p in dit.parameters() if p.grad is not None]  # type: ignore[attr-defined]
            found.append([g.numpy() for g in gradients])
    return found


def filled(world: World) -> dict[str, Any]:
    """A model on the meta device, sharded, given memory and filled from a whole one; brought together again."""
    whole = model().state_dict()
    with shard.processes(world, timeout_s=120.0) as mesh:
        with torch.device("meta"):
            dit = CausalDiT(CONFIG)
        shard.shard(dit, mesh)
        dit.to_empty(device="cpu")
        shard.fill(dit, whole.__getitem__)
        return {name: t.numpy() for name, t in shard.whole_state(dit).items()}
