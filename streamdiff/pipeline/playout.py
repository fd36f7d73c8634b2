"""The playout buffer of a video stream: what the next chunk of video hears.

Speech enters a chunk whole or not at all: an utterance is begun when enough of it is there to go on without a break,
``playout_s`` beyond the chunk and the encoder's look-ahead, and between utterances a live stream hears silence. Every
utterance begins a chunk and is encoded by itself, so what it looks like does not depend on what was said before it, nor
on when its blocks arrived.

Axes: S waveform samples.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from streamdiff.models.audio import AudioChunk, AudioChunker, AudioEncoder
from streamdiff.stream import Metrics, PlayClock
from streamdiff.voice.backlog import NAP_S, Backlog, Utterance

_HUSHED = 0.01
"""Peak of sound that nobody misses: -40 dBFS."""
_PIECES_HZ = 25
"""Silence is fed, and left out, in pieces of 40 ms."""


@dataclass(frozen=True, slots=True, eq=False)
class _Sound:
    """Speech to be encoded now."""

    samples_S: np.ndarray
    is_short: bool
    """Whether it does not fill a chunk: it ends here, or more of it is late."""


@dataclass(frozen=True, slots=True)
class _Wait:
    """There is not enough sound yet; look again after so many seconds, or when something changes."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Heard:
    """What one chunk hears, and whose sound it is."""

    audio: AudioChunk
    epoch: int
    """Interruptions of the voice before it."""
    utterance: Utterance | None = None
    """None: silence."""
    start_s: float = 0.0
    """Where in the utterance the chunk begins."""
    speech_s: float = 0.0
    """How much of the utterance it holds; silence fills the rest."""
    ends: bool = False
    """Whether the utterance ends here."""


