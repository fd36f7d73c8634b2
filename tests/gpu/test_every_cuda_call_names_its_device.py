"""No call of torch.cuda goes to whatever device happens to be current: on ranks after the first that is another's.

Not seen by a test that runs on one GPU, so this one reads the code.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_DEVICE = {
    "is_available",
    "device_count",
    "Event",
    "CUDAGraph",
    "graph_pool_handle",
    "set_sync_debug_mode",
    "empty_cache",
    "graph",  # its stream names the device
    "stream",
}
"""What belongs to no device, or is told which by an argument that it cannot do without."""


def nameless(source: str) -> Iterator[str]:
    """Calls of ``torch.cuda`` without arguments, and events recorded on the current stream of the current device."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or node.args or not isinstance(node.func, ast.Attribute):
            continue
        named = any(keyword.arg in ("device", "stream") for keyword in node.keywords)
        called = ast.unparse(node.func)
        of_cuda = re.fullmatch(r"torch\.cuda\.\w+", called) and node.func.attr not in WITHOUT_DEVICE
        records = node.func.attr in ("record", "record_event") and not node.keywords and "stream" not in called.lower()
        if (of_cuda and not named) or records:
            yield f"{node.lineno}: {called}()"


@pytest.mark.heavy
@pytest.mark.parametrize("folder", ["streamdiff", "kernels", "perf"])
def test_every_call_names_its_device(folder: str) -> None:
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    assert [f"{path.relative_to(ROOT)}:{found}" for path in paths for found in nameless(path.read_text())] == []


@pytest.mark.heavy
def test_nobody_but_the_group_and_sharded_training_sets_the_device() -> None:
    """A bench or a test that sets it hides what a rank would do without."""
    paths = [path for folder in ("streamdiff", "kernels", "perf", "tests") for path in (ROOT / folder).rglob("*.py")]
    found = {
        path.relative_to(ROOT).as_posix()
        for path in paths
        if path != Path(__file__).resolve()
        and any(
            isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.cuda.set_device"
            for node in ast.walk(ast.parse(path.read_text()))
        )
    }
    assert found == {"streamdiff/pipeline/device.py", "streamdiff/training/shard.py"}


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("nameless_line", "named_line"),
    [
        ("torch.cuda.synchronize()", "torch.cuda.synchronize(device)"),
        ("torch.cuda.current_stream().synchronize()", "torch.cuda.current_stream(device).synchronize()"),
        ("event.record()", "event.record(stream)"),
        ("torch.cuda.Stream()", "torch.cuda.Stream(device=device)"),
    ],
)
def test_a_nameless_call_is_found(nameless_line: str, named_line: str) -> None:
    assert len(list(nameless(nameless_line))) == 1
    assert list(nameless(named_line)) == []
