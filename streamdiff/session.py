"""The async face of one live stream.

    async with engine.open(image_HWC, "a person is talking") as session:
        session.push_audio(samples_S)     # from a microphone or a voice, whenever there is some
        async for shown in session:
            play(shown.frames_THWC, shown.sound_S)

Below this module everything is synchronous; here it crosses once, by a thread. Chunks come out in order, each with the
sound that belongs to it; where no sound has come in time, with silence, so the face goes on living. `interrupt` is what
barge-in needs: it costs nothing, drops everything that was made but not shown, and resumes where the shown ends.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from streamdiff.config import EngineConfig
from streamdiff.errors import InputError, SessionClosed
from streamdiff.models.audio import AudioChunk, AudioChunker, AudioEncoder
from streamdiff.pipeline.intake import Intake
from streamdiff.pipeline.packet import Packet

_NAP_S = 0.05
"""Longest sleep between two looks at whether the session still stands."""
MAX_BACKLOG_S = 600.0
"""Sound that may wait to be spoken."""

Run = Callable[[Iterator[Packet]], Iterator[Packet]]
"""From new packets to finished ones: the pipeline."""


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """One chunk, ready to be shown."""

    chunk: int
    epoch: int
    frames_THWC: Tensor
    """uint8 RGB."""
    sound_S: Tensor
    """float32 at the encoder's rate, exactly as long as the frames."""


