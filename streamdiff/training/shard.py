"""A model larger than a GPU, trained on several: weights, gradients and moments in shards (FSDP2), one clip a GPU.

    with processes(world, device="cuda:3") as mesh:
        shard(dit, mesh)                                        # in place; every layer a unit
        loss = enter(dit, lambda: ...sequence_velocity(..., visit=enter))
        loss.backward()                                         # gradients: the mean over GPUs, in shards
        length = clip(dit.parameters(), 1.0)
        ...
        state = whole_state(dit)                                # on rank 0, for a checkpoint of the ordinary kind

What is computed is what `streamdiff.training.sequence` computes. Only where weights are needed they are brought
together (`enter`, its ``visit``), and let go of again: layer by layer on the way forward, and again on the way back.

This is the second module that knows ``torch.distributed``: the first, `streamdiff.pipeline.transport`, carries packets
between ranks that do different work; here all ranks do the same, and torch's own collectives are the subject.

`training_bytes` says beforehand what a GPU will hold, and `live_avatar_14b` is the recipe that it was written for.

Letters in formulas: L tokens of a chunk, S of the sink, M keys that a chunk sees, D width, F hidden width, R rank of
adapters, P prompt tokens, Z layers, n chunks of a clip.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import types
import warnings
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from streamdiff import presets
from streamdiff.config import DiTConfig, EngineConfig
from streamdiff.errors import ConfigError
from streamdiff.models import cost
from streamdiff.models.dit import CausalDiT
from streamdiff.pipeline.group import World
from streamdiff.training import lora
from streamdiff.training.distil import mapped
from streamdiff.training.sequence import recomputed

_T = TypeVar("_T")


@contextlib.contextmanager
def processes(world: World, *, device: torch.device | str = "cpu", timeout_s: float = 600.0) -> Generator[DeviceMesh]:
    """Process group of all ranks, met at ``world.host``, as a mesh of one axis; destroyed when the context ends.

    Raises whatever torch raises when a rank is not there, or silent, for ``timeout_s``.
    """
    device = torch.device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        init_method=f"tcp://{world.host}:{world.port}",
        rank=world.rank,
        world_size=world.size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    try:
        with warnings.catch_warnings():
            # Nothing here writes in place into what a layer returned, which is what torch warns of.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            yield init_device_mesh(device.type, (world.size,), mesh_dim_names=("data",))
    finally:
        dist.destroy_process_group()


def _through(_self: nn.Module, function: Callable[..., _T], *tensors: Tensor) -> _T:
    return function(*tensors)


def enter(module: nn.Module, function: Callable[..., _T], *tensors: Tensor) -> _T:
    """Run ``function(*tensors)`` while the weights of a sharded module are whole; a ``visit`` of the sequence module.

    Tensors that come out, be it in tuples or dataclasses, bring the weights together again when a gradient comes back
    to them. A module that is not sharded runs the function as it is.
    """
    through = cast("Callable[..., tuple[Tensor, ...]] | None", getattr(module, "through", None))
    if through is None:
        return function(*tensors)
    shape: list[_T] = []

    def flat(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves: list[Tensor] = []

        def take(x: Tensor) -> Tensor:
            leaves.append(x)
            return x

        shape.append(mapped(function(*inputs), take))
        return tuple(leaves)

    hooked = iter(through(flat, *tensors))
    return mapped(shape[-1], lambda _x: next(hooked))


def enter_recomputed(module: nn.Module, function: Callable[..., _T], *tensors: Tensor) -> _T:
    """`enter`, keeping only what goes in: the layer is computed again on the way back, in the same gathering."""

    def again(*inputs: Tensor) -> _T:
        return recomputed(module, function, *inputs)

    return enter(module, again, *tensors)


def _apart(dit: CausalDiT) -> list[nn.Module]:
    """Layers inside others that are used on their own: what prompt and sound become is computed once for all layers."""
    found: list[nn.Module] = []
    for block in dit.blocks:
        text = block.cross_attn
        found += [text.k, text.v, text.norm_k]
    if dit.config.audio is not None:
        for attention in dit.audio_injector.injector:
            found += [attention.q, attention.k, attention.v, attention.o, attention.norm_q, attention.norm_k]
        found += [norm.linear for norm in dit.audio_injector.injector_adain_layers]
    return found


def shard(dit: CausalDiT, mesh: DeviceMesh, *, arithmetic: torch.dtype | None = None) -> None:
    """Shard a model in place: each layer is gathered when it is entered, what lies between layers while the model is.

    Args:
        arithmetic: weights are gathered in this type and gradients summed in float32; None: as they are kept.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=arithmetic,
        reduce_dtype=None if arithmetic is None else torch.float32,
        # The model casts its inputs itself, and not all of them: positions and noise levels stay wide.
        cast_forward_inputs=False,
    )
    for module in (*_apart(dit), *dit.blocks):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(dit, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in (*dit.blocks, dit):
        vars(module)["through"] = types.MethodType(_through, module)
        register_fsdp_forward_method(module, "through")


@contextlib.contextmanager
def gathering_gradients(dit: nn.Module, *, send: bool) -> Generator[None]:
    """Backward passes in here add up on each rank; only with ``send`` they are summed over ranks and cut to shards.

    Chunk after chunk, only the last one needs to send. Meanwhile a rank holds the gradient of the whole model: for
    adapters that is little, for all weights it is not.
    """
    assert isinstance(dit, FSDPModule), "only a sharded model sends gradients"
    dit.set_requires_gradient_sync(send)
    try:
        yield
    finally:
        dit.set_requires_gradient_sync(True)


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], longest: float) -> float:
    """Make the gradient of all shards together no longer than ``longest``; its length before, the same on all ranks."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return 0.0
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    square = torch.stack([part.float().square().sum() for part in local]).sum()
    dist.all_reduce(square)
    length = float(square.sqrt())
    if length > longest:
        for part in local:
            part.mul_(longest / length)
    return length


@torch.no_grad()
def whole_state(dit: nn.Module, *, only: Callable[[str], bool] = lambda _name: True) -> dict[str, Tensor]:
    """Full state dict of a sharded model, gathered tensor by tensor: on rank 0, on the CPU; empty elsewhere.

    All ranks call it.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in dit.state_dict().items():
        if not only(name):
            continue
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if dist.get_rank() == 0:
            found[name] = whole.detach().cpu().clone()
    return found


