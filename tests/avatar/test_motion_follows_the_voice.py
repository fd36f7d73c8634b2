"""The packaged motion model moves the lips with the voice: with a text it knows the phonemes, live it has sound alone.

What the lips should do is what the model was trained on, for sentences that it never met.
"""

from __future__ import annotations

import numpy as np
import pytest

from streamdiff.avatar.kinematics import arkit64
from streamdiff.avatar.window import load_motion
from streamdiff.training.avatar.motion_quality import aperture, evaluate
from streamdiff.training.avatar.performance import Performance
from streamdiff.training.avatar.spoken import spoken
from streamdiff.training.sentences import lexicon_words
from streamdiff.voice import HibariVoice


@pytest.fixture(scope="module")
def performance() -> Performance:
    return spoken(HibariVoice(), 2_000_000, seed=1, words=lexicon_words(), seconds=20.0)


@pytest.fixture(scope="module")
def quality(performance: Performance) -> dict[str, float]:
    return evaluate(load_motion(), [performance])


@pytest.mark.heavy
def test_lips_follow_a_text(quality: dict[str, float]) -> None:
    assert quality["text lips r"] > 0.92
    assert quality["text lips lag"] == 0
    assert 0.75 < quality["text lips gain"] < 1.2


@pytest.mark.heavy
def test_lips_follow_live_sound_that_nobody_transcribed(quality: dict[str, float]) -> None:
    assert quality["live lips r"] > 0.7
    assert quality["live lips lag"] <= 1


@pytest.mark.heavy
def test_head_and_lids_move_as_much_as_they_should(quality: dict[str, float]) -> None:
    for way in ("text", "live"):
        assert 0.5 < quality[f"{way} head spread ratio"] < 1.6
        assert quality[f"{way} head jerk ratio"] < 1.5
        assert 4 < quality[f"{way} blinks per minute"] < 45


@pytest.mark.heavy
def test_lips_that_heard_something_else_do_not_agree(performance: Performance) -> None:
    """The numbers above mean something: the same lips, half a clip later, agree with nothing."""
    lips = aperture(performance.motion_AE, arkit64())
    assert abs(float(np.corrcoef(lips, np.roll(lips, len(lips) // 2))[0, 1])) < 0.3
