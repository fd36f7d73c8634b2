"""The GPU code paths, played on a CPU against `RecordingDevice`: no race, no wait, no nameless call, no early free.

Everything runs on cuda:1 while threads begin on cuda:0, as on every rank after the first. Bugs that were found by
reading are put back here one by one, and must be found by running.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import streamdiff_kernels as kernels
from streamdiff import presets
from streamdiff.config import VAEConfig
from streamdiff.models import vae
from streamdiff.models.served import graphs
from streamdiff.models.served.decoder import ServedDecoder
from streamdiff.models.served.options import StepOptions
from streamdiff.models.vae import VAEDecoder
from streamdiff.pipeline import decode, denoise, group, transport
from streamdiff.pipeline.decode import DecodeStage
from streamdiff.pipeline.denoise import DenoiseStage
from streamdiff.pipeline.device import use_device
from streamdiff.pipeline.link import LineLink, Returned
from streamdiff.pipeline.packet import Packet, RefreshSink, ReturnLatent, SetReference, SwitchPrompt
from streamdiff.pipeline.schedule import Edge
from streamdiff.pipeline.transport import EdgeEnd, Inbox, Outbox
from streamdiff.pipeline.watch import Limits
from streamdiff_kernels import Impl, choose
from tests.gpu.recording_device import RecordingDevice
from tests.models.step_case import Case, config_of

HERE = torch.device("cuda", 1)
"""Where all of it computes; current in a new thread is cuda:0."""
NUM_CHUNKS = 6
SMALL = dataclasses.replace(
    presets.tiny(), vae=VAEConfig(base_dim=4, num_res_blocks=1), height=64, width=64, motion_latents=0
)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingDevice]:
    with torch.inference_mode(), RecordingDevice(monkeypatch) as device:
        yield device


def fine() -> None:
    """The stream stands."""


def packets(case: Case) -> list[Packet]:
    latents, voices = case.latents(NUM_CHUNKS), case.voices(NUM_CHUNKS)
    start = (SetReference(case.reference, case.motion), SwitchPrompt(case.text_BPC))
    other = (SwitchPrompt(case.randn(1, 4, case.config.dit.text_dim)),)
    commands = {0: start, 3: other}
    return [
        Packet(chunk=c, epoch=0, lead=5, latent_BCTHW=latents[c], audio_BZEA=voices[c], commands=commands.get(c, ()))
        for c in range(NUM_CHUNKS)
    ]


def denoise_on(gpu: RecordingDevice, *, graph: bool) -> list[Tensor]:
    case = Case(config_of())
    made = packets(case)
    options = StepOptions(impl=Impl.TORCH, attention="sdpa", graph=graph)
    stage = DenoiseStage(case.dit.to(HERE), case.config, (1, 2), options=options)
    stage.warm()
    latents: list[Tensor] = []
    for packet in made:
        with contextlib.nullcontext() if packet.commands else gpu.step():
            latents.append(stage.step(packet).latent_BCTHW)
    return [latent.cpu() for latent in latents]


@pytest.mark.heavy
@pytest.mark.parametrize("graph", [False, True])
def test_a_denoising_stage_is_clean_and_computes_what_a_cpu_does(gpu: RecordingDevice, graph: bool) -> None:
    """Round the ring and through a prompt switch; graphs are captured, and replayed from what they recorded."""
    case = Case(config_of())
    stage = DenoiseStage(case.dit, case.config, (1, 2))
    expected = [stage.step(packet).latent_BCTHW for packet in packets(case)]
    found = denoise_on(gpu, graph=graph)
    assert gpu.findings == []
    assert gpu.touched == {HERE}
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def decode_on(gpu: RecordingDevice) -> list[Tensor | None]:
    decoder = VAEDecoder(SMALL.vae)
    vae.initialise(decoder, seed=0)
    served = ServedDecoder(decoder.to(HERE).eval().requires_grad_(False), impl=Impl.TORCH)
    stage = DecodeStage(served, SMALL)
    stage.warm()
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(1, 16, 1, *SMALL.latent_hw, generator=generator)
    frames: list[Tensor | None] = []
    for chunk in range(3):
        latent = torch.randn(1, 16, 3, *SMALL.latent_hw, generator=generator).pin_memory().to(HERE, non_blocking=True)
        commands = (SetReference(reference, None),) if chunk == 0 else ()
        packet = Packet(chunk=chunk, epoch=0, lead=4, latent_BCTHW=latent, commands=commands)
        frames.append(stage.step(packet).frames_THWC)
        del latent, packet
        gpu.sweep()
    return frames


@pytest.mark.slow
def test_a_decoding_stage_is_clean_and_its_frames_are_pinned(gpu: RecordingDevice) -> None:
    frames = decode_on(gpu)
    assert gpu.findings == []
    assert gpu.touched == {HERE}
    for frames_THWC in frames:
        assert frames_THWC is not None
        assert frames_THWC.is_pinned()
        assert frames_THWC.device.type == "cpu"
        frames_THWC.clone()  # the host reads it, and is told when it may not yet
    assert gpu.findings == []


class Sent:
    """A transfer of a library that computes on the current stream: over when the stream has come to it."""

    def __init__(self, gpu: RecordingDevice, event: Any) -> None:
        self._gpu, self._event = gpu, event

    def is_completed(self) -> bool:
        return self._event is None or self._event.query()

    def is_success(self) -> bool:
        raise NotImplementedError("WorkNCCL::isSuccess() is deprecated")

    def wait(self) -> bool:
        return True


def library(gpu: RecordingDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo and NCCL of one process: what one end sends, the other finds."""
    queues: dict[str, list[Tensor]] = {"gloo": [], "nccl": []}

    def made(name: str) -> Callable[..., Any]:
        def event() -> Any:
            return torch.cuda.current_stream(gpu.current).record_event() if name == "nccl" else None

        def send(buffers: list[Tensor], peer: int, tag: int) -> Sent:
            queues[name].append(buffers[0].clone())
            return Sent(gpu, event())

        def recv(buffers: list[Tensor], peer: int, tag: int) -> Sent:
            buffers[0].copy_(queues[name].pop(0))
            return Sent(gpu, event())

        return lambda *arguments: SimpleNamespace(send=send, recv=recv)

    nccl = made("nccl")
    nccl.Options = SimpleNamespace  # type: ignore[attr-defined]
    gloo = made("gloo")
    gloo._Options = SimpleNamespace  # type: ignore[attr-defined]
    gloo.create_default_device = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setattr(dist, "ProcessGroupGloo", gloo)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", nccl, raising=False)


