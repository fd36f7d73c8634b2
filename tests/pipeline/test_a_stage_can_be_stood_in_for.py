"""A stage that is told what another one kept goes on with the same bits, after any chunk of any script."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamdiff.memory import Kept
from streamdiff.models import cost
from streamdiff.models.served.options import Precision, StepOptions
from streamdiff.pipeline.album import Album, shared_memory
from streamdiff.pipeline.packet import Packet
from streamdiff.pipeline.run import run_local
from streamdiff.pipeline.stage import KeptStage
from tests.engine.oracle_case import Case, Event, packets_of, played, script_of
from tests.engine.stream_case import same

QUIET = Event()
LIFE = [QUIET, QUIET, Event(prompt=1), QUIET, Event(back=(2,)), QUIET, QUIET, Event(back=(1,), prompt=2), QUIET]
CASES = {
    "plain": Case(),
    "fresh noise and a refreshed sink": Case(renoise=True, refresh=3, num_steps=3, seed=3, stream=5),
    "the first chunk stays": Case(keeps_first=True, window=2, reach=2),
    "a motion prefix": Case(motion=True, refresh=4, slack=3),
    "no slack": Case(slack=0),
}


class Relay:
    """Stages of which each makes so many chunks, and only the first is told whose they are; what one kept is copied
    after every chunk, as a rank does.
    """

    def __init__(self, stages: Sequence[KeptStage], chunks: int) -> None:
        self._waiting = list(stages)
        self._chunks, self._made, self._copied = chunks, 0, 0
        self._album = Album(shared_memory())
        self._stage = self._waiting.pop(0)

    def step(self, packet: Packet) -> Packet:
        if self._made and self._made % self._chunks == 0:
            heir = self._waiting.pop(0)
            heir.resume(Kept(json.loads(self._facts), self._album.load("seat")))
            self._stage = heir
        self._made += 1
        done = self._stage.step(packet)
        kept = self._stage.kept()
        self._album.replace({"seat": kept.tensors})
        self._facts = json.dumps(kept.facts)
        return done


def relayed(case: Case, events: list[Event], chunks: int, options: StepOptions | None = None) -> list[Packet]:
    engine = case.engine
    engine.options = options or engine.options

    script = script_of(case, events)
    relays: list[Relay] = []
    for role in case.schedule.roles:
        stages = [engine.stage(role) for _ in range(1 + len(script) // chunks)]
        stages[0].begin(seed=case.seed, stream=case.stream)
        relays.append(Relay(stages, chunks))
    return list(run_local(case.schedule, relays, packets_of(case, script)))


@pytest.mark.heavy
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_new_stage_for_every_chunk(case: Case) -> None:
    life = [dataclasses.replace(event, back=event.back if case.slack else ()) for event in LIFE]
    assert same(relayed(case, life, 1), played(case, script_of(case, life)))


def test_a_history_in_eight_bits() -> None:
    case = Case(keeps_first=True, window=2, reach=2)
    options = StepOptions(history=Precision.FP8)
    engine = case.engine
    engine.options = options
    stages = [engine.stage(role) for role in case.schedule.roles]
    script = script_of(case, LIFE)
    assert same(relayed(case, LIFE, 1, options), list(run_local(case.schedule, stages, packets_of(case, script))))


@pytest.mark.slow
@settings(max_examples=60)
@given(
    events=st.lists(
        st.builds(Event, back=st.just(()) | st.tuples(st.integers(0, 4)), prompt=st.none() | st.integers(0, 2)),
        min_size=1,
        max_size=12,
    ),
    chunks=st.integers(1, 4),
    case=st.builds(
        partial(Case, num_steps=3),
        ranks=st.integers(1, 4),
        renoise=st.booleans(),
        seed=st.integers(0, 3),
        keeps_first=st.booleans(),
        window=st.integers(1, 3),
        slack=st.integers(0, 3),
        refresh=st.none() | st.integers(1, 4),
    ),
)
def test_any_script(case: Case, events: list[Event], chunks: int) -> None:
    assert same(relayed(case, events, chunks), played(case, script_of(case, events)))


@pytest.mark.parametrize("eight_bits", [False, True])
def test_a_chunk_copies_what_the_plan_says_and_no_more(eight_bits: bool) -> None:
    """Of a rank that denoises, every chunk but the first, which brings reference and prompt as well."""
    copied: list[int] = []
    case = Case(window=6, slack=4, num_steps=2, ranks=2, adaptive=False)
    engine = case.engine
    engine.options = StepOptions(history=Precision.FP8) if eight_bits else engine.options
    role = case.schedule.roles[0]
    stage, album = engine.stage(role), Album(shared_memory())
    for packet in packets_of(case, script_of(case, [QUIET] * 14)):
        stage.step(packet)
        copied.append(album.replace({"seat": stage.kept().tensors}))
    step = cost.snapshot_bytes(case.config, bytes_per_value=4, eight_bit_history=eight_bits)
    assert not role.decodes
    assert copied[1:] == [step * len(role.steps)] * 13
    assert copied[0] > copied[1]
    album.close()
