"""What waits to be spoken: utterances in order, each with as much of its sound as is there already.

Text is voiced by a synthesiser in a thread of its own (`Backlog.speak`); sound from outside is brought to the stream's
rate as it is pushed. Both end up as chunks of one queue, which the owner of the backlog takes from. Everything is
guarded by the owner's condition, so that an interruption is one step for the queue and for whatever stands behind it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
from torch import Tensor

from streamdiff.errors import InputError, SessionClosed, StreamdiffError, Unsupported
from streamdiff.stream import Metrics, Samples, Segment
from streamdiff.trace import Observer, Silent, span
from streamdiff.voice.external import ExternalAudio
from streamdiff.voice.resample import Resampler
from streamdiff.voice.speech import SpeechChunk, Synthesizer

logger = logging.getLogger(__name__)

NAP_S = 0.25
"""Longest sleep between two looks at whether the stream still stands."""
MAX_SEGMENTS = 64
"""Utterances that may wait."""
MAX_WAITING_S = 600.0
"""Sound of one utterance that may wait."""
VOICE_LEAD_S = 12.0
"""Sound that a voice may be ahead of the picture."""


class Utterance(Segment):
    """A segment and the sound of it that nobody has taken yet."""

    def __init__(self, number: int, *, live: bool, epoch: int) -> None:
        super().__init__(number, live=live, epoch=epoch)
        self._chunks: deque[SpeechChunk] = deque()

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

    @property
    def is_whole(self) -> bool:
        """Whether its end is queued."""
        return bool(self._chunks) and self._chunks[-1].last

    def holds(self, seconds: float) -> bool:
        """Whether that much sound is queued, or its end."""
        return bool(self._chunks) and (self.queued_s >= seconds or self._chunks[-1].last)


class Backlog:
    """The utterances of one stream.

    Args:
        wake: guards everything here; notified whenever something changes.
        rate_hz: of the sound that is taken.
        metrics: counts the segments.
        voice: says what `say` is given; None: sound from outside only.
        check: raises when the stream has failed or is closed (called with ``wake`` held).
        called: told of every call that adds sound (with ``wake`` held).
    """

    def __init__(
        self,
        wake: threading.Condition,
        *,
        rate_hz: int,
        metrics: Metrics,
        voice: Synthesizer | None,
        check: Callable[[], None],
        called: Callable[[], None] = lambda: None,
        observer: Observer | None = None,
    ) -> None:
        self._wake, self._rate_hz, self._metrics, self._voice = wake, rate_hz, metrics, voice
        self._check, self._called = check, called
        self._observer = observer or Silent()
        self._jobs: deque[tuple[Utterance, str | Iterable[str]]] = deque()
        self._live: tuple[Utterance, ExternalAudio] | None = None
        self._finished = False
        self._stopped = False
        self._num_segments = 0
        self.epoch = 0
        """Interruptions so far; what was said before the last one is not wanted any more."""
        self.utterances: deque[Utterance] = deque()
        """In order; the owner takes chunks from the first and removes it after its last."""
        self._open: deque[Utterance] = deque()

    @property
    def can_say(self) -> bool:
        """Whether there is a voice."""
        return self._voice is not None

    def say(self, text: str | Iterable[str]) -> Utterance:
        """See `Stream.say`."""
        if self._voice is None:
            raise Unsupported("say() needs a voice; open the stream with voice=open_voice(), or push_audio()")
        if isinstance(text, str) and not any(c.isalnum() for c in text):
            raise InputError(f"nothing to say in {text[:40]!r}: it holds no letter and no digit; give words")
        with self._wake:
            segment = self._new(live=False)
            self._jobs.append((segment, text))
            return segment

    def push(self, samples: Samples, rate_hz: int | None, *, last: bool) -> Utterance:
        """See `Stream.push_audio`."""
        with self._wake:
            self._check_open("push_audio")
            segment, door = self._live or (None, ExternalAudio(rate_hz=self._rate_hz))
            chunk = door.push(as_array(samples), rate_hz or self._rate_hz, last=last)
            waiting_s = chunk.duration_s + (segment.queued_s if segment is not None else 0.0)
            if waiting_s > MAX_WAITING_S:
                raise InputError(
                    f"{waiting_s:.0f} s of sound wait to be shown, {MAX_WAITING_S:.0f} s are kept; push it as it is "
                    "heard, take frames between pushes, or interrupt()"
                )
            if segment is None:
                segment = self._new(live=True)
            else:
                self._called()
            self._live = None if last else (segment, door)
            segment.add(chunk)
            self._wake.notify_all()
            return segment

    def end(self) -> None:
        """See `Stream.end`."""
        with self._wake:
            if self._live is not None:
                self.push(np.zeros(0, np.float32), self._live[1].rate_hz, last=True)

    def finish(self) -> None:
        """See `Stream.finish`."""
        with self._wake:
            self.end()
            self._finished = True
            self._wake.notify_all()

    def drop(self) -> None:
        """Nothing that was said until now is wanted any more; constant time, queues are emptied where they are read."""
        self.epoch += 1
        self._live = None
        self._wake.notify_all()

    def stop(self) -> None:
        """End all utterances, and the thread in `speak`."""
        with self._wake:
            self._stopped = True
            for segment in self._open:
                segment.finish()
            self._wake.notify_all()

    @property
    def is_spent(self) -> bool:
        """Whether the stream was finished and nothing is left to be shown (lock held)."""
        self._forget_done()
        return self._finished and not self._open

    @property
    def is_spoken(self) -> bool:
        """Whether the stream was finished and all sound has been taken (lock held)."""
        return self._finished and self.first() is None

    def first(self) -> Utterance | None:
        """The utterance that comes next, past those that are not wanted any more (lock held)."""
        while self.utterances and self.utterances[0].epoch != self.epoch:
            self.utterances.popleft().finish(interrupted=True)
        return self.utterances[0] if self.utterances else None

    def speak(self) -> None:
        """Turn text into chunks, a little ahead of the picture, until `stop`. The body of a thread."""
        while True:
            with self._wake:
                while not self._jobs and not self._stopped:
                    self._wake.wait(NAP_S)
                if self._stopped:
                    return
                segment, text = self._jobs.popleft()
            if not self._is_wanted(segment):
                continue
            try:
                self._voice_it(segment, text)
            except StreamdiffError as error:
                self._end_early(segment, error)
            except Exception as error:
                self._end_early(segment, InputError(f"the text of segment {segment.id} failed: {error!r}; see its log"))
                logger.exception("the text of segment %d failed", segment.id)

    def _end_early(self, segment: Utterance, error: StreamdiffError) -> None:
        logger.warning("segment %d ends early: %s", segment.id, error)
        segment.error = error
        self._accept(segment, SpeechChunk(np.zeros(0, np.float32), self._rate_hz, (), segment.id, last=True))

    def _voice_it(self, segment: Utterance, text: str | Iterable[str]) -> None:
        assert self._voice is not None
        chunks = self._voice.speak(text, segment=segment.id)
        bridge = None if self._voice.rate_hz == self._rate_hz else Resampler(self._voice.rate_hz, self._rate_hz)
        while True:
            with span(self._observer, "speech", segment=segment.id):
                chunk = next(chunks, None)
            if chunk is not None and bridge is not None:
                samples_S = bridge.push(chunk.samples_S)
                if chunk.last:
                    samples_S = np.concatenate([samples_S, bridge.finish()])
                chunk = SpeechChunk(samples_S, self._rate_hz, chunk.phonemes, chunk.segment, chunk.last)
            if chunk is None or not self._accept(segment, chunk) or chunk.last:
                return

    def _accept(self, segment: Utterance, chunk: SpeechChunk) -> bool:
        """Queue a chunk once there is room; False when nobody wants it any more."""
        with self._wake:
            while segment.queued_s > VOICE_LEAD_S and self._is_wanted(segment):
                self._wake.wait(NAP_S)
            if not self._is_wanted(segment):
                return False
            segment.add(chunk)
            self._wake.notify_all()
            return True

    def _forget_done(self) -> None:
        while self._open and (self._open[0].done or self._open[0].epoch != self.epoch):
            segment = self._open.popleft()
            segment.finish(interrupted=not segment.done)

    def _is_wanted(self, segment: Utterance) -> bool:
        return segment.epoch == self.epoch and not self._stopped

    def _new(self, *, live: bool) -> Utterance:
        self._check_open("push_audio" if live else "say")
        if len(self.utterances) >= MAX_SEGMENTS:
            raise InputError(f"{MAX_SEGMENTS} segments wait to be heard; take frames, or interrupt()")
        self._forget_done()
        self._num_segments += 1
        segment = Utterance(self._num_segments, live=live, epoch=self.epoch)
        self.utterances.append(segment)
        self._open.append(segment)
        self._metrics.segments += 1
        self._called()
        return segment

    def _check_open(self, what: str) -> None:
        self._check()
        if self._finished:
            raise SessionClosed(f"{what}() after finish(): the stream ends with what was said; open a new one")


def as_array(samples: Samples) -> np.ndarray | bytes:
    """Somebody's samples as an array, whatever they came as; see `ExternalAudio.push`, which copies them."""
    if isinstance(samples, bytes):
        return samples
    if isinstance(samples, bytearray | memoryview):
        return bytes(samples)
    if isinstance(samples, Tensor):
        samples = samples.detach().to("cpu").numpy()
    return np.asarray(samples)  # copied when it is brought to mono
