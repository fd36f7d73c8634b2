"""A video stream driven one packet at a time, and what it must show: positions, sound, segments, the oracle's frames.

The line of these tests runs in the caller's thread and makes chunks ahead only when it is told to, so that a script
says exactly which chunks were under way when an interruption came.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from streamdiff.models.audio import LogMelFeatures
from streamdiff.pipeline.intake import Intake
from streamdiff.pipeline.packet import Packet
from streamdiff.pipeline.run import run_local
from streamdiff.pipeline.stream import VideoStream
from streamdiff.stream import Interrupted, Shown
from tests.engine.oracle_case import PROMPTS, Case, assert_alike, prompt, reference
from tests.oracle import Moment


@dataclass(frozen=True, slots=True)
class Say:
    """An utterance of so many chunks, the last of them cut short."""

    chunks: int


@dataclass(frozen=True, slots=True)
class Make:
    """So many chunks are made ahead of what is shown, as far as there is sound."""

    chunks: int


@dataclass(frozen=True, slots=True)
class Show:
    """So many chunks are taken, as far as there is sound."""

    chunks: int


@dataclass(frozen=True, slots=True)
class Prompt:
    number: int


@dataclass(frozen=True, slots=True)
class Interrupt:
    """The last so many chunks that were shown wait in the player's buffer, unplayed."""

    held: int = 0


Act = Say | Make | Show | Prompt | Interrupt


class Ahead:
    """A line in the caller's thread."""

    def __init__(self, packets: Iterator[Packet]) -> None:
        self._packets = packets
        self._made: deque[Packet] = deque()

    def make(self) -> None:
        self._made.append(next(self._packets))

    def get(self, timeout_s: float | None = None) -> Packet | None:
        del timeout_s
        return self._made.popleft() if self._made else next(self._packets, None)

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Said:
    """The sound of one chunk: which utterance it belongs to, and where in it."""

    segment: int
    number: int
    speech_s: float
    ends: bool
    audio_BZEA: Tensor
    sound_S: Tensor


