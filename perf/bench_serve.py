"""How many sessions one machine serves: each a face at 25 frames per second, encoded, for one viewer.

    python perf/bench_serve.py                       this many sessions, then more, until frames come late
    python perf/bench_serve.py --scripted            the server alone, without a face: what serving itself costs
    python perf/bench_serve.py --sessions 1,2 --seconds 20

Every session speaks all the time, which is the dearest that it can do. "Keeps 25" means that each of the sessions had
less than ``--late`` of its frames later than a frame; on a machine that others use too it says nothing, CPU seconds do.
The ideal is what a frame costs with one session alone. Prints a table, and as its last line one JSON object;
``| python perf/table.py --keep serve`` keeps it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from measure import machine_card, priority

from streamdiff.serve.calls import Calls, Opener
from streamdiff.serve.leases import Leases, NoCapacity, Terms
from streamdiff.serve.protocol import Ending, Say
from streamdiff.serve.pump import Viewer

TEXT = "This is one of many sentences that are said one after another for as long as the measurement lasts. "


@dataclass(frozen=True)
class Found:
    """What was measured of so many sessions at once."""

    sessions: int
    fps: list[float]
    late: float
    """Share of frames that came more than a frame after their time."""
    cores: float
    """CPU seconds per second, of the whole process."""
    gap_p95_ms: float
    encode_ms: float
    keeps: bool
    cpu_ms: float
    """CPU milliseconds of a frame and its sound: voice, motion, picture, packets."""
    of_ideal: float = 1.0
    """What a frame of one session alone costs, over what it costs here."""


def face(size: int) -> Opener:
    """The face of the demo, with its voice."""
    from streamdiff.avatar.engine import AvatarEngine

    engine = AvatarEngine.load(None, size=size)
    return lambda _: engine.open()


def scripted(size: int) -> Opener:
    """A stream that costs nothing."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from streamdiff.session import Session
    from tests.serve.scripted import ScriptedStream

    return lambda _: Session(ScriptedStream(side=size))


async def measure(opener: Opener, num: int, seconds: float, late_share: float) -> Found:
    """Let so many sessions speak for so long."""
    async with Calls(Leases(Terms(capacity=num, idle_s=3_600)), opener) as calls:
        open_calls = [await calls.open(f"user{k}") for k in range(num)]
        await _refused(calls)
        warm = [Viewer(call.pump) for call in open_calls]
        for call in open_calls:
            call.do(Say(TEXT * max(2, int(seconds / 4))))
        await asyncio.sleep(3.0)  # first words are dearer
        for viewer in warm:
            viewer.close()
        viewers = [Viewer(call.pump) for call in open_calls]
        late_before = [call.session.metrics.late_frames for call in open_calls]
        began_s, cpu_s = time.monotonic(), _cpu_s()
        gaps = await asyncio.gather(*(_watch(viewer, began_s + seconds) for viewer in viewers))
        took_s, used_s = time.monotonic() - began_s, _cpu_s() - cpu_s
        late = sum(c.session.metrics.late_frames - b for c, b in zip(open_calls, late_before, strict=True))
        fps = [len(gap) / took_s for gap in gaps]
        frames = sum(map(len, gaps))
        encode_ms = statistics.median(call.pump.encode_ms for call in open_calls)
        for call in open_calls:
            await calls.end(call, Ending.LEFT)
    all_ms = sorted(1e3 * gap for gap_s in gaps for gap in gap_s)
    return Found(
        num,
        [round(f, 2) for f in fps],
        round(late / frames, 4),
        round(used_s / took_s, 3),
        round(all_ms[int(0.95 * len(all_ms))], 1),
        round(encode_ms, 2),
        late / frames <= late_share and min(fps) > 24.5,
        round(1e3 * used_s / frames, 2),
    )


async def _refused(calls: Calls) -> None:
    try:
        await calls.open("one too many")
    except NoCapacity as error:
        if error.retry_after_s < 1:
            raise RuntimeError("a refusal that does not say when to ask again") from error
    else:
        raise RuntimeError("the session after the last was let in")


async def _watch(viewer: Viewer, until_s: float) -> list[float]:
    gaps: list[float] = []
    last_s: float | None = None
    while time.monotonic() < until_s:
        beat = await viewer.next(10.0)
        assert beat is not None, viewer.reason
        if last_s is not None:
            gaps.append(beat.left_s - last_s)
        last_s = beat.left_s
    return gaps


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", default="", help="numbers to try, such as 1,2,4 (default: 1, 2, ... until late)")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement (default: %(default)s)")
    parser.add_argument("--size", type=int, default=256, help="pixels along a side (default: %(default)s)")
    parser.add_argument("--late", type=float, default=0.01, help="share of late frames allowed (default: %(default)s)")
    parser.add_argument("--most", type=int, default=16, help="stop at so many (default: %(default)s)")
    parser.add_argument("--scripted", action="store_true", help="without a face")
    args = parser.parse_args()
    torch.set_num_threads(1)
    opener = (scripted if args.scripted else face)(args.size)
    numbers = [int(n) for n in args.sessions.split(",") if n] or list(range(1, args.most + 1))
    load = os.getloadavg()[0]
    found: list[Found] = []
    print("sessions  min fps    late  cores  a frame of ideal  gap p95  encode")
    for num in numbers:
        row = asyncio.run(measure(opener, num, args.seconds, args.late))
        ideal = (found or [row])[0].cpu_ms / row.cpu_ms
        found.append(row := replace(row, of_ideal=round(ideal, 3)))
        print(
            f"{num:>8} {min(row.fps):>8.2f} {row.late:>7.2%} {row.cores:>6.2f} {row.cpu_ms:>5.1f} ms {ideal:>8.0%} "
            f"{row.gap_p95_ms:>5.0f} ms {row.encode_ms:>4.1f} ms{'' if row.keeps else '  falls behind'}",
            flush=True,
        )
        if not row.keeps and not args.sessions:
            break
    kept = max((row.sessions for row in found if row.keeps), default=0)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    card = {**machine_card(torch.device("cpu")), "cores": cores, "load": round(load, 2), "priority": priority()}
    what = {"size": args.size, "scripted": args.scripted, "seconds": args.seconds}
    rows = [asdict(row) for row in found]
    print(json.dumps({"bench": "serve", "card": card, "config": what, "kept": kept, "rows": rows}))


if __name__ == "__main__":
    main()
