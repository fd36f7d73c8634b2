"""What a step does to weights, averages and rates, against the same written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from streamdiff.training.history import draw_curves
from streamdiff.training.loop import CURVES, Plan, Trainer, learning_rate
from tests.training.loop_case import Regression


def test_weights_are_those_of_adamw_with_clipping_and_schedule(tmp_path: Path) -> None:
    steps, trained, plain = 7, Regression(), Regression()
    trainer = Trainer(trained, tmp_path, Plan(steps=steps, warmup_steps=2))
    trainer.train()
    matrices = [p for p in plain.often.parameters() if p.ndim > 1]
    others = [p for p in plain.often.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    average = [p.detach().clone() for p in plain.often.parameters()]
    for step in range(steps):
        plain.often.zero_grad()
        plain.gradients(step)
        torch.nn.utils.clip_grad_norm_(plain.often.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 * learning_rate(step, total=steps, warmup_steps=2)
        optimiser.step()
        keep = min(0.9, (step + 2) / (step + 11))
        average = [keep * a + (1 - keep) * p.detach() for a, p in zip(average, plain.often.parameters(), strict=True)]
    for mine, theirs in zip(trained.often.parameters(), plain.often.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    names = [name for name, _ in plain.often.named_parameters()]
    for name, expected in zip(names, average, strict=True):
        torch.testing.assert_close(trainer.average("often")[name], expected, rtol=1e-5, atol=1e-6)


def test_a_part_without_a_gradient_rests(tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []
    task = Regression()
    trainer = Trainer(task, tmp_path, Plan(steps=5))
    trainer.train(on_step=lambda *_: seen.append(task.seldom[0].weight.detach().clone()))
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[2], seen[3])


def test_the_average_is_lent_and_given_back(tmp_path: Path) -> None:
    task = Regression()
    trainer = Trainer(task, tmp_path, Plan(steps=5))
    trainer.train()
    before = {name: t.clone() for name, t in task.often.state_dict().items()}
    with trainer.averaged("often") as lent:
        average = trainer.average("often")
        assert all(torch.equal(t, average[name]) for name, t in lent.state_dict().items())
        assert not torch.equal(average["0.weight"], before["0.weight"])
    assert all(torch.equal(t, before[name]) for name, t in task.often.state_dict().items())


@given(total=st.integers(1, 400), warmup=st.integers(1, 200), final=st.floats(0, 1))
def test_a_rate_rises_once_and_falls_once(total: int, warmup: int, final: float) -> None:
    rates = [learning_rate(step, total=total, warmup_steps=warmup, final=final) for step in range(total)]
    top = rates.index(max(rates))
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == 1.0


def test_while_a_run_is_timed_the_rate_only_rises() -> None:
    rates = [learning_rate(step, total=None, warmup_steps=5) for step in range(8)]
    assert rates == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0]


def test_samples_are_taken_now_and_then_and_at_the_end(tmp_path: Path) -> None:
    taken: list[int] = []
    Trainer(Regression(), tmp_path / "often", Plan(steps=3)).train(on_sample=taken.append, sample_every_s=0.0)
    assert taken == [1, 2, 3]
    taken.clear()
    Trainer(Regression(), tmp_path / "seldom", Plan(steps=3)).train(on_sample=taken.append, sample_every_s=3600.0)
    assert taken == [3]


def test_curves_show_every_number(tmp_path: Path) -> None:
    Trainer(Regression(), tmp_path, Plan(steps=6)).train()
    with Image.open(tmp_path / CURVES) as image:
        panels = 3  # loss and two gradients
        assert image.size == (720, 220 * panels)
        pixels_HWC = np.asarray(image.convert("RGB"))
    blue = [int((panel == (30, 80, 170)).all(-1).sum()) for panel in np.split(pixels_HWC, panels)]
    assert min(blue) > 100


@pytest.mark.parametrize("values", [[1.0, 1.0], [-1.0, 3.0, 2.0], [1e-6, 10.0, 1e3], [0.0, 0.0]])
def test_curves_of_any_numbers_can_be_drawn(tmp_path: Path, values: list[float]) -> None:
    draw_curves({"x": list(enumerate(values)), "too short": [(0, 1.0)]}, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (720, 220)
