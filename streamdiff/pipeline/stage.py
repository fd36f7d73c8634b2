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


class Chain:
    """Several stages in one place, for a rank that denoises and decodes."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = tuple(stages)

    def step(self, packet: Packet) -> Packet:
        for stage in self._stages:
            packet = stage.step(packet)
        return packet