def end(*, is_sender: bool, payload: transport.Payload) -> EdgeEnd:
    return EdgeEnd(dist.HashStore(), is_sender=is_sender, device=HERE, payload=payload, limits=Limits(), check=fine)


def send_through(gpu: RecordingDevice, outbox: Outbox, edge_end: EdgeEnd, packet: Packet | None) -> None:
    """The main thread puts, the edge's own thread sends."""
    outbox.put(packet, fine)
    with gpu.thread():
        use_device(HERE)
        edge_end.send(*transport._take(outbox._queue, fine))
        outbox._room.release()


def travel(gpu: RecordingDevice, monkeypatch: pytest.MonkeyPatch, payload: transport.Payload) -> list[Tensor]:
    """Three chunks from one rank to the next, each written on the default stream just before it is handed over."""
    library(gpu, monkeypatch)
    sender, receiver = end(is_sender=True, payload=payload), end(is_sender=False, payload=payload)
    outbox, inbox = Outbox(sender, fine), Inbox(receiver, fine)
    seen: list[Tensor] = []
    with gpu.thread():  # whoever calls has set no device
        for chunk in range(3):
            latent = torch.full((1, 2, 3, 4, 4), float(chunk), device=HERE) * 2
            sound_S = torch.arange(8.0)
            packet = Packet(chunk=chunk, epoch=0, lead=4, latent_BCTHW=latent, sound_S=sound_S)
            send_through(gpu, outbox, sender, packet)
            with gpu.thread():
                use_device(HERE)
                inbox._queue.put(receiver.recv())
            received = inbox.get(fine)
            assert received is not None
            seen.append(received.latent_BCTHW + 1)
            del latent, packet, received
            gpu.sweep()
        return [x.cpu() for x in seen]


@pytest.mark.parametrize("payload", ["gloo", "nccl"])
def test_a_chunk_travels_cleanly(
    gpu: RecordingDevice, monkeypatch: pytest.MonkeyPatch, payload: transport.Payload
) -> None:
    found = travel(gpu, monkeypatch, payload)
    assert gpu.findings == []
    assert [float(x.mean()) for x in found] == [1.0, 3.0, 5.0]


