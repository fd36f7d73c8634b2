"""Beside every score stand baselines, and measures that tell one mouth from another: held against known signals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate.conditions import GAINS_DB, louder
from evaluate.drift import LEVELS, beyond
from evaluate.judge import judge, loudness_opening, width
from evaluate.people import Take
from evaluate.quality import LOUDNESS_ROW, Table
from evaluate.readers import BlinkReader, WidthReader
from numpy.typing import NDArray
from signals import per_minute, seam, synchrony

from streamdiff.training.data.articulation import articulation
from streamdiff.training.data.clip import FPS, FRAME_SAMPLES, RATE_HZ, TRUTH
from streamdiff.training.data.speech import leveled
from streamdiff.training.probe import FEATURES, IDENTITY, Reading

SECONDS = 8


def syllables(seed: int, *, hisses: bool = True) -> NDArray[np.float32]:
    """A buzz that swells and pauses, with a hiss now and then."""
    generator = np.random.default_rng(seed)
    t = np.arange(SECONDS * RATE_HZ) / RATE_HZ
    buzz = sum(np.sin(2 * np.pi * 120 * k * t) / k for k in range(1, 20))
    hiss = np.diff(generator.standard_normal(len(t) + 1))
    beats = generator.random(SECONDS * 5 + 2) * (generator.random(SECONDS * 5 + 2) > 0.3)
    hissing = (generator.random(SECONDS * 2 + 2) > 0.7) * float(hisses)
    loud, share = np.interp(t * 5, np.arange(len(beats)), beats), np.interp(t * 2, np.arange(len(hissing)), hissing)
    return leveled((loud * (buzz * (1 - share) + hiss * share)).astype(np.float32))


def take(seed: int) -> Take:
    """A person whose pictures say nothing but who is known: the truth is that of the sound."""
    sound_S = syllables(seed)
    heard = articulation(sound_S)
    truth_TE = np.zeros((len(sound_S) // FRAME_SAMPLES, len(TRUTH)), np.float32)
    truth_TE[:, TRUTH.index("opening_cm")] = heard["open"]
    truth_TE[:, TRUTH.index("round")] = heard["round"]
    truth_TE[50:53, TRUTH.index("blink")] = 1.0
    frames = np.random.default_rng(seed).integers(0, 256, (len(truth_TE), 128, 128, 3), np.uint8)
    return Take(torch.from_numpy(frames[0]), sound_S, frames, truth_TE)


class Knows:
    """A probe that reads what a film was made with: its answers are laid out beside it, by the film's first pixel."""

    def __init__(self, *known: tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]) -> None:
        self._known = {frames.tobytes(): (truth_TE, wide_T) for frames, truth_TE, wide_T in known}

    def read(self, frames_NHWC: torch.Tensor) -> Reading:
        truth_TE, wide_T = self._known.get(frames_NHWC.numpy().tobytes(), (np.zeros((1, len(TRUTH))), np.zeros(1)))
        features = np.random.default_rng(0).standard_normal((len(truth_TE), FEATURES)) * 0.1
        features[:, 3] += 2.0 * wide_T - 1.0
        return Reading(
            torch.from_numpy(np.asarray(truth_TE, np.float32)),
            torch.zeros(len(truth_TE), len(IDENTITY)),
            torch.from_numpy(features.astype(np.float32)),
        )


def knows(*takes: Take) -> Knows:
    return Knows(*((t.frames_THWC, t.truth_TE, width(t.sound_S)) for t in takes))


def test_three_lines_of_arithmetic_follow_the_rule() -> None:
    """Loudness alone scores high where the rule opens by loudness: a model must be judged beside that."""
    plain_S, hissing_S = syllables(0, hisses=False), syllables(0)
    plain, hissing = (synchrony(loudness_opening(s), articulation(s)["open"]).at_zero for s in (plain_S, hissing_S))
    assert plain > 0.9
    assert hissing < plain - 0.1, "a hiss is loud, and the mouth hardly opens for it"
    assert synchrony(loudness_opening(plain_S[::-1]), articulation(plain_S)["open"]).at_zero < 0.5
    assert not loudness_opening(np.zeros(RATE_HZ, np.float32)).any()


def test_the_table_has_a_row_of_loudness_alone() -> None:
    takes, others = [take(0), take(1)], [take(2)]
    table = Table(takes, others, knows(*takes, *others))  # type: ignore[arg-type]
    table.add_loudness()
    row = table.rows[0]
    assert row["row"] == LOUDNESS_ROW
    expected = [synchrony(loudness_opening(t.sound_S), articulation(t.sound_S)["open"]).at_zero for t in takes]
    assert row["sync"] == pytest.approx(np.mean(expected))
    assert row["sync_each"] == pytest.approx(expected, abs=1e-4)
    assert "colour" not in row, "there is no picture"


