"""How good a trained model is: in step with speech, the same person, for how long, and how fast it obeys.

    python perf/evaluate.py --head ict_facekit.npz --speech facegood_audio2rig.npz
    python perf/evaluate.py --head ict_facekit.npz --long 10000 --variant full      (and every other variant)
    python perf/evaluate.py --draw                                                  all long runs in one picture

**What is judged.** Streams of the real engine: its head, its stage, its decoder, fed with speech chunk by chunk, one
rank in this process. Persons are drawn heads whose numbers begin at 1,000,000 (training counts from 0), with speech
that no training saw: the last take of the recordings, and sentences of a synthetic voice that are drawn anew. Of a
drawn head everything is known, so that beside every row stand the rows of the truth (the same person drawn to the same
speech) and of the truth through the codec: no model that uses this codec can do better.

**How.** Pictures are read by `streamdiff.training.probe`, a network of 0.2 M parameters of our own. What it says of the
truth's own frames shows how well it reads.

- sync: correlation over time of the mouth opening that is read with the opening that the truth's rule makes of the same
  sound (`data.articulation`), at lag 0; the lag of the highest correlation, frames, positive: the picture is late. The
  same against loudness alone.
- colour: mean absolute difference of 4x4 coarse colours (0..1) to the photograph. identity: root mean square difference
  of the probe's identity columns (in spreads over people) to those of the photograph, averaged over 12 frames.
- seam: change across borders of chunks over change inside. jitter: mean second difference. flicker: change in the upper
  corners, where nothing moves. sharpness: mean absolute Laplacian. Grey levels 0..255.
- apart: Frechet distance of probe features (64 per frame), and of short-window statistics (12 frames: mean, spread and
  step of the columns of truth), to other takes of the same persons. Network and numbers are our own: neither is an
  FID or FVD, and they compare with each other only.
- prompts: frames from the first frame of the chunk that brings a prompt until the column it moves (for nods and shakes
  the rolling spread over 25 frames) has gone half-way to where it settles, and how far that is beside the truth's.
- objects: a badge that the raised hand hides for L seconds: colour of its place before and after, beside a stream in
  which no hand was raised.
- drift (long runs): every chunk's latent mean and spread per channel against the first 100 chunks; every 20 s one chunk
  is decoded (by a fresh decoder, warmed with the chunk before it) and compared with the photograph, every 500 s ten
  seconds are decoded and judged for sync. Slopes are least squares with a 95 % interval from a moving-block bootstrap
  (blocks of 120 s, longer than the loop of the speech). Crossing: when colour or identity is for three looks in a row
  further from the photograph than half the mean distance between two persons.

**Variants of long runs.** full: as served. no-sink: the sink's keys are removed once the window is full (the model saw
clips without a sink in training). absolute: the sink stays at its place while the stream walks away from it.
clean-history: after its last step each chunk is run once more at noise level 0, and all steps remember that
(Self-Forcing), instead of each what it saw. no-adaptive: the sink stays the photograph.

**Limits.** Drawn heads are simpler than people, and the probe has seen nothing else: numbers here rank variants of this
small model; they do not certify a large one. One photograph and one seed per long run.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import machine_card, percentile, report, show
from numpy.typing import NDArray
from PIL import Image
from plots import Panel, draw_panels, small_png
from safetensors.torch import load_file, save_file
from signals import (
    Array,
    coarse,
    first_crossing,
    frechet,
    interval,
    picture,
    response,
    rolling,
    slope,
    synchrony,
    windows,
)
from torch import Tensor

from streamdiff import flow, presets, rng
from streamdiff.arrays import Floats
from streamdiff.avatar.head3d import HeadModel
from streamdiff.config import EngineConfig
from streamdiff.engine import Engine, Weights
from streamdiff.errors import ConfigError, InputError
from streamdiff.memory import SinkMemory, StepMemory
from streamdiff.models.audio import chunks
from streamdiff.models.served.step import ServedStep
from streamdiff.models.vae import from_rgb8, to_rgb8
from streamdiff.pipeline.denoise import DenoiseStage
from streamdiff.pipeline.packet import Packet
from streamdiff.pipeline.run import run_local
from streamdiff.pipeline.schedule import Role, plan
from streamdiff.pipeline.stage import Chain
from streamdiff.rope import Rotation
from streamdiff.training.data.articulation import articulation, mouth_weights, opening_cm
from streamdiff.training.data.clip import FPS, FRAME_SAMPLES, PROMPTS, RATE_HZ, TRUTH
from streamdiff.training.data.score import compose
from streamdiff.training.data.speech import Voices, leveled
from streamdiff.training.faces import Build, Look, Painter, badge_box
from streamdiff.training.probe import TRUTH_SPREAD, Probe, Reading, load_probe

RESULTS = Path(__file__).with_name("results")

FIRST_NUMBER = 1_000_000
"""Number of the first person to judge by; training uses small ones."""
PLAIN = PROMPTS["plain"][0]
VARIANTS = ("full", "no-sink", "absolute", "clean-history", "no-adaptive")
_LOOK_S, _SEGMENT_S, _SEGMENT_CHUNKS = 20.0, 500.0, 20
_BLOCK_S = 120.0
_SHOWN_AT_S = (1.0, 10.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0)


# ---------------------------------------------------------------------------------------------------------- the models


@dataclass(frozen=True, slots=True)
class Model:
    """Weights, and how they are run."""

    name: str
    folder: Path | None = None
    """None: those that come with the preset."""
    sigmas: tuple[float, ...] | None = None
    renoise: bool | None = None

    @classmethod
    def parse(cls, text: str) -> Model:
        """``NAME=FOLDER[,steps=N][,sigmas=1/0.75][,euler|renoise]``; an empty folder: the shipped weights.

        >>> Model.parse("teacher=,steps=2,euler").sigmas
        (1.0, 0.75, 0.0)
        """
        name, _, rest = text.partition("=")
        folder, *options = rest.split(",")
        sigmas, renoise = None, None
        for option in options:
            key, _, value = option.partition("=")
            if key == "steps" and value.isdigit() and int(value) > 0:
                sigmas = flow.shifted_grid(int(value))
            elif key == "sigmas":
                sigmas = (*map(float, value.split("/")), 0.0)
            elif option in ("euler", "renoise"):
                renoise = option == "renoise"
            else:
                raise ConfigError(f"--model takes steps=N, sigmas=A/B, euler or renoise, got {option!r}")
        if not name:
            raise ConfigError(f"--model begins with a name, got {text!r}; write NAME=FOLDER")
        return cls(name, Path(folder) if folder else None, sigmas, renoise)

    def engine(self, *, adaptive_sink: bool | None = None) -> Engine:
        """What makes the parts of a stream, as served."""
        config = presets.portrait()
        if self.sigmas is not None:
            config = dataclasses.replace(config, sigmas=self.sigmas)
        if self.renoise is not None:
            config = dataclasses.replace(config, renoise=self.renoise)
        if adaptive_sink is not None:
            config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, adaptive_sink=adaptive_sink))
        return Engine(config, weights=Weights(folder=self.folder))


# --------------------------------------------------------------------------------------------------- persons and truth


@dataclass(frozen=True, slots=True, eq=False)
class Take:
    """A person who speaks: the photograph, the sound, and what that person really looks like meanwhile."""

    photo_HWC: Tensor
    sound_S: Floats
    frames_THWC: NDArray[np.uint8]
    truth_TE: Floats

    def column(self, name: str) -> Floats:
        return self.truth_TE[:, TRUTH.index(name)]


class Stagehand:
    """Draws persons and their truth, once; keeps them in ``work``.

    ``recordings`` is an archive as ``facegood_audio2rig.npz``, of which the last take is used.
    """

    def __init__(self, head_file: Path, recordings: Path | None, work: Path) -> None:
        self.head = HeadModel.load(head_file)
        self._work = work
        work.mkdir(parents=True, exist_ok=True)
        self._recorded: Floats | None = None
        if recordings is not None:
            try:
                with np.load(recordings, allow_pickle=False) as arrays:
                    last = sorted(name for name in arrays.files if name.startswith("audio_"))[-1]
                    self._recorded = leveled(arrays[last].astype(np.float32) / 32768)
            except (OSError, ValueError, IndexError) as error:
                raise InputError(f"{recordings} is not an archive of recordings: {error}") from error

    def look(self, number: int, member: int = 0) -> Look:
        return Look.draw(np.random.default_rng(rng.seed_of("look", 0, number, member)))

    def people(self, count: int, *, badge: bool = False) -> list[int]:
        """Numbers of persons never seen in training; ``badge``: who wear one."""
        numbers = (n for n in itertools.count(FIRST_NUMBER + 500) if self.look(n).has_badge or not badge)
        return list(itertools.islice(numbers, count))

    def speech(self, number: int, seconds: float, *, take: int = 0) -> Floats:
        """Unseen speech at -26 dBFS: every second person speaks from the recording, the others read new sentences."""
        num_samples = round(seconds * FPS) * FRAME_SAMPLES
        if self._recorded is not None and (number + take) % 2 == 0:
            first = rng.integer(0, len(self._recorded) // RATE_HZ, "judged speech", number, take) * RATE_HZ
            return leveled(np.take(self._recorded, np.arange(first, first + num_samples), mode="wrap"))
        generator = np.random.default_rng(rng.seed_of("judged speech", number, take))
        return Voices().sound(num_samples, generator)

    def opening(self, sound_S: Floats) -> Floats:
        """How far the truth opens its mouth to this sound, cm per frame."""
        return opening_cm(self.head, mouth_weights(articulation(sound_S)))

    def photo(self, number: int) -> Tensor:
        """The person at rest, ``[H, W, 3]``."""
        painter, look, generator = self._person(number)
        score = compose(self.head, np.zeros(12 * FRAME_SAMPLES, np.float32), generator, action="plain", calm=True)
        return torch.from_numpy(painter.dress(painter.body(score.photo), look))

    def take(self, number: int, seconds: float, *, take: int = 0, action: str = "plain") -> Take:
        """This person speaking for so long, from ``work`` if it was drawn before."""
        path = self._work / f"take-{number}-{take}-{action}-{seconds:g}s.safetensors"
        if path.is_file():
            kept = load_file(path)
            return Take(kept["photo"], kept["sound"].numpy(), kept["frames"].numpy(), kept["truth"].numpy())
        sound_S = self.speech(number, seconds, take=take)
        painter, look, _ = self._person(number)
        generator = np.random.default_rng(rng.seed_of("judged motion", number, take, action))
        score = compose(self.head, sound_S, generator, action=action, calm=True)
        frames = np.stack([painter.dress(painter.body(pose), look) for pose in score.poses])
        made = Take(self.photo(number), sound_S, frames, score.truth_TE)
        tensors = {"photo": made.photo_HWC, "sound": torch.from_numpy(sound_S), "frames": torch.from_numpy(frames)}
        partial = path.with_suffix(".partial")
        save_file({**tensors, "truth": torch.from_numpy(score.truth_TE)}, partial)
        partial.replace(path)
        return made

    def _person(self, number: int) -> tuple[Painter, Look, np.random.Generator]:
        generator = np.random.default_rng(rng.seed_of("drawn clip", 0, number))
        build = Build.draw(generator, len(self.head.identity_KV3))
        return Painter(self.head, build, size=128), self.look(number), generator


@torch.inference_mode()
def through_codec(engine: Engine, frames_THWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Frames as the engine's encoder and decoder give them back; the first is shown once more to open the stream."""
    encoder, decoder = engine.encoder(), engine.decoder()
    factor = engine.config.vae.temporal_factor
    opened = torch.from_numpy(np.concatenate([frames_THWC[:1], frames_THWC]))
    state, past, out = None, None, list[NDArray[np.uint8]]()
    for part in (opened[:1], *opened[1:].split(12 * factor)):
        latents, state = encoder.encode(from_rgb8(part[None]), state)
        if latents.shape[2]:
            shown, past = decoder.decode(latents, past)
            out.append(to_rgb8(shown)[0].numpy())
    return np.concatenate(out)[1:]


