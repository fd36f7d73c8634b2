"""Faults of a line that many streams share: whose turn it is, whose seat, who waits for whom."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

LINE = "engine/test_a_line_serves_many_streams.py::"
EIGHT = LINE + "test_streams_that_come_and_go_on_fewer_seats[3-4]"
ALIKE = LINE + "test_streams_that_always_have_a_chunk_share_alike"
PAUSED = LINE + "test_a_stream_that_paused_has_saved_nothing_up"
FILM = LINE + "test_a_film_waits_for_who_keeps_to_the_clock"
LATE = LINE + "test_a_film_that_joins_late_or_pauses_shares_with_those_that_are_ahead"
FULL = LINE + "test_a_full_line_answers_at_once_and_says_when_to_ask_again"
KEEPS_UP = LINE + "test_no_more_live_streams_are_let_in_than_the_slowest_rank_keeps_up_with"
FIRST = LINE + "test_the_first_chunk_of_a_stream_does_not_count_where_there_are_others"
ALONE = LINE + "test_a_stream_that_fails_fails_alone_and_its_seat_is_free_again"

TURNS = (
    Mutant("pipeline/turns.py", "first = min(ready,", "first = max(ready,", ALIKE),
    Mutant("pipeline/turns.py", "deadline_us + self._period_us", "deadline_us", FILM),
    Mutant("pipeline/turns.py", "            due_us = max(due_us, now_us)\n", "            pass\n", PAUSED),
    Mutant("pipeline/turns.py", "due_us = max(due_us, now_us)", "due_us = now_us", FILM),
    Mutant(
        "pipeline/turns.py",
        "        if stream in self._begun:\n",
        "        if stream:\n",
        "docs/test_examples_in_docstrings_run.py::test_doctests_of[streamdiff.pipeline.turns]",
    ),
    Mutant("pipeline/turns.py", "max(due_us, self._ahead_us) if stream", "due_us if stream", LATE),
    Mutant("pipeline/turns.py", "if stream in self._films else due_us", "if stream else due_us", FILM),
)

SEATS = (
    Mutant("pipeline/thread_line.py", "stage.begin(seed=seat.key[0], stream=seat.key[1])", "pass", EIGHT),
    Mutant(
        "pipeline/line.py",
        "self._under_way < self._line.depth:",
        "self._under_way <= self._line.depth:",
        LINE + "test_no_more_chunks_are_under_way_than_an_interruption_can_take_back",
    ),
    Mutant("pipeline/line.py", "                self._free.append(seat.number)\n", "                pass\n", FULL),
    Mutant(
        "pipeline/line.py",
        "max(self._worst_wait_us, self._now_us() - since_us)",
        "max(self._worst_wait_us, since_us)",
        LINE + "test_how_long_a_chunk_waits_for_its_turn_is_told",
    ),
    Mutant("pipeline/line.py", "self.streams >= self.seats", "self.streams > self.seats", FULL),
    Mutant("pipeline/line.py", "if live and self.live >= self.fits:", "if self.live >= self.fits:", KEEPS_UP),
    Mutant("pipeline/line.py", "self.live >= self.fits", "self.live > self.fits", KEEPS_UP),
    Mutant("pipeline/line.py", "live=sum(self._seats.values()),", "live=len(self._seats) - 1,", KEEPS_UP),
    Mutant(
        "pipeline/line.py",
        "return max(1, self.period_us",
        "return max(0, self.period_us",
        LINE + "test_an_empty_line_takes_a_live_stream_however_slow_it_is",
    ),
    Mutant("pipeline/line.py", "        if chunk == 0:\n", "        if chunk < 0:\n", FIRST),
    Mutant("pipeline/line.py", "self._busy_us[rank] if self._timed[rank] else took_us", "self._busy_us[rank]", FIRST),
    Mutant(
        "pipeline/thread_line.py",
        "            seat.fail(error)\n            return None\n",
        "            raise\n",
        ALONE,
    ),
    Mutant(
        "pipeline/thread_line.py",
        "give_back=returned.put if rank == last_dit else None",
        "give_back=returned.put if rank == 0 else None",
        EIGHT,
    ),
)

STANDS_IN = "pipeline/test_a_stage_can_be_stood_in_for.py::test_a_new_stage_for_every_chunk"
WHOLE = "pipeline/test_an_album_keeps_what_a_rank_remembers.py::test_what_was_told_is_whole_until_the_next_is_told"
ROOM = "pipeline/test_an_album_keeps_what_a_rank_remembers.py::test_only_new_names_are_copied_and_room_is_used_again"
LAYOUT = "pipeline/test_an_album_keeps_what_a_rank_remembers.py::test_a_tensor_comes_back_as_it_was[channels last]"
ONCE = "pipeline/test_an_edge_outlives_its_ends.py::test_every_entry_comes_once_and_in_order"

KEPT = (
    Mutant("memory/step.py", 'facts["latest"], held, spilled)', 'facts["latest"], held, {})', STANDS_IN),
    Mutant("memory/step.py", '{f"{self._written[c]}/{i}": ring[', '{f"{c}/{i}": ring[', STANDS_IN),
    Mutant(
        "memory/step.py",
        '                spill[place].copy_(kept.tensors[f"{self._written[chunk]}/{i}"])\n',
        "                pass\n",
        STANDS_IN,
    ),
    Mutant("pipeline/denoise.py", "self._told[1] += 1", "pass", STANDS_IN),
    Mutant("pipeline/denoise.py", 'self._told = facts["key"], list', "self._told = (0, 0), list", STANDS_IN),
    Mutant("pipeline/decode.py", "num_latents, tuple(kept", "0, tuple(kept", STANDS_IN),
    Mutant("pipeline/decode.py", "        self._states += 1\n", "        self._states = chunk\n", STANDS_IN),
    Mutant("pipeline/album.py", "begin - offset >= num_bytes", "begin - offset >= 1", WHOLE),
    Mutant("pipeline/album.py", "for cells in self._cells.values() for", "for cells in () for", WHOLE),
    Mutant("pipeline/album.py", "if begin - offset >= num_bytes:", "if num_bytes < 0:", ROOM),
    Mutant("pipeline/album.py", "if name not in new[owner]:", "if True:", ROOM),
    Mutant("pipeline/album.py", "tuple(stride))", "torch.empty(shape).stride())", LAYOUT),
    Mutant("pipeline/edges.py", "                        self._last = number\n", "", ONCE),
)

MUTANTS = (*TURNS, *SEATS, *KEPT)
