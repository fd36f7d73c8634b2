"""A GPU that exists on paper: Triton compiles every launch for it, as the ops really launch it, and runs
none.

The ops are called with tensors that have shapes and no data (device "meta"), through the same wrappers as on
a GPU, so what is inspected is what would run: signatures, alignment, tile shapes, warps. The wheel of Triton
brings the assembler and the disassembler.

The golden table has one part per version of Triton. Regenerate the part of the version that is imported after a change
that moves it, and say in the commit why it moved; the second line does it for another version, unpacked by
``pip install --no-deps --target DIR triton==3.6.0``:
    PYTHONPATH=kernels python tests/kernels/paper_gpu.py --write
    PYTHONPATH=DIR:kernels python tests/kernels/paper_gpu.py --write
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from streamdiff_kernels import triton as fast

SHARED_LIMIT = 232_448
"""Bytes of shared memory that one program may have on sm_90 and sm_100."""

GOLDEN = Path(__file__).with_name("golden_resources.json")


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel as the assembler left it."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    num_warps: int
    sass: str

    def count(self, pattern: str) -> int:
        """Instructions whose mnemonic matches."""
        return len(re.findall(rf"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?(?:{pattern})\b", self.sass, re.MULTILINE))

    def inner_loop(self) -> dict[str, int]:
        """What the shortest loop of products and exponentials holds: these, waits for products, barriers of all warps
        that compute, instructions.
        """
        lines = re.findall(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+ )?(.+?);", self.sass, re.MULTILINE)
        at = {int(address, 16): number for number, (address, _) in enumerate(lines)}
        loops: list[list[str]] = []
        for number, (address, text) in enumerate(lines):
            target = re.search(r"^BRA\b.*0x([0-9a-f]+)", text)
            if target is not None and int(target.group(1), 16) < int(address, 16):
                loops.append([line for _, line in lines[at[int(target.group(1), 16)] : number + 1]])
        needed = ("GMMA", "MUFU.EX2")
        body = min((loop for loop in loops if all(any(name in line for line in loop) for name in needed)), key=len)
        kinds = {
            "products": r"[HQ]GMMA",
            "exponentials": r"MUFU\.EX2",
            "waits": r"WARPGROUP\.DEPBAR",
            "barriers": r"BAR\.SYNC",
        }
        counts = {kind: sum(re.match(pattern, line) is not None for line in body) for kind, pattern in kinds.items()}
        return counts | {"instructions": len(body)}

    def row(self) -> dict[str, int]:
        """What the golden table keeps."""
        return {name: value for name, value in asdict(self).items() if name != "sass" and isinstance(value, int)} | {
            "matrix": self.count(r"[HQ]GMMA\S*|UTC\w*MMA\S*"),
            "wide_loads": self.count(r"LDG\.E\S*\.128\S*|LDG\.E\S*\.ENL2\.256\S*"),
            "narrow_loads": self.count(r"LDG\S*") - self.count(r"LDG\.E\S*(?:\.128|\.ENL2\.256)\S*"),
            "wide_stores": self.count(r"STG\.E\S*\.128\S*|STG\.E\S*\.ENL2\.256\S*"),
            "narrow_stores": self.count(r"STG\S*") - self.count(r"STG\.E\S*(?:\.128|\.ENL2\.256)\S*"),
        }


class _Utils:
    def __init__(self, owner: PaperDriver) -> None:
        self._owner = owner

    def get_device_properties(self, device: int) -> dict[str, int]:
        del device
        return {"max_shared_mem": SHARED_LIMIT, "multiprocessor_count": 132}

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[object, object, int, int, int]:
        del name, device
        self._owner.last = (cubin, shared)
        return object(), object(), 0, 0, 1024


class PaperDriver:
    """Stands where Triton's CUDA driver stands. Every one is a new device, because Triton caches kernels by
    device.
    """

    _numbers = itertools.count(1000)

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.number = next(self._numbers)
        self.utils = _Utils(self)
        self.last: tuple[bytes, int] | None = None
        self.num_warps = 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        del device
        return 0

    def launcher_cls(self, src: object, metadata: Any) -> Callable[..., None]:
        del src
        self.num_warps = metadata.num_warps
        return lambda *args, **kwargs: None


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _inspect(cubin: bytes, shared: int, num_warps: int) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(*command: str) -> str:
            return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

        usage = run(_tool("cuobjdump"), "-res-usage", file.name)
        sass = run(_tool("cuobjdump"), "-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    assert found is not None, usage
    local = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    stack = int(found.group(2)) + int(found.group(3))
    return Compiled(int(found.group(1)), stack if local == 0 else max(stack, 4 * local), shared, num_warps, sass)


@contextlib.contextmanager
def _installed(paper: PaperDriver) -> Iterator[None]:
    before = driver._active
    driver.set_active(paper)
    try:
        yield
    finally:
        driver._active = before


def compile_call(call: Callable[[], object], capability: int) -> Compiled:
    """What the one kernel that ``call`` launches becomes on a GPU of this capability."""
    paper = PaperDriver(capability)
    with _installed(paper):
        call()
    assert paper.last is not None, "the call launched nothing"
    return _inspect(*paper.last, paper.num_warps)


B, T, L, N, K, F = 1, 3, 3168, 40, 128, 13824
D, SINK = N * K, 2640
M = SINK + 4 * L


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _f32(*shape: int) -> Tensor:
    return _meta(*shape, dtype=torch.float32)


def _mods() -> tuple[Tensor, Tensor, Tensor]:
    table = _f32(1, T, 6, D)
    return table[:, :, 0], table[:, :, 1], table[:, :, 2]


def _stream() -> Tensor:
    """The residual stream, which is never rounded."""
    return _f32(B, L, D)


def _branch() -> Tensor:
    return _meta(B, L, D)


def _write(*, two_turns: bool = False, eight_bits: bool = False) -> None:
    q, k, v = _meta(B, L, 3 * D).split(D, dim=-1)
    ring = torch.float8_e4m3fn if eight_bits else torch.bfloat16
    table = _f32(L, K // 2)
    fast.qk_norm_rope_write(
        q,
        k,
        v,
        _meta(D),
        _meta(D),
        table,
        table,
        table if two_turns else None,
        table if two_turns else None,
        _meta(B, M, N, K, dtype=ring),
        _meta(B, M, N, K, dtype=ring),
        _f32(B, N) if eight_bits else None,
        _f32(B, N) if eight_bits else None,
        _meta(1, dtype=torch.int32),
        SINK,
        1e-6,
    )


def _attend(
    *,
    tokens: int = L,
    two_turns: bool = False,
    eight_bits: bool = False,
    sparse: bool = False,
    lse: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    ring = torch.float8_e4m3fn if eight_bits else dtype
    fast.attend(
        _meta(B, tokens, N, K, dtype=dtype),
        _meta(B, tokens, N, K, dtype=dtype) if two_turns else None,
        _meta(B, M, N, K, dtype=ring),
        _meta(B, M, N, K, dtype=ring),
        _f32(B, N) if eight_bits else None,
        _f32(B, N) if eight_bits else None,
        None if sparse else _meta(1, dtype=torch.int32),
        _meta(3, 2, dtype=torch.int32) if sparse else None,
        None,
        SINK if two_turns else 0,
        K**-0.5,
        lse,
    )


def _picture(channels: int, *, last: bool) -> Tensor:
    picture = _meta(1, channels, 1, 88, 48)
    return picture.to(memory_format=torch.channels_last_3d) if last else picture


CALLS: dict[str, Callable[[], object]] = {
    "qk_norm_rope_write": _write,
    "qk_norm_rope_write two turns": lambda: _write(two_turns=True),
    "qk_norm_rope_write eight bits": lambda: _write(eight_bits=True),
    "rotate_sink_": lambda: fast.rotate_sink_(
        _meta(B, SINK, N, K), _f32(SINK, K // 2), _f32(SINK, K // 2), _meta(B, M, N, K), None, 0
    ),
    "rms_norm": lambda: fast.rms_norm(_branch(), _meta(D), 1e-6),
    "norm_modulate": lambda: fast.norm_modulate(_stream(), *_mods()[:2], 1e-6, torch.bfloat16),
    "norm_modulate_fp8": lambda: fast.norm_modulate_fp8(_stream(), *_mods()[:2], 1e-6),
    "gate_residual_": lambda: fast.gate_residual_(_stream(), _branch(), _mods()[0]),
    "gate_residual_norm_modulate_": lambda: fast.gate_residual_norm_modulate_(_stream(), _branch(), *_mods(), 1e-6),
    "gate_residual_norm_modulate_fp8_": lambda: fast.gate_residual_norm_modulate_fp8_(
        _stream(), _branch(), *_mods(), 1e-6
    ),
    "quantise_rows": lambda: fast.quantise_rows(_branch()),
    "gelu_fp8": lambda: fast.gelu_fp8(_meta(B, L, F)),
    "rms_norm_silu 96": lambda: fast.rms_norm_silu(_picture(96, last=False), _meta(96), None, 1e-12),
    "rms_norm_silu 384": lambda: fast.rms_norm_silu(_picture(384, last=False), _meta(384), None, 1e-12),
    "rms_norm_silu 384 channels last": lambda: fast.rms_norm_silu(_picture(384, last=True), _meta(384), None, 1e-12),
    "attend": _attend,
    "attend two turns": lambda: _attend(two_turns=True, lse=True),
    "attend sparse two turns": lambda: _attend(sparse=True, two_turns=True),
    "attend eight bits": lambda: _attend(eight_bits=True),
    "attend short chunk": lambda: _attend(tokens=64),
}
"""One call per kernel and specialisation that the 14B model uses, at 704 x 384."""


def _odd_rows() -> None:
    x = _meta(2, 6, 24)
    one = _f32(1, 1, 24)
    fast.gate_residual_norm_modulate_(x, x, one, one, one, 1e-6)


def _odd_write() -> None:
    x, table, ring = _meta(1, 1, 10), _f32(1, 5), _meta(1, 2, 1, 10)
    slot = _meta(1, dtype=torch.int32)
    fast.qk_norm_rope_write(
        x, x, x, _meta(10), _meta(10), table, table, None, None, ring, ring, None, None, slot, 1, 1e-6
    )


def _odd_attend() -> None:
    q, ring = _meta(1, 1, 1, 24), _meta(1, 3, 1, 24)
    fast.attend(q, q, ring, ring, None, None, None, _meta(1, 2, dtype=torch.int32), None, 1, 0.2, True)


def _norm_of_one_frame() -> None:
    one = _f32(1, 1, D)
    fast.gate_residual_norm_modulate_(_stream(), _branch(), None, one, one, 1e-6)


ODD_CALLS: dict[str, Callable[[], object]] = {
    "norm of one frame": _norm_of_one_frame,
    "rows of 24": _odd_rows,
    "a chunk of one token": _odd_write,
    "one query": _odd_attend,
    "float32 rows": lambda: fast.norm_modulate(_f32(1, 3, 1536), _f32(1, 3, 1536), _f32(1, 3, 1536), 1e-6),
    "twelve heads": lambda: fast.rotate_sink_(
        _meta(1, 5, 12, K), _f32(5, K // 2), _f32(5, K // 2), _meta(1, 9, 12, K), None, 2
    ),
}
"""Shapes where an integer is 1, which Triton turns into a constant, or is a multiple of nothing."""

ATTENTION = [name for name in CALLS if name.startswith("attend")]


def gluon_calls(experiment: ModuleType) -> dict[str, Callable[[], object]]:
    """The experiment of ``perf/try_gluon.py`` at the shapes of the 14B model, for sm_90 alone."""
    q, ring = _meta(B, L, N, K), _meta(B, M, N, K)
    return {
        f"gluon, overlap {overlap}": lambda overlap=overlap: experiment.attend(q, ring, ring, M, overlap=overlap)
        for overlap in (True, False)
    }


def _experiment() -> ModuleType:
    """``perf/try_gluon.py``, which is no package's."""
    perf = str(Path(__file__).parents[2] / "perf")
    sys.path.append(perf)
    try:
        return importlib.import_module("try_gluon")
    finally:
        sys.path.remove(perf)


