"""A stream for tests: stages that do integer arithmetic, and sources that send every kind of command on the
way.

The arithmetic is exact and order matters at every place: a chunk depends on those before it at the same step,
on the sink, on the prompt and on the epoch, so a packet out of turn, lost or doubled changes every number
after it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from streamdiff.pipeline.group import Group, World
from streamdiff.pipeline.packet import (
    Command,
    Packet,
    RefreshSink,
    ReturnLatent,
    Rewind,
    SetReference,
    SwitchPrompt,
)
from streamdiff.pipeline.run import run_rank
from streamdiff.pipeline.schedule import Costs, Role, Schedule, rank_costs_us
from streamdiff.pipeline.transport import Payload
from streamdiff.pipeline.watch import Limits

MODULUS = 1_000_003
SHAPE = (1, 2, 3, 4, 4)


@dataclass
class Memory:
    """What one step remembers of its stream, by chunk, so that a rewind can take it back."""

    sink: dict[int, Tensor] = field(default_factory=dict)
    prompt: dict[int, Tensor] = field(default_factory=dict)
    history: dict[int, Tensor] = field(default_factory=dict)

    def obey(self, packet: Packet) -> None:
        for command in packet.commands:
            match command:
                case SetReference(reference_BCTHW=reference):
                    self.__init__()
                    self.sink[packet.chunk] = reference
                case SwitchPrompt(text_BPC=text):
                    self.prompt[packet.chunk] = text
                case RefreshSink(latent_BCTHW=latent):
                    assert latent is not None
                    self.sink[packet.chunk] = latent
                case Rewind(chunk=chunk):
                    for kept in (self.sink, self.prompt, self.history):
                        for index in [index for index in kept if index >= chunk]:
                            del kept[index]
                case ReturnLatent():
                    pass


class CountingStep:
    """One denoising step in integers modulo a prime."""

    def __init__(self, step: int) -> None:
        self.step_index = step
        self.memory = Memory()

    def step(self, packet: Packet) -> Packet:
        memory = self.memory
        # A refreshed sink counts from its own chunk on, so obey before the work, as a model would.
        memory.obey(packet)
        latent = packet.latent_BCTHW
        latent = latent * (31 + self.step_index) + packet.chunk + 7 * packet.epoch + packet.lead
        for kept in (memory.sink, memory.prompt):
            if kept:
                latent = latent + kept[max(kept)].sum() * (self.step_index + 1)
        if packet.chunk - 1 in memory.history:
            latent = latent * 5 + memory.history[packet.chunk - 1]
        if packet.audio_BZEA is not None:
            latent = latent + packet.audio_BZEA.sum().long()
        latent = latent % MODULUS
        memory.history[packet.chunk] = latent
        memory.history.pop(packet.chunk - 16, None)
        return replace(packet, latent_BCTHW=latent)


class PaintingDecode:
    """Turns a latent into bytes, and remembers the chunk before."""

    def __init__(self) -> None:
        self.before = torch.zeros(SHAPE, dtype=torch.int64)

    def step(self, packet: Packet) -> Packet:
        mixed = packet.latent_BCTHW + 3 * self.before
        self.before = packet.latent_BCTHW
        frames_THWC = (mixed[0].permute(1, 2, 3, 0) % 256).to(torch.uint8)
        return replace(packet, frames_THWC=frames_THWC)


class Chain:
    """Several stages as one."""

    def __init__(self, *stages: CountingStep | PaintingDecode | SleepingStage) -> None:
        self.stages = stages

    def step(self, packet: Packet) -> Packet:
        for stage in self.stages:
            packet = stage.step(packet)
        return packet


class SleepingStage:
    """Takes a given time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def step(self, packet: Packet) -> Packet:
        time.sleep(self.seconds)
        return packet


def counting_stage(role: Role) -> Chain:
    steps = [CountingStep(step) for step in role.steps]
    return Chain(*steps, PaintingDecode()) if role.decodes else Chain(*steps)


def noise(chunk: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * epoch + chunk)
    return torch.randint(0, MODULUS, SHAPE, generator=generator)


def eventful_source(
    num_chunks: int, *, refresh_chunk: int | None = None, rewind: tuple[int, int] | None = None
) -> Iterator[Packet]:
    """``num_chunks`` packets with a prompt switch, a sink refresh and a rewind on the way.

    ``rewind=(after, to)``: once chunk ``after`` has been sent, chunk ``to`` is made anew in a new epoch.
    """
    chunk = epoch = 0
    for _ in range(num_chunks):
        commands: list[Command] = []
        rewinds = rewind is not None and epoch == 0 and chunk == rewind[0] + 1
        if rewinds:
            assert rewind is not None
            chunk, epoch = rewind[1], epoch + 1
            commands.append(Rewind(chunk))
        if chunk == 0:
            reference = torch.full((1, 2, 1, 4, 4), 11 + epoch)
            commands += [SetReference(reference, motion_BCTHW=None), SwitchPrompt(torch.tensor([[[5]]]))]
            if refresh_chunk is not None:
                commands.append(ReturnLatent())
        if chunk == refresh_chunk:
            commands.append(RefreshSink(source_chunk=0))
        if chunk == 3:
            commands.append(SwitchPrompt(torch.tensor([[[9 + epoch]]])))
        yield Packet(
            chunk=chunk,
            epoch=epoch,
            lead=4 + chunk % 3,
            latent_BCTHW=noise(chunk, epoch),
            audio_BZEA=torch.full((1, 2, 2, 3), float(chunk)).bfloat16() if chunk % 2 else None,
            sound_S=torch.arange(10, dtype=torch.float32) + chunk,
            commands=tuple(commands),
        )
        chunk += 1


