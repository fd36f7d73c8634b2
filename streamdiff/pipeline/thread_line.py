"""A line whose ranks are threads of this process.

An error of one stream's stage ends that stream; a rank that hangs ends them all.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

from streamdiff.config import EngineConfig
from streamdiff.errors import RankFailed, ScheduleError
from streamdiff.pipeline.line import STOP_S, Fallen, Line, Seat
from streamdiff.pipeline.link import LineLink, Mailbox, Returned
from streamdiff.pipeline.packet import Packet
from streamdiff.pipeline.schedule import QUEUE_DEPTH, Schedule, render_around
from streamdiff.pipeline.stage import SeatedStage


class ThreadLine(Line):
    """Ranks of this process that many streams share.

    Args:
        config: of every stream.
        schedule: which rank does what.
        seats: for each stream that may be on the line at once, one stage per rank.
        deadline_s: a rank may work this long on one chunk.
        clock: seconds, rising.
    """

    def __init__(
        self,
        config: EngineConfig,
        schedule: Schedule,
        seats: Sequence[Sequence[SeatedStage]],
        *,
        deadline_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not seats or any(len(stages) != schedule.num_ranks for stages in seats):
            raise ScheduleError(
                f"a line of {schedule.num_ranks} ranks needs at least one seat of as many stages, "
                f"got {[len(stages) for stages in seats]}"
            )
        super().__init__(config, schedule, len(seats), clock=clock)
        self._stages, self._deadline_s = [tuple(stages) for stages in seats], deadline_s
        self._working: list[tuple[int, float] | None] = [None] * schedule.num_ranks
        """Per rank, the chunk it works on and since when; each rank's thread has its own entry."""
        self._edges = [Mailbox[tuple[Seat, Packet | None]](QUEUE_DEPTH, self.check) for _ in schedule.forward_edges]
        self._threads = [
            threading.Thread(target=self._run, args=(rank,), name=f"line-rank{rank}", daemon=True)
            for rank in range(schedule.num_ranks)
        ]
        for thread in self._threads:
            thread.start()

    def links(self, seat: Seat, source: Iterator[Packet]) -> tuple[LineLink, ...]:
        """See `Line.links`."""
        last, last_dit = self.schedule.num_ranks - 1, self.schedule.last_dit_rank
        returned = Returned(seat.check)

        def outlet(rank: int) -> Callable[[Packet | None], None]:
            return lambda packet: self._edges[rank].put((seat, packet))

        return tuple(
            LineLink(
                inlet=_never if rank > 0 else None,
                source=source if rank == 0 else None,
                outlet=outlet(rank) if rank < last else None,
                deliver=seat.deliver if rank == last else None,
                give_back=returned.put if rank == last_dit else None,
                returned=returned if rank == 0 else None,
            )
            for rank in range(self.schedule.num_ranks)
        )

    def check_ranks(self) -> None:
        """Raise what made the line fall; RankFailed for a rank that works for longer than its deadline."""
        with self._wake:
            self._check_open()
        for rank, working in enumerate(self._working):
            if working is None or self._clock() - working[1] <= self._deadline_s:
                continue
            error = RankFailed(
                f"rank {rank} has been working (chunk {working[0]}) for more than {self._deadline_s:g} s; "
                f"find what it waits for, or raise the deadline\n"
                f"{render_around(self.schedule, rank, max(0, working[0]))}",
                rank=rank,
            )
            self._fall(error)
            raise error

    def _end_ranks(self) -> None:
        hung = isinstance(self._error, RankFailed)
        end_s = time.monotonic() + (0.0 if hung else STOP_S)
        for thread in self._threads:
            thread.join(max(0.0, end_s - time.monotonic()))

    def _run(self, rank: int) -> None:
        """The body of a rank's thread."""
        try:
            while True:
                seat, packet = self._next() if rank == 0 else self._edges[rank - 1].get()
                self._work(rank, seat, packet)
        except Fallen:
            pass
        except BaseException as error:  # noqa: BLE001  raised where packets are taken
            self._fall(error)

    def _work(self, rank: int, seat: Seat, packet: Packet | None) -> None:
        if packet is None:
            seat.hand_on(rank, None)
        elif not seat.has_left and (done := self._step(rank, seat, packet)) is not None:
            seat.hand_on(rank, done)

    def _step(self, rank: int, seat: Seat, packet: Packet) -> Packet | None:
        """A rank's part of a packet, timed and watched; None when it failed, and the stream with it."""
        stage, began_s = self._stages[seat.number][rank], self._clock()
        self._working[rank] = (packet.chunk, began_s)
        try:
            if seat.begins(rank):
                stage.begin(seed=seat.key[0], stream=seat.key[1])
            done = stage.step(packet)
        except Exception as error:  # noqa: BLE001  raised where this stream's packets are taken
            picture = render_around(self.schedule, rank, max(0, packet.chunk))
            error.add_note(f"on rank {rank} at chunk {packet.chunk}:\n{picture}")
            seat.fail(error)
            return None
        finally:
            self._working[rank] = None
        self._count(rank, packet.chunk, round((self._clock() - began_s) * 1e6))
        return done


def _never() -> Packet | None:
    raise AssertionError("packets of a line come in through its edges")
