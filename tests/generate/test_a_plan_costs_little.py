"""A plan says what a job needs without needing it: what would take too much memory or time is predicted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from streamdiff import estimate, presets
from streamdiff.cli.main import main
from streamdiff.engine import Engine
from streamdiff.errors import BackendError
from streamdiff.models import cost
from streamdiff.models.served.options import Precision, StepOptions
from streamdiff.pipeline.schedule import Role

ALL_STEPS = Role(rank=0, encodes=True, steps=(0, 1, 2, 3), decodes=False)


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any) -> None:
        raise AssertionError("a model was run")

    monkeypatch.setattr(estimate, "_measured", run)


def plan(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["generate", "--plan", *flags]) == 0
    return capsys.readouterr().out


def test_what_would_take_minutes_is_predicted(nothing_runs: None, capsys: pytest.CaptureFixture[str]) -> None:
    said = plan(capsys, "--size", "2048x2048")
    assert "predicted, as measuring takes" in said


def test_what_does_not_fit_is_predicted(
    nothing_runs: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "available_bytes", lambda device: 50 * 2**20)
    said = plan(capsys)
    assert "cpu has 50.0 MiB free" in said
    assert "predicted" in said


@pytest.mark.heavy
def test_what_is_small_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert "measured here, on cpu" in plan(capsys, "--size", "64x64", "--steps", "1")


def test_eight_bits_are_counted_where_they_lie() -> None:
    config = presets.live_avatar_14b()
    wide, narrow, none_kept = (
        estimate.role_bytes(config, ALL_STEPS, device="cuda", from_folder=True, options=options)
        for options in (
            StepOptions(),
            StepOptions(precision=Precision.FP8),
            StepOptions(precision=Precision.FP8, kept_layers=0),
        )
    )
    weights = [
        cost.rank_bytes(config, num_steps=4, bytes_per_value=2, kept_layers=kept).weights for kept in (None, 1, 0)
    ]
    assert wide - narrow == weights[0] - weights[1] > 10 * 2**30
    assert wide - none_kept == weights[0] - weights[2] > wide - narrow


def test_a_plan_in_eight_bits_shows_their_memory(nothing_runs: None, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--preset", "live_avatar_14b", "--assume", "700")
    lines = [plan(capsys, *flags, *more).splitlines() for more in ((), ("--precision", "fp8"))]
    ranks = [next(line for line in one if line.startswith("0 ")) for one in lines]
    assert ranks[0] != ranks[1]
    assert any("counted at the speed of sixteen-bit ones" in line for line in lines[1])


def test_a_plan_names_what_cannot_run_here(nothing_runs: None) -> None:
    engine = Engine(presets.tiny(), options=StepOptions(precision=Precision.FP8), plan_only=True)
    with pytest.raises(BackendError, match="load them as bfloat16"):
        estimate.forecast(engine)
    # A device that is not here may be able to.
    assert "predicted for a device" in estimate.forecast(engine, assumed_flops_per_s=7e14).basis


def test_a_clock_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    estimate._clock(torch.device("cpu"))()
    assert waited == []
    estimate._clock(torch.device("cuda", 1))()
    assert waited == [torch.device("cuda", 1)]
