"""No kernel reads or writes past its tensors: each lies against a page that kills the process when touched.

Under the interpreter addresses are real ones, so a load or store that its mask should have stopped is a segmentation
fault here, where elsewhere it would read a neighbour and go unnoticed.
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import streamdiff_kernels as sk
from streamdiff_kernels import Impl

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="about the interpreter"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]
PAGE = mmap.PAGESIZE
TRITON = Impl.TRITON
_kept: list[mmap.mmap] = []


def forbidden_around(num_bytes: int, *, at_end: bool) -> Tensor:
    """Bytes that end right before, or begin right after, a page that must not be touched."""
    num_pages = -(-num_bytes // PAGE)
    memory = mmap.mmap(-1, (num_pages + 2) * PAGE)
    _kept.append(memory)  # a tensor made of it does not keep it alive
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for page in (0, num_pages + 1):
        if libc.mprotect(ctypes.c_void_p(start + page * PAGE), ctypes.c_size_t(PAGE), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = (num_pages + 1) * PAGE - num_bytes if at_end else PAGE
    return torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes, offset=offset)


def edged(x: Tensor, *, at_end: bool) -> Tensor:
    """A contiguous copy of x against a forbidden page."""
    x = x.contiguous()
    room = forbidden_around(max(1, x.numel() * x.itemsize), at_end=at_end)
    return room[: x.numel() * x.itemsize].view(x.dtype).view(x.shape).copy_(x)


@pytest.fixture(params=[True, False], ids=["end", "start"])
def edge(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor], Tensor]:
    """Puts tensors against the forbidden page, those included that an op allocates for its results."""
    at_end: bool = request.param
    real_empty = torch.empty

    def empty(*shape: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return edged(real_empty(tuple(sizes), dtype=dtype, device=device), at_end=at_end)

    def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return empty(x.shape, dtype=dtype or x.dtype)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    return lambda x: edged(x, at_end=at_end)


@pytest.mark.processes
def test_the_page_is_forbidden() -> None:
    program = (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('here', sys.argv[1]);"
        "here = importlib.util.module_from_spec(spec); spec.loader.exec_module(here);"
        "import ctypes; x = here.forbidden_around(5, at_end=True);"
        "print('before'); ctypes.string_at(x.data_ptr(), 6); print('after')"
    )
    result = subprocess.run([sys.executable, "-c", program, __file__], capture_output=True, text=True, timeout=100)
    assert result.returncode == -11
    assert "after" not in result.stdout


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def test_rows(edge: Callable[[Tensor], Tensor]) -> None:
    B, L, T, D = 2, 6, 3, 37
    x, y = draw(B, L, D, dtype=torch.bfloat16), draw(B, L, D, dtype=torch.bfloat16, seed=1)
    mods = [draw(T, D, seed=seed) for seed in (2, 3, 4)]
    calls: list[Callable[..., Any]] = [
        lambda x, y, gate, scale, shift: sk.norm_modulate(x, scale, shift, impl=TRITON),
        lambda x, y, gate, scale, shift: sk.gate_residual_(x, y, gate, impl=TRITON),
        lambda x, y, gate, scale, shift: sk.gate_residual_norm_modulate_(x, y, gate, scale, shift, impl=TRITON),
        lambda x, y, gate, scale, shift: sk.norm_modulate_fp8(x, scale, shift, impl=TRITON),
        lambda x, y, gate, scale, shift: sk.gelu_fp8(x, impl=TRITON),
        lambda x, y, gate, scale, shift: sk.rms_norm(x, scale[0], impl=TRITON),
    ]
    for call in calls:
        call(*(edge(tensor) for tensor in (x, y, *mods)))


def test_the_decoder(edge: Callable[[Tensor], Tensor]) -> None:
    x, weight = draw(1, 12, 1, 5, 7), draw(12)
    sk.rms_norm_silu(edge(x), edge(weight), edge(weight), impl=TRITON)
    last = edge(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)
    sk.rms_norm_silu(last, edge(weight), impl=TRITON)


@pytest.mark.parametrize("slot", [0, 2, 3, -1])
@pytest.mark.parametrize("eight_bits", [False, True])
def test_the_ring(edge: Callable[[Tensor], Tensor], slot: int, eight_bits: bool) -> None:
    """The last slot ends at the page; the slots beside the ring would begin in it."""
    B, L, N, K, slots = 1, 5, 3, 10, 3
    ring = draw(B, slots * L, N, K).to(torch.float8_e4m3fn if eight_bits else torch.float32)
    scales = edge(draw(B, N).abs()) if eight_bits else None
    table = edge(draw(L, K // 2))
    sk.qk_norm_rope_write(
        *(edge(draw(B, L, N * K)) for _ in range(3)),
        q_weight_D=edge(draw(N * K)),
        k_weight_D=edge(draw(N * K)),
        cos_LR=table,
        sin_LR=table,
        cos_sink_LR=table,
        sin_sink_LR=table,
        keys_BMNK=edge(ring),
        values_BMNK=edge(ring),
        key_scale_BN=scales,
        value_scale_BN=scales,
        slot=edge(torch.tensor([slot], dtype=torch.int32)),
        impl=TRITON,
    )


def test_the_sink(edge: Callable[[Tensor], Tensor]) -> None:
    table = edge(draw(4, 5))
    for first_row in (0, 5):
        sk.rotate_sink_(edge(draw(4, 3, 10)), table, table, edge(draw(9, 3, 10)), first_row=first_row, impl=TRITON)


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize(
    "rows",
    [
        {"length": torch.tensor([33], dtype=torch.int32)},
        {"length": torch.tensor([20], dtype=torch.int32)},
        {"length": torch.tensor([99], dtype=torch.int32)},  # more than there is
        {"segments": torch.tensor([[0, 5], [30, 3], [30, 99]], dtype=torch.int32)},
    ],
)
def test_attention(edge: Callable[[Tensor], Tensor], rows: dict[str, Tensor], eight_bits: bool) -> None:
    L, N, K, M = 19, 2, 10, 33
    ring = draw(1, M, N, K).to(torch.float8_e4m3fn if eight_bits else torch.float32)
    scales = edge(draw(1, N).abs()) if eight_bits else None
    sk.attend_with_lse(
        edge(draw(1, L, N, K)),
        edge(ring),
        edge(ring),
        backend="triton",
        q_sink_BLNK=edge(draw(1, L, N, K)),
        sink_rows=4,
        key_scale_BN=scales,
        value_scale_BN=scales,
        **{name: edge(value) for name, value in rows.items()},
    )
