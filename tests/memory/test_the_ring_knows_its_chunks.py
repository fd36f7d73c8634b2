"""Which chunk lives where is integer arithmetic, and every order but the right one is an error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamdiff.errors import MemoryOrderError
from streamdiff.memory import Ring


class Model:
    """The same ring, slowly: what each slot and the spill hold, moved by hand."""

    def __init__(self, window: int, slack: int, keeps_first: bool = False) -> None:
        self.window, self.slack, self.keeps_first = window, slack, keeps_first
        self.slots: dict[int, int] = {}
        self.spill: dict[int, int] = {}

    def admit(self, ring: Ring, chunk: int) -> None:
        slot = ring.admit(chunk)
        if slot.evicted is not None:
            assert self.slots[slot.index] == slot.evicted
            if self.slack:
                self.spill[slot.evicted % self.slack] = slot.evicted
        self.slots[slot.index] = chunk
        wanted = {*range(max(0, chunk - self.window + 1), chunk + 1)}
        if self.keeps_first and len(wanted) == self.window:
            wanted = {0, *sorted(wanted)[1:]}
        assert slot.filled == len(wanted)
        assert {self.slots[i] for i in range(slot.filled)} == wanted
        assert set(ring.resident) == wanted
        assert self.slots[ring.slot_of(chunk)] == chunk

    def rewind(self, ring: Ring, chunk: int) -> None:
        for restore in ring.rewind(chunk):
            assert self.spill[restore.spill] == restore.chunk
            self.slots[restore.slot] = restore.chunk


@given(
    window=st.integers(1, 5),
    slack=st.integers(0, 5),
    keeps_first=st.booleans(),
    moves=st.lists(st.integers(-7, 1), max_size=60),
)
def test_a_chunk_always_sees_exactly_its_window(window: int, slack: int, keeps_first: bool, moves: list[int]) -> None:
    window += keeps_first
    ring, latest = Ring(window=window, slack=slack, keeps_first=keeps_first), -1
    model = Model(window, slack, keeps_first)
    model.admit(ring, latest := 0)
    for move in moves:
        if move == 1:
            model.admit(ring, latest := latest + 1)
        elif move == 0:
            model.admit(ring, latest)
        else:
            target = max(0, latest + move + 1)
            try:
                model.rewind(ring, target)
            except MemoryOrderError:
                assert latest - target > 0  # only a rewind past the slack may fail
                continue
            model.admit(ring, latest := target)


@given(window=st.integers(1, 5), slack=st.integers(0, 6), length=st.integers(1, 40), back=st.integers(0, 6))
def test_slack_chunks_can_be_taken_back(window: int, slack: int, length: int, back: int) -> None:
    ring = Ring(window=window, slack=slack)
    for chunk in range(length):
        ring.admit(chunk)
    target = max(0, length - 1 - min(back, slack))
    ring.rewind(target)
    assert ring.latest == target - 1


@pytest.mark.parametrize("chunk", [-1, 1, 2, 4, 6, 100])
def test_out_of_turn_is_an_error(chunk: int) -> None:
    ring = Ring(window=2, slack=0)
    for c in range(4):
        ring.admit(c)
    if chunk == 4:
        assert ring.admit(chunk).index == 0
        return
    with pytest.raises(MemoryOrderError, match=f"chunk {chunk} came out of turn"):
        ring.admit(chunk)


def test_a_first_chunk_that_is_kept_is_always_resident() -> None:
    ring, seen = Ring(window=3, slack=0, keeps_first=True), []
    for chunk in range(6):
        ring.admit(chunk)
        seen.append(ring.resident)
    assert seen == [(0,), (0, 1), (0, 1, 2), (0, 2, 3), (0, 3, 4), (0, 4, 5)]


def test_a_stream_starts_with_chunk_0() -> None:
    with pytest.raises(MemoryOrderError, match="takes 0;"):
        Ring(window=2, slack=0).admit(1)


def test_a_rewind_too_far_says_how_much_slack_it_needs() -> None:
    ring = Ring(window=3, slack=1)
    for c in range(10):
        ring.admit(c)
    with pytest.raises(MemoryOrderError, match="slack_chunks=4 or more"):
        ring.rewind(5)
    ring.rewind(8)  # the failed attempt changed nothing
    assert ring.admit(8).index == 2
