"""Clips cut from videos of real people: 25 frames a second, the middle square of each, with their sound."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import numpy as np
import torch
from av.error import FFmpegError
from av.video.frame import VideoFrame

from streamdiff.errors import ConfigError, InputError
from streamdiff.facts import printable
from streamdiff.media.sound import read_audio
from streamdiff.media.source import open_media, reason
from streamdiff.training.data.clip import FPS, FRAME_SAMPLES, NUM_FRAMES, PROMPTS, RATE_HZ, Clip
from streamdiff.training.data.speech import leveled
from streamdiff.training.faces import Picture

_LONGEST_GAP_S = 10.0
"""Between two frames; a file may claim centuries."""


class RecordedClips:
    """Stretches of real video: files with a picture and a sound track, cut into clips, scaled and cropped to a square.

    ``prompts``: one for each file, or one for all. The photograph is the first frame of the file. Raises InputError
    for a file that has no picture, no sound, or is shorter than a clip.
    """

    def __init__(
        self, files: Sequence[Path], *, prompts: Sequence[str] = (PROMPTS["plain"][0],), size: int = 128,
        num_frames: int = NUM_FRAMES,
    ) -> None:  # fmt: skip
        if len(prompts) not in (1, len(files)):
            raise ConfigError(
                f"give one prompt for all clips or one for each: {len(files)} files, {len(prompts)} prompts"
            )
        self.size, self.num_frames = size, num_frames
        self._prompts = list(prompts) * (len(files) if len(prompts) == 1 else 1)
        self._files = list(files)
        self._places: list[tuple[int, int]] = []
        for number, path in enumerate(self._files):
            length = sum(1 for _ in _pictures(path, size))
            if length < num_frames:
                raise InputError(f"{path} has {length} frames at {FPS} a second; a clip needs {num_frames}")
            self._places += [(number, first) for first in range(0, length - num_frames + 1, num_frames)]

    def __len__(self) -> int:
        return len(self._places)

    def clip(self, index: int) -> Clip:
        return next(self.clips(index, index + 1))

    def clips(self, start: int, stop: int) -> Iterator[Clip]:
        """Clips ``start .. stop - 1``; each file is read once for all of its clips."""
        for number, group in itertools.groupby(range(start, stop), key=lambda i: self._places[i][0]):
            yield from self._cut(number, [self._places[i][1] for i in group])

    def _cut(self, number: int, firsts: Sequence[int]) -> Iterator[Clip]:
        path, T = self._files[number], self.num_frames
        sound = torch.cat(list(read_audio(path, RATE_HZ))).numpy()
        photo: Picture | None = None
        frames: list[Picture] = []
        for t, picture in enumerate(_pictures(path, self.size)):
            photo = picture if photo is None else photo
            if t // T * T in firsts:
                frames.append(picture)
            if len(frames) == T:
                begin, stop = (t + 1 - T) * FRAME_SAMPLES, (t + 1) * FRAME_SAMPLES
                heard_S = np.pad(sound[begin:stop], (0, max(0, stop - max(begin, len(sound)))))
                yield Clip(np.stack(frames), photo, leveled(heard_S), self._prompts[number], None)
                frames = []
            if t + 1 == firsts[-1] + T:
                return


def _pictures(path: Path, size: int) -> Iterator[Picture]:
    """Frames of a video at 25 a second, the middle square of each, scaled."""
    from PIL import Image

    due = 0
    for frame, at_s in _frames(path):
        if at_s * FPS + 1e-3 < due:
            continue
        if at_s * FPS > due + _LONGEST_GAP_S * FPS:
            raise InputError(f"{path} shows nothing new for {at_s - due / FPS:.4g} s; cut it there")
        picture = frame.to_image()
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BOX)
        shown = np.asarray(picture.convert("RGB"), np.uint8)
        while due <= at_s * FPS + 1e-3:
            yield shown
            due += 1


def _frames(path: Path) -> Iterator[tuple[VideoFrame, float]]:
    """Frames of a video, and when they are shown."""
    with ExitStack() as stack:
        try:
            container = stack.enter_context(open_media(path))
        except InputError as error:
            raise InputError(f"{path} cannot be read as video: {error}") from error
        if not container.streams.video:
            raise InputError(f"{path} has no picture; give a video file")
        try:
            for frame in container.decode(container.streams.video[0]):
                at_s = cast("float | None", frame.time)  # PyAV says that there always is one
                if at_s is None:
                    raise InputError(f"{path} does not say when its frames are shown; convert it to MP4")
                yield frame, at_s
        except FFmpegError as error:
            raise InputError(f"{path} cannot be read as video: {printable(reason(error))}") from error
