"""What holds on a CPU holds on a GPU: the same tests, on the device that matters.

Where a CPU can rehearse a test it does, in the default run, so that none of them rots between two GPUs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

import streamdiff_kernels as kernels
from streamdiff import presets
from streamdiff.config import EngineConfig
from streamdiff.models import cost
from streamdiff.models.dit import CausalDiT
from streamdiff.models.served.options import Precision, StepOptions
from streamdiff.pipeline.denoise import DenoiseStage
from streamdiff.pipeline.packet import Packet, SetReference, SwitchPrompt
from streamdiff_kernels import reference
from streamdiff_kernels.tolerance import TOLERANCES
from tests.models.step_case import Case, config_of, distance, rms_distance

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)
NUM_CHUNKS = 6
FP8 = StepOptions(precision=Precision.FP8, kept_layers=0)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """No tensor-float-32: it has the range of float32 and the digits of float16."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    with torch.inference_mode():
        yield
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = before


def packets(case: Case) -> list[Packet]:
    latents, voices = case.latents(NUM_CHUNKS), case.voices(NUM_CHUNKS)
    start = (SetReference(case.reference, case.motion), SwitchPrompt(case.text_BPC))
    other = (SwitchPrompt(case.randn(1, 4, case.config.dit.text_dim)),)
    commands = {0: start, 3: other}
    return [
        Packet(chunk=c, epoch=0, lead=5, latent_BCTHW=latents[c], audio_BZEA=voices[c], commands=commands.get(c, ()))
        for c in range(NUM_CHUNKS)
    ]


