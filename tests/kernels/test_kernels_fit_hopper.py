"""Every kernel compiles for sm_90 and sm_100 without a GPU, fits, spills nothing and uses the wide
instructions.
"""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton", reason="kernels are compiled by Triton")

import triton

from tests.kernels.paper_gpu import ATTENTION, CALLS, GOLDEN, ODD_CALLS, SHARED_LIMIT, Compiled, compile_call

pytestmark = pytest.mark.skipif(
    not hasattr(triton, "compile") or getattr(triton.knobs.runtime, "interpret", False),
    reason="the interpreter compiles nothing",
)

pytestmark = pytest.mark.slow

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
    assert row["wide_stores"] >= 2
    # What is left: the slot number; in the decoder's norm, one weight for each channel of a thread.
    assert row["narrow_loads"] <= (4 if "silu" in name else 1)
    # The scales of eight bits, of keys and of values.
    has_scales = "fp8" in name or "eight" in name or name == "quantise_rows"
    assert row["narrow_stores"] <= (2 if has_scales else 0)


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


@pytest.mark.processes
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_multiplies_on_the_tensor_cores_of_blackwell(
    name: str, compiled: dict[tuple[str, int], Compiled]
) -> None:
    kernel = compiled.get((name, 100)) or compile_call(CALLS[name], 100)
    assert kernel.count(r"UTC\w*MMA\S*") >= 4


@pytest.mark.processes
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_resources_are_those_of_the_golden_table(capability: int, compiled: dict[tuple[str, int], Compiled]) -> None:
    golden = json.loads(GOLDEN.read_text())
    if golden["triton"] != triton.__version__:
        pytest.skip(f"the table was made by triton {golden['triton']}, this is {triton.__version__}")
    table = golden[f"sm_{capability}"]
    assert set(table) == set(CALLS)
    for name in CALLS:
        kernel = compiled.get((name, capability)) or compile_call(CALLS[name], capability)
        row = kernel.row()
        assert abs(row.pop("registers") - table[name].pop("registers")) <= FREE_REGISTERS, name
        assert row == table[name], name
