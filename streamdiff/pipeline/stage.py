"""What one rank does to a packet.

A stage never asks who it is. It is handed what it does (`denoise`, `decode`), and obeys the commands that packets
bring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from streamdiff.memory import Kept
from streamdiff.pipeline.packet import Packet


class Stage(Protocol):
    """One place in the line: takes a packet, returns it one or more noise levels cleaner, or decoded."""

    def step(self, packet: Packet) -> Packet: ...


class SeatedStage(Stage, Protocol):
    """A stage that serves one stream after the other, from the same memory."""

    def begin(self, *, seed: int, stream: int) -> None:
        """Another stream begins, whose first packet carries `SetReference`; seed and number key its noise."""
        ...


class KeptStage(SeatedStage, Protocol):
    """A stage that another one can stand in for."""

    def kept(self) -> Kept:
        """All that it must be told to go on from here, after a `step` and before the next."""
        ...

    def resume(self, kept: Kept) -> None:
        """Stand where another stage of the same making stood, in a new process perhaps: what comes has the same bits.

        Tensors may be kept, and are not written to; they lie in the host's memory.
        """
        ...


class Chain:
    """Several stages in one place, for a rank that denoises and decodes."""

    def __init__(self, stages: Sequence[KeptStage]) -> None:
        self._stages = tuple(stages)

    def begin(self, *, seed: int, stream: int) -> None:
        for stage in self._stages:
            stage.begin(seed=seed, stream=stream)

    def step(self, packet: Packet) -> Packet:
        for stage in self._stages:
            packet = stage.step(packet)
        return packet

    def kept(self) -> Kept:
        """See `KeptStage`."""
        all_kept = [stage.kept() for stage in self._stages]
        tensors = {name: t for n, kept in enumerate(all_kept) for name, t in kept.within(str(n)).items()}
        return Kept({"stages": [dict(kept.facts) for kept in all_kept]}, tensors)

    def resume(self, kept: Kept) -> None:
        """See `KeptStage`."""
        for number, (stage, facts) in enumerate(zip(self._stages, kept.facts["stages"], strict=True)):
            stage.resume(kept.part(str(number), facts))