# ------------------------------------------------------------------------------------------------------------- streams


@dataclass(frozen=True, slots=True, eq=False)
class Film:
    """A finished stream."""

    frames_THWC: NDArray[np.uint8]
    latents_nCTHW: Tensor
    first_s: float
    """From the first sound, with the engine ready, to the first frames."""
    chunk_s: tuple[float, ...]
    """Processor time of every later chunk."""


def film(
    engine: Engine, photo_HWC: Tensor, sound_S: Floats, *, prompts: Mapping[int, str] | None = None, seed: int = 0,
    variant: str = "full",
) -> Film:  # fmt: skip
    """Run a stream to its end, as it is served. ``prompts``: by the chunk that brings them; `PLAIN` until then."""
    config = engine.config
    told = {0: PLAIN, **(prompts or {})}
    texts = {text: engine.encode_prompt(text) for text in set(told.values())}
    schedule = plan(num_steps=config.num_steps, num_ranks=1, refresh_chunk=config.refresh_chunk)
    if variant in ("full", "no-adaptive"):
        stage = engine.stage(schedule.roles[0], seed=seed)
    else:
        decode = engine.stage(Role(rank=0, encodes=False, steps=(), decodes=True), seed=seed)
        stage = Chain([denoiser(engine, variant, seed=seed), decode])
    head = engine.intake(photo_HWC, told[0], seed=seed)

    def packets() -> Iterator[Packet]:
        heard = chunks(
            [torch.from_numpy(sound_S)],
            engine.audio_encoder(),
            frames_per_chunk=config.video_frames_per_chunk,
            fps=config.fps,
        )
        for sound in heard:
            if head.next_chunk in told and head.next_chunk > 0:
                head.switch_prompt(texts[told[head.next_chunk]])
            yield head.packet(sound)

    frames, latents, chunk_s = list[NDArray[np.uint8]](), list[Tensor](), list[float]()
    last_s, wall_s, first_s = time.process_time(), time.perf_counter(), 0.0
    for packet in run_local(schedule, [stage], packets()):
        assert packet.frames_THWC is not None
        first_s = first_s or time.perf_counter() - wall_s
        now_s = time.process_time()
        chunk_s.append(now_s - last_s)
        last_s = now_s
        frames.append(packet.frames_THWC.numpy())
        latents.append(packet.latent_BCTHW[0])
    num_frames = len(sound_S) // FRAME_SAMPLES
    return Film(np.concatenate(frames)[:num_frames], torch.stack(latents), first_s, tuple(chunk_s[1:]))


