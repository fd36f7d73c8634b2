"""However often and however early a stream is interrupted, every stage can obey: head, ring and decoder agree."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamdiff.engine import Engine
from streamdiff.memory import Ring
from streamdiff.models.audio import AudioChunk
from streamdiff.pipeline.intake import Intake
from streamdiff.pipeline.packet import Packet, RefreshSink, ReturnLatent, Rewind, SetReference
from streamdiff.pipeline.run import run_local
from streamdiff.pipeline.schedule import plan
from tests.engine.stream_case import small_config

CONFIG = small_config(2)
SOUND = AudioChunk(torch.zeros(1, 2, 8, 12), torch.zeros(7680))


class Memories:
    """A ring and the decoder's snapshots, as integers; raises where a stage would."""

    def __init__(self, window: int, slack: int) -> None:
        self.ring = Ring(window=window, slack=slack)
        self.slack = slack
        self.before: set[int] = set()

    def obey(self, packet: Packet) -> None:
        for command in packet.commands:
            if isinstance(command, SetReference):
                self.ring.clear()
                self.before = {packet.chunk}
            elif isinstance(command, Rewind):
                self.ring.rewind(command.chunk)
                self.before = {c for c in self.before if c <= command.chunk}
        self.ring.admit(packet.chunk)
        assert packet.chunk in self.before
        self.before.add(packet.chunk + 1)
        self.before.discard(packet.chunk - self.slack - 1)


@given(
    window=st.integers(1, 5),
    slack=st.integers(0, 6),
    moves=st.lists(st.lists(st.integers(0, 60), max_size=2), max_size=40),
)
def test_whatever_is_taken_back_every_stage_remembers(window: int, slack: int, moves: list[list[int]]) -> None:
    memory = dataclasses.replace(CONFIG.memory, window_chunks=window, slack_chunks=slack)
    head = Intake(dataclasses.replace(CONFIG, memory=memory), SetReference(torch.zeros(1), None), torch.zeros(1))
    memories = Memories(window, slack)
    epoch, asked, refreshed = 0, -1, False
    for wishes in moves:
        for wish in wishes:
            head.take_back(min(wish, head.next_chunk))
        packet = head.packet(SOUND)
        memories.obey(packet)
        assert packet.epoch == epoch + bool(wishes)
        epoch = packet.epoch
        if any(isinstance(c, ReturnLatent) for c in packet.commands):
            asked = packet.epoch
        for command in packet.commands:
            if isinstance(command, RefreshSink):
                assert asked >= 0
                assert not refreshed
                refreshed = True


def interrupted(num_ranks: int, slack: int, moments: dict[int, int]) -> list[Packet]:
    """A stream in which, before its n-th packet, chunk ``moments[n]`` is asked for again."""
    memory = dataclasses.replace(CONFIG.memory, slack_chunks=slack)
    engine = Engine(dataclasses.replace(CONFIG, memory=memory))
    head = engine.intake(torch.zeros(64, 64, 3, dtype=torch.uint8), "talk", seed=1)

    def sounds():
        for entry in range(14):
            if entry in moments:
                head.take_back(moments[entry])
            yield SOUND

    schedule = plan(num_steps=2, num_ranks=num_ranks, refresh_chunk=engine.config.refresh_chunk)
    stages = [engine.stage(role, seed=1) for role in schedule.roles]
    return list(run_local(schedule, stages, head.packets(sounds()), deadline_s=60))


@pytest.mark.heavy
def test_interrupted_before_anything_was_shown() -> None:
    for num_ranks in (1, 3):
        packets = interrupted(num_ranks, slack=3, moments={2: 0})
        assert [p.chunk for p in packets] == [0, 1, *range(12)]


@pytest.mark.heavy
def test_made_again_with_the_same_sound_a_chunk_is_the_same() -> None:
    packets = interrupted(3, slack=4, moments={9: 6, 12: 7})
    first: dict[int, Packet] = {}
    for packet in packets:
        known = first.setdefault(packet.chunk, packet)
        assert torch.equal(packet.latent_BCTHW, known.latent_BCTHW)
    assert len(first) < len(packets)
