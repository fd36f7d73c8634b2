"""The main job: a photo, a voice and a prompt in, a talking video out; on one process, or on as many as torchrun has.

Every rank runs this module with the same `Job`. What can be wrong with it is found on every rank before any of them
waits for another; then each builds its own part, and frames leave the last rank as they are decoded.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from streamdiff import signals
from streamdiff.checkpoint import check_dit
from streamdiff.config import EngineConfig
from streamdiff.engine import SPEECH_FOLDER, Engine, Weights
from streamdiff.errors import CheckpointError, ConfigError, InputError
from streamdiff.estimate import available_bytes, predicted_costs, role_bytes
from streamdiff.media import VideoWriter, audio_duration_s, read_audio, read_image
from streamdiff.models.audio import SPEECH_HZ, AudioChunk, chunks
from streamdiff.models.served.options import StepOptions
from streamdiff.models.text import UMT5_FILE, UMT5_TOKENIZER
from streamdiff.output import refuse_overwriting
from streamdiff.pipeline.delivery import Delivery
from streamdiff.pipeline.group import Group, World
from streamdiff.pipeline.packet import Packet
from streamdiff.pipeline.run import run_local, run_rank
from streamdiff.pipeline.schedule import QUEUE_DEPTH, Schedule, plan
from streamdiff.pipeline.watch import Limits
from streamdiff.trace import Observer

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Told after every chunk: video frames written so far, and how many there will be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One video to make."""

    config: EngineConfig
    image: Path
    audio: Path
    out: Path
    prompt: str
    weights: Weights = field(default_factory=Weights)
    seconds: float | None = None
    """Length of the video; None: as long as the voice. A longer video ends in silence."""
    seed: int = 0
    partition: tuple[int, ...] | None = None
    """Denoising steps of each DiT rank; None: the shortest longest rank."""
    decode_alone: bool | None = None
    """Whether decoding has a rank of its own; None: whatever is faster."""
    device: str = "cpu"
    options: StepOptions = field(default_factory=StepOptions)
    """How steps are computed."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.seconds is not None and not 0 < self.seconds < float("inf"):
            raise ConfigError(
                f"--seconds must be a positive number, got {self.seconds}; leave it out for the whole voice"
            )
        if self.config.dit.audio is None:
            raise ConfigError(f"preset {self.config.name} does not listen; choose one that does, such as portrait")


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a finished job can say of itself; on the rank that wrote the video."""

    path: Path
    num_frames: int
    duration_s: float
    first_frame_s: float
    """From the start of the stream, models loaded, to the first written chunk."""
    wall_s: float
    """From the start of the stream to its end."""

    @property
    def fps(self) -> float:
        return self.num_frames / self.wall_s if self.wall_s else 0.0


def engine_for(job: Job, *, plan_only: bool = False) -> Engine:
    """What makes this rank's parts; holds nothing large. Raises ConfigError for weights that do not fit the job."""
    return Engine(job.config, weights=job.weights, device=job.device, options=job.options, plan_only=plan_only)


