"""The motion model learns from performances, and these show what they should."""

# The phonetic alphabet is meant.
# ruff: noqa: RUF001

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from streamdiff.avatar.cues import State
from streamdiff.avatar.kinematics import arkit64
from streamdiff.avatar.window import MotionConfig, MotionModel, load_motion
from streamdiff.cli.main import main
from streamdiff.training.avatar.facegood import rig_to_arkit
from streamdiff.training.avatar.motion import ConsistencyTask, FlowTask, random_motion
from streamdiff.training.avatar.motion_loss import error_weights, flow_loss
from streamdiff.training.avatar.motion_quality import aperture, lag, seam_ratio
from streamdiff.training.avatar.performance import Performance
from streamdiff.training.avatar.spoken import spoken, spoken_minutes
from streamdiff.training.avatar.visemes import articulate
from streamdiff.training.avatar.windows import Dataset
from streamdiff.training.loop import Plan, Trainer
from streamdiff.training.sentences import lexicon_words
from streamdiff.voice import HibariVoice, Phoneme

pytest.importorskip("hibari", reason="pip install 'streamdiff[avatar]'")

SMALL = MotionConfig(dim=32, num_layers=1, num_heads=2, hidden=64)


@pytest.fixture(scope="module")
def performances() -> list[Performance]:
    return spoken_minutes(0.8, seed=0)


@pytest.fixture(scope="module")
def dataset(performances: list[Performance]) -> Dataset:
    return Dataset(Dataset.pack(performances), SMALL)


def said(symbols: str, each_s: float = 0.12) -> list[Phoneme]:
    return [Phoneme(s, i * each_s, (i + 1) * each_s) for i, s in enumerate(symbols)]


def test_lips_meet_for_closures_and_part_for_vowels() -> None:
    """A sentence of /m ɑ p ɑ b ɑ/: every vowel opens the jaw, every closure presses the lips."""
    phonemes = said("mɑpɑbɑ")
    mouth = articulate(phonemes, 18, np.ones(72, np.float32))
    for i, (symbol, *_) in enumerate(phonemes):
        middle = slice(3 * i + 1, 3 * i + 2)
        if symbol == "ɑ":
            assert mouth["jaw"][middle].mean() > 0.35
            assert mouth["close"][middle].mean() < 0.3 * mouth["jaw"][middle].mean()
        else:
            assert mouth["close"][middle].mean() > 0.9 * mouth["jaw"][middle].mean()
            assert mouth["lower"][middle].mean() < 0.03


def test_rounding_is_prepared_earlier_than_a_closure() -> None:
    def rise(symbols: str, shape: str) -> float:
        curve = articulate(said(symbols), 15, np.ones(60, np.float32))[shape]
        return float(np.argmax(curve > 0.3 * curve.max()))

    assert rise("ɪtku", "pucker") < rise("ɪtkp", "press")


def test_loud_speech_opens_wider() -> None:
    quiet, loud = (articulate(said("tɑtɑ"), 12, np.full(48, x, np.float32))["jaw"].max() for x in (0.3, 1.2))
    assert loud > 1.2 * quiet


@pytest.mark.heavy
def test_a_performance_holds_states_sound_and_a_face_in_range(performances: list[Performance]) -> None:
    spec = arkit64()
    shown = performances[0]
    assert np.array_equal(spec.clamp(shown.motion_AE), shown.motion_AE)
    assert set(shown.cues.state_A.tolist()) >= {int(State.SPEAKING)}
    jaw_A = shown.motion_AE[:, spec.index("jawOpen")]
    speaking = shown.cues.state_A == State.SPEAKING
    assert jaw_A[speaking].mean() > 3 * jaw_A[~speaking].mean()


@pytest.mark.heavy
def test_the_mouth_of_a_performance_follows_its_sound(performances: list[Performance]) -> None:
    spec = arkit64()
    lips = np.concatenate([aperture(c.motion_AE, spec) for c in performances])
    loud = np.concatenate([c.cues.mel_AF.mean(axis=1) for c in performances])
    correlation, late = lag(lips, loud)
    assert correlation > 0.5
    assert abs(late) <= 1


