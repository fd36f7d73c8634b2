"""What is trained is what is served: the differentiable sequence gives the velocities of the engine, chunk by chunk.

The reference is `DenoiseStage`, which writes into ring buffers and rolls the sink; float32 against float32.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from streamdiff import presets
from streamdiff.config import EngineConfig, MemoryConfig
from streamdiff.errors import ConfigError
from streamdiff.models.dit import CausalDiT, initialise
from streamdiff.pipeline.denoise import DenoiseStage
from streamdiff.pipeline.packet import Command, Packet, SetReference, SwitchPrompt
from streamdiff.rope import sink_position
from streamdiff.training import sequence
from streamdiff.training.sequence import Layout, Remembered, chunk_velocity, sequence_velocity, sparse, windowed

CHUNKS, WINDOW, STEP, PROMPT = 6, 3, 1, 5


def tiny(*, num_layers: int = 4) -> EngineConfig:
    config = presets.tiny()
    assert config.dit.audio is not None
    heard = tuple(layer for layer in config.dit.audio.inject_layers if layer < num_layers)
    audio = dataclasses.replace(config.dit.audio, inject_layers=heard)
    return dataclasses.replace(
        config,
        dit=dataclasses.replace(config.dit, num_layers=num_layers, audio=audio),
        # The sink starts to roll within the clip.
        memory=MemoryConfig(window_chunks=WINDOW, sink_lead_min=2, sink_lead_max=7, sink_position=7),
        height=64,
        width=64,
        motion_latents=0,
    )


def random_dit(config: EngineConfig, dtype: torch.dtype = torch.float32) -> CausalDiT:
    dit = CausalDiT(config.dit)
    initialise(dit, seed=3)
    return dit.to(dtype)


@dataclasses.dataclass(frozen=True)
class Clip:
    latent_BCTHW: Tensor
    reference_BCTHW: Tensor
    audio_BZEA: Tensor
    text_BPC: Tensor
    lead_Bn: Tensor

    @staticmethod
    def draw(config: EngineConfig, B: int, dtype: torch.dtype = torch.float32) -> Clip:
        generator = torch.Generator().manual_seed(11)
        audio = config.dit.audio
        assert audio is not None

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=dtype)

        C, (H, W), T = config.dit.in_dim, config.latent_hw, config.frames_per_chunk
        A = CHUNKS * config.video_frames_per_chunk
        return Clip(
            latent_BCTHW=normal(B, C, CHUNKS * T, H, W),
            reference_BCTHW=normal(B, C, 1, H, W),
            audio_BZEA=normal(B, audio.num_features, audio.feature_dim, A),
            text_BPC=normal(B, PROMPT, config.dit.text_dim),
            lead_Bn=torch.randint(2, 8, (B, CHUNKS), generator=generator),
        )


def served_velocity(dit: CausalDiT, config: EngineConfig, clip: Clip) -> Tensor:
    """One denoising step of the engine over the whole clip."""
    seen: list[Tensor] = []
    stage = DenoiseStage(
        copy.deepcopy(dit),
        config,
        [STEP],
        num_streams=len(clip.latent_BCTHW),
        on_velocity=lambda _, velocity: seen.append(velocity.clone()),
    )
    latents = clip.latent_BCTHW.chunk(CHUNKS, dim=2)
    sounds = clip.audio_BZEA.chunk(CHUNKS, dim=3)
    for chunk in range(CHUNKS):
        commands: tuple[Command, ...] = ()
        if chunk == 0:
            commands = (SetReference(clip.reference_BCTHW, None), SwitchPrompt(clip.text_BPC))
        lead = int(clip.lead_Bn[0, chunk])
        stage.step(
            Packet(
                chunk=chunk,
                epoch=0,
                lead=lead,
                latent_BCTHW=latents[chunk],
                audio_BZEA=sounds[chunk],
                commands=commands,
            )
        )
    return torch.cat(seen, dim=2)


def true_leads(config: EngineConfig, lead_n: Tensor) -> Tensor:
    """How far the engine's sink really is: it stands still until a chunk comes within its lead."""
    first = [chunk * config.frames_per_chunk for chunk in range(CHUNKS)]
    origin = config.memory.sink_position
    return torch.tensor(
        [sink_position(f, lead=int(lead), origin=origin) - f for f, lead in zip(first, lead_n, strict=True)]
    )


