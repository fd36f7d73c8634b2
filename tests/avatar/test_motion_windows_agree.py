"""Motion is made in windows, and what it shows does not depend on where they begin."""

from __future__ import annotations

import doctest
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from streamdiff.avatar import motion
from streamdiff.avatar.cues import PHONES, Cues, State, mel_of, phone_class, phones_of
from streamdiff.avatar.intent import HEAD_CORRELATION, HEAD_TEMPO, NUM_INTENT, Intent
from streamdiff.avatar.kinematics import arkit64
from streamdiff.avatar.motion import MAX_REWIND, SETTLE_FRAMES, MotionStream, blended, frame_noise, seam_weights
from streamdiff.avatar.style import STYLE_NAMES, measure_style, style_vector
from streamdiff.avatar.window import MotionConfig, load_motion, save_motion
from streamdiff.errors import CheckpointError, ConfigError, InputError
from streamdiff.voice import Phoneme
from tests.avatar.tiny_avatar import tiny_motion


def noisy_cues(num_frames: int, seed: int = 0) -> Cues:
    rng = np.random.default_rng(seed)
    sound_S = rng.uniform(-0.5, 0.5, num_frames * 960).astype(np.float32)
    phonemes = [Phoneme("imsu"[i % 4], i * 0.07, (i + 1) * 0.07) for i in range(int(num_frames * 0.04 / 0.07))]
    return Cues.sound(sound_S, phonemes, before_S=np.zeros(960, np.float32))


def emitted(stream: MotionStream, count: int) -> torch.Tensor:
    return torch.stack([stream.emit() for _ in range(count)])


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(motion).failed == 0


def test_what_is_heard_does_not_depend_on_the_blocks() -> None:
    rng = np.random.default_rng(0)
    sound_S = rng.uniform(-1, 1, 360 + 20 * 960).astype(np.float32)
    whole_AF = mel_of(sound_S)
    assert whole_AF.shape == (20, 160)
    single_AF = np.concatenate([mel_of(sound_S[i * 960 : 360 + (i + 1) * 960]) for i in range(20)])
    assert np.array_equal(whole_AF, single_AF)


def test_what_is_heard_never_looks_ahead() -> None:
    sound_S = np.zeros(360 + 10 * 960, np.float32)
    sound_S[360 + 5 * 960 :] = 0.5
    mel_AF = mel_of(sound_S)
    assert np.ptp(mel_AF[:5]) == 0
    assert mel_AF[5].max() > mel_AF[4].max()


def test_a_tone_is_loud_in_its_own_band() -> None:
    tone_S = np.sin(2 * np.pi * 1000 * np.arange(360 + 960) / 24_000).astype(np.float32)
    bands = mel_of(tone_S).reshape(4, 40)[2]
    low = mel_of(np.sin(2 * np.pi * 200 * np.arange(360 + 960) / 24_000).astype(np.float32)).reshape(4, 40)[2]
    assert int(bands.argmax()) > int(low.argmax())
    assert bands.max() - np.median(bands) > 1.0


def test_phonemes_fill_every_half_frame() -> None:
    phones_AP = phones_of([Phoneme("m", 0.01, 0.05), Phoneme(",", 0.05, 0.3), Phoneme("₤", 0.3, 9.0)], 10)
    halves = phones_AP.reshape(20, -1)
    assert np.allclose(halves.sum(axis=1), 1.0)
    names = [PHONES[i] for i in halves.argmax(axis=1)]
    assert names[1] == "m"
    assert names[3:15] == ["pause"] * 12
    assert names[15:] == ["other"] * 5
    assert halves[0, phone_class("m")] == pytest.approx(0.5)


def test_a_frame_has_the_same_noise_in_every_window() -> None:
    early, late = frame_noise(0, 24, 64, 7, 1), frame_noise(8, 24, 64, 7, 1)
    assert torch.equal(early[8:], late[:16])
    assert not torch.equal(early, frame_noise(0, 24, 64, 7, 2))
    assert not torch.equal(early, frame_noise(0, 24, 64, 8, 1))


