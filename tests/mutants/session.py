"""Faults of a stream and of its session: what is stale, what was played, what a player is told."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

SHOWN = "engine/test_a_stream_shows_the_frames_of_the_oracle.py::"
AHEAD = SHOWN + "test_what_was_made_ahead_is_taken_back"
HELD = SHOWN + "test_what_the_player_holds_is_made_anew"
LOST = SHOWN + "test_what_memory_does_not_reach_is_lost_and_never_shown"
ENDED = SHOWN + "test_an_utterance_that_was_heard_to_its_end_is_not_interrupted"
STALE_SOUND = SHOWN + "test_sound_that_was_cut_before_an_interruption_is_not_heard_after_it"
SESSION = "session/test_a_session_over_a_scripted_stream.py::"
GIVEN = SESSION + "test_what_was_given_counts_as_played_unless_the_player_says_less"
LEFT = SESSION + "test_frames_that_a_given_up_wait_left_are_shown_unless_they_are_stale"

STREAM = (
    Mutant(
        "pipeline/stream.py",
        "if heard.epoch != self._backlog.epoch and heard.utterance is not None:",
        "if heard.epoch > self._backlog.epoch:",
        STALE_SOUND,
    ),
    Mutant("pipeline/stream.py", "(self._intake.epoch, cut)]", "(self._intake.epoch, resumes)]", LOST),
    Mutant("pipeline/stream.py", "packet.chunk >= chunk for epoch", "packet.chunk > chunk for epoch", AHEAD),
    Mutant(
        "pipeline/stream.py",
        "self._rewinds = [*self._rewinds[-64:], (",
        "self._rewinds = [(",
        SHOWN + "test_what_one_interruption_made_stale_stays_so_after_a_later_one",
    ),
    Mutant(
        "pipeline/stream.py",
        "kept = self._shown if position_s is None else min(self._shown, self._chunks_until(position_s))",
        "kept = self._shown",
        HELD,
    ),
    Mutant(
        "pipeline/stream.py",
        "if chunk >= kept and made.heard.utterance)",
        "if chunk > kept and made.heard.utterance)",
        AHEAD,
    ),
    Mutant(
        "pipeline/stream.py",
        "            self._backlog.drop()\n",
        "            self._backlog.epoch += 1\n",
        SHOWN + "test_an_interruption_ends_the_utterance_that_is_being_pushed",
    ),
    Mutant(
        "pipeline/stream.py",
        "resumes = self._intake.take_back(cut)",
        "resumes = self._intake.take_back(stale[-1])",
        AHEAD,
    ),
    Mutant(
        "pipeline/stream.py",
        "self._shown, self._next_shown(), 0",
        "self._shown, self._shown, 0",
        SHOWN + "test_after_a_loss_the_next_interruption_says_where_the_stream_goes_on",
    ),
    Mutant("pipeline/stream.py", "if chunk < cut}", "if chunk <= cut}", HELD),
    Mutant("pipeline/stream.py", "self._shown = min(self._shown, resumes)", "pass", HELD),
    Mutant("pipeline/stream.py", "sum(chunk >= cut for chunk in self._made)", "len(stale[1:])", AHEAD),
    Mutant(
        "pipeline/stream.py", "lambda c: c < chunk - self._config.memory.slack_chunks - 1", "lambda c: c <= chunk", HELD
    ),
    Mutant(
        "pipeline/stream.py",
        "math.ceil(position_s * self.fps / self._frames - 1e-6)",
        "math.floor(position_s * self.fps / self._frames - 1e-6)",
        HELD,
    ),
    Mutant(
        "pipeline/stream.py",
        "math.ceil(position_s * self.fps / self._frames - 1e-6)",
        "math.ceil(position_s * self.fps / self._frames + 1e-6)",
        HELD,
    ),
    Mutant("pipeline/stream.py", "            self._prompt = text\n", "            pass\n", AHEAD),
    Mutant("pipeline/stream.py", "            self._intake.switch_prompt(text_BPC)\n", "", AHEAD),
    Mutant(
        "pipeline/stream.py", "and not (being_heard.heard.ends and not stale)", "and being_heard.heard.audio", ENDED
    ),
    Mutant(
        "pipeline/stream.py",
        "being_heard.heard.start_s + being_heard.heard.speech_s",
        "being_heard.heard.start_s",
        AHEAD,
    ),
    Mutant("pipeline/stream.py", "cut_s=self._pts(cut),", "cut_s=self._pts(resumes),", LOST),
)

PLAYOUT = (
    Mutant(
        "pipeline/playout.py",
        "self._held_S = np.zeros(0, np.float32)\n        self._heard_all",
        "self._heard_all",
        SHOWN + "test_speech_that_was_begun_and_interrupted_is_not_heard_in_the_next",
    ),
    Mutant(
        "pipeline/playout.py",
        "self._said = utterance, self._said_s + speech_s",
        "self._said = utterance, speech_s",
        AHEAD,
    ),
)

FACE = (
    Mutant("session.py", "if shown.epoch >= self._epoch or shown.pts < self._cut_s:", "if shown.pts >= 0:", LEFT),
    Mutant(
        "session.py",
        "if shown.epoch >= self._epoch or shown.pts < self._cut_s:",
        "if shown.epoch >= self._epoch:",
        SESSION + "test_frames_of_before_the_cut_are_shown_after_an_interruption",
    ),
    Mutant("session.py", "else min(cursor_s, given_s))", "else cursor_s)", GIVEN),
    Mutant("session.py", "given_s if cursor_s is None else", "0.0 if cursor_s is None else", GIVEN),
    Mutant("session.py", "self._given_s = min(self._given_s, interrupted.cut_s)", "pass", GIVEN),
    Mutant("session.py", "cursor_s = self._cursor_s if played_s is None else played_s", "cursor_s = played_s", GIVEN),
    Mutant("session.py", "shown.pts + Fraction(len(shown.frames_THWC), self.fps)", "shown.pts", GIVEN),
    Mutant("session.py", "await asyncio.shield(self._pending)", "await self._pending", LEFT),
)

MUTANTS = (*STREAM, *PLAYOUT, *FACE)
