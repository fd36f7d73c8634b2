"""What a stream would do on 1 to 9 GPUs, from the seconds its stages take: no GPU needed.

    python perf/simulate.py                                    the published 14B times on 1 to 5 GPUs
    python perf/simulate.py --step-ms 190 --decode-ms 80       other times
    python perf/simulate.py --step-ms 190,190,190,60 --gpus 3  uneven steps; the best layout is planned
    python perf/simulate.py --num-steps 8 --gpus 1-9           more steps, more GPUs
    python perf/simulate.py --partition 2,1,1 --decode own     a layout of your own
    python perf/simulate.py --gbit-s 1 --latency-ms 5          slow links
    python perf/simulate.py --jitter 0.2 --buffer-chunks 1     late chunks, with and without a buffer
    python perf/simulate.py --live                             a voice that arrives in real time
    python perf/simulate.py --gpus 5 --lose 2@10               rank 2 dies after 10 s
    python perf/simulate.py --gpus 5 --refresh-chunk 1 --draw  who works on what, when

Default times: Live Avatar 14B, FP8, 5 x H800 (paper, table 3): 12 frames every 0.2655 s, 1.21 s to the first
frame, hence 0.148 s for the decoder. Power is a guess until it is measured: --busy-w, --idle-w. Last line:
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from streamdiff.errors import ScheduleError
from streamdiff.pipeline.schedule import Costs, Schedule, check, plan, render
from streamdiff.pipeline.simulate import Hop, Loss, Playback, Simulation, render_timeline, simulate

MAX_GPUS = 9


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    work = parser.add_argument_group("work per chunk")
    work.add_argument("--step-ms", default="265.5", metavar="MS[,MS...]", help="every step, or each")
    work.add_argument("--num-steps", type=int, metavar="K", help="default: as many as --step-ms, or 4")
    work.add_argument("--decode-ms", type=float, default=148.0, metavar="MS")
    work.add_argument("--encode-ms", type=float, default=0.0, metavar="MS", help="audio, on the head")
    work.add_argument("--refresh-ms", type=float, default=0.0, metavar="MS", help="new sink, per step, once")
    work.add_argument("--jitter", type=float, default=0.0, help="relative standard deviation of all work")
    work.add_argument("--seed", type=int, default=0)
    line = parser.add_argument_group("line")
    line.add_argument("--gpus", metavar="N[-M]", help="default: 1 to steps + 1, at most 9")
    line.add_argument("--partition", metavar="A,B,...", help="steps of each DiT rank")
    line.add_argument("--decode", choices=["own", "shared"], help="default: whatever is faster")
    line.add_argument("--refresh-chunk", type=int, metavar="R")
    line.add_argument("--latency-ms", type=float, default=0.05, metavar="MS", help="of one hop")
    line.add_argument("--gbit-s", type=float, default=3000.0, help="speed of one hop (NVLink: 3000)")
    line.add_argument("--payload-kib", type=float, default=396.0, help="a 704x384 chunk in bfloat16: 396")
    line.add_argument("--lose", metavar="RANK@S", help="this rank dies S seconds into the stream")
    line.add_argument("--noticed-after-s", type=float, default=0.5, metavar="S")
    show = parser.add_argument_group("stream")
    show.add_argument("--chunks", type=int, default=250)
    show.add_argument("--frames-per-chunk", type=int, default=12)
    show.add_argument("--fps", type=float, default=25.0, help="of the playback")
    show.add_argument("--buffer-chunks", type=int, default=0)
    show.add_argument("--live", action="store_true", help="the voice arrives in real time")
    show.add_argument("--busy-w", type=float, default=700.0, help="watts of a working GPU (H100/H800 limit)")
    show.add_argument("--idle-w", type=float, default=120.0, help="watts of a waiting GPU (a guess)")
    show.add_argument("--draw", action="store_true", help="draw every schedule and its timeline")
    return parser


def schedules(args: argparse.Namespace, costs: Costs) -> list[Schedule]:
    """The layouts to compare, each checked for deadlock."""
    num_steps = len(costs.step_s)
    decode_alone = None if args.decode is None else args.decode == "own"
    if args.partition is not None:
        partition = tuple(int(share) for share in args.partition.split(","))
        counts: list[int | None] = [None]
    else:
        partition = None
        first, _, last = (args.gpus or f"1-{min(MAX_GPUS, num_steps + 1)}").partition("-")
        counts = list(range(int(first), int(last or first) + 1))
    planned = [
        plan(
            num_steps=num_steps,
            num_ranks=count,
            partition=partition,
            decode_alone=decode_alone,
            costs=costs,
            refresh_chunk=args.refresh_chunk,
        )
        for count in counts
    ]
    for schedule in planned:
        check(schedule)
    return planned


def run(args: argparse.Namespace, schedule: Schedule, costs: Costs) -> Simulation:
    playback = Playback(frames_per_chunk=args.frames_per_chunk, fps=args.fps, buffer_chunks=args.buffer_chunks)
    loss = None
    if args.lose is not None:
        rank, _, at_s = args.lose.partition("@")
        loss = Loss(rank=int(rank), at_s=float(at_s), noticed_after_s=args.noticed_after_s)
    new_sink = {(role.rank, args.refresh_chunk): len(role.steps) * args.refresh_ms / 1e3 for role in schedule.roles}
    return simulate(
        schedule,
        costs,
        num_chunks=args.chunks,
        hop=Hop(
            latency_s=args.latency_ms / 1e3,
            bytes_per_s=args.gbit_s * 1e9 / 8,
            payload_bytes=round(args.payload_kib * 1024),
        ),
        playback=playback,
        jitter=args.jitter,
        seed=args.seed,
        extra_s=new_sink if args.refresh_chunk is not None else None,
        source_period_s=playback.chunk_s if args.live else 0.0,
        loss=loss,
    )


def row_of(args: argparse.Namespace, schedule: Schedule, result: Simulation) -> dict[str, Any]:
    total_s = result.wall_s * schedule.num_ranks
    return {
        "gpus": schedule.num_ranks,
        "layout": "+".join(map(str, schedule.partition)) + (" | d" if schedule.decode_alone else " d"),
        "fps": round(result.fps, 2),
        "first_frame_s": round(result.first_frame_s, 3),
        "period_ms": round(result.period_s * 1e3, 1),
        "busy_share": round(sum(result.busy_s) / total_s, 3) if total_s else 0.0,
        "bubble_s": [round(bubble_s, 2) for bubble_s in result.bubble_s],
        "late_chunks": result.num_late,
        "stall_s": round(result.stall_s, 3),
        "j_per_frame": round(result.joules_per_frame(busy_w=args.busy_w, idle_w=args.idle_w), 1),
        "delivered_chunks": len(result.delivered_s),
        "lost_chunks": result.num_lost,
        "wall_s": round(result.wall_s, 2),
    }


def main() -> int:
    args = parser().parse_args()
    try:
        step_ms = [float(text) for text in args.step_ms.split(",")]
        if len(step_ms) == 1:
            step_ms *= args.num_steps or 4
        elif args.num_steps not in (None, len(step_ms)):
            raise ScheduleError(
                f"--step-ms names {len(step_ms)} steps but --num-steps says {args.num_steps}; leave one out"
            )
        costs = Costs(
            step_s=tuple(ms / 1e3 for ms in step_ms),
            decode_s=args.decode_ms / 1e3,
            encode_s=args.encode_ms / 1e3,
        )
        results = [(schedule, run(args, schedule, costs)) for schedule in schedules(args, costs)]
    except (ScheduleError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = [row_of(args, schedule, result) for schedule, result in results]
    if args.draw:
        for schedule, result in results:
            print(render(schedule, num_chunks=6))
            print("; ".join(f"rank {role.rank}: {role}" for role in schedule.roles))
            print(render_timeline(result, num_ticks=12), end="\n\n")
    print("GPUs  layout         FPS  first s  period ms  busy  bubbles s  late  stall s  J/frame  lost")
    for row in rows:
        print(
            f"{row['gpus']:>4}  {row['layout']:<11}{row['fps']:>7.2f}{row['first_frame_s']:>9.2f}"
            f"{row['period_ms']:>11.1f}{row['busy_share']:>6.0%}{sum(row['bubble_s']):>11.2f}"
            f"{row['late_chunks']:>6}{row['stall_s']:>9.2f}{row['j_per_frame']:>9.1f}{row['lost_chunks']:>6}"
        )
    given = {name: value for name, value in vars(args).items() if name != "draw"}
    print(json.dumps({"bench": "simulate", "arguments": given, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