def learned_velocity(dit: CausalDiT, clip: Clip, layout: Layout, sigma_Bn: Tensor, lead_Bn: Tensor) -> Tensor:
    text = dit.text_condition(clip.text_BPC)
    return sequence_velocity(
        dit,
        clip.latent_BCTHW,
        sigma_Bn,
        text,
        sequence.hear(dit, clip.audio_BZEA, CHUNKS),
        layout,
        sink=sequence.remember_sink(dit, clip.reference_BCTHW, text),
        lead_Bn=lead_Bn,
    )


def rolled_velocity(dit: CausalDiT, clip: Clip, layout: Layout, sigma_Bn: Tensor, lead_Bn: Tensor) -> Tensor:
    """The same clip, chunk after chunk."""
    T = layout.frames_per_chunk
    text = dit.text_condition(clip.text_BPC)
    sink = sequence.remember_sink(dit, clip.reference_BCTHW, text)
    memories: list[Remembered] = []
    velocities: list[Tensor] = []
    for chunk, (latent, sound) in enumerate(
        zip(clip.latent_BCTHW.split(T, dim=2), clip.audio_BZEA.chunk(CHUNKS, dim=3), strict=True)
    ):
        velocity, memory = chunk_velocity(
            dit,
            latent,
            sigma_Bn[:, chunk],
            text,
            sequence.hear(dit, sound, 1),
            first_frame=layout.first_frames[chunk],
            history=[(layout.first_frames[c], memories[c]) for c in layout.visible[chunk] if c != chunk],
            sink=sink,
            lead_B=lead_Bn[:, chunk],
        )
        velocities.append(velocity)
        memories.append(memory)
    return torch.cat(velocities, dim=2)


