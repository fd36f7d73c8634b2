"""Lips meet for every p, b and m that is known, and for most that are only heard."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from streamdiff.arrays import Floats
from streamdiff.avatar.cues import FRAME_SAMPLES, Cues, State
from streamdiff.avatar.kinematics import FPS, arkit64, lp265
from streamdiff.avatar.motion import MotionStream
from streamdiff.avatar.seal import Lips, heard_seal, load_seals, read_seals, said_seal
from streamdiff.avatar.window import load_motion
from streamdiff.errors import CheckpointError
from streamdiff.tensorfile import save_tensors
from streamdiff.voice import HibariVoice, Phoneme

TEXT = "Pam bought a big map. My baby may become a member. Please stop by the museum, and maybe buy more apples."
LAST = Cues.silence(40)


def read_aloud(speed: float) -> tuple[Floats, list[Phoneme]]:
    """The text, which no training drew, as sound of whole frames, and its phonemes."""
    voice = HibariVoice()
    voice.speed = speed
    chunks = list(voice.speak(TEXT))
    starts = np.cumsum([0.0, *(chunk.duration_s for chunk in chunks)])
    phonemes = [
        Phoneme(s, at + a, at + b)
        for chunk, at in zip(chunks, starts.tolist(), strict=False)
        for s, a, b in chunk.phonemes or ()
    ]
    sound_S = np.concatenate([chunk.samples_S for chunk in chunks])
    return np.pad(sound_S, (0, -len(sound_S) % FRAME_SAMPLES)), phonemes


def spoken(sound_S: Floats, phonemes: list[Phoneme] | None) -> Floats:
    """Motion ``[A, E]``; from sound with two frames of look-ahead."""
    stream = MotionStream(load_motion(), seed=3)
    cues = Cues.joined([Cues.sound(sound_S, phonemes, before_S=np.zeros(FRAME_SAMPLES, np.float32)), LAST])
    known = len(cues) if phonemes is not None else 3
    stream.push(cues[0:known])
    frames = []
    for n in range(len(cues) - len(LAST)):
        frames.append(stream.emit().numpy())
        stream.push(cues[known + n : known + n + 1])
    return np.stack(frames)


def gaps(motion_AE: Floats) -> Floats:
    """How far the jaw is open beyond what the lips make up for, and how far they are drawn apart."""
    spec = arkit64()
    column = {name: motion_AE[:, spec.index(name)] for name in spec.names}
    return column["jawOpen"] - column["mouthClose"] + column["mouthLowerDownLeft"] + column["mouthUpperUpLeft"]


def share_closed(gap_A: Floats, phonemes: list[Phoneme]) -> float:
    """Share of bilabials in which, or in a frame beside which, the lips meet."""
    meets = [
        gap_A[max(0, int(start_s * FPS) - 1) : int(end_s * FPS) + 2].min() < 0.06
        for symbol, start_s, end_s in phonemes
        if symbol and symbol in "pbm"
    ]
    assert len(meets) >= 18
    return float(np.mean(meets))


@pytest.mark.heavy
@pytest.mark.parametrize("speed", [1.0, 1.4])
def test_every_known_one_closes_them(speed: float) -> None:
    sound_S, phonemes = read_aloud(speed)
    assert share_closed(gaps(spoken(sound_S, phonemes)), phonemes) == 1.0


@pytest.mark.heavy
def test_most_are_heard_and_vowels_stay_open() -> None:
    sound_S, phonemes = read_aloud(1.0)
    gap_A = gaps(spoken(sound_S, None))
    assert share_closed(gap_A, phonemes) >= 0.8
    vowels = [p for p in phonemes if p.symbol in ("A", "I", "æ")]
    widest = [gap_A[int(p.start_s * FPS) : int(p.end_s * FPS) + 1].max() for p in vowels]
    assert np.mean(np.array(widest) > 0.1) >= 0.8


def test_silence_is_no_closure() -> None:
    """Nothing is said and nothing is heard: a mouth at rest is left as it is."""
    assert said_seal(Cues.silence(1).phones_AP[0]) == 0.0
    assert heard_seal(load_seals(), Cues.silence(9)) == 0.0


def test_a_listener_keeps_its_lips_as_they_are() -> None:
    """What is heard while listening is somebody else's p."""
    sound_S, _ = read_aloud(1.0)
    frames = {}
    for state in (State.LISTENING, State.SPEAKING):
        stream = MotionStream(load_motion(), seed=3)
        before_S = np.zeros(FRAME_SAMPLES, np.float32)
        stream.push(Cues.sound(sound_S[: 50 * FRAME_SAMPLES], None, before_S=before_S, state=state))
        # The model answers a listener's cues differently; whether lips are closed afterwards is asked here.
        frames[state] = [stream._closed() for _ in range(40) if stream.emit() is not None]
    assert max(frames[State.SPEAKING]) == 1.0
    assert max(frames[State.LISTENING]) == 0.0


def test_frames_taken_back_are_made_again_with_the_same_bits() -> None:
    sound_S, _ = read_aloud(1.0)
    stream = MotionStream(load_motion(), seed=3)
    stream.push(Cues.sound(sound_S, None, before_S=np.zeros(FRAME_SAMPLES, np.float32)))
    for _ in range(30):
        stream.emit()
    stream.rewind(6)
    first = [stream.emit() for _ in range(6)]
    stream.rewind(6)
    assert all(torch.equal(a, stream.emit()) for a in first)


def test_half_a_closure_is_half_way() -> None:
    lips, spec = Lips(arkit64()), arkit64()
    frame_E = torch.from_numpy(spec.frame({"jawOpen": 0.4, "mouthLowerDownLeft": 0.2, "browInnerUp": 0.3}))
    half_E, shut_E = lips.close(frame_E, 0.5), lips.close(frame_E, 1.0)
    value = {name: (float(half_E[spec.index(name)]), float(shut_E[spec.index(name)])) for name in spec.names}
    assert value["mouthClose"] == pytest.approx((0.2, 0.4))
    assert value["jawOpen"] == pytest.approx((0.4, 0.4))
    assert value["mouthLowerDownLeft"] == pytest.approx((0.11, 0.02))
    assert value["browInnerUp"] == pytest.approx((0.3, 0.3))
    assert torch.equal(lips.close(frame_E, 0.0), frame_E)


def test_a_layout_without_lips_is_left_alone() -> None:
    spec = lp265()
    frame_E = torch.rand(spec.num_coefs)
    assert torch.equal(Lips(spec).close(frame_E, 1.0), frame_E)


def test_a_file_of_something_else_is_refused(tmp_path) -> None:
    path = tmp_path / "other.safetensors"
    save_tensors({"enter.weight": torch.zeros(3, 3)}, path)
    with pytest.raises(CheckpointError, match="detector of closed lips"):
        read_seals(path)
