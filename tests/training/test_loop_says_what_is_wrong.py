"""What the loop refuses, in one line that says what to do."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamdiff.errors import CheckpointError, ConfigError, InputError, StreamdiffError
from streamdiff.output import alone_in
from streamdiff.training.loop import CHECKPOINT, Part, Plan, Trainer
from streamdiff.training.recipe import conduct
from tests.hostile.limits import largest_file
from tests.training.loop_case import Regression, run


class Poisoned(Regression):
    def gradients(self, step: int) -> Mapping[str, float]:
        numbers = super().gradients(step)
        if step == 3:
            gradient = next(self.often.parameters()).grad
            assert gradient is not None
            gradient[0, 0] = float("nan")
        return numbers


def test_a_broken_gradient_never_reaches_the_weights(tmp_path: Path) -> None:
    trainer = Trainer(Poisoned(), tmp_path, Plan(steps=6))
    with pytest.raises(StreamdiffError, match=r"step 3: gradient_often is nan.*lower --lr"):
        trainer.train(save_every_s=0.0)
    assert all(p.isfinite().all() for p in trainer.task.parts["often"].module.parameters())
    assert all(t.isfinite().all() for t in load_file(tmp_path / CHECKPOINT).values())
    assert run(tmp_path, 6, resume=True).step == 6


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    run(tmp_path, 2)
    with pytest.raises(ConfigError, match="holds a run at step 2; add --resume"):
        run(tmp_path, 2)


def test_a_second_run_in_the_folder_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    run(tmp_path, 2)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    args = argparse.Namespace(out=tmp_path, resume=True)
    with alone_in(tmp_path, "a run"), pytest.raises(InputError, match="another run is writing a run"):
        conduct("regression", Regression(), args, Plan(steps=6), facts={}, finish=lambda _: [])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_last_one(tmp_path: Path) -> None:
    def fall(step: int) -> None:
        if step == 2:
            raise RuntimeError("the machine went away")

    with pytest.raises(RuntimeError):
        run(tmp_path, 6, before=fall)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with largest_file(len(before) // 2), pytest.raises(InputError, match=r"cannot write .*checkpoint"):
        run(tmp_path, 6, resume=True)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if ".part" in path.name]
    assert run(tmp_path, 6, resume=True).step == 6


def test_a_run_is_resumed_as_it_was_begun(tmp_path: Path) -> None:
    facts = {"seed": "1", "batch": "8"}
    Trainer(Regression(), tmp_path, Plan(steps=2), facts=facts).train()
    with pytest.raises(ConfigError, match=r"another run \(batch was '8' and is '4'\)"):
        Trainer(Regression(), tmp_path, Plan(steps=2), facts={**facts, "batch": "4"}, resume=True)
    with pytest.raises(ConfigError, match="planned for 2 steps, not 9"):
        Trainer(Regression(), tmp_path, Plan(steps=9), facts=facts, resume=True)
    with pytest.raises(CheckpointError, match=r"misshapen: .*average/0\.weight is \[8, 4\], must be \[9, 4\]"):
        Trainer(Regression(width=9), tmp_path, Plan(steps=2), facts=facts, resume=True)
    task = Regression()
    task.parts = {"often": task.parts["often"]}
    with pytest.raises(CheckpointError, match="of another recipe"):
        Trainer(task, tmp_path, Plan(steps=2), facts=facts, resume=True)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    run(tmp_path, 2)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="remove it to begin anew"):
        run(tmp_path, 2, resume=True)


def test_a_plan_or_a_part_that_cannot_work_is_refused() -> None:
    for wrong in ({}, {"steps": 3, "budget_s": 1.0}, {"steps": 0}, {"budget_s": 0.0}, {"steps": 1, "warmup_steps": 0}):
        with pytest.raises(ConfigError):
            Plan(**wrong)
    with pytest.raises(ConfigError, match="lr > 0"):
        Part(module=torch.nn.Linear(1, 1), lr=0.0)
    frozen = torch.nn.Linear(1, 1).requires_grad_(False)
    task = Regression()
    task.parts = {"often": Part(module=frozen)}
    with pytest.raises(ConfigError, match="nothing to learn"):
        Trainer(task, Path("never made"), Plan(steps=1))
    assert not Path("never made").exists()


def _changed(path: Path, about: Mapping[str, str], tensors: Mapping[str, Tensor | None]) -> None:
    """The checkpoint with other facts and tensors; None takes one away."""
    with safe_open(path, framework="pt") as file:
        told = file.metadata() or {}
    found = {**load_file(path), **tensors}
    save_file({n: t for n, t in found.items() if t is not None}, path, metadata={**told, **about})


@pytest.mark.parametrize(
    ("about", "says"),
    [
        ({"step": "-1"}, "step must be a number in 0"),
        ({"step": "1e9"}, "step must be a whole number"),
        ({"step": "9" * 30}, "step must be a number"),
        ({"step": "3"}, "total must be a number in 3"),
        ({"step": "true"}, "step must be a number"),
        ({"step": "NaN"}, "NaN is no number"),
        ({"step": "two"}, "does not say how far"),
        ({"step": ""}, "does not say how far"),
        ({"total": "-4"}, "total must be a number"),
        ({"total": "99999999999"}, "total must be a number"),
        ({"spent_s": "-1"}, "spent_s must be a number"),
        ({"spent_s": "1e999"}, "spent_s must be a number"),
        ({"updates": "[]"}, "updates is no table"),
        ({"updates": '{"often": -1, "seldom": 1}'}, "updates.often must be a number in 0..2"),
        ({"updates": '{"often": 3, "seldom": 1}'}, "updates.often must be a number in 0..2"),
        ({"updates": '{"often": 2}'}, "is of another recipe"),
        ({"facts": "7"}, "facts is no table"),
        ({"facts": '{"seed": 1}'}, "facts.seed must be a text"),
        ({"facts": "[" * 100_000}, "nested too deep"),
        ({"format": "2"}, "is no checkpoint of a run"),
    ],
)
def test_a_checkpoint_that_says_nonsense_of_itself(tmp_path: Path, about: dict[str, str], says: str) -> None:
    run(tmp_path, 2)
    _changed(tmp_path / CHECKPOINT, about, {})
    with pytest.raises(CheckpointError, match=says) as caught:
        run(tmp_path, 2, resume=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"often/weight/0.weight": torch.full((8, 4), torch.nan)}, "NaN or infinity .*weight/0.weight"),
        ({"often/average/0.weight": torch.full((8, 4), torch.inf)}, "NaN or infinity .*average/0.weight"),
        ({"often/exp_avg/0.weight": torch.full((8, 4), torch.nan)}, "NaN or infinity .*exp_avg/0.weight"),
        ({"often/exp_avg_sq/0.weight": torch.full((8, 4), -1.0)}, "no moments .*exp_avg_sq/0.weight"),
        ({"often/step/0.weight": torch.tensor(-5.0)}, "no moments .*step/0.weight"),
        ({"often/step/0.weight": torch.tensor(5)}, "no moments .*step/0.weight"),
        ({"often/exp_avg/0.weight": None}, "1 missing: exp_avg/0.weight"),
        ({"often/exp_avg/0.weight": torch.zeros(3)}, "1 misshapen: exp_avg/0.weight"),
        ({"often/exp_avg/9.weight": torch.zeros(3)}, "1 unexpected: exp_avg/9.weight"),
        ({"often/weight/0.weight": None}, "1 missing: weight/0.weight"),
        ({"often/stranger": torch.zeros(1)}, "1 unexpected: stranger"),
        ({"stranger": torch.zeros(1)}, "nothing that learns here .stranger"),
        ({"": torch.zeros(1)}, "nothing that learns here"),
    ],
)
def test_a_checkpoint_with_other_tensors(tmp_path: Path, tensors: dict[str, Tensor | None], says: str) -> None:
    run(tmp_path, 2)
    _changed(tmp_path / CHECKPOINT, {}, {})
    assert run(tmp_path, 2, resume=True).step == 2, "written again as it was, it is resumed"
    _changed(tmp_path / CHECKPOINT, {}, tensors)
    with pytest.raises(CheckpointError, match=says):
        run(tmp_path, 2, resume=True)
