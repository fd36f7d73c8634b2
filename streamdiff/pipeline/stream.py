"""A live stream of the video model: speech in, chunks of frames out, over ranks that are threads of this process.

The threads: rank 0 asks the playout buffer what the next chunk hears and makes its packet; the ranks compute; whoever
calls `VideoStream.next` takes what leaves the tail. An interruption rewinds the line to the first chunk that holds
stale speech and was not played; chunks of silence are never stale, so a face lives on at any rate of interruptions.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from types import TracebackType
from typing import Protocol

from torch import Tensor

from streamdiff.config import EngineConfig
from streamdiff.errors import SessionClosed, Unsupported
from streamdiff.models.audio import AudioEncoder
from streamdiff.pipeline.intake import Intake
from streamdiff.pipeline.packet import Packet
from streamdiff.pipeline.playout import Heard, Playout
from streamdiff.stream import Can, Interrupted, Metrics, PlayClock, Samples, Shown, State
from streamdiff.voice import Synthesizer
from streamdiff.voice.backlog import Backlog, Utterance

PLAYOUT_S = 0.08
"""Size of the playout buffer: jitter of live sound that is never heard, and what that costs in latency."""


class Ranks(Protocol):
    """Ranks at work on one stream: their own (`streamdiff.pipeline.run.LocalRanks`), or a seat on a line that many
    streams share (`streamdiff.pipeline.line.Seat`).
    """

    def get(self, timeout_s: float | None = None) -> Packet | None:
        """The next finished packet; None at the end. Raises TimeoutError, and what a rank failed with at every call."""
        ...

    def close(self) -> None:
        """Stop; idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class _Made:
    """What a packet was made of."""

    heard: Heard
    prompt: str


