"""What a microphone hears of the face's own voice is not taken for a person; a person is, over the same echo."""

from __future__ import annotations

import asyncio
import itertools

import numpy as np
import pytest

from streamdiff.arrays import Floats
from streamdiff.conversation.echo import EchoGate
from streamdiff.conversation.vad import HOP, RATE_HZ

ROOMS = [(0.05, 20.0, 0.05), (0.2, 6.0, 0.1), (0.3, 0.0, 0.2), (0.5, -3.0, 0.4)]
"""Seconds in which the sound decays by 60 dB, direct over late sound in dB, delay in seconds."""


def speechlike(seconds: float, seed: int) -> Floats:
    """Syllables of a buzz with a wandering pitch through two resonances, and pauses."""
    rng = np.random.default_rng(seed)
    out: list[Floats] = []
    while sum(map(len, out)) < seconds * RATE_HZ:
        num = int(rng.uniform(0.1, 0.3) * RATE_HZ)
        pitch_hz = rng.uniform(90, 220) * np.linspace(1, rng.uniform(0.8, 1.2), num)
        buzz = np.sign(np.sin(2 * np.pi * np.cumsum(pitch_hz) / RATE_HZ)) + rng.standard_normal(num) * 0.3
        spectrum, hz = np.fft.rfft(buzz), np.fft.rfftfreq(num, 1 / RATE_HZ)
        low_hz, high_hz = rng.uniform(300, 800), rng.uniform(1000, 2500)
        shape = np.exp(-(((hz - low_hz) / 200) ** 2)) + 0.5 * np.exp(-(((hz - high_hz) / 300) ** 2))
        syllable = np.fft.irfft(spectrum * shape, num) * np.hanning(num)
        out += [syllable / np.abs(syllable).max() * 0.3, np.zeros(int(rng.choice([0.02, 0.02, 0.25]) * RATE_HZ))]
    return np.concatenate(out)[: int(seconds * RATE_HZ)].astype(np.float32)


def in_a_room(sound_S: Floats, room: tuple[float, float, float], seed: int = 0) -> Floats:
    decay_s, direct_db, delay_s = room
    num = int(decay_s * RATE_HZ)
    late = np.random.default_rng(seed).standard_normal(num) * 10 ** (-3 * np.arange(num) / num)
    late *= 10 ** (-direct_db / 20) / np.sqrt(np.square(late).sum())
    answer = np.concatenate([np.zeros(int(delay_s * RATE_HZ)), [1.0], late])
    size = 1 << (len(sound_S) + len(answer)).bit_length()
    return np.fft.irfft(np.fft.rfft(sound_S, size) * np.fft.rfft(answer, size), size)[: len(sound_S)]


def longest_voice(mic_S: Floats, played_S: Floats, begin: int = 0) -> int:
    """Longest run of loud hops, from hop ``begin`` on, that the gate does not call an echo."""
    gate, longest, length = EchoGate(), 0, 0
    for number in range(len(mic_S) // HOP):
        at = number * HOP
        gate.played(played_S[at : at + HOP], at / RATE_HZ)
        hop_S = mic_S[at : at + HOP].astype(np.float32)
        is_loud = float(np.sqrt(np.mean(np.square(hop_S)))) > 0.002
        is_voice = not gate.is_echo(hop_S, unlikely=not is_loud) and is_loud
        length = length + 1 if is_voice else 0
        longest = max(longest, length if number >= begin else 0)
    return longest


@pytest.mark.parametrize("room", ROOMS)
def test_its_own_voice_at_minus_20_db_is_no_person(room: tuple[float, float, float]) -> None:
    own_S = speechlike(20, seed=1)
    mic_S = 0.1 * in_a_room(own_S, room) + 3e-4 * np.random.default_rng(2).standard_normal(len(own_S))
    assert longest_voice(mic_S, own_S) < 4, "four hops in a row would stop the face"


@pytest.mark.parametrize("room", ROOMS)
def test_a_person_over_the_echo_is_heard(room: tuple[float, float, float]) -> None:
    own_S, person_S = speechlike(14, seed=1), speechlike(14, seed=5)
    mic_S = 0.1 * in_a_room(own_S, room) + 3e-4 * np.random.default_rng(2).standard_normal(len(own_S))
    mic_S[10 * RATE_HZ :] += person_S[10 * RATE_HZ :]
    assert longest_voice(mic_S, own_S, begin=10 * RATE_HZ // HOP) >= 4


def test_a_person_in_a_silent_room_is_never_an_echo() -> None:
    person_S = speechlike(10, seed=5)
    gate = EchoGate()
    for at in range(0, len(person_S) - HOP, HOP):
        gate.played(np.zeros(HOP, np.float32), at / RATE_HZ)
        assert not gate.is_echo(person_S[at : at + HOP])


def test_an_echo_is_found_again_after_the_microphone_was_off() -> None:
    own_S = speechlike(20, seed=1)
    mic_S = 0.1 * in_a_room(own_S, ROOMS[1]) + 3e-4 * np.random.default_rng(2).standard_normal(len(own_S))
    gate, run, longest = EchoGate(), 0, 0
    for number in range(len(mic_S) // HOP):
        at = number * HOP
        gate.played(own_S[at : at + HOP], at / RATE_HZ)
        if number == 300:
            gate.restart()
        if not 300 <= number < 310:
            hop_S = mic_S[at : at + HOP].astype(np.float32)
            is_loud = float(np.sqrt(np.mean(np.square(hop_S)))) > 0.002
            run = run + 1 if not gate.is_echo(hop_S, unlikely=not is_loud) and is_loud else 0
            longest = max(longest, run)
    assert longest < 4


@pytest.mark.slow
def test_ten_minutes_of_its_own_voice_stop_nothing() -> None:
    """The real voice and the real detector: 10 simulated minutes at -20 dB through four rooms."""
    pytest.importorskip("onnxruntime")
    from streamdiff.conversation.ear import SpeechEar
    from streamdiff.conversation.turn import Event
    from streamdiff.voice.open import open_voice

    class Deaf:
        name, is_fast = "deaf", False

        def transcribe(self, samples_S: Floats, cancelled: object = None) -> str:
            return ""

    voice, rate_hz = open_voice(), 24_000
    texts = ["The birch canoe slid down the river, and nobody knew the answer.", "My brother works in a small bakery."]
    for seed, room in enumerate(ROOMS):
        sounds = [c.samples_S for text in texts for c in voice.speak(text)]
        pauses = [np.zeros(rate_hz // 4, np.float32)] * len(sounds)
        once_S = np.concatenate([part for pair in zip(sounds, pauses, strict=True) for part in pair])
        own_S = np.tile(once_S, 1 + int(150 * rate_hz / len(once_S)))[: 150 * rate_hz]
        mic_S = 0.1 * in_a_room(own_S, (room[0] * 1.5, room[1], room[2] * 1.5), seed)
        mic_S += 1e-3 * np.random.default_rng(seed).standard_normal(len(own_S))
        ear = SpeechEar(Deaf())
        ear.face_speaks(True)
        events: list[Event] = []
        for at in range(0, len(own_S), 480):
            ear.played(own_S[at : at + 480], rate_hz, at / rate_hz)
            events += ear.hear(mic_S[at : at + 480].astype(np.float32), rate_hz)
        asyncio.run(ear.aclose())
        assert Event.VOICED not in events, f"stopped in room {room}: {list(itertools.islice(events, 20))}"
