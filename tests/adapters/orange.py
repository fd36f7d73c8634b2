"""A renderer of one colour, whose three parts cannot be taken for one another."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

ORANGE = (220, 120, 20)


class Orange:
    """Of `streamdiff.avatar.stream.Renderer`."""

    size = 64

    def render(self, motion_AE: Tensor | np.ndarray) -> Tensor:
        return torch.tensor(ORANGE, dtype=torch.uint8).expand(len(motion_AE), 64, 64, 3).contiguous()