@pytest.mark.heavy
def test_performances_depend_on_their_number_alone() -> None:
    voice = HibariVoice()
    words = lexicon_words()
    one = spoken(voice, 3, seed=0, words=words, seconds=11)
    spoken(voice, 4, seed=0, words=words, seconds=11)
    two = spoken(voice, 3, seed=0, words=words, seconds=11)
    assert np.array_equal(one.motion_AE, two.motion_AE)
    assert np.array_equal(one.cues.mel_AF, two.cues.mel_AF)


def test_rig_weights_become_named_shapes() -> None:
    spec = arkit64()
    names = [
        "mouth_stretch_c", "mouth_oh_c", "mouth_oo_c", "mouth_chinRaise_u",
        *[f"mouth_funnel_{s}" for s in ("dl", "dr", "ul", "ur")],
        *[f"mouth_{n}_{s}" for n in ("pucker", "press", "lipCornerPull", "lipStretch", "lowerLipDepress",
                                     "upperLipRaise") for s in "lr"],
        *[f"mouth_suck_{s}" for s in ("dl", "dr", "ul", "ur")],
    ]  # fmt: skip
    weights_AR = np.zeros((2, len(names)), np.float32)
    weights_AR[1, names.index("mouth_stretch_c")] = 0.5
    weights_AR[1, names.index("mouth_lowerLipDepress_l")] = 0.4
    motion_AE = rig_to_arkit(weights_AR, names, spec)
    assert np.array_equal(motion_AE[0], spec.rest_E)
    assert motion_AE[1, spec.index("jawOpen")] == pytest.approx(0.5)
    assert motion_AE[1, spec.index("mouthLowerDownLeft")] == pytest.approx(0.44)
    assert motion_AE[1, spec.index("mouthLowerDownRight")] == 0.0


@pytest.mark.heavy
def test_loss_falls_in_both_recipes(dataset: Dataset, tmp_path: Path) -> None:
    weight_E = error_weights(arkit64())

    def loss_of(model: MotionModel) -> float:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            return float(flow_loss(model, dataset.draw(64, generator), weight_E, generator))

    model = random_motion(SMALL, dataset.motion, seed=0)
    fresh = loss_of(model)
    Trainer(FlowTask(model, dataset, batch=16, lr=1.2e-3, seed=0), tmp_path / "flow", Plan(steps=60)).train()
    taught = loss_of(model)
    assert taught < 0.95 * fresh
    task = ConsistencyTask(model, dataset, batch=16, lr=3.6e-4, seed=0)
    trainer = Trainer(task, tmp_path / "consistency", Plan(steps=20))
    trainer.train()
    losses = [loss for _, loss in trainer.history["loss"]]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


@pytest.mark.slow
def test_the_commands_make_performances_once_and_write_models_that_load(tmp_path: Path) -> None:
    common = ["--data", str(tmp_path / "speech"), "--speech-minutes", "0.5", "--held-out-minutes", "0", "--batch", "4"]
    flow = ["train", "motion", *common, "--steps", "1", "--out", str(tmp_path / "flow")]
    assert main(flow) == 0
    made = (tmp_path / "speech" / "performances.safetensors").stat().st_mtime_ns
    weights = str(tmp_path / "flow" / "motion.safetensors")
    two_steps = ["train", "motion-consistency", *common, "--steps", "1", "--init", weights]
    assert main([*two_steps, "--out", str(tmp_path / "two")]) == 0
    assert (tmp_path / "speech" / "performances.safetensors").stat().st_mtime_ns == made
    one, two = (load_motion(tmp_path / name / "motion.safetensors") for name in ("flow", "two"))
    assert one.state_dict().keys() == two.state_dict().keys()
    assert not torch.equal(next(one.parameters()), next(two.parameters()))


def test_a_seam_ratio_sees_a_seam() -> None:
    spec = arkit64()
    rng = np.random.default_rng(0)
    steps = rng.normal(0, 0.02, (400, spec.num_coefs)).cumsum(axis=0)
    smooth_AE = np.apply_along_axis(lambda x: np.convolve(x, np.hanning(9) / 4, "same"), 0, steps).astype(np.float32)
    borders = range(8, 400, 8)
    assert seam_ratio(smooth_AE, borders, spec) == pytest.approx(1.0, abs=0.15)
    for border in borders:
        smooth_AE[border:] += rng.normal(0, 0.1, spec.num_coefs).astype(np.float32)
    assert seam_ratio(smooth_AE, borders, spec) > 1.5
