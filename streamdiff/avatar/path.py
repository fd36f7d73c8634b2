"""From words to frames, for ever: speech, motion and picture as three stages that run at once.

    say, push_audio  ->  speech  ->  motion  ->  picture  ->  frames
                         a voice     a window    a warp       one AVFrame per 40 ms, each with its own 40 ms
                         of sound

The stages are threads; what waits between them is bounded (three frames in all), and they never stop:
without words the avatar idles. Every frame carries the ``take`` in which it was made. An interruption, or
words that arrive while idle frames are still on their way, begins a new take at the first frame that nobody
has seen; older frames from there on are never shown. That costs the caller a lock and two numbers, however
much was under way.

`AvatarStream` is the synchronous path; `AvatarSession` is its async face.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from streamdiff.arrays import Floats
from streamdiff.avatar.cues import FRAME_SAMPLES, Cues, State
from streamdiff.avatar.kinematics import FPS
from streamdiff.avatar.motion import MAX_REWIND, SETTLE_FRAMES, MotionStream
from streamdiff.avatar.window import MotionModel, load_motion
from streamdiff.errors import InputError, SessionClosed, StreamdiffError
from streamdiff.trace import Observer, Silent, span
from streamdiff.voice import RATE_HZ, ExternalAudio, Phoneme, SpeechChunk, Synthesizer

logger = logging.getLogger(__name__)

_POSED_CAP, _DRAWN_CAP = 1, 2
_BACKLOG_S = 60.0
_VOICE_LEAD_S = 12.0
"""Sound that a voice may be ahead of the picture."""
_MAX_SEGMENTS = 64
_MAX_PIECES = 256
_FADE_SAMPLES = RATE_HZ // 100
_NAP_S = 0.25
_PATIENCE = 6
"""Times 10 ms that live sound may be late before a frame of silence takes its place."""
_HUSHED = 0.01
"""Peak of a frame of sound that nobody misses: -40 dBFS."""
_NEVER = 1 << 62

StateName: TypeAlias = Literal["idle", "listening", "speaking", "fading"]


class Renderer(Protocol):
    """What turns motion into frames; see `streamdiff.avatar.render`."""

    @property
    def size(self) -> int: ...

    def render(self, motion_AE: Tensor | NDArray[np.float32]) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class AVFrame:
    """One picture and exactly the sound that is heard while it is shown."""

    index: int
    """Frames shown before it."""
    video_HW3: Tensor
    """uint8 sRGB, on the renderer's device."""
    audio_S: Floats
    """960 float32 samples at 24 kHz."""
    motion_E: Tensor
    """The coefficients of the picture."""
    state: StateName
    segment_id: int
    """The segment that is heard; 0 while there is none."""
    end_of_segment: bool
    epoch: int
    """Interruptions before it."""

    @property
    def pts(self) -> Fraction:
        """Seconds since the first frame."""
        return Fraction(self.index, FPS)


@dataclass(frozen=True, slots=True)
class InterruptReport:
    """What an interruption did; given at once, before any stage has noticed."""

    epoch: int
    segment_id: int
    """The segment that was being heard; 0: none."""
    played_s: float
    """How much of it had been shown."""
    dropped_frames: int
    """Frames made and never shown."""


class Segment:
    """One utterance, or one stretch of sound from outside, from request to last frame."""

    def __init__(self, segment_id: int, *, live: bool, epoch: int) -> None:
        self.id = segment_id
        self.live = live
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
        self.queued_s = 0.0
        """Sound that waits to be given motion."""
        self._done = threading.Event()
        self._chunks: deque[SpeechChunk] = deque()

    @property
    def done(self) -> bool:
        """Whether nothing more of it will be shown."""
        return self._done.is_set()

    def add(self, chunk: SpeechChunk) -> None:
        """Queue a chunk."""
        if self.voiced_s is None and len(chunk.samples_S):
            self.voiced_s = time.monotonic()
        self._chunks.append(chunk)
        self.queued_s += chunk.duration_s

    def take(self) -> SpeechChunk | None:
        """The next chunk, or None while there is none."""
        if not self._chunks:
            return None
        chunk = self._chunks.popleft()
        self.queued_s = max(0.0, self.queued_s - chunk.duration_s)
        return chunk

    def holds(self, seconds: float) -> bool:
        """Whether that much sound is queued, or its end."""
        return bool(self._chunks) and (self.queued_s >= seconds or self._chunks[-1].last)

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


