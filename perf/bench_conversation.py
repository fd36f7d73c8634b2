"""How soon a face answers, how soon it falls silent, and whether its own echo stops it; stage by stage.

    python perf/bench_conversation.py                         # a few minutes, by the clock
    python perf/bench_conversation.py --only turns --mind-s 0.3
    python perf/bench_conversation.py --only recognisers      # why it is Moonshine tiny

A person (another voice of the package, with a little noise) speaks into a microphone in blocks of 20 ms, in real time;
the avatar answers what a mind says that answers at once. ``answer`` is from the last loud sample of the question to the
first frame with sound in the caller's hand; a browser adds its jitter buffer. Needs the extras ``avatar``, ``listen``
and ``demo``. The last line is one JSON object; ``| python perf/table.py --keep conversation`` keeps it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import torch
from measure import machine_card

from streamdiff import demo
from streamdiff.arrays import Floats
from streamdiff.avatar.engine import AvatarEngine
from streamdiff.avatar.identity import create_bundle
from streamdiff.avatar.render import WarpRenderer
from streamdiff.conversation import events as said
from streamdiff.conversation.ear import SpeechEar
from streamdiff.conversation.loop import Conversation, Manners
from streamdiff.conversation.mind import ScriptedMind
from streamdiff.conversation.mouth import TimedVoice
from streamdiff.conversation.recogniser import Moonshine, Recogniser, Whisper
from streamdiff.conversation.turn import Event, Phase
from streamdiff.conversation.vad import HOP_S
from streamdiff.voice.open import open_voice
from streamdiff.voice.resample import Resampler

RATE_HZ = 24_000
BLOCK = RATE_HZ // 50
QUESTIONS = (
    "Can you tell me where the station is?",
    "What do you think about the weather?",
    "How long does it take to reach the village?",
    "Who painted the kitchen wall yellow?",
    "Hello, how are you today?",
    "Is the soup too hot to eat?",
    "When does the last train leave?",
    "Please tell me a short story.",
    "Why did they sell their house?",
    "Do you remember my name?",
)
REPLY = "Yes, I heard you well. The train leaves at half past nine, and it takes an hour to reach the village."


def percentiles(values: list[float]) -> dict[str, float]:
    """Median and 95th percentile of seconds, in milliseconds."""
    return {f"p{q}_ms": round(float(np.percentile(values, q)) * 1e3, 1) for q in (50, 95)} if values else {}


class Person:
    """Speaks into a microphone by the clock, and is silent in between; a little noise is always there."""

    def __init__(self, talk: Conversation, voice: str = "heart:pitch=0.8,tract=0.92") -> None:
        self._talk, self._voice = talk, open_voice(voice)
        self._noise = np.random.default_rng(0)
        self._line_S = np.zeros(0, np.float32)
        self._loud: tuple[int, int] | None = None
        self._marks: asyncio.Future[tuple[float, float]] | None = None

    def sound(self, text: str) -> Floats:
        """What this person sounds like."""
        return np.concatenate([chunk.samples_S for chunk in self._voice.speak(text)])

    async def say(self, sound_S: Floats) -> tuple[float, float]:
        """Say it; when its first and its last loud sample were spoken, by the loop's clock."""
        loud = np.flatnonzero(np.abs(sound_S) > 0.02 * np.abs(sound_S).max())
        self._loud, self._line_S = (int(loud[0]), int(loud[-1])), sound_S
        self._marks = asyncio.get_running_loop().create_future()
        return await self._marks

    async def speak(self) -> None:
        """Feed the microphone until cancelled."""
        loop = asyncio.get_running_loop()
        due_s, at, first_s = loop.time(), 0, 0.0
        while True:
            due_s += BLOCK / RATE_HZ
            await asyncio.sleep(max(0.0, due_s - loop.time()))
            block_S = np.zeros(BLOCK, np.float32)
            if self._loud is not None:
                part_S = self._line_S[at : at + BLOCK]
                block_S[: len(part_S)] = part_S
                # A block is handed over when its last sample has been spoken.
                first_s = (
                    due_s - (at + BLOCK - self._loud[0]) / RATE_HZ if at <= self._loud[0] < at + BLOCK else first_s
                )
                at += BLOCK
                if at > self._loud[1] and self._marks is not None and not self._marks.done():
                    self._marks.set_result((first_s, due_s - (at - self._loud[1]) / RATE_HZ))
                if at >= len(self._line_S):
                    self._loud, at = None, 0
            noise_S = self._noise.standard_normal(BLOCK).astype(np.float32) * 1e-3
            self._talk.hear(block_S + noise_S, RATE_HZ)


