"""What every path of the engine promises: the protocol `Stream`, and what goes in and comes out of one.

A stream is one face that lives: sound or text goes in, pictures come out with exactly the sound that is heard while
they are shown, without end, until it is finished or closed. `pipeline.stream.VideoStream` (a video model over a line
of ranks) and `avatar.stream.AvatarStream` (facial coefficients and a renderer) both are one; `session.Session` is the
asynchronous face of either.

Positions are positions in the stream, in seconds since its first frame (`Shown.pts`), and count what was *played*. A
player that buffers tells the stream how far it has come (`Stream.played`, or ``interrupt(played_s=...)``): frames that
it holds and has not played are then made anew, so that nothing is repeated and nothing skipped.

Axes: T video frames (12 for the video model, 1 for the coefficients), H height, W width, C colours, S waveform samples,
A frames of motion, E motion coefficients.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from fractions import Fraction
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from streamdiff.errors import StreamdiffError

if TYPE_CHECKING:
    from torch import Tensor

Samples: TypeAlias = "NDArray[Any] | Tensor | bytes"
"""A waveform: float (-1..1) or int16, mono ``[S]`` or ``[S, channels]``; bytes are little-endian int16 mono."""


class Can(StrEnum):
    """What a stream may be able to do beyond living and taking sound."""

    SAY = "say"
    LISTEN = "listen"
    PROMPT = "prompt"


class State(StrEnum):
    """What the face does."""

    IDLE = "idle"
    LISTENING = "listening"
    SPEAKING = "speaking"
    FADING = "fading"
    """On the way to rest after an interruption."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Shown:
    """Frames that are shown together, and exactly their sound."""

    frames_THWC: NDArray[np.uint8]
    """sRGB ``[T, H, W, 3]``, in the host's memory."""
    sound_S: NDArray[np.float32]
    """Mono, -1..1, at the stream's ``rate_hz``; as long as the frames are shown."""
    index: int
    """Frames of the stream before these."""
    pts: Fraction
    """Presentation time of the first of them, seconds since the first frame of the stream."""
    epoch: int
    """Interruptions before it."""
    segment: int = 0
    """Number of the utterance that is heard; 0: none."""
    ends_segment: bool = False
    """Whether that utterance ends here."""
    prompt: str = ""
    """The prompt that they were made with; empty where a path knows no prompts."""
    state: State = State.IDLE
    late_s: float = 0.0
    """Live: how long after their time they left the stream."""
    motion_AE: NDArray[np.float32] | None = None
    """The coefficients of these frames, for rigs; None where a path has none."""

    @property
    def is_silence(self) -> bool:
        """Whether nothing that was said or pushed is heard."""
        return self.segment == 0

    def split(self, fps: int) -> Iterator[Shown]:
        """The frames one by one, each with its own sound."""
        T = len(self.frames_THWC)
        bounds = np.linspace(0, len(self.sound_S), T + 1).round().astype(int)
        for k in range(T):
            yield dataclasses.replace(
                self,
                frames_THWC=self.frames_THWC[k : k + 1],
                sound_S=self.sound_S[bounds[k] : bounds[k + 1]],
                motion_AE=None if self.motion_AE is None else self.motion_AE[k : k + 1],
                index=self.index + k,
                pts=self.pts + Fraction(k, fps),
                late_s=self.late_s if k == 0 else 0.0,
                ends_segment=self.ends_segment and k == T - 1,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Interrupted:
    """What an interruption did; known at once, before any frame of the new epoch exists."""

    epoch: int
    """Of the frames that follow."""
    segment: int
    """The utterance that was being heard; 0: none."""
    played_s: float
    """How much of that utterance was played, seconds."""
    dropped: int
    """Frames that were made and will not be shown."""
    cut_s: Fraction
    """A player plays what it holds up to this position, and drops the rest."""
    resumes_s: Fraction
    """Position of the next frame; beyond the cut only where the stream does not remember that far."""


@dataclass(slots=True)
class Metrics:
    """What a stream has done so far."""

    frames: int = 0
    speaking_frames: int = 0
    segments: int = 0
    interruptions: int = 0
    dropped_frames: int = 0
    """Made, and taken back before they were played."""
    late_frames: int = 0
    """Live: taken more than one frame (or one chunk) after their time."""
    skipped_frames: int = 0
    """Frames of silence left out of live sound, to make up for late ones."""
    underruns: int = 0
    """Live: times that running sound did not arrive in time, and a pause was put in its place."""
    longest_queue: int = 0
    """Most frames ever found between the model and the caller."""
    voice_ms: float | None = None
    """Request to first sound, of the last utterance that had any."""
    video_ms: float | None = None
    """Request to first frame in the caller's hand, of the last utterance that had any."""
    interrupt_to_silence_ms: float | None = None
    """Call of the last interruption to the first frame of its epoch in the caller's hand."""


class Segment:
    """One utterance, or one stretch of sound from outside, from request to last frame."""

    def __init__(self, number: int, *, live: bool, epoch: int) -> None:
        self.id = number
        self.live = live
        """Whether it is sound that comes from outside as it is spoken."""
        self.epoch = epoch
        self.error: StreamdiffError | None = None
        """Why it ended early, if it did."""
        self.interrupted = False
        self.requested_s = time.monotonic()
        self.voiced_s: float | None = None
        """When its first sound was there (monotonic clock)."""
        self.shown_s: float | None = None
        """When its first frame was taken."""
        self.num_shown = 0
        """Frames of it that were taken."""
        self.queued_s = 0.0
        """Sound of it that waits to be shown."""
        self._done = threading.Event()

    @property
    def done(self) -> bool:
        """Whether nothing more of it will be shown."""
        return self._done.is_set()

    def finish(self, *, interrupted: bool = False) -> None:
        """Nothing more of it will be shown."""
        self.interrupted = self.interrupted or interrupted
        self._done.set()

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is done; False when it is not done in time."""
        return self._done.wait(timeout_s)

    @property
    def voice_ms(self) -> float | None:
        """Milliseconds from the request to the first sound."""
        return None if self.voiced_s is None else (self.voiced_s - self.requested_s) * 1e3

    @property
    def video_ms(self) -> float | None:
        """Milliseconds from the request to its first frame in the caller's hand."""
        return None if self.shown_s is None else (self.shown_s - self.requested_s) * 1e3


class Stream(Protocol):
    """One face on the air. A context manager; `next` is called by one thread at a time, all else by any.

    Nothing but `next` (and `close`, which waits for threads for a bounded time) takes longer than a lock.
    """

    @property
    def fps(self) -> int:
        """Frames per second."""
        ...

    @property
    def rate_hz(self) -> int:
        """Samples per second of the sound that comes out."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a frame."""
        ...

    @property
    def can(self) -> frozenset[Can]:
        """What this stream can do; calling anything else raises `Unsupported`."""
        ...

    @property
    def metrics(self) -> Metrics:
        """What it has done so far."""
        ...

    def push_audio(self, samples: Samples, rate_hz: int | None = None, *, last: bool = False) -> Segment:
        """Speak this sound, blocks in order; the caller's buffer is copied.

        ``rate_hz``: of these samples; None: the stream's. ``last`` ends the utterance, as `end` does.

        Raises:
            InputError: no waveform, another rate in mid-utterance, or more sound waiting than the stream keeps.
            SessionClosed: after `finish` or `close`.
        """
        ...

    def say(self, text: str | Iterable[str]) -> Segment:
        """Speak this text after whatever is being said; an iterable may still be growing.

        Raises:
            InputError: nothing to say, or too much waiting. Unsupported: the stream has no voice.
        """
        ...

    def end(self) -> None:
        """End the utterance that is being pushed: what was pushed is heard to its end; the face lives on."""
        ...

    def finish(self) -> None:
        """Nothing more will be said: the stream ends by itself when all that was said or pushed has been shown."""
        ...

    def listen(self, listening: bool = True) -> None:
        """Say whether somebody is speaking to the face. Unsupported where a path cannot show it."""
        ...

    def prompt(self, text: str) -> None:
        """Follow another prompt from the next chunk that is made; encodes text, which is slow. May be Unsupported."""
        ...

    def played(self, position_s: float) -> None:
        """Say how far a player with a buffer has come; without it, what was taken counts as played."""
        ...

    def interrupt(self, played_s: float | None = None) -> Interrupted:
        """Stop speaking: drop all sound that waits, take back all that was made of it and not played.

        ``played_s``: position up to which frames were played; None: what `played` said last, or all that was taken.
        Costs nothing when nothing is being said.
        """
        ...

    def next(self, timeout_s: float = 30.0) -> Shown | None:
        """The next frames; None when the stream has ended after `finish`.

        Raises:
            TimeoutError: nothing came in time; calling again goes on.
            SessionClosed: after `close`. What made the stream fail, at every call.
        """
        ...

    def close(self) -> None:
        """End now; idempotent, from any thread, and `next` in another thread returns."""
        ...

    def __enter__(self) -> Stream: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(slots=True)
class PlayClock:
    """When the frames of a live stream are due, and how late they are. Sound cannot be taken back: a frame that is too
    late moves the clock, and is counted once.
    """

    fps: int
    slack_frames: int = 1
    """A frame is late when it comes more than this many frames after its time."""
    _start_s: float | None = None
    _exempt: int = 0
    owed_s: float = field(default=0.0)
    """Lateness that has not been made up for yet."""

    def due_s(self, index: int) -> float:
        """When frame ``index`` is due, on the monotonic clock; the first one asked for is due now."""
        if self._start_s is None:
            self._start_s = time.monotonic() - index / self.fps
        return self._start_s + index / self.fps

    def lateness_s(self, index: int) -> float:
        """How late frame ``index`` is if it is taken now; 0.0 within the slack. Moves the clock by what it returns."""
        late_s = time.monotonic() - self.due_s(index)
        if index < self._exempt or late_s <= self.slack_frames / self.fps:
            return 0.0
        assert self._start_s is not None
        self._start_s += late_s
        self.owed_s += late_s
        return late_s

    def repeat_until(self, index: int) -> None:
        """Frames before ``index`` are made a second time for a player that has dropped them: they are due at once."""
        self._exempt = max(self._exempt, index)
