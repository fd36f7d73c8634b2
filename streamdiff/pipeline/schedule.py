"""A schedule is data: which rank owns which noise levels, who sends to whom, and in what order chunks pass.

Everything here is arithmetic on integers. A schedule can be planned, drawn, simulated (`simulate`) and
checked for deadlock before anything is loaded.

    >>> print(render(plan(num_steps=2, num_ranks=3), num_chunks=4))
    tick   0  1  2  3  4  5
    rank0  0  1  2  3  .  .
    rank1  .  0  1  2  3  .
    rank2  .  .  0  1  2  3
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from streamdiff.errors import ScheduleError

QUEUE_DEPTH = 2
"""Chunks that rest between two ranks: one leaving the sender, one waiting at the receiver."""

FEEDBACK_DEPTH = 1
"""Latents that rest on the feedback edge; a rank that returns one must not have to wait for the head."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ScheduleError(message)


def chunks_under_way(num_ranks: int) -> int:
    """Chunks that may be anywhere between the head and the viewer: on a rank, in a queue, or waiting to be shown.

    >>> chunks_under_way(1), chunks_under_way(5)
    (2, 14)
    """
    return num_ranks + (num_ranks - 1) * QUEUE_DEPTH + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds of work per chunk, measured or predicted."""

    step_s: tuple[float, ...]
    """Each denoising step, in order."""
    decode_s: float
    encode_s: float = 0.0
    """Audio encoding, on the head."""

    def __post_init__(self) -> None:
        seconds = (*self.step_s, self.decode_s, self.encode_s)
        _require(
            len(self.step_s) >= 1 and all(0 <= s < float("inf") for s in seconds),
            f"costs must be finite seconds, at least one step, none negative, got {self}",
        )

    @classmethod
    def typical(cls, num_steps: int) -> Costs:
        """Where nothing was measured: equal steps, a decode of about half a step (Live Avatar, table 3)."""
        return cls(step_s=(1.0,) * num_steps, decode_s=0.5)


@dataclass(frozen=True, slots=True)
class Role:
    """What one rank does to every chunk, in this order."""

    rank: int
    encodes: bool
    """Owns the encoders; packets are born here."""
    steps: tuple[int, ...]
    """Denoising steps, neighbours; empty for a rank that only decodes."""
    decodes: bool

    def __str__(self) -> str:
        parts = ["encode"] if self.encodes else []
        if len(self.steps) == 1:
            parts.append(f"step {self.steps[0]}")
        elif self.steps:
            parts.append(f"steps {self.steps[0]}-{self.steps[-1]}")
        return ", ".join([*parts, "decode"] if self.decodes else parts)


@dataclass(frozen=True, slots=True)
class Edge:
    """Packets travel from ``src`` to ``dst``; a feedback edge carries only finished first latents."""

    src: int
    dst: int
    is_feedback: bool = False

    def __str__(self) -> str:
        return f"{self.src}->{self.dst}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """K denoising steps and one decode on a line of ranks, with at most one edge back to its head."""

    partition: tuple[int, ...]
    """Denoising steps owned by each DiT rank, in order."""
    decode_alone: bool
    """Whether decoding has a rank of its own; otherwise the last DiT rank decodes as well."""
    refresh_chunk: int | None = None
    """First chunk whose sink is the returned latent; None: nothing is ever returned."""
    source_chunk: int = 0
    """Chunk whose first latent frame is returned."""

    def __post_init__(self) -> None:
        _require(
            len(self.partition) >= 1 and all(share >= 1 for share in self.partition),
            f"every DiT rank owns at least one step, got partition={self.partition}; leave idle ranks out",
        )
        _require(self.source_chunk >= 0, f"chunks count from 0, got source_chunk={self.source_chunk}")
        _require(
            self.refresh_chunk is None or self.refresh_chunk > self.source_chunk,
            f"the sink of chunk {self.refresh_chunk} cannot come from chunk {self.source_chunk}, which is "
            f"not finished by then; use refresh_chunk={self.source_chunk + 1} or later",
        )

    def __str__(self) -> str:
        """In one line, so that two ranks can tell whether they follow the same one.

        >>> print(Schedule(partition=(2, 1, 1), decode_alone=True, refresh_chunk=5))
        steps 2+1+1, decode alone, refresh 0->5
        """
        decode = "decode alone" if self.decode_alone else "decode shared"
        refresh = "no refresh" if self.refresh_chunk is None else f"refresh {self.source_chunk}->{self.refresh_chunk}"
        return f"steps {'+'.join(map(str, self.partition))}, {decode}, {refresh}"

    @property
    def num_steps(self) -> int:
        return sum(self.partition)

    @property
    def num_dit_ranks(self) -> int:
        return len(self.partition)

    @property
    def num_ranks(self) -> int:
        return self.num_dit_ranks + self.decode_alone

    @property
    def last_dit_rank(self) -> int:
        return self.num_dit_ranks - 1

    @property
    def roles(self) -> tuple[Role, ...]:
        """One role per rank.

        >>> [str(role) for role in Schedule(partition=(3, 1), decode_alone=False).roles]
        ['encode, steps 0-2', 'step 3, decode']
        """
        ends = list(accumulate(self.partition))
        roles = [
            Role(
                rank=rank,
                encodes=rank == 0,
                steps=tuple(range(end - share, end)),
                decodes=rank == self.last_dit_rank and not self.decode_alone,
            )
            for rank, (share, end) in enumerate(zip(self.partition, ends, strict=True))
        ]
        if self.decode_alone:
            roles.append(Role(rank=self.num_dit_ranks, encodes=False, steps=(), decodes=True))
        return tuple(roles)

    @property
    def forward_edges(self) -> tuple[Edge, ...]:
        return tuple(Edge(rank, rank + 1) for rank in range(self.num_ranks - 1))

    @property
    def feedback_edge(self) -> Edge | None:
        """Last DiT rank to head; None when they are one rank, which needs no edge to reach itself."""
        return Edge(self.last_dit_rank, 0, is_feedback=True) if self.last_dit_rank > 0 else None

    @property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge, forward ones first, in the one order in which all ranks open them."""
        return self.forward_edges if self.feedback_edge is None else (*self.forward_edges, self.feedback_edge)

    @property
    def bubble_ticks(self) -> int:
        """Ticks for which the head stands still before the refresh, waiting for the returned latent.

        >>> Schedule(partition=(1, 1, 1, 1), decode_alone=True, refresh_chunk=1).bubble_ticks
        3
        """
        if self.refresh_chunk is None:
            return 0
        return max(0, self.source_chunk + self.num_dit_ranks - self.refresh_chunk)

    def start_tick(self, rank: int, chunk: int) -> int:
        """Tick in which ``rank`` works on ``chunk``, a tick being the time of the longest rank."""
        is_late = self.refresh_chunk is not None and chunk >= self.refresh_chunk
        return rank + chunk + (self.bubble_ticks if is_late else 0)


