"""VMC and Live Link Face: packets as independent readers understand them, timed with the sound."""

from __future__ import annotations

import socket
import struct
from fractions import Fraction

import numpy as np
import pytest
from pylivelinkface import FaceBlendShape, PyLiveLinkFace
from pythonosc.osc_bundle import OscBundle
from scipy.spatial.transform import Rotation

from streamdiff.avatar.kinematics import ARKIT_NAMES, FPS, arkit64, gaze_to_looks
from streamdiff.avatar.mocap import LIVE_LINK_NAMES, MotionSender, live_link_packet, rig_address, vmc_packets
from streamdiff.errors import ConfigError, InputError
from streamdiff.stream import Shown

SPEC = arkit64()


def pose(seed: int = 0, **values: float) -> np.ndarray:
    """A frame with every coefficient somewhere in its range, but for those that are named."""
    generator = np.random.default_rng(seed)
    frame_E = generator.uniform(SPEC.low_E, SPEC.high_E).astype(np.float32) * 0.4
    frame_E[:52] = np.abs(frame_E[:52])
    for name, value in values.items():
        frame_E[SPEC.index(name)] = value
    return frame_E


def looks(frame_E: np.ndarray) -> dict[str, float]:
    return {name: float(value_A[0]) for name, value_A in gaze_to_looks(frame_E[None, SPEC.part("gaze")]).items()}


def osc_of(packets: list[bytes]) -> list[tuple[str, list[object]]]:
    """Messages in order, read by python-osc."""
    bundles = [OscBundle(packet) for packet in packets]
    return [(message.address, message.params) for bundle in bundles for message in bundle]


def test_vmc_says_pose_time_and_52_clips() -> None:
    frame_E = pose()
    packets = vmc_packets(frame_E, SPEC, time_s=12.48)
    assert max(map(len, packets)) <= 1_400
    messages = osc_of(packets)
    assert messages[0] == ("/VMC/Ext/OK", [1])
    assert messages[1] == ("/VMC/Ext/T", [pytest.approx(12.48)])
    assert messages[-1] == ("/VMC/Ext/Blend/Apply", [])
    clips = {str(p[0]): p[1] for address, p in messages if address == "/VMC/Ext/Blend/Val"}
    expected = {name: float(frame_E[SPEC.index(name)]) for name in ARKIT_NAMES} | looks(frame_E)
    assert clips == {name[0].upper() + name[1:]: pytest.approx(value) for name, value in expected.items()}
    assert len(messages) == 2 + 1 + 52 + 1


@pytest.mark.parametrize(
    ("turned", "seen"),
    [
        # Unity, left-handed: x to the person's right, y up, z out of the face.
        ({"headRotationX": 0.3}, (0.0, -1.0, 1.0)),  # nods: the nose, at +z, goes down
        ({"headRotationY": 0.3}, (1.0, 0.0, 1.0)),  # the left edge of the picture is on the person's right
        ({"headRotationZ": 0.3}, (0.0, 0.0, 1.0)),
    ],
)
def test_the_head_turns_in_unity_as_in_the_picture(turned: dict[str, float], seen: tuple[float, ...]) -> None:
    still = dict.fromkeys(("headRotationX", "headRotationY", "headRotationZ"), 0.0)
    messages = osc_of(vmc_packets(pose(**{**still, **turned}), SPEC, time_s=0.0))
    ((name, *numbers),) = [params for address, params in messages if address == "/VMC/Ext/Bone/Pos"]
    assert name == "Head"
    assert numbers[:3] == [0.0, 0.0, 0.0]
    # A quaternion gives the same matrix in a left-handed frame; only the drawing of it is mirrored.
    turn = Rotation.from_quat(numbers[3:])
    assert turn.magnitude() == pytest.approx(0.3, abs=1e-6)
    nose = turn.apply([0.0, 0.0, 1.0])
    assert np.sign(np.round(nose, 6)).tolist() == list(seen)
    if "headRotationZ" in turned:  # clockwise as seen: the person's right, on the left of the picture, goes up
        assert turn.apply([1.0, 0.0, 0.0])[1] > 0.2


def test_live_link_is_read_by_another_library() -> None:
    frame_E = pose(1)
    packet = live_link_packet(frame_E, SPEC, time_of_day_s=3600.5, subject="Ann")
    found, face = PyLiveLinkFace.decode(packet)
    assert found
    assert (face.name, face.fps, face._denominator, face._version & 0xFF) == ("Ann", FPS, 1, 6)
    assert (face._frames, face._sub_frame) == (90_012, pytest.approx(0.5, abs=1e-3))
    expected = {name: float(frame_E[SPEC.index(name)]) for name in ARKIT_NAMES} | looks(frame_E)
    read = {shape.name[0].lower() + shape.name[1:]: face.get_blendshape(shape) for shape in list(FaceBlendShape)[:52]}
    assert read == {name: pytest.approx(value, abs=1e-6) for name, value in expected.items()}
    assert [shape.name[0].lower() + shape.name[1:] for shape in list(FaceBlendShape)[:52]] == list(LIVE_LINK_NAMES)
    yaw, pitch, roll = Rotation.from_rotvec(frame_E[SPEC.part("rotation")].astype(float)).as_euler("YXZ")
    gaze_4 = frame_E[SPEC.part("gaze")]
    angles = [yaw, pitch, roll, -gaze_4[0], gaze_4[1], 0.0, -gaze_4[2], gaze_4[3], 0.0]
    assert [face.get_blendshape(shape) for shape in list(FaceBlendShape)[52:]] == pytest.approx(angles, abs=1e-6)