@dataclass(slots=True)
class Metrics:
    """What a stream has done so far."""

    frames: int = 0
    speaking_frames: int = 0
    segments: int = 0
    interruptions: int = 0
    dropped_frames: int = 0
    late_frames: int = 0
    """Frames taken more than one frame after their time (real time only)."""
    skipped_frames: int = 0
    """Frames of silence left out of live sound, to make up for late ones."""
    longest_queue: int = 0
    """Most frames ever found between motion and the caller."""
    voice_ms: float | None = None
    """Request to first sound, of the last segment that had any."""
    video_ms: float | None = None
    """Request to first frame, of the last segment that had any."""
    interrupt_to_silence_ms: float | None = None
    """Call of the last interruption to the first frame that ends in silence, in the caller's hand."""


@dataclass(slots=True)
class _Sounding:
    """A frame's worth of sound, before and after it has a face."""

    audio_S: Floats
    segment: Segment | None
    end: bool = False


@dataclass(slots=True)
class _Made:
    """A frame on its way."""

    index: int
    take: int
    epoch: int
    motion_E: Tensor
    sounding: _Sounding
    state: StateName
    video_HW3: Tensor | None = None


_QUIET_S = np.zeros(FRAME_SAMPLES, np.float32)
_QUIET_S.flags.writeable = False


