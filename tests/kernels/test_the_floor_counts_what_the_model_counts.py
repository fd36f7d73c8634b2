"""The roofline's sum over ops is the model's own count, and the benches run and end in JSON."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from streamdiff import presets
from streamdiff.models.cost import step_flops

ROOT = Path(__file__).parents[2]


@pytest.fixture
def roofline(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "perf"))
    return importlib.import_module("roofline")


def test_operations_of_a_step(roofline: ModuleType) -> None:
    config = presets.live_avatar_14b()
    shapes = roofline.shapes_of(config.height, config.width, config.memory.window_chunks, folded=0)
    assert shapes.tokens == config.chunk_tokens
    for eight_bits in (False, True):
        counted = sum(cost.calls * cost.flops for cost in roofline.step_costs(shapes, eight_bits=eight_bits))
        assert counted == pytest.approx(step_flops(config).total, rel=0.01)


@pytest.mark.parametrize("keys", [16, 64])
def test_a_folded_prompt_leaves_out_a_projection_and_most_keys(roofline: ModuleType, keys: int) -> None:
    L, D, N, Z, J, A = 3168, 5120, 40, 40, 12, 5
    saved = Z * (4 * L * 512 * D + 2 * L * D * D) + J * (4 * L * A * D + 2 * L * D * D)
    added = Z * (2 * L * D * keys + 2 * L * N * keys * D) + J * (2 * L * D * A + 2 * L * N * A * D)
    plain, folded = (
        sum(cost.calls * cost.flops for cost in roofline.step_costs(roofline.Shapes(folded=k), eight_bits=False))
        for k in (0, keys)
    )
    assert plain - folded == saved - added


def test_a_floor_is_the_longer_of_moving_and_computing(roofline: ModuleType) -> None:
    ceilings = roofline.Ceilings(1e9, {"bfloat16": 1e12}, "here")
    moves = roofline.Cost("a copy", 2_000_000, 0, 1, "")
    computes = roofline.Cost("a product", 2_000_000, 10**10, 1, "bfloat16")
    assert (moves.floor_ms(ceilings), moves.bound(ceilings)) == (2.0, "memory")
    assert (computes.floor_ms(ceilings), computes.bound(ceilings)) == (10.0, "compute")


def test_a_prediction_is_the_step_that_is_served(roofline: ModuleType) -> None:
    """Above its floor; dearer with layers that keep sixteen bits; the same at the rate of the floor as the floor."""
    ceilings, shapes = roofline.ASSUMED["h200"], roofline.Shapes()
    rows = {p.what: p.row(ceilings) for p in roofline.predictions(shapes)}
    assert all(row["floor_ms"] < row["expected_ms"] < 1.5 * row["floor_ms"] for row in rows.values())
    kept, none = (rows[f"fp8, attention fp8{more}"] for more in ("", ", no layer kept"))
    assert 1 < kept["expected_ms"] - none["expected_ms"] < 4
    ideal = roofline.Shares(product=1.0, attention=ceilings.product["bfloat16"], element=1.0)
    for eight_bits in (False, True):
        costs = roofline.served_costs(shapes, eight_bits=eight_bits)
        floor_ms = sum(cost.calls * cost.floor_ms(ceilings) for cost in costs)
        assert ideal.expected_ms(costs, ceilings) == pytest.approx(floor_ms)
        counts = {c.name: 0 for c in costs}
        for cost in costs:
            counts[cost.name] += cost.calls
        assert counts["attend"] == shapes.layers
        fused = sum(n for name, n in counts.items() if name.startswith("gate_residual_norm_modulate"))
        assert fused == 3 * shapes.layers + shapes.injectors


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["bench_kernels.py", "--shapes", "small", "--budget-s", "0.01"],
        ["roofline.py", "--assume", "h200"],
        ["measure.py", "--device", "cpu"],
    ],
    ids=lambda command: command[0],
)
def test_a_bench_ends_in_one_json_object(command: list[str], tmp_path: Path) -> None:
    saved = tmp_path / "deep" / "result.json"
    result = subprocess.run(
        [sys.executable, str(ROOT / "perf" / command[0]), *command[1:], "--save", str(saved)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=250,
        check=True,
    )
    last = json.loads(result.stdout.splitlines()[-1])
    assert last == json.loads(saved.read_text())
    assert last["rows"]
    assert not [row for row in last["rows"] if "error" in row]
    assert last["card"]["torch"]
