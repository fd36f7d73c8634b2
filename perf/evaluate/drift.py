"""Streams of hours: what is noted of them, and whether it drifts.

Axes: B streams, C channels, T frames, H height, W width, S samples.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from signals import Array, coarse, first_crossing, picture, slope, synchrony
from torch import Tensor

from evaluate.film import PLAIN
from evaluate.judge import identity_distance
from evaluate.variants import denoiser, standing_still
from streamdiff.arrays import Floats
from streamdiff.config import EngineConfig
from streamdiff.engine import Engine
from streamdiff.models.audio import chunks
from streamdiff.models.vae import to_rgb8
from streamdiff.pipeline.run import run_local
from streamdiff.pipeline.schedule import plan
from streamdiff.training.probe import Probe, Reading

_LOOK_S, _SEGMENT_S, _SEGMENT_CHUNKS = 20.0, 500.0, 20
_BLOCK_S = 120.0
SHOWN_AT_S = (1.0, 10.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0)


def resident_mib() -> float:
    """Resident memory of this process, MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


@dataclass(slots=True, eq=False)
class LongRun:
    """What is noted of a stream of hours."""

    config: EngineConfig
    opening_T: Floats
    """Truth of one loop of the speech."""
    photo: Reading
    colours: Array
    probe: Probe
    decoder: Any
    means: list[Array] = field(default_factory=list[Array])
    spreads: list[Array] = field(default_factory=list[Array])
    looks: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    segments: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    shown: dict[float, NDArray[np.uint8]] = field(default_factory=dict[float, NDArray[np.uint8]])
    _recent: list[Tensor] = field(default_factory=list[Tensor])

    def hear(self, chunk: int, latent_BCTHW: Tensor) -> None:
        """One more finished chunk."""
        latent = latent_BCTHW[0].flatten(1)
        self.means.append(latent.mean(1).numpy())
        self.spreads.append(latent.std(1).numpy())
        self._recent = [*self._recent[-_SEGMENT_CHUNKS:], latent_BCTHW]
        end_s = (chunk + 1) * self.config.chunk_s
        if chunk > 0 and (_due(end_s, _LOOK_S, self.config.chunk_s) or chunk == 1):
            self._look(end_s)
        if chunk >= _SEGMENT_CHUNKS and (_due(end_s, _SEGMENT_S, self.config.chunk_s) or chunk == _SEGMENT_CHUNKS):
            self._segment(chunk)

    @torch.inference_mode()
    def _frames(self, num_chunks: int) -> NDArray[np.uint8]:
        """The last chunks, from a fresh decoder that saw the chunk before them."""
        latents = torch.cat(self._recent[-num_chunks - 1 :], dim=2)
        shown, _ = self.decoder.decode(latents)
        return to_rgb8(shown)[0].numpy()[-num_chunks * self.config.video_frames_per_chunk :]

    def _look(self, end_s: float) -> None:
        frames = self._frames(1)
        reading = self.probe.read(torch.from_numpy(frames))
        due = [s for s in SHOWN_AT_S if s <= end_s and s not in self.shown]
        for s in due:
            self.shown[s] = frames[-1].copy()
        grey = frames.mean(3, dtype=np.float32)
        self.looks.append({
            "s": end_s,
            "colour": float(np.abs(coarse(frames) - self.colours).mean()),
            "identity": float(identity_distance(reading, self.photo)[0]),
            "sharpness": float(np.abs(np.diff(grey, axis=2)).mean() + np.abs(np.diff(grey, axis=1)).mean()),
            "saturated": float(((frames == 0) | (frames == 255)).mean()),
            "beyond_4": float((self._recent[-1].abs() > 4).float().mean()),
            "resident_mib": resident_mib(),
        })  # fmt: skip

    def _segment(self, chunk: int) -> None:
        period = self.config.video_frames_per_chunk
        frames = self._frames(_SEGMENT_CHUNKS)
        first = (chunk + 1 - _SEGMENT_CHUNKS) * period
        expected = np.take(self.opening_T, np.arange(first, first + len(frames)), mode="wrap")
        seen = self.probe.read(torch.from_numpy(frames)).column("opening_cm").numpy()
        sync, look = synchrony(seen, expected), picture(frames, period=period)
        self.segments.append({
            "s": (chunk + 1) * self.config.chunk_s,
            "sync": sync.at_zero,
            "lag": float(sync.lag),
            "seam": look.seam,
            "jitter": look.jitter,
            "flicker": look.flicker,
        })  # fmt: skip

    def tracks(self) -> dict[str, tuple[Array, Array]]:
        """Every measure over time: seconds and values."""
        looked_s = np.array([look["s"] for look in self.looks])
        found = {name: (looked_s, np.array([look[name] for look in self.looks]))
                 for name in ("colour", "identity", "sharpness", "saturated", "beyond_4")}  # fmt: skip
        judged_s = np.array([segment["s"] for segment in self.segments])
        for name in ("sync", "seam", "flicker", "jitter"):
            found[name] = (judged_s, np.array([segment[name] for segment in self.segments]))
        means, spreads = np.stack(self.means), np.stack(self.spreads)
        usual, size = means[:100].mean(0), spreads[:100].mean(0)
        moved = np.abs(means - usual) / size
        grown = np.log(np.maximum(spreads, 1e-6) / size)
        # About ten seconds each: a loop of speech has hundreds of syllables.
        per = min(21, max(1, len(means) // 50))
        count = len(means) // per
        at_s = (np.arange(count) + 0.5) * per * self.config.chunk_s
        for name, values in (("latent_shift", moved.mean(1)), ("latent_spread", grown.mean(1))):
            found[name] = (at_s, values[: count * per].reshape(count, -1).mean(1))
        return found


def _due(end_s: float, every_s: float, chunk_s: float) -> bool:
    return int(end_s / every_s) != int((end_s - chunk_s) / every_s)


_SLOPES = ("colour", "identity", "sharpness", "latent_shift", "latent_spread", "sync", "flicker", "seam")


def summary(run: LongRun, limits: Mapping[str, float], *, settled_s: float = 30.0) -> dict[str, Any]:
    """Slopes with intervals, levels at both ends, crossings, memory; the first ``settled_s`` do not count.

    ``limits``: distances beyond which a crossing is noted.
    """
    out: dict[str, Any] = {"seconds": len(run.means) * run.config.chunk_s, "chunks": len(run.means)}
    for name, (at_s, value) in run.tracks().items():
        keep = at_s > settled_s
        out |= _described(name, at_s[keep], value[keep])
        if name in limits:
            out[f"{name}_limit"] = limits[name]
            out[f"{name}_crossing_s"] = first_crossing(at_s[keep], value[keep], limits[name])
    resident = [look["resident_mib"] for look in run.looks if look["s"] > settled_s]
    if resident:
        out["resident_mib"] = resident[-1]
        # Medians of the second and the last quarter: decoding a stretch to look at takes memory, and gives it back.
        quarter = max(1, len(resident) // 4)
        early, late = resident[quarter : 2 * quarter] or resident[:1], resident[-quarter:]
        out["resident_growth_mib"] = float(np.median(late) - np.median(early))
    return out


def _described(name: str, at_s: Array, value: Array) -> dict[str, Any]:
    """Slope and levels of one measure, where there is enough of it."""
    out: dict[str, Any] = {}
    if name in _SLOPES and len(value) >= 8:
        line = slope(at_s, value, block_s=_BLOCK_S)
        out[f"{name}_slope"] = line.per_1000_s
        out[f"{name}_slope_low"], out[f"{name}_slope_high"] = line.low, line.high
        out[f"{name}_slope_holds_0"] = line.holds_zero
    if len(value) >= 4:
        tenth = max(2, len(value) // 10)
        out[f"{name}_first"], out[f"{name}_last"] = float(value[:tenth].mean()), float(value[-tenth:].mean())
        out[f"{name}_mean"] = float(value.mean())
    return out


LEVELS: Mapping[str, float] = {"colour_mean": 0.03, "identity_mean": 0.35}
"""Levels that a long run must keep on average. A slope says nothing of a stream that goes wrong in its first seconds
and stays so: without a sink, identity is 0.75 and colour 0.065 from the first minute on; with one 0.22 and 0.009."""


def beyond(facts: Mapping[str, Any], levels: Mapping[str, float] = LEVELS) -> list[str]:
    """The levels that a run (`summary`) did not keep, each with what it had; empty: it holds."""
    return [f"{name} {facts[name]:.3f} > {level}" for name, level in levels.items() if not facts[name] <= level]


def long_run(
    engine: Engine, variant: str, *, photo_HWC: Tensor, loop_S: Floats, opening_T: Floats, probe: Probe, seconds: float,
    seed: int = 0, note: Callable[[LongRun, float], None] | None = None,
) -> LongRun:  # fmt: skip
    """A stream of ``seconds`` in this variant; ``note`` is told every 500 chunks, and at the end."""
    config = engine.config
    stage = denoiser(engine, variant, seed=seed)
    intake = engine.intake(photo_HWC, PLAIN, seed=seed)
    num_chunks = math.ceil(seconds / config.chunk_s)
    heard = chunks(
        itertools.repeat(torch.from_numpy(loop_S)),
        engine.audio_encoder(),
        frames_per_chunk=config.video_frames_per_chunk,
        fps=config.fps,
    )
    packets = intake.packets(itertools.islice(heard, num_chunks))
    if variant == "absolute":
        packets = (standing_still(packet, config) for packet in packets)
    run = LongRun(
        config=config,
        opening_T=opening_T,
        photo=probe.read(photo_HWC[None]),
        colours=coarse(photo_HWC[None].numpy()),
        probe=probe,
        decoder=engine.decoder(),
    )
    schedule = plan(num_steps=config.num_steps, num_ranks=1, refresh_chunk=config.refresh_chunk)
    began_s = time.process_time()
    for packet in run_local(schedule, [stage], packets):
        run.hear(packet.chunk, packet.latent_BCTHW)
        if note is not None and ((packet.chunk + 1) % 500 == 0 or packet.chunk + 1 == num_chunks):
            note(run, time.process_time() - began_s)
    return run
