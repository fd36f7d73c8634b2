"""A rank that exists on paper: every tensor has a shape and no data (device "meta"), so 14 billion weights are free.

Whatever asks for a value raises, where on a GPU it would make the host wait; every operation and every allocation of a
step can be looked at.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from streamdiff.config import EngineConfig
from streamdiff.models.dit import CausalDiT
from streamdiff.models.served.options import StepOptions
from streamdiff.pipeline.denoise import DenoiseStage
from streamdiff.pipeline.packet import Command, Packet, SetReference, SwitchPrompt


@dataclass(slots=True)
class Operation:
    name: str
    devices: set[str]
    settings: dict[str, Any] = field(default_factory=dict[str, Any])


class Watched(TorchDispatchMode):
    """Notes every operation, and the bytes of every tensor on paper for as long as it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._alive: dict[int, int] = {}
        self.peak_bytes = 0

    @property
    def bytes_alive(self) -> int:
        return sum(self._alive.values())

    def begin(self) -> None:
        """Forget what was done, not what lives."""
        self.operations.clear()
        self.peak_bytes = self.bytes_alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        self.operations.append(Operation(str(func), {t.device.type for t in tensors}, dict(kwargs)))
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if tensor.device.type == "meta" and storage._cdata not in self._alive:
                self._alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._alive.pop, storage._cdata, None)
        self.peak_bytes = max(self.peak_bytes, self.bytes_alive)
        return out


def stage_on_paper(config: EngineConfig, options: StepOptions, steps: Sequence[int] = (0,)) -> DenoiseStage:
    with torch.device("meta"):
        dit = CausalDiT(config.dit).to(torch.bfloat16).requires_grad_(False)
    return DenoiseStage(dit, config, steps, options=options)


def packet(config: EngineConfig, chunk: int) -> Packet:
    """Chunk 0 brings the reference and a prompt that is as long as a folded one may be."""
    h, w = config.latent_hw
    audio = config.dit.audio
    assert audio is not None
    commands: tuple[Command, ...] = ()
    if chunk == 0:
        motion = torch.zeros(1, 16, config.motion_latents, h, w) if config.motion_latents else None
        commands = (
            SetReference(torch.zeros(1, 16, 1, h, w), motion),
            SwitchPrompt(torch.zeros(1, min(60, config.dit.text_len - 1), config.dit.text_dim)),
        )
    return Packet(
        chunk=chunk,
        epoch=0,
        lead=5,
        latent_BCTHW=torch.zeros(1, 16, config.frames_per_chunk, h, w),
        audio_BZEA=torch.zeros(1, audio.num_features, audio.feature_dim, config.video_frames_per_chunk),
        commands=commands,
    )
