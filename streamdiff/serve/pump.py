"""The pump: takes what a session shows, encodes it once, and hands it to every viewer.

    session -> pump -> Beat(picture, 20 ms blocks of sound) -> viewer, viewer, ...

A beat is one frame and exactly its sound; both carry their place in the stream, so that every door can put them on one
clock. Nothing is encoded while nobody wants it encoded. A viewer that does not keep up loses beats, not the others: its
queue is bounded, and it goes on at the next keyframe.

All methods belong to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from streamdiff.errors import SessionClosed
from streamdiff.serve.clock import BLOCK_S, Blocks, Playhead
from streamdiff.serve.encoder import Codec, Picture, SoundEncoder, VideoEncoder
from streamdiff.serve.mark import mark_of
from streamdiff.serve.protocol import Ending
from streamdiff.stream import Can, Interrupted, Metrics, Samples, Segment, Shown, State

logger = logging.getLogger(__name__)

_VIEWER_BEATS = 25
"""Beats that may wait for one viewer: a second."""
_KEY_EVERY_S = 0.5
"""Keyframes are made at most this often, however often they are asked for."""


class Source(Protocol):
    """What a pump needs of a session; `streamdiff.session.Session` is one. See `streamdiff.stream.Stream`."""

    @property
    def fps(self) -> int: ...

    @property
    def rate_hz(self) -> int: ...

    @property
    def size(self) -> tuple[int, int]: ...

    @property
    def can(self) -> frozenset[Can]: ...

    @property
    def metrics(self) -> Metrics: ...

    def push_audio(self, samples: Samples, rate_hz: int | None = None, *, last: bool = False) -> Segment: ...

    def say(self, text: str | Iterable[str] | AsyncIterable[str]) -> Segment: ...

    def end(self) -> None: ...

    def listen(self, listening: bool = True) -> None: ...

    def interrupt(self, played_s: float | None = None) -> Interrupted: ...

    async def prompt(self, text: str) -> None: ...

    def __aiter__(self) -> AsyncIterator[Shown]: ...

    async def aclose(self) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class Sound:
    """20 ms of sound."""

    first: int
    """Number of its first sample on the viewers' clock (`Beat.at`)."""
    samples_S: NDArray[np.int16]
    """Mono, at the session's rate."""
    opus: bytes | None
    """The same as an Opus packet; None while nobody wants one."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Beat:
    """One frame and its sound, on their way to the viewers."""

    shown: Shown
    """The frame and its sound as the session gave them; one frame, whatever its chunks hold."""
    picture: Picture | None
    """The same, encoded; None while nobody wants that."""
    sounds: tuple[Sound, ...]
    """The 20 ms blocks that are complete with this beat; two at 25 frames per second."""
    at: Fraction
    """Its place on the viewers' clock, seconds: ``pts``, and all the time by which the stream fell behind until then.
    A player that is told ``pts`` alone would take every later frame for a late one, and wait longer and longer.
    """
    left_s: float
    """When it left the pump, on the monotonic clock."""

    @property
    def index(self) -> int:
        """Of the frame in the stream."""
        return self.shown.index

    @property
    def pts(self) -> Fraction:
        """Its presentation time, seconds since the first frame of the stream."""
        return self.shown.pts

    @property
    def epoch(self) -> int:
        """Grows with interruptions."""
        return self.shown.epoch

    @property
    def segment(self) -> int:
        """The utterance that is heard; 0: none."""
        return self.shown.segment

    @property
    def ends_segment(self) -> bool:
        """Whether that utterance ends with this frame."""
        return self.shown.ends_segment

    @property
    def state(self) -> State:
        """What the face does."""
        return self.shown.state

    @property
    def frame_HWC(self) -> NDArray[np.uint8]:  # noqa: N802
        """The picture, sRGB."""
        return self.shown.frames_THWC[0]


class Sink(Protocol):
    """A viewer as the pump sees it. Both calls return at once and do not raise."""

    @property
    def is_encoded(self) -> bool:
        """Whether it wants packets, and not only pixels and samples."""
        ...

    def put(self, beat: Beat) -> None:
        """Here is the next beat."""
        ...

    def end(self, reason: Ending) -> None:
        """There will be no more."""
        ...


class Pump:
    """One session on the air. `run` it in a task; attach and detach viewers at any time.

    Args:
        session: what is shown; the pump takes its frames, and nobody else may.
        codec: of the pictures.
        executor: threads that encode; None: the loop's own.
        mark: words on every frame that leaves; empty: none.
    """

    def __init__(
        self, session: Source, *, codec: Codec = "vp8", executor: Executor | None = None, mark: str = ""
    ) -> None:
        self.session = session
        self._mark = mark_of(mark, *session.size) if mark else None
        self.fps, self.rate_hz = session.fps, session.rate_hz
        self.height, self.width = session.size
        self.codec: Codec = codec
        self.head = Playhead()
        self.num_beats = 0
        self.encode_ms = 0.0
        """What encoding the last beat took."""
        self._executor = executor
        self._sinks: list[Sink] = []
        self._watching: set[Sink] = set()
        self._video: VideoEncoder | None = None
        self._num_keys = 0
        self._opus: SoundEncoder | None = None
        self._blocks = Blocks(self.rate_hz)
        self._behind_s = 0.0
        self._key_wanted = False
        self._key_s = -_KEY_EVERY_S
        self._epoch = 0
        self._void_from = Fraction(0)
        self._limits: dict[Sink, float] = {}
        self._ending: Ending | None = None

    @property
    def num_viewers(self) -> int:
        """Viewers that want packets, and those that said so when they were attached."""
        return sum(sink.is_encoded or sink in self._watching for sink in self._sinks)

    @property
    def ending(self) -> Ending | None:
        """Why it ended, once it has."""
        return self._ending

    @property
    def num_keys(self) -> int:
        """Keyframes made so far."""
        return self._video.num_keys if self._video else self._num_keys

    @property
    def bitrate(self) -> int:
        """Bits per second that pictures keep to; 0 before the first was encoded."""
        return self._video.bitrate if self._video else 0

    def attach(self, sink: Sink, *, is_viewer: bool = False) -> None:
        """Hand every beat from now on to this viewer; one that wants packets begins with a keyframe.

        ``is_viewer``: somebody is behind it, even while it wants no packets.
        """
        if self._ending is not None:
            sink.end(self._ending)
            return
        self._sinks.append(sink)
        if is_viewer:
            self._watching.add(sink)
        if sink.is_encoded:
            self._key_wanted, self._key_s = True, -_KEY_EVERY_S

    def detach(self, sink: Sink) -> None:
        """Hand it nothing more; idempotent."""
        self._sinks = [other for other in self._sinks if other is not sink]
        self._watching.discard(sink)
        self._limits.pop(sink, None)
        self._aim()

    def request_key(self) -> None:
        """Let the next picture be one that a viewer can begin with; at most two a second are."""
        self._key_wanted = True

    def limit(self, sink: Sink, bitrate: float) -> None:
        """This viewer's network carries so many bits per second; all get what the slowest can take."""
        self._limits[sink] = bitrate
        self._aim()

    def interrupt(self) -> Interrupted:
        """Stop speaking: what has left counts as played, what has not is dropped. As `Stream.interrupt`."""
        done = self.session.interrupt(played_s=self.head.sent_s)
        if done.epoch != self._epoch:
            self._epoch, self._void_from = done.epoch, done.cut_s
        return done

    async def run(self) -> Ending:
        """Pump until the session ends; why it did. Returns what was given to `stop`, if that came first."""
        ending = Ending.FINISHED
        try:
            async for shown in self.session:
                await self._publish(shown)
                if self._ending is not None:
                    break
        except SessionClosed:
            pass
        except Exception:
            logger.exception("a session ends: its stream failed")
            ending = Ending.FAILED
        self.stop(ending)
        assert self._ending is not None
        return self._ending

    def stop(self, reason: Ending) -> None:
        """End for every viewer; idempotent, the first reason stands. The session is the caller's to close."""
        if self._ending is not None:
            return
        self._ending = reason
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            sink.end(reason)
        self._num_keys, self._video, self._opus = self.num_keys, None, None  # their threads and buffers go now

    async def _publish(self, shown: Shown) -> None:
        """Send the frames of a chunk at their times; a single frame comes at its time by itself."""
        arrived_s = time.monotonic()
        for k, frame in enumerate(shown.split(self.fps)):
            if k and (wait_s := arrived_s + k / self.fps - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            if frame.epoch < self._epoch and frame.pts >= self._void_from:
                return
            await self._send(frame)

    async def _send(self, frame: Shown) -> None:
        if self._mark is not None:
            frame = dataclasses.replace(frame, frames_THWC=self._mark.on(frame.frames_THWC))
        # Taken before encoding: an interruption from here on knows that this frame will leave.
        self.head.sent(float(frame.pts), 1 / self.fps)
        self._behind_s += frame.late_s
        at = frame.pts + Fraction(round(self._behind_s / BLOCK_S), round(1 / BLOCK_S))
        blocks = list(self._blocks.push(frame.sound_S, at=round(at * self.rate_hz)))
        picture: Picture | None = None
        packets: list[bytes | None] = [None] * len(blocks)
        if any(sink.is_encoded for sink in self._sinks):
            work = functools.partial(self._encode, *self._encoders(), frame, self._take_key(), blocks)
            began_s = time.monotonic()
            picture, packets = await asyncio.get_running_loop().run_in_executor(self._executor, work)
            self.encode_ms = (time.monotonic() - began_s) * 1e3
        sounds = [Sound(first, block_S, opus) for (first, block_S), opus in zip(blocks, packets, strict=True)]
        beat = Beat(shown=frame, picture=picture, sounds=tuple(sounds), at=at, left_s=time.monotonic())
        self.num_beats += 1
        for sink in tuple(self._sinks):
            sink.put(beat)

    def _take_key(self) -> bool:
        now_s = time.monotonic()
        if not self._key_wanted or now_s - self._key_s < _KEY_EVERY_S:
            return False
        self._key_wanted, self._key_s = False, now_s
        return True

    def _encoders(self) -> tuple[VideoEncoder, SoundEncoder]:
        if self._video is None or self._opus is None:
            self._video = VideoEncoder(self.width, self.height, self.fps, codec=self.codec)
            self._opus = SoundEncoder(self.rate_hz)
            self._aim()
        return self._video, self._opus

    @staticmethod
    def _encode(
        video: VideoEncoder,
        opus: SoundEncoder,
        frame: Shown,
        key: bool,
        blocks: list[tuple[int, NDArray[np.int16]]],
    ) -> tuple[Picture, list[bytes | None]]:
        picture = video.encode(frame.frames_THWC[0], frame.index, key=key)
        return picture, [opus.encode(block_S, first) for first, block_S in blocks]

    def _aim(self) -> None:
        if self._video is not None:
            self._video.aim(min(self._limits.values(), default=self._video.most))


class Viewer:
    """A sink with a queue, for doors that take beats one by one.

    viewer = Viewer(pump)
    while (beat := await viewer.next()) is not None: ...

    Args:
        pump: attached to at once; `close` detaches.
        is_encoded: whether packets are wanted. The first beat then carries a keyframe.
        most: beats that may wait. When more do, all that wait are lost, and (encoded) those up to the next keyframe.
    """

    def __init__(self, pump: Pump, *, is_encoded: bool = True, most: int = _VIEWER_BEATS) -> None:
        self.is_encoded = is_encoded
        self.num_lost = 0
        self.reason: Ending | None = None
        """Why there is no more, once `next` has said None."""
        self._pump = pump
        self._beats: deque[Beat] = deque()
        self._most = most
        self._needs_key = is_encoded
        self._changed = asyncio.Event()
        pump.attach(self)

    def put(self, beat: Beat) -> None:
        """Of `Sink`."""
        if len(self._beats) >= self._most:
            self.num_lost += len(self._beats)
            self._beats.clear()
            self._needs_key = self.is_encoded
        if self._needs_key and not (beat.picture and beat.picture.is_key):
            self.num_lost += 1
            self._pump.request_key()
            return
        self._needs_key = False
        self._beats.append(beat)
        self._changed.set()

    def end(self, reason: Ending) -> None:
        """Of `Sink`."""
        self.reason = self.reason or reason
        self._changed.set()

    async def next(self, timeout_s: float = 30.0) -> Beat | None:
        """The next beat; None when there will be no more.

        Raises:
            TimeoutError: nothing came in time.
        """
        async with asyncio.timeout(timeout_s):
            while not self._beats:
                if self.reason is not None:
                    return None
                self._changed.clear()
                await self._changed.wait()
        return self._beats.popleft()

    def close(self) -> None:
        """Want nothing more; idempotent."""
        self._pump.detach(self)
        self.end(Ending.LEFT)