def serial(schedule: Schedule, source: Iterator[Packet]) -> Iterator[Packet]:
    """The plain loop that every schedule must equal: one chunk after the other, one step after the other.

    Knows nothing of links; it hands the returned latent over by itself.
    """
    stages = [counting_stage(role) for role in schedule.roles]
    returned: dict[int, Tensor] = {}
    for packet in source:
        commands = tuple(
            replace(command, latent_BCTHW=returned[command.source_chunk])
            if isinstance(command, RefreshSink)
            else command
            for command in packet.commands
        )
        packet = replace(packet, commands=commands)
        for stage in stages:
            packet = stage.step(packet)
        if any(isinstance(command, ReturnLatent) for command in packet.commands):
            returned[packet.chunk] = packet.latent_BCTHW[:, :, :1]
        yield packet


def summary(packet: Packet) -> tuple[int, int, Tensor, Tensor]:
    assert packet.frames_THWC is not None
    return packet.chunk, packet.epoch, packet.latent_BCTHW, packet.frames_THWC


def assert_equal_streams(left: list[tuple[object, ...]], right: list[tuple[object, ...]]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one[:2] == other[:2]
        for x, y in zip(one[2:], other[2:], strict=True):
            assert isinstance(x, Tensor)
            assert isinstance(y, Tensor)
            assert torch.equal(x, y), f"chunk {one[0]} of epoch {one[1]} differs"


def timed_stream(
    world: World, schedule: Schedule, costs: Costs, num_chunks: int, port: int
) -> tuple[float, list[float]]:
    """Ranks that sleep for as long as their work costs; when the head asked first, when the tail delivered."""
    work_s = rank_costs_us(schedule, replace(costs, encode_s=0.0))[world.rank] / 1e6
    asked: list[float] = []
    delivered: list[float] = []

    def source() -> Iterator[Packet]:
        asked.append(time.monotonic())
        latent = torch.zeros(1, 16, 3, 48, 88, dtype=torch.bfloat16)
        for chunk in range(num_chunks):
            time.sleep(costs.encode_s)
            commands: list[Command] = []
            if chunk == schedule.source_chunk:
                commands.append(ReturnLatent())
            if chunk == schedule.refresh_chunk:
                commands.append(RefreshSink(schedule.source_chunk))
            yield Packet(chunk=chunk, epoch=0, lead=4, latent_BCTHW=latent, commands=tuple(commands))

    world = replace(world, port=port)
    with Group(world, schedule, limits=Limits(deadline_s=20)) as group:
        link = group.link(source=source(), deliver=lambda packet: delivered.append(time.monotonic()))
        run_rank(SleepingStage(work_s), link)
    return (asked[0] if asked else 0.0), delivered


class LateCounting:
    """Integer arithmetic on a GPU, behind work that keeps it busy: a hand-over that does not wait reads old values."""

    def __init__(self, device: torch.device) -> None:
        self.a = torch.randn(2048, 2048, device=device)

    def step(self, packet: Packet) -> Packet:
        for _ in range(20):
            self.a = torch.mm(self.a, self.a).clamp(-1, 1)
        latent = (packet.latent_BCTHW * 31 + packet.chunk) % MODULUS
        for command in packet.commands:
            if isinstance(command, RefreshSink):
                assert command.latent_BCTHW is not None
                latent = latent + command.latent_BCTHW.sum()
        return replace(packet, latent_BCTHW=latent)


def gpu_stream(
    world: World, schedule: Schedule, payload: Payload, num_chunks: int, num_gpus: int | None = None
) -> list[Any]:
    """Latents in GPU memory through every rank; chunk, latent and the untouched rest, as the tail has them."""
    device = torch.device("cuda", world.rank % (num_gpus or torch.cuda.device_count()))
    delivered: list[Any] = []

    def source() -> Iterator[Packet]:
        for packet in gpu_packets(schedule, num_chunks):
            yield replace(packet, latent_BCTHW=packet.latent_BCTHW.to(device))

    def deliver(packet: Packet) -> None:
        assert packet.sound_S is not None
        assert packet.sound_S.device.type == "cpu"
        delivered.append((packet.chunk, packet.latent_BCTHW.cpu().numpy(), packet.sound_S.numpy()))

    with Group(world, schedule, limits=Limits(deadline_s=60), device=device, payload=payload) as group:
        run_rank(LateCounting(device), group.link(source=source(), deliver=deliver))
    return delivered


def gpu_packets(schedule: Schedule, num_chunks: int) -> Iterator[Packet]:
    for chunk in range(num_chunks):
        commands: tuple[Command, ...] = ()
        if chunk == schedule.source_chunk:
            commands = (ReturnLatent(),)
        elif chunk == schedule.refresh_chunk:
            commands = (RefreshSink(schedule.source_chunk),)
        latent = noise(chunk, 0).repeat(1, 1, 1, 64, 64)
        sound_S = torch.arange(64.0) + chunk
        yield Packet(chunk=chunk, epoch=0, lead=4, latent_BCTHW=latent, sound_S=sound_S, commands=commands)
