"""A task small enough for the loop to be tested with, and a process of its own to be killed.

python -m tests.training.loop_case FOLDER STEPS SECONDS_PER_STEP [--resume]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from streamdiff import rng
from streamdiff.training.loop import Outcome, Part, Plan, Trainer


class Regression:
    """Two nets that learn a noisy plane; the second gets a gradient at every third step only."""

    def __init__(self, *, width: int = 8, before: Callable[[int], None] | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        self.often, self.seldom = (
            nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 1)) for _ in range(2)
        )
        with torch.no_grad():
            for parameter in [*self.often.parameters(), *self.seldom.parameters()]:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.parts = {
            "often": Part(module=self.often, lr=1e-2, average=0.9),
            "seldom": Part(module=self.seldom, lr=3e-3, average=0.0),
        }
        self._before = before

    def gradients(self, step: int) -> Mapping[str, float]:
        if self._before is not None:
            self._before(step)
        x = rng.normal((16, 4), "x", step)
        y = x.sum(1, keepdim=True) + 0.1 * rng.normal((16, 1), "y", step)
        loss = (self.often(x) - y).square().mean()
        loss.backward()
        if step % 3 == 0:
            (self.seldom(x) - y).square().mean().backward()
        return {"loss": loss.item()}


def run(folder: Path, steps: int, *, resume: bool = False, before: Callable[[int], None] | None = None) -> Outcome:
    trainer = Trainer(Regression(before=before), folder, Plan(steps=steps, warmup_steps=2), resume=resume)
    return trainer.train(save_every_s=0.0)


if __name__ == "__main__":
    folder, steps, seconds = sys.argv[1:4]
    torch.set_num_threads(1)

    def slowly(step: int) -> None:
        sys.stdout.write(f"{step}\n")
        sys.stdout.flush()
        time.sleep(float(seconds))

    outcome = run(Path(folder), int(steps), resume="--resume" in sys.argv, before=slowly)
    raise SystemExit(128 + outcome.stopped_by if outcome.stopped_by is not None else 0)
