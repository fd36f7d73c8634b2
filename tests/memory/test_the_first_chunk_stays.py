"""A memory that keeps the first chunk serves what sparse attention is trained with, for as long as a stream lasts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from streamdiff import config as configs
from streamdiff import presets
from streamdiff.config import EngineConfig, MemoryConfig
from streamdiff.errors import ConfigError
from streamdiff.models import cost
from streamdiff.models.dit import CausalDiT, initialise
from streamdiff.models.served.options import Precision, StepOptions
from streamdiff.pipeline.denoise import DenoiseStage
from streamdiff.pipeline.packet import Command, Packet, Rewind, SetReference, SwitchPrompt
from streamdiff.rope import FrameRotations, first_shift, grid_rotation, rotate, sink_position
from streamdiff.training import sequence
from streamdiff.training.sequence import Remembered, chunk_velocity, sparse

CHUNKS, T, STEP = 7, 2, 1


def tiny(*, reach: int = 18) -> EngineConfig:
    config = presets.tiny()
    assert config.dit.audio is not None
    audio = dataclasses.replace(config.dit.audio, inject_layers=(0,))
    return dataclasses.replace(
        config,
        dit=dataclasses.replace(config.dit, num_layers=3, audio=audio),
        memory=MemoryConfig(
            window_chunks=3, keeps_first=True, first_reach=reach, slack_chunks=2,
            sink_lead_min=3, sink_lead_max=3, sink_position=3,
        ),
        frames_per_chunk=T,
        height=64,
        width=64,
        motion_latents=0,
    )  # fmt: skip


class Stream:
    """One denoising step over random chunks."""

    def __init__(self, config: EngineConfig, options: StepOptions | None = None) -> None:
        self.config = config
        self.dit = CausalDiT(config.dit)
        initialise(self.dit, seed=3)
        generator = torch.Generator().manual_seed(4)
        audio = config.dit.audio
        assert audio is not None
        C, (H, W), A = config.dit.in_dim, config.latent_hw, config.video_frames_per_chunk
        self.latents = torch.randn(CHUNKS, 1, C, T, H, W, generator=generator)
        self.reference = torch.randn(1, C, 1, H, W, generator=generator)
        self.sounds = torch.randn(CHUNKS, 1, audio.num_features, audio.feature_dim, A, generator=generator)
        self.text = torch.randn(1, 5, config.dit.text_dim, generator=generator)
        self.seen: list[Tensor] = []
        self.stage = DenoiseStage(
            self.dit, config, [STEP], options=options, on_velocity=lambda _, v: self.seen.append(v.clone())
        )

    def served(self, order: tuple[int, ...] = tuple(range(CHUNKS))) -> list[Tensor]:
        """Velocities of the engine; an order that goes back rewinds."""
        self.seen.clear()
        latest = -1
        for chunk in order:
            commands: tuple[Command, ...] = ()
            if latest < 0:
                commands = (SetReference(self.reference, None), SwitchPrompt(self.text))
            elif chunk <= latest:
                commands = (Rewind(chunk),)
            self.stage.step(
                Packet(chunk=chunk, epoch=0, lead=3, latent_BCTHW=self.latents[chunk],
                       audio_BZEA=self.sounds[chunk], commands=commands)
            )  # fmt: skip
            latest = chunk
        return list(self.seen)

    def learned(self) -> list[Tensor]:
        """The same from the differentiable chunk, the first one moved along by hand."""
        text = self.dit.text_condition(self.text)
        sink = sequence.remember_sink(self.dit, self.reference, text, position=0)
        layout, kept, found = sparse(CHUNKS, frames_per_chunk=T), list[Remembered](), list[Tensor]()
        for chunk in range(CHUNKS):
            first_frame = chunk * T
            places = {c: c * T for c in layout.visible[chunk]}
            places[0] = first_shift(first_frame, reach=self.config.memory.first_reach)
            velocity, remembered = chunk_velocity(
                self.dit,
                self.latents[chunk],
                torch.tensor([self.config.sigmas[STEP]]),
                text,
                sequence.hear(self.dit, self.sounds[chunk], 1),
                first_frame=first_frame,
                history=[(places[c], kept[c]) for c in layout.visible[chunk] if c != chunk],
                sink=sink,
                lead_B=torch.tensor([sink_position(first_frame, lead=3, origin=3) - first_frame]),
            )
            found.append(velocity)
            kept.append(remembered)
        return found


@pytest.mark.parametrize("reach", [18, 4, 0])
@torch.no_grad()
def test_sparse_attention_is_served_as_it_is_trained(reach: int) -> None:
    stream = Stream(tiny(reach=reach))
    expected = stream.learned()
    for found, wanted in zip(stream.served(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


@torch.no_grad()
def test_where_the_first_chunk_stands_is_seen() -> None:
    near, far = (Stream(tiny(reach=reach)).served() for reach in (2, 18))
    assert all(torch.equal(a, b) for a, b in zip(near[:2], far[:2], strict=True))
    assert (near[-1] - far[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("history", list(Precision))
def test_chunks_taken_back_come_out_the_same(history: Precision) -> None:
    options = StepOptions(history=history)
    straight = Stream(tiny(reach=4), options).served()
    order = (0, 1, 0, 1, 2, 3, 4, 5, 4, 5, 3, 4, 5, 6)
    again = Stream(tiny(reach=4), options).served(order)
    for chunk, found in zip(order, again, strict=True):
        assert torch.equal(found, straight[chunk])


def test_eight_bits_keep_it_as_well() -> None:
    wide = Stream(tiny(reach=4)).served()
    narrow = Stream(tiny(reach=4), StepOptions(history=Precision.FP8)).served()
    for found, wanted in zip(narrow, wide, strict=True):
        assert (found - wanted).norm() / wanted.norm() < 0.05


def test_a_shift_moves_what_is_turned_already() -> None:
    pairs = (4, 2, 2)
    rotations = FrameRotations(3, 2, pairs, device="cpu")
    keys_BLNK = torch.randn(1, 12, 2, 16, generator=torch.Generator().manual_seed(0))
    at_once = rotate(keys_BLNK, grid_rotation([70_000, 70_001], range(3), range(2), pairs))
    in_two = rotate(rotate(keys_BLNK, rotations.at(0, 2)), rotations.shift(70_000, 2))
    torch.testing.assert_close(in_two, at_once, rtol=0, atol=2e-6)


def test_its_memory_is_counted() -> None:
    config = tiny()
    bytes_of = cost.rank_bytes(config, num_steps=1, bytes_per_value=4)
    assert Stream(config).stage.memories[0].num_bytes == bytes_of.history


def test_sparse_is_a_window_of_three_with_the_first_in_it() -> None:
    memory = configs.sparse(presets.portrait()).memory
    assert (memory.window_chunks, memory.keeps_first) == (3, True)
    with pytest.raises(ConfigError, match="at least two"):
        MemoryConfig(window_chunks=1, keeps_first=True)