# ----------------------------------------------------------------------------------------------- variants of the engine


class _NoSink(StepMemory):
    """A history without a sink in front."""

    def turn_sink(self, rotation: Rotation) -> None:
        """There is nothing to turn."""


class SinkEvicted(DenoiseStage):
    """Loses its sink as soon as the window is full."""

    def step(self, packet: Packet) -> Packet:
        if packet.chunk == self._config.memory.window_chunks:
            with torch.inference_mode():
                self._evict()
        return super().step(packet)

    def _evict(self) -> None:
        config, device, options = self._config, self._dit.device, self._weights.options
        dit = config.dit
        for step in self._steps:
            old = step.memory
            nothing = SinkMemory(num_layers=dit.num_layers, num_streams=1, moving_tokens=0, num_heads=dit.num_heads,
                                 head_dim=dit.head_dim, dtype=self._dit.dtype, device=device)  # fmt: skip
            bare = _NoSink(nothing, chunk_tokens=config.chunk_tokens, window_chunks=config.memory.window_chunks,
                           impl=options.resolved(device))  # fmt: skip
            bare.keys_ZBMNK.copy_(old.keys_ZBMNK[:, :, old.sink_tokens :])
            bare.values_ZBMNK.copy_(old.values_ZBMNK[:, :, old.sink_tokens :])
            bare.ring = old.ring
            step.memory = bare
            step.velocity = ServedStep(self._weights, self._dit.modulation(step.sigma), bare, options)


