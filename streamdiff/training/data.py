"""Video with sound to learn from: talking heads drawn with known truth, and clips of real people, by one interface.

    python -m streamdiff train data --head ict_facekit.npz --out faces
    python -m streamdiff train data --video anna.mp4 ben.mp4 --out faces

`DrawnClips` makes clip ``i`` from ``(seed, i)`` alone, in any order and on any machine: a head (`faces.Painter`), a
voice (hibari-tts, or recordings that are given), a mouth that follows the voice, and an action that a prompt names.
`RecordedClips` reads files of video with sound. Both give `Clip`; `write_shards` puts them on disk, `Shards` reads
them.

The mouth follows the sound by a rule, not by a person: `articulation` opens it by loudness between 0.1 and 3 kHz,
rounds it where the spectrum is low and draws it wide over hisses. Who learns from it can be judged exactly, on any
voice; that real lips do more is known.

Axes: T frames, H height, W width, S samples at 16 kHz, E columns of truth, N clips.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from streamdiff import rng
from streamdiff.arrays import Floats
from streamdiff.avatar.head3d import HeadModel
from streamdiff.errors import ConfigError, InputError
from streamdiff.media.sound import read_audio
from streamdiff.training.faces import Build, Look, Painter, Picture, Pose

logger = logging.getLogger(__name__)

FPS = 25
RATE_HZ = 16_000
FRAME_SAMPLES = RATE_HZ // FPS
NUM_FRAMES = 97
"""One frame for the codec to begin with, and 24 latent frames of four."""

TRUTH = ("opening_cm", "round", "blink", "pitch", "yaw", "roll", "gaze_x", "gaze_y", "smile", "hand", "badge")
"""Columns of truth: distance of the inner lips on the mean head; shapes and gaze as shares; angles in radians; how far
the hand is raised; whether there is a badge."""

PROMPTS: Mapping[str, tuple[str, ...]] = {
    "plain": ("A person is talking to the camera.", "Someone speaks calmly.", "A person talks."),
    "nod": ("A person is nodding.", "Someone nods while speaking.", "A person talks and nods."),
    "shake": ("A person shakes the head.", "Someone is shaking their head.", "A person talks and shakes the head."),
    "smile": ("A person is smiling.", "Someone speaks with a smile.", "A person talks, smiling happily."),
    "aside": ("A person looks to the side.", "Someone is looking aside.", "A person talks, turned to the side."),
    "hand": ("A person raises a hand.", "Someone holds up a hand.", "A person talks with a raised hand."),
}
ALL_PROMPTS = tuple(text for texts in PROMPTS.values() for text in texts)

_PLAIN_SHARE = 0.4
_LIP_TOP, _LIP_BOTTOM = 5533, 5517
"""Vertices of the light model: middle of the inner lips."""
_LEVEL_DB = -26.0


@dataclass(frozen=True, slots=True)
class Clip:
    """A few seconds of one face."""

    frames_THWC: Picture
    photo_HWC: Picture
    """Another moment of the same face: at rest, mouth shut."""
    sound_S: Floats
    prompt: str
    truth_TE: Floats | None
    """Columns `TRUTH`; None when nobody knows."""


class ClipSource(Protocol):
    """Clips by number."""

    @property
    def size(self) -> int:
        """Height and width of a frame."""
        ...

    def __len__(self) -> int: ...

    def clip(self, index: int) -> Clip: ...


# --- sound


def leveled(samples_S: Floats, level_db: float = _LEVEL_DB) -> Floats:
    """Speech brought to ``level_db`` dBFS, measured where it is loud; silence stays silence."""
    hop = RATE_HZ // 100
    power = (samples_S[: len(samples_S) // hop * hop].reshape(-1, hop).astype(np.float64) ** 2).mean(1)
    loud = power[power > power.max(initial=0.0) * 1e-3]
    if len(loud) == 0 or loud.mean() < 1e-12:
        return samples_S.astype(np.float32)
    gain = 10 ** (level_db / 20) / math.sqrt(float(loud.mean()))
    return np.clip(samples_S * gain, -1, 1).astype(np.float32)


def articulation(samples_S: Floats) -> dict[str, Floats]:
    """What the mouth does with a sound of -26 dBFS, per frame: ``open``, ``round`` and ``wide``, each 0..1.

    Frame t hears from 60 ms before its middle to 20 ms after it, so never beyond its own end.
    """
    num_frames = len(samples_S) // FRAME_SAMPLES
    hop, window = RATE_HZ // 100, 400
    padded = np.pad(samples_S.astype(np.float64), (window // 2, window))
    starts = np.arange(num_frames * 4 + 4) * hop
    pieces = padded[np.minimum(starts[:, None] + np.arange(window), len(padded) - 1)] * np.hanning(window)
    power = np.abs(np.fft.rfft(pieces, 512)) ** 2 / (np.hanning(window) ** 2).sum()
    hz = np.fft.rfftfreq(512, 1 / RATE_HZ)

    def band(low: float, high: float) -> NDArray[np.float64]:
        return power[:, (hz >= low) & (hz < high)].sum(1) / 256 + 1e-9

    voice, hiss = band(100, 3000), band(4000, 8000)
    loud = np.clip((10 * np.log10(voice) + 52.0) / 26.0, 0, 1)
    inside = (hz >= 200) & (hz < 3000)
    centre_hz = (power[:, inside] * hz[inside]).sum(1) / (power[:, inside].sum(1) + 1e-9)
    low = np.clip((750.0 - centre_hz) / 450.0, 0, 1) * loud
    hissing = np.clip((10 * np.log10(hiss / voice) + 2.0) / 8.0, 0, 1) * (hiss > 1e-6)
    tracks = {"open": loud * (1 - 0.7 * low * 0.5) * (1 - 0.6 * hissing), "round": low, "wide": hissing}
    weights = np.array([0.5, 0.8, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4])
    weights /= weights.sum()
    out: dict[str, Floats] = {}
    for name, track in tracks.items():
        # Visit 4 t + 2 is the middle of frame t; six visits before it count, and two after.
        reach = np.pad(track, (6, 8), mode="edge")
        middle = np.arange(num_frames) * 4 + 2
        out[name] = (reach[middle[:, None] + np.arange(9)] * weights).sum(1).astype(np.float32)
    return out


def mouth_weights(heard: Mapping[str, Floats]) -> dict[str, Floats]:
    """ARKit weights ``[T]`` of what `articulation` heard."""
    opened, rounded, wide = heard["open"], heard["round"], heard["wide"]
    spread = opened * (1 - rounded)
    weights = {
        "jawOpen": 0.55 * opened,
        "mouthFunnel": 0.55 * rounded * np.sqrt(np.maximum(opened, 0)),
        "mouthPucker": 0.5 * rounded,
    }
    for side in ("Left", "Right"):
        weights["mouthLowerDown" + side] = 0.35 * spread + 0.15 * wide
        weights["mouthUpperUp" + side] = 0.15 * spread + 0.08 * wide
        weights["mouthStretch" + side] = 0.3 * wide
    return weights


def opening_cm(head: HeadModel, weights: Mapping[str, Floats]) -> Floats:
    """Distance of the inner lips ``[T]`` that these weights make on the mean head."""
    rest = float(head.neutral_V3[_LIP_BOTTOM, 1] - head.neutral_V3[_LIP_TOP, 1])
    total = np.full_like(next(iter(weights.values())), rest)
    for name, track in weights.items():
        delta = head.shapes[name]
        total = total + track * np.float32(delta[_LIP_BOTTOM, 1] - delta[_LIP_TOP, 1])
    return np.maximum(total, 0.0).astype(np.float32)


class Voices:
    """Speech by number: sentences read by hibari-tts in many pitches and throats, and stretches of given recordings."""

    def __init__(self, recordings: Sequence[Floats] = (), *, recorded_share: float = 0.4) -> None:
        from streamdiff.training.avatar.motion import lexicon_words
        from streamdiff.voice import HibariVoice

        self._voice = HibariVoice()
        self._words = lexicon_words()
        self._recordings = list(recordings)
        self._share = recorded_share if recordings else 0.0

    def sound(self, num_samples: int, generator: np.random.Generator) -> Floats:
        """Speech at -26 dBFS, with the pauses that speech has."""
        if generator.random() < self._share:
            long = self._recordings[int(generator.integers(len(self._recordings)))]
            first = int(generator.integers(max(1, len(long) - num_samples)))
            samples = long[first : first + num_samples]
            return leveled(np.pad(samples, (0, num_samples - len(samples))))
        return leveled(self._read(num_samples, generator))

    def _read(self, num_samples: int, generator: np.random.Generator) -> Floats:
        from streamdiff.training.avatar.motion import sentence

        voice = self._voice
        voice.pitch = float(np.clip(np.exp(generator.normal(-0.1, 0.32)), 0.45, 1.8))
        voice.tract = float(np.clip(voice.pitch**0.25 * np.exp(0.06 * generator.standard_normal()), 0.78, 1.25))
        voice.speed = float(np.clip(np.exp(generator.normal(0.0, 0.15)), 0.7, 1.5))
        parts: list[Floats] = [np.zeros(int(generator.uniform(0, 0.8) * RATE_HZ), np.float32)]
        while sum(map(len, parts)) < num_samples:
            for chunk in voice.speak(sentence(generator, self._words)):
                parts.append(_at_16_khz(chunk.samples_S))
            parts.append(np.zeros(int(generator.uniform(0.05, 0.9) * RATE_HZ), np.float32))
        return np.concatenate(parts)[:num_samples]


def _at_16_khz(samples_S: Floats) -> Floats:
    from streamdiff import voice

    resampler = voice.Resampler(voice.RATE_HZ, RATE_HZ)
    return np.concatenate([resampler.push(samples_S), resampler.finish()]).astype(np.float32)


# --- motion


def _wander(generator: np.random.Generator, num_frames: int, corner_hz: float) -> Floats:
    """A smooth random walk around zero with unit spread."""
    keep = math.exp(-2 * math.pi * corner_hz / FPS)
    value = generator.standard_normal(2)
    track = np.empty(num_frames, np.float32)
    push = math.sqrt(1 - keep * keep)
    for t in range(num_frames):
        # Twice filtered, so that it has a speed.
        value[0] = keep * value[0] + push * generator.standard_normal()
        value[1] = keep * value[1] + (1 - keep**2) / math.sqrt(1 + keep**2) * value[0]
        track[t] = value[1]
    return track


def _blinks(generator: np.random.Generator, num_frames: int) -> Floats:
    track = np.zeros(num_frames + 8, np.float32)
    at = float(generator.exponential(60.0))
    while at < num_frames:
        first = int(at)
        for offset, amount in enumerate((0.4, 1.0, 1.0, 0.6, 0.2)):
            if first + offset < len(track):
                track[first + offset] = max(track[first + offset], amount)
        at += 25.0 + float(generator.exponential(65.0))
    return track[:num_frames]


def _ramp(num_frames: int, at: float, length: float = 12.0) -> Floats:
    """0 before ``at``, 1 from ``length`` frames later on, smooth between."""
    share = np.clip((np.arange(num_frames) - at) / length, 0, 1)
    return (share * share * (3 - 2 * share)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Score:
    """What a face does during a clip, and in the photograph that goes with it."""

    poses: tuple[Pose, ...]
    photo: Pose
    action: str
    truth_TE: Floats


def compose(head: HeadModel, sound_S: Floats, generator: np.random.Generator, *, action: str | None = None,
            calm: bool = False) -> Score:  # fmt: skip
    """Move a head to a sound, calmly: it stays within two or three degrees, unless the action turns it.

    ``action``: a key of `PROMPTS`, or None to draw one; the clip may begin in another. ``calm``: the action holds from
    the first frame on.
    """
    num_frames = len(sound_S) // FRAME_SAMPLES
    weights = mouth_weights(articulation(sound_S))
    opening = opening_cm(head, weights)
    names = tuple(PROMPTS)
    often = [_PLAIN_SHARE if name == "plain" else (1 - _PLAIN_SHARE) / (len(names) - 1) for name in names]
    action = names[int(generator.choice(len(names), p=often))] if action is None else action
    before = action if calm or generator.random() < 0.7 else names[int(generator.integers(len(names)))]
    change = _ramp(num_frames, float(generator.uniform(0.0, 36.0))) if before != action else np.ones(num_frames)

    def amount(name: str) -> Floats:
        return ((before == name) * (1 - change) + (action == name) * change).astype(np.float32)

    clock = np.arange(num_frames) / FPS
    beat = 2 * math.pi * (clock * float(generator.uniform(0.7, 0.9)) + float(generator.random()))
    stress = np.convolve(weights["jawOpen"], np.hanning(9) / np.hanning(9).sum(), mode="same")
    pitch = 0.02 * _wander(generator, num_frames, 0.3) + 0.05 * stress + 0.13 * np.sin(beat) * amount("nod")
    yaw = 0.035 * _wander(generator, num_frames, 0.2) + 0.20 * np.sin(beat) * amount("shake")
    yaw = yaw + 0.32 * amount("aside")
    roll = 0.02 * _wander(generator, num_frames, 0.2)
    gaze_x = np.round(0.7 * _wander(generator, num_frames, 0.4)) * 0.35 + 0.4 * amount("aside")
    gaze_y = np.round(0.5 * _wander(generator, num_frames, 0.3)) * 0.2
    blink = _blinks(generator, num_frames)
    smile, hand = 0.85 * amount("smile"), amount("hand")
    brows = np.clip(0.25 * stress / 0.3 + 0.15 * _wander(generator, num_frames, 0.4), 0, 0.8)
    sway_x, sway_y = (0.08 * _wander(generator, num_frames, 0.15) for _ in range(2))
    truth = {
        "opening_cm": opening,
        "round": weights["mouthPucker"],
        "blink": blink,
        "pitch": pitch,
        "yaw": yaw,
        "roll": roll,
        "gaze_x": gaze_x,
        "gaze_y": gaze_y,
        "smile": smile,
        "hand": hand,
        "badge": np.zeros(num_frames),
    }
    poses: list[Pose] = []
    for t in range(num_frames):
        shapes = {name: float(track[t]) for name, track in weights.items()}
        shapes |= _eyes(float(gaze_x[t]), float(gaze_y[t]), float(blink[t]))
        shapes["browInnerUp"] = float(brows[t])
        shapes["browOuterUpLeft"] = shapes["browOuterUpRight"] = 0.7 * float(brows[t])
        for eye in ("Left", "Right"):
            shapes["mouthSmile" + eye] = float(smile[t])
            shapes["cheekSquint" + eye] = 0.5 * float(smile[t])
        turn = np.array([pitch[t], yaw[t], roll[t]], np.float32)
        poses.append(Pose(shapes, turn, (float(sway_x[t]), float(sway_y[t])), float(hand[t])))
    photo = Pose({}, np.array(generator.normal(0, 0.015, 3), np.float32), (0.0, 0.0))
    truth_TE = np.stack([truth[name] for name in TRUTH], 1).astype(np.float32)
    return Score(tuple(poses), photo, action, truth_TE)


def _eyes(x: float, y: float, blink: float) -> dict[str, float]:
    """Gaze to the right of the picture and up, in shapes; the head's left eye lies on the picture's right."""
    looks = {"eyeBlinkLeft": blink, "eyeBlinkRight": blink}
    toward, away = ("eyeLookOutLeft", "eyeLookInRight"), ("eyeLookInLeft", "eyeLookOutRight")
    for name in toward if x > 0 else away:
        looks[name] = abs(x)
    for name in ("eyeLookUpLeft", "eyeLookUpRight") if y > 0 else ("eyeLookDownLeft", "eyeLookDownRight"):
        looks[name] = abs(y)
    return looks


# --- sources


class DrawnClips:
    """Drawn talking heads. ``looks`` consecutive clips share one motion and one skull, in other looks.

    Args:
        head: ICT-FaceKit's light model.
        voices: where sound comes from; anything with `Voices.sound`.
        count: how many clips there are.
        size: height and width in pixels.
        first: number of the first clip; training and judging use numbers far apart.
    """

    def __init__(
        self,
        head: HeadModel,
        voices: Voices,
        *,
        count: int,
        size: int = 128,
        looks: int = 4,
        seed: int = 0,
        first: int = 0,
        num_frames: int = NUM_FRAMES,
    ) -> None:
        if count < 1 or looks < 1 or size < 16:
            raise ConfigError(f"clips need count, looks >= 1 and size >= 16, got {count}, {looks}, {size}")
        self.size, self.seed, self.first, self.looks, self.num_frames = size, seed, first, looks, num_frames
        self._head, self._voices, self._count = head, voices, count

    def __len__(self) -> int:
        return self._count

    def clip(self, index: int) -> Clip:
        return next(self._family(index // self.looks, [index % self.looks]))

    def clips(self, start: int, stop: int) -> Iterator[Clip]:
        """Clips ``start .. stop - 1``; a body is drawn once for all its looks."""
        at = start
        while at < stop:
            until = min(stop, (at // self.looks + 1) * self.looks)
            yield from self._family(at // self.looks, [i % self.looks for i in range(at, until)])
            at = until

    def _family(self, family: int, members: Sequence[int]) -> Iterator[Clip]:
        number = self.first + family
        generator = np.random.default_rng(rng.seed_of("drawn clip", self.seed, number))
        build = Build.draw(generator, len(self._head.identity_KV3))
        sound_S = self._voices.sound(self.num_frames * FRAME_SAMPLES, generator)
        score = compose(self._head, sound_S, generator)
        texts = PROMPTS[score.action]
        painter = Painter(self._head, build, size=self.size)
        bodies = [painter.body(pose) for pose in score.poses]
        photo = painter.body(score.photo)
        for member in members:
            drawn = np.random.default_rng(rng.seed_of("look", self.seed, number, member))
            look = Look.draw(drawn)
            truth_TE = score.truth_TE.copy()
            truth_TE[:, TRUTH.index("badge")] = float(look.has_badge)
            yield Clip(
                frames_THWC=np.stack([painter.dress(body, look) for body in bodies]),
                photo_HWC=painter.dress(photo, look),
                sound_S=sound_S,
                prompt=texts[int(drawn.integers(len(texts)))],
                truth_TE=truth_TE,
            )


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
    import av
    import av.error
    from PIL import Image

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path} has no picture; give a video file")
            due = 0
            for frame in container.decode(container.streams.video[0]):
                at = frame.time
                if at * FPS + 1e-3 < due:
                    continue
                picture = frame.to_image()
                side = min(picture.size)
                left, top = (picture.width - side) // 2, (picture.height - side) // 2
                picture = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BOX)
                shown = np.asarray(picture.convert("RGB"), np.uint8)
                while due <= at * FPS + 1e-3:
                    yield shown
                    due += 1
    except av.error.FFmpegError as error:
        raise InputError(f"{path} cannot be read as video: {error}") from error


# --- shards


def write_shards(
    source: DrawnClips | ClipSource,
    folder: Path,
    *,
    per_shard: int = 40,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write all clips, ``per_shard`` to a file; a shard that is there is kept.

    ``part = (k, n)`` writes every n-th shard beginning with the k-th, for n processes side by side.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(source), per_shard)):
        stop = min(len(source), start + per_shard)
        path = folder / f"faces-{number:05d}.safetensors"
        if number % part[1] != part[0]:
            continue
        if path.is_file():
            if progress is not None:
                progress(stop - start)
            continue
        clips: list[Clip] = []
        whole = isinstance(source, DrawnClips | RecordedClips)
        made = source.clips(start, stop) if whole else map(source.clip, range(start, stop))
        for clip in made:
            clips.append(clip)
            if progress is not None:
                progress(1)
        tensors: dict[str, Tensor] = {
            "frames": torch.from_numpy(np.stack([c.frames_THWC for c in clips])),
            "photo": torch.from_numpy(np.stack([c.photo_HWC for c in clips])),
            "sound": torch.from_numpy(np.stack([np.round(c.sound_S * 32767).astype(np.int16) for c in clips])),
        }
        truths = [c.truth_TE for c in clips if c.truth_TE is not None]
        if len(truths) == len(clips):
            tensors["truth"] = torch.from_numpy(np.stack(truths))
        facts = {"prompts": json.dumps([c.prompt for c in clips]), "start": str(start), "truth": json.dumps(TRUTH)}
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, metadata=facts)
        partial.replace(path)


class Shards:
    """Clips on disk, by number.

    Raises InputError when the folder has none, or a file in it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("faces-*.safetensors"))
        if not self.paths:
            raise InputError(f"there are no clips in {folder}; make some with: streamdiff train data --out {folder}")
        self._places: list[tuple[int, int]] = []
        self._prompts: list[list[str]] = []
        self._open: dict[int, Any] = {}
        for number, path in enumerate(self.paths):
            try:
                with safe_open(path, "pt") as file:
                    shape = file.get_slice("frames").get_shape()
                    self._prompts.append(json.loads((file.metadata() or {})["prompts"]))
            except (SafetensorError, OSError, KeyError) as error:
                raise InputError(f"{path} is not a shard of clips ({error}); remove it and make it anew") from error
            self.num_frames, self.size = int(shape[1]), int(shape[2])
            self._places += [(number, i) for i in range(shape[0])]

    def __len__(self) -> int:
        return len(self._places)

    def _file(self, number: int) -> Any:
        if number not in self._open:
            self._open[number] = safe_open(self.paths[number], "pt").__enter__()
        return self._open[number]

    def frames(self, index: int, first: int = 0, count: int | None = None) -> Tensor:
        """Frames ``[T, H, W, 3]`` uint8 of one clip, from ``first`` on."""
        number, i = self._places[index]
        stop = self.num_frames if count is None else first + count
        return self._file(number).get_slice("frames")[i : i + 1, first:stop][0]

    def clip(self, index: int) -> Clip:
        number, i = self._places[index]
        file = self._file(number)
        truth = file.get_slice("truth")[i].numpy() if "truth" in file.keys() else None  # noqa: SIM118
        return Clip(
            frames_THWC=self.frames(index).numpy(),
            photo_HWC=file.get_slice("photo")[i].numpy(),
            sound_S=file.get_slice("sound")[i].numpy().astype(np.float32) / 32767,
            prompt=self._prompts[number][i],
            truth_TE=truth,
        )


