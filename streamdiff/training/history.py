"""Log of a run (one JSON line a step) and its training curves."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from PIL import Image, ImageDraw, ImageFont

from streamdiff.errors import InputError
from streamdiff.output import replacing


class Log:
    """Training log, one JSON line a step; on resume, lines after the checkpoint are dropped: those steps run again."""

    def __init__(self, path: Path, first_step: int) -> None:
        self._path = path
        self.history: dict[str, list[tuple[int, float]]] = {}
        kept: list[str] = []
        if path.is_file() and first_step:
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # the end of a line that a kill cut
                if entry["step"] < first_step:
                    kept.append(line)
                    self._note(entry["step"], entry["numbers"])
        self._file: TextIO | None = None
        with replacing(path) as part:
            part.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._lines: list[str] = []

    def _note(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.history.setdefault(name, []).append((step, value))

    def write(self, step: int, numbers: Mapping[str, float], *, lr: Mapping[str, float]) -> None:
        entry = {"step": step, "at": round(time.time(), 3), "lr": lr, "numbers": numbers}
        self._lines.append(json.dumps(entry) + "\n")
        self._note(step, numbers)
        if len(self._lines) >= 50:
            self.flush()

    def flush(self) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(self._lines)
        except OSError as error:
            raise InputError(f"cannot write {self._path}: {error.strerror}; make room, then --resume") from error
        self._lines.clear()


_PANEL_HW, _MARGIN = (220, 720), 64
_PAPER, _INK, _PALE, _LINE = (255, 255, 255), (60, 60, 60), (190, 205, 230), (30, 80, 170)


def draw_curves(history: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> None:
    """Draw each number over the steps, one panel each: every value pale, their running mean in front.

    A number that is always positive and spans more than a decade is drawn on a logarithmic scale.
    """
    shown = {name: points for name, points in history.items() if len(points) > 1}
    if not shown:
        return
    height, width = _PANEL_HW
    image = Image.new("RGB", (width, height * len(shown)), _PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for row, (name, points) in enumerate(shown.items()):
        _draw_panel(draw, font, name, points, row)
    with replacing(path) as part:
        image.save(part)


def _draw_panel(draw: ImageDraw.ImageDraw, font: Any, name: str, points: Sequence[tuple[int, float]], row: int) -> None:
    """One number: its name and last value, its axes, every value, their running mean."""
    height, width = _PANEL_HW
    values = [value for _, value in points]
    logarithmic = min(values) > 0 and max(values) > 10 * min(values)
    scale: Callable[[float], float] = math.log10 if logarithmic else float
    low, high = scale(min(values)), scale(max(values))
    high = high if high > low else low + 1.0
    first, last = points[0][0], max(points[-1][0], points[0][0] + 1)
    top, bottom, left, right = row * height + 28, (row + 1) * height - 26, _MARGIN, width - 16

    def place(step: float, value: float) -> tuple[float, float]:
        x = left + (step - first) * ((right - left) / (last - first))
        return x, bottom - (value - low) * ((bottom - top) / (high - low))

    draw.text((left, top - 22), f"{name} ({values[-1]:.4g})" + (", log" if logarithmic else ""), _INK, font)
    draw.rectangle((left, top, right, bottom), outline=_INK)
    for level in (low, (low + high) / 2, high):
        shown_level = 10**level if logarithmic else level
        draw.text((left - 6, place(first, level)[1]), f"{shown_level:.3g}", _INK, font, anchor="rm")
    for step in (first, last):
        draw.text((place(step, low)[0], bottom + 4), str(step), _INK, font, anchor="ma")
    stride = max(1, len(points) // 2000)
    draw.line([place(step, scale(value)) for step, value in points[::stride]], _PALE, 1)
    smooth = [place(step, value) for step, value in _running_mean(points, scale)]
    draw.line([*smooth[::stride], smooth[-1]], _LINE, 2)


def _running_mean(points: Sequence[tuple[int, float]], scale: Callable[[float], float]) -> Iterator[tuple[int, float]]:
    """The mean of about the last fortieth of all points, on that scale."""
    mean = scale(points[0][1])
    keep = 1.0 - 1.0 / max(2.0, len(points) / 40)
    for step, value in points:
        mean = keep * mean + (1.0 - keep) * scale(value)
        yield step, mean
