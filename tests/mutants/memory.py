"""Faults of what is remembered: which chunk lives where, what a rewind brings back, how the sink is turned."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

FRAMES = "engine/test_the_engine_makes_the_frames_of_the_oracle.py::"
WINDOW = FRAMES + "test_each_step_sees_its_own_noisy_past_and_forgets_what_left_the_window"
BACK = FRAMES + "test_chunks_that_left_the_window_come_back"
FURTHER = FRAMES + "test_a_second_interruption_goes_further_back_and_a_third_no_further_than_the_slack"
FIRST = FRAMES + "test_a_kept_first_chunk_moves_along"
FIRST_ANEW = FRAMES + "test_a_kept_first_chunk_made_anew_is_the_one_that_is_kept"
SINK = FRAMES + "test_the_sink_waits_then_leads_by_what_was_drawn_for_the_chunk"
MOTION = FRAMES + "test_a_motion_prefix_stays_where_it_is"
EIGHT = "memory/test_the_first_chunk_stays.py::test_eight_bits_keep_it_as_well"
RINGS = "memory/test_the_ring_knows_its_chunks.py::"

RING = (
    Mutant("memory/ring.py", "return chunk % self.window", "return (chunk + 1) % self.window", WINDOW),
    Mutant("memory/ring.py", "1 + (chunk - 1) % self._period", "1 + chunk % self._period", FIRST),
    Mutant("memory/ring.py", "self._period = window - 1 if keeps_first else window", "self._period = window", FIRST),
    Mutant(
        "memory/ring.py",
        "range(max(0, chunk - self._period + 1), chunk + 1)",
        "range(max(0, chunk - self._period), chunk + 1)",
        BACK,
    ),
    Mutant(
        "memory/ring.py",
        "return (0, *recent) if self.keeps_first and 0 not in recent and recent else recent",
        "return recent",
        RINGS + "test_a_first_chunk_that_is_kept_is_always_resident",
    ),
    Mutant("memory/ring.py", "filled=min(chunk + 1, self.window)", "filled=self.window", WINDOW),
    Mutant("memory/ring.py", "filled=min(chunk + 1, self.window)", "filled=min(chunk or 1, self.window)", WINDOW),
    Mutant("memory/ring.py", "            evicted = chunk - self._period\n", "            evicted = chunk\n", BACK),
    Mutant("memory/ring.py", "self._spilled[evicted % self.slack] = evicted", "pass", BACK),
    Mutant(
        "memory/ring.py",
        "lost = [c for c in needed if self._held.get(self.slot_of(c)) != c]",
        "lost: list[int] = []",
        BACK,
    ),
    Mutant("memory/ring.py", "needed = self._up_to(chunk)[:-1]", "needed = self._up_to(chunk)[1:]", BACK),
    Mutant(
        "memory/ring.py",
        "self.latest = chunk - 1\n        return",
        "self.latest = chunk\n        return",
        RINGS + "test_slack_chunks_can_be_taken_back",
    ),
    Mutant(
        "memory/ring.py",
        "        if missing:\n",
        "        if not missing and lost:\n",
        RINGS + "test_a_rewind_too_far_says_how_much_slack_it_needs",
    ),
    Mutant(
        "memory/ring.py",
        "if chunk not in (self.latest, self.latest + 1) or chunk < 0:",
        "if chunk > self.latest + 1:",
        RINGS + "test_out_of_turn_is_an_error",
    ),
    Mutant("memory/ring.py", '"lead", seed, stream, chunk)', '"lead", seed, stream, 0)', SINK),
    Mutant("memory/ring.py", '"lead", seed, stream, chunk)', '"lead", seed, 0, chunk)', SINK),
    Mutant("memory/ring.py", '"lead", seed, stream, chunk)', '"lead", 0, stream, chunk)', SINK),
)

STEP = (
    Mutant("memory/step.py", "self.values_ZBSNK[layer].copy_(values_BSNK)", "pass", WINDOW),
    Mutant(
        "memory/step.py",
        "rows_ZBSNK.copy_(self._sink.values_ZBSNK)",
        "rows_ZBSNK.add_(self._sink.values_ZBSNK)",
        FRAMES + "test_a_prompt_switched_in_mid_stream_changes_the_sink_as_well",
    ),
    Mutant("memory/step.py", "        if still is not None:\n", "        if still is None:\n", MOTION),
    Mutant("memory/step.py", "still, first_row=self._sink.moving_tokens)", "still, first_row=0)", MOTION),
    Mutant(
        "memory/step.py",
        "self._turn(self._sink.moving_keys_ZBSNK, rotation, first_row=0)",
        "moving = self._sink.moving_keys_ZBSNK\n"
        "        self._turn(moving, rotation, first_row=0)\n"
        "        moving.copy_(self.keys_ZBMNK[:, :, : moving.shape[2]])",
        SINK,
    ),
    Mutant("memory/step.py", "            self._knows_first = True\n", "            pass\n", FIRST),
    Mutant("memory/step.py", "self._knows_first = self._knows_first and chunk > 0", "pass", FIRST_ANEW),
    Mutant("memory/step.py", "shift, first_row=self.sink_tokens)", "shift, first_row=0)", FIRST),
    Mutant("memory/step.py", "kept[spill].copy_(ring[:, :, rows])", "pass", BACK),
    Mutant(
        "memory/step.py",
        "in zip(self._rings, self._spills, strict=True):\n                kept[spill]",
        "in zip(self._rings[:1], self._spills[:1], strict=True):\n                kept[spill]",
        BACK,
    ),
    Mutant("memory/step.py", "ring[:, :, rows].copy_(kept[restore.spill])", "pass", BACK),
    Mutant("memory/step.py", "rows = self._rows(restore.slot)", "rows = self._rows(restore.spill)", BACK),
    Mutant("memory/step.py", "self.slot_index.fill_(index)", "pass", WINDOW),
    Mutant(
        "memory/step.py",
        "self.length_on_host = self.sink_tokens + filled * self.chunk_tokens",
        "self.length_on_host = filled * self.chunk_tokens",
        WINDOW,
    ),
    Mutant(
        "memory/step.py",
        "start = self.sink_tokens + slot * self.chunk_tokens",
        "start = slot * self.chunk_tokens",
        BACK,
    ),
    Mutant(
        "memory/step.py",
        "keys_ZBLNK = keys_ZBLNK.float() * self.key_scale_ZBN[:, :, None, :, None]",
        "keys_ZBLNK = keys_ZBLNK.float()",
        EIGHT,
    ),
)

MUTANTS = (*RING, *STEP)
