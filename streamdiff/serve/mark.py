"""A visible mark on every frame that leaves: drawn once, blended per frame."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from streamdiff.errors import ConfigError

MAX_TEXT = 80
_SHARE = 20
"""A letter is this part of the frame's height, or less where the words are many."""
_LEAST_PX = 9
_RIM_PX = 1


class Mark:
    """Words in the lower left corner of a frame, white with a dark rim: readable on any picture.

    Args:
        text: one line, at most 80 characters.
        height, width: of the frames, pixels.

    Raises:
        ConfigError: no such words, or they do not fit into the frame.
    """

    def __init__(self, text: str, height: int, width: int) -> None:
        text = text.strip()
        if not text or len(text) > MAX_TEXT or not text.isprintable():
            raise ConfigError(f"a mark is one line of 1 to {MAX_TEXT} characters, got {text[:MAX_TEXT]!r}")
        sizes = range(max(_LEAST_PX, height // _SHARE), _LEAST_PX - 1, -1)
        boxes = (_drawn(text, px) for px in sizes)
        box_HW2 = next((box for box in boxes if box.shape[0] <= height and box.shape[1] <= width), None)
        if box_HW2 is None:
            raise ConfigError(f"the mark {text!r} does not fit into {width}x{height} pixels; choose fewer words")
        rows, columns = box_HW2.shape[:2]
        self._where = slice(height - rows, height), slice(0, columns)
        self._keep_HW1 = 255 - box_HW2[..., 1:]
        self._add_HW1 = box_HW2[..., :1] * box_HW2[..., 1:] + 127

    def on(self, frames_THWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The frames with the mark on them, uint8 ``[T, H, W, C]``; the input is left as it was."""
        marked = frames_THWC.copy()
        corner = marked[(slice(None), *self._where)]
        corner[:] = (corner * self._keep_HW1 + self._add_HW1) // 255
        return marked


@functools.lru_cache(16)
def mark_of(text: str, height: int, width: int) -> Mark:
    """The mark of these words for frames of this size. Errors as `Mark`."""
    return Mark(text, height, width)


def _drawn(text: str, px: int) -> NDArray[np.uint16]:
    """The words alone: how bright and how opaque each pixel of their box is, 0..255."""
    font = ImageFont.load_default(px)
    left, top, right, bottom = font.getbbox(text, stroke_width=_RIM_PX)
    margin = px // 2
    size = int(right - left) + 2 * margin, int(bottom - top) + 2 * margin
    image = Image.new("LA", size)
    at = margin - left, margin - top
    ImageDraw.Draw(image).text(at, text, font=font, fill=(255, 230), stroke_width=_RIM_PX, stroke_fill=(0, 230))
    return np.asarray(image).astype(np.uint16)
