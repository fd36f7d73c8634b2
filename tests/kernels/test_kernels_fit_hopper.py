"""Every kernel compiles for sm_90 and sm_100 without a GPU, with each Triton of the golden table.

It fits, spills nothing and uses the wide instructions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels are compiled by Triton")

import triton

from tests.kernels.paper_gpu import (
    ATTENTION,
    CALLS,
    ODD_CALLS,
    SHARED_LIMIT,
    Compiled,
    calls_for,
    compile_call,
    golden,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(triton, "compile") or getattr(triton.knobs.runtime, "interpret", False),
        reason="the interpreter compiles nothing",
    ),
]

ROOT = Path(__file__).resolve().parents[2]
OTHERS = "STREAMDIFF_TRITONS"
"""Folders with other versions of Triton, unpacked."""

FREE_REGISTERS = 8
"""How far a register count may drift from the golden table before somebody should look."""


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, int], Compiled]:
    return {}


CAPABILITIES = [90, 100]


@pytest.mark.processes
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", CALLS)
def test_it_fits_and_spills_nothing(name: str, capability: int, compiled: dict[tuple[str, int], Compiled]) -> None:
    kernel = compiled[name, capability] = compile_call(CALLS[name], capability)
    assert kernel.spilled_bytes == 0
    assert kernel.shared_bytes <= SHARED_LIMIT
    assert kernel.registers * kernel.num_warps * 32 <= 65_536


@pytest.mark.processes
@pytest.mark.parametrize("name", ODD_CALLS)
def test_odd_shapes_compile_and_spill_nothing(name: str) -> None:
    assert compile_call(ODD_CALLS[name], 90).spilled_bytes == 0


@pytest.mark.processes
@pytest.mark.parametrize("name", [name for name in CALLS if name not in ATTENTION])
def test_rows_move_in_128_bits(name: str, compiled: dict[tuple[str, int], Compiled]) -> None:
    row = (compiled.get((name, 90)) or compile_call(CALLS[name], 90)).row()
    assert row["wide_loads"] >= 4
    # Sixteen values a thread of a wide stream are one store in eight bits.
    assert row["wide_stores"] >= (1 if name == "norm_modulate_fp8" else 2)
    # What is left: the slot number; a scale for each head of a thread; in the decoder's, a weight for each channel.
    assert row["narrow_loads"] <= (4 if "silu" in name else 5 if "eight bits" in name else 1)
    # The scale of a row in eight bits.
    assert row["narrow_stores"] <= (1 if "fp8" in name or name == "quantise_rows" else 0)


@pytest.mark.processes
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_multiplies_on_the_tensor_cores_of_hopper(
    name: str, compiled: dict[tuple[str, int], Compiled]
) -> None:
    kernel = compiled.get((name, 90)) or compile_call(CALLS[name], 90)
    # Two products, a whole and a last tile of each: at least four groups of wgmma, and no older instruction.
    assert kernel.count(r"HGMMA\S*") >= 16
    assert kernel.count(r"HMMA\S*") == 0
    # Keys and values come by the bulk copy engine, not through registers.
    assert kernel.count(r"UTMALDG\S*") >= 4


LOOPS = {
    "attend": {"products": 16, "exponentials": 66, "waits": 1, "barriers": 3},
    "attend eight bits": {"products": 12, "exponentials": 66, "waits": 2, "barriers": 4},
}
"""A tile of 128 keys for a warp of two warpgroups; what the share expected in kernels/README.md is reckoned from."""


@pytest.mark.processes
@pytest.mark.parametrize("name", LOOPS)
def test_the_inner_loop_is_what_its_expected_speed_is_reckoned_from(name: str) -> None:
    loop = compile_call(CALLS[name], 90).inner_loop()
    assert {kind: loop[kind] for kind in LOOPS[name]} == LOOPS[name]
    assert loop["instructions"] <= 560


@pytest.mark.processes
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_multiplies_on_the_tensor_cores_of_blackwell(
    name: str, compiled: dict[tuple[str, int], Compiled]
) -> None:
    kernel = compiled.get((name, 100)) or compile_call(CALLS[name], 100)
    assert kernel.count(r"UTC\w*MMA\S*") >= 4


def assert_golden(found: dict[str, dict[str, int]], version: str, capability: int) -> None:
    """Registers may drift a little, all else is exact."""
    table = golden()[version][f"sm_{capability}"]
    assert set(found) == set(table)
    for name, row in found.items():
        want = dict(table[name])
        assert abs(row["registers"] - want.pop("registers")) <= FREE_REGISTERS, name
        assert {key: row[key] for key in want} == want, name


@pytest.mark.processes
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_resources_are_those_of_the_golden_table(capability: int, compiled: dict[tuple[str, int], Compiled]) -> None:
    if triton.__version__ not in golden():
        pytest.skip(f"the table was made by triton {' and '.join(golden())}, this is {triton.__version__}")
    kernels = {
        name: compiled.get((name, capability)) or compile_call(call, capability)
        for name, call in calls_for(capability).items()
    }
    assert_golden({name: kernel.row() for name, kernel in kernels.items()}, triton.__version__, capability)


@pytest.mark.processes
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("version", [version for version in golden() if version != triton.__version__])
def test_another_triton_compiles_all_of_it(version: str, capability: int) -> None:
    """The version that the torch of another machine brings, in a process of its own."""
    folders = [Path(folder) for folder in os.environ.get(OTHERS, "").split(os.pathsep) if folder]
    here = next((folder for folder in folders if (folder / f"triton-{version}.dist-info").is_dir()), None)
    if here is None:
        pytest.skip(f"triton {version} is not unpacked: pip install --target DIR, and DIR in {OTHERS}")
    command = [sys.executable, "-m", "tests.kernels.paper_gpu", "--capability", str(capability)]
    paths = [str(here), str(ROOT / "kernels"), str(ROOT)]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout).items()
    assert found[0] == version
    rows = found[1][f"sm_{capability}"]
    assert all(row["spilled_bytes"] == 0 and row["shared_bytes"] <= SHARED_LIMIT for row in rows.values())
    assert_golden(rows, version, capability)
