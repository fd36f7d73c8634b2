"""Films of the command line keep their bytes where they were hashed, and their pictures anywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.generate.kept_films import FILMS, Look, fingerprint, kept_hashes, kept_look, look, make, sha256

MEAN_LEVELS, SOUND = 2.0, 0.002
"""How far a film made by another processor may be from the kept one: mean grey levels of a picture, RMS of sound. With
AVX2 in place of AVX-512 it is 0.9 levels and 0.0001; another seed is more than 4 levels away."""


def distance(one: Look, other: Look) -> tuple[float, float]:
    """Mean grey levels by which the worst thumbnail differs, and the loudness."""
    assert one.thumbnails_NHW3.shape == other.thumbnails_NHW3.shape
    levels = np.abs(one.thumbnails_NHW3.astype(float) - other.thumbnails_NHW3.astype(float)).mean((1, 2, 3)).max()
    return float(levels), float(np.abs(one.loudness_N - other.loudness_N).max())


@pytest.mark.processes
@pytest.mark.parametrize(
    "name", [name if name == "tiny" else pytest.param(name, marks=pytest.mark.slow) for name in FILMS]
)
def test_a_film_is_the_one_that_is_kept(name: str, tmp_path: Path) -> None:
    make(name, tmp_path / "film.mp4")
    seen, kept = look(tmp_path / "film.mp4"), kept_look(name)
    assert seen.num_frames == kept.num_frames
    levels, sound = distance(seen, kept)
    assert levels <= MEAN_LEVELS
    assert sound <= SOUND
    hashes = kept_hashes(name)
    assert hashes.get(fingerprint(), sha256(tmp_path / "film.mp4")) == sha256(tmp_path / "film.mp4")


@pytest.mark.parametrize("name", FILMS)
def test_the_kept_pictures_could_tell_a_still_picture_from_the_film(name: str) -> None:
    """Half a second of another moment, or no motion at all, is further away than the tolerance."""
    kept = kept_look(name)
    still = Look(
        kept.num_frames, np.repeat(kept.thumbnails_NHW3[:1], len(kept.thumbnails_NHW3), axis=0), kept.loudness_N
    )
    late = Look(kept.num_frames, np.roll(kept.thumbnails_NHW3, 1, axis=0), np.roll(kept.loudness_N, 1))
    assert distance(still, kept)[0] > 2 * MEAN_LEVELS
    assert distance(late, kept)[1] > 2 * SOUND
