"""A rollout is the stream that the engine would serve, and its gradients are those of the whole graph."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from streamdiff import flow, presets, rng
from streamdiff.config import AudioInjectionConfig, DiTConfig, EngineConfig, MemoryConfig
from streamdiff.models.dit import CausalDiT, initialise
from streamdiff.pipeline.denoise import DenoiseStage
from streamdiff.pipeline.packet import Packet, SetReference, SwitchPrompt
from streamdiff.rope import rotate, sink_position
from streamdiff.training.distil import (
    ClipModel,
    Cut,
    accumulate,
    clip_velocity,
    conditions,
    critic_loss,
    remake,
    roll_out,
)
from streamdiff.training.sequence import Layout, recomputed, sparse, windowed

SEED, NUM_CHUNKS = 5, 6
LEADS = (5, 9, 4, 7, 6, 8)


def config_of(*, renoise: bool = False, frames_per_chunk: int = 2, window_chunks: int = 3) -> EngineConfig:
    return dataclasses.replace(
        presets.tiny(),
        dit=DiTConfig(
            dim=64,
            ffn_dim=96,
            num_heads=2,
            num_layers=3,
            text_dim=24,
            text_len=9,
            freq_dim=32,
            audio=AudioInjectionConfig(feature_dim=16, num_features=2, num_tokens=3, inject_layers=(0, 2)),
        ),
        # The sink begins to roll within the clip.
        memory=MemoryConfig(window_chunks=window_chunks, sink_lead_max=10, sink_position=12, adaptive_sink=False),
        sigmas=(1.0, 0.85, 0.5, 0.15, 0.0),
        height=64,
        width=64,
        frames_per_chunk=frames_per_chunk,
        renoise=renoise,
        motion_latents=0,
    )


class Case:
    """A model, a reference, a prompt and sound."""

    def __init__(self, config: EngineConfig, dtype: torch.dtype = torch.float32, num_chunks: int = NUM_CHUNKS) -> None:
        self.config = config
        self.dit = CausalDiT(config.dit)
        initialise(self.dit, seed=3)
        self.dit.to(dtype)
        assert config.dit.audio is not None
        audio, T = config.dit.audio, config.frames_per_chunk
        self.reference = rng.normal((1, 16, 1, *config.latent_hw), "reference").to(dtype)
        self.text = rng.normal((1, 5, config.dit.text_dim), "text").to(dtype)
        self.audio = rng.normal((1, audio.num_features, audio.feature_dim, 4 * T * num_chunks), "audio").to(dtype)
        self.layout = windowed(num_chunks, window_chunks=config.memory.window_chunks, frames_per_chunk=T)
        positions = [
            sink_position(first, lead=lead, origin=config.memory.sink_position)
            for first, lead in zip(self.layout.first_frames, LEADS, strict=False)
        ]
        self.lead_Bn = torch.tensor([[p - f for p, f in zip(positions, self.layout.first_frames, strict=True)]])
        self.shape = (1, 16, T, *config.latent_hw)
        self.dtype = dtype

    def noise(self, chunk: int, step: int) -> Tensor:
        """As the head of the pipeline and the re-noising sampler draw it."""
        if step == 0:
            return flow.initial_noise(self.shape, seed=SEED, stream=0, chunk=chunk).to(self.dtype)
        return flow.step_noise(self.shape, seed=SEED, stream=0, chunk=chunk, step=step - 1).to(self.dtype)

    def model(self, layout: Layout | None = None) -> ClipModel:
        layout = self.layout if layout is None else layout
        given = conditions(self.dit, self.reference, self.text, self.audio, layout)
        return ClipModel(self.dit, given, layout, self.lead_Bn)

    def serve(self, num_steps: int) -> tuple[list[Tensor], DenoiseStage]:
        """What the engine's own stage makes of the same noise with its first ``num_steps`` steps."""
        # A served model lays its weights out anew, for inference only.
        stage = DenoiseStage(copy.deepcopy(self.dit), self.config, range(num_steps), seed=SEED)
        chunks = []
        audio = self.audio.chunk(NUM_CHUNKS, dim=3)
        first = (SetReference(self.reference, None), SwitchPrompt(self.text))
        for chunk in range(NUM_CHUNKS):
            packet = Packet(
                chunk=chunk,
                epoch=0,
                lead=LEADS[chunk],
                latent_BCTHW=self.noise(chunk, 0),
                audio_BZEA=audio[chunk],
                commands=first if chunk == 0 else (),
            )
            chunks.append(stage.step(packet).latent_BCTHW.clone())
        return chunks, stage


