"""Run by torchrun in the tests: a stream of sleeping stages; one rank may kill itself on the way."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace

from streamdiff.cli.machine import world_from_environment
from streamdiff.errors import RankFailed
from streamdiff.pipeline.group import Group
from streamdiff.pipeline.run import run_rank
from streamdiff.pipeline.watch import Limits
from tests.hostile.listeners import listening_at
from tests.pipeline.faults import Trouble, endless_source, layout, stop_by_exception
from tests.pipeline.line import SleepingStage


def main(culprit: int) -> None:
    signal.signal(signal.SIGTERM, stop_by_exception)
    world = world_from_environment()
    assert world is not None
    assert world.agent_store
    if "--in-the-agents-store" in sys.argv:
        world = replace(world, place=None, secret=b"known to all of these ranks")
    delivered: list[int] = []
    try:
        with Group(world, layout(world.size), limits=Limits(deadline_s=20)) as group:
            kill = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
            stage = Trouble(5, kill) if world.rank == culprit else SleepingStage(0.01)
            link = group.link(source=endless_source(12), deliver=lambda packet: delivered.append(packet.chunk))
            # One write: several ranks share the pipe.
            os.write(1, f"rank {world.rank} listens at {sorted(set(listening_at()))}\n".encode())
            run_rank(stage, link)
    except RankFailed as error:
        print(f"rank {world.rank} says: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    if delivered:
        print(f"delivered {delivered}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
