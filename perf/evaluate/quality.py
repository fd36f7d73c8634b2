"""The table of quality: the truth, the truth through the codec, and every model; pictures on the way."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import percentile, show
from numpy.typing import NDArray
from PIL import Image
from plots import Panel, draw_panels, small_png
from signals import interval, per_minute, synchrony

from evaluate.film import film, through_codec
from evaluate.judge import Crowd, judge, loudness_opening, width
from evaluate.model import Model
from evaluate.people import People, Take
from evaluate.readers import BlinkReader, WidthReader
from streamdiff import presets
from streamdiff.training.data.clip import FPS
from streamdiff.training.probe import Probe

COLUMNS = ("row", "sync", "lag", "loudness", "round", "wide", "opening", "blinks", "blinks_known", "colour", "identity",
           "seam", "seam_latent", "jitter", "flicker", "sharpness", "apart", "apart_windows", "cpu_s_per_s",
           "first_s")  # fmt: skip
LOUDNESS_ROW = "loudness, three lines of arithmetic"


def quality(args: argparse.Namespace, people: People, probe: Probe, models: Sequence[Model]) -> list[dict[str, Any]]:
    """The table: truth, truth through the codec, loudness alone, and every model; contact sheet on the way."""
    takes = [people.take(n, args.seconds) for n in people.numbers(args.identities)]
    others = [people.take(n, args.seconds / 2, take=1) for n in people.numbers(args.identities)]
    table = Table(takes, others, probe)
    known = float(np.mean([per_minute(t.column("blink"), rate_hz=FPS) for t in takes]))
    table.add("truth", [t.frames_THWC for t in takes], blinks_known=known)
    coded = models[0].engine()
    table.add("truth through codec", [through_codec(coded, t.frames_THWC) for t in takes])
    table.add_loudness()
    for position, model in enumerate(models):
        engine = model.engine()
        films = [film(engine, t.photo_HWC, t.sound_S, seed=args.seed) for t in takes]
        speed = {
            "steps": engine.config.num_steps,
            "cpu_s_per_s": float(np.median([percentile(f.chunk_s, 50) for f in films])) / engine.config.chunk_s,
            "first_s": percentile([f.first_s for f in films], 50),
        }
        table.add(model.name, [f.frames_THWC for f in films], **speed)
        if position == 0:
            sheet([f.frames_THWC for f in films[:4]], takes[:4], args.out / "pictures" / "portrait.png")
            _sync_plot(films[0].frames_THWC, takes[0], probe, args.out / "pictures" / "sync.png")
    return table.rows


class Table:
    """Rows of films of the same persons; each is shown as soon as it is known.

    Args:
        takes: the persons as they are.
        others: the same persons saying something else: what distances between crowds, and the reader of widths, are
            made from.
    """

    def __init__(self, takes: Sequence[Take], others: Sequence[Take], probe: Probe) -> None:
        self.rows: list[dict[str, Any]] = []
        self._takes, self._probe = takes, probe
        self._period = presets.portrait().video_frames_per_chunk
        self._others = Crowd()
        for take in others:
            self._others.add(probe.read(torch.from_numpy(take.frames_THWC)))
        widths = [width(take.sound_S)[: len(take.frames_THWC)] for take in others]
        self._blinks = [BlinkReader(take.frames_THWC, take.column("blink")) for take in others]
        self._widths = WidthReader(np.concatenate(self._others.frames), np.concatenate(widths))

    def add(self, name: str, films: Sequence[NDArray[np.uint8]], **more: Any) -> None:
        """Judge a film of each person."""
        crowd, found = Crowd(), list[dict[str, float]]()
        for frames, take, blinks in zip(films, self._takes, self._blinks, strict=True):
            facts, reading = judge(frames, take, self._probe, period=self._period, widths=self._widths, blinks=blinks)
            found.append(facts)
            crowd.add(reading)
        near, moving = crowd.apart(self._others)
        self._show({**_over_persons(name, found), "apart": near, "apart_windows": moving, **more})

    def add_loudness(self) -> None:
        """What loudness alone would score: no picture, the opening that `loudness_opening` makes of the sound."""
        found: list[dict[str, float]] = []
        for take in self._takes:
            sync = synchrony(loudness_opening(take.sound_S), take.column("opening_cm"))
            found.append({"sync": sync.at_zero, "lag": float(sync.lag), "sync_best": sync.best})
        self._show(_over_persons(LOUDNESS_ROW, found))

    def _show(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        show([row], columns=[column for column in COLUMNS if column in row])
        sys.stdout.flush()


def _over_persons(name: str, found: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Means with intervals, and the values of each person."""
    row: dict[str, Any] = {"row": name}
    for key in found[0]:
        mean, low, high = interval([f[key] for f in found])
        row |= {key: mean, f"{key}_low": low, f"{key}_high": high, f"{key}_each": [round(f[key], 4) for f in found]}
    row["lag"] = float(np.median([f["lag"] for f in found]))
    return row


def sheet(films: Sequence[NDArray[np.uint8]], takes: Sequence[Take], path: Path, *, columns: int = 8) -> None:
    """For people who look: per person the photograph and frames over time, and the truth beneath."""
    size, gap = 96, 3
    canvas = Image.new("RGB", ((columns + 1) * (size + gap), len(films) * 2 * (size + gap) + 4), (255, 255, 255))
    for k, (frames, take) in enumerate(zip(films, takes, strict=True)):
        at = [round((i + 0.5) / columns * len(frames)) for i in range(columns)]
        # The most open moment near each mark: a closed mouth shows little.
        opening = take.column("opening_cm")
        at = [max(range(max(0, t - 12), t + 12), key=lambda f: float(opening[f])) for t in at]
        for row, pictures in enumerate((frames, take.frames_THWC)):
            for column, shown in enumerate([take.photo_HWC.numpy(), *(pictures[t] for t in at)]):
                tile = Image.fromarray(shown).resize((size, size), Image.Resampling.LANCZOS)
                canvas.paste(tile, (column * (size + gap), (2 * k + row) * (size + gap)))
    path.parent.mkdir(parents=True, exist_ok=True)
    small_png(canvas, path, limit_bytes=300_000)


def _sync_plot(frames_THWC: NDArray[np.uint8], take: Take, probe: Probe, path: Path) -> None:
    stop = min(len(frames_THWC), 10 * FPS)
    seen = probe.read(torch.from_numpy(frames_THWC[:stop])).column("opening_cm").numpy()
    truth = take.column("opening_cm")[:stop]
    curves = {"truth": [(t / FPS, float(v)) for t, v in enumerate(truth)],
              "read from the generated picture": [(t / FPS, float(v)) for t, v in enumerate(seen)]}  # fmt: skip
    draw_panels([Panel("mouth opening, cm", curves, low=0.0)], path, unit="s")
