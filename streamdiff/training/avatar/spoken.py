"""Performances of a synthetic voice with known phoneme times: one side of a conversation."""

# The phonetic alphabet is meant.
# ruff: noqa: RUF001

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streamdiff import rng
from streamdiff.arrays import Floats
from streamdiff.avatar.cues import FRAME_SAMPLES, Cues, State
from streamdiff.avatar.intent import Intent
from streamdiff.avatar.kinematics import FPS, arkit64
from streamdiff.training.avatar.performance import Manner, Performance, perform, style_of
from streamdiff.training.avatar.visemes import CLOCK_HZ, articulate, loudness
from streamdiff.training.sentences import lexicon_words, sentence
from streamdiff.voice import HibariVoice, Phoneme


def spoken(voice: HibariVoice, number: int, *, seed: int, words: Sequence[str], seconds: float = 50.0) -> Performance:
    """A conversation of which we hear one side: idle, speaking and listening by turns; a function of (seed, number)."""
    spec = arkit64()
    generator = np.random.default_rng(rng.seed_of("clip", seed, number))
    manner = Manner.draw(generator)
    draw_voice(voice, generator)
    talk = Talk()
    while talk.num_frames < seconds * FPS:
        quiet = int(generator.uniform(0.3, 3.5) * FPS)
        talk.rest(quiet, State.IDLE if generator.random() < 0.5 else State.LISTENING)
        talk.say(voice, " ".join(sentence(generator, words) for _ in range(int(generator.integers(1, 5)))))
    num_frames, state_A = talk.num_frames, np.concatenate(talk.states)
    loud_T, stress_A = talk.emphasis()
    # Silence between the turns pulls the mouth shut, as a pause does.
    gaps = [Phoneme("", a, b) for a, b in _between(talk.phonemes, num_frames / FPS)]
    mouth = articulate(sorted([*talk.phonemes, *gaps], key=lambda p: p.start_s), num_frames, loud_T)
    intent_AI = Intent(rng.seed_of("clip-intent", seed), number, tempo=manner.tempo).rows(0, num_frames)
    motion_AE = perform(mouth, state_A, stress_A, intent_AI, manner, generator, spec)
    before_S = np.zeros(FRAME_SAMPLES, np.float32)
    heard = Cues.sound(np.concatenate(talk.sound), talk.phonemes, before_S=before_S)
    cues = Cues(heard.mel_AF, heard.phones_AP, heard.heard_A, heard.said_A, state_A)
    return Performance(cues, intent_AI, motion_AE, style_of(motion_AE, manner, spec), "spoken")


def draw_voice(voice: HibariVoice, generator: np.random.Generator) -> None:
    """Make it another person's voice: pitch, throat and speed, about as they differ between people."""
    voice.pitch = float(np.clip(np.exp(generator.normal(-0.1, 0.32)), 0.45, 1.8))
    voice.tract = float(np.clip(voice.pitch**0.25 * np.exp(0.06 * generator.standard_normal()), 0.78, 1.25))
    voice.speed = float(np.clip(np.exp(generator.normal(0.0, 0.15)), 0.7, 1.5))


class Talk:
    """What one side of a conversation says, turn after turn."""

    def __init__(self) -> None:
        self.num_frames = 0
        self.sound: list[Floats] = []
        self.phonemes: list[Phoneme] = []
        self.states: list[NDArray[np.int8]] = []
        self._turns: list[tuple[int, int, list[Phoneme], Floats]] = []

    def rest(self, num_frames: int, state: State) -> None:
        """Say nothing for a while."""
        self.states.append(np.full(num_frames, int(state), np.int8))
        self.sound.append(np.zeros(num_frames * FRAME_SAMPLES, np.float32))
        self.num_frames += num_frames

    def say(self, voice: HibariVoice, text: str) -> None:
        """Say a text; its last frame is filled with silence."""
        start_s = self.num_frames / FPS
        parts: list[Floats] = []
        turn: list[Phoneme] = []
        offset_s = 0.0
        for chunk in voice.speak(text):
            turn += [Phoneme(s, offset_s + a, offset_s + b) for s, a, b in chunk.phonemes or ()]
            parts.append(chunk.samples_S)
            offset_s += chunk.duration_s
        samples_S = np.concatenate(parts)
        length = -(-len(samples_S) // FRAME_SAMPLES)
        samples_S = np.pad(samples_S, (0, length * FRAME_SAMPLES - len(samples_S)))
        self.phonemes += [Phoneme(s, start_s + a, start_s + b) for s, a, b in turn]
        self._turns.append((self.num_frames, length, turn, loudness(samples_S)))
        self.sound.append(samples_S)
        self.states.append(np.full(length, int(State.SPEAKING), np.int8))
        self.num_frames += length

    def emphasis(self) -> tuple[Floats, Floats]:
        """Loudness at 100 Hz, and the stress of every frame."""
        loud_T = np.zeros(self.num_frames * CLOCK_HZ // FPS, np.float32)
        stress_A = np.zeros(self.num_frames, np.float32)
        for first, length, turn, turn_T in self._turns:
            loud_T[first * 4 : first * 4 + len(turn_T)] = turn_T
            stress_A[first : first + length] = _stress(turn, length, turn_T)
        return loud_T, stress_A


def _stress(phonemes: Sequence[Phoneme], num_frames: int, loud_T: Floats) -> Floats:
    """Emphasis of the frame in which a long vowel begins; 0 elsewhere."""
    stress_A = np.zeros(num_frames, np.float32)
    for symbol, start_s, end_s in phonemes:
        if symbol in "ɑæʌɔɛɪiʊuɜAIOQWY" and symbol and end_s - start_s >= 0.1:
            at = int(start_s * FPS)
            visit = min(len(loud_T) - 1, int((start_s + end_s) / 2 * CLOCK_HZ))
            if 0 <= at < num_frames and visit >= 0:
                stress_A[at] = max(float(stress_A[at]), float(loud_T[visit]))
    return stress_A


def _between(phonemes: Sequence[Phoneme], end_s: float) -> list[tuple[float, float]]:
    gaps, at = [], 0.0
    for phoneme in phonemes:
        if phoneme.start_s > at + 0.08:
            gaps.append((at, phoneme.start_s))
        at = max(at, phoneme.end_s)
    return [*gaps, (at, end_s)] if end_s > at + 0.08 else gaps


def spoken_minutes(minutes: float, *, seed: int, first: int = 0) -> list[Performance]:
    """Spoken performances, ``minutes`` long together; the first has the number ``first``."""
    voice = HibariVoice()
    words = lexicon_words()
    made: list[Performance] = []
    num_frames = 0
    while num_frames < minutes * 60 * FPS:
        made.append(spoken(voice, first + len(made), seed=seed, words=words))
        num_frames += len(made[-1].motion_AE)
    return made