class _Voice:
    """Sound on its way in: pushed from anywhere, taken chunk by chunk by the head."""

    def __init__(self, encoder: AudioEncoder, config: EngineConfig, *, live: bool) -> None:
        self._encoder = encoder
        self._config = config
        self._live = live
        self._blocks: collections.deque[Tensor] = collections.deque()
        self._waiting_samples = 0
        self._changed = threading.Condition()
        self._ended = False
        self._stopped = False
        self.fresh = 0
        """Counts interruptions: what was heard before the last one is stale."""

    def push(self, samples_S: Tensor) -> None:
        with self._changed:
            if self._ended or self._stopped:
                raise SessionClosed("push_audio() after the voice has ended; open a new session")
            if self._waiting_samples + len(samples_S) > MAX_BACKLOG_S * self._encoder.rate_hz:
                raise InputError(
                    f"more than {MAX_BACKLOG_S:.0f} s of sound wait to be spoken; push it as it is heard, not at once"
                )
            self._blocks.append(samples_S)
            self._waiting_samples += len(samples_S)
            self._changed.notify_all()

    def end(self) -> None:
        """No more sound will come: what was pushed is spoken, then the stream ends."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def stop(self) -> None:
        """End at once."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def drop(self) -> None:
        """Forget what was pushed and not yet taken."""
        with self._changed:
            self._blocks.clear()
            self._waiting_samples = 0
            self.fresh += 1
            self._changed.notify_all()

    def chunks(self) -> Iterator[tuple[AudioChunk, int]]:
        """Chunks, and how fresh they are, for as long as the session stands; in a live session, one at least every
        ``chunk_s``.
        """
        fresh = self.fresh
        chunker = self._chunker()
        ready: collections.deque[AudioChunk] = collections.deque()
        due_s = time.monotonic()
        while True:
            block_S, now_fresh, over = self._take(None if ready else due_s)
            if now_fresh != fresh:
                fresh, chunker = now_fresh, self._chunker()
                ready.clear()
                if block_S is None:
                    continue
            if self._stopped:
                return
            if block_S is not None:
                ready.extend(chunker.push(block_S))
            elif over and not ready:
                for chunk in chunker.finish():
                    yield chunk, fresh
                return
            elif not ready:
                while not ready:  # nothing came in time: the face listens
                    ready.extend(chunker.push(torch.zeros(self._encoder.rate_hz // 25)))
            if ready:
                due_s = max(due_s, time.monotonic() - self._config.chunk_s) + self._config.chunk_s
                yield ready.popleft(), fresh

    def _take(self, until_s: float | None) -> tuple[Tensor | None, int, bool]:
        """Next block, waiting for it until a moment (None: not at all); how fresh it is; whether it was the last."""
        with self._changed:
            while not (self._blocks or self._stopped or self._ended or until_s is None):
                left_s = until_s - time.monotonic() if self._live else _NAP_S
                if left_s <= 0:
                    break
                self._changed.wait(min(left_s, _NAP_S))
            block_S = None
            if self._blocks and until_s is not None:
                block_S = self._blocks.popleft()
                self._waiting_samples -= len(block_S)
            return block_S, self.fresh, self._ended and not self._blocks

    def _chunker(self) -> AudioChunker:
        return AudioChunker(self._encoder, frames_per_chunk=self._config.video_frames_per_chunk, fps=self._config.fps)


class Session:
    """One stream. Use it as an async context manager and iterate over it once.

    ``live``: whether time matters. A live session fills in silence when no sound has come; otherwise it waits.
    """

    def __init__(
        self,
        config: EngineConfig,
        head: Intake,
        encoder: AudioEncoder,
        run: Run,
        *,
        encode_prompt: Callable[[str], Tensor],
        live: bool = True,
    ) -> None:
        self._head = head
        self._encoder = encoder
        self._encode_prompt = encode_prompt
        self._voice = _Voice(encoder, config, live=live)
        self._epoch = 0
        self._shown = -1
        self._closed = False
        self._lock = threading.Lock()
        self._packets = run(self._new_packets())

    @property
    def rate_hz(self) -> int:
        """Rate of the sound that comes out, and that `push_audio` takes."""
        return self._encoder.rate_hz

    def push_audio(self, samples_S: Tensor) -> None:
        """Say this: float32 mono at `rate_hz`, blocks of any length, from any thread.

        Raises InputError for what is no sound, SessionClosed after the end.
        """
        if samples_S.ndim != 1 or not samples_S.dtype.is_floating_point:
            raise InputError(
                f"push_audio takes mono float samples [S], got {samples_S.dtype} of shape {list(samples_S.shape)}; "
                "average the channels, scale integers to -1..1"
            )
        if not bool(samples_S.isfinite().all()):
            raise InputError("push_audio got samples that are not numbers; check the source of the sound")
        self._require_open("push_audio")
        self._voice.push(samples_S.detach().to("cpu", torch.float32))

    def end_audio(self) -> None:
        """No more sound will come: the stream ends with what was pushed."""
        self._voice.end()

    async def prompt(self, text: str) -> None:
        """Follow another prompt, from the next chunk that enters the pipeline."""
        self._require_open("prompt")
        self._head.switch_prompt(await asyncio.to_thread(self._encode_prompt, text))

    def interrupt(self) -> int:
        """Stop speaking: forget the sound that waits and everything made but not shown; returns the new epoch.

        Takes no longer than a lock. The stream resumes right after the last chunk shown if the memory reaches back that
        far (``memory.slack_chunks``), else as far back as it reaches.
        """
        self._require_open("interrupt")
        with self._lock:
            self._voice.drop()
            self._head.take_back(self._shown + 1)
            self._epoch = self._head.epoch
            return self._epoch

    def _new_packets(self) -> Iterator[Packet]:
        for chunk, fresh in self._voice.chunks():
            with self._lock:
                # An interruption may have come since the chunk was cut; its sound must not enter the new epoch.
                packet = self._head.packet(chunk) if fresh == self._voice.fresh else None
            if packet is not None:
                yield packet

    def __aiter__(self) -> AsyncIterator[Shown]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[Shown]:
        self._require_open("iteration")
        while True:
            packet = await asyncio.to_thread(next, self._packets, None)
            if packet is None:
                return
            assert packet.frames_THWC is not None
            assert packet.sound_S is not None
            with self._lock:
                if packet.epoch < self._epoch:
                    continue  # made before an interruption
                self._shown = packet.chunk
            yield Shown(packet.chunk, packet.epoch, packet.frames_THWC, packet.sound_S)

    async def aclose(self) -> None:
        """End the stream now; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._voice.stop()
        close = getattr(self._packets, "close", None)
        if close is not None:
            # A generator that is running in another thread cannot be closed; it ends by itself, for the voice has.
            with contextlib.suppress(ValueError):
                await asyncio.to_thread(close)

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _require_open(self, what: str) -> None:
        if self._closed:
            raise SessionClosed(f"{what}() after the session ended; open a new one")
