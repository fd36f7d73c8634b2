"""Whatever happens to a stream, on any number of ranks its frames are those of a serial reference that shares no code
with memory, rope, flow or pipeline.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.engine.oracle_case import Case, Event, assert_as_the_oracle_says, played, script_of

QUIET = Event()
ROLLING = (1, 4, 5)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_steps = draw(st.integers(1, 3))
    return Case(
        num_steps=num_steps,
        ranks=draw(st.integers(1, num_steps + 1)),
        renoise=draw(st.booleans()),
        frames_per_chunk=draw(st.integers(1, 3)),
        motion=draw(st.booleans()),
        window=draw(st.integers(1, 4)),
        keeps_first=draw(st.booleans()),
        reach=draw(st.integers(0, 8)),
        slack=draw(st.integers(0, 3)),
        sink=draw(st.sampled_from([ROLLING, (0, 0, 0), (2, 2, 9), (3, 30, 30)])),
        adaptive=draw(st.booleans()),
        refresh=draw(st.none() | st.integers(1, 4)),
        seed=draw(st.integers(0, 3)),
        stream=draw(st.integers(0, 3)),
    )


events = st.builds(
    Event,
    back=st.just(()) | st.just(()) | st.tuples(st.integers(0, 5)) | st.tuples(st.integers(0, 3), st.integers(0, 3)),
    prompt=st.none() | st.none() | st.integers(0, 2),
)
scripts = st.lists(events, min_size=5, max_size=10)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def check(case: Case, events: list[Event]) -> None:
    script = script_of(case, events)
    made = case.oracle().film(script)
    assert_as_the_oracle_says(case, played(case, script), made)


@pytest.mark.heavy
@settings(max_examples=12, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(case=cases(), events=scripts)
def test_whatever_happens(case: Case, events: list[Event]) -> None:
    check(case, events)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@settings(max_examples=200)
@given(case=cases(), events=scripts)
def test_whatever_happens_in_many_ways(case: Case, events: list[Event]) -> None:
    check(case, events)


@pytest.mark.heavy
def test_each_step_sees_its_own_noisy_past_and_forgets_what_left_the_window() -> None:
    check(Case(num_steps=2, ranks=2, window=2, adaptive=False), [QUIET] * 5)


def test_a_prompt_switched_in_mid_stream_changes_the_sink_as_well() -> None:
    check(Case(num_steps=1, adaptive=False), [QUIET, QUIET, Event(prompt=1), QUIET])


def test_the_sink_waits_then_leads_by_what_was_drawn_for_the_chunk() -> None:
    check(Case(num_steps=1, window=1, sink=(1, 4, 5), adaptive=False, seed=2, stream=3), [QUIET] * 6)


def test_a_motion_prefix_stays_where_it_is() -> None:
    check(Case(num_steps=1, motion=True, window=1, refresh=2), [QUIET, QUIET, Event(prompt=1), QUIET])


@pytest.mark.heavy
def test_a_refreshed_sink_is_the_first_latent_of_the_stream() -> None:
    check(Case(num_steps=2, ranks=2, frames_per_chunk=3), [QUIET] * 5)
    check(Case(num_steps=2, ranks=3, refresh=1), [QUIET] * 3)


def test_the_latent_that_becomes_the_sink_is_that_of_the_chunk_made_last() -> None:
    check(Case(num_steps=1, refresh=2, slack=3), [QUIET, QUIET, Event(back=(2,)), QUIET, QUIET, QUIET])


def test_a_refreshed_sink_stays_when_even_its_source_is_made_anew() -> None:
    check(Case(num_steps=1, refresh=1, slack=3), [QUIET, QUIET, QUIET, Event(back=(3,)), QUIET, QUIET])


@pytest.mark.heavy
def test_commands_that_were_obeyed_stay_obeyed() -> None:
    events = [QUIET, QUIET, Event(prompt=1), QUIET, Event(back=(3,)), QUIET, QUIET]
    check(Case(num_steps=2, ranks=3, refresh=2, slack=3), events)


def test_chunks_that_left_the_window_come_back() -> None:
    check(Case(num_steps=1, window=3, slack=2, adaptive=False), [QUIET] * 7 + [Event(back=(3,)), QUIET, QUIET])


@pytest.mark.heavy
def test_a_second_interruption_goes_further_back_and_a_third_no_further_than_the_slack() -> None:
    far = Event(back=(9,))
    events = [*[QUIET] * 6, Event(back=(1, 1)), Event(back=(1,)), QUIET, far, QUIET, far, QUIET]
    check(Case(num_steps=2, ranks=2, window=2, slack=3, adaptive=False), events)


def test_a_kept_first_chunk_moves_along() -> None:
    check(Case(num_steps=1, window=2, keeps_first=True, reach=4, slack=1, adaptive=False), [QUIET] * 6)


@pytest.mark.heavy
def test_a_kept_first_chunk_made_anew_is_the_one_that_is_kept() -> None:
    case = Case(num_steps=1, window=2, keeps_first=True, reach=2, slack=3, adaptive=False)
    check(case, [QUIET, QUIET, QUIET, Event(back=(3,)), QUIET, QUIET, QUIET])


def test_fresh_noise_is_drawn_for_every_step_of_every_chunk() -> None:
    check(Case(num_steps=3, renoise=True, seed=1, stream=2, adaptive=False), [QUIET] * 3)


def test_a_longer_way_to_data() -> None:
    check(Case(num_steps=4, ranks=5, frames_per_chunk=1), [QUIET] * 7)
