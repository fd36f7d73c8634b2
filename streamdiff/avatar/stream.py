"""From words to frames, without end: speech, motion and picture as three stages that run at once.

    say, push_audio  ->  speech  ->  motion  ->  picture  ->  frames
                         a voice     a window    a warp       one frame per 40 ms, each with its own 40 ms

The stages are threads; what waits between them is bounded (three frames in all), and they never stop:
without words the avatar idles. Every frame carries the ``take`` in which it was made. An interruption, or
words that arrive while idle frames are still on their way, begins a new take at the first frame that nobody
has seen; older frames from there on are never shown. That costs the caller a lock and two numbers, however
much was under way.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from streamdiff.avatar.cues import Cues
from streamdiff.avatar.cues import State as Attention
from streamdiff.avatar.kinematics import FPS
from streamdiff.avatar.motion import MAX_REWIND, SETTLE_FRAMES, MotionStream
from streamdiff.avatar.track import QUIET_S, Made, Sounding, Track
from streamdiff.avatar.window import MotionModel, load_motion
from streamdiff.errors import SessionClosed, Unsupported
from streamdiff.stream import Can, Interrupted, Metrics, PlayClock, Samples, Segment, Shown, State
from streamdiff.trace import Observer, Silent, span
from streamdiff.voice import RATE_HZ, SpeechChunk, Synthesizer
from streamdiff.voice.backlog import NAP_S, Backlog, Utterance

_POSED_CAP, _DRAWN_CAP = 1, 2
_UNPLAYED_FRAMES = MAX_REWIND - 6
"""Frames that a player may hold and give back: all that motion can take back, less what is under way."""
_FADE_SAMPLES = RATE_HZ // 100
_PATIENCE = 6
"""Times 10 ms that live sound may be late before a frame of silence takes its place."""
_NEVER = 1 << 62


class Renderer(Protocol):
    """What turns motion into frames; see `streamdiff.avatar.render`."""

    @property
    def size(self) -> int: ...

    def render(self, motion_AE: Tensor | NDArray[np.float32]) -> Tensor: ...


class AvatarStream:
    """One avatar on the air, a `Stream` of single frames: one for every 40 ms of its own time, without end.

    Args:
        renderer: draws the frames.
        voice: says what `say` is given; None: only `push_audio`.
        motion: see `load_motion`; None: the packaged model.
        style: how it moves, by name (`streamdiff.avatar.motion.STYLE_NAMES`).
        seed, stream: same numbers and same calls, same frames.
        realtime: True: frames come at 25 per second, and the avatar idles while words are not ready. False:
            as fast as they are asked for, and words are waited for; what is shown depends only on the calls
            made and on how many frames were taken between them, never on how long anything took.
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
        seed: int = 0,
        stream: int = 0,
        realtime: bool = False,
        observer: Observer | None = None,
    ) -> None:
        self._renderer, self._realtime = renderer, realtime
        self._observer = observer or Silent()
        self._motion = MotionStream(motion or load_motion(), seed=seed, stream=stream, style=style)
        self.spec = self._motion.spec
        self.metrics = Metrics()

        # Everything from here to the blank line is guarded by this one condition.
        self._wake = threading.Condition()
        self._backlog = Backlog(
            self._wake,
            rate_hz=RATE_HZ,
            metrics=self.metrics,
            voice=voice,
            check=self._check_open,
            called=self._note_call,
            observer=observer,
        )
        self._closed = False
        self._failure: BaseException | None = None
        self._listening = False
        self._take = 0
        self._floors = {0: _NEVER}
        self._shown = 0
        self._made = 0
        self._sounding_until = 0
        self._cursor: int | None = None
        self._recent: deque[Made] = deque(maxlen=MAX_REWIND)
        self._cut_to: int | None = None
        self._settle = False
        self._interrupted_s: float | None = None
        self._heard: Segment | None = None
        self._posed: deque[Made] = deque()
        self._drawn: deque[Made] = deque()

        self._score = Track()
        self._trail: deque[Made] = deque(maxlen=MAX_REWIND)
        self._fading_from = -SETTLE_FRAMES
        self._clock = PlayClock(FPS)
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=f"avatar-{name}", daemon=True)
            for name, work in (("speech", self._backlog.speak), ("motion", self._move), ("picture", self._draw))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a frame."""
        return self._renderer.size, self._renderer.size

    @property
    def can(self) -> frozenset[Can]:
        """See `Stream.can`."""
        return frozenset({Can.LISTEN, Can.SAY} if self._backlog.can_say else {Can.LISTEN})

    def say(self, text: str | Iterable[str]) -> Utterance:
        """See `Stream.say`."""
        return self._backlog.say(text)

    def push_audio(self, samples: Samples, rate_hz: int | None = None, *, last: bool = False) -> Utterance:
        """See `Stream.push_audio`. In real time, pauses of an utterance that still goes on are shortened by as much as
        frames were late.
        """
        return self._backlog.push(samples, rate_hz, last=last)

    def end(self) -> None:
        """See `Stream.end`."""
        self._backlog.end()

    def finish(self) -> None:
        """See `Stream.finish`."""
        self._backlog.finish()

    def prompt(self, text: str) -> None:
        """See `Stream.prompt`."""
        raise Unsupported(
            f"facial coefficients follow no prompt, got {text[:40]!r}; give a style, or use a video model (Engine)"
        )

    def played(self, position_s: float) -> None:
        """See `Stream.played`."""
        with self._wake:
            self._cursor = self._index_at(position_s)

    def interrupt(self, played_s: float | None = None) -> Interrupted:
        """See `Stream.interrupt`. Constant time: no queue is touched.

        The sound ends within the next frame (10 ms of fading), the mouth is at rest after 160 ms. A player may hold
        ten frames.
        """
        with self._wake:
            self._check_open()
            cursor = self._cursor if played_s is None else self._index_at(played_s)
            first = self._shown if cursor is None else max(cursor, self._shown - _UNPLAYED_FRAMES, 0)
            heard = self._take_back(first)
            self._backlog.drop()
            interrupted = Interrupted(
                epoch=self._backlog.epoch,
                segment=heard.id if heard else 0,
                played_s=heard.num_shown / FPS if heard else 0.0,
                dropped=self._made - first,
                cut_s=Fraction(first, FPS),
                resumes_s=Fraction(first, FPS),
            )
            self._begin_take(first)
            self._settle = True
            self._interrupted_s = time.monotonic()
            self.metrics.interruptions += 1
            self.metrics.dropped_frames += interrupted.dropped
            return interrupted

    def _index_at(self, position_s: float) -> int:
        """The frame that follows a position, of those that were taken (lock held)."""
        return min(self._shown, math.ceil(position_s * FPS - 1e-6))

    def _take_back(self, first: int) -> Segment | None:
        """Count frames from ``first`` on as not shown; the segment that was being heard there (lock held)."""
        heard, self._heard = self._heard, None
        while self._recent and self._recent[-1].index >= first:
            segment = self._recent.pop().sounding.segment
            if segment is not None:
                segment.num_shown -= 1
                heard = segment
        if self._shown > first:
            self._clock.repeat_until(self._shown)
            self._shown = first
        if heard is not None:
            heard.finish(interrupted=True)
        return heard

    def listen(self, listening: bool = True) -> None:
        """See `Stream.listen`: it attends, and nods."""
        with self._wake:
            self._listening = listening
            self._note_call()

    def next(self, timeout_s: float = 30.0) -> Shown | None:
        """See `Stream.next`; in real time, not before its time. Outside real time a TimeoutError also says that sound
        was begun and not ended.
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
                if self._backlog.is_spent:
                    return None
                if self._drawn:
                    break
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError(
                        f"no frame within {timeout_s:g} s; if sound was pushed, end it with last=True or end()"
                    )
                self._wake.wait(min(left_s, NAP_S))
            made = self._drawn.popleft()
            late_s = self._note_shown(made)
            self._wake.notify_all()
        assert made.video_HW3 is not None
        sounding = made.sounding
        return Shown(
            frames_THWC=made.video_HW3[None],
            sound_S=np.asarray(sounding.audio_S, np.float32),
            index=made.index,
            pts=Fraction(made.index, FPS),
            epoch=made.epoch,
            segment=sounding.segment.id if sounding.segment else 0,
            ends_segment=sounding.end,
            state=made.state,
            late_s=late_s,
            motion_AE=made.motion_E.cpu().numpy()[None],
        )

    def frames(self) -> Iterator[Shown]:
        """Frames until the stream ends or is closed."""
        while True:
            try:
                shown = self.next()
            except SessionClosed:
                return
            if shown is None:
                return
            yield shown

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
        """See `Stream.close`."""
        with self._wake:
            self._closed = True
            self._backlog.stop()
            self._wake.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=5.0)

    def __enter__(self) -> AvatarStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise SessionClosed("the avatar's stream has ended; open a new one")

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

    def _is_void(self, made: Made) -> bool:
        return made.index >= self._floors.get(made.take, 0)

    def _note_shown(self, made: Made) -> float:
        """Count a frame that is taken; how late it is (lock held)."""
        now_s = time.monotonic()
        metrics, segment = self.metrics, made.sounding.segment
        late_s = self._clock.lateness_s(made.index) if self._realtime else 0.0
        metrics.late_frames += late_s > 0
        self._shown = made.index + 1
        self._recent.append(made)
        metrics.frames += 1
        if self._interrupted_s is not None and made.epoch == self._backlog.epoch:
            metrics.interrupt_to_silence_ms = (now_s - self._interrupted_s) * 1e3
            self._interrupted_s = None
        if segment is None:
            return late_s
        metrics.speaking_frames += 1
        segment.num_shown += 1
        self._heard = segment
        if segment.shown_s is None:
            segment.shown_s = now_s
            metrics.video_ms, metrics.voice_ms = segment.video_ms, segment.voice_ms
        if made.sounding.end:
            self._heard = None
            segment.finish()
        return late_s

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  a dead stage must not leave the caller waiting
            with self._wake:
                self._failure = self._failure or error
                self._backlog.stop()
                self._wake.notify_all()

    def _await_tick(self) -> None:
        with self._wake:
            due_s = self._clock.due_s(self._shown)
        while not self._stopped and (left_s := due_s - time.monotonic()) > 0:
            time.sleep(min(left_s, NAP_S))

    @property
    def _stopped(self) -> bool:
        return self._closed or self._failure is not None

    def _move(self) -> None:
        """Give every frame its sound and its motion."""
        motion, score = self._motion, self._score
        shortest, longest = motion.model.config.lengths[0], motion.model.config.lengths[-1]
        waiting = Attention.IDLE
        patience = 0
        while True:
            with self._wake:
                while len(self._posed) >= _POSED_CAP and not self._must_turn():
                    self._wake.wait(NAP_S)
                if self._stopped:
                    return
                cut_to, self._cut_to = self._cut_to, None
                settle, self._settle = self._settle, False
                take, epoch = self._take, self._backlog.epoch
                state = Attention.LISTENING if self._listening else Attention.IDLE
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
                    self._wake.wait(NAP_S if not self._realtime else 0.01)
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
            sounding = score.frames.popleft() if score.frames else Sounding(QUIET_S, None)
            if sounding.segment is None:
                score.after_silence()
            self._put(motion_E, sounding, take, epoch, waiting)

    def _make_up(self, score: Track, shortest: int) -> None:
        """Leave silence out of live sound for as long as frames were late: else one stall would delay it for ever."""
        with self._wake:
            while self._clock.owed_s >= 1 / FPS and len(score.frames) > shortest and score.is_hushed:
                score.frames.popleft()
                self._motion.skip(1)
                self._clock.owed_s -= 1 / FPS
                self.metrics.skipped_frames += 1
            if len(score.frames) <= shortest:
                self._clock.owed_s = 0.0

    def _must_turn(self) -> bool:
        """Whether motion has better to do than wait for room: it is cut, or words overtake idling (lock held)."""
        if self._stopped or self._cut_to is not None:
            return True
        return (
            self._realtime
            and self._score.is_idle
            and (segment := self._backlog.first()) is not None
            and self._may_begin(segment)
        )

    def _may_begin(self, segment: Utterance) -> bool:
        """Live sound is begun when its first look-ahead is there: until then the avatar idles (lock held)."""
        least_s = self._motion.model.config.lengths[0] / FPS if segment.live else 0.0
        return segment.holds(least_s)

    def _collect(self, held: int, wanted: int) -> list[tuple[SpeechChunk, Segment]]:
        """Chunks until ``wanted`` frames of sound are held (lock held)."""
        chunks: list[tuple[SpeechChunk, Segment]] = []
        frames = float(held)
        while frames < wanted and (segment := self._backlog.first()) is not None:
            if self._score.is_idle and not chunks and not self._may_begin(segment):
                break
            chunk = segment.take()
            if chunk is None:
                break
            chunks.append((chunk, segment))
            frames += chunk.duration_s * FPS
            if chunk.last:
                self._backlog.utterances.popleft()
        if chunks:
            self._wake.notify_all()
        return chunks

    def _lacks(self, score: Track, shortest: int, longest: int) -> bool:
        """Whether more sound should be waited for before the next frame (lock held)."""
        segment = self._backlog.first()
        if segment is None:
            return False
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
        while frames and frames[-1].audio_S is QUIET_S:
            frames.pop()
        with self._wake:
            self._made = first
            self._sounding_until = min(self._sounding_until, first)
        if settle:
            fade_S = QUIET_S.copy()
            if frames:
                ramp = np.linspace(1.0, 0.0, _FADE_SAMPLES, endpoint=False, dtype=np.float32)
                fade_S[:_FADE_SAMPLES] = frames[0].audio_S[:_FADE_SAMPLES] * ramp
            for sounding in frames:
                if sounding.segment is not None:
                    sounding.segment.finish(interrupted=True)
            self._score = Track()
            self._score.frames.append(Sounding(fade_S, None))
            motion.revise(Cues.silence(1))
            motion.settle()
            self._fading_from = first
        else:
            motion.revise(Cues.silence(0), after=len(frames))

    def _put(self, motion_E: Tensor, sounding: Sounding, take: int, epoch: int, waiting: Attention) -> None:
        """Hand a frame to the picture stage, unless it is void already."""
        state = State.LISTENING if waiting is Attention.LISTENING else State.IDLE
        if sounding.segment:
            state = State.SPEAKING
        if 0 <= self._motion.next_frame - 1 - self._fading_from < SETTLE_FRAMES and sounding.segment is None:
            state = State.FADING
        made = Made(self._motion.next_frame - 1, take, epoch, motion_E, sounding, state)
        self._trail.append(made)
        with self._wake:
            while len(self._posed) >= _POSED_CAP and not self._must_turn():
                self._wake.wait(NAP_S)
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
                    self._wake.wait(NAP_S)
                if self._stopped:
                    return
                made = self._posed.popleft()
                self._wake.notify_all()
                if self._is_void(made):
                    continue
            with span(self._observer, "picture", frame=made.index):
                made.video_HW3 = self._renderer.render(made.motion_E[None])[0].cpu().numpy()
            with self._wake:
                if not self._is_void(made):
                    self._drawn.append(made)
                    self._note_queues()
                    self._wake.notify_all()
