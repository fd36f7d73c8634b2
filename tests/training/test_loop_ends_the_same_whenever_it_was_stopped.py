"""A run that was stopped or killed and resumed ends with the bits of one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from streamdiff.training.loop import CHECKPOINT, LOG, Plan, Trainer
from tests.training.loop_case import Regression, run

STEPS = 6


def same_bits(one: Path, other: Path) -> bool:
    a, b = load_file(one / CHECKPOINT), load_file(other / CHECKPOINT)
    assert any("exp_avg_sq" in name for name in a)
    assert any("average" in name for name in a)
    assert any("running_mean" in name for name in a)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder, STEPS).step == STEPS
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_signal_stops_after_the_step(whole: Path, tmp_path: Path, number: signal.Signals, at: int) -> None:
    def interrupt(step: int) -> None:
        if step == at:
            os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    outcome = run(tmp_path, STEPS, before=interrupt)
    assert (outcome.step, outcome.total, outcome.stopped_by) == (at + 1, STEPS, number)
    assert signal.getsignal(number) is handler
    assert not same_bits(whole, tmp_path)
    assert run(tmp_path, STEPS, resume=True).stopped_by is None
    assert same_bits(whole, tmp_path)


def test_a_ctrl_c_that_comes_twice_at_once_is_one(tmp_path: Path) -> None:
    """A terminal sends it to every process, and torchrun passes it on."""

    def insist(step: int) -> None:
        if step == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)

    assert run(tmp_path, STEPS, before=insist).stopped_by == signal.SIGINT
    assert run(tmp_path, STEPS, resume=True).step == STEPS


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamdiff.training.loop._SAME_SIGNAL_S", -1.0)

    def insist(step: int) -> None:
        if step == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, STEPS, before=insist)
    assert run(tmp_path, STEPS, resume=True).step == STEPS


@pytest.mark.processes
@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_a_process_that_is_killed_loses_nothing_but_time(whole: Path, tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "tests.training.loop_case", str(tmp_path), str(STEPS)]
    path = os.pathsep.join(p or "." for p in sys.path)
    process = subprocess.Popen(
        [*command, "5"], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert process.stdout is not None
    try:
        # The first step is cut short by the signal, or lost with the process; the checkpoint is that of a step or none.
        assert process.stdout.readline() == "0\n"
        process.send_signal(number)
        assert process.wait(timeout=120) == (128 + number if number == signal.SIGTERM else -number)
    finally:
        process.kill()
        process.stdout.close()
    assert (tmp_path / CHECKPOINT).exists() == (number == signal.SIGTERM)
    assert run(tmp_path, STEPS, resume=True).step == STEPS
    assert same_bits(whole, tmp_path)


def test_steps_that_are_made_again_are_logged_once(tmp_path: Path) -> None:
    def fall(step: int) -> None:
        if step == 3:
            raise RuntimeError("the machine went away")

    with pytest.raises(RuntimeError):
        run(tmp_path, STEPS, before=fall)
    with (tmp_path / LOG).open("a") as log:
        log.write('{"step": 3, "at": 0, "lr": {}, "numbers": {"loss": 1.0}}\n{"step": 4, "nu')
    run(tmp_path, STEPS, resume=True)
    trainer = Trainer(Regression(), tmp_path, Plan(steps=STEPS), resume=True)
    assert [step for step, _ in trainer.history["loss"]] == list(range(STEPS))
    assert [step for step, _ in trainer.history["gradient_seldom"]] == [0, 3]


@pytest.mark.heavy
def test_a_budget_becomes_steps_once(tmp_path: Path) -> None:
    def interrupt(step: int) -> None:
        if step == 11:
            signal.raise_signal(signal.SIGINT)

    plan = Plan(budget_s=0.5, warmup_steps=2)
    trainer = Trainer(Regression(before=interrupt), tmp_path, plan)
    first = trainer.train()
    assert first.total is not None
    assert first.step == 12 < first.total
    # Whatever budget it is resumed with, the schedule is that of the beginning.
    resumed = Trainer(Regression(), tmp_path, Plan(budget_s=3600.0), resume=True)
    assert resumed.total == first.total
    assert resumed.train().step == first.total
