"""Faults of noise and of positions: which noise a chunk gets, how it is stepped on, where tokens and the sink sit."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

FRAMES = "engine/test_the_engine_makes_the_frames_of_the_oracle.py::"
WINDOW = FRAMES + "test_each_step_sees_its_own_noisy_past_and_forgets_what_left_the_window"
SINK = FRAMES + "test_the_sink_waits_then_leads_by_what_was_drawn_for_the_chunk"
NOISE = FRAMES + "test_fresh_noise_is_drawn_for_every_step_of_every_chunk"
MOTION = FRAMES + "test_a_motion_prefix_stays_where_it_is"
FIRST = FRAMES + "test_a_kept_first_chunk_moves_along"
GRIDS = "flow/test_noise_becomes_data.py::"
EXAMPLES = "docs/test_examples_in_docstrings_run.py::test_doctests_of"

FLOW = (
    Mutant("flow.py", '"noise", seed, stream, chunk, 0)', '"noise", seed, stream, 0, 0)', NOISE),
    Mutant("flow.py", '"noise", seed, stream, chunk, 0)', '"noise", seed, 0, chunk, 0)', NOISE),
    Mutant("flow.py", '"noise", seed, stream, chunk, 0)', '"noise", 0, stream, chunk, 0)', NOISE),
    Mutant("flow.py", '"noise", seed, stream, chunk, step + 1)', '"noise", seed, stream, chunk, 0)', NOISE),
    Mutant("flow.py", '"noise", seed, stream, chunk, step + 1)', '"noise", seed, stream, 0, step + 1)', NOISE),
    Mutant("flow.py", '"noise", seed, stream, chunk, step + 1)', '"noise", seed, 0, chunk, step + 1)', NOISE),
    Mutant("flow.py", "x_BCTHW + (sigma_next - sigma) * velocity_BCTHW", "x_BCTHW - sigma * velocity_BCTHW", WINDOW),
    Mutant("flow.py", "data_BCTHW = x_BCTHW - sigma * velocity", "data_BCTHW = x_BCTHW - sigma_next * velocity", NOISE),
    Mutant("flow.py", "(1.0 - sigma_next) * data_BCTHW + sigma", "data_BCTHW + sigma", NOISE),
    Mutant("flow.py", "sigma_next * noise_BCTHW", "sigma * noise_BCTHW", NOISE),
    Mutant(
        "flow.py",
        "(1.0 + (shift - 1.0) * sigma)",
        "(1.0 + shift * sigma)",
        GRIDS + "test_the_grid_is_the_published_schedulers",
    ),
    Mutant(
        "flow.py",
        "(*(shifted(s, shift) for s in spread), 0.0)",
        "(*spread, 0.0)",
        GRIDS + "test_the_grid_is_the_published_schedulers",
    ),
    Mutant(
        "flow.py",
        "if sigmas == shifted_grid(given):",
        "if sigmas != shifted_grid(given):",
        EXAMPLES + "[streamdiff.flow]",
    ),
)

ROPE = (
    Mutant("rope.py", "first_frame - (origin - lead))", "first_frame - origin)", SINK),
    Mutant("rope.py", "origin + max(0, first_frame - (origin - lead))", "first_frame + lead", SINK),
    Mutant("rope.py", "origin + max(0, first_frame - (origin - lead))", "origin", SINK),
    Mutant("rope.py", "return max(0, first_frame - reach)", "return first_frame", FIRST),
    Mutant("rope.py", "return max(0, first_frame - reach)", "return 0", FIRST),
    Mutant("rope.py", "THETA**-exponent_F", "THETA**exponent_F", WINDOW),
    Mutant("rope.py", "torch.arange(first, first + num_frames,", "torch.arange(0, num_frames,", WINDOW),
    Mutant(
        "rope.py", "dtype=torch.float64) / max(pairs[0], 1)))", "dtype=torch.float64) / max(sum(pairs), 1)))", WINDOW
    ),
    Mutant("rope.py", "(num_frames * self._rate_F)", "(-num_frames * self._rate_F)", FIRST),
    Mutant(
        "rope.py",
        "return torch.cat(parts, dim=-1).flatten(0, 1)",
        "return torch.cat(parts[::-1], dim=-1).flatten(0, 1)",
        WINDOW,
    ),
    Mutant("rope.py", "even_BLNF * cos_LNF - odd_BLNF * sin_LNF,", "even_BLNF * cos_LNF + odd_BLNF * sin_LNF,", WINDOW),
    Mutant("rope.py", "axis_angles(columns, pairs[2])", "axis_angles([0] * len(columns), pairs[2])", WINDOW),
    Mutant("rope.py", "(int(i * step) for i", "(round(i * step) for i", EXAMPLES + "[streamdiff.rope]"),
)

MUTANTS = (*FLOW, *ROPE)
