"""The served step and decoder with our Triton kernels in them, whole: under the interpreter they are the readable ones.

Triton decides to interpret when a kernel is defined, so they run in a process of their own.
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
from tests.models.step_case import Case, config_of, distance, rms_distance
from streamdiff.models.served.options import Precision, StepOptions
from streamdiff_kernels import Impl

torch.set_num_threads(1)
config = config_of(num_layers=2, frames_per_chunk=2, window_chunks=2, motion=False, size=32)
for precision, history, dtype, far in (
    (Precision.WEIGHTS, Precision.WEIGHTS, torch.float32, lambda a, b: distance(a, b) <= 2e-6),
    (Precision.FP8, Precision.WEIGHTS, torch.bfloat16, lambda a, b: 1e-3 < rms_distance(a, b) <= 0.06),
    (Precision.WEIGHTS, Precision.FP8, torch.float32, lambda a, b: 1e-5 < rms_distance(a, b) <= 0.02),
):
    with torch.inference_mode():
        case = Case(config, dtype=dtype)
        one, other = case.memory(), case.memory(eight_bits=history is Precision.FP8)
        latents, heard = case.latents(3), [case.heard(voice) for voice in case.voices(3)]
        read = [case.read(one, c, latents[c], heard[c]) for c in range(3)]
        options = StepOptions(impl=Impl.TRITON, attention="triton", precision=precision, kept_layers=0, history=history)
        step = case.served(other, options)
        for c in range(3):
            served = case.serve(step, other, c, latents[c], heard[c])
            off = distance(served, read[c]), rms_distance(served, read[c])
            assert far(served, read[c]), (precision, history, c, off)
    print(precision.value, history.value)
"""


DECODER = """
import torch
from streamdiff.config import VAEConfig
from streamdiff.models import vae
from streamdiff.models.served.decoder import ServedDecoder
from streamdiff.models.vae import VAEDecoder
from streamdiff_kernels import Impl

torch.set_num_threads(1)
plain, inner = (VAEDecoder(VAEConfig(base_dim=6, num_res_blocks=1)) for _ in range(2))
for one in (plain, inner):
    vae.initialise(one, seed=0)
served = ServedDecoder(inner, impl=Impl.TRITON)
latents = torch.randn(1, 16, 2, 2, 3, generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    want, after = plain.decode(latents)
    found, state = served.decode(latents)
    assert (found - want).abs().max() <= 2e-5, (found - want).abs().max()
    want, after = plain.decode(latents[:, :, :1], after)
    found, state = served.decode(latents[:, :, :1], state)
    assert (found - want).abs().max() <= 2e-5, (found - want).abs().max()
print("kept decoder")
"""


def interpreted(script: str) -> list[str]:
    """What a script prints, its kernels interpreted."""
    pytest.importorskip("triton")
    folders = (ROOT, ROOT / "kernels")
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


@pytest.mark.slow
def test_it_is_the_readable_step() -> None:
    """Norms, rotation, ring write, residuals, attention that reads the fill level, and eight-bit linears or history."""
    assert interpreted(SCRIPT) == ["weights", "weights", "fp8", "weights", "weights", "fp8"]


@pytest.mark.slow
@pytest.mark.processes
def test_the_decoders_norm_and_activation_are_the_readable_ones() -> None:
    """At odd sizes: two latent frames of a new stream, then one more."""
    assert interpreted(DECODER) == ["kept", "decoder"]
