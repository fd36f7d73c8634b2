"""A voice, a motion model and a renderer that cost nothing, for tests of what lies between them."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from streamdiff.avatar.window import MotionConfig, MotionModel
from streamdiff.voice import RATE_HZ, Phoneme, SpeechChunk, sentences


def tiny_motion(seed: int = 0) -> MotionModel:
    """A motion model with random weights; its output depends on everything that it is given."""
    torch.manual_seed(seed)
    model = MotionModel(MotionConfig(dim=32, num_layers=1, num_heads=2, hidden=64)).eval().requires_grad_(False)
    torch.nn.init.normal_(model.leave.weight, 0, 0.1)
    torch.nn.init.normal_(model.modulation.weight, 0, 0.1)
    model.mean_E.fill_(0.3)
    model.std_E.fill_(0.1)
    return model


class Tones:
    """Says every letter as 60 ms of a tone of its own. ``delay_s`` makes it slow, about so much and never the same."""

    rate_hz = RATE_HZ

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.num_spoken = 0

    def speak(self, text: str | Iterable[str], *, segment: int = 0) -> Iterator[SpeechChunk]:
        for sentence in sentences(text):
            time.sleep(random.uniform(0, 2 * self.delay_s))
            self.num_spoken += 1
            yield self.chunk(sentence, segment)
        yield SpeechChunk(np.zeros(0, np.float32), RATE_HZ, (), segment, last=True)

    def chunk(self, sentence: str, segment: int = 0) -> SpeechChunk:
        samples, phonemes = [], []
        size = int(0.06 * RATE_HZ)
        for i, letter in enumerate(sentence):
            hz = 100.0 + 50.0 * (ord(letter) % 16)  # whole waves in a letter: no clicks of its own
            samples.append(0.3 * np.sin(2 * np.pi * hz * np.arange(size) / RATE_HZ))
            symbol = letter if letter.isalpha() else " "
            phonemes.append(Phoneme(symbol, i * size / RATE_HZ, (i + 1) * size / RATE_HZ))
        return SpeechChunk(np.concatenate(samples).astype(np.float32), RATE_HZ, tuple(phonemes), segment)


class Bars:
    """Draws the first 48 coefficients as grey bars. ``delay_s`` makes it slow."""

    size = 16

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.num_drawn = 0

    def render(self, motion_AE: Tensor | np.ndarray) -> Tensor:
        time.sleep(random.uniform(0, 2 * self.delay_s))
        self.num_drawn += 1
        grey = (torch.as_tensor(motion_AE)[:, :48].clamp(0, 1) * 255).to(torch.uint8)
        return grey.reshape(-1, 1, 16, 3).expand(-1, 16, 16, 3).contiguous()
