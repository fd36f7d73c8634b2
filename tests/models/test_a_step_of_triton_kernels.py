"""The served step with our Triton kernels in it, whole: under the interpreter it is the readable step.

Triton decides to interpret when a kernel is defined, so the step runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import torch
from step_case import Case, config_of, distance, rms_distance
from streamdiff.models.step import Precision, StepOptions
from streamdiff_kernels import Impl

torch.set_num_threads(1)
config = config_of(num_layers=2, frames_per_chunk=2, window_chunks=2, motion=False, size=32)
for precision, dtype, far in (
    (Precision.WEIGHTS, torch.float32, lambda a, b: distance(a, b) <= 2e-6),
    (Precision.FP8, torch.bfloat16, lambda a, b: 1e-3 < rms_distance(a, b) <= 0.06),
):
    with torch.inference_mode():
        case = Case(config, dtype=dtype)
        one, other = case.memory(), case.memory()
        latents, heard = case.latents(3), [case.heard(voice) for voice in case.voices(3)]
        read = [case.read(one, c, latents[c], heard[c]) for c in range(3)]
        options = StepOptions(impl=Impl.TRITON, attention="triton", precision=precision, kept_layers=0)
        step = case.served(other, options)
        for c in range(3):
            served = case.serve(step, other, c, latents[c], heard[c])
            assert far(served, read[c]), (precision, c, distance(served, read[c]), rms_distance(served, read[c]))
    print("kept", precision.value)
"""


@pytest.mark.slow
def test_it_is_the_readable_step() -> None:
    """Norms, rotation, ring write, residuals, attention that reads the fill level, and their eight-bit variants."""
    pytest.importorskip("triton")
    folders = (ROOT, ROOT / "kernels", ROOT / "tests" / "models")
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["kept", "weights", "kept", "fp8"]
