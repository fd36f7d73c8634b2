"""Hours of stream cost no more memory, no more time per chunk, and no exactness of the sink."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from streamdiff import presets
from streamdiff.config import EngineConfig
from streamdiff.engine import Engine
from streamdiff.memory import sink_lead
from streamdiff.models.audio import AudioChunk
from streamdiff.pipeline.denoise import DenoiseStage
from streamdiff.pipeline.run import run_local
from streamdiff.pipeline.schedule import Role, plan
from streamdiff.pipeline.stage import Chain
from streamdiff.rope import THETA, sink_position
from tests.engine.stream_case import small_config

SEED = 11


def resident_bytes() -> int:
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def sounds(config: EngineConfig, count: int) -> Iterator[AudioChunk]:
    audio = config.dit.audio
    assert audio is not None
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        shape = (1, audio.num_features, audio.feature_dim, config.video_frames_per_chunk)
        yield AudioChunk(torch.randn(shape, generator=generator), torch.zeros(7680))


def exact_sink(stage: DenoiseStage, config: EngineConfig, chunk: int) -> torch.Tensor:
    """Layer 0's rotated reference keys for one chunk, in float64 from the pristine copy."""
    lead = sink_lead(
        seed=SEED, stream=0, chunk=chunk, low=config.memory.sink_lead_min, high=config.memory.sink_lead_max
    )
    position = sink_position(chunk * config.frames_per_chunk, lead=lead, origin=config.memory.sink_position)
    latent_h, latent_w = config.latent_hw
    axes = [torch.arange(p, dtype=torch.float64) / p for p in config.dit.rotary_pairs]
    angles = torch.stack(
        [
            torch.cat([position * THETA ** -axes[0], row * THETA ** -axes[1], column * THETA ** -axes[2]])
            for row in range(latent_h // 2)
            for column in range(latent_w // 2)
        ]
    )
    pairs = torch.view_as_complex(stage.sink.moving_keys_ZBSNK[0].double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[None, :, None]).flatten(-2)


def run_long(config: EngineConfig, num_chunks: int) -> None:
    torch.set_num_threads(1)
    engine = Engine(config)
    # The two stages one after the other in this thread, so that processor time is this stream's alone.
    denoise, decode = (
        engine.stage(Role(rank=rank, encodes=rank == 0, steps=steps, decodes=rank == 1), seed=SEED)
        for rank, steps in ((0, tuple(range(config.num_steps))), (1, ()))
    )
    assert isinstance(denoise, DenoiseStage)
    head = engine.intake(torch.zeros(config.height, config.width, 3, dtype=torch.uint8), "talk", seed=SEED)
    cpu_s: list[float] = []
    resident: list[int] = []
    packets = run_local(
        plan(num_steps=config.num_steps, num_ranks=1, refresh_chunk=config.refresh_chunk),
        [Chain([denoise, decode])],
        head.packets(sounds(config, num_chunks)),
    )
    start_s = time.process_time()
    for packet in packets:
        cpu_s.append(time.process_time() - start_s)
        start_s = time.process_time()
        resident.append(resident_bytes())
        assert packet.latent_BCTHW.isfinite().all()
    assert len(cpu_s) == num_chunks
    warm, quarter = num_chunks // 10, num_chunks // 4
    assert max(resident[-quarter:]) - max(resident[warm : warm + quarter]) < 8 * 2**20
    early, late = statistics.median(cpu_s[warm : warm + quarter]), statistics.median(cpu_s[-quarter:])
    assert late < 1.25 * early, (early, late)
    found = denoise.memories[0].keys_ZBMNK[0][:, : config.frame_tokens].double()
    expected = exact_sink(denoise, config, num_chunks - 1)
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-6


@pytest.mark.slow
def test_a_short_long_stream() -> None:
    run_long(small_config(2), 120)


@pytest.mark.slow
def test_minutes_of_the_tiny_preset() -> None:
    run_long(presets.tiny(), 400)


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_two_thousand_chunks_of_the_tiny_preset() -> None:
    run_long(presets.tiny(), 2000)
