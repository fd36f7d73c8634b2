"""Face motion capture over UDP: the coefficients of a stream drive a rig of somebody else's, timed with its sound.

    osc        OSC 1.0, ``/face/jawOpen 0.5``: all 64 coefficients by their names
    vmc        VMC Protocol 2.0: VRM avatars with 52 blend shape clips of ARKit's names ("perfect sync")
    livelink   Live Link Face, protocol version 6: faces of Unreal Engine with ARKit curves, MetaHumans among them

A rig is told when its pose belongs to the sound, not when a packet happened to leave: VMC's ``/VMC/Ext/T`` is the
position in the stream, Live Link's frame time the time of day at which that position is heard.

Positive angles of Live Link nod down and turn towards the person's own right, in radians: so the curves of the eyes
stand beside ``eyeLook*`` in recordings of Epic's app (0.61 radians a unit, as `gaze_to_looks` has them); those of the
head are made by the same conversion. No Unreal Engine and no VRM application has been at hand.
"""

from __future__ import annotations

import math
import socket
import struct
import uuid
from collections.abc import Callable, Sequence
from datetime import datetime
from fractions import Fraction
from types import TracebackType

import numpy as np

from streamdiff.arrays import Floats
from streamdiff.avatar.kinematics import (
    ARKIT_NAMES,
    FPS,
    KinematicSpec,
    frame_to_osc,
    gaze_to_looks,
    osc_bundle,
    osc_message,
)
from streamdiff.errors import ConfigError, InputError
from streamdiff.stream import Shown

PORTS: dict[str, int | None] = {"osc": None, "vmc": 39539, "livelink": 11111}
"""Kinds of rigs, and the ports at which their programs listen unless they are told otherwise; OSC has none."""
_MAX_DATAGRAM = 1_400
"""Bytes that pass through usual networks in one piece."""
_DAY_S = 86_400.0
_LIVE_LINK_VERSION = 6


def _eye(side: str) -> tuple[str, ...]:
    stems = ("eyeBlink", "eyeLookDown", "eyeLookIn", "eyeLookOut", "eyeLookUp", "eyeSquint", "eyeWide")
    return tuple(stem + side for stem in stems)


def _sides(*stems: str) -> tuple[str, ...]:
    return tuple(stem + side for stem in stems for side in ("Left", "Right"))


LIVE_LINK_NAMES: tuple[str, ...] = (
    *_eye("Left"),
    *_eye("Right"),
    *("jawForward", "jawLeft", "jawRight", "jawOpen"),
    *("mouthClose", "mouthFunnel", "mouthPucker", "mouthLeft", "mouthRight"),
    *_sides("mouthSmile", "mouthFrown", "mouthDimple", "mouthStretch"),
    *("mouthRollLower", "mouthRollUpper", "mouthShrugLower", "mouthShrugUpper"),
    *_sides("mouthPress", "mouthLowerDown", "mouthUpperUp", "browDown"),
    "browInnerUp",
    *_sides("browOuterUp"),
    "cheekPuff",
    *_sides("cheekSquint", "noseSneer"),
    "tongueOut",
)
"""The 52 shapes in the order of Unreal's ``EARFaceBlendShape``; nine angles follow them in a packet."""


