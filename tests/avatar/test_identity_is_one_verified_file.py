"""A bundle survives its file bit for bit, and notices every change."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from streamdiff.avatar.bundle import GRID, IdentityBundle, with_look
from streamdiff.avatar.fields import fill_smoothly
from streamdiff.avatar.identity import bundle_from_landmarks, create_bundle, read_photo
from streamdiff.avatar.kinematics import ARKIT_NAMES
from streamdiff.avatar.rig import load_rig
from streamdiff.cli import avatar as commands
from streamdiff.errors import CheckpointError, ConfigError, InputError
from tests.avatar.drawn_face import drawn_bundle, drawn_face


def test_a_bundle_returns_from_its_file_bit_for_bit(tmp_path: Path) -> None:
    bundle = drawn_bundle()
    loaded = IdentityBundle.load(bundle.save(tmp_path / "a.avatar"))
    assert loaded.sha256 == bundle.sha256
    assert loaded.placement == bundle.placement
    for name, tensor in bundle.tensors().items():
        assert torch.equal(loaded.tensors()[name], tensor), name


@pytest.mark.heavy
def test_the_same_photo_makes_the_same_bundle() -> None:
    assert bundle_from_landmarks(*drawn_face(), name="drawn").sha256 == drawn_bundle().sha256


@pytest.mark.parametrize("name", sorted(drawn_bundle().tensors()))
def test_one_changed_number_is_noticed(name: str, tmp_path: Path) -> None:
    path = drawn_bundle().save(tmp_path / "a.avatar")
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    raw = tensors[name].view(torch.uint8).flatten()
    raw[len(raw) // 2] ^= 1
    save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match="altered"):
        IdentityBundle.load(path)


def test_a_changed_fact_is_noticed(tmp_path: Path) -> None:
    path = drawn_bundle().save(tmp_path / "a.avatar")
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    facts = json.loads(metadata["facts"])
    facts["placement"]["pixels_per_cm"] *= 1.01
    save_file(load_file(path), path, metadata | {"facts": json.dumps(facts, sort_keys=True)})
    with pytest.raises(CheckpointError, match="altered"):
        IdentityBundle.load(path)


def test_what_is_no_bundle_says_so(tmp_path: Path) -> None:
    missing, text, other = tmp_path / "no.avatar", tmp_path / "text", tmp_path / "other.safetensors"
    text.write_text("not a bundle")
    save_file({"x": torch.zeros(3)}, other)
    for path in (missing, text, other):
        with pytest.raises(CheckpointError, match="create_bundle"):
            IdentityBundle.load(path)


def test_a_bundle_tells_what_it_holds() -> None:
    facts = drawn_bundle().inspect()
    assert facts["size"] == 256
    assert not facts["fitted"]
    assert facts["tensors"]["upper_K2GG"] == ["float16", 1 + len(ARKIT_NAMES), 2, GRID, GRID]
    json.dumps(facts)


def test_a_name_cannot_command_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = dataclasses.replace(drawn_bundle(), name="\x1b[2J\x1b]0;owned\x07me")
    path = tmp_path / "a.avatar"
    commands._save(bundle, path)
    parser = argparse.ArgumentParser()
    commands.add_arguments(parser)
    args = parser.parse_args(["inspect", str(path)])
    assert args.run(args) == 0
    shown = capsys.readouterr().out
    assert "owned" in shown
    assert shown.replace("\n", "").isprintable()


def test_another_look_is_another_bundle() -> None:
    bundle = drawn_bundle()
    assert with_look(bundle, gloss=0.9).sha256 != bundle.sha256
    assert dataclasses.replace(bundle, name="other").sha256 != bundle.sha256


def test_wrong_sizes_and_turned_faces_are_refused() -> None:
    picture, landmarks = drawn_face()
    with pytest.raises(ConfigError, match="256 or 512"):
        create_bundle(picture, 300)
    aside = landmarks.copy()
    cos, sin = np.cos(0.9), np.sin(0.9)
    aside[:, 0] = cos * (landmarks[:, 0] - 160) + sin * landmarks[:, 2] + 160
    aside[:, 2] = -sin * (landmarks[:, 0] - 160) + cos * landmarks[:, 2]
    with pytest.raises(InputError, match=r"turned by 5\d degrees"):
        bundle_from_landmarks(picture, aside)


def test_a_file_that_is_no_picture_says_so(tmp_path: Path) -> None:
    text = tmp_path / "photo.jpg"
    text.write_text("hello")
    for path in (text, tmp_path / "missing.png", tmp_path):
        with pytest.raises(InputError, match="cannot read a picture from"):
            read_photo(path)


def test_far_from_the_face_nothing_moves() -> None:
    bundle = drawn_bundle()
    for field in (bundle.upper_K2GG, bundle.lower_K2GG):
        rim = torch.cat([field[..., 0, :], field[..., -1, :], field[..., 0], field[..., -1]], -1)
        assert rim.abs().max() < 0.05
        assert torch.isfinite(field).all()
    assert bundle.mask_HW[0].max() == bundle.mask_HW[:, 0].max() == 0


def test_the_rig_opens_the_jaw_and_shuts_the_eyes() -> None:
    rig = load_rig()
    assert rig.shapes_EJ3.shape == (52, 468, 3)
    jaw = rig.shapes_EJ3[ARKIT_NAMES.index("jawOpen"), :, 1]
    assert jaw[14] > 3, "the lower lip falls (cm, downwards)"
    assert abs(jaw[13]) < 0.5, "the upper one hardly"
    blink = rig.shapes_EJ3[ARKIT_NAMES.index("eyeBlinkLeft"), :, 1]
    assert blink[386] > 0.7, "the left lid falls"
    assert abs(blink[159]) < 0.05, "the right one stays"
    assert not rig.shapes_EJ3[ARKIT_NAMES.index("tongueOut")].any()


def test_filling_keeps_the_known_and_is_harmonic_elsewhere() -> None:
    known = torch.zeros(64, 64, dtype=torch.bool)
    known[[0, -1]] = known[:, [0, -1]] = True
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    harmonic = torch.stack([x * y, x**2 - y**2, x]).double()
    filled = fill_smoothly(harmonic * known, known, iterations=800)
    assert torch.equal(filled[:, known], harmonic[:, known])
    # Central differences of these three polynomials are exact.
    assert (filled - harmonic).abs().max() < 2e-3
