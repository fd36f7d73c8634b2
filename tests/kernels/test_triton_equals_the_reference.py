"""The Triton kernels keep their promises: under the interpreter here, and on the GPU where there is one.

Triton decides to interpret when a kernel is defined, so the promises run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROMISES = sorted((Path(__file__).parent / "promises").glob("*.py"))
ROOT = Path(__file__).parents[2]


def keep_all(*, interpreted: bool) -> None:
    # With more than one BLAS thread the interpreter's small products take several times longer.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    # Poisoned memory comes with deterministic algorithms, and cuBLAS wants this for them.
    environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    environment.pop("TRITON_INTERPRET", None)
    if interpreted:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *map(str, PROMISES), "-p", "no:cacheprovider", "--tb=short"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


@pytest.mark.slow
def test_kept_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    keep_all(interpreted=True)


@pytest.mark.gpu
def test_kept_on_the_gpu() -> None:
    keep_all(interpreted=False)