def test_the_same_calls_give_the_same_bits() -> None:
    model, cues = tiny_motion(), noisy_cues(60)

    def run(stream: int) -> torch.Tensor:
        moving = MotionStream(model, seed=3, stream=stream)
        moving.push(cues)
        return emitted(moving, 30)

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_frames_stay_in_range_and_nothing_grows() -> None:
    model = tiny_motion()
    model.std_E.fill_(50.0)
    moving = MotionStream(model)
    spec = arkit64()
    sizes = set()
    for block in range(12):
        moving.push(noisy_cues(20, block))
        frames_AE = emitted(moving, 20 if block else 10).numpy()
        assert np.array_equal(spec.clamp(frames_AE), frames_AE)
        sizes.add((len(moving._past), len(moving._trail_AE), len(moving._plan_AE) <= 24))
    assert len(sizes) == 1
    assert np.ptp(frames_AE) > 1


def test_motion_waits_for_its_look_ahead() -> None:
    moving = MotionStream(tiny_motion())
    moving.push(noisy_cues(2))
    with pytest.raises(InputError, match="cues of 3 frames"):
        moving.emit()
    moving.push(noisy_cues(1))
    assert moving.emit().shape == (64,)


def test_each_cue_matters() -> None:
    def shown(cues: Cues) -> torch.Tensor:
        moving = MotionStream(tiny_motion())
        moving.push(cues)
        return emitted(moving, 8)

    plain = noisy_cues(24)
    no = np.zeros(24, np.bool_)
    for other in (
        Cues(plain.mel_AF, plain.phones_AP, no, plain.said_A, plain.state_A),
        Cues(plain.mel_AF, plain.phones_AP, plain.heard_A, no, plain.state_A),
        Cues(plain.mel_AF, plain.phones_AP, plain.heard_A, plain.said_A, plain.state_A * 0),
    ):
        assert not torch.equal(shown(other), shown(plain))


def test_what_is_unknown_says_nothing() -> None:
    no = np.zeros(24, np.bool_)
    one, two = (Cues(c.mel_AF, c.phones_AP, no, no, c.state_A) for c in (noisy_cues(24, 1), noisy_cues(24, 2)))
    intent_AI = np.zeros((24, NUM_INTENT), np.float32)
    assert np.array_equal(one.rows(intent_AI), two.rows(intent_AI))


def test_frames_taken_back_come_again() -> None:
    moving = MotionStream(tiny_motion(), seed=1)
    moving.push(noisy_cues(60))
    emitted(moving, 16)
    moving.rewind(0)
    expected = emitted(moving, 10)
    moving.rewind(10)
    assert torch.equal(emitted(moving, 10), expected)
    with pytest.raises(ConfigError, match="goes back"):
        moving.rewind(MAX_REWIND + 1)


def test_a_mouth_settles_from_where_it_is() -> None:
    moving = MotionStream(tiny_motion())
    moving.push(noisy_cues(60))
    last = emitted(moving, 16)[-1]
    moving.revise(Cues.silence(40))
    moving.settle()
    jaw = arkit64().index("jawOpen")
    path = torch.cat([last[jaw : jaw + 1], emitted(moving, SETTLE_FRAMES)[:, jaw]])
    assert path[0] > 0.05
    assert path[-1] == 0.0
    assert (path.diff() < 0).all()


def test_a_revised_future_is_planned_again_and_the_past_is_not() -> None:
    first, second = noisy_cues(40, 1), noisy_cues(40, 2)
    runs = []
    for after in (first[slice(10, None)], second[slice(10, None)]):
        moving = MotionStream(tiny_motion())
        moving.push(first)
        before = emitted(moving, 4)
        moving.revise(after, after=6)
        runs.append((before, emitted(moving, 12)))
    assert torch.equal(runs[0][0], runs[1][0])
    assert not torch.equal(runs[0][1], runs[1][1])


def test_a_seam_turns_from_one_window_into_the_other() -> None:
    spec = arkit64()
    weight_A = seam_weights(5)
    assert torch.allclose(weight_A + weight_A.flip(0), torch.ones(5))
    assert (weight_A.diff() > 0).all()
    old, new = torch.zeros(5, 64), torch.zeros(5, 64)
    new[:, 0] = 1.0
    rotation = spec.part("rotation")
    old[:, rotation] = torch.tensor([0.3, 0.0, 0.0])
    new[:, rotation] = torch.tensor([0.0, 0.4, 0.0])
    out = blended(old, new, weight_A, spec)
    assert torch.allclose(out[:, 0], weight_A)
    # On the great circle: the angle between neighbours follows the weight.
    from scipy.spatial.transform import Rotation

    start, end = Rotation.from_rotvec([0.3, 0, 0]), Rotation.from_rotvec([0, 0.4, 0])
    whole = (start.inv() * end).magnitude()
    for row, weight in zip(out[:, rotation].numpy(), weight_A.tolist(), strict=True):
        turned = Rotation.from_rotvec(row.astype(np.float64))
        assert (start.inv() * turned).magnitude() == pytest.approx(weight * whole, abs=1e-5)
        assert (turned.inv() * end).magnitude() == pytest.approx((1 - weight) * whole, abs=1e-5)


