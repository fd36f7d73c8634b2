"""Between two chunks nothing waits: no value is read from the device, nothing is copied from it, nothing blocks."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from streamdiff import presets
from streamdiff.memory import ring
from streamdiff.memory import step as cache
from streamdiff.models.served import block, linear, step
from streamdiff.models.served.options import Precision, StepOptions
from streamdiff.pipeline import decode, denoise, stage
from streamdiff_kernels import plain
from tests.models.step_on_paper import Watched, packet, stage_on_paper

WAITING = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize", "unique", "masked_select", "any", "all", "equal"}
"""Methods that bring a value, or a shape that depends on values, to the host."""
EXCEPT = {("decode.py", "_leave", "synchronize"), ("denoise.py", "_settle", "synchronize")}
"""Frames leave the device here, and are waited for; and a rank that is traced waits, so that its spans are its work."""


class Lint(ast.NodeVisitor):
    """Finds what would make the host wait. Tensors are known by their names, which end in their axes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._function = ""
        self.found: list[str] = []
        self.visit(ast.parse(path.read_text(encoding="utf-8")))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, self._function = self._function, node.name
        self.generic_visit(node)
        self._function = outer

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func
        if isinstance(called, ast.Attribute) and called.attr in WAITING:
            self._report(called.attr, node)
        if isinstance(called, ast.Name) and called.id == "print":
            self._report("print", node)
        if isinstance(called, ast.Name) and called.id in ("int", "float", "bool") and _reads_tensor(node):
            self._report(called.id, node)
        self.generic_visit(node)

    def visit_If(self, node: ast.If | ast.While | ast.IfExp | ast.Assert) -> None:
        if _reads_tensor(node.test):
            self._report("branch on a tensor", node)
        self.generic_visit(node)

    visit_While = visit_IfExp = visit_Assert = visit_If

    def _report(self, what: str, node: ast.AST) -> None:
        if (self._path.name, self._function, what) not in EXCEPT:
            self.found.append(f"{self._path.name}:{getattr(node, 'lineno', 0)} {self._function}: {what}")


def _reads_tensor(node: ast.AST) -> bool:
    """Whether an expression needs the values of a tensor, not just its shape, its place or whether it is there."""
    if isinstance(node, ast.Attribute):
        return False
    if isinstance(node, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
        return False
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "len"):
        return False
    if isinstance(node, ast.Name):
        _, _, axes = node.id.rpartition("_")
        return axes != node.id and axes.isalnum() and axes.upper() == axes and not axes.isdigit()
    return any(_reads_tensor(child) for child in ast.iter_child_nodes(node))


@pytest.mark.parametrize("module", [linear, block, step, stage, denoise, decode, ring, cache])
def test_nothing_asks_for_a_value(module: object) -> None:
    assert Lint(Path(str(module.__file__))).found == []  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "line",
    [
        "x_BLD.sum().item()",
        "print(1)",
        "int(length_B)",
        "if x_BLD > 0: pass",
        "y = 1 if mask_BL else 2",
        "while not gate_BTD: pass",
        "rows_L.tolist()",
        "latent_BCTHW.cpu()",
        "torch.cuda.synchronize()",
    ],
)
def test_the_lint_would_notice(line: str, tmp_path: Path) -> None:
    path = tmp_path / "stage.py"
    path.write_text(f"def hot(x_BLD):\n    {line}\n")
    assert len(Lint(path).found) == 1


@pytest.mark.parametrize(
    "line", ["if x_BLD.shape[0] > 1: pass", "if gate_BTD is None: pass", "assert isinstance(h_BLD, int)"]
)
def test_the_lint_lets_shapes_pass(line: str, tmp_path: Path) -> None:
    path = tmp_path / "stage.py"
    path.write_text(f"def hot(x_BLD):\n    {line}\n")
    assert Lint(path).found == []


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Storages that were pinned; this machine may have nothing to pin memory for."""
    storages: list[int] = []

    def pin(self: Tensor) -> Tensor:
        storages.append(self.untyped_storage()._cdata)
        return self

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    return storages


@pytest.mark.parametrize("precision", list(Precision))
def test_a_chunk_crosses_to_the_device_and_nothing_comes_back(precision: Precision, pinned: list[int]) -> None:
    """The whole of `DenoiseStage.step`, two steps of the tiny preset: a tensor on paper has no value to wait for."""
    config = dataclasses.replace(presets.tiny(), motion_latents=0)
    with torch.inference_mode(), Watched() as watched:
        on_paper = stage_on_paper(config, StepOptions(graph=False, precision=precision, kept_layers=1), steps=(1, 2))
        on_paper.step(packet(config, 0))
        chunks = [packet(config, 1), packet(config, 2)]
        pinned.clear()
        watched.begin()
        for chunk in chunks:
            out = on_paper.step(chunk)
    assert out.latent_BCTHW.device.type == "meta"
    crossings = [operation for operation in watched.operations if operation.devices == {"cpu", "meta"}]
    # One latent and one sound per chunk, asynchronously and from pinned memory; nothing else touches the host.
    assert len(crossings) == 4
    assert all(crossing.settings.get("non_blocking") for crossing in crossings)
    assert len(pinned) == 4
    assert not [operation for operation in watched.operations if operation.devices == {"cpu"}]
    names = {operation.name for operation in watched.operations}
    assert not [name for name in names if "scalar_dense" in name or "nonzero" in name or "is_nonzero" in name]


def test_asking_for_a_value_on_paper_raises() -> None:
    """So the test above can fail."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros((), device="meta").item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(torch.zeros(1, device="meta"))


def test_plain_ops_follow_the_slot_without_reading_it() -> None:
    """The ops under the step, where the slot lives on a device that is no CPU."""
    L, N, K = 6, 2, 8
    with torch.device("meta"):
        ring = torch.zeros(1, 4 + 3 * L, N, K, dtype=torch.bfloat16)
        q = torch.zeros(1, L, N * K, dtype=torch.bfloat16)
        turn, weight = torch.zeros(L, K // 2), torch.ones(N * K, dtype=torch.bfloat16)
        slot = torch.zeros((), dtype=torch.int32)
        tables = (weight, weight, turn, turn, None, None)
        q_out, _ = plain.qk_norm_rope_write(q, q, q, *tables, ring, ring.clone(), None, None, slot, 4, 1e-6)
        plain.rotate_sink_(ring[:, :4].clone(), turn[:4], turn[:4], ring, None, 0)
        plain.norm_modulate_fp8(q, weight[None, None].float(), weight[None, None].float(), 1e-6)
        plain.gelu_fp8(q)
    assert q_out.shape == (1, L, N, K)
