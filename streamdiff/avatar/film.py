"""A stream on its way into a film: what is said, frames a second at a time, a visible mark, a contact sheet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from streamdiff.arrays import Floats
from streamdiff.avatar.kinematics import FPS
from streamdiff.avatar.stream import AvatarStream
from streamdiff.media import VideoWriter
from streamdiff.stream import Segment, Shown
from streamdiff.voice import RATE_HZ

MARK = "synthetic"
"""What a visible mark says."""
_LEAD_FRAMES, _TAIL_FRAMES = 8, 14
_WRITE_FRAMES = FPS
_AUDIO_AHEAD_S = 4.0


def spoken(
    stream: AvatarStream, text: str | Iterable[str], sound: Iterator[Tensor] | None
) -> Iterator[tuple[Shown, Segment | None]]:
    """A breath of idling, the words, and a breath after them. Raises what the voice failed with."""
    frames = stream.frames()
    for _ in range(_LEAD_FRAMES):
        yield next(frames), None
    if sound is None:
        segment = stream.say(text)
        while not segment.done:
            yield next(frames), segment
    else:
        segment = None
        block_S = next(sound, None)
        while block_S is not None or segment is None or not segment.done:
            while block_S is not None and (segment is None or segment.queued_s < _AUDIO_AHEAD_S):
                following_S = next(sound, None)
                segment = stream.push_audio(block_S.numpy(), RATE_HZ, last=following_S is None)
                block_S = following_S
            assert segment is not None
            yield next(frames), segment
    if segment.error is not None:
        raise segment.error
    for _ in range(_TAIL_FRAMES):
        yield next(frames), segment


def in_seconds(sound: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same sound in blocks of a second."""
    held: list[Tensor] = []
    for block_S in sound:
        held.append(block_S)
        if sum(map(len, held)) >= RATE_HZ:
            yield torch.cat(held)
            held = []
    yield torch.cat([*held, torch.zeros(0)])


class Film:
    """Frames on their way into a file, a second at a time."""

    def __init__(self, writer: VideoWriter, marked_size: int | None) -> None:
        self._writer = writer
        self._mark = None if marked_size is None else mark_of(marked_size)
        self._pictures: list[Tensor] = []
        self._sounds: list[Floats] = []

    def add(self, frame: Shown) -> None:
        picture = torch.from_numpy(frame.frames_THWC[0])
        self._pictures.append(picture if self._mark is None else marked(picture, self._mark))
        self._sounds.append(frame.sound_S)
        if len(self._pictures) == _WRITE_FRAMES:
            self.finish()

    def finish(self) -> None:
        if self._pictures:
            sound_S = torch.from_numpy(np.concatenate(self._sounds))
            self._writer.write(torch.stack(self._pictures), sound_S)
        self._pictures, self._sounds = [], []


class Sheet:
    """Evenly spread frames of a film whose length nobody knows yet; holds at most twice ``count``."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: list[Tensor] = []
        self._stride = 1
        self._seen = 0

    def add(self, picture_HW3: Tensor) -> None:
        """Look at one more frame."""
        if self._seen % self._stride == 0:
            self._kept.append(picture_HW3.cpu())
        self._seen += 1
        if len(self._kept) > 2 * self._count:
            self._kept, self._stride = self._kept[::2], 2 * self._stride

    def __len__(self) -> int:
        return min(self._count, len(self._kept))

    def frames_THWC(self) -> Tensor:  # noqa: N802
        """The chosen frames."""
        chosen = np.linspace(0, len(self._kept) - 1, len(self)).round().astype(int).tolist()
        return torch.stack([self._kept[i] for i in chosen])


def mark_of(size: int) -> Tensor:
    """The visible mark for a frame of this size: how white each pixel becomes, ``[H, W]`` 0..1."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("L", (size, size))
    font = ImageFont.load_default(max(10, size // 20))
    ImageDraw.Draw(image).text((size // 40, size - size // 40), MARK, fill=190, font=font, anchor="ls")
    return torch.from_numpy(np.asarray(image).copy()).float() / 255


def marked(picture_HW3: Tensor, mark_HW: Tensor) -> Tensor:
    """A frame with the mark on it; the input is left as it was."""
    strength = mark_HW[..., None]
    return (picture_HW3.float() * (1 - strength) + 255 * strength).round().to(torch.uint8)