class MotionSender:
    """Sends the frames of one stream to a rig, each as it is taken. A context manager.

    Args:
        kind: one of `PORTS`.
        address: host and port.
        spec: layout of the coefficients.
        clock: the time of day in seconds; the system's local time.
    """

    def __init__(
        self,
        kind: str,
        address: tuple[str, int],
        spec: KinematicSpec,
        *,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._kind, self._address, self._spec = kind, address, spec
        self._clock = clock or _time_of_day_s
        self._began_s: float | None = None
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setblocking(False)  # a rig that is too slow loses poses, the face does not wait

    def send(self, shown: Shown) -> None:
        """Send the poses of these frames; they are heard from now on.

        Raises:
            ConfigError: the stream has no coefficients.
            InputError: the network refuses them.
        """
        if shown.motion_AE is None:
            raise ConfigError("a rig needs the coefficients of an avatar, and these frames have none; use AvatarEngine")
        if self._began_s is None:
            self._began_s = self._clock() - float(shown.pts)
        self._began_s += shown.late_s
        for k, frame_E in enumerate(shown.motion_AE):
            position_s = float(shown.pts + Fraction(k, FPS))
            for packet in self._packets(frame_E, position_s):
                self._emit(packet)

    def close(self) -> None:
        """Send nothing more; idempotent."""
        self._socket.close()

    def __enter__(self) -> MotionSender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _packets(self, frame_E: Floats, position_s: float) -> Sequence[bytes]:
        if self._kind == "vmc":
            return vmc_packets(frame_E, self._spec, time_s=position_s)
        if self._kind == "livelink":
            assert self._began_s is not None
            return (live_link_packet(frame_E, self._spec, time_of_day_s=self._began_s + position_s),)
        return (frame_to_osc(frame_E, self._spec),)

    def _emit(self, packet: bytes) -> None:
        try:
            self._socket.sendto(packet, self._address)
        except BlockingIOError:
            pass
        except OSError as error:
            host, port = self._address
            raise InputError(f"cannot send to the rig at {host}:{port}: {error.strerror}; check the address") from error


def rig_address(text: str) -> tuple[str, tuple[str, int]] | None:
    """``osc:HOST:PORT``, ``vmc:HOST[:PORT]`` or ``livelink:HOST[:PORT]``; None where it names no kind of rig.

    Raises:
        ConfigError: no host, or no port. InputError: no such host.
    """
    kind, _, rest = text.partition(":")
    if kind not in PORTS:
        return None
    name, colon, port = rest.partition(":")
    if not colon and PORTS[kind] is not None:
        port = str(PORTS[kind])
    if not name or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"a rig looks like {kind}:127.0.0.1:{PORTS[kind] or 9000}, got {text!r}")
    try:
        found = socket.getaddrinfo(name, int(port), socket.AF_INET, socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        raise InputError(f"--rig: there is no host {name!r}; give a name or an address that resolves") from None
    return kind, (str(found[0][4][0]), int(port))


def vmc_packets(frame_E: Floats, spec: KinematicSpec, *, time_s: float) -> list[bytes]:
    """One frame as datagrams of VMC Protocol: the head's rotation, 52 clips, and the order to apply them.

    The head is a bone in Unity's axes (x to the person's right, y up, z out of the face, left-handed); its position is
    zero, so a receiver must leave positions of bones alone. Names are those of Unity's ``ARKitBlendShapeLocation``.
    """
    messages = [osc_message("/VMC/Ext/OK", 1), osc_message("/VMC/Ext/T", time_s)]
    # All three axes point the other way than ours, which are right-handed: the numbers of a rotation stay as they are.
    messages.append(
        osc_message("/VMC/Ext/Bone/Pos", "Head", 0.0, 0.0, 0.0, *_quaternion(frame_E[spec.part("rotation")]))
    )
    for name, value in _shapes(frame_E, spec).items():
        messages.append(osc_message("/VMC/Ext/Blend/Val", name[0].upper() + name[1:], value))
    messages.append(osc_message("/VMC/Ext/Blend/Apply"))
    packets, held = [], [messages[0]]
    for message in messages[1:]:
        if len(osc_bundle([*held, message])) > _MAX_DATAGRAM:
            packets.append(osc_bundle(held))
            held = []
        held.append(message)
    return [*packets, osc_bundle(held)]


def live_link_packet(
    frame_E: Floats, spec: KinematicSpec, *, time_of_day_s: float, subject: str = "streamdiff"
) -> bytes:
    """One frame as a datagram of Live Link Face, for the subject of this name in Unreal's Live Link window.

    Version, device, subject, frame time and rate, and 61 curves, all big-endian; a string is its length and its bytes.
    """
    frames = time_of_day_s % _DAY_S * FPS
    shapes = _shapes(frame_E, spec)
    rotation_3 = frame_E[spec.part("rotation")].astype(np.float64)
    gaze_4 = frame_E[spec.part("gaze")].astype(np.float64)
    angles = [*_yaw_pitch_roll(rotation_3), -gaze_4[0], gaze_4[1], 0.0, -gaze_4[2], gaze_4[3], 0.0]
    curves = [shapes[name] for name in LIVE_LINK_NAMES] + [float(angle) for angle in angles]
    return b"".join(
        (
            struct.pack(">B", _LIVE_LINK_VERSION),
            _string(str(uuid.uuid5(uuid.NAMESPACE_URL, subject)).upper()),
            _string(subject),
            struct.pack(">ifii", int(frames), frames % 1.0, FPS, 1),
            struct.pack(f">B{len(curves)}f", len(curves), *curves),
        )
    )


def _shapes(frame_E: Floats, spec: KinematicSpec) -> dict[str, float]:
    """The 52 ARKit shapes, 0 to 1; eyes look where ``gaze`` says."""
    looks = gaze_to_looks(frame_E[None, spec.part("gaze")])
    values = {name: float(frame_E[spec.index(name)]) for name in ARKIT_NAMES}
    values |= {name: float(value_A[0]) for name, value_A in looks.items()}
    return {name: min(1.0, max(0.0, value)) for name, value in values.items()}


def _quaternion(rotation_3: Floats) -> tuple[float, float, float, float]:
    """A rotation vector as x, y, z, w."""
    angle = float(np.linalg.norm(rotation_3))
    scale = 0.5 if angle < 1e-8 else math.sin(angle / 2) / angle
    x, y, z = (float(value) * scale for value in rotation_3)
    return x, y, z, math.cos(angle / 2)


def _yaw_pitch_roll(rotation_3: Floats) -> tuple[float, float, float]:
    """A rotation vector as the angles that turn first about z, then x, then y: Unreal's order."""
    x, y, z, w = _quaternion(rotation_3)
    pitch = math.asin(max(-1.0, min(1.0, 2 * (w * x - y * z))))
    yaw = math.atan2(2 * (x * z + w * y), 1 - 2 * (x * x + y * y))
    roll = math.atan2(2 * (x * y + w * z), 1 - 2 * (x * x + z * z))
    return yaw, pitch, roll


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack(">i", len(raw)) + raw


def _time_of_day_s() -> float:
    now = datetime.now()
    return now.hour * 3600 + now.minute * 60 + now.second + now.microsecond / 1e6
