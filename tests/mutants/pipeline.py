"""Faults of what decides and of what obeys: the intake, the stages, the links between them."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

FRAMES = "engine/test_the_engine_makes_the_frames_of_the_oracle.py::"
WINDOW = FRAMES + "test_each_step_sees_its_own_noisy_past_and_forgets_what_left_the_window"
PROMPT = FRAMES + "test_a_prompt_switched_in_mid_stream_changes_the_sink_as_well"
SINK = FRAMES + "test_the_sink_waits_then_leads_by_what_was_drawn_for_the_chunk"
MOTION = FRAMES + "test_a_motion_prefix_stays_where_it_is"
REFRESH = FRAMES + "test_a_refreshed_sink_is_the_first_latent_of_the_stream"
SOURCE = FRAMES + "test_the_latent_that_becomes_the_sink_is_that_of_the_chunk_made_last"
OBEYED = FRAMES + "test_commands_that_were_obeyed_stay_obeyed"
BACK = FRAMES + "test_chunks_that_left_the_window_come_back"
FURTHER = FRAMES + "test_a_second_interruption_goes_further_back_and_a_third_no_further_than_the_slack"
FIRST = FRAMES + "test_a_kept_first_chunk_moves_along"
NOISE = FRAMES + "test_fresh_noise_is_drawn_for_every_step_of_every_chunk"
TURNS = "pipeline/test_threads_end_together.py::test_a_packet_out_of_turn_is_refused"

INTAKE = (
    Mutant("pipeline/intake.py", "commands.append(SwitchPrompt(self._prompt))", "pass", PROMPT),
    Mutant("pipeline/intake.py", "                self._epoch += 1\n", "", BACK),
    Mutant("pipeline/intake.py", "commands.append(Rewind(self._chunk))", "pass", BACK),
    Mutant(
        "pipeline/intake.py",
        "                    self._asked = False ",
        "                    self._asked = True ",
        SOURCE,
    ),
    Mutant(
        "pipeline/intake.py",
        "self._chunk - config.memory.slack_chunks - 1)",
        "self._chunk - config.memory.slack_chunks)",
        FURTHER,
    ),
    Mutant(
        "pipeline/intake.py",
        "max(self._oldest, self._chunk - config.memory.slack_chunks - 1)",
        "max(0, self._chunk - config.memory.slack_chunks - 1)",
        FURTHER,
    ),
    Mutant("pipeline/intake.py", "min(max(chunk, self._oldest), next_chunk)", "min(chunk, next_chunk)", FURTHER),
    Mutant(
        "pipeline/intake.py",
        "chunk >= refresh and not self._refreshed",
        "chunk > refresh and not self._refreshed",
        REFRESH,
    ),
    Mutant(
        "pipeline/intake.py",
        "chunk >= refresh and not self._refreshed",
        "chunk >= refresh and self._refreshed",
        REFRESH,
    ),
    Mutant(
        "pipeline/intake.py",
        "chunk >= refresh and not self._refreshed",
        "chunk == refresh",
        FRAMES + "test_a_refreshed_sink_stays_when_even_its_source_is_made_anew",
    ),
    Mutant(
        "pipeline/intake.py",
        "                chunk=chunk,\n                low",
        "                chunk=0,\n                low",
        SINK,
    ),
    Mutant(
        "pipeline/intake.py", "stream=self._stream, chunk=chunk)", "stream=self._stream, chunk=chunk + epoch)", BACK
    ),
)

DENOISE = (
    Mutant(
        "pipeline/denoise.py",
        "command.text_BPC)\n                    stale_sink = True",
        "command.text_BPC)\n                    stale_sink = stale_sink or self._reference is None",
        PROMPT,
    ),
    Mutant(
        "pipeline/denoise.py",
        "self._text = self._weights.text_condition(command.text_BPC)",
        "self._text = self._text or self._weights.text_condition(command.text_BPC)",
        PROMPT,
    ),
    Mutant(
        "pipeline/denoise.py",
        "self._reference = replace(self._reference, reference_BCTHW=command.latent_BCTHW)\n",
        "pass\n",
        REFRESH,
    ),
    Mutant(
        "pipeline/denoise.py",
        "latent_BCTHW)\n                    self._told[0] += 1\n                    stale_sink = True",
        "latent_BCTHW)\n                    self._told[0] += 1",
        REFRESH,
    ),
    Mutant(
        "pipeline/denoise.py",
        "replace(self._reference, reference_BCTHW=command.latent_BCTHW)\n                    self._told[0] += 1",
        "SetReference(command.latent_BCTHW, command.latent_BCTHW.expand(-1, -1, 19, -1, -1))",
        MOTION,
    ),
    Mutant(
        "pipeline/denoise.py",
        "step.memory.rewind(command.chunk)",
        "step.memory.rewind(step.memory.ring.latest + 1)",
        BACK,
    ),
    Mutant(
        "pipeline/denoise.py",
        "first_frame = packet.chunk * config",
        "first_frame = (packet.chunk + packet.epoch) * config",
        BACK,
    ),
    Mutant("pipeline/denoise.py", "step.memory.turn_sink(sink)\n", "pass\n", SINK),
    Mutant("pipeline/denoise.py", "step.memory.turn_first(moved)\n", "pass\n", FIRST),
    Mutant("pipeline/denoise.py", "lead=packet.lead, origin", "lead=config.memory.sink_lead_min, origin", SINK),
    Mutant("pipeline/denoise.py", "if not self._config.renoise or step", "if step", WINDOW),
    Mutant("pipeline/denoise.py", "if not self._config.renoise or step", "if self._config.renoise or step", NOISE),
    Mutant("pipeline/denoise.py", "chunk=chunk, step=step.index)", "chunk=chunk, step=0)", NOISE),
    Mutant(
        "pipeline/denoise.py",
        "stream=self._stream, chunk=chunk, step=step.index)",
        "stream=0, chunk=chunk, step=step.index)",
        NOISE,
    ),
    Mutant(
        "pipeline/denoise.py",
        "self._dit.modulation(config.sigmas[index])",
        "self._dit.modulation(config.sigmas[0])",
        WINDOW,
    ),
    Mutant(
        "pipeline/denoise.py",
        "ServedWeights(dit, options) if weights is None else weights.apart()",
        "ServedWeights(dit, options) if weights is None else weights",
        "models/test_a_graph_follows_the_stream.py::test_streams_that_share_weights_keep_their_own_prompt_and_sound",
    ),
    Mutant("pipeline/denoise.py", "self._clean = dit.modulation(0.0)", "self._clean = dit.modulation(1.0)", WINDOW),
    Mutant("pipeline/denoise.py", "position=self._config.memory.sink_position,\n", "position=0,\n", MOTION),
    Mutant(
        "pipeline/denoise.py",
        "window_chunks=config.memory.window_chunks,",
        "window_chunks=config.memory.window_chunks + 1,",
        WINDOW,
    ),
    Mutant("pipeline/denoise.py", "slack_chunks=config.memory.slack_chunks,", "slack_chunks=0,", BACK),
    Mutant(
        "pipeline/denoise.py",
        "self._steps = [self._make_step(index) for index in steps]",
        "self._steps = [self._make_step(steps[0]) for _ in steps]",
        NOISE,
    ),
)

DECODE = (
    Mutant(
        "pipeline/decode.py",
        "self._before = {c: s for c, s in self._before.items() if c <= command.chunk}",
        "self._before = {command.chunk: self._before[max(self._before)]}",
        BACK,
    ),
    Mutant("pipeline/decode.py", "if c <= command.chunk}", "if c < command.chunk}", BACK),
    Mutant(
        "pipeline/decode.py",
        "self._before.pop(packet.chunk - self._slack - 1, None)",
        "self._before.pop(packet.chunk - self._slack, None)",
        BACK,
    ),
    Mutant(
        "pipeline/decode.py",
        "self._remember(packet.chunk + 1, after)",
        "self._remember(packet.chunk + 1, state)",
        WINDOW,
    ),
    Mutant("pipeline/decode.py", "latents[:, :, :PRIMING_LATENTS]", "latents[:, :, :1]", WINDOW),
    Mutant("pipeline/decode.py", "PRIMING_LATENTS = 7", "PRIMING_LATENTS = 6", WINDOW),
)

LINES = (
    Mutant(
        "pipeline/link.py",
        "self._returned.get(source_chunk, self._will_return[source_chunk])",
        "self._returned.get(source_chunk, 0)",
        SOURCE,
    ),
    Mutant(
        "pipeline/link.py", "packet.latent_BCTHW[:, :, :1].clone()", "packet.latent_BCTHW[:, :, -1:].clone()", REFRESH
    ),
    Mutant(
        "pipeline/link.py",
        "give_back=returned.put if rank == last_dit_rank else None",
        "give_back=returned.put if rank == 0 else None",
        REFRESH,
    ),
    Mutant(
        "pipeline/link.py",
        "packet.epoch == last.epoch and packet.chunk == last.chunk + 1",
        "packet.epoch == last.epoch",
        TURNS,
    ),
    Mutant(
        "pipeline/link.py",
        "packet.epoch > last.epoch and rewind.chunk",
        "packet.epoch >= last.epoch and rewind.chunk",
        TURNS,
    ),
    Mutant(
        "pipeline/link.py",
        "in self._will_return.items() if c < command.chunk}",
        "in self._will_return.items()}",
        "pipeline/test_threads_end_together.py::test_a_refresh_that_nobody_returns_is_refused",
    ),
    Mutant(
        "pipeline/stage.py",
        "for stage in self._stages:\n            packet",
        "for stage in self._stages[::-1]:\n            packet",
        WINDOW,
    ),
)

MUTANTS = (*INTAKE, *DENOISE, *DECODE, *LINES)
