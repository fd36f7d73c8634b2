"""Pipecat: any session is the face of a bot (extra ``pipecat``).

    async with engine.open() as session:
        pipeline = Pipeline([transport.input(), ..., llm, tts, SessionVideoService(session), transport.output(), ...])

The service swallows the sound of the voice before it and pushes it again, frame by frame, each beside its picture. What
follows sound in the pipeline (its texts, the end of the answer) keeps its place behind it, so that an answer that was
interrupted is remembered as far as it was heard. The transport needs ``video_out_enabled``, ``video_out_is_live``, and
the session's own size and frame rate.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from typing import Any

import numpy as np

from streamdiff.adapters.playing import Playing, pcm
from streamdiff.errors import BackendError, InputError, SessionClosed
from streamdiff.session import Session
from streamdiff.stream import Can, Segment, Shown

try:
    from pipecat.frames.frames import (
        CancelFrame,
        EndFrame,
        Frame,
        InterruptionFrame,
        OutputImageRawFrame,
        StartFrame,
        SystemFrame,
        TTSAudioRawFrame,
        TTSStoppedFrame,
        UserStartedSpeakingFrame,
        UserStoppedSpeakingFrame,
    )
    from pipecat.processors.frame_processor import FrameDirection
    from pipecat.services.ai_service import AIService
    from pipecat.services.settings import ServiceSettings
except ImportError as error:
    raise BackendError(
        f"the Pipecat adapter needs {error.name}, which is not installed; run: pip install 'streamdiff[pipecat]'"
    ) from error

logger = logging.getLogger(__name__)

_DRAIN_S = 60.0
"""Longest wait, when the pipeline ends, for what is still being said."""
_KEPT = 64


class SessionVideoService(AIService):
    """Shows a session, and speaks through it what the pipeline's voice says.

    Args:
        session: open; its owner closes it. This service takes its frames, and nobody else may.
    """

    def __init__(self, session: Session, **options: Any) -> None:
        super().__init__(settings=ServiceSettings(model=None), **options)
        self._session, self._playing = session, Playing(session)
        self._task: asyncio.Task[None] | None = None
        self._is_showing = False
        self._spoken: Segment | None = None  # the last utterance that was taken, until it has been sent
        self._pushed_s = 0.0
        self._shown, self._shown_s = 0, 0.0
        self._held: deque[tuple[Segment, float, Frame]] = deque()
        self._contexts: dict[int, str | None] = {}
        self._sending = asyncio.Lock()

    async def start(self, frame: StartFrame) -> None:
        """Of `AIService`: begin to show."""
        await super().start(frame)
        if self._task is None:
            self._is_showing = True
            self._task = self.create_task(self._show())

    async def stop(self, frame: EndFrame) -> None:
        """Of `AIService`: the pipeline ends once all that was said has been shown."""
        await super().stop(frame)
        until_s = time.monotonic() + _DRAIN_S
        while self._is_showing and self._spoken is not None and time.monotonic() < until_s:
            await asyncio.sleep(0.01)
        await self._end()
        await self._let_go()

    async def cancel(self, frame: CancelFrame) -> None:
        """Of `AIService`: end now."""
        await super().cancel(frame)
        await self._end()

    async def cleanup(self) -> None:
        """Of `FrameProcessor`."""
        await super().cleanup()
        await self._end()

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Of `FrameProcessor`."""
        if isinstance(frame, EndFrame):
            self._end_utterance()
        await super().process_frame(frame, direction)
        if isinstance(frame, UserStartedSpeakingFrame | UserStoppedSpeakingFrame) and Can.LISTEN in self._session.can:
            self._session.listen(isinstance(frame, UserStartedSpeakingFrame))
        if isinstance(frame, TTSAudioRawFrame) and direction is FrameDirection.DOWNSTREAM:
            await self._speak(frame)
            return
        if isinstance(frame, InterruptionFrame):
            await self._interrupt(frame, direction)
            return
        at_s = self._pushed_s
        if isinstance(frame, TTSStoppedFrame):
            self._end_utterance()
            at_s = math.inf
        in_order = direction is FrameDirection.DOWNSTREAM and not isinstance(frame, SystemFrame)
        if in_order and self._spoken is not None and self._is_showing:
            self._held.append((self._spoken, at_s, frame))
            return
        await self.push_frame(frame, direction)

    async def _speak(self, frame: TTSAudioRawFrame) -> None:
        samples_SC = np.frombuffer(frame.audio, np.int16).reshape(-1, frame.num_channels)
        try:
            segment = self._session.push_audio(samples_SC, frame.sample_rate)
        except (InputError, SessionClosed) as error:
            await self.push_error(f"the face cannot say this: {error}", exception=error)
            return
        if segment is not self._spoken:
            self._spoken, self._pushed_s = segment, 0.0
        self._pushed_s += len(samples_SC) / frame.sample_rate
        self._contexts[segment.id] = frame.context_id
        while len(self._contexts) > _KEPT:
            self._contexts.pop(next(iter(self._contexts)))

    def _end_utterance(self) -> None:
        if not self._session.is_closed:
            self._session.end()

    async def _interrupt(self, frame: InterruptionFrame, direction: FrameDirection) -> None:
        # Not between a picture and its sound: nothing of the old answer may follow the interruption.
        async with self._sending:
            if not self._session.is_closed:
                self._playing.interrupt()
            self._spoken = None
            kept, self._held = [held for _, _, held in self._held if not held.interruptible], deque()
            await self.push_frame(frame, direction)
            for held in kept:
                await self.push_frame(held)

    async def _show(self) -> None:
        try:
            async for frame in self._playing.frames():
                async with self._sending:
                    await self._send(frame)
        except Exception as error:
            logger.exception("the face of a pipeline has failed")
            await self.push_error(f"the face has failed: {error}", exception=error, force_treat_as_permanent=True)
        await self._let_go()

    async def _send(self, frame: Shown) -> None:
        if self._playing.is_void(frame):
            return
        _, height, width, _ = frame.frames_THWC.shape
        self._playing.play(frame)
        await self.push_frame(OutputImageRawFrame(frame.frames_THWC.tobytes(), (width, height), "RGB"))
        if frame.segment:
            context_id = self._contexts.get(frame.segment)
            await self.push_frame(TTSAudioRawFrame(pcm(frame), self._session.rate_hz, 1, context_id))
        if frame.segment != self._shown:
            self._shown, self._shown_s = frame.segment, 0.0
        self._shown_s += 1 / self._session.fps
        while self._held and self._is_behind(frame, *self._held[0][:2]):
            await self.push_frame(self._held.popleft()[2])
        if self._spoken is not None and self._is_behind(frame, self._spoken, math.inf):
            self._spoken = None

    def _is_behind(self, frame: Shown, segment: Segment, at_s: float) -> bool:
        """Whether this place in an utterance has been sent with this frame, or before."""
        if frame.segment != segment.id:
            return segment.done
        return frame.ends_segment or self._shown_s >= at_s - 0.25 / self._session.fps  # sums of floats differ

    async def _let_go(self) -> None:
        """Nothing more will be shown: hold nothing back any more, the end of the pipeline least of all."""
        self._is_showing, self._spoken = False, None
        while self._held:
            await self.push_frame(self._held.popleft()[2])

    async def _end(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            await self.cancel_task(task)