class _Score:
    """The sound that comes next, cut into frames. Belongs to the motion thread."""

    def __init__(self) -> None:
        self.frames: deque[_Sounding] = deque()
        self._pending_S = np.zeros(0, np.float32)
        self._before_S = np.zeros(FRAME_SAMPLES, np.float32)
        self._phonemes: list[Phoneme] | None = None
        self._segment: Segment | None = None

    @property
    def is_open(self) -> bool:
        """Whether the sound that was begun has not ended yet."""
        return self._segment is not None

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to be heard."""
        return not self.frames and not self.is_open

    def absorb(self, chunk: SpeechChunk, segment: Segment) -> Cues:
        """Take in a chunk; the cues of the frames it completes. The end of a segment is padded to a frame."""
        if segment is not self._segment:
            self._segment, self._phonemes = segment, []
        if chunk.phonemes is None:
            self._phonemes = None
        elif self._phonemes is not None:
            shift_s = len(self._pending_S) / RATE_HZ
            self._phonemes += [Phoneme(p.symbol, p.start_s + shift_s, p.end_s + shift_s) for p in chunk.phonemes]
        self._pending_S = np.concatenate([self._pending_S, chunk.samples_S])
        if chunk.last and (len(self._pending_S) or not self.frames or self.frames[-1].segment is not segment):
            # The end is told once, and on a frame: if all others are gone, on one more.
            missing = -len(self._pending_S) % FRAME_SAMPLES if len(self._pending_S) else FRAME_SAMPLES
            self._pending_S = np.pad(self._pending_S, (0, missing))
        cues = self._cut()
        if chunk.last:
            self.frames[-1].end = True
            self._segment = None
        return cues

    def pad(self) -> Cues:
        """Complete the frame that has begun: nothing followed in time."""
        self._pending_S = np.pad(self._pending_S, (0, -len(self._pending_S) % FRAME_SAMPLES))
        return self._cut()

    def _cut(self) -> Cues:
        count = len(self._pending_S) // FRAME_SAMPLES
        samples_S, self._pending_S = np.split(self._pending_S, [count * FRAME_SAMPLES])
        cues = Cues.sound(samples_S, self._phonemes, before_S=self._before_S)
        if count:
            self._before_S = samples_S[-FRAME_SAMPLES:]
            self.frames += [_Sounding(audio_S, self._segment) for audio_S in samples_S.reshape(count, FRAME_SAMPLES)]
        if self._phonemes is not None:
            gone_s = count / FPS
            self._phonemes = [
                Phoneme(p.symbol, p.start_s - gone_s, p.end_s - gone_s) for p in self._phonemes if p.end_s > gone_s
            ]
        return cues

    @property
    def is_hushed(self) -> bool:
        """Whether the next frame and the one after it are silent parts of live sound that still goes on."""
        if self._segment is None or not self._segment.live or len(self.frames) < 2:
            return False
        first, second = self.frames[0], self.frames[1]
        return not first.end and bool(max(np.abs(first.audio_S).max(), np.abs(second.audio_S).max()) < _HUSHED)

    def after_silence(self) -> None:
        """Frames without sound were shown: the next sound begins in silence."""
        if not self.frames and not len(self._pending_S):
            self._before_S = np.zeros(FRAME_SAMPLES, np.float32)


class AvatarStream:
    """One avatar on the air: a frame for every 40 ms of its own time, for ever. Use as a context manager.

    Args:
        renderer: draws the frames.
        voice: says what `say` is given; None: only `push_audio`.
        motion: see `load_motion`; None: the packaged model.
        style: how it moves, by name (`streamdiff.avatar.style.STYLE_NAMES`).
        seed, stream: same numbers and same calls, same frames.
        realtime: True: frames come at 25 per second, and the avatar idles while words are not ready. False:
            as fast as they are asked for, and words are waited for; what is shown depends only on the calls
            made and on how many frames were taken between them, never on how long anything took.

    Methods may be called from any thread; frames are taken by one at a time.
    """

    def __init__(
        self,
        renderer: Renderer,
        *,
        voice: Synthesizer | None = None,
        motion: MotionModel | None = None,
        style: Mapping[str, float] | None = None,
        seed: int = 0,
        stream: int = 0,
        realtime: bool = False,
        observer: Observer | None = None,
    ) -> None:
        self._renderer, self._voice, self._realtime = renderer, voice, realtime
        self._observer = observer or Silent()
        self._motion = MotionStream(motion or load_motion(), seed=seed, stream=stream, style=style)
        self.spec = self._motion.spec
        self.metrics = Metrics()

        # Everything from here to the blank line is guarded by this one condition.
        self._wake = threading.Condition()
        self._closed = False
        self._failure: BaseException | None = None
        self._listening = False
        self._epoch = 0
        self._take = 0
        self._floors = {0: _NEVER}
        self._shown = 0
        self._made = 0
        self._sounding_until = 0
        self._cut_to: int | None = None
        self._settle = False
        self._interrupted_s: float | None = None
        self._owed_s = 0.0
        self._heard: Segment | None = None
        self._num_segments = 0
        self._segments: deque[Segment] = deque()
        self._jobs: deque[tuple[Segment, str | Iterable[str]]] = deque()
        self._live: tuple[Segment, ExternalAudio] | None = None
        self._posed: deque[_Made] = deque()
        self._drawn: deque[_Made] = deque()

        self._score = _Score()
        self._trail: deque[_Made] = deque(maxlen=MAX_REWIND)
        self._fading_from = -SETTLE_FRAMES
        self._clock_s: float | None = None
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=f"avatar-{name}", daemon=True)
            for name, work in (("speech", self._speech), ("motion", self._move), ("picture", self._draw))
        ]
        for thread in self._threads:
            thread.start()

    def say(self, text: str | Iterable[str]) -> Segment:
        """Speak, after whatever is already being said; text may still be growing.

        Raises:
            InputError: no words, no voice, or 64 segments waiting.
            SessionClosed: after `close`.
        """
        if self._voice is None:
            raise InputError("say() needs a voice; open the stream with voice=HibariVoice(), or push_audio()")
        if isinstance(text, str) and not any(c.isalnum() for c in text):
            raise InputError(f"nothing to say in {text[:40]!r}: it holds no letter and no digit; give words")
        with self._wake:
            segment = self._new_segment(live=False)
            self._jobs.append((segment, text))
            return segment

    def push_audio(self, samples: NDArray[Any] | bytes, rate_hz: int = RATE_HZ, *, last: bool = False) -> Segment:
        """Give sound from outside, in order; ``last`` ends its segment.

        In real time, pauses of a segment that still goes on are shortened by as much as frames were late.

        Raises:
            InputError: no waveform (see `ExternalAudio.push`), or more than 60 s of sound waiting.
            SessionClosed: after `close`.
        """
        with self._wake:
            self._check_open()
            segment, door = self._live or (None, ExternalAudio())
            if segment is not None and segment.queued_s > _BACKLOG_S:
                raise InputError(f"{segment.queued_s:.0f} s of sound wait to be shown; take frames between pushes")
            chunk = door.push(samples, rate_hz, last=last)
            if segment is None:
                segment = self._new_segment(live=True)
            else:
                self._note_call()
            self._live = None if last else (segment, door)
            segment.add(chunk)
            self._wake.notify_all()
            return segment

    def flush(self) -> None:
        """End the sound that is being pushed; what was pushed will still be heard."""
        with self._wake:
            if self._live is not None:
                self.push_audio(np.zeros(0, np.float32), self._live[1].rate_hz, last=True)

    def interrupt(self) -> InterruptReport:
        """Stop everything said and planned, at the next frame. Constant time: no queue is touched.

        The sound ends within the next frame (10 ms of fading), the mouth is at rest after 160 ms.
        """
        with self._wake:
            self._check_open()
            self._epoch += 1
            heard, self._heard = self._heard, None
            if heard is not None:
                heard.finish(interrupted=True)
            report = InterruptReport(
                epoch=self._epoch,
                segment_id=heard.id if heard else 0,
                played_s=heard.num_shown / FPS if heard else 0.0,
                dropped_frames=self._made - self._shown,
            )
            self._begin_take(self._shown)
            self._settle = True
            self._live = None
            self._interrupted_s = time.monotonic()
            self.metrics.interruptions += 1
            self.metrics.dropped_frames += report.dropped_frames
            return report

    def listen(self, listening: bool = True) -> None:
        """Say whether somebody is speaking to the avatar: it attends, and nods."""
        with self._wake:
            self._listening = listening
            self._note_call()

    def next_frame(self, timeout_s: float = 30.0) -> AVFrame:
        """The next frame; in real time, not before its time.

        Raises:
            TimeoutError: nothing came. Outside real time this also says that sound was begun and not ended.
            SessionClosed: after `close`.
            StreamdiffError or what a stage failed with.
        """
        deadline_s = time.monotonic() + timeout_s
        if self._realtime:
            self._await_tick()
        with self._wake:
            while True:
                self._check_open()
                while self._drawn and self._is_void(self._drawn[0]):
                    self._drawn.popleft()
                    self._wake.notify_all()
                if self._drawn:
                    break
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError(
                        f"no frame within {timeout_s:g} s; if sound was pushed, end it with last=True or flush()"
                    )
                self._wake.wait(min(left_s, _NAP_S))
            made = self._drawn.popleft()
            self._note_shown(made)
            self._wake.notify_all()
        assert made.video_HW3 is not None
        sounding = made.sounding
        return AVFrame(
            index=made.index,
            video_HW3=made.video_HW3,
            audio_S=sounding.audio_S,
            motion_E=made.motion_E,
            state=made.state,
            segment_id=sounding.segment.id if sounding.segment else 0,
            end_of_segment=sounding.end,
            epoch=made.epoch,
        )

    def frames(self) -> Iterator[AVFrame]:
        """Frames until the stream is closed."""
        while True:
            try:
                frame = self.next_frame()
            except SessionClosed:
                return
            yield frame

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called or a stage failed."""
        return self._stopped

    @property
    def queued_frames(self) -> int:
        """Frames that wait between motion and the caller."""
        with self._wake:
            return len(self._posed) + len(self._drawn)

    def close(self) -> None:
        """Stop the stages; idempotent."""
        with self._wake:
            self._closed = True
            for segment in self._segments:
                segment.finish()
            self._wake.notify_all()
        for thread in self._threads:
            thread.join(timeout=5.0)

    def __enter__(self) -> AvatarStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise SessionClosed("the avatar's stream has ended; open a new one")

    def _new_segment(self, *, live: bool) -> Segment:
        self._check_open()
        if len(self._segments) >= _MAX_SEGMENTS:
            raise InputError(f"{_MAX_SEGMENTS} segments wait to be heard; take frames, or interrupt()")
        self._num_segments += 1
        segment = Segment(self._num_segments, live=live, epoch=self._epoch)
        self._segments.append(segment)
        self.metrics.segments += 1
        self._note_call()
        return segment

    def _note_call(self) -> None:
        """Outside real time, forget how far the stages ran ahead before this call: that was chance."""
        if not self._realtime:
            self._begin_take(self._shown)
        self._wake.notify_all()

    def _begin_take(self, first: int) -> None:
        """From frame ``first`` on, what was made until now is void (lock held)."""
        # Frames older than 32 takes cannot be under way: five are, and each cut voids those before it.
        self._floors = {t: min(floor, first) for t, floor in self._floors.items() if t > self._take - 32}
        self._take += 1
        self._floors[self._take] = _NEVER
        self._cut_to = first if self._cut_to is None else min(first, self._cut_to)
        self._wake.notify_all()

    def _is_void(self, made: _Made) -> bool:
        return made.index >= self._floors.get(made.take, 0)

    def _note_shown(self, made: _Made) -> None:
        now_s = time.monotonic()
        metrics, segment = self.metrics, made.sounding.segment
        self._shown = made.index + 1
        metrics.frames += 1
        if self._interrupted_s is not None and made.epoch == self._epoch:
            metrics.interrupt_to_silence_ms = (now_s - self._interrupted_s) * 1e3
            self._interrupted_s = None
        if segment is None:
            return
        metrics.speaking_frames += 1
        segment.num_shown += 1
        self._heard = segment
        if segment.shown_s is None:
            segment.shown_s = now_s
            metrics.video_ms, metrics.voice_ms = segment.video_ms, segment.voice_ms
        if made.sounding.end:
            self._heard = None
            segment.finish()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  a dead stage must not leave the caller waiting
            with self._wake:
                self._failure = self._failure or error
                for segment in self._segments:
                    segment.finish()
                self._wake.notify_all()

    def _await_tick(self) -> None:
        now_s = time.monotonic()
        if self._clock_s is None:
            self._clock_s = now_s - self._shown / FPS
        due_s = self._clock_s + self._shown / FPS
        if now_s < due_s:
            time.sleep(due_s - now_s)
        elif now_s > due_s + 1 / FPS:
            # Sound cannot be taken back: the clock moves, the lips stay with the voice.
            self.metrics.late_frames += 1
            self._clock_s += now_s - due_s
            with self._wake:
                self._owed_s += now_s - due_s

    def _speech(self) -> None:
        """Turn text into chunks, a little ahead of the picture."""
        while True:
            with self._wake:
                while not self._jobs and not self._stopped:
                    self._wake.wait(_NAP_S)
                if self._stopped:
                    return
                segment, text = self._jobs.popleft()
            if not self._is_wanted(segment):
                continue
            try:
                self._say(segment, text)
            except StreamdiffError as error:
                logger.warning("segment %d ends early: %s", segment.id, error)
                segment.error = error
                self._accept(segment, SpeechChunk(_QUIET_S[:0], RATE_HZ, (), segment.id, last=True))

    def _say(self, segment: Segment, text: str | Iterable[str]) -> None:
        assert self._voice is not None
        chunks = self._voice.speak(text, segment=segment.id)
        while True:
            with span(self._observer, "speech", segment=segment.id):
                chunk = next(chunks, None)
            if chunk is None or not self._accept(segment, chunk) or chunk.last:
                return

    def _accept(self, segment: Segment, chunk: SpeechChunk) -> bool:
        """Queue a chunk once there is room; False when nobody wants it any more."""
        with self._wake:
            while segment.queued_s > _VOICE_LEAD_S and self._is_wanted(segment):
                self._wake.wait(_NAP_S)
            if not self._is_wanted(segment):
                return False
            segment.add(chunk)
            self._wake.notify_all()
            return True

    @property
    def _stopped(self) -> bool:
        return self._closed or self._failure is not None

    def _is_wanted(self, segment: Segment) -> bool:
        return segment.epoch == self._epoch and not self._stopped

    def _move(self) -> None:
        """Give every frame its sound and its motion."""
        motion, score = self._motion, self._score
        shortest, longest = motion.model.config.lengths[0], motion.model.config.lengths[-1]
        waiting = State.IDLE
        patience = 0
        while True:
            with self._wake:
                while len(self._posed) >= _POSED_CAP and not self._must_turn():
                    self._wake.wait(_NAP_S)
                if self._stopped:
                    return
                cut_to, self._cut_to = self._cut_to, None
                settle, self._settle = self._settle, False
                take, epoch = self._take, self._epoch
                state = State.LISTENING if self._listening else State.IDLE
                chunks = self._collect(len(score.frames), longest) if cut_to is None else []
                if chunks and self._realtime and score.is_idle:
                    # Words: idle frames that nobody has seen yet make room for them.
                    first = max(self._shown, self._sounding_until)
                    if first < motion.next_frame:
                        self._begin_take(first)
                        cut_to, self._cut_to, take = first, None, self._take
                lacks = cut_to is None and not chunks and self._lacks(score, shortest, longest)
                if lacks and (not self._realtime or patience < _PATIENCE):
                    patience += 1
                    self._wake.wait(_NAP_S if not self._realtime else 0.01)
                    continue
            if cut_to is not None:
                self._go_back(cut_to, settle=settle)
                score = self._score
            for chunk, segment in chunks:
                known = len(score.frames)
                motion.revise(score.absorb(chunk, segment), after=known)
            if cut_to is not None or chunks:
                continue
            patience = 0
            if score.is_open and not score.frames:
                motion.revise(score.pad(), after=0)
            if state != waiting:
                waiting = state
                motion.revise(Cues.silence(0), after=len(score.frames))
            self._make_up(score, shortest)
            # While sound is still coming, what follows is not silence but unknown.
            wanted = shortest if score.is_open else longest
            if motion.num_cued < wanted:
                motion.push(Cues.silence(wanted - motion.num_cued, waiting))
            with span(self._observer, "motion", frame=motion.next_frame):
                motion_E = motion.emit()
            sounding = score.frames.popleft() if score.frames else _Sounding(_QUIET_S, None)
            if sounding.segment is None:
                score.after_silence()
            self._put(motion_E, sounding, take, epoch, waiting)

    def _make_up(self, score: _Score, shortest: int) -> None:
        """Leave silence out of live sound for as long as frames were late: else one stall would delay it for ever."""
        with self._wake:
            while self._owed_s >= 1 / FPS and len(score.frames) > shortest and score.is_hushed:
                score.frames.popleft()
                self._motion.skip(1)
                self._owed_s -= 1 / FPS
                self.metrics.skipped_frames += 1
            if len(score.frames) <= shortest:
                self._owed_s = 0.0

    def _must_turn(self) -> bool:
        """Whether motion has better to do than wait for room: it is cut, or words overtake idling (lock held)."""
        if self._stopped or self._cut_to is not None:
            return True
        return self._realtime and self._score.is_idle and bool(self._segments) and self._may_begin(self._segments[0])

    def _may_begin(self, segment: Segment) -> bool:
        """Live sound is begun when its first look-ahead is there: until then the avatar idles (lock held)."""
        least_s = self._motion.model.config.lengths[0] / FPS if segment.live else 0.0
        return segment.epoch == self._epoch and segment.holds(least_s)

    def _collect(self, held: int, wanted: int) -> list[tuple[SpeechChunk, Segment]]:
        """Chunks until ``wanted`` frames of sound are held (lock held)."""
        chunks: list[tuple[SpeechChunk, Segment]] = []
        frames = float(held)
        while self._segments and frames < wanted:
            segment = self._segments[0]
            if segment.epoch != self._epoch:
                segment.finish(interrupted=True)
                self._segments.popleft()
                continue
            if self._score.is_idle and not chunks and not self._may_begin(segment):
                break
            chunk = segment.take()
            if chunk is None:
                break
            chunks.append((chunk, segment))
            frames += chunk.duration_s * FPS
            if chunk.last:
                self._segments.popleft()
        if chunks:
            self._wake.notify_all()
        return chunks

    def _lacks(self, score: _Score, shortest: int, longest: int) -> bool:
        """Whether more sound should be waited for before the next frame (lock held)."""
        if not self._segments:
            return False
        segment = self._segments[0]
        if self._realtime:
            # Idle goes on until a first look-ahead of live sound is there; text is worth no waiting.
            return segment.live and score.is_open and len(score.frames) < shortest
        return len(score.frames) < (shortest if segment.live else longest)

    def _go_back(self, first: int, *, settle: bool) -> None:
        """Make the next frame ``first`` again; with ``settle``, drop all sound but 10 ms of fading."""
        motion = self._motion
        count = motion.next_frame - first
        undone = [self._trail.pop() for _ in range(min(count, len(self._trail)))][::-1]
        motion.rewind(count)
        frames = self._score.frames
        frames.extendleft(made.sounding for made in reversed(undone))
        while frames and frames[-1].audio_S is _QUIET_S:
            frames.pop()
        with self._wake:
            self._made = first
            self._sounding_until = min(self._sounding_until, first)
        if settle:
            fade_S = _QUIET_S.copy()
            if frames:
                ramp = np.linspace(1.0, 0.0, _FADE_SAMPLES, endpoint=False, dtype=np.float32)
                fade_S[:_FADE_SAMPLES] = frames[0].audio_S[:_FADE_SAMPLES] * ramp
            for sounding in frames:
                if sounding.segment is not None:
                    sounding.segment.finish(interrupted=True)
            self._score = _Score()
            self._score.frames.append(_Sounding(fade_S, None))
            motion.revise(Cues.silence(1))
            motion.settle()
            self._fading_from = first
        else:
            motion.revise(Cues.silence(0), after=len(frames))

    def _put(self, motion_E: Tensor, sounding: _Sounding, take: int, epoch: int, waiting: State) -> None:
        """Hand a frame to the picture stage, unless it is void already."""
        state: StateName = "speaking" if sounding.segment else "listening" if waiting is State.LISTENING else "idle"
        if 0 <= self._motion.next_frame - 1 - self._fading_from < SETTLE_FRAMES and sounding.segment is None:
            state = "fading"
        made = _Made(self._motion.next_frame - 1, take, epoch, motion_E, sounding, state)
        self._trail.append(made)
        with self._wake:
            while len(self._posed) >= _POSED_CAP and not self._must_turn():
                self._wake.wait(_NAP_S)
            if take != self._take or len(self._posed) >= _POSED_CAP:
                return
            self._posed.append(made)
            self._made = made.index + 1
            if sounding.segment is not None:
                self._sounding_until = self._made
            self._note_queues()
            self._wake.notify_all()

    def _note_queues(self) -> None:
        self.metrics.longest_queue = max(self.metrics.longest_queue, len(self._posed) + len(self._drawn))

    def _draw(self) -> None:
        """Give every frame its picture."""
        while True:
            with self._wake:
                while not self._stopped and (not self._posed or len(self._drawn) >= _DRAWN_CAP):
                    while self._drawn and self._is_void(self._drawn[0]):
                        self._drawn.popleft()
                    if self._posed and len(self._drawn) < _DRAWN_CAP:
                        break
                    self._wake.wait(_NAP_S)
                if self._stopped:
                    return
                made = self._posed.popleft()
                self._wake.notify_all()
                if self._is_void(made):
                    continue
            with span(self._observer, "picture", frame=made.index):
                made.video_HW3 = self._renderer.render(made.motion_E[None])[0]
            with self._wake:
                if not self._is_void(made):
                    self._drawn.append(made)
                    self._note_queues()
                    self._wake.notify_all()