class CleanHistory(DenoiseStage):
    """Remembers finished chunks: one more forward at noise level 0, kept by every step instead of what it saw."""

    _clean_step: ServedStep | None = None

    @torch.inference_mode()
    def step(self, packet: Packet) -> Packet:
        done = super().step(packet)
        memory = self._steps[0].memory
        if self._clean_step is None:
            modulation = self._dit.modulation(0.0)
            self._clean_step = ServedStep(self._weights, modulation, memory, self._weights.options)
        assert self._text is not None
        own = self._own_rotation(packet.chunk * self._config.frames_per_chunk)
        self._clean_step(done.latent_BCTHW, own, self._text, self._hear(packet))
        start = memory.sink_tokens + memory.ring.slot_of(packet.chunk) * memory.chunk_tokens
        rows = slice(start, start + memory.chunk_tokens)
        for other in self._steps[1:]:
            other.memory.keys_ZBMNK[:, :, rows].copy_(memory.keys_ZBMNK[:, :, rows])
            other.memory.values_ZBMNK[:, :, rows].copy_(memory.values_ZBMNK[:, :, rows])
        return done


def denoiser(engine: Engine, variant: str, *, seed: int = 0) -> DenoiseStage:
    """All steps in one stage, in this variant."""
    kinds: dict[str, type[DenoiseStage]] = {"no-sink": SinkEvicted, "clean-history": CleanHistory}
    kind = kinds.get(variant, DenoiseStage)
    return kind(engine.dit(), engine.config, range(engine.config.num_steps), seed=seed, options=engine.options)


def standing_still(packet: Packet, config: EngineConfig) -> Packet:
    """The same packet with the sink where it was at the beginning: absolute positions."""
    first_frame = packet.chunk * config.frames_per_chunk
    return dataclasses.replace(packet, lead=config.memory.sink_position - first_frame)


# ------------------------------------------------------------------------------------------------------------- quality


@dataclass(slots=True)
class Crowd:
    """Features of all persons' frames, for distances between crowds."""

    frames: list[Array] = field(default_factory=list[Array])
    windows: list[Array] = field(default_factory=list[Array])

    def add(self, reading: Reading) -> None:
        self.frames.append(reading.features_NF.numpy())
        self.windows.append(windows(reading.truth_NE.numpy() / np.array(TRUTH_SPREAD)))

    def apart(self, other: Crowd) -> tuple[float, float]:
        pairs = ((self.frames, other.frames), (self.windows, other.windows))
        near, moving = (frechet(np.concatenate(a), np.concatenate(b)) for a, b in pairs)
        return near, moving