class Playout:
    """Gives the chunks of one stream their sound. `next` is called by one thread.

    Args:
        backlog: what waits to be spoken.
        wake: the backlog's condition.
        stopped: whether the stream is over.
        live: True: a chunk is due every ``chunk_s``, in silence where nothing is said. False: sound is waited for.
        playout_s: sound that must be there beyond what a chunk needs before live speech begins, and how long speech
            that was begun may then be late; what it costs in latency, and the jitter it takes.
    """

    def __init__(
        self,
        backlog: Backlog,
        encoder: AudioEncoder,
        *,
        wake: threading.Condition,
        stopped: Callable[[], bool],
        metrics: Metrics,
        clock: PlayClock,
        frames_per_chunk: int,
        fps: int,
        live: bool,
        playout_s: float,
    ) -> None:
        self._backlog, self._encoder, self._wake, self._stopped = backlog, encoder, wake, stopped
        self._metrics, self._clock, self._live, self._playout_s = metrics, clock, live, playout_s
        self._frames_per_chunk, self._fps = frames_per_chunk, fps
        self._chunk_s = frames_per_chunk / fps
        self._rate_hz = encoder.rate_hz
        # A column per frame comes out when the look-ahead beyond it has been heard.
        self._need_s = self._chunk_s + encoder.lookahead_s
        self._due_s: float | None = None
        self._epoch = 0
        self._ready: deque[Heard] = deque()
        self._utterance: Utterance | None = None
        self._said: tuple[Utterance | None, float] = (None, 0.0)
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Forget all that was taken and not handed on (lock held)."""
        self._epoch = self._backlog.epoch
        for utterance in (self._utterance, *(heard.utterance for heard in self._ready)):
            if utterance is not None:
                utterance.finish(interrupted=True)
        self._ready.clear()
        self._silence: AudioChunker | None = None
        self._speech: AudioChunker | None = None
        self._utterance = None
        self._held_S = np.zeros(0, np.float32)
        self._heard_all = False
        self._pushed = 0
        self._cut = 0

    def next(self) -> Heard | None:
        """What the next chunk hears, when it is due; None when the stream is over, or finished and all is said."""
        while True:
            with self._wake:
                if self._stopped():
                    return None
                if self._epoch != self._backlog.epoch:
                    self._begin_anew()
                wait_s = self._until_due_s()
                if wait_s > 0:
                    self._wake.wait(min(wait_s, NAP_S))
                    continue
                if self._ready:
                    self._note_due()
                    return self._ready.popleft()
                sound = self._gather()
                if isinstance(sound, _Wait):
                    self._wake.wait(sound.seconds)
                    continue
                if sound is None and self._utterance is None and self._backlog.is_spoken:
                    return None
                epoch = self._epoch
            self._encode(sound, epoch)

    def _until_due_s(self) -> float:
        """How long until a live stream wants its next chunk."""
        return self._due_s - time.monotonic() if self._live and self._due_s is not None else 0.0

    def _note_due(self) -> None:
        now_s = time.monotonic()
        self._due_s = max(now_s if self._due_s is None else self._due_s, now_s - self._chunk_s) + self._chunk_s

    def _gather(self) -> _Sound | _Wait | None:
        """Speech for a chunk, or None for silence, or how long to wait for either (lock held)."""
        if self._utterance is None and not self._begin():
            return None if self._live or self._backlog.is_spoken else _Wait(NAP_S)
        assert self._utterance is not None
        if self._live and self._utterance.live:
            self._make_up()
        piece = self._rate_hz // _PIECES_HZ
        needed = max(piece, math.ceil(self._need_s * self._rate_hz) + self._cut - self._pushed)
        self._take(needed)
        # One sample more than needed, or the end: what is the last chunk must be known when it is cut.
        if self._heard_all or len(self._held_S) > needed:
            samples_S, self._held_S = np.split(self._held_S, [min(needed, len(self._held_S))])
            return _Sound(samples_S, is_short=self._heard_all and not len(self._held_S))
        if not self._live:
            return _Wait(NAP_S)
        if self._due_s is None or time.monotonic() < self._due_s + self._playout_s:
            return _Wait(0.01)
        self._metrics.underruns += 1
        samples_S, self._held_S = self._held_S, self._held_S[:0]
        return _Sound(samples_S, is_short=True)

    def _begin(self) -> bool:
        """Begin the next utterance if there is one, and enough of it (lock held)."""
        utterance = self._backlog.first()
        if utterance is None:
            return False
        enough_s = self._need_s + (self._playout_s if utterance.live else 0.0)
        if self._live and not utterance.holds(enough_s):
            return False
        self._utterance, self._heard_all = utterance, False
        self._speech, self._silence = self._chunker(), None
        self._pushed = self._cut = 0
        return True

    def _take(self, count: int) -> None:
        """Bring sound of the utterance here until more than ``count`` samples are held, or all (lock held)."""
        assert self._utterance is not None
        parts = [self._held_S]
        held = len(self._held_S)
        while held <= count and not self._heard_all and (chunk := self._utterance.take()) is not None:
            parts.append(chunk.samples_S)
            held += len(chunk.samples_S)
            if chunk.last:
                self._heard_all = True
                self._backlog.utterances.popleft()
            self._wake.notify_all()
        self._held_S = np.concatenate(parts)

    def _make_up(self) -> None:
        """Leave silence out of live sound for as long as chunks were late: else one stall would delay it for ever (lock
        held).
        """
        piece = self._rate_hz // _PIECES_HZ
        if self._clock.owed_s < 1 / _PIECES_HZ:
            return
        self._take(1 << 62)
        spare = (len(self._held_S) - math.ceil((self._need_s + self._playout_s) * self._rate_hz)) // piece
        if spare <= 0:
            self._clock.owed_s = 0.0
            return
        pieces = self._held_S[: len(self._held_S) // piece * piece].reshape(-1, piece)
        hushed = np.abs(pieces).max(axis=1, initial=0.0) < _HUSHED
        # The first piece of a pause stays: what was said before it ends as it did.
        quiet = np.flatnonzero(hushed & np.concatenate([[False], hushed[:-1]]))
        leave = quiet[: min(spare, int(self._clock.owed_s * _PIECES_HZ))]
        kept_S = np.delete(pieces, leave, axis=0).reshape(-1)
        self._held_S = np.concatenate([kept_S, self._held_S[len(pieces) * piece :]])
        self._clock.owed_s -= len(leave) / _PIECES_HZ
        self._metrics.skipped_frames += len(leave)

    def _encode(self, sound: _Sound | None, epoch: int) -> None:
        """Turn speech into chunks, or make one of silence. Without the lock: an encoder may be slow."""
        if sound is None:
            self._silence = self._silence or self._chunker()
            self._ready.extend(Heard(chunk, epoch) for chunk in self._quiet(self._silence))
            return
        assert self._speech is not None
        assert self._utterance is not None
        utterance, ends = self._utterance, self._heard_all and not len(self._held_S)
        self._pushed += len(sound.samples_S)
        chunks = self._speech.push(torch.from_numpy(np.array(sound.samples_S, np.float32)))
        if sound.is_short:
            chunks += self._speech.finish()
        if not chunks and sound.is_short:  # an end without sound is told on a chunk of its own
            quiet = self._quiet(self._chunker())[0]
            self._ready.append(Heard(quiet, epoch, utterance, self._said_s, 0.0, ends) if ends else Heard(quiet, epoch))
        for n, chunk in enumerate(chunks):
            speech_s = min(len(chunk.sound_S), self._pushed - self._cut) / self._rate_hz
            self._cut += len(chunk.sound_S)
            last = ends and n == len(chunks) - 1
            self._ready.append(Heard(chunk, epoch, utterance, self._said_s, speech_s, last))
            self._said = utterance, self._said_s + speech_s
        if sound.is_short:
            if self._live and not ends:
                self._clock.owed_s += max(0, self._cut - self._pushed) / self._rate_hz
            self._speech = self._utterance = None

    @property
    def _said_s(self) -> float:
        """How much of the utterance the chunks so far hold."""
        utterance, said_s = self._said
        return said_s if utterance is self._utterance else 0.0

    def _quiet(self, chunker: AudioChunker) -> list[AudioChunk]:
        chunks: list[AudioChunk] = []
        while not chunks:
            chunks = chunker.push(torch.zeros(self._rate_hz // _PIECES_HZ))
        return chunks

    def _chunker(self) -> AudioChunker:
        return AudioChunker(self._encoder, frames_per_chunk=self._frames_per_chunk, fps=self._fps)