class AvatarEngine:
    """What several streams of one avatar share: a voice, a motion model, a renderer of one person.

    Args:
        renderer: draws this person; see `streamdiff.avatar.render`.
        voice: see `streamdiff.voice.open_voice`; None: sound from outside only.
        motion: see `load_motion`; None: the packaged model.
        style: how this person moves, by name.
    """

    fps = FPS
    rate_hz = RATE_HZ

    def __init__(
        self,
        renderer: Renderer,
        *,
        voice: Synthesizer | None = None,
        motion: MotionModel | None = None,
        style: Mapping[str, float] | None = None,
    ) -> None:
        self._renderer, self._voice, self._style = renderer, voice, dict(style or {})
        self._motion = motion or load_motion()
        self._warm_up()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a frame."""
        return self._renderer.size, self._renderer.size

    def stream(self, *, seed: int = 0, stream: int = 0, realtime: bool = False) -> AvatarStream:
        """The synchronous path; see `AvatarStream`."""
        return AvatarStream(
            self._renderer,
            voice=self._voice,
            motion=self._motion,
            style=self._style,
            seed=seed,
            stream=stream,
            realtime=realtime,
        )

    def open(self, *, seed: int = 0, stream: int = 0, realtime: bool = True) -> AvatarSession:
        """The asynchronous path; see `AvatarSession`."""
        return AvatarSession(self.stream(seed=seed, stream=stream, realtime=realtime))

    def _warm_up(self) -> None:
        """First calls allocate and choose kernels: let nobody wait for that."""
        motion = MotionStream(self._motion)
        for length in self._motion.config.lengths:
            motion.revise(Cues.silence(length))
            frame_E = motion.emit()
            self._renderer.render(frame_E[None])


class AvatarSession:
    """The async face of an `AvatarStream`; use ``async with engine.open() as session``.

    await session.say("Hello there!")
    async for frame in session.frames():
        ...
    """

    def __init__(self, stream: AvatarStream) -> None:
        self._stream = stream
        self._feeders: set[asyncio.Task[None]] = set()

    @property
    def metrics(self) -> Metrics:
        """What happened so far."""
        return self._stream.metrics

    async def say(self, text: str | AsyncIterator[str]) -> Segment:
        """Speak a text, or one that is still being written; returns at once. Errors as `AvatarStream.say`."""
        if isinstance(text, str):
            return self._stream.say(text)
        pieces: queue.Queue[str | None] = queue.Queue(maxsize=_MAX_PIECES)
        segment: Segment | None = None

        def wanted() -> bool:
            return (segment is None or not segment.done) and not self._stream.is_closed

        def arriving() -> Iterator[str]:
            while wanted():
                try:
                    piece = pieces.get(timeout=_NAP_S)
                except queue.Empty:
                    continue
                if piece is None:
                    return
                yield piece

        async def put(piece: str | None) -> None:
            while wanted():
                try:
                    pieces.put_nowait(piece)
                    return
                except queue.Full:
                    await asyncio.sleep(_NAP_S / 10)

        async def feed() -> None:
            try:
                async for piece in text:
                    if not wanted():
                        return
                    await put(piece)
            finally:
                await put(None)

        segment = self._stream.say(arriving())
        task = asyncio.create_task(feed())
        self._feeders.add(task)
        task.add_done_callback(self._feeders.discard)
        return segment

    async def push_audio(self, samples: NDArray[Any] | bytes, rate_hz: int = RATE_HZ, *, last: bool = False) -> Segment:
        """Give sound from outside; see `AvatarStream.push_audio`."""
        return self._stream.push_audio(samples, rate_hz, last=last)

    async def flush(self) -> None:
        """End the sound that is being pushed."""
        self._stream.flush()

    def interrupt(self) -> InterruptReport:
        """Stop at the next frame; see `AvatarStream.interrupt`."""
        return self._stream.interrupt()

    def listen(self, listening: bool = True) -> None:
        """See `AvatarStream.listen`."""
        self._stream.listen(listening)

    async def frames(self) -> AsyncIterator[AVFrame]:
        """Frames until the session is closed."""
        while True:
            try:
                frame = await asyncio.to_thread(self._stream.next_frame)
            except SessionClosed:
                return
            yield frame

    async def aclose(self) -> None:
        """Stop; idempotent."""
        for task in self._feeders:
            task.cancel()
        await asyncio.to_thread(self._stream.close)

    async def __aenter__(self) -> AvatarSession:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()
