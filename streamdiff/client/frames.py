"""Pictures and sound from the wire, put together again: a frame and exactly its sound.

Axes: H height, W width, C colours, S waveform samples.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from numpy.typing import NDArray

from streamdiff.errors import InputError

RATE_HZ = 24_000
_CODECS = {"vp8": "vp8", "h264": "h264"}
_MAX_SIDE = 4_096
_MAX_WAITING = 250


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Shown:
    """One frame and its sound."""

    frame_HWC: NDArray[np.uint8]
    """sRGB ``[H, W, 3]``."""
    sound_S: NDArray[np.float32]
    """Mono, -1..1, at 24 kHz; silence where nothing is said."""
    index: int
    """Number of the frame in the stream."""
    pts_s: float
    """Its time in the stream, seconds."""
    item_id: str | None
    """The utterance that is heard, in the server's events; None: none."""
    is_repeated: bool = False
    """Whether its own picture was lost on the way, and the one before stands for it."""


class Frames:
    """Puts together what belongs together. `sound` comes before the `picture` of the same frame."""

    def __init__(self, width: int, height: int, fps: int) -> None:
        if not (0 < width <= _MAX_SIDE and 0 < height <= _MAX_SIDE and 0 < fps <= 240):
            raise InputError(f"the server offers {width}x{height} pixels at {fps} frames a second; is it a face?")
        self._size, self._fps = (height, width, 3), fps
        self._decoder: Any = None
        self._sounds: dict[int, tuple[str, NDArray[np.float32]]] = {}
        self._last_HWC: NDArray[np.uint8] | None = None

    def sound(self, event: Mapping[str, Any]) -> None:
        """A ``response.output_audio.delta``.

        Raises:
            InputError: it is none.
        """
        index, pcm = event.get("frame"), _bytes(event)
        if type(index) is not int or len(pcm) % 2 or not isinstance(event.get("item_id"), str):
            raise InputError("the server sends sound that belongs to no frame")
        samples_S = (np.frombuffer(pcm, "<i2") / 32_767).astype(np.float32)
        self._sounds[index] = (event["item_id"], samples_S)
        while len(self._sounds) > _MAX_WAITING:
            self._sounds.pop(next(iter(self._sounds)))

    def picture(self, event: Mapping[str, Any]) -> Iterator[Shown]:
        """A ``streamdiff.video.delta``: its frame, after those whose sound came and whose pictures did not.

        Raises:
            InputError: it is none, or cannot be decoded.
        """
        index, pts_s = event.get("frame"), event.get("pts_s")
        if type(index) is not int or not isinstance(pts_s, int | float):
            raise InputError("the server sends a picture without its place")
        picture_HWC = self._decode(event)
        for late in sorted(k for k in self._sounds if k < index):
            before_HWC = picture_HWC if self._last_HWC is None else self._last_HWC
            yield self._shown(before_HWC, late, pts_s - (index - late) / self._fps, is_repeated=True)
        self._last_HWC = picture_HWC
        yield self._shown(picture_HWC, index, pts_s)

    def _shown(self, frame_HWC: NDArray[np.uint8], index: int, pts_s: float, *, is_repeated: bool = False) -> Shown:
        item_id, sound_S = self._sounds.pop(index, (None, None))
        if sound_S is None:
            sound_S = np.zeros(round(RATE_HZ / self._fps), np.float32)
        return Shown(
            frame_HWC=frame_HWC, sound_S=sound_S, index=index, pts_s=pts_s, item_id=item_id, is_repeated=is_repeated
        )

    def _decode(self, event: Mapping[str, Any]) -> NDArray[np.uint8]:
        codec, data = event.get("codec"), _bytes(event)
        if codec not in _CODECS:
            raise InputError(f"the server sends pictures as {str(codec)[:20]!r}; known: {', '.join(_CODECS)}")
        if self._decoder is None:
            self._decoder = av.CodecContext.create(_CODECS[codec], "r")
            self._decoder.thread_count = 1  # frames in flight would come late
        try:
            frames: list[Any] = self._decoder.decode(av.Packet(data))
        except FFmpegError as error:
            raise InputError(f"a picture that cannot be decoded: {error}") from error
        if len(frames) != 1 or (frames[0].height, frames[0].width) != self._size[:2]:
            raise InputError("a picture of another size than the session's")
        return frames[0].to_ndarray(format="rgb24")


def _bytes(event: Mapping[str, Any]) -> bytes:
    delta = event.get("delta")
    try:
        if isinstance(delta, str):
            return base64.b64decode(delta, validate=True)
    except (ValueError, binascii.Error):
        pass
    raise InputError("the server sends what is no base64")
