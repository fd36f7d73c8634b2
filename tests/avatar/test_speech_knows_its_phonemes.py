"""A voice says when each phoneme is heard, and says the same text in the same bits."""

from __future__ import annotations

import numpy as np
import pytest

from streamdiff.errors import ConfigError, InputError
from streamdiff.voice import HibariVoice, open_voice

hibari = pytest.importorskip("hibari", reason="pip install 'streamdiff[avatar]'")


@pytest.fixture(scope="module")
def voice() -> HibariVoice:
    return HibariVoice()


@pytest.mark.heavy
def test_phonemes_fill_the_sound(voice: HibariVoice) -> None:
    for chunk in voice.speak("The quick brown fox jumps over the lazy dog. Does it, really?"):
        if chunk.last:
            assert len(chunk.samples_S) == 0
            continue
        assert chunk.phonemes is not None
        assert chunk.phonemes[0].start_s == 0.0
        assert chunk.phonemes[-1].end_s == pytest.approx(chunk.duration_s, abs=1e-3)
        for before, after in zip(chunk.phonemes, chunk.phonemes[1:], strict=False):
            assert before.end_s == pytest.approx(after.start_s, abs=1e-6)


def test_vowels_are_louder_than_closures(voice: HibariVoice) -> None:
    """The times are those of the sound: averaged over a text, /p t k/ are quieter than the vowels."""
    levels: dict[str, list[float]] = {"vowel": [], "stop": []}
    for chunk in voice.speak("Peter picked a pack of typical tomatoes. Katie took a picture of the teapot."):
        for symbol, start_s, end_s in chunk.phonemes or ():
            kind = "vowel" if symbol and symbol in "æʌɔɛiuA" else "stop" if symbol and symbol in "ptk" else None
            piece_S = chunk.samples_S[int(start_s * 24_000) : int(end_s * 24_000)]
            if kind and len(piece_S):
                levels[kind].append(float(np.sqrt(np.mean(piece_S**2))))
    assert len(levels["stop"]) > 8
    assert np.mean(levels["vowel"]) > 2 * np.mean(levels["stop"])


def test_the_same_text_is_the_same_sound(voice: HibariVoice) -> None:
    def said(text: str) -> np.ndarray:
        return np.concatenate([chunk.samples_S for chunk in voice.speak(text)])

    first_S = said("Good morning.")
    said("Something else in between.")
    assert np.array_equal(said("Good morning."), first_S)


def test_the_first_sound_is_heard_at_once(voice: HibariVoice) -> None:
    chunk = next(iter(voice.speak("Hello there!")))
    loud = np.abs(chunk.samples_S) > 0.05 * np.abs(chunk.samples_S).max()
    assert int(np.argmax(loud)) < 0.1 * chunk.rate_hz


def test_pitch_changes_the_pitch_and_not_the_times(voice: HibariVoice) -> None:
    phonemes = voice.phonemes("All the boys were away.")
    plain_S, plain = voice.say_phonemes(phonemes)
    voice.pitch = 0.6
    try:
        low_S, low = voice.say_phonemes(phonemes)
    finally:
        voice.pitch = 1.0
    assert abs(plain[-1].end_s - low[-1].end_s) < 0.03

    def pitch_hz(samples_S: np.ndarray) -> float:
        piece = samples_S[8_000:16_000]
        correlation = np.correlate(piece, piece, "full")[len(piece) :]
        return 24_000 / (60 + int(np.argmax(correlation[59:400])))

    assert pitch_hz(low_S) == pytest.approx(0.6 * pitch_hz(plain_S), rel=0.08)


@pytest.mark.parametrize("text", ["", "   \n", "😀🎉", "?!…"])
def test_a_text_without_words_is_refused_at_once(voice: HibariVoice, text: str) -> None:
    with pytest.raises(InputError, match="nothing to say"):
        voice.speak(text)


def test_emoji_and_markup_between_words_are_passed_over(voice: HibariVoice) -> None:
    chunks = list(voice.speak("Hi 😀 there! \x00 <b>Bold</b> 🎉"))
    assert sum(chunk.duration_s for chunk in chunks) > 0.5
    assert chunks[-1].last


def test_a_text_in_letters_it_cannot_read_is_told(voice: HibariVoice) -> None:
    with pytest.raises(InputError, match="nothing to say"):
        list(voice.speak("你好"))


def test_a_growing_text_without_words_is_told_at_its_end(voice: HibariVoice) -> None:
    with pytest.raises(InputError, match="nothing to say"):
        list(voice.speak(iter(["😀", " ", "!"])))


@pytest.mark.heavy
def test_a_number_without_end_does_not_hang(voice: HibariVoice) -> None:
    chunks = list(voice.speak("7" * 300))
    assert chunks[-1].last
    assert sum(chunk.duration_s for chunk in chunks) > 1


@pytest.mark.heavy
def test_voices_are_opened_by_name() -> None:
    voice = open_voice("heart:pitch=0.8,speed=1.2")
    assert isinstance(voice, HibariVoice)
    assert (voice.pitch, voice.speed, voice.tract) == (0.8, 1.2, 1.0)
    for name, says in [
        ("nobody", "no voice"),
        ("heart:volume=2", "speed, pitch and tract"),
        ("heart:pitch=high", "speed, pitch and tract"),
        ("heart:pitch=9", "0.4..2.5"),
        ("kokoro:", "kokoro:MODEL"),
        ("kokoro:no.onnx:no.npz", "no such file"),
    ]:
        with pytest.raises(ConfigError, match=says):
            open_voice(name)
