"""Training batches for the motion model: windows drawn from performances that lie end to end.

Axes as in `streamdiff.avatar.window`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from streamdiff.avatar.cues import NUM_MEL, State
from streamdiff.avatar.window import MotionConfig
from streamdiff.training.avatar.performance import Performance


class Dataset:
    """Performances laid end to end, and windows drawn from them."""

    def __init__(self, tensors: Mapping[str, Tensor], config: MotionConfig, *, real_share: float = 0.25) -> None:
        self.config = config
        self.tensors = dict(tensors)
        self.motion = tensors["motion"]
        lengths = tensors["lengths"].tolist()
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        usable = [np.arange(s, s + n - config.window) for s, n in zip(starts, lengths, strict=True)]
        self._performance_of = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
        real = tensors["real"].tolist()
        pools = [[u for u, r in zip(usable, real, strict=True) if r == kind] for kind in (False, True)]
        self._pools = [torch.from_numpy(np.concatenate(p)) for p in pools if p]
        self._real_share = real_share if len(self._pools) == 2 else 0.0

    @staticmethod
    def pack(performances: Sequence[Performance]) -> dict[str, Tensor]:
        """Performances as the tensors that a dataset, and its file, is made of."""
        columns = {
            "mel": np.concatenate([c.cues.mel_AF for c in performances]).astype(np.float16),
            "phones": np.concatenate([np.rint(c.cues.phones_AP * 255).astype(np.uint8) for c in performances]),
            "said": np.concatenate([c.cues.said_A for c in performances]),
            "state": np.concatenate([c.cues.state_A for c in performances]),
            "intent": np.concatenate([c.intent_AI for c in performances]),
            "motion": np.concatenate([c.motion_AE for c in performances]),
            "style": np.stack([c.style for c in performances]),
            "lengths": np.array([len(c.motion_AE) for c in performances]),
            "real": np.array([c.source != "spoken" for c in performances]),
        }
        return {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in columns.items()}

    def draw(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A batch of windows of one length: cues ``[B, A, C]``, motion ``[B, A, E]``, style ``[B, S]``."""
        config = self.config
        shares = torch.tensor([0.5, 0.15, 0.35][-len(config.lengths) :])
        length = config.lengths[int(torch.multinomial(shares, 1, generator=generator))]
        num_real = round(size * self._real_share)
        counts = zip(self._pools, (size - num_real, num_real), strict=False)
        starts = torch.cat([pool[torch.randint(len(pool), (n,), generator=generator)] for pool, n in counts if n])
        at = starts[:, None] + torch.arange(config.history + length)
        cues = self._cues(at, generator)
        style = self.tensors["style"][self._performance_of[starts]]
        style = style + 0.1 * torch.randn(style.shape, generator=generator)
        style = style * (torch.rand(size, 1, generator=generator) > 0.1)
        return {"cues": cues, "motion": self.motion[at], "style": style}

    def _cues(self, at_BA: Tensor, generator: torch.Generator) -> Tensor:
        """What the model reads in these frames, now without sound, now without phonemes, and never in a clean room."""
        tensors = self.tensors
        mel, said = tensors["mel"][at_BA].float(), tensors["said"][at_BA]
        heard = torch.ones_like(said)
        # Either voice alone must do: a text that has not been heard, a microphone that nobody transcribes.
        fate = torch.rand(len(at_BA), generator=generator)
        has_phones = said.any(1)
        said = said & ((fate < 0.4) | ~has_phones)[:, None]
        heard = heard & ((fate < 0.33) | (fate > 0.4) | ~has_phones)[:, None]
        mel = _disturbed(mel, generator)
        cues = [
            mel * heard[..., None],
            tensors["phones"][at_BA].float() / 255 * said[..., None],
            heard[..., None].float(),
            said[..., None].float(),
            F.one_hot(tensors["state"][at_BA].long(), len(State)).float(),
            tensors["intent"][at_BA],
        ]
        return torch.cat(cues, -1)


def _disturbed(mel_BAF: Tensor, generator: torch.Generator) -> Tensor:
    """Audio augmentation in the log-mel domain, as another microphone and room: gain, colour and a noise floor."""
    B, A, _ = mel_BAF.shape
    power = torch.exp(mel_BAF * 4.0 - 8.0).view(B, A, -1, NUM_MEL // 4)
    num_bands = power.shape[-1]
    gain_db = torch.empty(B, 1, 1, 1).uniform_(-14.0, 8.0, generator=generator)
    bands = torch.linspace(-1.0, 1.0, num_bands)
    colour = torch.randn(B, 3, generator=generator) * torch.tensor([3.0, 2.0, 1.5])
    shape_db = (
        colour[:, :1] * bands + colour[:, 1:2] * torch.cos(math.pi * bands) + colour[:, 2:] * torch.sin(math.pi * bands)
    )
    power = power * 10 ** ((gain_db + shape_db[:, None, None]) / 10)
    level_db = torch.empty(B, 1, 1, 1).uniform_(-75.0, -32.0, generator=generator)
    tilt = torch.randn(B, 1, generator=generator) * 6.0 * bands
    floor = 10 ** ((level_db + tilt[:, None, None]) / 10)
    flicker = torch.empty_like(power).exponential_(generator=generator)
    noisy = torch.rand(B, 1, 1, 1, generator=generator) < 0.7
    power = power + floor * flicker * noisy
    return ((torch.log(power + 1e-7) + 8.0) / 4.0).view(B, A, -1)