# --- the command


def recordings_of(paths: Sequence[Path]) -> list[Floats]:
    """Waveforms at 16 kHz, levelled: sound files, or the takes of ``facegood_audio2rig.npz`` but the last."""
    found: list[Floats] = []
    for path in paths:
        if path.suffix == ".npz":
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    takes = sorted(name for name in arrays.files if name.startswith("audio_"))
                    # The last take is never trained on.
                    found += [leveled(arrays[name].astype(np.float32) / 32768) for name in takes[:-1]]
            except (OSError, ValueError) as error:
                raise InputError(f"{path} is not an archive of recordings: {error}") from error
        else:
            found.append(leveled(torch.cat(list(read_audio(path, RATE_HZ))).numpy()))
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``streamdiff train data``."""
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where the shards go")
    add("--head", type=Path, metavar="FILE", help="draw heads: ict_facekit.npz, the 3D head")
    add("--video", type=Path, nargs="+", metavar="FILE",
        help="cut these files into clips instead: one person and sound in each, the face in the middle")  # fmt: skip
    add("--prompt", action="append", metavar="TEXT",
        help="what the videos show; once for all, or once for each (default: a person who talks)")  # fmt: skip
    add("--speech", type=Path, nargs="*", default=(), metavar="FILE",
        help="recordings to speak from as well: sound files, or facegood_audio2rig.npz")  # fmt: skip
    add("--clips", type=int, default=960, help="how many clips of 3.9 s to draw (default: %(default)s)")
    add("--size", type=int, default=128, help="pixels along a side (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--first", type=int, default=0, help="number of the first motion; take a far one for clips to judge by")
    add("--part", default="0/1", metavar="K/N", help="write every N-th shard beginning with the K-th (default: all)")


def run(args: argparse.Namespace) -> int:
    """Clips to disk, drawn or cut from videos; started again, it goes on."""
    index, _, parts = str(args.part).partition("/")
    if not (index.isdigit() and parts.isdigit() and int(index) < int(parts)):
        raise ConfigError(f"--part is K/N with K below N, got {args.part}; for two processes give 0/2 and 1/2")
    if (args.head is None) == (args.video is None):
        raise ConfigError("say where clips come from: --head ict_facekit.npz draws them, --video FILE... cuts videos")
    if args.prompt and not args.video:
        raise ConfigError("--prompt says what videos show; drawn clips have prompts of their own")
    torch.set_num_threads(1)
    source: DrawnClips | ClipSource
    if args.video:
        source = RecordedClips(args.video, prompts=args.prompt or PROMPTS["plain"][:1], size=args.size)
    else:
        voices = Voices(recordings_of(args.speech))
        source = DrawnClips(
            HeadModel.load(args.head), voices, count=args.clips, size=args.size, seed=args.seed, first=args.first
        )
    with tqdm(total=len(source) // int(parts), unit="clip", disable=None) as bar:
        write_shards(source, args.out, part=(int(index), int(parts)), progress=bar.update)
    return 0


def main() -> int:
    """Run as ``python -m streamdiff.training.data``."""
    parser = argparse.ArgumentParser(description="Talking heads to learn from: drawn, or cut from videos.")
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    raise SystemExit(main())
