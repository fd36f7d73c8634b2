"""What one rank does to a packet."""

from __future__ import annotations

from typing import Protocol

from streamdiff.pipeline.packet import Packet


class Stage(Protocol):
    """One place in the line: takes a packet, returns it one or more noise levels cleaner, or decoded."""

    def step(self, packet: Packet) -> Packet: ...
