"""Ranks as threads of one process, all on one GPU, each with graphs of its own: the bits of one rank."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from streamdiff.pipeline.packet import Packet
from streamdiff.pipeline.run import run_local
from streamdiff.pipeline.schedule import Schedule, plan

pytest.importorskip("PIL", reason="the engine reads pictures")
pytest.importorskip("av", reason="the engine writes video")

from streamdiff.engine import Engine
from tests.engine.stream_case import eventful_packets, same, small_config

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)


@pytest.mark.heavy
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_pipelined_equals_serial(device: str) -> None:
    """A prompt switch, a sink refresh and a rewind included."""

    def run(schedule: Schedule) -> list[Packet]:
        engine = Engine(small_config(4), device=device)
        stages = [engine.stage(role, seed=7) for role in schedule.roles]
        found = run_local(schedule, stages, eventful_packets(engine), deadline_s=120)
        return [dataclasses.replace(packet, latent_BCTHW=packet.latent_BCTHW.cpu()) for packet in found]

    refresh = small_config(4).refresh_chunk
    one = plan(num_steps=4, num_ranks=1, refresh_chunk=refresh)
    five = plan(num_steps=4, num_ranks=5, refresh_chunk=refresh)
    assert same(run(five), run(one))
