"""What a second of the small model's video costs one CPU thread, part by part, and a hash of its frames.

    python perf/bench_portrait.py                                                  ten seconds of video
    python perf/compare.py --rounds 9 ef61df0 . perf/bench_portrait.py             against another commit, alternating
    python perf/bench_portrait.py | python perf/table.py --keep portrait           keep it

The preset's own weights, its own face, the voice of the demo; one rank in one thread. Times are of that thread (the
processor's, not the clock's), the median over all chunks but the first four, which fill the window. ``hear`` is the
sound's features, the noise and the packet, ``denoise`` all steps, ``decode`` the frames as bytes. Two commits that make
the same video print the same hash. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import statistics
import sys
import time
from collections.abc import Iterator

import torch
from measure import machine_card, report

from streamdiff import checkpoint, demo, presets
from streamdiff.engine import Engine
from streamdiff.media import read_audio, read_image
from streamdiff.models.audio import chunks
from streamdiff.pipeline.packet import Packet
from streamdiff.pipeline.run import run_local
from streamdiff.pipeline.schedule import plan
from streamdiff.pipeline.stage import Chain, Stage

_FILLING = 4


class Timed:
    """A stage that says how much of its thread's time each step took."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.spent_s: list[float] = []

    def step(self, packet: Packet) -> Packet:
        start_s = time.thread_time()
        packet = self._stage.step(packet)
        self.spent_s.append(time.thread_time() - start_s)
        return packet


def timed(packets: Iterator[Packet], spent_s: list[float]) -> Iterator[Packet]:
    """The same packets, and what making each of them took."""
    while True:
        start_s = time.thread_time()
        packet = next(packets, None)
        if packet is None:
            return
        spent_s.append(time.thread_time() - start_s)
        yield packet


def voice(seconds: float, rate_hz: int) -> Iterator[torch.Tensor]:
    """The voice of the demo, over and over."""
    left = round(seconds * rate_hz)
    for block_S in itertools.chain.from_iterable(read_audio(demo.demo_audio(), rate_hz) for _ in itertools.count()):
        yield block_S[:left]
        left -= len(block_S)
        if left <= 0:
            return


def bench(seconds: float) -> tuple[dict[str, list[float]], str]:
    """Seconds of the thread per chunk, by part, and the hash of all frames."""
    engine = Engine(presets.portrait())
    config = engine.config
    schedule = plan(num_steps=config.num_steps, num_ranks=1, refresh_chunk=config.refresh_chunk)
    roles = plan(num_steps=config.num_steps, num_ranks=2, decode_alone=True).roles
    denoise, decode = (Timed(engine.stage(role, seed=0)) for role in roles)
    face = read_image(checkpoint.shipped_face(config), config.height, config.width)
    head, encoder = engine.intake(face, "A person is talking."), engine.audio_encoder()
    frames_per_chunk = config.video_frames_per_chunk
    heard = chunks(voice(seconds, encoder.rate_hz), encoder, frames_per_chunk=frames_per_chunk, fps=config.fps)
    spent_s: dict[str, list[float]] = {"hear": []}
    digest = hashlib.sha256()
    source = timed(head.packets(heard), spent_s["hear"])
    for packet in run_local(schedule, [Chain([denoise, decode])], source):
        assert packet.frames_THWC is not None
        digest.update(packet.frames_THWC.numpy().tobytes())
    spent_s |= {"denoise": denoise.spent_s, "decode": decode.spent_s}
    per_s = 1 / config.chunk_s
    return {name: [per_s * s for s in values[_FILLING:]] for name, values in spent_s.items()}, digest.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of video (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    spent_s, digest = bench(args.seconds)
    spent_s["all"] = [sum(parts) for parts in zip(*spent_s.values(), strict=True)]
    rows = [
        {
            "part": name,
            "ms": 1e3 * statistics.median(values),
            "first_quartile": 1e3 * statistics.quantiles(values, n=4)[0],
            "third_quartile": 1e3 * statistics.quantiles(values, n=4)[2],
        }
        for name, values in spent_s.items()
    ]
    load, nice = round(os.getloadavg()[0], 1), os.nice(0)
    title = f"CPU time of one thread for a second of video, milliseconds; load {load}, nice {nice}"
    facts = {"seconds": args.seconds, "load": load, "nice": nice, "frames_sha256": digest}
    report("portrait", title, rows, machine_card(torch.device("cpu")), **facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
