"""What one rank does to a packet.

A stage never asks who it is. It is handed what it does (`denoise`, `decode`), and obeys the commands that packets
bring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from streamdiff.pipeline.packet import Packet


class Stage(Protocol):
    """One place in the line: takes a packet, returns it one or more noise levels cleaner, or decoded."""

    def step(self, packet: Packet) -> Packet: ...


class SeatedStage(Stage, Protocol):
    """A stage that serves one stream after the other, from the same memory."""

    def begin(self, *, seed: int, stream: int) -> None:
        """Another stream begins, whose first packet carries `SetReference`; seed and number key its noise."""
        ...


class Chain:
    """Several stages in one place, for a rank that denoises and decodes."""

    def __init__(self, stages: Sequence[SeatedStage]) -> None:
        self._stages = tuple(stages)

    def begin(self, *, seed: int, stream: int) -> None:
        for stage in self._stages:
            stage.begin(seed=seed, stream=stream)

    def step(self, packet: Packet) -> Packet:
        for stage in self._stages:
            packet = stage.step(packet)
        return packet
