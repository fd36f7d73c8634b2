"""A stream of threads leaves no thread, holds no more than its queues, and shows who failed."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator

import pytest
import torch

from streamdiff.errors import MemoryOrderError, RankFailed, ScheduleError
from streamdiff.pipeline.packet import Packet, RefreshSink, ReturnLatent, Rewind, SetReference
from streamdiff.pipeline.run import run_local
from streamdiff.pipeline.schedule import QUEUE_DEPTH, plan
from streamdiff.trace import Recorder
from tests.pipeline.faults import Trouble, boom, endless_source
from tests.pipeline.line import SHAPE, SleepingStage


def rank_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("rank")]


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert rank_threads() == []


def stages(num_ranks: int, culprit: int = -1, what=boom, chunk: int = 5) -> list:
    return [Trouble(chunk, what) if rank == culprit else SleepingStage(0.001) for rank in range(num_ranks)]


@pytest.mark.parametrize("culprit", range(5))
def test_the_error_of_a_stage_reaches_the_consumer_with_its_cell(culprit: int) -> None:
    with pytest.raises(ValueError, match="boom") as caught:
        list(run_local(plan(num_steps=4, num_ranks=5), stages(5, culprit), endless_source()))
    (note,) = caught.value.__notes__
    assert f"on rank {culprit} at chunk 5" in note
    assert "!5" in note


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_error_of_the_source_reaches_the_consumer(num_ranks: int) -> None:
    def source() -> Iterator[Packet]:
        yield from endless_source(3)
        raise OSError("microphone unplugged")

    with pytest.raises(OSError, match="unplugged"):
        list(run_local(plan(num_steps=2, num_ranks=num_ranks), stages(num_ranks), source()))


@pytest.mark.parametrize("num_ranks", [1, 5])
def test_closing_early_stops_all_and_closes_the_source(num_ranks: int) -> None:
    closed = threading.Event()

    def source() -> Iterator[Packet]:
        try:
            yield from endless_source()
        finally:
            closed.set()

    stream = run_local(plan(num_steps=4, num_ranks=num_ranks), stages(num_ranks), source())
    assert next(stream).chunk == 0
    start_s = time.monotonic()
    stream.close()
    assert time.monotonic() - start_s < 1.0
    assert closed.is_set()


@pytest.mark.heavy
def test_a_consumer_that_pauses_makes_the_line_pause() -> None:
    sent = []

    def source() -> Iterator[Packet]:
        for packet in endless_source():
            sent.append(packet.chunk)
            yield packet

    stream = run_local(plan(num_steps=4, num_ranks=5), stages(5), source())
    next(stream)
    time.sleep(0.4)
    most = 1 + (5 - 1) * QUEUE_DEPTH + 5 + 2  # taken, resting on edges, in hands, waiting for the consumer
    assert len(sent) <= most
    stream.close()


def test_nothing_is_kept_of_chunks_that_have_left() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def source() -> Iterator[Packet]:
        for chunk in range(200):
            latent = torch.ones(SHAPE)
            alive.append(weakref.ref(latent))
            yield Packet(chunk=chunk, epoch=0, lead=4, latent_BCTHW=latent, commands=(ReturnLatent(),))

    most = 0
    for packet in run_local(plan(num_steps=4, num_ranks=5), stages(5), source()):
        del packet
        most = max(most, sum(ref() is not None for ref in alive))
    assert most <= 5 * (QUEUE_DEPTH + 2)


def test_a_stage_that_hangs_is_named() -> None:
    schedule = plan(num_steps=2, num_ranks=3)
    free = threading.Event()
    stream = run_local(schedule, stages(3, 1, free.wait), endless_source(), deadline_s=0.3)
    with pytest.raises(RankFailed, match=r"rank 1 has been working .chunk 5. for more than 0.3 s") as caught:
        list(stream)
    assert caught.value.rank == 1
    assert "!5" in str(caught.value)
    free.set()
    for thread in rank_threads():
        thread.join(5)


def test_threads_inherit_the_mode_of_the_caller() -> None:
    seen: list[tuple[bool, bool]] = []

    class Looking:
        def step(self, packet: Packet) -> Packet:
            seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
            return packet

    with torch.inference_mode():
        list(run_local(plan(num_steps=2, num_ranks=2), [Looking(), Looking()], endless_source(2)))
    with torch.no_grad():
        list(run_local(plan(num_steps=2, num_ranks=2), [Looking(), Looking()], endless_source(2)))
    assert seen == [(False, True)] * 4 + [(False, False)] * 4


def test_spans_speak_of_waiting_stepping_and_sending() -> None:
    recorders = [Recorder() for _ in range(3)]
    list(run_local(plan(num_steps=2, num_ranks=3), stages(3), endless_source(4), observers=recorders))
    for recorder in recorders:
        assert [span.name for span in recorder.spans] == ["wait", "step", "send"] * 4 + ["wait"]
        chunks = [span.labels["chunk"] for span in recorder.spans if span.name == "step"]
        assert chunks == [0, 1, 2, 3]


def packet(chunk: int, epoch: int = 0, *commands: object) -> Packet:
    return Packet(chunk=chunk, epoch=epoch, lead=4, latent_BCTHW=torch.ones(SHAPE), commands=commands)


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        ([packet(0), packet(2)], "chunk 2 of epoch 0 cannot follow chunk 0"),
        ([packet(0), packet(0)], "chunk 0 of epoch 0 cannot follow chunk 0"),
        ([packet(0), packet(1, 1)], "chunk 1 of epoch 1 cannot follow"),
        ([packet(0), packet(1), packet(1, 0, Rewind(1))], "chunk 1 of epoch 0 cannot follow"),
        ([packet(0), packet(1), packet(0, 1, Rewind(1))], "chunk 0 of epoch 1 cannot follow"),
        ([packet(0), packet(5, 1, Rewind(5))], "chunk 5 of epoch 1 cannot follow"),
    ],
)
def test_a_packet_out_of_turn_is_refused(stream: list[Packet], words: str) -> None:
    with pytest.raises(MemoryOrderError, match=words):
        list(run_local(plan(num_steps=1, num_ranks=1), stages(1), iter(stream)))


def test_a_new_reference_starts_a_new_stream_in_the_same_line() -> None:
    again = packet(0, 0, SetReference(torch.ones(1), None))
    out = run_local(plan(num_steps=1, num_ranks=1), stages(1), iter([packet(0), packet(1), again, packet(1)]))
    assert [p.chunk for p in out] == [0, 1, 0, 1]


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize(
    "stream",
    [
        [packet(0), packet(1, 0, RefreshSink(0))],
        [packet(0, 0, ReturnLatent()), packet(0, 1, Rewind(0)), packet(1, 1, RefreshSink(0))],
    ],
    ids=["never marked", "marked in an epoch that was taken back"],
)
def test_a_refresh_that_nobody_returns_is_refused(stream: list[Packet], num_ranks: int) -> None:
    with pytest.raises(ScheduleError, match="put ReturnLatent on that chunk"):
        list(run_local(plan(num_steps=3, num_ranks=num_ranks), stages(num_ranks), iter(stream)))


def test_as_many_stages_as_ranks() -> None:
    with pytest.raises(ScheduleError, match="2 stages do not fit a schedule of 3 ranks"):
        run_local(plan(num_steps=2, num_ranks=3), stages(2), endless_source())
