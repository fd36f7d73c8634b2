"""What a real rank does with the eventful stream; importable by the processes that tests start."""

from __future__ import annotations

import numpy as np
import torch

from streamdiff.engine import Engine
from streamdiff.pipeline.group import Group, World
from streamdiff.pipeline.packet import Packet
from streamdiff.pipeline.run import run_rank
from streamdiff.pipeline.schedule import Schedule
from streamdiff.pipeline.watch import Limits
from tests.engine.stream_case import eventful_packets, small_config

Result = list[tuple[int, int, np.ndarray, np.ndarray]]
"""Chunk, epoch, latent and frames; arrays, because a tensor would travel as a handle to a process that has ended."""


def make_stream(world: World, partition: tuple[int, ...], decode_alone: bool) -> Result | None:
    """This rank's part of the stream; the last rank returns what came out of it."""
    torch.set_num_threads(1)
    engine = Engine(small_config(sum(partition)))
    schedule = Schedule(partition=partition, decode_alone=decode_alone, refresh_chunk=engine.config.refresh_chunk)
    role = schedule.roles[world.rank]
    made: Result = []

    def keep(packet: Packet) -> None:
        assert packet.frames_THWC is not None
        made.append((packet.chunk, packet.epoch, packet.latent_BCTHW.numpy(), packet.frames_THWC.numpy()))

    with Group(world, schedule, limits=Limits(deadline_s=60, startup_s=120)) as group:
        stage = engine.stage(role, seed=7)
        source = eventful_packets(engine) if role.encodes else None
        run_rank(stage, group.link(source=source, deliver=keep if role.decodes else None))
    return made if role.decodes else None