def test_velocities_are_those_of_the_engine() -> None:
    config = tiny()
    dit = random_dit(config)
    clip = Clip.draw(config, 2)
    lead_n = clip.lead_Bn[0]
    served = served_velocity(dit, config, clip)
    layout = windowed(CHUNKS, window_chunks=WINDOW, frames_per_chunk=config.frames_per_chunk)
    sigma_Bn = torch.full((2, CHUNKS), config.sigmas[STEP])
    learned = learned_velocity(dit, clip, layout, sigma_Bn, true_leads(config, lead_n).expand(2, -1))
    assert served.std() > 0.3
    assert true_leads(config, lead_n).unique().numel() > 2
    torch.testing.assert_close(learned, served, rtol=0, atol=1e-5)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "layout", [windowed(CHUNKS, window_chunks=WINDOW, frames_per_chunk=3), sparse(CHUNKS, frames_per_chunk=3)]
)
def test_chunk_by_chunk_is_the_same_with_the_same_gradients(layout: Layout) -> None:
    config = tiny(num_layers=3)
    dit = random_dit(config, torch.float64)
    clip = Clip.draw(config, 2, torch.float64)
    sigma_Bn = torch.rand(2, CHUNKS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = torch.randn(clip.latent_BCTHW.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients: list[dict[str, Tensor]] = []
    outputs: list[Tensor] = []
    for velocity_of in (learned_velocity, rolled_velocity):
        dit.zero_grad()
        velocity = velocity_of(dit, clip, layout, sigma_Bn, clip.lead_Bn)
        (velocity * weight).sum().backward()
        outputs.append(velocity)
        gradients.append({name: p.grad.clone() for name, p in dit.named_parameters() if p.grad is not None})
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-6)
    assert gradients[0].keys() == gradients[1].keys()
    # The motion prefix and the pose input are absent; everything else learns.
    silent = {name for name, _ in dit.named_parameters()} - gradients[0].keys()
    assert {name.split(".")[0] for name in silent} <= {"frame_packer", "cond_encoder"}
    for name, gradient in gradients[0].items():
        error = (gradient - gradients[1][name]).norm() / gradient.norm().clamp_min(1e-3)
        assert error < 1e-6, f"{name}: {error:.1e}"


def test_a_noise_level_says_what_the_served_model_makes_of_it() -> None:
    dit = random_dit(tiny())
    sigma_Bn = torch.tensor([[1.0, 0.857692], [0.0089286, 0.0]])
    levels = sequence.modulations(dit, sigma_Bn)
    head = levels.head(dit)
    for b, c in ((0, 0), (0, 1), (1, 0), (1, 1)):
        served = dit.modulation(float(sigma_Bn[b, c]))
        for z, block in enumerate(dit.blocks):
            torch.testing.assert_close(levels.layer(block)[:, b, c, 0], served.layers_Z6D[z], rtol=0, atol=2e-6)
        torch.testing.assert_close(head[:, b, c, 0], served.head_2D, rtol=0, atol=2e-6)


def test_a_noise_level_can_be_learned() -> None:
    dit = random_dit(tiny(num_layers=2), torch.float64)
    weights = [dit.time_embedding[0].weight, dit.blocks.at(1).modulation, dit.head.modulation]
    sigma_Bn = torch.tensor([[0.9, 0.1]], dtype=torch.float64)

    def measured(*changed: Tensor) -> tuple[Tensor, Tensor]:
        names = ("time_embedding.0.weight", "blocks.1.modulation", "head.modulation")
        return torch.func.functional_call(
            _Measured(dit), dict(zip((f"dit.{n}" for n in names), changed, strict=True)), (sigma_Bn,)
        )

    assert torch.autograd.gradcheck(measured, [w.detach().clone().requires_grad_() for w in weights], fast_mode=True)


class _Measured(torch.nn.Module):
    def __init__(self, dit: CausalDiT) -> None:
        super().__init__()
        self.dit = dit

    def forward(self, sigma_Bn: Tensor) -> tuple[Tensor, Tensor]:
        levels = sequence.modulations(self.dit, sigma_Bn)
        return levels.layer(self.dit.blocks.at(1)).square(), levels.head(self.dit).square()


def test_a_clip_without_its_sink_is_as_if_there_were_none() -> None:
    config = tiny(num_layers=2)
    dit = random_dit(config)
    clip = Clip.draw(config, 2)
    layout = windowed(CHUNKS, window_chunks=WINDOW, frames_per_chunk=3)
    text = dit.text_condition(clip.text_BPC)
    audio = sequence.hear(dit, clip.audio_BZEA, CHUNKS)
    sigma_Bn = torch.full((2, CHUNKS), 0.5)
    sink = sequence.remember_sink(dit, clip.reference_BCTHW, text)
    sees_sink_B = torch.tensor([True, False])
    whole = sequence_velocity(dit, clip.latent_BCTHW, sigma_Bn, text, audio, layout, sink=sink, lead_Bn=clip.lead_Bn)
    without = sequence_velocity(dit, clip.latent_BCTHW, sigma_Bn, text, audio, layout)
    mixed = sequence_velocity(
        dit,
        clip.latent_BCTHW,
        sigma_Bn,
        text,
        audio,
        layout,
        sink=sink,
        lead_Bn=clip.lead_Bn,
        sees_sink_B=sees_sink_B,
    )
    assert (whole - without).abs().amax(dim=(1, 2, 3, 4)).min() > 1e-2
    torch.testing.assert_close(mixed[0], whole[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[1], without[1], rtol=0, atol=1e-5)
    first, _ = chunk_velocity(
        dit,
        clip.latent_BCTHW[:, :, :3],
        sigma_Bn[:, 0],
        text,
        sequence.hear(dit, clip.audio_BZEA[..., : config.video_frames_per_chunk], 1),
        first_frame=0,
        sink=sink,
        lead_B=clip.lead_Bn[:, 0],
        sees_sink_B=sees_sink_B,
    )
    torch.testing.assert_close(first, mixed[:, :, :3], rtol=0, atol=1e-5)


def test_a_chunk_is_blind_to_what_its_layout_does_not_name() -> None:
    config = tiny(num_layers=1)
    dit = random_dit(config)
    clip = Clip.draw(config, 1)
    layout = sparse(CHUNKS, frames_per_chunk=3)
    sigma_Bn = torch.full((1, CHUNKS), 0.5)
    before = learned_velocity(dit, clip, layout, sigma_Bn, clip.lead_Bn)
    for changed in range(CHUNKS):
        latent = clip.latent_BCTHW.clone()
        latent[:, :, 3 * changed : 3 * changed + 3] += 1.0
        after = learned_velocity(dit, dataclasses.replace(clip, latent_BCTHW=latent), layout, sigma_Bn, clip.lead_Bn)
        moved = [
            c for c in range(CHUNKS) if not torch.equal(after[:, :, 3 * c : 3 * c + 3], before[:, :, 3 * c : 3 * c + 3])
        ]
        assert moved == [c for c in range(CHUNKS) if changed in layout.visible[c]]


def test_only_distances_count() -> None:
    config = tiny(num_layers=2)
    dit = random_dit(config)
    clip = Clip.draw(config, 1)
    sigma_Bn = torch.full((1, CHUNKS), 0.5)
    here, far = (
        learned_velocity(
            dit,
            clip,
            windowed(CHUNKS, window_chunks=WINDOW, frames_per_chunk=3, first_frame=first),
            sigma_Bn,
            clip.lead_Bn,
        )
        for first in (0, 540_000)
    )
    torch.testing.assert_close(here, far, rtol=0, atol=1e-5)


def test_recomputing_changes_no_gradient() -> None:
    config = tiny(num_layers=2)
    dit = random_dit(config)
    clip = Clip.draw(config, 1)
    layout = windowed(CHUNKS, window_chunks=WINDOW, frames_per_chunk=3)
    gradients: list[list[Tensor]] = []
    for visit in (sequence.directly, sequence.recomputed):
        dit.zero_grad()
        text = dit.text_condition(clip.text_BPC)
        sink = sequence.remember_sink(dit, clip.reference_BCTHW, text, visit=visit)
        velocity = sequence_velocity(
            dit,
            clip.latent_BCTHW,
            torch.full((1, CHUNKS), 0.5),
            text,
            sequence.hear(dit, clip.audio_BZEA, CHUNKS),
            layout,
            sink=sink,
            lead_Bn=clip.lead_Bn,
            visit=visit,
        )
        velocity.square().mean().backward()
        gradients.append([p.grad.clone() for p in dit.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_what_does_not_fit_is_said() -> None:
    config = tiny(num_layers=1)
    dit = random_dit(config)
    clip = Clip.draw(config, 1)
    layout = windowed(CHUNKS - 1, window_chunks=WINDOW, frames_per_chunk=3)
    with pytest.raises(ConfigError, match=r"it takes 15 frames and \(1, 5\)"):
        learned_velocity(dit, clip, layout, torch.zeros(1, CHUNKS), clip.lead_Bn)
    layout = windowed(CHUNKS, window_chunks=WINDOW, frames_per_chunk=3)
    with pytest.raises(ConfigError, match="a sink needs its lead before every chunk"):
        learned_velocity(dit, clip, layout, torch.zeros(1, CHUNKS), clip.lead_Bn[:, :2])
    with pytest.raises(ConfigError, match="give whole chunks"):
        sequence.hear(dit, clip.audio_BZEA[..., :-1], CHUNKS)
    with pytest.raises(ConfigError, match="it sees itself"):
        Layout(visible=((0,), (0,)), first_frames=(0, 3), frames_per_chunk=3)
    with pytest.raises(ConfigError, match="where it stands"):
        Layout(visible=((0,),), first_frames=(0, 3), frames_per_chunk=3)