def test_live_link_is_what_unreal_unpacks() -> None:
    """Field by field in the order in which Unreal's archive reads them, and not a byte more."""
    packet = live_link_packet(pose(2), SPEC, time_of_day_s=86_400.0 + 1.0)
    version, length = struct.unpack_from(">Bi", packet)
    assert (version, length) == (6, 36)
    (name_length,) = struct.unpack_from(">i", packet, 41)
    name = packet[45 : 45 + name_length]
    assert name == b"streamdiff"
    frame, sub_frame, rate, base, count = struct.unpack_from(">ifiiB", packet, 45 + name_length)
    assert (frame, sub_frame, rate, base, count) == (25, 0.0, 25, 1, 61)  # a day ends at midnight
    assert len(packet) == 45 + name_length + 17 + 4 * 61
    assert 264 <= len(packet) <= 774  # what Unreal takes for a packet of its own


def test_the_eyes_of_live_link_agree_with_recordings_of_the_app() -> None:
    """Slopes of `LeftEyeYaw` over `eyeLookOutLeft` and of `LeftEyePitch` over `eyeLookDownLeft`: radians a unit.

    Fitted to three published takes of Live Link Face, 7,882 frames: -0.60 to -0.61, and 0.47 to 0.56.
    """
    for gaze, shape, angle, low, high in (
        ("gazeYawLeft", FaceBlendShape.EyeLookOutLeft, FaceBlendShape.LeftEyeYaw, -0.615, -0.600),
        ("gazePitchLeft", FaceBlendShape.EyeLookDownLeft, FaceBlendShape.LeftEyePitch, 0.46, 0.62),
    ):
        faces = [
            PyLiveLinkFace.decode(live_link_packet(pose(3, **{gaze: at}), SPEC, time_of_day_s=0.0))[1]
            for at in (0.05, 0.25)
        ]
        (shape0, angle0), (shape1, angle1) = ((f.get_blendshape(shape), f.get_blendshape(angle)) for f in faces)
        assert low < (angle1 - angle0) / (shape1 - shape0) < high


def shown(index: int, *, late_s: float = 0.0, frames: int = 1, motion: bool = True) -> Shown:
    return Shown(
        frames_THWC=np.zeros((frames, 2, 2, 3), np.uint8),
        sound_S=np.zeros(960 * frames, np.float32),
        index=index,
        pts=Fraction(index, FPS),
        epoch=0,
        late_s=late_s,
        motion_AE=np.stack([pose(index + k) for k in range(frames)]) if motion else None,
    )


@pytest.fixture
def listener() -> socket.socket:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.settimeout(10)
        yield listening  # type: ignore[misc]


def test_frame_times_follow_the_sound_and_not_the_packets(listener: socket.socket) -> None:
    now_s = 1_000.0
    with MotionSender("livelink", listener.getsockname(), SPEC, clock=lambda: now_s) as sender:
        for index, late_s in ((50, 0.0), (51, 0.0), (52, 0.2), (53, 0.0)):
            sender.send(shown(index, late_s=late_s))
            now_s += 0.07  # packets leave when they can
        sender.send(shown(54, frames=2))
    times_s = []
    for _ in range(6):
        _, face = PyLiveLinkFace.decode(listener.recv(65_536))
        times_s.append((face._frames + face._sub_frame) / FPS)
    assert times_s == pytest.approx([1000.0, 1000.04, 1000.28, 1000.32, 1000.36, 1000.40], abs=1e-3)


def test_vmc_time_is_the_position_in_the_stream(listener: socket.socket) -> None:
    with MotionSender("vmc", listener.getsockname(), SPEC) as sender:
        sender.send(shown(50))
    first = osc_of([listener.recv(65_536)])
    assert first[1] == ("/VMC/Ext/T", [pytest.approx(2.0)])


def test_frames_without_coefficients_move_no_rig(listener: socket.socket) -> None:
    with (
        MotionSender("osc", listener.getsockname(), SPEC) as sender,
        pytest.raises(ConfigError, match="use AvatarEngine"),
    ):
        sender.send(shown(0, motion=False))


def test_what_the_network_refuses_is_said() -> None:
    with (
        MotionSender("vmc", ("255.255.255.255", 39539), SPEC) as sender,
        pytest.raises(InputError, match=r"cannot send to the rig at 255\.255\.255\.255:39539"),
    ):
        sender.send(shown(0))


@pytest.mark.parametrize(
    ("text", "rig"),
    [
        ("vmc:127.0.0.1", ("vmc", ("127.0.0.1", 39539))),
        ("livelink:127.0.0.1", ("livelink", ("127.0.0.1", 11111))),
        ("osc:127.0.0.1:9000", ("osc", ("127.0.0.1", 9000))),
        ("out/rig.jsonl", None),
    ],
)
def test_a_rig_is_named_by_kind_and_address(text: str, rig: object) -> None:
    assert rig_address(text) == rig


@pytest.mark.parametrize(
    "text", ["osc:127.0.0.1", "vmc:", "vmc:127.0.0.1:", "vmc:127.0.0.1:0", "livelink:h:65536", "osc:h:x"]
)
def test_an_address_that_cannot_be_one_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="a rig looks like"):
        rig_address(text)