def rank_costs_us(schedule: Schedule, costs: Costs) -> tuple[int, ...]:
    """Microseconds of work per chunk on each rank.

    Raises ScheduleError when the costs are for another number of steps.
    """
    _require(
        len(costs.step_s) == schedule.num_steps,
        f"{len(costs.step_s)} step costs do not fit {schedule.num_steps} steps; give one per step",
    )
    return tuple(
        sum(_us(costs.step_s[step]) for step in role.steps)
        + (_us(costs.encode_s) if role.encodes else 0)
        + (_us(costs.decode_s) if role.decodes else 0)
        for role in schedule.roles
    )


def plan(
    *,
    num_steps: int,
    num_ranks: int | None = None,
    partition: Sequence[int] | None = None,
    decode_alone: bool | None = None,
    costs: Costs | None = None,
    refresh_chunk: int | None = None,
) -> Schedule:
    """Lay ``num_steps`` denoising steps and the decode out on a line of ranks.

    What is not given is chosen so that the longest rank is as short as possible. Ties go to a decode of its
    own (one copy of the DiT less), then to early ranks taking more: behind a slow head queues stay empty, so
    a command reaches the picture sooner.

    Raises ScheduleError when no layout can work.

    >>> plan(num_steps=4, num_ranks=3).partition
    (2, 2)
    >>> plan(num_steps=4, partition=(2, 1, 1), num_ranks=3).decode_alone
    False
    """
    _require(num_steps >= 1, f"a stream needs at least one denoising step, got {num_steps}")
    _require(
        num_ranks is not None or partition is not None,
        "neither num_ranks nor partition was given; say how many ranks there are",
    )
    costs = Costs.typical(num_steps) if costs is None else costs
    _require(
        len(costs.step_s) == num_steps,
        f"{len(costs.step_s)} step costs do not fit {num_steps} steps; give one per step",
    )
    if num_ranks is not None:
        _require(num_ranks >= 1, f"a stream needs at least one rank, got {num_ranks}")
        _require(
            num_ranks <= num_steps + 1,
            f"{num_ranks} ranks are too many for {num_steps} steps: one rank per step and one to decode make "
            f"{num_steps + 1}; start {num_steps + 1} or fewer",
        )
    if partition is not None:
        return _given(tuple(partition), num_steps, num_ranks, decode_alone, refresh_chunk)

    assert num_ranks is not None
    return _balanced(costs, num_steps, num_ranks, decode_alone, refresh_chunk)