def test_intents_do_not_depend_on_how_they_are_asked() -> None:
    whole = Intent(5, 0).rows(0, 2000)
    pieces, intent = [], Intent(5, 0)
    for first in range(0, 2000, 8):
        intent.rows(max(0, first - 8), 32)
        pieces.append(intent.rows(first, 8))
    assert np.array_equal(np.concatenate(pieces), whole)


@pytest.mark.heavy
def test_posture_has_the_spread_tempo_and_correlation_that_were_measured() -> None:
    rows_AI = Intent(1, 0).rows(0, 60 * 60 * 25)[:, 3:8]
    assert rows_AI.std(axis=0) == pytest.approx(1.0, abs=0.08)
    tempo = np.diff(rows_AI, axis=0).std(axis=0) * 25
    assert tempo == pytest.approx(HEAD_TEMPO, rel=0.25)
    assert np.corrcoef(rows_AI.T) == pytest.approx(np.array(HEAD_CORRELATION), abs=0.12)


@pytest.mark.heavy
def test_posture_does_not_drift() -> None:
    intent = Intent(1, 0)
    late_AI = intent.rows(10 * 3600 * 25, 5 * 60 * 25)[:, 3:]
    assert late_AI.std(axis=0) == pytest.approx(1.0, abs=0.35)
    assert len(intent._knots) < 1000


@pytest.mark.heavy
def test_blinks_come_as_often_as_those_of_a_talking_person() -> None:
    minutes = 30
    closed_A = Intent(0, 0).rows(0, minutes * 60 * 25)[:, 0]
    onsets = np.flatnonzero((closed_A[1:] > 0.5) & (closed_A[:-1] <= 0.5))
    assert 12 < len(onsets) / minutes < 24
    assert np.diff(onsets).min() >= 8


def test_a_style_is_measured_in_its_own_units() -> None:
    spec = arkit64()
    rng = np.random.default_rng(0)
    clip_AE = np.tile(spec.rest_E, (500, 1))
    clip_AE[:, spec.index("jawOpen")] = rng.uniform(0, 0.3, 500)
    calm = measure_style(clip_AE, spec)
    clip_AE[:, spec.index("jawOpen")] *= 2
    lively = measure_style(clip_AE, spec)
    assert lively["articulation"] > calm["articulation"] + 1
    assert style_vector(calm).shape == (len(STYLE_NAMES),)
    with pytest.raises(InputError, match="10 s"):
        measure_style(clip_AE[:100], spec)
    with pytest.raises(ConfigError, match="no style 'speed'"):
        style_vector({"speed": 1.0})


def test_weights_come_back_as_they_were_saved(tmp_path: Path) -> None:
    model = tiny_motion()
    save_motion(model, tmp_path / "m.safetensors", facts={"a": 1})
    again = load_motion(tmp_path / "m.safetensors")
    for name, value in model.state_dict().items():
        assert torch.allclose(again.state_dict()[name], value, atol=2e-3), name
    assert again.config == model.config


def test_wrong_weights_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no motion weights"):
        load_motion(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(CheckpointError, match="not a safetensors"):
        load_motion(tmp_path / "text.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="no motion model"):
        load_motion(tmp_path / "other.safetensors")


def test_a_wrong_shape_is_told_when_it_is_given() -> None:
    with pytest.raises(ConfigError, match="heads"):
        MotionConfig(dim=30, num_heads=4)
    with pytest.raises(ConfigError, match="rise"):
        MotionConfig(lengths=(8, 3))
    with pytest.raises(ConfigError, match="fall from noise"):
        MotionConfig(sigmas=(0.0, 1.0))
    with pytest.raises(ConfigError, match="hop"):
        MotionStream(tiny_motion(), hop=0)


def test_states_are_told_apart() -> None:
    quiet = Cues.silence(4, State.LISTENING)
    states = slice(-3 - NUM_INTENT, -NUM_INTENT)
    assert quiet.rows(np.zeros((4, NUM_INTENT), np.float32))[:, states].tolist() == [[0, 1, 0]] * 4
