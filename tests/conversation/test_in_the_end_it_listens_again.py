"""Whatever people, minds and recognisers do in whatever order: in the end it listens, answers, and owes nothing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Sequence

import numpy as np
import pytest

from streamdiff.conversation import events as said
from streamdiff.conversation.ear import ScriptedEar, Understood
from streamdiff.conversation.endpoint import Endpointer
from streamdiff.conversation.loop import Conversation, Manners
from streamdiff.conversation.mind import Message, ScriptedMind, ToolCall
from streamdiff.conversation.turn import Event, Phase
from streamdiff.errors import BackendError
from streamdiff.stream import Samples
from tests.conversation.scripted import Evening, ScriptedFace, run


class HopEar(ScriptedEar):
    """The real end of turn over scripted probabilities: the first sample of a block is the probability of a voice."""

    def __init__(self, dice: random.Random) -> None:
        super().__init__((), ())
        self.endpointer, self._dice = Endpointer(), dice

    def hear(self, samples: Samples, rate_hz: int) -> list[Event]:
        assert isinstance(samples, np.ndarray)
        event = self.endpointer.push(float(samples[0]))
        self.is_turn = self.endpointer.is_turn or self.endpointer.is_candidate
        return [] if event is None else [event]

    def flush(self) -> list[Event]:
        return [event for _ in range(8) for event in self.hear(np.zeros(1), 16_000)]

    def give_up(self) -> None:
        self.endpointer.reset()

    async def transcribe(self) -> Understood:
        await asyncio.sleep(self._dice.choice([0.02, 0.1, 0.5, 6.0]))
        if self._dice.random() < 0.2:
            raise BackendError("deaf")
        text = self._dice.choice(["", "Mm-hm.", "What is it?", "I would like to", "three four"])
        return Understood(text, self.endpointer.transcribed(text))


class MoodyMind(ScriptedMind):
    """Slow, wordless, broken, or as it should be."""

    def __init__(self, dice: random.Random) -> None:
        super().__init__()
        self._dice = dice

    async def answer(self, messages: Sequence[Message]) -> AsyncGenerator[str | ToolCall, None]:
        mood = self._dice.random()
        await asyncio.sleep(self._dice.choice([0.0, 0.3, 2.0, 30.0]))
        if mood < 0.2:
            yield "..."
        elif mood < 0.3:
            yield ToolCall(id="x", name="nobody", arguments="{}")
        for word in ("Well, ", "this ", "is ", "an ", "answer."):
            if mood > 0.9:
                raise OSError("gone")
            if mood >= 0.3:
                yield word
                await asyncio.sleep(self._dice.choice([0.0, 0.2]))


@pytest.mark.parametrize("seed", range(40))
def test_in_the_end_it_is_idle_and_answers_again(seed: int) -> None:
    dice = random.Random(seed)

    async def evening() -> None:
        face, ear = ScriptedFace(), HopEar(dice)
        talk = Conversation(face, ear, MoodyMind(dice), manners=Manners(silence_s=None, ear_s=3.0, tool_s=2.0))
        async with Evening(talk) as it:
            for _ in range(dice.randrange(5, 40)):
                what = dice.random()
                if what < 0.15:
                    talk.tell("Typed words.")
                elif what < 0.25:
                    talk.stop()
                else:
                    for _ in range(dice.randrange(1, 40)):
                        talk.hear(np.full(512, dice.choice([0.0, 0.6, 0.99])), 16_000)
                        await asyncio.sleep(0.032)
                await asyncio.sleep(dice.choice([0.0, 0.1, 1.0, 5.0]))
            await asyncio.sleep(200)
            assert talk.phase is Phase.IDLE
            ear.transcribe = _hello  # type: ignore[method-assign]
            face_heard, it.events[:] = len(face.heard), []
            talk._mind = ScriptedMind(["Still here."])
            await _say(talk)
            await asyncio.sleep(5)
            assert face.heard[face_heard:] == "Still here."
            assert [event.text for event in it.of(said.Transcript)] == ["Hello."]

        async def _drained() -> None:
            await face.aclose()

        await _drained()
        assert asyncio.all_tasks() == {asyncio.current_task()}

        for earlier, later in zip(talk.history, talk.history[1:], strict=False):
            assert (earlier.role, later.role) != ("assistant", "tool") or earlier.calls

    async def _hello() -> Understood:
        return Understood("Hello.", Event.WORDS)

    async def _say(talk: Conversation) -> None:
        for probability in [0.99] * 8 + [0.0] * 4:
            talk.hear(np.full(512, probability), 16_000)
            await asyncio.sleep(0.032)

    run(evening())