def schedule_for(job: Job, num_ranks: int) -> Schedule:
    """Who owns which step; the same on every rank, since it is arithmetic on the job."""
    return plan(
        num_steps=job.config.num_steps,
        num_ranks=num_ranks,
        partition=job.partition,
        decode_alone=job.decode_alone,
        costs=predicted_costs(job.config),
        refresh_chunk=job.config.refresh_chunk,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A job in which nothing wrong was found, and what it will be made with."""

    job: Job
    engine: Engine
    schedule: Schedule
    num_frames: int


def prepare(job: Job, num_ranks: int = 1) -> Prepared:
    """Check the job on every rank alike, before anything is loaded; raises what `check` raises."""
    engine, schedule = engine_for(job), schedule_for(job, num_ranks)
    return Prepared(job, engine, schedule, check(job, schedule, engine))


def check(job: Job, schedule: Schedule, engine: Engine) -> int:
    """Find what is wrong with the job before anything is loaded; the number of video frames it will make.

    Looks at every rank's part, so that each rank finds the same fault and none is left waiting for another.
    """
    _check_files(job)
    next(read_audio(job.audio))
    weights = engine.weights
    if weights.folder is not None:
        check_dit(job.config.dit, weights.folder, lora=weights.lora)
    for path in (*_files_of(engine), *([weights.light_decoder] if weights.light_decoder else [])):
        if not path.exists():
            raise CheckpointError(f"there is no {path}; check the path, or download it again")
    need = {
        role: role_bytes(
            job.config, role, device=job.device, from_folder=engine.encoder_folder is not None, options=job.options
        )
        for role in schedule.roles
    }
    have = available_bytes(job.device)
    job.options.check(job.config.dit, engine.device, engine.dtype)
    # Ranks on CPUs share the memory of their machine; each GPU has its own.
    largest = max(need, key=lambda role: need[role])
    together = sum(need.values()) if job.device == "cpu" else need[largest]
    if have is not None and together > have:
        who = "all ranks together" if job.device == "cpu" else f"rank {largest.rank} ({largest})"
        raise ConfigError(
            f"{who} need {together / 2**30:.1f} GiB but {job.device} has {have / 2**30:.1f} GiB free; "
            "use a smaller size, fewer steps, or other ranks"
        )
    seconds = audio_duration_s(job.audio) if job.seconds is None else job.seconds
    return max(1, round(seconds * job.config.fps))


def _check_files(job: Job) -> None:
    if job.out.suffix.lower() != ".mp4":
        raise InputError(f"--out must end in .mp4, got {job.out.name}; other containers are not written")
    read_image(job.image, job.config.height, job.config.width)
    refuse_overwriting(job.out, (job.image, job.audio))
    if not job.out.parent.is_dir():
        raise InputError(f"there is no folder {job.out.parent} for {job.out.name}; make it first")


def _files_of(engine: Engine) -> list[Path]:
    """What the folder of weights must hold besides the DiT."""
    folder = engine.encoder_folder
    if folder is None:
        return []
    names = ("Wan2.1_VAE.pth", UMT5_FILE, UMT5_TOKENIZER, SPEECH_FOLDER)
    return [folder / name for name in names]


def generate(
    job: Job | Prepared,
    world: World | None = None,
    *,
    progress: Progress | None = None,
    observer: Observer | None = None,
) -> Made | None:
    """Make the video; returns what was made on the rank that wrote it, None on the others.

    Raises InputError and ConfigError for what is wrong with the job, RankFailed when another rank is lost; the video so
    far is whole in either case.
    """
    num_ranks = 1 if world is None else world.size
    prepared = job if isinstance(job, Prepared) else prepare(job, num_ranks)
    job, engine, schedule, num_frames = prepared.job, prepared.engine, prepared.schedule, prepared.num_frames
    role = schedule.roles[0 if world is None else world.rank]
    if world is None or num_ranks == 1:
        stage = engine.stage(role, seed=job.seed, observer=observer)
        source = _source(job, engine, num_frames)
        with _Film(job, num_frames, progress) as film:
            for packet in run_local(schedule, [stage], source, observers=[observer] if observer else None):
                film.show(packet)
        return film.made()
    payload = "nccl" if engine.device.type == "cuda" else "gloo"
    with Group(world, schedule, limits=job.limits, device=engine.device, payload=payload) as group:
        stage = engine.stage(role, seed=job.seed, observer=observer)
        source = _source(job, engine, num_frames) if role.encodes else None
        if not role.decodes:
            run_rank(stage, group.link(source=source), observer)
            return None
        with _Film(job, num_frames, progress) as film:
            link = group.link(source=source, deliver=film.show)
            film.start()
            run_rank(stage, link, observer)
        return film.made()


def _source(job: Job, engine: Engine, num_frames: int) -> Iterator[Packet]:
    """Packets for every chunk of the voice; the encoders are loaded here, on the head alone."""
    config = job.config
    image_HWC = read_image(job.image, config.height, config.width)
    head = engine.intake(image_HWC, job.prompt, seed=job.seed)
    encoder = engine.audio_encoder()
    num_chunks = -(-num_frames // config.video_frames_per_chunk)
    voice = itertools.chain(read_audio(job.audio, encoder.rate_hz), _silence(encoder.rate_hz))
    heard: Iterator[AudioChunk] = chunks(voice, encoder, frames_per_chunk=config.video_frames_per_chunk, fps=config.fps)
    return head.packets(itertools.islice(heard, num_chunks))


def _silence(rate_hz: int) -> Iterator[Tensor]:
    while True:
        yield torch.zeros(rate_hz)


class _Film:
    """The end of the line: frames and their sound go to the file as they come, the rest of the last chunk is cut.

    Frames are encoded while the next ones are made, in a thread.
    """

    def __init__(self, job: Job, num_frames: int, progress: Progress | None) -> None:
        self._job = job
        self._num_frames = num_frames
        self._progress = progress
        self._first_frame_s: float | None = None
        self._start_s = time.monotonic()
        self._end_s = self._start_s
        self._writer = VideoWriter(
            job.out,
            width=job.config.width,
            height=job.config.height,
            fps=job.config.fps,
            rate_hz=SPEECH_HZ,
            metadata={"title": job.prompt},
        )
        self._delivery = Delivery(self._write, depth=QUEUE_DEPTH, patience_s=job.limits.outside_s)

    def start(self) -> None:
        """The line is ready: count time from here."""
        self._start_s = time.monotonic()

    def show(self, packet: Packet) -> None:
        """Leave a chunk to the file; raises what went wrong with one before it."""
        self._delivery.put(packet)

    def _write(self, packet: Packet) -> None:
        assert packet.frames_THWC is not None
        assert packet.sound_S is not None
        frames_THWC = packet.frames_THWC[: self._num_frames - self._writer.num_frames]
        if len(frames_THWC):
            self._writer.write(frames_THWC, packet.sound_S[: self._writer.samples_due(len(frames_THWC))])
        self._end_s = time.monotonic()
        if self._first_frame_s is None:
            self._first_frame_s = self._end_s - self._start_s
        if self._progress is not None:
            self._progress(self._writer.num_frames, self._num_frames)

    def made(self) -> Made:
        return Made(
            path=self._job.out,
            num_frames=self._writer.num_frames,
            duration_s=self._writer.duration_s,
            first_frame_s=self._first_frame_s or 0.0,
            wall_s=self._end_s - self._start_s,
        )

    def __enter__(self) -> _Film:
        self._delivery.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with signals.shielded():
            try:
                self._delivery.__exit__(kind, error, trace)
            except BaseException as failed:
                error = error or failed
                raise
            finally:
                if self._delivery.is_over:  # a file that somebody still writes to cannot be closed
                    self._writer.__exit__(None if error is None else type(error), error, trace)