def loudness(sound_S: Floats) -> Floats:
    """Decibels per frame, from -60."""
    power = (sound_S[: len(sound_S) // FRAME_SAMPLES * FRAME_SAMPLES].reshape(-1, FRAME_SAMPLES) ** 2).mean(1)
    return np.maximum(10 * np.log10(power + 1e-9), -60.0).astype(np.float32)


def identity_distance(reading: Reading, photo: Reading, *, width: int = 12) -> Array:
    """How far from the photograph each stretch of ``width`` frames is, in spreads over people."""
    count = len(reading.identity_NE) // width
    mean_NE = reading.identity_NE[: count * width].unflatten(0, (count, width)).mean(1)
    return (mean_NE - photo.identity_NE).square().mean(1).sqrt().numpy()


def judge(frames_THWC: NDArray[np.uint8], take: Take, probe: Probe, *, period: int) -> tuple[dict[str, float], Reading]:
    """All that can be said of one person's film."""
    reading = probe.read(torch.from_numpy(frames_THWC))
    photo = probe.read(take.photo_HWC[None])
    seen = reading.column("opening_cm").numpy()
    expected = take.column("opening_cm")[: len(seen)]
    sync = synchrony(seen, expected)
    loud = synchrony(seen, loudness(take.sound_S)[: len(seen)])
    look = picture(frames_THWC, period=period)
    colour = np.abs(coarse(frames_THWC) - coarse(take.photo_HWC[None].numpy())).mean()
    return {
        "sync": sync.at_zero,
        "lag": float(sync.lag),
        "sync_best": sync.best,
        "loudness": loud.at_zero,
        "opening": float(seen.std() / max(expected.std(), 1e-6)),
        "colour": float(colour),
        "identity": float(identity_distance(reading, photo).mean()),
        **dataclasses.asdict(look),
    }, reading


_COLUMNS = ("row", "sync", "lag", "loudness", "opening", "colour", "identity", "seam", "jitter", "flicker",
            "sharpness", "apart", "apart_windows", "cpu_s_per_s", "first_s")  # fmt: skip


def quality(args: argparse.Namespace, hand: Stagehand, probe: Probe, models: Sequence[Model]) -> list[dict[str, Any]]:
    """The table: truth, truth through the codec, and every model; contact sheet on the way."""
    numbers = hand.people(args.identities)
    takes = [hand.take(n, args.seconds) for n in numbers]
    others = Crowd()
    for n in numbers:
        others.add(probe.read(torch.from_numpy(hand.take(n, args.seconds / 2, take=1).frames_THWC)))
    rows: list[dict[str, Any]] = []
    period = presets.portrait().video_frames_per_chunk

    def add(name: str, films: Sequence[NDArray[np.uint8]], **more: Any) -> None:
        crowd, found = Crowd(), list[dict[str, float]]()
        for frames, take in zip(films, takes, strict=True):
            facts, reading = judge(frames, take, probe, period=period)
            found.append(facts)
            crowd.add(reading)
        row: dict[str, Any] = {"row": name}
        for key in found[0]:
            mean, low, high = interval([f[key] for f in found])
            row |= {key: mean, f"{key}_low": low, f"{key}_high": high, f"{key}_each": [round(f[key], 4) for f in found]}
        row["lag"] = float(np.median([f["lag"] for f in found]))
        row["apart"], row["apart_windows"] = crowd.apart(others)
        rows.append(row | more)
        show([rows[-1]], columns=_COLUMNS)
        sys.stdout.flush()

    add("truth", [t.frames_THWC for t in takes])
    coded = models[0].engine()
    add("truth through codec", [through_codec(coded, t.frames_THWC) for t in takes])
    for position, model in enumerate(models):
        engine = model.engine()
        films = [film(engine, t.photo_HWC, t.sound_S, seed=args.seed) for t in takes]
        speed = {
            "steps": engine.config.num_steps,
            "cpu_s_per_s": float(np.median([percentile(f.chunk_s, 50) for f in films])) / engine.config.chunk_s,
            "first_s": percentile([f.first_s for f in films], 50),
        }
        add(model.name, [f.frames_THWC for f in films], **speed)
        if position == 0:
            sheet([f.frames_THWC for f in films[:4]], takes[:4], args.out / "pictures" / "portrait.png")
            _sync_plot(films[0].frames_THWC, takes[0], probe, args.out / "pictures" / "sync.png")
    return rows


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


# ------------------------------------------------------------------------------------------------- prompts and objects


_MOVED: Mapping[str, Callable[[Reading], Array]] = {
    "nod": lambda r: rolling(r.column("pitch").numpy(), 25, spread=True),
    "shake": lambda r: rolling(r.column("yaw").numpy(), 25, spread=True),
    "smile": lambda r: rolling(r.column("smile").numpy(), 3),
    "aside": lambda r: rolling(np.abs(r.column("yaw").numpy()), 5),
    "hand": lambda r: rolling(r.column("hand").numpy(), 3),
}
_BEFORE_CHUNKS, _ACTION_CHUNKS = 8, 14
_OBEYED = 0.3
"""Share of the truth's way that counts as an answer."""


def prompt_responses(args: argparse.Namespace, hand: Stagehand, probe: Probe, model: Model) -> list[dict[str, Any]]:
    """One stream per person: plain, an action, plain, the next action, and so on."""
    engine = model.engine()
    period = engine.config.video_frames_per_chunk
    found: dict[str, list[tuple[int | None, float]]] = {name: [] for name in (*_MOVED, "plain")}
    goal: dict[str, list[float]] = {name: [] for name in _MOVED}
    turn = _BEFORE_CHUNKS + _ACTION_CHUNKS
    for number in hand.people(args.identities):
        length_s = (turn * len(_MOVED) + _BEFORE_CHUNKS) * engine.config.chunk_s
        sound_S = hand.speech(number, length_s, take=2)
        prompts: dict[int, str] = {}
        for k, name in enumerate(_MOVED):
            prompts[k * turn + _BEFORE_CHUNKS] = PROMPTS[name][0]
            prompts[(k + 1) * turn] = PLAIN
        reading = probe.read(torch.from_numpy(film(engine, hand.photo(number), sound_S, prompts=prompts).frames_THWC))
        for k, (name, track) in enumerate(_MOVED.items()):
            start, switch = k * turn * period, (k * turn + _BEFORE_CHUNKS) * period
            stop = (k + 1) * turn * period
            values = track(reading)
            # Half a window of a rolling spread looks ahead of its frame; both ends are cut where they would see over.
            found[name].append(response(values[start + 36 : stop], switch - start - 36, before=48, steady=72))
            truth = hand.take(number, 4.0, take=3, action=name)
            calm = hand.take(number, 4.0, take=3)
            read = [track(probe.read(torch.from_numpy(t.frames_THWC))) for t in (truth, calm)]
            goal[name].append(float(read[0][12:-12].mean() - read[1][12:-12].mean()))
            way = found[name][-1][1]
            if way / goal[name][-1] > _OBEYED:
                frames, back = response(values[switch + 72 : stop + 84], stop - switch - 72, before=48, steady=36)
                found["plain"].append((frames, -back / way))
    rows: list[dict[str, Any]] = []
    for name, answers in found.items():
        full = float(np.mean(goal[name])) if name in goal else 1.0
        shares = [way / full for _, way in answers]
        times = [t for (t, _), share in zip(answers, shares, strict=True) if t is not None and share > _OBEYED]
        rows.append({
            "prompt": name,
            "frames": float(np.median(times)) if times else None,
            "frames_low": min(times, default=None),
            "frames_high": max(times, default=None),
            "obeyed": f"{len(times)} of {len(answers)}",
            "share_of_truth": float(np.mean(shares)) if shares else None,
        })  # fmt: skip
    return rows


def object_recovery(args: argparse.Namespace, hand: Stagehand, probe: Probe, model: Model) -> list[dict[str, Any]]:
    """A badge is hidden by the raised hand for L seconds; is it the same afterwards?"""
    rows: list[dict[str, Any]] = []
    numbers = hand.people(args.identities, badge=True)
    photos = {n: hand.photo(n) for n in numbers}
    box = badge_box(128)
    for variant in ("full", "no-sink"):
        engine = model.engine()
        chunk_s = engine.config.chunk_s
        for hidden_s in (0, 1, 3, 10):
            up = _BEFORE_CHUNKS, _BEFORE_CHUNKS + (2 + math.ceil(hidden_s / chunk_s) if hidden_s else 0)
            total = up[1] + 12
            changes, covered, present = list[float](), list[float](), list[float]()
            for number in numbers:
                sound_S = hand.speech(number, total * chunk_s, take=4)
                prompts = {up[0]: PROMPTS["hand"][0], up[1]: PLAIN} if hidden_s else {}
                made = film(engine, photos[number], sound_S, prompts=prompts, variant=variant)
                place = made.frames_THWC[:, box[0], box[1]].mean((1, 2), dtype=np.float64) / 255
                first, last = up[0] * 12, up[1] * 12
                before, after = place[first - 48 : first].mean(0), place[-48:].mean(0)
                changes.append(float(np.abs(after - before).mean()))
                if hidden_s:
                    covered.append(float(np.abs(place[last - 12 : last].mean(0) - before).mean()))
                reading = probe.read(torch.from_numpy(made.frames_THWC[-48:]))
                present.append(float((reading.column("badge") > 0.5).float().mean()))
            mean, low, high = interval(changes)
            rows.append({
                "variant": variant,
                "hidden_s": hidden_s, "persons": len(numbers),
                "colour_change": mean,
                "low": low,
                "high": high,
                "change_while_hidden": float(np.mean(covered)) if covered else None,
                "badge_there_after": float(np.mean(present)),
            })  # fmt: skip
    return rows


# ----------------------------------------------------------------------------------------------------------- long runs


def resident_mib() -> float:
    """Memory of this process."""
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
        due = [s for s in _SHOWN_AT_S if s <= end_s and s not in self.shown]
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
    """Slopes with intervals, levels at both ends, crossings, memory; the first ``settled_s`` do not count."""
    out: dict[str, Any] = {"seconds": len(run.means) * run.config.chunk_s, "chunks": len(run.means)}
    for name, (at_s, value) in run.tracks().items():
        keep = at_s > settled_s
        at_s, value = at_s[keep], value[keep]
        if name in _SLOPES and len(value) >= 8:
            line = slope(at_s, value, block_s=_BLOCK_S)
            out[f"{name}_slope"] = line.per_1000_s
            out[f"{name}_slope_low"], out[f"{name}_slope_high"] = line.low, line.high
            out[f"{name}_slope_holds_0"] = line.holds_zero
        if len(value) >= 4:
            tenth = max(2, len(value) // 10)
            out[f"{name}_first"], out[f"{name}_last"] = float(value[:tenth].mean()), float(value[-tenth:].mean())
            out[f"{name}_mean"] = float(value.mean())
        if name in limits:
            out[f"{name}_limit"] = limits[name]
            out[f"{name}_crossing_s"] = first_crossing(at_s, value, limits[name])
    resident = [look["resident_mib"] for look in run.looks if look["s"] > settled_s]
    if resident:
        out["resident_mib"] = resident[-1]
        # Medians of the second and the last quarter: decoding a stretch to look at takes memory, and gives it back.
        quarter = max(1, len(resident) // 4)
        early, late = resident[quarter : 2 * quarter] or resident[:1], resident[-quarter:]
        out["resident_growth_mib"] = float(np.median(late) - np.median(early))
    return out


def long_run(
    engine: Engine, variant: str, *, photo_HWC: Tensor, loop_S: Floats, opening_T: Floats, probe: Probe, seconds: float,
    seed: int = 0, note: Callable[[LongRun, float], None] | None = None,
) -> LongRun:  # fmt: skip
    """A stream of ``seconds`` in this variant; ``note`` is told every 500 chunks, and at the end."""
    config = engine.config
    stage = denoiser(engine, variant, seed=seed)
    head = engine.intake(photo_HWC, PLAIN, seed=seed)
    num_chunks = math.ceil(seconds / config.chunk_s)
    heard = chunks(
        itertools.repeat(torch.from_numpy(loop_S)),
        engine.audio_encoder(),
        frames_per_chunk=config.video_frames_per_chunk,
        fps=config.fps,
    )
    packets = head.packets(itertools.islice(heard, num_chunks))
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


def distances_between_people(hand: Stagehand, probe: Probe, *, count: int = 8) -> dict[str, float]:
    """Half the mean distance between photographs of two persons: beyond that, it is somebody else."""
    photos = torch.stack([hand.photo(n) for n in hand.people(count)])
    who_NE = probe.read(photos).identity_NE
    colours = coarse(photos.numpy())
    pairs = list(itertools.combinations(range(count), 2))
    identity = float(np.mean([(who_NE[a] - who_NE[b]).square().mean().sqrt() for a, b in pairs]))
    colour = float(np.mean([np.abs(colours[a] - colours[b]).mean() for a, b in pairs]))
    return {"identity": identity / 2, "colour": colour / 2}


def run_long(args: argparse.Namespace, hand: Stagehand, probe: Probe, model: Model) -> None:
    """A long run, its result on disk every 500 chunks."""
    engine = model.engine(adaptive_sink=False if args.variant == "no-adaptive" else None)
    limits = distances_between_people(hand, probe)
    number = hand.people(1)[0]
    loop_S = np.concatenate([hand.speech(number, 48.0, take=t) for t in (0, 1)])
    path = args.out / f"evaluate-long-{args.variant}.json"
    started_s = time.perf_counter()

    def note(run: LongRun, cpu_s: float) -> None:
        facts = summary(run, limits)
        curves = {
            name: [[round(float(s), 1), round(float(v), 5)] for s, v in zip(*track, strict=True)][:: _stride(track[0])]
            for name, track in run.tracks().items()
        }
        result = {
            "bench": f"evaluate-long-{args.variant}",
            "card": machine_card(torch.device("cpu")),
            "asked_s": args.long,
            "weights": str(model.name),
            "cpu_s": cpu_s,
            "wall_s": time.perf_counter() - started_s,
            "rows": [{"variant": args.variant, **facts}],
            "curves": curves,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result) + "\n")
        partial.replace(path)
        shown = {f"{s:g}": torch.from_numpy(frame) for s, frame in run.shown.items()}
        save_file(shown, args.work / f"shown-{args.variant}.safetensors")
        sys.stderr.write(f"{args.variant}: {facts['seconds']:.0f} s of video in {cpu_s:.0f} s of processor time\n")

    long_run(engine, args.variant, photo_HWC=hand.photo(number), loop_S=loop_S, opening_T=hand.opening(loop_S),
             probe=probe, seconds=args.long, seed=args.seed, note=note)  # fmt: skip
    result = json.loads(path.read_text())
    columns = ("variant", "seconds", "colour_mean", "colour_slope", "colour_slope_low", "colour_slope_high",
               "identity_mean", "identity_slope", "identity_slope_low", "identity_slope_high", "sync_mean")  # fmt: skip
    facts = {k: v for k, v in result.items() if k not in ("bench", "card", "rows")}
    title = f"{args.long:g} s, {args.variant}"
    report(result["bench"], title, result["rows"], result["card"], columns=columns, **facts)


def _stride(values: Array, *, most: int = 250) -> int:
    return max(1, math.ceil(len(values) / most))


def draw_long(out: Path, work: Path) -> list[dict[str, Any]]:
    """All long runs that are there in one picture, and what their frames look like over time."""
    found = {v: json.loads(path.read_text()) for v in VARIANTS if (path := out / f"evaluate-long-{v}.json").is_file()}
    if not found:
        raise InputError(f"there are no long runs in {out}; make one with --long 1000 --variant full")
    limits = next(iter(found.values()))["rows"][0]
    titles = {
        "colour": "colours: distance to the photograph (dotted: half-way to another person)",
        "identity": "identity: distance to the photograph (dotted: half-way to another person)",
        "latent_shift": "mean of latents: shift against the first 48 s, in spreads",
        "latent_spread": "spread of latents against the first 48 s, log",
        "sync": "sync with speech, correlation at lag 0",
    }
    panels = [
        Panel(
            title,
            {v: [tuple(p) for p in r["curves"][name]] for v, r in found.items()},
            mark=limits.get(f"{name}_limit"),
            low=None if name == "latent_spread" else 0.0,
        )
        for name, title in titles.items()
    ]
    pictures = out / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    draw_panels(panels, pictures / "long.png", unit="seconds of video")
    strips = {v: load_file(p) for v in found if (p := work / f"shown-{v}.safetensors").is_file()}
    if strips:
        size, gap = 96, 3
        canvas = Image.new("RGB", (len(_SHOWN_AT_S) * (size + gap), len(strips) * (size + gap)), (255, 255, 255))
        for row, frames in enumerate(strips.values()):
            for column, s in enumerate(_SHOWN_AT_S):
                if f"{s:g}" in frames:
                    tile = Image.fromarray(frames[f"{s:g}"].numpy()).resize((size, size), Image.Resampling.LANCZOS)
                    canvas.paste(tile, (column * (size + gap), row * (size + gap)))
        small_png(canvas, pictures / "long-frames.png", limit_bytes=200_000)
    return [result["rows"][0] for result in found.values()]


# --------------------------------------------------------------------------------------------------------- the command


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--head", type=Path, metavar="FILE", help="ict_facekit.npz, the 3D head of the drawn persons")
    add("--speech", type=Path, metavar="FILE", help="facegood_audio2rig.npz; without it all speech is synthetic")
    add("--model", action="append", type=Model.parse, metavar="NAME=FOLDER[,steps=N][,sigmas=A/B][,euler|renoise]",
        help="a row of the table; the first is judged in full (default: the shipped weights)")  # fmt: skip
    add("--probe", type=Path, metavar="FILE", help="weights of the reading network (default: the shipped ones)")
    add("--identities", type=int, default=4, help="how many persons (default: %(default)s)")
    add("--seconds", type=float, default=60.0, help="speech of each person (default: %(default)s)")
    add("--only", default="quality,prompts,objects", metavar="PARTS",
        help="parts to run; rows and parts that are not run stay in the result (default: %(default)s)")  # fmt: skip
    add("--long", type=float, metavar="SECONDS", help="one long run instead")
    add("--variant", choices=VARIANTS, default="full", help="of the long run")
    add("--draw", action="store_true", help="draw the long runs that are there")
    add("--seed", type=int, default=0)
    add("--work", type=Path, default=Path("out/evaluate"), metavar="DIR",
        help="keeps drawn persons (default: %(default)s)")  # fmt: skip
    add("--out", type=Path, default=RESULTS, metavar="DIR", help="where results go (default: perf/results)")
    return parser


def main() -> int:
    args = arguments().parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.draw:
        columns = ("variant", "seconds", "colour_mean", "colour_slope", "identity_mean", "identity_slope", "sync_mean")
        report("evaluate-long", "Long runs", draw_long(args.out, args.work), machine_card(torch.device("cpu")),
               columns=columns)  # fmt: skip
        return 0
    if args.head is None:
        raise ConfigError("--head is needed to draw persons; give ict_facekit.npz")
    hand = Stagehand(args.head, args.speech, args.work)
    probe = load_probe(args.probe) if args.probe is not None else load_probe()
    models = args.model or [Model("portrait")]
    if args.long is not None:
        run_long(args, hand, probe, models[0])
        return 0
    parts = args.only.split(",")
    known = ("quality", "prompts", "objects")
    if unknown := set(parts) - set(known):
        raise ConfigError(f"--only takes {', '.join(known)}, got {', '.join(sorted(unknown))}")
    path = args.out / "evaluate.json"
    known_before: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    asked: dict[str, Any] = {"seconds": args.seconds, "identities": args.identities, "seed": args.seed}
    facts = asked if "quality" in parts else {name: known_before.get(name, asked[name]) for name in asked}
    card = machine_card(torch.device("cpu"))
    rows = quality(args, hand, probe, models) if "quality" in parts else []
    rows = [row | {"commit": card["commit"]} for row in rows]
    fresh = {row["row"] for row in rows}
    # What was not judged anew stays: rows by their name, parts whole.
    rows += [row for row in known_before.get("rows", []) if row["row"] not in fresh]
    if "prompts" in parts:
        facts["prompts"] = prompt_responses(args, hand, probe, models[0])
    if "objects" in parts:
        facts["objects"] = object_recovery(args, hand, probe, models[0])
    for part in ("prompts", "objects"):
        facts.setdefault(part, known_before.get(part, []))
        if facts[part]:
            show(facts[part])
    title = f"{args.identities} unseen persons, {args.seconds:g} s of unseen speech each"
    report("evaluate", title, rows, card, columns=_COLUMNS, save=path, **facts)
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except (ConfigError, InputError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        raise SystemExit(2) from error
