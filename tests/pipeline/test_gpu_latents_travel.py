"""Latents in GPU memory reach the next rank whole, however busy the GPU is when they are handed over.

Needs GPUs. Over NCCL every rank needs its own (``multigpu``, two or more); over gloo and pinned memory ranks
may share one (``gpu``). The NCCL path was written on a machine without GPUs: this file is what shows that it
works.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from streamdiff.errors import BackendError
from streamdiff.pipeline.group import Group, World
from streamdiff.pipeline.packet import RefreshSink
from streamdiff.pipeline.schedule import Schedule
from streamdiff.pipeline.transport import EdgeEnd
from tests.pipeline.line import MODULUS, gpu_packets, gpu_stream
from tests.pipeline.ranks import run_ranks, values

NUM_CHUNKS = 40
SCHEDULE = Schedule(partition=(1,), decode_alone=True, refresh_chunk=3)


def expected(schedule: Schedule) -> Iterator[tuple[int, np.ndarray]]:
    """The same arithmetic in one loop on the CPU."""
    returned = torch.zeros(())
    for packet in gpu_packets(schedule, NUM_CHUNKS):
        latent = packet.latent_BCTHW
        for rank in range(schedule.num_ranks):
            latent = (latent * 31 + packet.chunk) % MODULUS
            if any(isinstance(command, RefreshSink) for command in packet.commands):
                latent = latent + returned
            if rank == schedule.last_dit_rank and packet.chunk == schedule.source_chunk:
                returned = latent[:, :, :1].sum()
        yield packet.chunk, latent.numpy()


def assert_travels(schedule: Schedule, payload: str) -> None:
    outcomes = run_ranks(gpu_stream, schedule.num_ranks, schedule, payload, NUM_CHUNKS, timeout_s=180)
    delivered = values(outcomes)[-1]
    assert len(delivered) == NUM_CHUNKS
    for (chunk, latent, sound), (due, right) in zip(delivered, expected(schedule), strict=True):
        assert chunk == due
        assert np.array_equal(latent, right)
        assert np.array_equal(sound, np.arange(64.0, dtype=np.float32) + chunk)


@pytest.mark.multigpu
def test_over_nccl() -> None:
    size = min(torch.cuda.device_count(), 5)
    if size < 2:
        pytest.skip("needs two GPUs")
    assert_travels(replace(SCHEDULE, partition=(1,) * (size - 1)), "nccl")


@pytest.mark.gpu
def test_over_gloo_on_shared_gpus() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    assert_travels(replace(SCHEDULE, partition=(1, 1)), "gloo")


@pytest.mark.gpu
def test_nccl_alone_says_when_it_is_done() -> None:
    """The work object of this torch, asked as `EdgeEnd` asks it: a sum over one rank."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    device = torch.device("cuda", 0)
    group = dist.ProcessGroupNCCL(dist.HashStore(), 0, 1, dist.ProcessGroupNCCL.Options())
    end = object.__new__(EdgeEnd)
    end._check = lambda: None
    value_S = torch.full((4,), 7, dtype=torch.int32, device=device)
    end._finish_transfer(group.allreduce([value_S]))
    assert value_S.tolist() == [7] * 4


@pytest.mark.gpu
def test_over_nccl_between_two_ranks_of_one_gpu() -> None:
    """NCCL may refuse two ranks on one device; then the test says what it said."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    schedule = replace(SCHEDULE, partition=(1,))
    outcomes = run_ranks(gpu_stream, schedule.num_ranks, schedule, "nccl", NUM_CHUNKS, 1, timeout_s=120)
    refusal = next((o.error for o in outcomes if "uplicate GPU" in o.error or "invalid usage" in o.error), None)
    if refusal is not None:
        pytest.skip(f"NCCL takes one rank per GPU: {refusal}")
    assert len(values(outcomes)[-1]) == NUM_CHUNKS


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without GPUs is told")
def test_nccl_without_a_gpu_is_refused_in_one_line() -> None:
    with pytest.raises(BackendError, match="use payload='gloo'"):
        Group(World(rank=0, size=2), SCHEDULE, payload="nccl")
