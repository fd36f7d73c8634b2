"""Pictures and sound as packets: VP8 or H.264, and Opus, tuned for a face that must not wait.

One frame in, one packet out, nothing held back. A keyframe is made when it is asked for, and else never: a face hardly
changes, and every keyframe is a burst that the network has to swallow at once.

Bitrate: libx264 takes a new one while it runs. libavcodec cannot change libvpx's: VP8 is therefore opened anew, which
costs a keyframe, only when the rate is off by more than a third, and at most every 10 s.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, TypeAlias

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from streamdiff.errors import ConfigError, StreamdiffError

Codec: TypeAlias = Literal["vp8", "h264"]

_MIN_BITRATE = 100_000
_REOPEN_S = 10.0
_REOPEN_RATIO = 4 / 3
_OPUS_BITRATE = 40_000


@dataclass(frozen=True, slots=True)
class Picture:
    """One encoded frame."""

    data: bytes
    is_key: bool
    index: int
    """Of the frame in the stream."""


def full_bitrate(width: int, height: int) -> int:
    """Bits per second at which a talking face of this size looks as it was made: 0.8 Mbit/s at 256x256."""
    return max(_MIN_BITRATE, min(4_000_000, round(800_000 * (width * height / 65_536) ** 0.6)))


class VideoEncoder:
    """Encodes the frames of one stream. `encode` is called by one thread at a time; `aim` by any."""

    def __init__(
        self,
        width: int,
        height: int,
        fps: int,
        *,
        codec: Codec = "vp8",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if codec not in ("vp8", "h264"):
            raise ConfigError(f"pictures are sent as vp8 or h264, got {codec!r}")
        if width % 2 or height % 2:
            raise ConfigError(f"video needs even sides, got {width}x{height}; choose another size")
        self.codec: Codec = codec
        self.most = full_bitrate(width, height)
        self.num_keys = 0
        self._size = width, height
        self._reformatter = VideoReformatter()  # a frame's own one would be made anew for each, 0.2 ms
        self._fps = fps
        self._clock = clock
        self._aim = self.most
        self._opened_s = clock()
        self._context = self._open(self.most)

    @property
    def bitrate(self) -> int:
        """Bits per second that the encoder keeps to now."""
        return int(self._context.bit_rate or 0)

    def aim(self, bitrate: float) -> None:
        """Keep to so many bits per second from the next frame on, as well as the codec can."""
        self._aim = int(max(_MIN_BITRATE, min(self.most, bitrate)))

    def encode(self, frame_HWC: NDArray[np.uint8], index: int, *, key: bool = False) -> Picture:
        """Encode frame ``index``, uint8 sRGB ``[H, W, 3]``; with ``key``, so that a viewer can begin with it."""
        self._follow()
        rgb = av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")
        frame = self._reformatter.reformat(rgb, format="yuv420p")
        frame.pts = index
        frame.time_base = Fraction(1, self._fps)
        frame.pict_type = PictureType.I if key else PictureType.NONE
        packets = self._context.encode(frame)
        if len(packets) != 1:
            raise StreamdiffError(f"the {self.codec} encoder gave {len(packets)} packets for one frame; report this")
        is_key = bool(packets[0].is_keyframe)
        self.num_keys += is_key
        return Picture(bytes(packets[0]), is_key, index)

    def _follow(self) -> None:
        """Bring the encoder to the bitrate that is aimed at."""
        aim, now = self._aim, self.bitrate
        if aim == now:
            return
        if self.codec == "h264":
            self._context.bit_rate = aim
            self._context.options = {}
            return
        waited_s = self._clock() - self._opened_s
        if max(aim, now) > _REOPEN_RATIO * min(aim, now) and waited_s >= _REOPEN_S:
            self._context, self._opened_s = self._open(aim), self._clock()

    def _open(self, bitrate: int) -> Any:
        context: Any = av.CodecContext.create("libvpx" if self.codec == "vp8" else "libx264", "w")
        context.width, context.height = self._size
        context.pix_fmt = "yuv420p"
        context.bit_rate = bitrate
        context.time_base = Fraction(1, self._fps)
        context.framerate = Fraction(self._fps)
        context.gop_size = 1 << 20
        context.max_b_frames = 0
        context.thread_count = 1
        rate = str(bitrate)
        if self.codec == "vp8":
            context.options = {
                "deadline": "realtime",
                "cpu-used": "-6",
                "lag-in-frames": "0",
                "static-thresh": "1",
                "minrate": rate,
                "maxrate": rate,
                "bufsize": rate,
                "undershoot-pct": "100",
                "overshoot-pct": "15",
                "qmin": "4",
                "qmax": "56",
            }
        else:
            context.options = {
                "preset": "veryfast",
                "tune": "zerolatency",
                "profile": "baseline",
                "sc_threshold": "0",
                "forced-idr": "1",
                "maxrate": rate,
                "bufsize": rate,
            }
        return context


class SoundEncoder:
    """Opus packets from int16 blocks of 20 ms."""

    def __init__(self, rate_hz: int) -> None:
        if rate_hz not in (8_000, 12_000, 16_000, 24_000, 48_000):
            raise ConfigError(f"Opus takes 8, 12, 16, 24 or 48 kHz, got {rate_hz} Hz")
        context: Any = av.CodecContext.create("libopus", "w")
        context.sample_rate = rate_hz
        context.layout = "mono"
        context.format = "s16"
        context.bit_rate = _OPUS_BITRATE
        context.time_base = Fraction(1, rate_hz)
        # Lost packets are told again, roughly, in the packet after them.
        context.options = {"application": "voip", "frame_duration": "20", "fec": "1", "packet_loss": "5"}
        self._context = context
        self._rate_hz = rate_hz

    def encode(self, block_S: NDArray[np.int16], first: int) -> bytes:
        """Encode one block whose first sample is number ``first`` of the stream."""
        frame = av.AudioFrame.from_ndarray(block_S[None], format="s16", layout="mono")
        frame.sample_rate = self._rate_hz
        frame.pts = first
        frame.time_base = Fraction(1, self._rate_hz)
        packets = self._context.encode(frame)
        if len(packets) != 1:
            raise StreamdiffError(f"the Opus encoder gave {len(packets)} packets for one block; report this")
        return bytes(packets[0])