class VideoStream:
    """One face of a video model on the air, a `Stream` of chunks.

    Args:
        config: what the ranks run; ``memory.slack_chunks`` is how far an interruption can take back.
        intake: makes the packets.
        encoder: hears.
        line: starts the ranks on a source of packets.
        encode_prompt: text to an embedding ``[1, P, C]``.
        prompt: the text that the intake was made with.
        voice: says what `say` is given; None: only `push_audio`.
        live: True: a chunk for every chunk of time, in silence where nothing is said. False: as fast as chunks are
            taken, and sound is waited for; what is shown depends on the calls alone.
        playout_s: see `PLAYOUT_S`.
    """

    def __init__(
        self,
        config: EngineConfig,
        intake: Intake,
        encoder: AudioEncoder,
        line: Callable[[Iterator[Packet]], Ranks],
        *,
        encode_prompt: Callable[[str], Tensor],
        prompt: str,
        voice: Synthesizer | None = None,
        live: bool = True,
        playout_s: float = PLAYOUT_S,
    ) -> None:
        self._config, self._intake, self._encoder = config, intake, encoder
        self._encode_prompt, self._live = encode_prompt, live
        self.fps, self.rate_hz = config.fps, encoder.rate_hz
        self._frames = config.video_frames_per_chunk
        self.metrics = Metrics()

        # Everything from here to the blank line is guarded by this one condition.
        self._wake = threading.Condition()
        self._backlog = Backlog(
            self._wake, rate_hz=self.rate_hz, metrics=self.metrics, voice=voice, check=self._check_open
        )
        self._clock = PlayClock(config.fps, slack_frames=self._frames)
        self._closed = False
        self._failure: BaseException | None = None
        self._prompt = prompt
        self._made: dict[int, _Made] = {}
        self._shown = 0
        self._cursor_s: float | None = None
        self._rewinds: list[tuple[int, int]] = []
        self._interrupted_s: float | None = None

        self._playout = Playout(
            self._backlog,
            encoder,
            wake=self._wake,
            stopped=lambda: self._closed,
            metrics=self.metrics,
            clock=self._clock,
            frames_per_chunk=self._frames,
            fps=config.fps,
            live=live,
            playout_s=playout_s,
        )
        self._speaker: threading.Thread | None = None
        if voice is not None:
            self._speaker = threading.Thread(target=self._backlog.speak, name="video-speech", daemon=True)
            self._speaker.start()
        self._line = line(self._packets())

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a frame."""
        return self._config.height, self._config.width

    @property
    def can(self) -> frozenset[Can]:
        """See `Stream.can`."""
        return frozenset({Can.PROMPT, Can.SAY} if self._backlog.can_say else {Can.PROMPT})

    def push_audio(self, samples: Samples, rate_hz: int | None = None, *, last: bool = False) -> Utterance:
        """See `Stream.push_audio`."""
        return self._backlog.push(samples, rate_hz, last=last)

    def say(self, text: str | Iterable[str]) -> Utterance:
        """See `Stream.say`."""
        return self._backlog.say(text)

    def end(self) -> None:
        """See `Stream.end`."""
        self._backlog.end()

    def finish(self) -> None:
        """See `Stream.finish`."""
        self._backlog.finish()

    def listen(self, listening: bool = True) -> None:
        """See `Stream.listen`."""
        raise Unsupported("a video model listens only as far as its prompt says so; use prompt() for an attentive face")

    def prompt(self, text: str) -> None:
        """See `Stream.prompt`."""
        with self._wake:
            self._check_open()
        text_BPC = self._encode_prompt(text)
        with self._wake:
            self._intake.switch_prompt(text_BPC)
            self._prompt = text

    def played(self, position_s: float) -> None:
        """See `Stream.played`."""
        with self._wake:
            self._cursor_s = position_s

    def interrupt(self, played_s: float | None = None) -> Interrupted:
        """See `Stream.interrupt`. The chunk that is being played is played to its end."""
        with self._wake:
            self._check_open()
            position_s = self._cursor_s if played_s is None else played_s
            kept = self._shown if position_s is None else min(self._shown, self._chunks_until(position_s))
            self._backlog.drop()
            stale = sorted(chunk for chunk, made in self._made.items() if chunk >= kept and made.heard.utterance)
            cut, resumes, dropped = self._shown, self._next_shown(), 0
            if stale:
                cut = stale[0]
                dropped = self._frames * sum(chunk >= cut for chunk in self._made)
                resumes = self._take_back(stale)
            being_heard = self._made.get(kept - 1)
            segment, heard_s = 0, 0.0
            if (
                being_heard is not None
                and (utterance := being_heard.heard.utterance) is not None
                and not (being_heard.heard.ends and not stale)
            ):
                segment, heard_s = utterance.id, being_heard.heard.start_s + being_heard.heard.speech_s
                utterance.finish(interrupted=True)
            self._interrupted_s = time.monotonic()
            self.metrics.interruptions += 1
            self.metrics.dropped_frames += dropped
            return Interrupted(
                epoch=self._backlog.epoch,
                segment=segment,
                played_s=heard_s,
                dropped=dropped,
                cut_s=self._pts(cut),
                resumes_s=self._pts(resumes),
            )

    def _take_back(self, stale: list[int]) -> int:
        """Make the first of these chunks and all that follow anew; the chunk that comes next (lock held)."""
        cut = stale[0]
        resumes = self._intake.take_back(cut)
        self._rewinds = [*self._rewinds[-64:], (self._intake.epoch, cut)]
        for chunk in stale:
            utterance = self._made[chunk].heard.utterance
            assert utterance is not None
            utterance.finish(interrupted=True)
        self._made = {chunk: made for chunk, made in self._made.items() if chunk < cut}
        self._clock.repeat_until(self._shown * self._frames)
        self._shown = min(self._shown, resumes)
        return resumes

    def _next_shown(self) -> int:
        """The chunk that is shown next; beyond the last that was shown where an interruption lost some (lock held)."""
        return min((chunk for chunk in self._made if chunk >= self._shown), default=self._intake.next_chunk)

    def _chunks_until(self, position_s: float) -> int:
        return math.ceil(position_s * self.fps / self._frames - 1e-6)

    def _pts(self, chunk: int) -> Fraction:
        return Fraction(chunk * self._frames, self.fps)

    def next(self, timeout_s: float = 30.0) -> Shown | None:
        """See `Stream.next`."""
        until_s = time.monotonic() + timeout_s
        while True:
            with self._wake:
                self._check_open()
            try:
                packet = self._line.get(max(0.0, until_s - time.monotonic()))
            except TimeoutError:
                raise
            except BaseException as error:
                with self._wake:
                    if not self._closed:
                        self._failure = self._failure or error
                    self._backlog.stop()
                    self._check_open()
                raise
            if packet is None:
                with self._wake:
                    self._check_open()
                return None
            with self._wake:
                if not any(epoch > packet.epoch and packet.chunk >= chunk for epoch, chunk in self._rewinds):
                    return self._show(packet)

    def _show(self, packet: Packet) -> Shown:
        """Count a chunk that is taken (lock held)."""
        assert packet.frames_THWC is not None
        assert packet.sound_S is not None
        made, metrics, now_s = self._made[packet.chunk], self.metrics, time.monotonic()
        self._forget(packet.chunk)
        index = packet.chunk * self._frames
        late_s = self._clock.lateness_s(index) if self._live else 0.0
        self._shown = packet.chunk + 1
        metrics.frames += self._frames
        metrics.late_frames += self._frames * (late_s > 0)
        if self._interrupted_s is not None:
            metrics.interrupt_to_silence_ms = (now_s - self._interrupted_s) * 1e3
            self._interrupted_s = None
        utterance = made.heard.utterance
        if utterance is not None:
            metrics.speaking_frames += self._frames
            utterance.num_shown += self._frames
            if utterance.shown_s is None:
                utterance.shown_s = now_s
                metrics.video_ms, metrics.voice_ms = utterance.video_ms, utterance.voice_ms
            if made.heard.ends:
                utterance.finish()
        return Shown(
            frames_THWC=packet.frames_THWC.numpy(),
            sound_S=packet.sound_S.numpy(),
            index=index,
            pts=self._pts(packet.chunk),
            epoch=self._backlog.epoch,
            segment=0 if utterance is None else utterance.id,
            ends_segment=made.heard.ends,
            prompt=made.prompt,
            state=State.IDLE if utterance is None else State.SPEAKING,
            late_s=late_s,
        )

    def _forget(self, chunk: int) -> None:
        """What was made long ago cannot be taken back any more (lock held)."""
        for old in itertools.takewhile(lambda c: c < chunk - self._config.memory.slack_chunks - 1, list(self._made)):
            del self._made[old]

    def close(self) -> None:
        """See `Stream.close`."""
        with self._wake:
            self._closed = True
            self._backlog.stop()
            self._wake.notify_all()
        self._line.close()
        if self._speaker is not None and self._speaker is not threading.current_thread():
            self._speaker.join(timeout=5.0)

    def __enter__(self) -> VideoStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _packets(self) -> Iterator[Packet]:
        """The source of the line; runs in the thread of rank 0."""
        while (heard := self._playout.next()) is not None:
            with self._wake:
                # An interruption may have come since the chunk was cut; its sound must not enter the new epoch.
                if heard.epoch != self._backlog.epoch and heard.utterance is not None:
                    continue
                packet = self._intake.packet(heard.audio)
                self._made[packet.chunk] = _Made(heard, self._prompt)
            yield packet

    def _check_open(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise SessionClosed("the stream has ended; open a new one")
