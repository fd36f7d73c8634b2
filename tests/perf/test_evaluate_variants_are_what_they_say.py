"""The variants of long runs change what their names say, and nothing else."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from evaluate.drift import long_run, summary
from evaluate.film import film
from evaluate.model import Model
from evaluate.variants import VARIANTS, denoiser, standing_still

from streamdiff import presets
from streamdiff.engine import Engine, Weights
from streamdiff.errors import ConfigError
from streamdiff.models.audio import chunks
from streamdiff.pipeline.denoise import DenoiseStage
from streamdiff.pipeline.packet import Packet
from streamdiff.pipeline.run import run_local
from streamdiff.pipeline.schedule import plan
from streamdiff.rope import sink_position
from streamdiff.training.probe import Probe


def small_engine(*, adaptive_sink: bool = True) -> Engine:
    """The preset with one layer less to do: random weights, two steps."""
    config = presets.portrait()
    assert config.dit.audio is not None
    dit = dataclasses.replace(
        config.dit, dim=48, ffn_dim=64, num_heads=2, num_layers=2,
        audio=dataclasses.replace(config.dit.audio, inject_layers=(0,)),
    )  # fmt: skip
    vae = dataclasses.replace(config.vae, base_dim=8)
    memory = dataclasses.replace(config.memory, adaptive_sink=adaptive_sink)
    config = dataclasses.replace(config, name="small", dit=dit, vae=vae, memory=memory, sigmas=(1.0, 0.6, 0.0))
    return Engine(config, weights=Weights(seed=3))


def sound(seconds: float) -> torch.Tensor:
    return 0.05 * torch.randn(round(seconds * 16_000), generator=torch.Generator().manual_seed(0))


PHOTO = torch.randint(0, 256, (128, 128, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
NUM_CHUNKS = 9


def packets(engine: Engine) -> Iterator[Packet]:
    head = engine.intake(PHOTO, "a person talks", seed=5)
    heard = chunks([sound(5.0)], engine.audio_encoder(), frames_per_chunk=12, fps=25)
    return head.packets(itertools.islice(heard, NUM_CHUNKS))


def run(engine: Engine, stage: DenoiseStage, source: Iterator[Packet]) -> list[torch.Tensor]:
    schedule = plan(num_steps=2, num_ranks=1, refresh_chunk=engine.config.refresh_chunk)
    return [p.latent_BCTHW for p in run_local(schedule, [stage], source)]


@pytest.fixture(scope="module")
def full() -> list[torch.Tensor]:
    engine = small_engine()
    return run(engine, denoiser(engine, "full", seed=5), packets(engine))


def first_difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> int:
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if not torch.equal(x, y))


@pytest.mark.heavy
def test_full_is_what_is_served(full: list[torch.Tensor]) -> None:
    engine = small_engine()
    stage = engine.stage(plan(num_steps=2, num_ranks=1).roles[0], seed=5)
    schedule = plan(num_steps=2, num_ranks=1, refresh_chunk=engine.config.refresh_chunk)
    served = [p.latent_BCTHW for p in run_local(schedule, [stage], packets(engine))]
    assert all(torch.equal(a, b) for a, b in zip(served, full, strict=True))


@pytest.mark.heavy
def test_no_sink_forgets_the_sink_once_the_window_is_full(full: list[torch.Tensor]) -> None:
    engine = small_engine()
    stage = denoiser(engine, "no-sink", seed=5)

    def source() -> Iterator[Packet]:
        for packet in packets(engine):
            if packet.chunk == 5:
                # Whoever still looked at the sink would see that it is not a number.
                with torch.inference_mode():
                    stage.sink.moving_keys_ZBSNK.fill_(float("nan"))
                    stage.sink.values_ZBSNK.fill_(float("nan"))
            yield packet

    poisoned = run(engine, stage, source())
    assert first_difference(poisoned, full) == engine.config.memory.window_chunks
    assert all(latent.isfinite().all() for latent in poisoned)
    memory = stage.memories[0]
    assert memory.sink_tokens == 0
    assert memory.length_on_host == 4 * engine.config.chunk_tokens


@pytest.mark.heavy
def test_absolute_keeps_the_sink_where_it_was(full: list[torch.Tensor]) -> None:
    engine = small_engine()
    config = engine.config
    moved = [standing_still(packet, config) for packet in packets(engine)]
    for packet in moved:
        first = packet.chunk * config.frames_per_chunk
        assert sink_position(first, lead=packet.lead, origin=config.memory.sink_position) == config.memory.sink_position
    latents = run(engine, denoiser(engine, "absolute", seed=5), iter(moved))
    assert 0 <= first_difference(latents, full) < NUM_CHUNKS


@pytest.mark.heavy
def test_clean_history_remembers_finished_chunks(full: list[torch.Tensor]) -> None:
    engine = small_engine()
    stage = denoiser(engine, "clean-history", seed=5)
    latents = run(engine, stage, packets(engine))
    assert first_difference(latents, full) == 1, "chunk 0 has no history"
    one, other = stage.memories
    assert torch.equal(one.keys_ZBMNK[:, :, one.sink_tokens :], other.keys_ZBMNK[:, :, other.sink_tokens :])
    assert torch.equal(one.values_ZBMNK[:, :, one.sink_tokens :], other.values_ZBMNK[:, :, other.sink_tokens :])
    # Layer 0's values of the last chunk: projected from its finished latent, by the model as it is written.
    dit = engine.dit()
    with torch.inference_mode():
        tokens_BLD = dit.patch_embedding(latents[-1]).flatten(2).transpose(1, 2)
        bias_D = dit.trainable_cond_mask.weight[0] + dit.cond_encoder.bias
        modulation = dit.modulation(0.0).layers_Z6D[0]
        x = tokens_BLD + bias_D
        normed = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=dit.config.eps)
        expected = dit.blocks.at(0).self_attn.value(normed * (1 + modulation[1]) + modulation[0])
    start = one.sink_tokens + (NUM_CHUNKS - 1) % 4 * one.chunk_tokens
    kept = one.values_ZBMNK[0][:, start : start + one.chunk_tokens]
    assert torch.allclose(kept, expected, atol=1e-5)


@pytest.mark.heavy
def test_no_adaptive_is_full_until_the_sink_would_change(full: list[torch.Tensor]) -> None:
    engine = small_engine(adaptive_sink=False)
    latents = run(engine, denoiser(engine, "no-adaptive", seed=5), packets(engine))
    assert first_difference(latents, full) == small_engine().config.refresh_chunk


@pytest.mark.heavy
def test_films_follow_their_prompts() -> None:
    engine = small_engine()
    samples = sound(3.0).numpy()
    plain = film(engine, PHOTO, samples)
    told = film(engine, PHOTO, samples, prompts={3: "a person nods"})
    assert plain.frames_THWC.shape == (75, 128, 128, 3)
    assert np.array_equal(plain.frames_THWC[:36], told.frames_THWC[:36])
    assert not torch.equal(plain.latents_nCTHW[3], told.latents_nCTHW[3])


@pytest.mark.heavy
def test_a_long_run_says_how_it_went() -> None:
    engine = small_engine()
    probe = Probe().eval().requires_grad_(False)
    loop = sound(2.4).numpy()
    noted: list[float] = []
    run = long_run(engine, "full", photo_HWC=PHOTO, loop_S=loop, opening_T=np.sin(np.arange(60.0)), probe=probe,
                   seconds=24.0, note=lambda run, _: noted.append(len(run.means)))  # fmt: skip
    assert noted == [50]
    facts = summary(run, {"identity": 1e9}, settled_s=0.0)
    assert facts["seconds"] == pytest.approx(24.0)
    assert facts["latent_shift_slope_low"] <= facts["latent_shift_slope"] <= facts["latent_shift_slope_high"]
    assert facts["identity_crossing_s"] is None
    assert len(run.looks) == 2
    assert len(run.segments) == 1
    assert set(run.shown) == {1.0, 10.0}


def test_models_are_read_from_one_word() -> None:
    model = Model.parse("few=/tmp/few,sigmas=1/0.75,renoise")
    assert model.sigmas == (1.0, 0.75, 0.0)
    assert model.renoise is True
    assert Model.parse("shipped=").folder is None
    for wrong in ("few=/tmp,steps=x", "=/tmp", "few=/tmp,fast"):
        with pytest.raises(ConfigError):
            Model.parse(wrong)
    assert VARIANTS[0] == "full"
