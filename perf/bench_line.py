"""What it costs to share a line of ranks: streams of the preset portrait, alone and together, bit for bit the same.

    python perf/bench_line.py                            8 streams that join, leave, switch prompts and are interrupted
    python perf/bench_line.py --streams 4 --ranks 2 --chunks 12 --repeats 3

The ranks are threads of this process; ranks in other processes cannot be shared yet. The kinds take turns, so that load
meets all alike, and CPU time is compared, which other programs move less than the clock. The ceiling: the arithmetic is
the same, so a ratio of 1. ``worst_wait_s``: longest that a chunk which might have entered waited for its turn;
``share_s``: what one chunk of every stream takes on the slowest rank. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from measure import machine_card, report

from streamdiff import presets, rng
from streamdiff.engine import Engine
from streamdiff.models.audio import AudioChunk
from streamdiff.pipeline.intake import Intake
from streamdiff.pipeline.line import Line
from streamdiff.pipeline.packet import Packet, SetReference
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
        return digest(run_local(schedule, stages, self.packets(number)))


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
    """All streams on one line, each read by a thread; their digests."""
    digests = [""] * streams

    def visit(number: int) -> None:
        seat = line.join(stream=number, live=False).start(bench.packets(number))
        digests[number] = digest(iter(seat.get, None))
        seat.close()

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return digests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = presets.portrait()
    config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, slack_chunks=2))
    measure(Bench(Engine(config), arguments.chunks), arguments.streams, arguments.ranks, arguments.repeats)


def measure(bench: Bench, streams: int, ranks: int, repeats: int) -> None:
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
    per_chunk = 1e3 / (streams * bench.chunks)
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