@pytest.mark.parametrize("renoise", [False, True], ids=["euler", "renoise"])
def test_a_rollout_is_the_stream_that_is_served(renoise: bool) -> None:
    case = Case(config_of(renoise=renoise))
    served, stage = case.serve(4)
    rollout = roll_out(
        case.model(),
        case.noise,
        sigmas=case.config.sigmas,
        visible=case.layout.visible,
        exit_step=3,
        renoise=renoise,
    )
    expected = torch.cat(served, dim=2)
    assert expected.std() > 0.3
    torch.testing.assert_close(rollout.data_BCTHW, expected, atol=1e-5, rtol=0)

    # What the last step keeps: the same keys, turned to where they stand, and the same values, in the engine's slots.
    memory = stage.memories[-1]
    own = case.dit.frame_rotation
    for chunk in (3, 4, 5):
        first = case.layout.first_frames[chunk]
        rows = memory._rows(chunk % case.config.memory.window_chunks)
        rotation = own(range(first, first + case.config.frames_per_chunk), case.config.latent_hw)
        for layer in range(case.config.dit.num_layers):
            kept = rollout.kept[chunk]
            turned = rotate(kept.keys[layer], rotation)
            torch.testing.assert_close(turned, memory.keys_ZBMNK[layer][:, rows], atol=1e-5, rtol=0)
            torch.testing.assert_close(kept.values[layer], memory.values_ZBMNK[layer][:, rows], atol=1e-5, rtol=0)


@pytest.mark.parametrize("exit_step", [0, 1, 2])
@pytest.mark.parametrize("renoise", [False, True], ids=["euler", "renoise"])
def test_an_early_exit_enters_where_the_engine_would_be(renoise: bool, exit_step: int) -> None:
    case = Case(config_of(renoise=renoise))
    rollout = roll_out(
        case.model(),
        case.noise,
        sigmas=case.config.sigmas,
        visible=case.layout.visible,
        exit_step=exit_step,
        renoise=renoise,
    )
    served = case.serve(exit_step)[0] if exit_step else [case.noise(chunk, 0) for chunk in range(NUM_CHUNKS)]
    for entered, expected in zip(rollout.entered, served, strict=True):
        torch.testing.assert_close(entered, expected, atol=1e-5, rtol=0)


def _gradients(dit: CausalDiT) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in dit.named_parameters() if p.grad is not None}


LAYOUTS: dict[str, Callable[[int, int], Layout]] = {
    "window": lambda n, T: windowed(n, window_chunks=3, frames_per_chunk=T),
    "sparse": lambda n, T: sparse(n, frames_per_chunk=T),
}


@pytest.mark.parametrize(
    ("dtype", "layout_name", "frames_per_chunk", "renoise"),
    [
        (torch.float64, "window", 2, True),
        (torch.float32, "window", 2, False),
        (torch.float64, "sparse", 1, False),
        (torch.float32, "sparse", 3, True),
    ],
)
def test_chunk_by_chunk_equals_the_whole_graph(
    dtype: torch.dtype, layout_name: str, frames_per_chunk: int, renoise: bool
) -> None:
    """The model's own float32 parts (norms, modulation) set the tolerance: 1e-6 of the largest gradient."""
    n = 4
    case = Case(config_of(renoise=renoise, frames_per_chunk=frames_per_chunk), dtype, num_chunks=n)
    layout = LAYOUTS[layout_name](n, frames_per_chunk)
    common = {"sigmas": case.config.sigmas, "visible": layout.visible, "exit_step": 1, "renoise": renoise}
    rollout = roll_out(case.model(layout), case.noise, **common)
    target = rng.normal(tuple(rollout.data_BCTHW.shape), "target").to(rollout.data_BCTHW)
    step = (rollout.data_BCTHW - target) / (rollout.data_BCTHW - target).abs().mean()

    # Naive: prompt, sound and sink in the graph, every chunk's graph alive, the loss on the whole clip.
    model = case.model(layout)
    whole = torch.cat([remake(model, rollout, chunk) for chunk in range(n)], dim=2)
    torch.testing.assert_close(whole.detach(), rollout.data_BCTHW, atol=0, rtol=0)
    (0.5 * F.mse_loss(whole, (whole - step).detach())).backward()
    expected = _gradients(case.dit)
    case.dit.zero_grad()

    cut = Cut(conditions(case.dit, case.reference, case.text, case.audio, layout))
    accumulate(ClipModel(case.dit, cut.tree, layout, case.lead_Bn), rollout, step / step.numel())
    cut.go_on()
    got = _gradients(case.dit)

    assert got.keys() == expected.keys()
    # Prompt, sound and reference are reached through the cut.
    for through in ("text_embedding.0.weight", "casual_audio_encoder.encoder.conv1_local.conv.weight"):
        assert expected[through].abs().max() > 0
    size = max(g.abs().max() for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-6 * size.item(), rtol=1e-5, msg=name)


def test_layers_may_be_computed_again_instead_of_kept() -> None:
    case = Case(config_of(), num_chunks=3)
    layout = case.layout
    noise = rng.normal((1, 16, 6, *case.config.latent_hw), "clip")
    gradients = []
    for visit in (None, recomputed):
        case.dit.zero_grad()
        extra = {} if visit is None else {"visit": visit}
        given = conditions(case.dit, case.reference, case.text, case.audio, layout, **extra)
        velocity = clip_velocity(case.dit, given, layout, case.lead_Bn, **extra)
        critic_loss(velocity, 0.5 * noise, noise, torch.tensor([0.4])).backward()
        gradients.append(_gradients(case.dit))
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], atol=1e-7, rtol=1e-5)
