"""A model and its exponential moving average (EMA) in one module, for recipes whose EMA takes part in learning."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


class Followed(nn.Module, Generic[M]):
    """A model, and its exponential moving average as buffers, so that a checkpoint holds both."""

    def __init__(self, model: M, average: float) -> None:
        super().__init__()
        self.model: M = model
        self.average: M = copy.deepcopy(model)
        self._keep = average
        for module in self.average.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach())

    @torch.no_grad()
    def follow(self, updates: int) -> None:
        """Update the average after this many steps of the model; a young average forgets its beginning fast."""
        averages = dict(self.average.named_buffers())
        keep = min(self._keep, (1 + updates) / (10 + updates))
        for name, parameter in self.model.named_parameters():
            averages[name].lerp_(parameter, 1.0 - keep)
