"""Every coefficient is reached by name, and leaves the house unchanged."""

from __future__ import annotations

import doctest
import struct

import numpy as np
import pytest

from streamdiff.avatar import kinematics
from streamdiff.avatar.kinematics import KinematicSpec, Part
from streamdiff.errors import ConfigError, InputError

SPECS = [kinematics.arkit64(), kinematics.full256(), kinematics.lp265(), kinematics.lp70()]


def random_motion(spec: KinematicSpec, num_frames: int = 5) -> np.ndarray:
    rng = np.random.default_rng(0)
    low_E, high_E = np.maximum(spec.low_E, -3), np.minimum(spec.high_E, 3)
    return (low_E + rng.random((num_frames, spec.num_coefs)) * (high_E - low_E)).astype(np.float32)


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(kinematics).failed == 0


@pytest.mark.parametrize(
    ("spec", "width"), list(zip(SPECS, [64, 256, 265, 70], strict=True)), ids=lambda s: getattr(s, "name", "")
)
def test_widths_are_those_of_the_published_layouts(spec: KinematicSpec, width: int) -> None:
    assert spec.num_coefs == width == len(spec.rest_E)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_slices_tile_the_vector(spec: KinematicSpec) -> None:
    covered = [i for part in spec.parts for i in range(*spec.part(part.name).indices(spec.num_coefs))]
    assert covered == list(range(spec.num_coefs))


def test_the_arkit_part_has_the_52_shapes_of_arkit() -> None:
    names = kinematics.ARKIT_NAMES
    assert len(set(names)) == 52
    assert sum(n.startswith("eye") for n in names) == 14
    assert sum(n.startswith("mouth") for n in names) == 23
    assert names[:3] == ("browDownLeft", "browDownRight", "browInnerUp")
    assert names[-3:] == ("noseSneerLeft", "noseSneerRight", "tongueOut")


def test_the_wider_layout_begins_with_the_default_one() -> None:
    assert kinematics.full256().names[:64] == kinematics.arkit64().names


def test_rest_lies_in_range_and_cannot_be_written() -> None:
    for spec in SPECS:
        assert np.array_equal(spec.clamp(spec.rest_E), spec.rest_E)
        with pytest.raises(ValueError, match="read-only"):
            spec.rest_E[0] = 1


def test_motion_survives_json_lines() -> None:
    spec = kinematics.arkit64()
    motion_AE = random_motion(spec)
    read_AE = kinematics.read_json_lines(kinematics.json_lines(motion_AE, spec), spec)
    assert np.abs(read_AE - motion_AE).max() <= 1e-6


def test_a_broken_motion_file_names_the_line() -> None:
    spec = kinematics.arkit64()
    lines = list(kinematics.json_lines(random_motion(spec), spec))
    with pytest.raises(InputError, match="line 3"):
        kinematics.read_json_lines([*lines[:2], "{", *lines[3:]], spec)
    with pytest.raises(InputError, match="line 1"):
        kinematics.read_json_lines(['{"some": "file"}'], spec)
    with pytest.raises(InputError, match=r"line 2.*noSuchShape"):
        kinematics.read_json_lines([lines[0], '{"coefs": {"noSuchShape": 1}}'], spec)


def decode_osc(data: bytes) -> dict[str, float]:
    """Independent reader, after the OSC 1.0 text."""
    assert data[:8] == b"#bundle\0"
    at, out = 16, {}
    while at < len(data):
        (size,) = struct.unpack_from(">i", data, at)
        message = data[at + 4 : at + 4 + size]
        assert size % 4 == 0
        address = message[: message.index(b"\0")].decode()
        tags_at = (len(address) // 4 + 1) * 4
        assert message[tags_at : tags_at + 4] == b",f\0\0"
        (out[address],) = struct.unpack_from(">f", message, tags_at + 4)
        at += 4 + size
    return out


def test_osc_says_the_same_numbers() -> None:
    spec = kinematics.arkit64()
    frame_E = random_motion(spec)[0]
    packet = kinematics.frame_to_osc(frame_E, spec)
    assert decode_osc(packet) == {f"/face/{n}": float(v) for n, v in zip(spec.names, frame_E, strict=True)}
    assert len(packet) < 65507


def test_liveportrait_layouts_convert_there_and_back() -> None:
    motion_AE = random_motion(kinematics.lp70(), 64)
    motion_AE[:, kinematics.lp70().part("angles")] = np.linspace(-97.5, 97.5, 64 * 3).reshape(64, 3)
    back_AE = kinematics.lp265_to_lp70(kinematics.lp70_to_lp265(motion_AE))
    assert np.abs(back_AE - motion_AE).max() < 1e-4


def test_convert_keeps_shared_names_and_rests_the_others() -> None:
    narrow, wide = kinematics.arkit64(), kinematics.full256()
    motion_AE = random_motion(narrow)
    wide_AE = kinematics.convert(motion_AE, narrow, wide)
    assert np.array_equal(wide_AE[:, :64], motion_AE)
    assert not wide_AE[:, 64:].any()
    with pytest.raises(ConfigError, match="share no coefficient"):
        kinematics.convert(motion_AE, narrow, kinematics.lp70())


def test_wrong_motion_is_refused() -> None:
    spec = kinematics.arkit64()
    with pytest.raises(InputError, match="64 coefficients"):
        spec.clamp(np.zeros((2, 63), np.float32))
    with pytest.raises(InputError, match="not finite"):
        spec.clamp(np.full((2, 64), np.nan, np.float32))
    with pytest.raises(ConfigError, match="no part"):
        spec.part("tail")
    with pytest.raises(ConfigError, match="twice"):
        KinematicSpec("double", (Part("a", ("x",), 0, 1), Part("b", ("x",), 0, 1)))


def test_looks_follow_the_gaze() -> None:
    gaze_A4 = np.array([[0.3, 0.2, 0.3, 0.2]], np.float32)
    looks = kinematics.gaze_to_looks(gaze_A4)
    assert looks["eyeLookOutLeft"][0] > 0
    assert looks["eyeLookInRight"][0] > 0
    assert looks["eyeLookDownLeft"][0] == looks["eyeLookDownRight"][0] > 0
    assert looks["eyeLookOutRight"][0] == looks["eyeLookInLeft"][0] == looks["eyeLookUpLeft"][0] == 0