@pytest.mark.heavy
def test_rounding_and_width_are_judged_beside_opening() -> None:
    """Who only opens and shuts the mouth in time keeps sync, and loses the other two."""
    person, other = take(0), take(1)
    flat = take(0)
    flat.truth_TE[:, TRUTH.index("round")] = np.roll(person.truth_TE[:, TRUTH.index("round")], 60)
    right = (person.frames_THWC, person.truth_TE, width(person.sound_S))
    moved = 255 - person.frames_THWC
    wrong = (moved, flat.truth_TE, np.roll(width(person.sound_S), 60))
    probe = Knows(right, wrong, (other.frames_THWC, other.truth_TE, width(other.sound_S)))
    reading = probe.read(torch.from_numpy(other.frames_THWC))
    widths = WidthReader(reading.features_NF.numpy(), width(other.sound_S))
    good, _ = judge(person.frames_THWC, person, probe, period=12, widths=widths)  # type: ignore[arg-type]
    bad, _ = judge(moved, person, probe, period=12, widths=widths)  # type: ignore[arg-type]
    assert good["sync"] == pytest.approx(1.0)
    assert bad["sync"] == pytest.approx(1.0)
    assert good["round"] == pytest.approx(1.0)
    assert good["wide"] > 0.9
    assert bad["round"] < 0.5
    assert bad["wide"] < 0.5


def test_width_is_read_from_features_that_hold_it() -> None:
    generator = np.random.default_rng(0)
    features = generator.standard_normal((600, FEATURES))
    truth = 0.3 + features[:, 7] - 0.5 * features[:, 20]
    reader = WidthReader(features[:300], truth[:300])
    seen = Reading(torch.zeros(300, len(TRUTH)), torch.zeros(300, len(IDENTITY)), torch.from_numpy(features[300:]))
    assert np.corrcoef(reader.read(seen), truth[300:])[0, 1] > 0.99
    assert reader.read(seen).mean() == pytest.approx(truth[300:].mean(), abs=0.02)


def test_blinks_are_counted_once_each() -> None:
    lids = np.zeros(10 * FPS)
    for at in (10, 100, 200):
        lids[at : at + 5] = (0.4, 1.0, 1.0, 0.6, 0.2)
    assert per_minute(lids, rate_hz=FPS) == pytest.approx(18.0)
    assert per_minute(np.zeros(50), rate_hz=FPS) == 0.0


def blinking(seed: int, blinks: tuple[int, ...]) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Eyes dark on a pale face and pale when shut, in a picture with noise that brightens slowly."""
    lids = np.zeros(12 * FPS)
    for at in blinks:
        lids[at : at + 5] = (0.4, 1.0, 1.0, 0.6, 0.2)
    generator = np.random.default_rng(seed)
    grey = 150 + 20 * np.linspace(0, 1, len(lids))[:, None, None] + generator.normal(0, 2, (len(lids), 128, 128))
    for columns in (slice(46, 56), slice(72, 82)):
        grey[:, 50:56, columns] -= 90 * (1 - lids)[:, None, None]
    return np.clip(grey, 0, 255)[..., None].repeat(3, 3).astype(np.uint8), lids


@pytest.mark.heavy
def test_blinks_are_read_from_eyes_that_shut() -> None:
    reader = BlinkReader(*blinking(0, (30, 100, 170, 240)))
    frames, lids = blinking(1, (50, 130, 220))
    assert reader.per_minute(frames) == pytest.approx(15.0), "three in twelve seconds"
    assert np.corrcoef(reader.read(frames), lids)[0, 1] > 0.9
    assert reader.per_minute(blinking(2, ())[0]) == 0.0, "none where there is none"


def test_a_jump_at_every_latent_frame_is_no_seam_of_chunks_alone() -> None:
    levels = 100.0 + np.arange(96) * 0.1 + 5 * (np.arange(96) // 4 % 2)
    frames = np.repeat(levels[:, None, None, None], 32, 1).repeat(32, 2).repeat(3, 3)
    film = np.round(frames).astype(np.uint8)
    assert seam(film, period=4) > 5
    assert seam(film, period=12) < seam(film, period=4)


def test_gain_makes_the_sound_louder_by_so_many_decibels() -> None:
    sound_S = 0.01 * syllables(0)
    change_db = 10 * np.log10((louder(sound_S, 12) ** 2).mean() / (sound_S**2).mean())
    assert change_db == pytest.approx(12.0, abs=0.01)
    assert np.abs(louder(syllables(0), 60)).max() == 1.0
    assert {-30, 0, 12} <= set(GAINS_DB)


def test_a_run_that_is_flat_but_far_away_breaks_the_levels() -> None:
    """What a slope cannot say: another person from the first second on, and ever after."""
    held = {"colour_mean": 0.009, "identity_mean": 0.22, "identity_slope_holds_0": True}
    lost = {"colour_mean": 0.065, "identity_mean": 0.75, "identity_slope_holds_0": True}
    assert beyond(held) == []
    assert beyond(lost) == ["colour_mean 0.065 > 0.03", "identity_mean 0.750 > 0.35"]
    assert beyond({name: float("nan") for name in LEVELS}) != [], "what is not a number does not hold"


def test_the_evaluation_says_what_it_needs(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
                                           tmp_path: Path) -> None:  # fmt: skip
    from evaluate.command import run

    for arguments, says in (([], "--head is needed"), (["--head", "x.npz", "--only", "speed"], "--only takes quality")):
        monkeypatch.setattr("sys.argv", ["evaluate", "--work", str(tmp_path), *arguments])
        assert run() == 2
        assert says in capfd.readouterr().err
