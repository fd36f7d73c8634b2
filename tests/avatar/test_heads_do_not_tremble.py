"""Head and brows glide on the way to where the motion model wants them; lips, lids and eyes keep their time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from streamdiff.avatar.cues import FRAME_SAMPLES, Cues
from streamdiff.avatar.kinematics import arkit64
from streamdiff.avatar.motion import MotionStream
from streamdiff.avatar.window import load_motion
from streamdiff.errors import ConfigError
from streamdiff.training.avatar.motion_quality import aperture, seam_ratio
from streamdiff.voice import HibariVoice

TEXT = (
    "The judge and the jury believed it, because nobody had noticed the map of the village. Please wait a moment. "
    "My younger brother brought a box of fresh fish; what do you think?"
)
HOP = 8


def spoken() -> Cues:
    """Idle, a spoken text, and idle again."""
    voice = HibariVoice()
    parts = [Cues.silence(50)]
    before_S = np.zeros(FRAME_SAMPLES, np.float32)
    for chunk in voice.speak(TEXT):
        samples_S = np.pad(chunk.samples_S, (0, -len(chunk.samples_S) % FRAME_SAMPLES))
        parts.append(Cues.sound(samples_S, chunk.phonemes, before_S=before_S))
    return Cues.joined([*parts, Cues.silence(50)])


def moved(cues: Cues, **settings: float) -> torch.Tensor:
    moving = MotionStream(load_motion(), seed=4, hop=HOP, **settings)
    moving.push(cues)
    return torch.stack([moving.emit() for _ in range(len(cues) - 3)])


@pytest.fixture(scope="module")
def both() -> tuple[torch.Tensor, torch.Tensor]:
    """As the model says it, and as it is shown."""
    cues = spoken()
    return moved(cues, glide_s=0.0), moved(cues)


def jerk(track: NDArray[np.float32]) -> float:
    return float(np.abs(np.diff(track, n=3, axis=0)).mean())


def head(motion_AE: torch.Tensor) -> NDArray[np.float32]:
    spec = arkit64()
    return np.concatenate([motion_AE[:, spec.part(part)].numpy() for part in ("rotation", "translation")], axis=1)


@pytest.mark.heavy
def test_the_head_loses_its_tremor_and_keeps_its_movement(both: tuple[torch.Tensor, torch.Tensor]) -> None:
    raw_AH, shown_AH = map(head, both)
    assert jerk(shown_AH) < 0.3 * jerk(raw_AH)
    assert shown_AH.std(axis=0) == pytest.approx(raw_AH.std(axis=0), rel=0.1)
    late_AH = raw_AH[:-2]
    assert all(np.corrcoef(shown_AH[2:, i], late_AH[:, i])[0, 1] > 0.98 for i in range(raw_AH.shape[1]))


@pytest.mark.heavy
def test_lips_lids_and_eyes_do_not_wait(both: tuple[torch.Tensor, torch.Tensor]) -> None:
    spec = arkit64()
    raw_AE, shown_AE = both
    slow = [i for i, name in enumerate(spec.names) if name.startswith(("head", "brow"))]
    quick = [i for i in range(spec.num_coefs) if i not in slow]
    assert len(slow) == 11
    assert torch.equal(raw_AE[:, quick], shown_AE[:, quick])
    assert np.ptp(aperture(shown_AE.numpy(), spec)) > 0.2


@pytest.mark.heavy
def test_windows_meet_as_smoothly_as_before(both: tuple[torch.Tensor, torch.Tensor]) -> None:
    for motion_AE in both:
        assert seam_ratio(motion_AE.numpy(), range(HOP, len(motion_AE), HOP), arkit64()) < 1.2


@pytest.mark.heavy
def test_speech_begins_and_ends_without_a_nod_of_its_own(both: tuple[torch.Tensor, torch.Tensor]) -> None:
    step_A = np.abs(np.diff(head(both[1]), axis=0) / head(both[1]).std(axis=0)).mean(axis=1)
    speaking = slice(60, len(step_A) - 60)
    for border in (50, len(step_A) - 48):
        assert step_A[border - 3 : border + 4].max() < 1.2 * step_A[speaking].max()


@pytest.mark.heavy
def test_frames_taken_back_glide_the_same_way_again() -> None:
    cues = spoken()
    moving = MotionStream(load_motion(), seed=4, hop=HOP)
    moving.push(cues)
    for _ in range(60):
        moving.emit()
    moving.rewind(0)
    expected = torch.stack([moving.emit() for _ in range(12)])
    moving.rewind(12)
    assert torch.equal(torch.stack([moving.emit() for _ in range(12)]), expected)


def test_a_delay_that_makes_no_sense_is_told() -> None:
    with pytest.raises(ConfigError, match="may trail"):
        MotionStream(load_motion(), glide_s=-0.1)
