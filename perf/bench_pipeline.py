"""What the transport costs: time of one hop, chunks per second with nothing to do, and the period against prediction.

    python perf/bench_pipeline.py                     5 ranks on this machine
    python perf/bench_pipeline.py --ranks 2 --payload-kib 1200

With as many GPUs as ranks the latents travel over NCCL, with fewer they share GPUs and travel over gloo through pinned
memory, with none they stay in host memory. Every rank is a process; clocks are the machine's monotonic one.

    hop     a packet at a time through an idle line: from the sender handing it over to the receiver holding it
    rush    no work, the line as full as it gets: seconds per chunk
    work    every rank busy for --work-ms: period and first chunk against `simulate` with the hop just measured

Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import socket
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from measure import machine_card

from streamdiff.pipeline.group import Group, World
from streamdiff.pipeline.packet import Packet
from streamdiff.pipeline.run import run_rank
from streamdiff.pipeline.schedule import Costs, Schedule, plan
from streamdiff.pipeline.simulate import Hop, simulate
from streamdiff.pipeline.transport import Payload
from streamdiff.pipeline.watch import Limits
from streamdiff.trace import Recorder


@dataclass(frozen=True)
class Plan:
    """What every rank is told."""

    schedule: Schedule
    devices: tuple[str, ...]
    payload: Payload
    payload_bytes: int
    num_chunks: int
    work_s: float
    pace_s: float
    """Rest of the source before every chunk."""


class Work:
    """Takes ``seconds``: a nap on a CPU, matrix products enqueued without waiting on a GPU."""

    def __init__(self, seconds: float, device: torch.device) -> None:
        self.seconds, self.device = seconds, device
        self.products = 0
        if seconds and device.type == "cuda":
            self.a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
            stream = torch.cuda.current_stream(device)
            for repeats in (10, 50):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record(stream)
                for _ in range(repeats):
                    torch.mm(self.a, self.a)
                end.record(stream)
                end.synchronize()
                self.products = max(1, round(seconds * 1e3 / (start.elapsed_time(end) / repeats)))

    def step(self, packet: Packet) -> Packet:
        if self.device.type == "cpu":
            time.sleep(self.seconds)
            return packet
        for _ in range(self.products):
            torch.mm(self.a, self.a)
        return replace(packet, latent_BCTHW=packet.latent_BCTHW + 1)


def source(told: Plan, device: torch.device) -> Iterator[Packet]:
    latent = torch.zeros(1, 16, 3, 1, told.payload_bytes // 96, dtype=torch.bfloat16, device=device)
    for chunk in range(told.num_chunks):
        time.sleep(told.pace_s)
        yield Packet(chunk=chunk, epoch=0, lead=4, latent_BCTHW=latent)


def measure_rank(world: World, told: Plan, results: Any) -> None:
    torch.set_num_threads(1)
    device = torch.device(told.devices[world.rank])
    recorder = Recorder()
    delivered: list[float] = []

    def deliver(packet: Packet) -> None:
        if packet.latent_BCTHW.is_cuda:
            torch.cuda.current_stream(device).synchronize()
        delivered.append(time.monotonic())

    limits = Limits(deadline_s=60, startup_s=300)
    with Group(world, told.schedule, limits=limits, device=device, payload=told.payload) as group:
        work = Work(told.work_s, device)
        run_rank(work, group.link(source=source(told, device), deliver=deliver), recorder)
    spans = [(span.name, span.start_s, span.end_s) for span in recorder.spans]
    results.put((world.rank, spans, delivered))
    results.close()
    results.join_thread()


def run(told: Plan, timeout_s: float) -> tuple[list[list[tuple[str, float, float]]], list[float]]:
    """Spans of every rank, and when the tail delivered each chunk."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    num_ranks = told.schedule.num_ranks
    processes = [
        context.Process(
            target=measure_rank, args=(World(rank=rank, size=num_ranks, port=port), told, results), daemon=True
        )
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    said: dict[int, tuple[list[tuple[str, float, float]], list[float]]] = {}
    end_s = time.monotonic() + timeout_s
    try:
        while len(said) < num_ranks:
            try:
                rank, spans, delivered = results.get(timeout=0.5)
                said[rank] = spans, delivered
            except queue.Empty:
                failed = [p.exitcode for p in processes if p.exitcode not in (None, 0)]
                if failed or time.monotonic() > end_s:
                    raise SystemExit(f"error: the ranks did not finish (exit codes {failed}); see above") from None
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
    return [said[rank][0] for rank in range(num_ranks)], said[num_ranks - 1][1]


def hop_times_s(spans: list[list[tuple[str, float, float]]]) -> list[float]:
    """From one rank's send to the next one's recv, chunk by chunk, the first few (connections, caches) left out."""
    times: list[float] = []
    for sender, receiver in pairwise(spans):
        sent = [start for name, start, _ in sender if name == "send"]
        received = [end for name, _, end in receiver if name == "wait"]
        times += [after - before for before, after in zip(sent, received, strict=False)][5:]
    return times


def percentiles_ms(times_s: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(times_s, n=100)
    return {name: round(1e3 * cuts[index], 3) for name, index in (("p50", 49), ("p95", 94), ("p99", 98))}


def card(on_gpu: bool) -> dict[str, Any]:
    """The machine behind the numbers, and how busy others keep it."""
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if on_gpu else []
    where = torch.device("cuda" if on_gpu else "cpu")
    return {**machine_card(where), "gpus": names, "cpus": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=5)
    parser.add_argument("--payload-kib", type=float, default=396.0, help="a 704x384 chunk in bfloat16: 396")
    parser.add_argument("--chunks", type=int, default=60)
    parser.add_argument("--work-ms", type=float, default=50.0)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--payload", choices=["auto", "gloo", "nccl"], default="auto")
    parser.add_argument("--timeout-s", type=float, default=240.0)
    args = parser.parse_args()
    num_gpus = torch.cuda.device_count()
    on_gpu = args.device == "cuda" or (args.device == "auto" and num_gpus > 0)
    payload = args.payload if args.payload != "auto" else "nccl" if on_gpu and num_gpus >= args.ranks else "gloo"
    num_steps = max(1, args.ranks - 1)
    told = Plan(
        schedule=plan(num_steps=num_steps, num_ranks=args.ranks),
        devices=tuple(f"cuda:{rank % num_gpus}" if on_gpu else "cpu" for rank in range(args.ranks)),
        payload=payload,
        payload_bytes=round(args.payload_kib * 1024),
        num_chunks=args.chunks,
        work_s=0.0,
        pace_s=0.02,
    )
    spans, _ = run(told, args.timeout_s)
    hop = percentiles_ms(hop_times_s(spans))
    _, delivered_s = run(replace(told, pace_s=0.0, num_chunks=5 * args.chunks), args.timeout_s)
    rush_s = (delivered_s[-1] - delivered_s[len(delivered_s) // 2]) / (len(delivered_s) - 1 - len(delivered_s) // 2)
    work_s = args.work_ms / 1e3
    spans, delivered_s = run(replace(told, pace_s=0.0, work_s=work_s), args.timeout_s)
    predicted = simulate(
        told.schedule,
        Costs(step_s=(work_s,) * num_steps, decode_s=work_s),
        num_chunks=args.chunks,
        hop=Hop(latency_s=hop["p50"] / 1e3),
    )
    half = len(delivered_s) // 2
    period_s = statistics.median(later - sooner for sooner, later in pairwise(delivered_s[half:]))
    first_s = delivered_s[0] - spans[0][0][1]
    row = {
        "hop_ms": hop,
        "rush_ms_per_chunk": round(1e3 * rush_s, 3),
        "period_ms": round(1e3 * period_s, 2),
        "predicted_period_ms": round(1e3 * predicted.period_s, 2),
        "period_error": round(predicted.period_s / period_s - 1, 4),
        "first_chunk_ms": round(1e3 * first_s, 1),
        "predicted_first_chunk_ms": round(1e3 * predicted.first_frame_s, 1),
        "first_chunk_error": round(predicted.first_frame_s / first_s - 1, 4),
    }
    where = f"{payload}, {'GPU' if on_gpu else 'host'} memory"
    print(f"{args.ranks} ranks, {args.payload_kib:g} KiB a chunk, {where}")
    print(f"hop      p50 {hop['p50']:.2f} ms   p95 {hop['p95']:.2f} ms   p99 {hop['p99']:.2f} ms")
    print(f"rush     {row['rush_ms_per_chunk']:.2f} ms a chunk")
    print(
        f"work     period {row['period_ms']:.1f} ms, predicted {row['predicted_period_ms']:.1f} "
        f"({row['period_error']:+.1%}); first chunk {row['first_chunk_ms']:.0f} ms, predicted "
        f"{row['predicted_first_chunk_ms']:.0f} ({row['first_chunk_error']:+.1%})"
    )
    print(
        json.dumps(
            {
                "bench": "pipeline",
                "card": card(on_gpu),
                "ranks": args.ranks,
                "payload": payload,
                "device": "cuda" if on_gpu else "cpu",
                "payload_kib": args.payload_kib,
                "work_ms": args.work_ms,
                **row,
            }
        )
    )


if __name__ == "__main__":
    main()
