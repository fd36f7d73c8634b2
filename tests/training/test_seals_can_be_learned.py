"""The detector of closed lips: what it is taught is where a p, b or m is said, and it learns it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from streamdiff.avatar.cues import FRAME_SAMPLES
from streamdiff.avatar.seal import AHEAD, PAST, SealDetector, spectra
from streamdiff.training.avatar.seals import SealTask, closed, mel_with_borders, reading, with_noise
from streamdiff.training.sentences import lexicon_words
from streamdiff.voice import HibariVoice, Phoneme


def test_a_frame_is_closed_by_the_share_that_a_bilabial_fills() -> None:
    phonemes = [Phoneme("a", 0.0, 0.06), Phoneme("b", 0.06, 0.11), Phoneme("t", 0.12, 0.16), Phoneme("m", 0.2, 0.24)]
    assert closed(phonemes, 7).tolist() == [0.0, 0.5, 0.75, 0.0, 0.0, 1.0, 0.0]


def test_noise_is_as_soft_as_it_is_said_to_be() -> None:
    speech_S = np.sin(np.arange(48_000) / 20).astype(np.float32) * 0.3
    for colour in (0.0, 1.0):
        noise_S = with_noise(speech_S, 20.0, colour, np.random.default_rng(0)) - speech_S
        ratio_db = 10 * np.log10((speech_S[np.abs(speech_S) > 0.01] ** 2).mean() / (noise_S**2).mean())
        assert ratio_db == pytest.approx(20.0, abs=0.1)


@pytest.mark.heavy
def test_a_reading_depends_on_its_number_alone() -> None:
    voice, words = HibariVoice(), lexicon_words()
    first_S, phonemes = reading(voice, 4, seed=1, words=words)
    reading(voice, 5, seed=1, words=words)
    again_S, others = reading(voice, 4, seed=1, words=words)
    assert np.array_equal(first_S, again_S)
    assert phonemes == others
    assert len(first_S) % FRAME_SAMPLES == 0


def test_frame_n_is_heard_in_the_middle_of_its_nine() -> None:
    mel_AF = np.arange(PAST + 5 + AHEAD, dtype=np.float32)[:, None] * np.ones(160, np.float32)
    heard = spectra(mel_AF)
    assert heard.shape == (5, 36, 40)
    # Four spectra a frame, oldest first.
    assert heard[2, :, 0].tolist() == [float(2 + k // 4) for k in range(36)]


@pytest.mark.heavy
def test_sound_becomes_as_many_frames_as_it_has() -> None:
    samples_S, _ = reading(HibariVoice(), 0, seed=0, words=lexicon_words())
    assert len(spectra(mel_with_borders(samples_S))) == len(samples_S) // FRAME_SAMPLES


@pytest.mark.slow
def test_it_learns_and_a_step_is_the_same_whenever_it_is_taken() -> None:
    torch.manual_seed(0)
    task = SealTask(SealDetector(), 2, batch=128, lr=3e-3, seed=0)
    model = task.parts["seals"].module
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for step in range(120):
        optimizer.zero_grad()
        losses.append(task.gradients(step)["loss"])
        optimizer.step()
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:10])
    optimizer.zero_grad()
    assert task.gradients(7) == task.gradients(7)
