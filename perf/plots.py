"""Curves as small PNG files, drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Points = Sequence[tuple[float, float]]

COLOURS = ((20, 90, 180), (210, 60, 40), (40, 140, 60), (150, 80, 170), (200, 130, 20), (90, 90, 90), (0, 150, 160))
_PAPER, _INK, _GRID = (255, 255, 255), (50, 50, 50), (225, 225, 225)


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot: several named curves over one axis."""

    title: str
    curves: Mapping[str, Points]
    low: float | None = None
    high: float | None = None
    mark: float | None = None
    """A level to draw a dotted line at."""


def draw_panels(panels: Sequence[Panel], path: Path, *, unit: str, width: int = 860, height: int = 210) -> None:
    """One plot above the other, colours by name, one legend; ``unit`` names the axis."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    top = 26
    image = Image.new("RGB", (width, top + height * len(panels) + 18), _PAPER)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(12)
    x = 60.0
    for name in names:
        draw.line((x, 13, x + 22, 13), colour[name], 3)
        draw.text((x + 27, 13), name, _INK, font, anchor="lm")
        x += 45 + draw.textlength(name, font)
    for row, panel in enumerate(panels):
        box = (60, top + row * height + 22, width - 14, top + (row + 1) * height - 22)
        _draw_panel(draw, panel, box, colour, font)
    draw.text((width - 14, image.height - 4), unit, _INK, font, anchor="rs")
    image.quantize(64).save(path, optimize=True)


def _draw_panel(
    draw: ImageDraw.ImageDraw,
    panel: Panel,
    box: tuple[int, int, int, int],
    colour: Mapping[str, tuple[int, int, int]],
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
) -> None:
    left, top, right, bottom = box
    points = [p for curve in panel.curves.values() for p in curve if math.isfinite(p[1])]
    draw.text((left, top - 5), panel.title, _INK, font, anchor="ls")
    draw.rectangle(box, outline=_INK)
    if not points:
        return
    last = max(p[0] for p in points) or 1.0
    low = panel.low if panel.low is not None else min(p[1] for p in points)
    high = panel.high if panel.high is not None else max(p[1] for p in points)
    high = high if high > low else low + 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        share = min(1.0, max(0.0, (y - low) / (high - low)))
        return left + x / last * (right - left), bottom - share * (bottom - top)

    for k in range(5):
        level = low + (high - low) * k / 4
        y = place(0, level)[1]
        draw.line((left + 1, y, right - 1, y), _GRID)
        draw.text((left - 4, y), f"{level:.3g}", _INK, font, anchor="rm")
        draw.text((place(last * k / 4, low)[0], bottom + 3), f"{last * k / 4:,.0f}", _INK, font, anchor="ma")
    if panel.mark is not None and low <= panel.mark <= high:
        y = place(0, panel.mark)[1]
        for x in range(left, right, 8):
            draw.line((x, y, x + 3, y), _INK)
    for name, curve in panel.curves.items():
        placed = [place(*p) for p in curve if math.isfinite(p[1])]
        if len(placed) > 1:
            draw.line(placed, colour[name], 2)
        elif placed:
            (x, y) = placed[0]
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour[name])


def small_png(image: Image.Image, path: Path, *, limit_bytes: int) -> None:
    """Write a picture with as many colours as fit into ``limit_bytes``."""
    for colours in (256, 128, 64, 32):
        image.quantize(colours).save(path, optimize=True)
        if path.stat().st_size <= limit_bytes:
            return
