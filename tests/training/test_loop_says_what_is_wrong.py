"""What the loop refuses, in one line that says what to do."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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
