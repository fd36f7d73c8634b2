"""What is to be tried on the first Hopper compiles today, fits, and uses the instructions it was written for."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.experimental.gluon.nvidia.hopper", reason="Gluon comes with Triton 3.5 and above")

import triton
from try_gluon import WARPS, attend

from tests.kernels.paper_gpu import SHARED_LIMIT, compile_call

pytestmark = pytest.mark.skipif(
    getattr(triton.knobs.runtime, "interpret", False), reason="the interpreter compiles nothing"
)


@pytest.mark.processes
@pytest.mark.parametrize("overlap", [True, False])
def test_it_fits_and_says_who_does_what(overlap: bool) -> None:
    q, ring = (torch.empty(1, rows, 40, 128, dtype=torch.bfloat16, device="meta") for rows in (3168, 15312))
    kernel = compile_call(lambda: attend(q, ring, ring, 15312, overlap=overlap), 90)
    assert kernel.spilled_bytes == 0
    assert kernel.shared_bytes <= SHARED_LIMIT
    # The producer's warpgroup hands registers to the two that compute: 65,536 in all.
    assert kernel.registers * (WARPS + 4) * 32 <= 65_536
    assert kernel.count(r"USETMAXREG\S*") >= 2
    assert kernel.count(r"UTMALDG\S*") >= 3
    assert kernel.count(r"HGMMA\S*") >= 16
    assert kernel.count(r"HMMA\S*") == 0
