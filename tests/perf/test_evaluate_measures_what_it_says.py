"""Every number of the evaluation, held against signals whose answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from plots import Panel, draw_panels, small_png
from signals import (
    Array,
    coarse,
    first_crossing,
    frechet,
    interval,
    picture,
    response,
    rolling,
    seam_ratio,
    slope,
    synchrony,
    windows,
)


def noise(n: int, seed: int, keep: float = 0.9) -> Array:
    """A track that remembers: its neighbours are alike."""
    generator = np.random.default_rng(seed)
    out = np.zeros(n)
    for t in range(1, n):
        out[t] = keep * out[t - 1] + generator.standard_normal()
    return out


@given(lag=st.integers(-10, 10), gain=st.floats(0.1, 10), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_known_lag_is_found(lag: int, gain: float, seed: int) -> None:
    long = noise(540, seed, keep=0.5)
    heard, seen = long[20:520], gain * long[20 - lag : 520 - lag] + 3.0
    found = synchrony(seen, heard)
    assert found.lag == lag
    assert found.best == pytest.approx(1.0)
    assert found.at_zero <= found.best


def test_a_still_mouth_follows_nothing() -> None:
    assert synchrony(np.full(100, 0.3), noise(100, 0)).at_zero == 0.0
    with pytest.raises(ValueError, match="cannot be compared"):
        synchrony(np.zeros(20), np.zeros(20))


@pytest.mark.parametrize("rise", [-2.0, 0.0, 0.7])
def test_a_known_slope_lies_within_its_interval(rise: float) -> None:
    at_s = np.arange(500) * 20.0
    held = 0
    for seed in range(40):
        line = slope(at_s, rise * at_s / 1000 + noise(500, seed), block_s=600.0, resamples=300)
        held += line.low <= rise <= line.high
    # Of 95 % intervals, 40 draws hold the truth at least 33 times in all but one case of a thousand.
    assert held >= 33


def test_a_drift_is_told_from_lingering_noise() -> None:
    at_s = np.arange(500) * 20.0
    drifting = slope(at_s, 2.0 * at_s / 1000 + noise(500, 1), block_s=600.0)
    assert drifting.per_1000_s == pytest.approx(2.0, abs=0.5)
    assert not drifting.holds_zero
    # Taking neighbours for strangers makes the interval too narrow: flat noise then passes for drift.
    flat = [slope(at_s, noise(500, seed), block_s=600.0, resamples=300).holds_zero for seed in range(20)]
    naive = [slope(at_s, noise(500, seed), block_s=20.0, resamples=300).holds_zero for seed in range(20)]
    assert sum(flat) >= 15 > sum(naive)


def test_a_crossing_counts_only_when_it_lasts() -> None:
    at_s = np.arange(10.0)
    value = np.array([0, 2, 0, 0, 2, 2, 2, 0, 0, 0.0])
    assert first_crossing(at_s, value, 1.0) == 4.0
    assert first_crossing(at_s, value, 3.0) is None


def test_a_jump_at_every_chunk_shows_as_a_seam() -> None:
    change = np.ones(119)
    assert seam_ratio(change, period=12) == pytest.approx(1.0)
    change[11::12] = 2.5
    assert seam_ratio(change, period=12) == pytest.approx(2.5)
    # One frame beside the border is no seam.
    assert seam_ratio(np.roll(change, 1), period=12) < 1.0


def film(values_T: Array) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    frames = np.full((len(values_T), 128, 128, 3), 100, np.uint8)
    frames[:, 40:90, 40:90] = np.clip(values_T, 0, 255).astype(np.uint8)[:, None, None, None]
    return frames


def test_pictures_are_judged_as_they_move() -> None:
    still = picture(film(np.full(140, 50)), period=12)
    assert (still.jitter, still.flicker, still.seam) == (0.0, 0.0, 1.0)
    steady = picture(film(np.arange(140.0)), period=12)
    shaking = picture(film(100.0 + 10 * (np.arange(140) % 2)), period=12)
    assert steady.jitter == pytest.approx(0.0)
    assert shaking.jitter == pytest.approx(20 * (50 / 128) ** 2, rel=0.01)
    assert steady.flicker == 0.0, "the wall did not move"
    unquiet = film(np.full(40, 50))
    unquiet[::2, :8, :8] += 8
    assert picture(unquiet, period=12).flicker > 0
    assert picture(film(np.full(10, 255)), period=12).saturated == pytest.approx((50 / 128) ** 2)
    # A film longer than a part, judged in parts, is judged as a whole.
    jumps = 100.0 + np.random.default_rng(0).integers(0, 50, 130)
    whole = np.abs(np.diff(jumps)).mean() * (50 / 128) ** 2
    assert float(np.abs(np.diff(film(jumps).mean(3), axis=0)).mean()) == pytest.approx(whole, rel=1e-3)
    assert picture(film(jumps), period=12).jitter == pytest.approx(
        np.abs(np.diff(jumps, 2)).mean() * (50 / 128) ** 2, rel=1e-3
    )


def test_a_crowd_is_not_apart_from_itself() -> None:
    generator = np.random.default_rng(0)
    crowd = generator.standard_normal((400, 8)) @ generator.standard_normal((8, 8))
    assert frechet(crowd, crowd) == pytest.approx(0.0, abs=1e-6)
    assert frechet(crowd, crowd + 3.0) == pytest.approx(8 * 9.0)
    # Along one axis: (a - b)^2 for deviations a and b.
    line = generator.standard_normal((4000, 1))
    line = (line - line.mean()) / line.std(ddof=1)
    both = np.concatenate([line, np.random.default_rng(1).permutation(line)], 1)
    assert frechet(2 * both, 5 * both) == pytest.approx(2 * 9.0, rel=1e-6)


def test_short_windows_know_the_order_of_frames() -> None:
    track = np.sin(np.arange(240) / 3.0)[:, None]
    mixed = np.random.default_rng(0).permutation(track)
    assert windows(track).shape == (39, 3)
    assert windows(mixed)[:, 2].mean() > 2 * windows(track)[:, 2].mean()


def test_a_response_is_counted_from_the_switch() -> None:
    track = np.concatenate([np.full(50, 1.0), np.linspace(1, 0, 21), np.zeros(50)])
    frames, way = response(track, 45, before=40, steady=20)
    assert frames == 15
    assert way == pytest.approx(-1.0)
    assert rolling(track, 5).shape == track.shape
    assert rolling(np.full(30, 2.0), 25, spread=True).max() == 0.0


def test_an_interval_over_few_cases_is_wide() -> None:
    mean, low, high = interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert high - mean == pytest.approx(3.18 * np.std([1, 2, 3, 4], ddof=1) / 2)
    assert mean - low == pytest.approx(high - mean)


def test_coarse_colours_are_means() -> None:
    frames = np.zeros((2, 128, 128, 3), np.uint8)
    frames[:, :32, :32, 0] = 255
    assert coarse(frames).shape == (2, 4, 4, 3)
    assert coarse(frames)[0, 0, 0].tolist() == [1.0, 0.0, 0.0]
    assert coarse(frames)[0].sum() == 1.0


def test_pictures_stay_small(tmp_path: Path) -> None:
    curve = [(float(t), float(v)) for t, v in enumerate(noise(200, 0))]
    draw_panels([Panel("a", {"x": curve, "y": curve[:1]}, mark=0.0), Panel("b", {})], tmp_path / "a.png", unit="s")
    with Image.open(tmp_path / "a.png") as shown:
        assert shown.size == (860, 464)
        assert len(shown.convert("RGB").getcolors() or []) > 4
    generator = np.random.default_rng(0)
    grain = Image.fromarray(generator.integers(0, 256, (200, 200, 3), np.uint8))
    small_png(grain, tmp_path / "b.png", limit_bytes=30_000)
    assert (tmp_path / "b.png").stat().st_size <= 30_000