class Scene:
    """Plays a script to a stream, and keeps account of what must come out."""

    def __init__(self, case: Case, *, live: bool = False) -> None:
        assert case.ranks == 1
        self.case, self.config = case, case.config
        self.encoder = LogMelFeatures(num_bands=4)
        self._rate = self.encoder.rate_hz
        self.chunk_s = Fraction(self.config.video_frames_per_chunk, self.config.fps)
        self.chunk_samples = self._rate * self.config.video_frames_per_chunk // self.config.fps
        self.line: Ahead | None = None
        self.stream = VideoStream(
            self.config,
            Intake(self.config, reference(case.motion), prompt(0), seed=case.seed, stream=case.stream),
            self.encoder,
            self._line,
            encode_prompt=lambda text: prompt(PROMPTS.index(text)),
            prompt=PROMPTS[0],
            live=live,
        )
        self.shown: list[Shown] = []
        self.script: list[Moment] = []
        """What the oracle is asked for."""
        self._expected: list[tuple[int, int, _Said, int]] = []
        """Of everything shown: place in the script, chunk, sound, prompt."""
        self._waiting: deque[_Said] = deque()
        self._under_way: deque[tuple[int, int, _Said, int]] = deque()
        self._made: list[int] = []
        """Chunks that were made and not taken back."""
        self._kept: dict[int, _Said] = {}
        self._segments = self._prompt = self._interruptions = self._next = self._furthest = self._position = 0
        self._back: tuple[int, ...] = ()
        self._new_prompt: int | None = None

    def _line(self, packets: Iterator[Packet]) -> Ahead:
        stages = [
            self.case.engine.stage(r, seed=self.case.seed, stream=self.case.stream) for r in self.case.schedule.roles
        ]
        self.line = Ahead(run_local(self.case.schedule, stages, packets))
        return self.line

    def play(self, acts: list[Act]) -> None:
        """Play the whole script, then all that is left to be said, and check everything that was shown."""
        for act in acts:
            match act:
                case Say(chunks):
                    self._say(chunks)
                case Make(chunks):
                    for _ in range(min(chunks, len(self._waiting))):
                        self._make()
                        assert self.line is not None
                        self.line.make()
                case Show(chunks):
                    for _ in range(min(chunks, len(self._waiting) + len(self._under_way))):
                        self._show()
                case Prompt(number):
                    self.stream.prompt(PROMPTS[number])
                    self._prompt = self._new_prompt = number
                case Interrupt(held):
                    self._interrupt(held)
        self.stream.finish()
        while self._waiting or self._under_way:
            self._show()
        assert self.stream.next() is None
        self._check()

    def _say(self, chunks: int) -> None:
        self._segments += 1
        length = chunks * self.chunk_samples - self.chunk_samples // 3
        time_S = np.arange(length) / self._rate
        samples_S = (0.3 * np.sin(2 * np.pi * (150 + 70 * self._segments + 300 * time_S) * time_S)).astype(np.float32)
        assert self.stream.push_audio(samples_S, last=True).id == self._segments
        sound_S = torch.zeros(chunks * self.chunk_samples)
        sound_S[:length] = torch.from_numpy(samples_S)
        columns = self.encoder.encode_whole(sound_S, self.config.fps).split(self.config.video_frames_per_chunk, dim=-1)
        for n, sound in enumerate(sound_S.split(self.chunk_samples)):
            speech_s = min(self.chunk_samples, length - n * self.chunk_samples) / self._rate
            self._waiting.append(
                _Said(
                    segment=self._segments,
                    number=n,
                    speech_s=speech_s,
                    ends=n == chunks - 1,
                    audio_BZEA=columns[n],
                    sound_S=sound,
                )
            )

    def _make(self) -> None:
        said = self._waiting.popleft()
        self._under_way.append((len(self.script), self._next, said, self._prompt))
        self.script.append(
            Moment(
                audio_BZEA=said.audio_BZEA,
                sound_S=said.sound_S,
                back=self._back,
                prompt_BPC=None if self._new_prompt is None else prompt(self._new_prompt),
            )
        )
        self._back, self._new_prompt = (), None
        self._made.append(self._next)
        self._furthest = max(self._furthest, self._next)
        self._next += 1

    def _show(self) -> None:
        if not self._under_way:
            self._make()
        expected = self._under_way.popleft()
        _, chunk, said, number = expected
        shown = self.stream.next()
        assert shown is not None
        frames = self.config.video_frames_per_chunk
        assert (shown.index, shown.pts) == (chunk * frames, Fraction(chunk * frames, self.config.fps))
        assert (shown.segment, shown.ends_segment, shown.epoch) == (said.segment, said.ends, self._interruptions)
        assert shown.prompt == PROMPTS[number]
        assert np.array_equal(shown.sound_S, said.sound_S.numpy())
        self.shown.append(shown)
        self._expected.append(expected)
        self._kept[chunk] = said
        self._position = chunk + 1

    def _interrupt(self, held: int) -> None:
        chunk_s = self.chunk_s
        played = max(0, self._position - min(held, self.case.slack))
        interrupted = self.stream.interrupt(float(played * chunk_s) if held else None)
        self._interruptions += 1
        self._waiting.clear()
        stale = [chunk for chunk in self._made if chunk >= played]
        heard = self._kept.get(played - 1)
        # An utterance of which all was played is over, unless what was made after it is taken back.
        if heard is not None and heard.ends and not stale:
            heard = None
        cut = stale[0] if stale else self._position
        resumes = self._next
        if stale:
            resumes = min(self._next, max(cut, self._furthest - self.case.slack))
        expected = Interrupted(
            epoch=self._interruptions,
            segment=0 if heard is None else heard.segment,
            played_s=0.0 if heard is None else heard.number * float(chunk_s) + heard.speech_s,
            dropped=len(stale) * self.config.video_frames_per_chunk,
            cut_s=cut * chunk_s,
            resumes_s=resumes * chunk_s,
        )
        assert math.isclose(interrupted.played_s, expected.played_s, abs_tol=1e-9)
        assert dataclasses.replace(interrupted, played_s=expected.played_s) == expected
        if stale:
            self._back = (*self._back, self._next - cut)
            self._under_way.clear()
            self._made = [chunk for chunk in self._made if chunk < cut]
            self._kept = {chunk: said for chunk, said in self._kept.items() if chunk < cut}
            self._next = resumes
            self._position = min(self._position, resumes)

    def _check(self) -> None:
        made = self.case.oracle().film(self.script)
        for shown, (n, chunk, _, _) in zip(self.shown, self._expected, strict=True):
            assert made[n].chunk == chunk
            assert_alike(torch.from_numpy(shown.frames_THWC), made[n].frames_THWC)
