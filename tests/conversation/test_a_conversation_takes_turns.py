"""Listen, think, answer, fall silent, go on: whole conversations of scripted parts, on a clock that jumps."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence

import pytest

from streamdiff.conversation import events as said
from streamdiff.conversation.ear import ScriptedEar
from streamdiff.conversation.loop import Conversation, Manners
from streamdiff.conversation.mind import HONEST, Message, ScriptedMind, ToolCall
from streamdiff.conversation.mouth import ProportionalMouth
from streamdiff.conversation.turn import Event, Phase
from streamdiff.errors import BackendError, InputError, SessionClosed, StreamdiffError
from tests.conversation.scripted import LETTERS_PER_S, Evening, ScriptedFace, run

QUIET: list[Event] = []
TURN = [[Event.ONSET], QUIET, [Event.VOICED], QUIET, QUIET, [Event.PAUSE]]
LONG = "One two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen."


def _evening(
    *texts: str | StreamdiffError,
    replies: list[str] | None = None,
    manners: Manners | None = None,
    takes_s: float = 0.1,
    script: Sequence[Sequence[Event]] | None = None,
    mind: ScriptedMind | None = None,
) -> tuple[Evening, ScriptedFace, ScriptedEar]:
    face = ScriptedFace()
    ear = ScriptedEar(TURN * len(texts) if script is None else script, texts, takes_s=takes_s)
    talk = Conversation(
        face,
        ear,
        mind or ScriptedMind(replies),
        mouth=ProportionalMouth(LETTERS_PER_S),
        manners=manners or Manners(silence_s=None),
    )
    return Evening(talk), face, ear


def _plain(talk: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in talk.history]


def test_a_question_is_answered_and_both_are_remembered() -> None:
    async def evening() -> None:
        it, face, ear = _evening("What time is it?", replies=["It is noon."])
        async with it:
            await it.hear(6)
            await asyncio.sleep(3)
            assert face.heard == "It is noon."
            assert it.talk.phase is Phase.IDLE
            assert _plain(it.talk) == [("user", "What time is it?"), ("assistant", "It is noon.")]
            phases = [event.phase for event in it.of(said.PhaseChanged)]
            assert phases == [Phase.LISTENING, Phase.THINKING, Phase.SPEAKING, Phase.IDLE]
            assert face.listening[:1] == [True]
            assert face.listening[-1] is False
            assert it.of(said.ReplyHeard)[-1].complete
            assert ear.heard_face[0][1] == 640, "every frame is given to the ear, silent ones too"
        assert ear.is_closed

    run(evening())


def test_each_stage_of_a_turn_is_timed() -> None:
    async def evening() -> None:
        it, _, _ = _evening("What time is it?", mind=ScriptedMind(["It is noon."], first_s=0.5))
        async with it:
            await it.hear(6)
            await asyncio.sleep(3)
            (timing,) = it.of(said.TurnTiming)
            assert timing.transcribe_s == pytest.approx(0.1, abs=0.001)
            assert timing.pause_s == pytest.approx(0.1, abs=0.001)
            assert timing.mind_s == pytest.approx(0.5, abs=0.001)
            assert timing.voice_s == pytest.approx(0.25 + 0.04, abs=0.041)
            assert timing.total_s == pytest.approx(0.6 + (timing.voice_s or 0), abs=0.001)

    run(evening())


def test_speaking_over_it_silences_it_and_cuts_what_was_not_heard() -> None:
    async def evening() -> None:
        it, face, _ = _evening("Tell me a story.", "Stop, please.", replies=[LONG, "All right."])
        async with it:
            await it.hear(6)
            await asyncio.sleep(2.0)
            assert it.talk.phase is Phase.SPEAKING
            await it.hear(3)
            assert face.num_interruptions == 1
            (interrupted,) = it.of(said.Interrupted)
            assert LONG.startswith(interrupted.heard)
            assert len(interrupted.heard) == pytest.approx(interrupted.played_s * LETTERS_PER_S, abs=8)
            await it.hear(3)
            await asyncio.sleep(3)
            assert _plain(it.talk) == [
                ("user", "Tell me a story."),
                ("assistant", interrupted.heard),
                ("user", "Stop, please."),
                ("assistant", "All right."),
            ]
            assert not it.of(said.ReplyHeard)[0].complete

    run(evening())


@pytest.mark.parametrize("text", ["Mm-hmm.", "Yeah, I see.", ""])
def test_a_backchannel_or_a_noise_does_not_end_its_speech(text: str) -> None:
    async def evening() -> None:
        it, face, _ = _evening("Tell me a story.", text, replies=[LONG])
        async with it:
            await it.hear(6)
            await asyncio.sleep(2.0)
            await it.hear(6)
            await asyncio.sleep(8)
            assert face.num_interruptions == 1
            (resumed,) = it.of(said.Resumed)
            assert resumed.text
            assert face.heard.split()[-1] == "sixteen."
            assert [word for word in LONG.split() if word not in face.heard] == []
            assert len(face.heard) < len(LONG) + 12, "only the word that was cut is said twice"
            assert _plain(it.talk) == [("user", "Tell me a story."), ("assistant", LONG)]

    run(evening())


def test_a_voice_that_is_not_confirmed_does_not_stop_it() -> None:
    async def evening() -> None:
        script = [*TURN, [Event.ONSET], QUIET, [Event.HUSH]]
        it, face, _ = _evening("Tell me a story.", replies=[LONG], script=script)
        async with it:
            await it.hear(6)
            await asyncio.sleep(2.0)
            await it.hear(3)
            await asyncio.sleep(6)
            assert face.num_interruptions == 0
            assert face.heard == LONG

    run(evening())


def test_a_person_who_goes_on_is_not_answered_too_early() -> None:
    async def evening() -> None:
        script = [*TURN, [Event.GOES_ON], QUIET, [Event.PAUSE]]
        it, face, _ = _evening("never used", "I would like tea.", replies=["Here."], script=script, takes_s=0.2)
        async with it:
            await it.hear(9)
            await asyncio.sleep(3)
            assert [event.text for event in it.of(said.Transcript)] == ["I would like tea."]
            assert face.heard == "Here."

    run(evening())


def test_what_is_added_while_it_thinks_joins_the_question() -> None:
    async def evening() -> None:
        mind = ScriptedMind(["Both."], first_s=1.0)
        it, _, _ = _evening("Is it warm?", "And dry?", mind=mind)
        async with it:
            await it.hear(6)
            await asyncio.sleep(0.3)
            assert it.talk.phase is Phase.THINKING
            await it.hear(6)
            await asyncio.sleep(4)
            assert _plain(it.talk) == [("user", "Is it warm? And dry?"), ("assistant", "Both.")]

    run(evening())


def test_typed_words_interrupt_too() -> None:
    async def evening() -> None:
        it, face, _ = _evening(replies=[LONG, "Fine."])
        async with it:
            it.talk.tell("Count.")
            await asyncio.sleep(1.5)
            it.talk.tell("Enough.")
            await asyncio.sleep(2)
            roles = [role for role, _ in _plain(it.talk)]
            assert roles == ["user", "assistant", "user", "assistant"]
            assert face.num_interruptions == 1
            assert face.heard.endswith("Fine.")

    run(evening())


def test_a_recogniser_that_fails_is_excused_in_words() -> None:
    async def evening() -> None:
        it, face, _ = _evening(BackendError("no memory"), "Again.", replies=["Yes."])
        async with it:
            await it.hear(6)
            await asyncio.sleep(5)
            assert "did not catch" in face.heard
            (failed,) = it.of(said.Failed)
            assert (failed.part, failed.reason) == ("ear", "no memory")
            await it.hear(6)
            await asyncio.sleep(3)
            assert face.heard.endswith("Yes.")

    run(evening())


def test_a_recogniser_that_hangs_is_given_up_in_time() -> None:
    async def evening() -> None:
        it, face, _ = _evening("late", takes_s=60.0)
        async with it:
            await it.hear(6)
            await asyncio.sleep(3.8)
            assert it.talk.phase is Phase.LISTENING
            await asyncio.sleep(0.4)
            assert it.talk.phase is Phase.SPEAKING
            await asyncio.sleep(5)
            assert "did not catch" in face.heard

    run(evening())


def test_a_mind_that_does_not_answer_is_excused_in_time() -> None:
    async def evening() -> None:
        it, face, _ = _evening("Hello?", mind=ScriptedMind(["late"], first_s=100.0))
        async with it:
            await it.hear(6)
            await asyncio.sleep(9.9)
            assert it.talk.phase is Phase.THINKING
            await asyncio.sleep(4)
            assert "cannot think of an answer" in face.heard

    run(evening())


class BrokenMind(ScriptedMind):
    async def answer(self, messages: Sequence[Message]) -> AsyncGenerator[str | ToolCall, None]:
        yield "It began well. "
        raise ValueError("out of thoughts")


def test_a_mind_that_breaks_off_is_excused_after_what_it_said() -> None:
    async def evening() -> None:
        it, face, _ = _evening("Hello?", mind=BrokenMind())
        async with it:
            await it.hear(6)
            await asyncio.sleep(6)
            assert face.heard.startswith("It began well. ")
            assert "cannot think of an answer" in face.heard
            assert not it.of(said.ReplyHeard)[0].complete
            assert it.talk.phase is Phase.IDLE

    run(evening())


def test_a_silent_user_is_spoken_to_once() -> None:
    async def evening() -> None:
        it, face, _ = _evening(manners=Manners(silence_s=5.0))
        async with it:
            await asyncio.sleep(4.5)
            assert face.heard == ""
            await asyncio.sleep(30)
            assert face.heard == Manners().nudge

    run(evening())


class ToolMind(ScriptedMind):
    async def answer(self, messages: Sequence[Message]) -> AsyncGenerator[str | ToolCall, None]:
        if messages[-1].role == "tool":
            yield f"It is {messages[-1].text} degrees."
        else:
            yield ToolCall(id="c1", name="weather", arguments='{"city": "Bern"}')


def test_a_function_is_called_and_its_result_spoken() -> None:
    async def evening() -> None:
        it, face, _ = _evening("How warm is it?", mind=ToolMind())
        async with it:
            await it.hear(6)
            await asyncio.sleep(0.5)
            (call,) = it.of(said.ToolCalled)
            assert (call.name, call.arguments) == ("weather", '{"city": "Bern"}')
            it.talk.answer("unknown", "x")
            it.talk.answer(call.id, "21")
            await asyncio.sleep(3)
            assert face.heard == "It is 21 degrees."
            assert [role for role, _ in _plain(it.talk)] == ["user", "assistant", "tool", "assistant"]

    run(evening())


def test_several_faces_take_turns_and_the_others_listen() -> None:
    async def evening() -> None:
        faces = {"anna": ScriptedFace(), "ben": ScriptedFace()}
        mind = ScriptedMind(["[anna] Good evening, Ben. [ben] Hello, Anna! [anna] Let us begin."])
        talk = Conversation(faces, ScriptedEar([], []), mind, manners=Manners(silence_s=None))
        async with Evening(talk, "anna", "ben") as it:
            talk.tell("Go.")
            await asyncio.sleep(8)
            assert faces["anna"].heard == "Good evening, Ben.Let us begin.", "two utterances"
            assert faces["ben"].heard.strip() == "Hello, Anna!"
            assert [event.speaker for event in it.of(said.ReplyStarted)] == ["anna", "ben", "anna"]
            assert True in faces["ben"].listening
            assert _plain(talk)[-1][1] == "[anna] Good evening, Ben. [ben] Hello, Anna! [anna] Let us begin."

    run(evening())


def test_a_face_begins_when_the_one_before_it_is_done_though_the_mind_still_writes() -> None:
    async def evening() -> None:
        faces = {"anna": ScriptedFace(), "ben": ScriptedFace()}
        mind = ScriptedMind(["[anna] Hi. [ben] One two three four five six seven eight."], gap_s=0.5)
        talk = Conversation(faces, ScriptedEar([], []), mind, manners=Manners(silence_s=None))
        async with Evening(talk, "anna", "ben") as it:
            talk.tell("Go.")
            await asyncio.sleep(3)
            assert [event.speaker for event in it.of(said.ReplyStarted)] == ["anna", "ben"]

    run(evening())


def test_it_resumes_with_what_was_not_written_yet_when_it_was_interrupted() -> None:
    async def evening() -> None:
        it, face, _ = _evening("Hello?", "Mm-hm.", mind=ScriptedMind(["Well, three. Four."], gap_s=1.5))
        async with it:
            await it.hear(6)
            await asyncio.sleep(1.4)
            assert face.heard + "Well," == "Well,"
            await it.hear(6)
            await asyncio.sleep(6)
            assert len(it.of(said.Resumed)) == 1
            assert face.heard.split() == ["Well,", "three.", "Four."]
            assert it.talk.phase is Phase.IDLE

    run(evening())


def test_the_mind_without_a_key_says_so_first() -> None:
    async def evening() -> None:
        it, face, _ = _evening("Good morning.")
        async with it:
            await it.hear(6)
            await asyncio.sleep(12)
            assert face.heard.startswith(HONEST)
            assert "Good morning." in face.heard

    run(evening())


def test_leaving_it_in_mid_sentence_leaves_nothing_behind() -> None:
    async def evening() -> None:
        it, face, ear = _evening("Tell me a story.", replies=[LONG])
        async with it:
            await it.hear(6)
            await asyncio.sleep(1)
        await face.aclose()
        assert ear.is_closed
        assert asyncio.all_tasks() == {asyncio.current_task()}
        with pytest.raises(SessionClosed, match="hear"):
            it.talk.hear(b"", 16_000)

    before = threading.active_count()
    run(evening())
    assert threading.active_count() == before


def test_cancelling_the_task_that_holds_it_ends_it() -> None:
    async def evening() -> None:
        it, face, ear = _evening("Tell me a story.", replies=[LONG])

        async def hold() -> None:
            async with it.talk:
                it.talk.hear(b"", 16_000)
                await asyncio.sleep(100)

        task = asyncio.create_task(hold())
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await face.aclose()
        assert ear.is_closed
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(evening())


def test_an_error_of_the_caller_comes_out_as_it_is() -> None:
    async def evening() -> None:
        it, _, _ = _evening()
        with pytest.raises(InputError, match="mine"):
            async with it.talk:
                raise InputError("mine")

    run(evening())