class Stand:
    """A conversation with the avatar, a person at the microphone, and what happened when."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.recogniser = Moonshine()
        self.voice = TimedVoice(open_voice())
        bundle = create_bundle(demo.demo_image(), args.size)
        self.engine = AvatarEngine(WarpRenderer(bundle), voice=self.voice)
        self.events: list[tuple[float, said.ConversationEvent]] = []
        self.timings: list[said.TurnTiming] = []
        self.sounds: list[tuple[float, float | None]] = []
        """When each frame came, and when it fell silent: None if it is loud to its last millisecond."""

    async def run(self, part: Callable[[Conversation, Person], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
        """Do something with a fresh conversation."""
        mind = ScriptedMind([REPLY], first_s=self.args.mind_s)
        async with self.engine.open() as session:
            ear = SpeechEar(self.recogniser)
            manners = Manners(silence_s=None)
            async with Conversation(session, ear, mind, mouth=self.voice, manners=manners) as talk:
                person = Person(talk)
                tasks = [asyncio.create_task(work) for work in (person.speak(), self._watch(talk), self._note(talk))]
                try:
                    await asyncio.sleep(1.0)
                    return await part(talk, person)
                finally:
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self, talk: Conversation) -> None:
        async for shown in talk.frames():
            at_s = asyncio.get_running_loop().time()
            loud = np.flatnonzero(np.abs(shown.sound_S) > 1e-3)
            end = int(loud[-1]) + 1 if len(loud) else 0
            is_loud = end > len(shown.sound_S) - RATE_HZ // 1000
            self.sounds.append((at_s, None if is_loud else at_s + end / RATE_HZ))

    async def _note(self, talk: Conversation) -> None:
        async for event in talk.events():
            self.events.append((asyncio.get_running_loop().time(), event))

    async def until(self, talk: Conversation, phase: Phase, timeout_s: float = 20.0) -> None:
        """Wait until somebody has the word."""
        async with asyncio.timeout(timeout_s):
            while talk.phase is not phase:
                await asyncio.sleep(0.01)

    async def turns(self, talk: Conversation, person: Person) -> dict[str, Any]:
        """Questions and answers."""
        answers: list[float] = []
        lags: list[float] = []
        for number in range(self.args.turns):
            self.events.clear()
            _, end_s = await person.say(person.sound(QUESTIONS[number % len(QUESTIONS)]))
            await self.until(talk, Phase.SPEAKING)
            async with asyncio.timeout(10.0):
                while not any(isinstance(event, said.ReplyStarted) for _, event in self.events):
                    await asyncio.sleep(0.005)
            at_s = next(at_s for at_s, event in self.events if isinstance(event, said.ReplyStarted))
            answers.append(at_s - end_s)
            self.timings += (now := [event for _, event in self.events if isinstance(event, said.TurnTiming)])
            lags += [answers[-1] - (timing.total_s or 0.0) for timing in now]
            await self.until(talk, Phase.IDLE)
            await asyncio.sleep(0.3)
        stages = ("pause_s", "transcribe_s", "mind_s", "voice_s")
        return {
            "turns": len(answers),
            "answer": percentiles(answers),
            "detector lag": percentiles(lags),
            **{name.removesuffix("_s"): percentiles([getattr(t, name) for t in self.timings]) for name in stages},
        }

    async def interruptions(self, talk: Conversation, person: Person) -> dict[str, Any]:
        """A person speaks over the face."""
        confirmed: list[float] = []
        silent: list[float] = []
        over_S = person.sound("Please stop for a moment.")
        for _ in range(self.args.turns):
            talk.tell("Tell me something.")
            await self.until(talk, Phase.SPEAKING)
            await asyncio.sleep(1.2)
            self.events.clear()
            begin_s, _ = await person.say(over_S)
            await self.until(talk, Phase.SPEAKING)
            at_s = next(at_s for at_s, event in self.events if isinstance(event, said.Interrupted))
            confirmed.append(at_s - begin_s)
            silent.append(next(quiet_s for t, quiet_s in self.sounds if t > at_s and quiet_s is not None) - begin_s)
            await self.until(talk, Phase.IDLE)
        return {"times": len(silent), "onset to stop": percentiles(confirmed), "onset to silence": percentiles(silent)}


def bench_turns(args: argparse.Namespace) -> dict[str, Any]:
    """Question in, answer out."""
    stand = Stand(args)
    return asyncio.run(stand.run(stand.turns))


def bench_interruptions(args: argparse.Namespace) -> dict[str, Any]:
    """Speaking over the face."""
    stand = Stand(args)
    return asyncio.run(stand.run(stand.interruptions))


def bench_echo(args: argparse.Namespace) -> dict[str, Any]:
    """Its own voice at -20 dB through four rooms, as fast as it is computed: how often would it have stopped?"""
    voice = open_voice()
    texts = [*QUESTIONS, REPLY]
    recogniser = Moonshine()
    stops, onsets, seconds, began_s = 0, 0, 0.0, time.monotonic()
    for room, (decay_s, direct_db, delay_s) in enumerate(
        ((0.05, 20, 0.05), (0.2, 6, 0.1), (0.3, 0, 0.2), (0.5, -3, 0.4))
    ):
        ear = SpeechEar(recogniser)
        ear.face_speaks(True)
        answer_R = impulse_response(decay_s, direct_db, delay_s, seed=room)
        tail_S, at_s = np.zeros(len(answer_R) - 1, np.float32), 0.0
        rng = np.random.default_rng(room)
        for text in itertools.cycle(texts):
            if at_s >= args.minutes * 60 / 4:
                break
            own_S = np.concatenate([c.samples_S for c in voice.speak(text)] + [np.zeros(RATE_HZ // 4, np.float32)])
            own_S = own_S[: len(own_S) // BLOCK * BLOCK]
            heard_S = np.convolve(own_S, answer_R) if len(answer_R) < 64 else _convolved(own_S, answer_R)
            heard_S[: len(tail_S)] += tail_S
            tail_S = heard_S[len(own_S) :].astype(np.float32)
            mic_S = 0.1 * heard_S[: len(own_S)] + 1e-3 * rng.standard_normal(len(own_S))
            for start in range(0, len(own_S), BLOCK):
                ear.played(own_S[start : start + BLOCK], RATE_HZ, at_s)
                events = ear.hear(mic_S[start : start + BLOCK].astype(np.float32), RATE_HZ)
                stops += Event.VOICED in events
                onsets += Event.ONSET in events
                at_s += BLOCK / RATE_HZ
        seconds += at_s
        asyncio.run(ear.aclose())
    cpu = (time.monotonic() - began_s) / seconds
    return {"minutes": round(seconds / 60, 1), "false stops": stops, "onsets": onsets, "cores": round(cpu, 3)}


def impulse_response(decay_s: float, direct_db: float, delay_s: float, *, seed: int) -> Floats:
    """A room: the direct sound after a delay, and noise that decays by 60 dB behind it."""
    num = int(decay_s * RATE_HZ)
    late = np.random.default_rng(seed).standard_normal(num) * 10 ** (-3 * np.arange(num) / num)
    late *= 10 ** (-direct_db / 20) / np.sqrt(np.square(late).sum())
    return np.concatenate([np.zeros(int(delay_s * RATE_HZ)), [1.0], late]).astype(np.float32)


def _convolved(sound_S: Floats, answer_R: Floats) -> Floats:
    num = len(sound_S) + len(answer_R) - 1
    size = 1 << (num - 1).bit_length()
    return np.fft.irfft(np.fft.rfft(sound_S, size) * np.fft.rfft(answer_R, size), size)[:num]


def bench_recognisers(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds per utterance and words right, for each recogniser at hand."""
    from streamdiff.avatar.quality import plain_words, word_errors

    voice, resampled = open_voice("heart:pitch=0.8,tract=0.92"), []
    for text in QUESTIONS:
        resampler = Resampler(RATE_HZ, 16_000)
        parts = [resampler.push(chunk.samples_S) for chunk in voice.speak(text)]
        resampled.append(np.concatenate([*parts, resampler.finish()]))
    out: dict[str, Any] = {"seconds of speech": round(sum(map(len, resampled)) / 16_000, 1)}
    candidates: list[Callable[[], Recogniser]] = [Moonshine, Whisper]
    for candidate in candidates:
        recogniser = candidate()
        took_s: list[float] = []
        wrong = 0
        for text, sound_S in zip(QUESTIONS, resampled, strict=True):
            began_s = time.monotonic()
            heard = recogniser.transcribe(sound_S)
            took_s.append(time.monotonic() - began_s)
            wrong += word_errors(plain_words(text), plain_words(heard))
        words = sum(len(plain_words(text)) for text in QUESTIONS)
        out[recogniser.name] = {**percentiles(took_s), "words wrong": f"{wrong} of {words}"}
    return out


ROWS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "turns": bench_turns,
    "interruptions": bench_interruptions,
    "echo": bench_echo,
    "recognisers": bench_recognisers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", help=f"rows, separated by commas: {','.join(ROWS)}")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=10.0, help="of its own voice (default: %(default)s)")
    parser.add_argument("--mind-s", type=float, default=0.0, help="wait of the mind before its first word")
    parser.add_argument("--size", type=int, choices=(256, 512), default=256)
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = args.only.split(",") if args.only else list(ROWS)
    unknown = sorted(set(chosen) - set(ROWS))
    if unknown:
        parser.error(f"no row {unknown[0]!r}; there are {', '.join(ROWS)}")
    report: dict[str, Any] = {
        "bench": "conversation",
        "card": machine_card(torch.device("cpu")),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "mind_s": args.mind_s,
        "hop_ms": HOP_S * 1e3,
    }
    for name in chosen:
        report[name] = ROWS[name](args)
        print(f"{name:>14}  {json.dumps(report[name])}", flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