@torch.no_grad()
def fill(dit: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Load weights into a sharded model, for instance one built on the meta device and given ``to_empty(device=...)``.

    ``read`` gives a whole tensor by its name; each rank reads it and keeps its own part, so that no more than one
    tensor is whole at a time.
    """
    for name, tensor in dit.state_dict().items():
        whole = read(name)
        if tuple(whole.shape) != tuple(tensor.shape):
            raise ConfigError(f"{name} is {list(whole.shape)}, must be {list(tensor.shape)}; read another checkpoint")
        if isinstance(tensor, DTensor):
            own = distribute_tensor(
                whole.to(tensor.device, tensor.dtype), tensor.device_mesh, tensor.placements, src_data_rank=None
            )
            tensor.to_local().copy_(own.to_local())
        else:
            tensor.copy_(whole)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardedRecipe:
    """Distribution matching of a model too large for one GPU: three bases in shards, two of them with adapters."""

    config: EngineConfig
    num_gpus: int
    lora_rank: int = 128
    lora_alpha: float = 64.0
    clips_per_gpu: int = 1
    num_chunks: int = 7
    recompute: bool = True
    """Keep only what goes into a layer, and compute it again on the way back."""
    student_lr: float = 1e-5
    critic_lr: float = 2e-6

    def __post_init__(self) -> None:
        if min(self.num_gpus, self.lora_rank, self.clips_per_gpu, self.num_chunks) < 1:
            raise ConfigError(
                "a recipe takes at least one GPU, rank 1, one clip and one chunk, got "
                f"{self.num_gpus}, {self.lora_rank}, {self.clips_per_gpu} and {self.num_chunks}"
            )


def live_avatar_14b(num_gpus: int = 8) -> ShardedRecipe:
    """What is published of Live Avatar's second stage (section 4): adapters of rank 128, one clip of 7 chunks a GPU,
    a window of 4 chunks, rates of 1e-5 and 2e-6; without the motion prefix, which that stage drops."""
    return ShardedRecipe(config=dataclasses.replace(presets.live_avatar_14b(), motion_latents=0), num_gpus=num_gpus)


@dataclass(frozen=True, slots=True, eq=False)
class ShardedModels:
    """Sharded student, critic and teacher; weights still to be filled in where they are on the meta device."""

    student: CausalDiT
    critic: CausalDiT
    teacher: CausalDiT

    @property
    def learning(self) -> dict[str, list[nn.Parameter]]:
        return {
            name: [p for p in dit.parameters() if p.requires_grad]
            for name, dit in (("student", self.student), ("critic", self.critic))
        }


def assemble(
    recipe: ShardedRecipe, mesh: DeviceMesh, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> ShardedModels:
    """Build the three models on the meta device and shard them; nothing is allocated.

    Then, for each: ``to_empty(device=...)``, and `fill` from a checkpoint. Factors of adapters are float32; fill them
    too, from `streamdiff.training.lora.fresh_factor` or a saved adapter.
    """
    made: list[CausalDiT] = []
    for learns in (True, True, False):
        with torch.device("meta"):
            dit = CausalDiT(recipe.config.dit).to(dtype)
        if learns:
            lora.adapt(dit, rank=recipe.lora_rank, alpha=recipe.lora_alpha, seed=seed)
        else:
            dit.requires_grad_(False)
        shard(dit, mesh)
        made.append(dit)
    return ShardedModels(*made)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBytes:
    """What one GPU holds at the fullest moment of a step."""

    parameters: int
    """Its shards of three bases and two pairs of factors."""
    gradients: int
    """Its shards, of both pairs of factors."""
    optimiser: int
    """Two moments of each factor in float32, and the student's running average."""
    gathered: int
    """What is whole for a while: that between layers, and two layers, one computed, one on its way."""
    conditions: int
    """Keys and values of prompt, sound and sink, in every layer."""
    history: int
    """Keys and values that a rollout keeps, at the last exit."""
    chunk_activations: int
    """What autograd keeps of the student's pass over a chunk."""
    clip_activations: int
    """What autograd keeps of the critic's pass over a clip; the history is gone by then."""

    @property
    def total(self) -> int:
        always = self.parameters + self.gradients + self.optimiser + self.gathered + self.conditions
        return always + max(self.history + self.chunk_activations, self.clip_activations)


def training_bytes(recipe: ShardedRecipe, *, bytes_per_value: int = 2) -> TrainingBytes:
    """Bytes per GPU of a step of distribution matching. Closed forms; no model is built.

    Temporaries of the allocator, of cuBLAS and of the collectives come on top: leave a tenth.
    """
    config, b, G = recipe.config, bytes_per_value, recipe.num_gpus
    dit = config.dit
    base, factors = cost.dit_parameters(dit), adapter_parameters(dit, recipe.lora_rank)
    one, two = (dataclasses.replace(dit, num_layers=layers, audio=None) for layers in (1, 2))
    block = cost.dit_parameters(two) - cost.dit_parameters(one)
    injectors = 0 if dit.audio is None else len(dit.audio.inject_layers)
    # q, k, v and o of each injector, and where the sound becomes a scale and a shift; biases are too few to count.
    between = base - dit.num_layers * block - injectors * (4 + 2) * dit.dim**2
    per_block = adapter_parameters(dit, recipe.lora_rank, num_layers=1, num_injectors=0)
    L, S, D, Z = config.chunk_tokens, config.frame_tokens, dit.dim, dit.num_layers
    kv_per_token = 2 * D * b * recipe.clips_per_gpu
    heard = 0 if dit.audio is None else (dit.audio.num_tokens + 1) * recipe.num_chunks * config.frames_per_chunk
    window = config.memory.window_chunks - 1

    def kept(num_chunks: int) -> int:
        return kept_activations(
            config,
            num_clips=recipe.clips_per_gpu,
            num_chunks=num_chunks,
            seen_chunks=min(recipe.num_chunks, config.memory.window_chunks),
            lora_rank=recipe.lora_rank,
            bytes_per_value=b,
            recompute=recipe.recompute,
        )

    return TrainingBytes(
        parameters=(3 * base * b + 2 * factors * 4) // G,
        gradients=2 * factors * 4 // G,
        optimiser=(2 * 2 + 1) * factors * 4 // G,
        gathered=between * b + 2 * (block * b + per_block * 4),
        conditions=kv_per_token * (Z * (dit.text_len + S) + injectors * heard),
        history=kv_per_token * Z * L * (recipe.num_chunks + (config.num_steps - 1) * window),
        chunk_activations=kept(1),
        clip_activations=kept(recipe.num_chunks),
    )


def adapter_parameters(
    config: DiTConfig, rank: int, *, num_layers: int | None = None, num_injectors: int | None = None
) -> int:
    """Factors of adapters of this rank: four of each attention, two of each feed-forward."""
    Z = config.num_layers if num_layers is None else num_layers
    heard = 0 if config.audio is None else len(config.audio.inject_layers)
    attentions = 2 * Z + (heard if num_injectors is None else num_injectors)
    return rank * (attentions * 4 * 2 * config.dim + Z * 2 * (config.dim + config.ffn_dim))


def kept_activations(
    config: EngineConfig,
    *,
    num_clips: int,
    num_chunks: int,
    seen_chunks: int,
    lora_rank: int,
    bytes_per_value: int,
    recompute: bool,
) -> int:
    """Bytes that autograd keeps, in the layers, of a pass over so many chunks of clips with adapters.

    Each chunk sees ``seen_chunks`` chunks, itself among them, or is padded to as many.

    Per token and layer, in values of the weights' type: the inputs of the adapted layers (3 D, and F), what goes into
    norm and GELU (D and F), queries and results of both attentions (4 D), the factors' middles (8 R), the keys and
    values that its chunk sees (2 M / L D); in float32: what goes into two modulated norms and three RMS norms (5 D).
    An injected layer keeps 3 D and 2 D more, and 2 R.
    """
    dit, b = config.dit, bytes_per_value
    D, F, R = dit.dim, dit.ffn_dim, lora_rank
    L = config.chunk_tokens
    tokens = num_clips * num_chunks * L
    M = config.frame_tokens + seen_chunks * L
    layer = tokens * (b * (8 * D + 2 * F + 8 * R) + 4 * 5 * D) + b * 2 * num_clips * num_chunks * M * D
    injected = 0 if dit.audio is None else tokens * (b * (3 * D + 2 * R) + 4 * 2 * D)
    injectors = 0 if dit.audio is None else len(dit.audio.inject_layers)
    if recompute:
        return dit.num_layers * tokens * D * b + layer + injected
    return dit.num_layers * layer + injectors * injected
