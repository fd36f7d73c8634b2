"""Sound files and films made for the tests, and what a player makes of a film."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from streamdiff.media import VideoWriter

CODECS = {".wav": "pcm_s16le", ".flac": "flac", ".mp3": "libmp3lame", ".ogg": "libopus", ".m4a": "aac"}


def write_sound(
    path: Path,
    samples_NS: npt.NDArray[np.float32],
    rate_hz: int,
    *,
    codec: str | None = None,
    layout: str = "mono",
) -> Path:
    """Encode channels x samples with FFmpeg; the codec follows the suffix unless it is named."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec or CODECS[path.suffix], rate=rate_hz, layout=layout)
        assert isinstance(stream, av.AudioStream)
        interleaved = np.ascontiguousarray(samples_NS.T).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(interleaved, format="flt", layout=layout)
        frame.sample_rate = rate_hz
        frame.time_base = Fraction(1, rate_hz)
        frame.pts = 0
        resampler = av.AudioResampler(format=stream.codec_context.format, layout=layout, rate=rate_hz, frame_size=None)
        for converted in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(converted))
        container.mux(stream.encode(None))
    return path


def tone(seconds: float, rate_hz: int, *, hz: float = 440.0, channels: int = 1) -> npt.NDArray[np.float32]:
    """The same sine on every channel."""
    time_s = np.arange(int(seconds * rate_hz)) / rate_hz
    return np.repeat(0.5 * np.sin(2 * np.pi * hz * time_s)[None], channels, axis=0).astype(np.float32)


@dataclass(frozen=True)
class Played:
    """A film as a player decodes it."""

    luma_T: list[float]
    sound_S: npt.NDArray[np.float32]
    sound_ends_s: float
    """Where the last audio packet ends on the clock of the film, priming not counted."""
    metadata: dict[str, str]
    sizes: set[tuple[int, int]]
    frame_times_s: list[float]


def play(path: Path) -> Played:
    """Decode everything; a damaged file raises."""
    with av.open(str(path)) as container:
        metadata = dict(container.metadata)
        frames = list(container.decode(video=0))
    sound = [np.zeros(0, np.float32)]
    ends_s = 0.0
    with av.open(str(path)) as container:
        if container.streams.audio:
            sound += [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
    with av.open(str(path)) as container:
        for packet in container.demux(audio=0) if container.streams.audio else ():
            if packet.pts is not None and packet.duration:
                ends_s = float((packet.pts + packet.duration) * packet.time_base)
    return Played(
        luma_T=[float(frame.to_ndarray(format="gray").mean()) for frame in frames],
        sound_S=np.concatenate(sound),
        sound_ends_s=ends_s,
        metadata=metadata,
        sizes={(frame.width, frame.height) for frame in frames},
        frame_times_s=[float(frame.time or 0.0) for frame in frames],
    )


def write_film(
    path: Path,
    *,
    num_chunks: int,
    fps: int = 25,
    rate_hz: int = 16_000,
    frames_per_chunk: int = 12,
    size_hw: tuple[int, int] = (64, 96),
    flash_frame: int | None = None,
) -> None:
    """A dark silent film; at ``flash_frame`` one white frame begins together with a click."""
    height, width = size_hw
    with VideoWriter(path, width=width, height=height, fps=fps, rate_hz=rate_hz) as writer:
        for chunk in range(num_chunks):
            frames_THWC, sound_S = film_chunk(writer, chunk, frames_per_chunk, size_hw, fps, rate_hz, flash_frame)
            writer.write(frames_THWC, sound_S)


def film_chunk(
    writer: VideoWriter,
    chunk: int,
    num_frames: int,
    size_hw: tuple[int, int],
    fps: int,
    rate_hz: int,
    flash_frame: int | None,
) -> tuple[Tensor, Tensor]:
    first = chunk * num_frames
    frames_THWC = torch.full((num_frames, *size_hw, 3), 16, dtype=torch.uint8)
    sound_S = torch.zeros(writer.samples_due(num_frames))
    if flash_frame is not None and first <= flash_frame < first + num_frames:
        frames_THWC[flash_frame - first] = 255
        click = flash_frame * rate_hz // fps - first * rate_hz // fps
        sound_S[click : click + rate_hz // 500] = 0.9
    return frames_THWC, sound_S
