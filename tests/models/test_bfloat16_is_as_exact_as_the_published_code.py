"""In bfloat16 a served step stays nearer to exact arithmetic than the published way of computing it.

Both have the same bfloat16 weights and the same eight layers; what is exact is their float32, where they agree to 1e-5.
`perf/published.py` is the published arithmetic, rounding after rounding; ``wide``, with all that autocast may keep.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from published import PublishedStep, complex_table
from torch import Tensor

from streamdiff.config import EngineConfig
from streamdiff.models.served.options import StepOptions
from streamdiff.models.served.step import ServedWeights
from tests.models.step_case import Case, config_of, rms_distance

NUM_CHUNKS = 4
"""A window of three is full, and goes round."""


@pytest.fixture(autouse=True)
def no_grad() -> object:
    with torch.inference_mode():
        yield


def eight_layers() -> EngineConfig:
    """Heads as wide as the 14B model's, sound in every second layer, a prompt of five rows padded to 64."""
    config = config_of(num_layers=8, dim=256)
    assert config.dit.audio is not None
    audio = dataclasses.replace(config.dit.audio, inject_layers=(0, 2, 4, 6))
    dit = dataclasses.replace(config.dit, num_heads=2, ffn_dim=704, text_len=64, freq_dim=256, audio=audio)
    return dataclasses.replace(config, dit=dit)


def published(case: Case, *, wide: bool = False) -> list[Tensor]:
    config, dit = case.config, case.dit
    rows, columns = config.latent_hw[0] // 2, config.latent_hw[1] // 2
    still = dit.motion_rotation(config.latent_hw)
    still_table = torch.complex(still.cos_LF.double(), still.sin_LF.double())[:, None]
    step = PublishedStep(
        dit,
        window_tokens=config.memory.window_chunks * config.chunk_tokens,
        sink_keys=torch.stack([case.sink.keys(z) for z in range(config.dit.num_layers)]),
        sink_values=case.sink.values_ZBSNK,
        wide=wide,
    )
    latents, voices = case.latents(NUM_CHUNKS), case.voices(NUM_CHUNKS)
    found: list[Tensor] = []
    for chunk, (latent, voice) in enumerate(zip(latents, voices, strict=True)):
        assert voice is not None
        moving = complex_table([chunk * config.frames_per_chunk + 30], rows, columns, config.dit.rotary_pairs)
        tables = torch.cat([moving, still_table])
        found.append(step(latent, case.sigma, case.text_BPC, voice, chunk=chunk, sink_tables=tables))
    return found


def served(case: Case, options: StepOptions) -> list[Tensor]:
    latents, voices = case.latents(NUM_CHUNKS), case.voices(NUM_CHUNKS)
    weights, memory = ServedWeights(case.dit, options), case.memory()
    step, text = case.served(memory, options, weights), weights.text_condition(case.text_BPC)
    found: list[Tensor] = []
    for chunk, (latent, voice) in enumerate(zip(latents, voices, strict=True)):
        assert voice is not None
        found.append(case.serve(step, memory, chunk, latent, weights.audio_condition(voice), text))
    return found


def losses(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return list(map(rms_distance, found, exact))


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [1.0, 0.6])
@pytest.mark.parametrize("wide", [False, True])
def test_every_chunk_is_nearer(sigma: float, wide: bool) -> None:
    config, options = eight_layers(), StepOptions()
    exact = published(Case(config, sigma=sigma))
    assert max(losses(served(Case(config, sigma=sigma), options), exact)) <= 1e-5
    half = {"dtype": torch.bfloat16, "sigma": sigma}
    theirs = losses(published(Case(config, **half), wide=wide), exact)
    ours = losses(served(Case(config, **half), options), exact)
    assert all(a <= b for a, b in zip(ours, theirs, strict=True))