def hear_back(gpu: RecordingDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """A latent comes back to the head and becomes its sink, as `Group` joins the edges."""
    library(gpu, monkeypatch)
    sender, receiver = end(is_sender=True, payload="nccl"), end(is_sender=False, payload="nccl")
    boxes: list[Any] = []
    joined = object.__new__(group.Group)
    joined._world = group.World(rank=0, size=2)
    joined._spawn = lambda box, peer: boxes.append(box)  # type: ignore[method-assign]
    latent = torch.zeros(1, 2, 3, 4, 4)
    source = iter(
        Packet(chunk=chunk, epoch=0, lead=4, latent_BCTHW=latent, commands=(command,))
        for chunk, command in enumerate((ReturnLatent(), RefreshSink(0)))
    )
    edges = [(Edge(1, 0, is_feedback=True), receiver), (Edge(0, 1), sender)]
    link: LineLink = joined._joined(edges, SimpleNamespace(check=fine), source, None)  # type: ignore[arg-type]
    assert link.recv() is not None
    outbox = Outbox(sender, fine)
    made = Packet(chunk=0, epoch=0, lead=4, latent_BCTHW=torch.ones(1, 2, 1, 4, 4, device=HERE) * 3)
    send_through(gpu, outbox, sender, made)
    send_through(gpu, outbox, sender, None)
    with gpu.thread():
        use_device(HERE)
        boxes[0].run()
    packet = link.recv()
    assert packet is not None
    (command,) = packet.commands
    assert isinstance(command, RefreshSink)
    assert command.latent_BCTHW is not None
    sink = command.latent_BCTHW * 2
    boxes.clear()
    del link, packet, command, made, joined, edges
    gpu.sweep()
    assert float(sink.cpu().mean()) == 6.0


def test_a_latent_that_comes_back_is_kept_until_it_is_used(
    gpu: RecordingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    hear_back(gpu, monkeypatch)
    assert gpu.findings == []


def time_backends(gpu: RecordingDevice) -> str:
    q, ring = (torch.zeros(1, rows, 2, 32, device=HERE) for rows in (4, 12))
    del gpu
    return kernels.resolve_backend("auto", q, ring, ring)


def test_backends_are_timed_on_their_own_device(gpu: RecordingDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    only_one(monkeypatch)
    assert time_backends(gpu) == "sdpa"
    assert gpu.findings == []
    assert gpu.touched == {HERE}


def only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "available_backends", lambda **where: {"sdpa": None})


def old_put(outbox: Outbox, packet: Packet | None, check: Callable[[], None]) -> None:
    """Records on the stream of whichever device is current."""
    ready = []
    if packet is not None:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(torch.device("cuda", torch.cuda.current_device())))
        ready = [event]
    transport._acquire(outbox._room, check)
    outbox._queue.put((packet, ready))


@pytest.mark.parametrize("payload", ["gloo", "nccl"])
def test_a_latent_that_leaves_before_it_is_written_is_found(
    gpu: RecordingDevice, monkeypatch: pytest.MonkeyPatch, payload: transport.Payload
) -> None:
    monkeypatch.setattr(Outbox, "put", old_put)
    travel(gpu, monkeypatch, payload)
    assert any(
        f.startswith("race") and f.endswith("does not wait for the default stream of cuda:1") for f in gpu.findings
    )
    assert torch.device("cuda", 0) in gpu.touched, "and a context on GPU 0 that nobody wanted"


def test_a_sink_that_is_freed_while_it_is_read_is_found(gpu: RecordingDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "Returned", lambda check, taken=None: Returned(check))
    hear_back(gpu, monkeypatch)
    assert any("record_stream is missing" in finding for finding in gpu.findings)


def test_a_chunk_that_is_freed_while_it_is_read_is_found(gpu: RecordingDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "mark_used", lambda packet: None)
    travel(gpu, monkeypatch, "nccl")
    assert any("record_stream is missing" in finding for finding in gpu.findings)


def nameless_ms(call: Callable[[], None], device: torch.device) -> float:
    start, finish = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    finish.record()
    finish.synchronize()
    return start.elapsed_time(finish)


def test_attention_that_is_timed_on_another_device_is_found(
    gpu: RecordingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_one(monkeypatch)
    monkeypatch.setattr(choose, "_cuda_ms", nameless_ms)
    time_backends(gpu)
    assert gpu.findings == ["an event is recorded without a stream, on that of the current device"]
    assert torch.device("cuda", 0) in gpu.touched


@pytest.mark.slow
def test_a_copy_from_memory_that_is_not_pinned_is_found(gpu: RecordingDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denoise, "_on", lambda device, x: x.to(device, non_blocking=True))
    denoise_on(gpu, graph=True)
    assert "the host waits inside a step: a copy between host and device" in gpu.findings


@pytest.mark.slow
def test_frames_that_leave_before_they_are_painted_are_found(
    gpu: RecordingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.gpu import recording_device

    monkeypatch.setattr(recording_device.Stream, "wait_stream", lambda stream, other: None)
    decode_on(gpu)
    assert any(finding.startswith("race: copy_ on stream") for finding in gpu.findings)
    assert decode.PRIMING_LATENTS > 0


@pytest.mark.slow
def test_a_capture_on_the_wrong_device_is_found(gpu: RecordingDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def nothing(device: object) -> Iterator[None]:
        yield

    monkeypatch.setattr(graphs.torch.cuda, "device", nothing)
    denoise_on(gpu, graph=True)
    assert "a capture on cuda:1 begins by waiting for cuda:0, which is current" in gpu.findings


def test_what_a_capture_forbids_is_found(gpu: RecordingDevice) -> None:
    x = torch.zeros(4, device=HERE)

    def waits() -> Tensor:
        torch.cuda.synchronize(HERE)
        return x + float(x.sum().item())

    graphs.CudaGraphs(HERE).capture(waits)
    assert {f"a capture forbids it: {what}" for what in ("synchronize of cuda:1", "item")} <= set(gpu.findings)


def test_a_host_that_reads_a_copy_under_way_is_found(gpu: RecordingDevice) -> None:
    shown = torch.empty(4, pin_memory=True)
    shown.copy_(torch.ones(4, device=HERE), non_blocking=True)
    shown.clone()
    assert gpu.findings == ["race: clone on host does not wait for the default stream of cuda:1"]