def calls_for(capability: int) -> dict[str, Callable[[], object]]:
    """All that the golden table knows of a capability."""
    return CALLS if capability != 90 else CALLS | gluon_calls(_experiment())


def table(capability: int) -> dict[str, dict[str, int]]:
    """The resources of every call."""
    return {name: compile_call(call, capability).row() for name, call in calls_for(capability).items()}


def golden() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """Resources by version of Triton, capability (``sm_90``) and call."""
    return json.loads(GOLDEN.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description="What every kernel takes on a GPU, without one.")
    parser.add_argument("--write", action="store_true", help="rewrite this version's part of the golden table")
    parser.add_argument("--capability", type=int, nargs="+", default=[90, 100])
    parser.add_argument("--sass", help="print the machine code of this call")
    parser.add_argument("--loop", help="print what the inner loop of this call holds, on sm_90")
    arguments = parser.parse_args()
    if arguments.sass:
        capability = arguments.capability[0]
        print(compile_call(calls_for(capability)[arguments.sass], capability).sass)
        return
    if arguments.loop:
        print(json.dumps(compile_call(calls_for(90)[arguments.loop], 90).inner_loop()))
        return
    found = {triton.__version__: {f"sm_{capability}": table(capability) for capability in arguments.capability}}
    if arguments.write:
        GOLDEN.write_text(json.dumps(dict(sorted((golden() | found).items())), indent=1) + "\n")
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
