"""Streams join a line of ranks and leave it while others run; each comes out as if it were alone, bit for bit."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamdiff.errors import ConfigError, LineFull, RankFailed, ScheduleError, SessionClosed
from streamdiff.pipeline.line import Line, Seat
from streamdiff.pipeline.packet import Packet
from streamdiff.pipeline.schedule import chunks_under_way, plan
from streamdiff.pipeline.thread_line import ThreadLine
from streamdiff.pipeline.turns import Turns
from tests.engine.oracle_case import LATENT, Case, Event, packets_of, played, script_of
from tests.engine.stream_case import same
from tests.session.faces import collect, open_video, run, tone, video_engine

WAIT_S = 120.0
CASE = Case(num_steps=2, renoise=True, slack=3, window=2)
QUIET = Event()
LIVES = (
    [QUIET] * 7,
    [QUIET, QUIET, Event(prompt=1), QUIET, QUIET],
    [QUIET, QUIET, QUIET, Event(back=(2,)), QUIET, QUIET, QUIET],
    [QUIET, Event(back=(1,)), Event(prompt=2), QUIET, Event(prompt=1, back=(9,)), QUIET, QUIET],
    [QUIET],
    [QUIET, Event(prompt=1), Event(prompt=2), Event(back=(3,)), QUIET, QUIET, QUIET, QUIET],
    [Event(back=(1,)), QUIET, QUIET, Event(back=(1, 1)), Event(prompt=1)],
    [QUIET] * 5,
)
"""What happens to eight streams."""
STAYS = (99, 99, 4, 99, 99, 6, 2, 99)
"""Chunks after which each of them leaves, or its end."""

events = st.lists(
    st.builds(
        Event, back=st.just(()) | st.just(()) | st.tuples(st.integers(0, 4)), prompt=st.none() | st.integers(0, 2)
    ),
    min_size=1,
    max_size=8,
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def life(number: int) -> tuple[Case, list[Event]]:
    return dataclasses.replace(CASE, seed=number % 3, stream=number), LIVES[number]


def line_of(case: Case, seats: int) -> Line:
    engine = case.engine
    return ThreadLine(
        case.config, case.schedule, [[engine.stage(role) for role in case.schedule.roles] for _ in range(seats)]
    )


class Visitors:
    """Threads that each bring streams to a line, one after the other.

    ``lives``: of every stream, what it is, what happens to it, and after how many chunks it leaves.
    """

    def __init__(self, line: Line, lives: Sequence[tuple[Case, list[Event], int]]) -> None:
        self.line, self.lives = line, lives
        self.seen: dict[int, list[Packet]] = {}
        self.errors: list[BaseException] = []

    def come(self, num_threads: int) -> None:
        """All of them, to the end."""
        threads = [threading.Thread(target=self._bring, args=(n, num_threads)) for n in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert self.errors == []

    def _bring(self, first: int, step: int) -> None:
        try:
            for number in range(first, len(self.lives), step):
                self._stay(number)
        except BaseException as error:  # noqa: BLE001  raised by the test
            self.errors.append(error)

    def _stay(self, number: int) -> None:
        case, events, stays = self.lives[number]
        until_s = time.monotonic() + WAIT_S
        while True:
            try:
                seat = self.line.join(seed=case.seed, stream=case.stream, live=False)
                break
            except LineFull:
                assert time.monotonic() < until_s
                time.sleep(0.01)
        seat.start(packets_of(case, script_of(case, events)))
        seen: list[Packet] = []
        while len(seen) < stays and (packet := seat.get(WAIT_S)) is not None:
            seen.append(packet)
        seat.close()
        self.seen[number] = seen


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("ranks", "streams"),
    [(3, 4), pytest.param(1, 8, marks=pytest.mark.slow), pytest.param(3, 8, marks=pytest.mark.slow)],
)
def test_streams_that_come_and_go_on_fewer_seats(ranks: int, streams: int) -> None:
    with line_of(dataclasses.replace(CASE, ranks=ranks), seats=streams // 2 - 1) as line:
        visitors = Visitors(line, [(*life(number), STAYS[number]) for number in range(streams)])
        visitors.come(streams // 2)
        assert line.load.streams == 0
    for number in range(streams):
        case, happens = life(number)
        alone, seen = played(case, script_of(case, happens)), visitors.seen[number]
        assert len(seen) == min(STAYS[number], len(alone))
        assert same(seen, alone[: len(seen)]), f"stream {number} is not what it is alone"


@pytest.mark.slow
def test_sessions_on_a_line_are_what_they_are_alone() -> None:
    engine = video_engine()

    async def film(number: int, line: Line | None) -> np.ndarray:
        slack = None if line is not None else 9
        async with open_video(engine, slack=slack, stream=number, line=line) as session:
            session.push_audio(tone(0.7, number))
            session.finish()
            return np.concatenate([shown.frames_THWC for shown in await collect(session)])

    async def scene() -> None:
        with engine.line(seats=2, num_ranks=2, slack_chunks=9) as line:
            assert all(busy_us > 0 for busy_us in line.load.busy_us)
            together = await asyncio.gather(film(0, line), film(1, line))
        for number, found in enumerate(together):
            assert np.array_equal(found, await film(number, None))

    run(scene())


@pytest.mark.slow
@pytest.mark.timeout(1200)
@settings(max_examples=60)
@given(
    ranks=st.integers(1, 3),
    renoise=st.booleans(),
    lives=st.lists(st.tuples(events, st.integers(1, 12)), min_size=2, max_size=5),
)
def test_whoever_comes_and_goes_is_what_the_oracle_says(
    ranks: int, renoise: bool, lives: list[tuple[list[Event], int]]
) -> None:
    """More streams than seats, each with a script of its own, some of which leave early."""
    case = dataclasses.replace(CASE, ranks=ranks, renoise=renoise)
    cases = [dataclasses.replace(case, seed=number, stream=7 * number) for number in range(len(lives))]
    with line_of(case, seats=2) as line:
        visitors = Visitors(line, [(one, *life) for one, life in zip(cases, lives, strict=True)])
        visitors.come(3)
    for number, (one, (script, stay)) in enumerate(zip(cases, lives, strict=True)):
        made = one.oracle().film(script_of(one, script))[:stay]
        seen = visitors.seen[number]
        assert [(p.chunk, p.epoch) for p in seen] == [(m.chunk, m.epoch) for m in made]
        for packet, expected in zip(seen, made, strict=True):
            assert (packet.latent_BCTHW - expected.latent_BCTHW).abs().max() <= LATENT


@pytest.mark.heavy
def test_a_session_on_a_line_is_interrupted_and_goes_on() -> None:
    engine = video_engine()

    async def scene() -> None:
        with engine.line(seats=2, num_ranks=2) as line:
            async with open_video(engine, line=line) as other, open_video(engine, line=line) as session:
                other.push_audio(tone(1.0), last=True)
                session.push_audio(np.full(64_000, 0.5, np.float32))
                shown = await collect(session, 2)
                interrupted = session.interrupt()
                assert interrupted.cut_s == interrupted.resumes_s == Fraction(24, 25)
                session.push_audio(np.full(8_000, 0.25, np.float32))
                session.finish()
                shown += await collect(session)
                assert [s.index for s in await collect(other, 2)] == [0, 12]
            assert line.load.streams == 0
        assert [s.index for s in shown] == [0, 12, 24, 36]
        heard_S = np.concatenate([s.sound_S for s in shown[2:]])
        assert (np.count_nonzero(heard_S == 0.25), np.count_nonzero(heard_S == 0.5)) == (8_000, 0)

    run(scene())


class Fake:
    """A stage that notes what it saw, and does what it is told to."""

    def __init__(self) -> None:
        self.began: list[tuple[int, int]] = []
        self.breaks_at = -1
        self.takes_s = 0.0
        self.now_s = 0.0
        self.hold: threading.Event | None = None
        self.entered = threading.Event()

    def begin(self, *, seed: int, stream: int) -> None:
        self.began.append((seed, stream))

    def step(self, packet: Packet) -> Packet:
        self.entered.set()
        if self.hold is not None:
            assert self.hold.wait(WAIT_S)
        self.now_s += self.takes_s
        if packet.chunk == self.breaks_at:
            raise ValueError("a stage broke")
        return packet

    def clock(self) -> float:
        return self.now_s


def fakes(num_ranks: int, seats: int, **how: object) -> tuple[Line, list[list[Fake]]]:
    stages = [[Fake() for _ in range(num_ranks)] for _ in range(seats)]
    return ThreadLine(CASE.config, plan(num_steps=2, num_ranks=num_ranks), stages, **how), stages  # type: ignore[arg-type]


def numbered(count: int) -> Iterator[Packet]:
    for chunk in range(count):
        yield Packet(chunk=chunk, epoch=0, lead=0, latent_BCTHW=torch.full((1, 1, 1, 1, 1), float(chunk)))


def drained(seat: Seat) -> list[int]:
    """Chunks until the end of a stream, or its error."""
    return [packet.chunk for packet in iter(lambda: seat.get(WAIT_S), None)]


def test_a_reader_that_pauses_holds_nobody_up() -> None:
    line, _ = fakes(3, 2)
    with line:
        paused = line.join().start(numbered(50))
        other = line.join().start(numbered(50))
        assert drained(other) == list(range(50))
        assert drained(paused) == list(range(50))
        assert paused.get() is None


def test_no_more_chunks_are_under_way_than_an_interruption_can_take_back() -> None:
    made: list[int] = []

    def counted() -> Iterator[Packet]:
        for packet in numbered(100):
            made.append(packet.chunk)
            yield packet

    line, _ = fakes(3, 2)
    with line:
        seat = line.join().start(counted())
        for taken in range(4):
            until_s = time.monotonic() + WAIT_S
            while len(made) < taken + chunks_under_way(3):
                assert time.monotonic() < until_s
                time.sleep(0.005)
            assert len(drained(line.join().start(numbered(60)))) == 60  # time enough to make one too many
            assert len(made) == taken + chunks_under_way(3)
            assert seat.get(WAIT_S) is not None


@pytest.mark.parametrize("culprit", [0, 2])
def test_a_stream_that_fails_fails_alone_and_its_seat_is_free_again(culprit: int) -> None:
    line, stages = fakes(3, 2)
    with line:
        broken, other = line.join(), line.join()
        stages[broken.number][culprit].breaks_at = 1
        broken.start(numbered(5))
        other.start(numbered(5))
        with pytest.raises(ValueError, match="a stage broke") as caught:
            drained(broken)
        assert f"on rank {culprit} at chunk 1" in caught.value.__notes__[0]
        with pytest.raises(ValueError, match="a stage broke"):
            broken.get(WAIT_S)
        assert drained(other) == [0, 1, 2, 3, 4]
        stages[broken.number][culprit].breaks_at = -1
        again = line.join(seed=3, stream=4).start(numbered(3))
        assert drained(again) == [0, 1, 2]
        assert stages[again.number][culprit].began[-1] == (3, 4)


def test_a_source_that_fails_ends_its_stream_and_no_other() -> None:
    def broken() -> Iterator[Packet]:
        yield from numbered(1)
        raise OSError("the microphone is gone")

    line, _ = fakes(2, 2)
    with line:
        one, other = line.join().start(broken()), line.join().start(numbered(4))
        with pytest.raises(OSError, match="microphone"):
            drained(one)
        assert drained(other) == [0, 1, 2, 3]


def test_a_rank_that_hangs_is_named_to_every_stream() -> None:
    line, stages = fakes(2, 2, deadline_s=0.05)
    release = stages[0][1].hold = threading.Event()
    try:
        seats = [line.join().start(numbered(3)) for _ in range(2)]
        for seat in seats:
            with pytest.raises(RankFailed, match="rank 1 has been working") as caught:
                drained(seat)
            assert caught.value.rank == 1
        with pytest.raises(RankFailed):
            line.join()
        line.close()
    finally:
        release.set()


def test_a_full_line_answers_at_once_and_says_when_to_ask_again() -> None:
    line, _ = fakes(1, 2)
    with line:
        first, _ = line.join(), line.join()
        with pytest.raises(LineFull, match="all 2 seats are taken") as caught:
            line.join()
        assert caught.value.retry_after_s == pytest.approx(CASE.config.chunk_s)
        first.close()
        first.close()
        line.join()
        with pytest.raises(LineFull):
            line.join()


def test_no_more_live_streams_are_let_in_than_the_slowest_rank_keeps_up_with() -> None:
    stage = Fake()
    stage.takes_s = CASE.config.chunk_s / 2.5
    schedule = plan(num_steps=2, num_ranks=1)
    with ThreadLine(CASE.config, schedule, [[stage]] * 5, clock=stage.clock) as line:
        film = line.join(live=False).start(numbered(4))
        assert drained(film) == [0, 1, 2, 3]
        assert line.load.fits == 2
        one = line.join()
        line.join()
        with pytest.raises(LineFull, match=r"takes 128 ms .* in 320 ms, so 2 live streams fit, and 2 are here"):
            line.join()
        line.join(live=False)  # a film takes what time is left
        one.close()
        line.join()


def test_an_empty_line_takes_a_live_stream_however_slow_it_is() -> None:
    stage = Fake()
    stage.takes_s = 9.0
    with ThreadLine(CASE.config, plan(num_steps=2, num_ranks=1), [[stage]] * 2, clock=stage.clock) as line:
        assert drained(line.join(live=False).start(numbered(2))) == [0, 1]
        line.join()
        with pytest.raises(LineFull, match="so 1 live streams fit, and 1 are here"):
            line.join()


def test_the_first_chunk_of_a_stream_does_not_count_where_there_are_others() -> None:
    stage = Fake()
    stage.takes_s = 0.1
    with ThreadLine(CASE.config, plan(num_steps=2, num_ranks=1), [[stage]], clock=stage.clock) as line:
        for takes_s, count, expected_us in ((0.5, 1, 500_000), (0.1, 3, 100_000), (0.5, 1, 100_000)):
            stage.takes_s = takes_s
            seat = line.join(live=False).start(numbered(count))
            assert len(drained(seat)) == count
            assert line.load.busy_us == (expected_us,)


def test_how_long_a_chunk_waits_for_its_turn_is_told() -> None:
    stage, offered = Fake(), threading.Event()
    stage.takes_s, stage.hold = 0.1, threading.Event()

    def watched() -> Iterator[Packet]:
        for packet in numbered(2):
            yield packet
            offered.set()

    with ThreadLine(CASE.config, plan(num_steps=2, num_ranks=1), [[stage]] * 2, clock=stage.clock) as line:
        first = line.join(live=False).start(numbered(1))
        assert stage.entered.wait(WAIT_S)
        second = line.join(live=False).start(watched())
        assert offered.wait(WAIT_S)
        stage.hold.set()
        assert (drained(first), drained(second)) == ([0], [0, 1])
        assert line.load.worst_wait_us == 100_000


def test_a_closed_line_says_so() -> None:
    line, _ = fakes(2, 2)
    seat = line.join().start(iter(()))
    assert seat.get(WAIT_S) is None
    waiting = line.join()
    line.close()
    line.close()
    for call in (line.join, waiting.get):
        with pytest.raises(SessionClosed, match="the line was closed"):
            call()


def test_a_stream_that_left_says_so() -> None:
    line, _ = fakes(2, 1)
    with line:
        seat = line.join().start(numbered(1))
        seat.close()
        with pytest.raises(SessionClosed, match="has left the line"):
            drained(seat)
        with pytest.raises(TimeoutError):
            line.join().get(0.0)


@pytest.mark.heavy
def test_many_come_and_go_and_leave_nothing_behind() -> None:
    before = threading.active_count()
    line, _ = fakes(2, 2)
    with line:
        for number in range(300):
            seat = line.join(stream=number).start(numbered(3))
            for _ in range(number % 4):
                seat.get(WAIT_S)
            seat.close()
        assert line.load.streams == 0
        assert threading.active_count() <= before + 2
    assert threading.active_count() <= before


def test_what_cannot_share_a_line_is_refused() -> None:
    engine = video_engine()
    image_HWC = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(ConfigError, match="seats=0"):
        engine.line(seats=0)
    with pytest.raises(ScheduleError, match="2 ranks needs at least one seat"):
        ThreadLine(CASE.config, plan(num_steps=2, num_ranks=2), [[Fake()]])
    with fakes(1, 1)[0] as line:
        with pytest.raises(ConfigError, match="configured otherwise"):
            engine.stream(image_HWC, "talk", line=line)
        with pytest.raises(ConfigError, match="num_ranks=2"):
            engine.stream(image_HWC, "talk", line=line, num_ranks=2)


def test_a_stream_that_cannot_begin_gives_its_seat_back() -> None:
    engine = video_engine()
    with engine.line(seats=1) as line:
        with pytest.raises(ConfigError, match="the reference must be"):
            engine.stream(np.zeros((8, 8, 3), np.uint8), "talk", line=line)
        assert line.load.streams == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 120), st.booleans()), max_size=150))
def test_nobody_starves(moves: list[tuple[int, int, bool]]) -> None:
    """While a chunk waits, another stream enters once with one that waited already, and then only with chunks that are
    due before it, of which a stream has one per period.
    """
    turns, now, period = Turns[int](100), 0, 100
    due = dict.fromkeys(range(4), 0)
    waiting: dict[int, tuple[int, int]] = {}
    entered: list[tuple[int, int]] = []
    for stream in due:
        turns.join(stream, now)
    for stream, wait, takes in moves:
        now += wait
        if stream not in waiting:
            turns.offer(stream, now)
            begun = any(other == stream for other, _ in entered)
            waiting[stream] = now, max(due[stream], now) if begun else due[stream]
        if takes:
            taken = turns.take()
            assert taken is not None
            since, deadline = waiting.pop(taken)
            due[taken] = deadline + period
            entered.append((taken, now))
            for other in due:
                overtook = sum(stream == other and at >= since for stream, at in entered[:-1])
                assert overtook <= 2 + max(0, deadline - since) // period


def test_streams_that_always_have_a_chunk_share_alike() -> None:
    turns = Turns[int](100)
    for stream in range(5):
        turns.join(stream, 3 * stream)
        turns.offer(stream, 20)
    taken: list[int] = []
    for _ in range(100):
        stream = turns.take()
        assert stream is not None
        taken.append(stream)
        turns.offer(stream, 20)
    assert all(sorted(taken[n : n + 5]) == list(range(5)) for n in range(0, 100, 5))


def test_a_stream_that_paused_has_saved_nothing_up() -> None:
    turns = Turns[str](100)
    for stream in ("steady", "paused"):
        turns.join(stream, 0)
        turns.offer(stream, 0)
        assert turns.take() == stream
    for now in range(100, 1000, 100):
        turns.offer("steady", now)
        assert turns.take() == "steady"
    taken: list[str] = []
    for stream in ("steady", "paused"):
        turns.offer(stream, 1000)
    for _ in range(6):
        stream = turns.take()
        assert stream is not None
        taken.append(stream)
        turns.offer(stream, 1000)
    assert taken == ["steady", "paused"] * 3


def test_a_film_waits_for_who_keeps_to_the_clock() -> None:
    turns = Turns[str](100)
    turns.join("film", 0, live=False)
    for _ in range(9):
        turns.offer("film", 0)
        assert turns.take() == "film"
    turns.join("live", 0)
    for now in range(0, 800, 100):
        turns.offer("live", now)
        turns.offer("film", now)
        assert turns.take() == "live"


def test_a_film_that_joins_late_or_pauses_shares_with_those_that_are_ahead() -> None:
    turns = Turns[str](100)

    def enter(count: int, *films: str) -> list[str | None]:
        taken: list[str | None] = []
        for _ in range(count):
            for film in films:
                turns.offer(film, 50)
            taken.append(turns.take())
        return taken

    turns.join("early", 0, live=False)
    assert enter(9, "early") == ["early"] * 9
    turns.join("late", 50, live=False)
    assert sorted(enter(6, "early", "late")) == ["early"] * 3 + ["late"] * 3
    turns.leave("late")
    turns.join("third", 50, live=False)
    enter(2, "third")
    assert enter(9, "early").count("early") >= 8
    assert enter(6, "early", "third").count("early") >= 2


def test_a_period_is_some_time() -> None:
    with pytest.raises(ConfigError, match="period_us=0"):
        Turns[int](0)