def _balanced(
    costs: Costs, num_steps: int, num_ranks: int, decode_alone: bool | None, refresh_chunk: int | None
) -> Schedule:
    """The layout whose longest rank is shortest."""
    layouts: list[tuple[int, bool, tuple[int, ...]]] = []
    for alone in (True, False) if decode_alone is None else (decode_alone,):
        num_dit_ranks = num_ranks - alone
        if 1 <= num_dit_ranks <= num_steps:
            longest, shares = _shortest_longest(costs, num_dit_ranks, decode_alone=alone)
            layouts.append((longest, alone, shares))
    _require(
        bool(layouts),
        f"{num_ranks} ranks cannot hold {num_steps} steps with decode_alone={decode_alone}; "
        f"use {2 if decode_alone else 1} to {num_steps + bool(decode_alone)} ranks",
    )
    _, alone, shares = min(layouts, key=lambda layout: layout[0])
    return Schedule(partition=shares, decode_alone=alone, refresh_chunk=refresh_chunk)


def _given(
    partition: tuple[int, ...],
    num_steps: int,
    num_ranks: int | None,
    decode_alone: bool | None,
    refresh_chunk: int | None,
) -> Schedule:
    if decode_alone is None:
        decode_alone = num_ranks is None or num_ranks > len(partition)
    schedule = Schedule(partition=partition, decode_alone=decode_alone, refresh_chunk=refresh_chunk)
    _require(
        schedule.num_steps == num_steps,
        f"partition {partition} holds {schedule.num_steps} steps but there are {num_steps}; make it add up",
    )
    _require(
        num_ranks is None or schedule.num_ranks == num_ranks,
        f"partition {partition} with decode_alone={decode_alone} fills {schedule.num_ranks} ranks but there "
        f"are {num_ranks}; start {schedule.num_ranks}",
    )
    return schedule


def _us(seconds: float) -> int:
    return round(seconds * 1e6)


def _shortest_longest(costs: Costs, num_dit_ranks: int, *, decode_alone: bool) -> tuple[int, tuple[int, ...]]:
    """Contiguous partition with the smallest longest rank, and the length of that rank."""
    loads = [_us(seconds) for seconds in costs.step_s]
    loads[0] += _us(costs.encode_s)  # step 0 is always on the head
    if not decode_alone:
        loads[-1] += _us(costs.decode_s)  # the last step is always on the last DiT rank
    sums = [0, *accumulate(loads)]
    limits = sorted({sums[j] - sums[i] for i in range(len(loads)) for j in range(i + 1, len(sums))})
    longest = limits[bisect.bisect_left(limits, True, key=lambda limit: _fits(loads, num_dit_ranks, limit))]
    shares: list[int] = []
    start = 0
    for left in range(num_dit_ranks - 1, -1, -1):
        end = start + 1
        while end < len(loads) - left and sums[end + 1] - sums[start] <= longest:
            end += 1
        shares.append(end - start)
        start = end
    return max(longest, _us(costs.decode_s) if decode_alone else 0), tuple(shares)


def _fits(loads: list[int], num_ranks: int, limit: int) -> bool:
    used, room = 0, -1
    for load in loads:
        if load > limit:
            return False
        if load > room:
            used, room = used + 1, limit
        room -= load
    return used <= num_ranks


def render(
    schedule: Schedule, *, num_chunks: int = 4, first_chunk: int = 0, mark: tuple[int, int] | None = None
) -> str:
    """Draw which rank works on which chunk in which tick; ``!`` points at the (rank, chunk) in ``mark``."""
    chunks = range(first_chunk, first_chunk + num_chunks)
    first_tick = schedule.start_tick(0, chunks[0])
    num_ticks = schedule.start_tick(schedule.num_ranks - 1, chunks[-1]) - first_tick + 1
    rows: list[list[str]] = [["."] * num_ticks for _ in range(schedule.num_ranks)]
    for rank, row in enumerate(rows):
        for chunk in chunks:
            marked = "!" if (rank, chunk) == mark else ""
            row[schedule.start_tick(rank, chunk) - first_tick] = f"{marked}{chunk}"
    table = [[str(first_tick + tick) for tick in range(num_ticks)], *rows]
    labels = ["tick", *(f"rank{rank}" for rank in range(schedule.num_ranks))]
    width = 2 + max(len(cell.removeprefix("!")) for row in table for cell in row)
    label_width = max(map(len, labels))
    return "\n".join(
        label.ljust(label_width) + "".join(cell.rjust(width) for cell in row)
        for label, row in zip(labels, table, strict=True)
    )


