"""A line of ranks that many streams share: preset portrait, alone and together, bit for bit the same.

    python perf/bench_line.py                       8 streams on 5 ranks in processes of their own, calm and with losses
    python perf/bench_line.py --streams 4 --ranks 2 --chunks 12
    python perf/bench_line.py --threads --ranks 2   the same ranks as threads: what sharing costs in CPU time

Streams join one after the other, switch prompts and are interrupted, and every third one leaves in the middle. Once
nobody disturbs them; once every rank in turn is killed (SIGKILL), then stopped (SIGSTOP). ``equal``: what each stream
showed, both times, is what it shows alone, in one process without a line. ``worst_wait_s``: longest that a chunk which
might have entered waited for its turn, undisturbed; ``share_s``: what one chunk of every stream takes on the slowest
rank; ``step_s``: the longest mean step. ``worst_gap_s``: longest in which nothing left the line while a rank was
replaced. ``snapshots``: share of the ranks' work that keeping takes. With ``--threads`` the kinds take turns, so that
load meets all alike, and CPU time is compared, which other programs move less than the clock; the ceiling is a ratio
of 1. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from measure import machine_card, report

from streamdiff import presets, rng
from streamdiff.engine import Engine
from streamdiff.line import Shape, spawn
from streamdiff.models.audio import AudioChunk
from streamdiff.pipeline.intake import Intake
from streamdiff.pipeline.line import Line, Load
from streamdiff.pipeline.packet import Packet, SetReference
from streamdiff.pipeline.process_line import LineLimits, LineMetrics, ProcessLine
from streamdiff.pipeline.run import run_local
from streamdiff.pipeline.schedule import plan

PROMPTS = ("a person is talking", "a person nods", "a person laughs")


@dataclass(frozen=True)
class Bench:
    """Streams that differ in noise, sound, and what happens to them."""

    engine: Engine
    chunks: int

    def packets(self, number: int) -> Iterator[Packet]:
        """One stream: a prompt that switches, and an interruption that takes two chunks back."""
        config, audio = self.engine.config, self.engine.config.dit.audio
        assert audio is not None
        still_BCTHW = rng.normal((1, config.vae.z_dim, 7, *config.latent_hw), "still", number)
        intake = Intake(
            config,
            SetReference(still_BCTHW[:, :, :1], still_BCTHW),
            self.engine.encode_prompt(PROMPTS[0]),
            stream=number,
        )
        shape = (1, audio.num_features, audio.feature_dim, config.video_frames_per_chunk)
        for entry in range(self.chunks):
            if entry == 3 + number % 3:
                intake.switch_prompt(self.engine.encode_prompt(PROMPTS[1 + number % 2]))
            if entry == self.chunks // 2 + number % 3:
                intake.take_back(intake.next_chunk - 2)
            yield intake.packet(AudioChunk(rng.normal(shape, "sound", number, entry), torch.zeros(1)))

    def alone(self, number: int, ranks: int) -> str:
        """A stream on ranks of its own; its digest."""
        config = self.engine.config
        schedule = plan(num_steps=config.num_steps, num_ranks=ranks, refresh_chunk=config.refresh_chunk)
        stages = [self.engine.stage(role, stream=number) for role in schedule.roles]
        packets = run_local(schedule, stages, self.packets(number))
        return digest(itertools.islice(packets, self.stays(number)))

    def stays(self, number: int) -> int:
        """Chunks that a stream shows before it leaves."""
        return self.chunks // 2 + number % 2 if number % 3 == 2 else self.chunks


def digest(packets: Iterator[Packet]) -> str:
    """Of all frames and latents."""
    found = hashlib.sha256()
    for packet in packets:
        assert packet.frames_THWC is not None
        found.update(f"{packet.chunk} {packet.epoch}".encode())
        found.update(packet.latent_BCTHW.numpy().tobytes())
        found.update(packet.frames_THWC.numpy().tobytes())
    return found.hexdigest()


def together(bench: Bench, line: Line, streams: int) -> list[str]:
    """All streams on one line; their digests."""
    with Visits(bench, line, streams) as visits:
        pass
    return visits.digests


class Visits:
    """Streams on a line, each with a reader of its own; what they showed."""

    def __init__(self, bench: Bench, line: Line, streams: int) -> None:
        self._bench, self._line = bench, line
        self.digests = [""] * streams
        self.shown = 0
        self._threads = [threading.Thread(target=self._visit, args=(number,)) for number in range(streams)]

    def __enter__(self) -> Visits:
        for thread in self._threads:
            thread.start()
            time.sleep(0.05)  # they join one after the other
        return self

    def __exit__(self, *exc: object) -> None:
        for thread in self._threads:
            thread.join()

    @property
    def are_over(self) -> bool:
        """Whether all have left."""
        return not any(thread.is_alive() for thread in self._threads)

    def _visit(self, number: int) -> None:
        seat = self._line.join(stream=number, live=False).start(self._bench.packets(number))
        self.digests[number] = digest(self._counted(itertools.islice(iter(seat.get, None), self._bench.stays(number))))
        seat.close()

    def _counted(self, packets: Iterator[Packet]) -> Iterator[Packet]:
        for packet in packets:
            self.shown += 1
            yield packet


def lose_each_rank(line: ProcessLine, visits: Visits, chunks: int) -> None:
    """Kill every rank, then stop every rank, spread over the chunks that are shown."""
    losses = [(number, rank) for number in (signal.SIGKILL, signal.SIGSTOP) for rank in range(len(line.pids))]
    for count, (number, rank) in enumerate(losses):
        while visits.shown < (count + 1) * chunks // (len(losses) + 2) and not visits.are_over:
            time.sleep(0.01)
        healed = line.metrics.healed
        if (pid := line.pids[rank]) is not None:
            os.kill(pid, number)
        while line.metrics.healed == healed and not visits.are_over:
            time.sleep(0.01)


def measure_processes(bench: Bench, streams: int, ranks: int) -> None:
    """Streams on ranks in processes, calm and with losses; print the table and the JSON object."""
    alone = [bench.alone(number, 1) for number in range(streams)]
    total = sum(bench.stays(number) for number in range(streams))
    rows: list[dict[str, object]] = []
    found: dict[str, LineMetrics] = {}
    loads: dict[str, Load] = {}
    equal = True
    for kind in ("calm", "losses"):
        limits = LineLimits(silence_s=1.0 if kind == "losses" else 60.0)
        with spawn(bench.engine, Shape(seats=streams, num_ranks=ranks, slack_chunks=2), limits=limits) as line:
            began_s = time.perf_counter()
            with Visits(bench, line, streams) as visits:
                if kind == "losses":
                    lose_each_rank(line, visits, total)
            took_s = time.perf_counter() - began_s
            found[kind], loads[kind] = line.metrics, line.load
        equal = equal and visits.digests == alone
        kept, step = (sum(getattr(rank, name) for rank in found[kind].ranks) for name in ("keeping_s", "step_s"))
        rows.append(
            {
                "line": kind,
                "clock_ms": round(1e3 * took_s / total, 1),
                "in_real_time": round(total * bench.engine.config.chunk_s / took_s, 1),
                "healed": found[kind].healed,
                "healing_s": round(found[kind].healing_s, 2),
                "worst_gap_s": round(found[kind].worst_gap_s, 2),
                "snapshots": round(kept / step, 3),
            }
        )
    load = loads["calm"]
    report(
        "line",
        f"{streams} streams of {bench.chunks} chunks on {ranks} ranks in processes of their own, per chunk",
        rows,
        machine_card(torch.device("cpu")),
        equal=equal,
        streams=streams,
        ranks=ranks,
        worst_wait_s=round(load.worst_wait_us / 1e6, 3),
        share_s=round(streams * max(load.busy_us) / 1e6, 3),
        step_s=round(max(load.busy_us) / 1e6, 3),
        healed=found["losses"].healed,
        worst_gap_s=round(found["losses"].worst_gap_s, 3),
        snapshots=rows[0]["snapshots"],
        in_real_time=rows[0]["in_real_time"],
    )
    if not equal:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=5)
    parser.add_argument("--chunks", type=int, default=12)
    parser.add_argument("--threads", action="store_true", help="ranks as threads of this process")
    parser.add_argument("--repeats", type=int, default=3, help="with --threads: how often")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = presets.portrait()
    config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, slack_chunks=2))
    bench = Bench(Engine(config), arguments.chunks)
    if arguments.threads:
        measure_threads(bench, arguments.streams, arguments.ranks, arguments.repeats)
    else:
        measure_processes(bench, arguments.streams, arguments.ranks)


def measure_threads(bench: Bench, streams: int, ranks: int, repeats: int) -> None:
    """Measure both kinds in turns; print the table and the JSON object."""
    found: dict[str, list[tuple[float, float]]] = {"alone": [], "together": []}
    with bench.engine.line(seats=streams, num_ranks=ranks, slack_chunks=2) as line:
        digests: dict[str, list[str]] = {}
        kinds: dict[str, Callable[[], list[str]]] = {
            "alone": lambda: [bench.alone(number, ranks) for number in range(streams)],
            "together": lambda: together(bench, line, streams),
        }
        for _ in range(repeats):
            for name, work in kinds.items():
                began_s, cpu_s = time.perf_counter(), time.process_time()
                digests[name] = work()
                found[name].append((time.perf_counter() - began_s, time.process_time() - cpu_s))
        load = line.load
    clock, cpu = ({name: statistics.median(t[i] for t in times) for name, times in found.items()} for i in (0, 1))
    per_chunk = 1e3 / sum(bench.stays(number) for number in range(streams))
    rows = [
        {"streams": name, "clock_ms": round(clock[name] * per_chunk, 1), "cpu_ms": round(cpu[name] * per_chunk, 1)}
        for name in found
    ]
    ratio = cpu["together"] / cpu["alone"]
    report(
        "line",
        f"{streams} streams of {bench.chunks} chunks on {ranks} ranks, per chunk; together {ratio:.2f} of the CPU time",
        rows,
        machine_card(torch.device("cpu")),
        equal=digests["alone"] == digests["together"],
        streams=streams,
        ranks=ranks,
        cpu=round(ratio, 3),
        worst_wait_s=round(load.worst_wait_us / 1e6, 3),
        share_s=round(streams * max(load.busy_us) / 1e6, 3),
    )


if __name__ == "__main__":
    main()
