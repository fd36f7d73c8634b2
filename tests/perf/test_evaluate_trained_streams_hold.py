"""The shipped weights: the same bits on any number of ranks, and the same person after a thousand seconds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluate.drift import beyond, long_run, summary
from evaluate.model import Model
from numpy.typing import NDArray

from streamdiff import checkpoint, presets
from streamdiff.engine import Engine
from streamdiff.media import read_image
from streamdiff.models.audio import chunks
from streamdiff.pipeline.packet import Packet
from streamdiff.pipeline.run import run_local
from streamdiff.pipeline.schedule import plan
from streamdiff.training.data.speech import leveled
from streamdiff.training.probe import WEIGHTS, load_probe

_FOLDER = checkpoint.shipped(presets.portrait())
_THERE = _FOLDER is not None and (_FOLDER / "diffusion_pytorch_model.safetensors").is_file() and WEIGHTS.is_file()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _THERE, reason="the trained weights of the preset portrait are not there"),
]

PERSON = Path(__file__).with_name("person.png")
"""A drawn head that no training saw: number 1,000,500 of `perf/evaluate`."""


def babble(seconds: float) -> NDArray[np.float32]:
    """Voiced syllables with pauses: enough like speech to move a mouth, and the same on every machine."""
    generator = np.random.default_rng(4)
    t = np.arange(round(seconds * 16_000)) / 16_000
    buzz = sum(np.sin(2 * np.pi * k * (120 * t + 2 * np.sin(2 * np.pi * 0.6 * t))) / k for k in range(1, 25))
    beats = generator.random(round(seconds * 5) + 2) * (generator.random(round(seconds * 5) + 2) > 0.2)
    return leveled((buzz * np.interp(t * 5, np.arange(len(beats)), beats)).astype(np.float32))


def stream(num_ranks: int, num_chunks: int) -> list[Packet]:
    engine = Engine(presets.portrait())
    config = engine.config
    schedule = plan(num_steps=config.num_steps, num_ranks=num_ranks, refresh_chunk=config.refresh_chunk)
    stages = [engine.stage(role, seed=2) for role in schedule.roles]
    head = engine.intake(read_image(PERSON, config.height, config.width), "A person talks.", seed=2)
    nods = engine.encode_prompt("A person is nodding.")

    def packets() -> Iterator[Packet]:
        heard = chunks([torch.from_numpy(babble(num_chunks * config.chunk_s))], engine.audio_encoder(),
                       frames_per_chunk=config.video_frames_per_chunk, fps=config.fps)  # fmt: skip
        for sound in itertools.islice(heard, num_chunks):
            if head.next_chunk == 7:
                head.switch_prompt(nods)
            yield head.packet(sound)

    return list(run_local(schedule, stages, packets(), deadline_s=120))


def test_trained_streams_are_equal_on_one_to_five_ranks() -> None:
    alone = stream(1, 12)
    assert alone[3].frames_THWC is not None
    assert float(alone[3].frames_THWC.float().std()) > 20, "a face, not a grey wall"
    for num_ranks in (2, 3, 4, 5):
        for one, other in zip(alone, stream(num_ranks, 12), strict=True):
            assert torch.equal(one.latent_BCTHW, other.latent_BCTHW)
            assert one.frames_THWC is not None
            assert other.frames_THWC is not None
            assert torch.equal(one.frames_THWC, other.frames_THWC)


def facts_of(variant: str, seconds: float) -> dict[str, Any]:
    """A long run of the drawn head, in this variant."""
    torch.set_num_threads(1)
    engine = Model("portrait").engine(adaptive_sink=variant != "no-adaptive")
    photo_HWC = read_image(PERSON, engine.config.height, engine.config.width)
    run = long_run(engine, variant, photo_HWC=photo_HWC, loop_S=babble(60.0), opening_T=np.zeros(1500, np.float32),
                   probe=load_probe(), seconds=seconds)  # fmt: skip
    return summary(run, {})


@pytest.mark.timeout(1800)
def test_a_thousand_seconds_stay_the_same_person() -> None:
    facts = facts_of("full", 1000.0)
    assert facts["chunks"] == 2084
    assert beyond(facts) == []
    # Seen: 23 MiB here and 59 over 10,000 s, an eighth of what so steep a leak would take: an allocator that settles.
    assert facts["resident_growth_mib"] < 48
    for name in ("colour", "identity"):
        assert facts[f"{name}_slope_holds_0"], (name, facts)
    # Seen: 0.001 per 1000 s while a stream settles; 0.15 with a clean history, which dissolves the face.
    assert abs(facts["latent_shift_slope"]) < 0.02, facts


@pytest.mark.parametrize("variant", ["no-sink", "clean-history"])
@pytest.mark.timeout(900)
def test_a_variant_that_loses_the_person_breaks_the_levels(variant: str) -> None:
    """Its slopes may hold 0, as they do without a sink: it is another person from the first seconds on."""
    broken = beyond(facts_of(variant, 120.0))
    assert any(level.startswith("identity_mean") for level in broken), broken


@pytest.mark.parametrize("variant", ["absolute", "no-adaptive"])
@pytest.mark.timeout(900)
def test_a_variant_that_keeps_the_person_keeps_the_levels(variant: str) -> None:
    assert beyond(facts_of(variant, 120.0)) == []