def render_around(schedule: Schedule, rank: int, chunk: int) -> str:
    """The picture of the moment at which ``rank`` works on ``chunk``, with that cell marked."""
    first = max(0, chunk - schedule.num_ranks + 1)
    return render(schedule, num_chunks=chunk - first + schedule.num_ranks, first_chunk=first, mark=(rank, chunk))


_Event = tuple[str, int, int]  # ("take" | "give" | "return" | "fill", rank, chunk)


def check(
    schedule: Schedule,
    *,
    num_chunks: int | None = None,
    queue_depth: int = QUEUE_DEPTH,
    feedback_depth: int = FEEDBACK_DEPTH,
) -> None:
    """Check the schedule for deadlock, before anything runs.

    Every rank takes a chunk, works, and gives it away, in order; a queue holds ``queue_depth`` chunks (0: a
    send waits until it is received) and the feedback edge ``feedback_depth`` latents. The order of these
    events is a graph; a circle in it is a deadlock.

    Raises ScheduleError naming the cells that wait for each other.
    """
    last = schedule.refresh_chunk or 0
    num_chunks = last + (queue_depth + 2) * (schedule.num_ranks + 1) if num_chunks is None else num_chunks
    circle = _circle(_waits(schedule, num_chunks, queue_depth, feedback_depth))
    if circle:
        first_seen: dict[int, int] = {}
        for _, rank, chunk in circle:
            first_seen.setdefault(rank, chunk)
        cells = [f"rank {rank} at chunk {chunk}" for rank, chunk in first_seen.items()]
        raise ScheduleError(
            f"the schedule locks up: {' waits for '.join([*cells, cells[0]])}; "
            f"give the {'feedback edge' if feedback_depth == 0 else 'queues'} room for one packet"
        )


def _waits(schedule: Schedule, num_chunks: int, queue_depth: int, feedback_depth: int) -> dict[_Event, list[_Event]]:
    """Wait-for graph: each event with those that must come first. Unbuffered, giving and taking are one event."""
    refresh, source = schedule.refresh_chunk, schedule.source_chunk
    tail, last_dit = schedule.num_ranks - 1, schedule.last_dit_rank
    meets = feedback_depth == 0 and schedule.feedback_edge is not None

    def take(rank: int, chunk: int) -> _Event:
        return ("give", rank - 1, chunk) if queue_depth == 0 and rank > 0 else ("take", rank, chunk)

    waits: dict[_Event, list[_Event]] = defaultdict(list)
    for chunk in range(num_chunks):
        for rank in range(schedule.num_ranks):
            here = take(rank, chunk)
            if chunk > 0:
                waits[here].append(("give", rank, chunk - 1))
            if rank > 0 and queue_depth > 0:
                waits[here].append(("give", rank - 1, chunk))
            if refresh is not None and rank == last_dit and chunk == source:
                returned: _Event = ("fill", 0, refresh) if meets else ("return", rank, chunk)
                waits[returned].append(here)
                here = returned
            if rank == 0 and chunk == refresh:
                fill: _Event = ("fill", 0, chunk)
                waits[fill].append(here)
                if not meets:
                    waits[fill].append(("return", last_dit, source))
                here = fill
            waits["give", rank, chunk].append(here)
            if rank < tail and chunk >= queue_depth > 0:
                waits["give", rank, chunk].append(take(rank + 1, chunk - queue_depth))
    return dict(waits)


def _circle(waits: dict[_Event, list[_Event]]) -> list[_Event]:
    """A cycle in the wait-for graph, or nothing: depth-first search without recursion, since streams are long."""
    done: set[_Event] = set()
    for root in waits:
        path: list[_Event] = []
        on_path: set[_Event] = set()
        stack = [root]
        while stack:
            event = stack[-1]
            if event in done:
                stack.pop()
            elif event in on_path:
                stack.pop()
                path.pop()
                on_path.discard(event)
                done.add(event)
            else:
                path.append(event)
                on_path.add(event)
                for other in waits.get(event, []):
                    if other in on_path:
                        return path[path.index(other) :]
                    if other not in done:
                        stack.append(other)
    return []