def ready_backends(device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Backends that can run here; what is missing is said elsewhere."""
    found = kernels.available_backends(device=torch.device(device), dtype=dtype, head_dim=head_dim)
    return [name for name, why in found.items() if why is None and name != "reference"]


@pytest.mark.heavy
@pytest.mark.parametrize("options", [StepOptions(), FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_replayed_graph_is_bit_equal_to_eager(device: str, options: StepOptions) -> None:
    """With every attention backend that runs there, round the ring and through a prompt switch."""
    for backend in ready_backends(device, torch.bfloat16, 32):
        velocities = []
        for graph in (True, False):
            case = Case(config_of(), dtype=torch.bfloat16, device=device)
            chosen = dataclasses.replace(options, graph=graph, attention=backend)
            stage = DenoiseStage(case.dit, case.config, (1, 2), options=chosen)
            stage.warm()
            velocities.append([stage.step(packet).latent_BCTHW.cpu() for packet in packets(case)])
        assert all(torch.equal(a, b) for a, b in zip(*velocities, strict=True)), backend


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_stage_equals_the_cpu_in_float32(device: str) -> None:
    found = []
    for place in ("cpu", device):
        case = Case(config_of(), device=place)
        stage = DenoiseStage(case.dit, case.config, (0, 1, 2, 3))
        stage.warm()
        found.append([stage.step(packet).latent_BCTHW.cpu() for packet in packets(case)])
    assert max(map(distance, *found)) <= 2e-5


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_eight_bits_mean_on_a_gpu_what_they_mean_on_a_cpu(device: str) -> None:
    found = []
    for place in ("cpu", device):
        case = Case(config_of(), dtype=torch.bfloat16, device=place)
        stage = DenoiseStage(case.dit, case.config, (1,), options=FP8)
        found.append([stage.step(packet).latent_BCTHW.cpu() for packet in packets(case)])
    # A value near the border between two neighbours falls to either side.
    assert max(map(rms_distance, *found)) <= 0.035


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_attention_backends_agree(device: str) -> None:
    """Odd lengths, against float64; the fill level as a number and, where it can be, on the device."""
    L, M, N, K, used = 75, 331, 3, 64, 257
    generator = torch.Generator().manual_seed(0)
    q, keys, values = (torch.randn(1, n, N, K, generator=generator).to(torch.bfloat16) for n in (L, M, M))
    want, _ = reference.attend(q.double(), keys.double(), values.double(), [(0, used)])
    q, keys, values = q.to(device), keys.to(device), values.to(device)
    length = torch.full((), used, dtype=torch.int32, device=device)
    names = ready_backends(device, torch.bfloat16, K)
    assert "sdpa" in names
    for name in names:
        levels = [used, length] if kernels.BACKENDS[name].counts_on_device else [used]
        for level in levels:
            found = kernels.attend(q, keys, values, level, backend=name)
            TOLERANCES["attend_bfloat16"].check(found.cpu(), want)


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_no_chunk_makes_the_host_wait(device: str, precision: Precision) -> None:
    """torch itself raises at every call that would; the first chunk brings the sink, and may."""
    case = Case(config_of(), dtype=torch.bfloat16, device=device)
    stage = DenoiseStage(case.dit, case.config, (1, 2), options=StepOptions(precision=precision))
    stage.warm()
    first, *others = (
        dataclasses.replace(p, latent_BCTHW=p.latent_BCTHW.cpu(), commands=p.commands if p.chunk == 0 else ())
        for p in packets(case)
    )
    stage.step(first)
    for packet in others[:2]:
        stage.step(packet)  # fills the allocators' caches
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        for packet in others[2:]:
            done = stage.step(packet)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(done.latent_BCTHW).all()


def two_layers_of_the_14b_model() -> EngineConfig:
    config = presets.live_avatar_14b()
    assert config.dit.audio is not None
    audio = dataclasses.replace(config.dit.audio, inject_layers=(0,))
    return dataclasses.replace(config, dit=dataclasses.replace(config.dit, num_layers=2, audio=audio))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kept", [None, 0])
def test_a_step_needs_the_memory_that_cost_says(kept: int | None) -> None:
    """Every allocation of an eager chunk. (On paper, the same is counted for all forty layers without a GPU.)"""
    torch.cuda.empty_cache()
    device = torch.device("cuda", torch.cuda.current_device())
    torch.randn(64, 64, device=device) @ torch.randn(64, 64, device=device)  # the library's workspace is not ours
    start = torch.cuda.memory_allocated(device)
    config = two_layers_of_the_14b_model()
    with torch.device("meta"):
        dit = CausalDiT(config.dit).to(torch.bfloat16)
    dit = dit.to_empty(device=device).requires_grad_(False)
    for parameter in dit.parameters():
        parameter.normal_(0.0, 0.01)
    precision = Precision.WEIGHTS if kept is None else Precision.FP8
    options = StepOptions(graph=False, precision=precision, kept_layers=kept or 0)
    stage = DenoiseStage(dit, config, (1,), options=options)
    del dit
    h, w = config.latent_hw
    audio = config.dit.audio
    assert audio is not None

    def packet(chunk: int) -> Packet:
        reference_BCTHW = torch.randn(1, 16, 1, h, w, device=device)
        motion_BCTHW = torch.randn(1, 16, config.motion_latents, h, w, device=device)
        start = (SetReference(reference_BCTHW, motion_BCTHW), SwitchPrompt(torch.randn(1, 40, 4096, device=device)))
        return Packet(
            chunk=chunk,
            epoch=0,
            lead=5,
            latent_BCTHW=torch.randn(1, 16, config.frames_per_chunk, h, w, device=device),
            audio_BZEA=torch.randn(1, audio.num_features, audio.feature_dim, 12, device=device),
            commands=start if chunk == 0 else (),
        )

    for chunk in range(3):
        if chunk == 2:
            torch.cuda.reset_peak_memory_stats(device)
        stage.step(packet(chunk))
    torch.cuda.synchronize(device)
    found = torch.cuda.max_memory_allocated(device) - start
    need = cost.rank_bytes(config, num_steps=1, bytes_per_value=2, kept_layers=kept)
    assert found == pytest.approx(need.total, rel=0.02)
