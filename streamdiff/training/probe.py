"""A small network that reads a portrait: how far the mouth is open, where the head points, who it is.

    streamdiff train probe --data faces --held faces_held --codec codec.safetensors \\
        --head ict_facekit.npz --out runs/probe --budget 12min

It learns from drawn heads, of whom everything is known, and reads generated ones: half of what it sees went through the
codec, the rest is blurred and noisy now and then. Its answers are the columns `clip.TRUTH` and what makes a person
(`IDENTITY`); the layer before them (`FEATURES` wide) is what Frechet distances are measured in. It has seen nothing but
drawn heads: on photographs it means nothing, and no distance of it is an FID or an FVD.

Axes: N frames, H height, W width, C channels, E columns, F features.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from streamdiff import checkpoint, rng
from streamdiff.avatar.head3d import HeadModel
from streamdiff.config import EngineConfig
from streamdiff.errors import InputError
from streamdiff.models.vae import from_rgb8, to_rgb8
from streamdiff.options import Whole
from streamdiff.output import replacing
from streamdiff.packaged import FOLDER, packaged
from streamdiff.training.codec import Codec, load_codec
from streamdiff.training.data.clip import TRUTH
from streamdiff.training.data.shards import Shards
from streamdiff.training.faces import CLASSES, Build, Look
from streamdiff.training.loop import Part, Trainer
from streamdiff.training.recipe import add_training_arguments, conduct, load_weights, plan_of, preset_of, save_average

SIZE = 128
FEATURES = 64
WEIGHTS = FOLDER / "portrait" / "probe.safetensors"

_MODES = 8
_SURFACES = ("skin", "hair", "cloth")
IDENTITY = (
    *(f"mode {k}" for k in range(_MODES)),
    "thick hair",
    "long hair",
    "beard",
    "glasses",
    *(f"{what} {channel}" for what in (*_SURFACES, "wall") for channel in "rgb"),
)
"""What makes a person: the skull's main modes, hair, and colours as a screen shows them."""

# Spread of every column in drawn clips (320 of them): errors of all columns weigh alike.
TRUTH_SPREAD = (0.76, 0.14, 0.17, 0.072, 0.17, 0.041, 0.34, 0.14, 0.32, 0.37, 0.5)
_IDENTITY_SPREAD = (*([0.9] * _MODES), 0.65, 0.4, 0.3, 0.36, *([0.2] * 12))
_WEIGHT = {"opening_cm": 4.0, "round": 0.5, "gaze_x": 0.5, "gaze_y": 0.5}
_IDENTITY_WEIGHT = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What the probe says of some frames; float32."""

    truth_NE: Tensor
    """Columns `clip.TRUTH`, in their units."""
    identity_NE: Tensor
    """Columns `IDENTITY`, each in units of its spread over people."""
    features_NF: Tensor

    def column(self, name: str) -> Tensor:
        """One column of the truth, ``[N]``."""
        return self.truth_NE[:, TRUTH.index(name)]


class Probe(nn.Module):
    """0.2 M parameters: seven convolutions, and the colours of a coarse copy beside them."""

    def __init__(self) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.GroupNorm(8, outputs), nn.SiLU()
            )

        self.enter = nn.Conv2d(3, 16, 5, stride=2, padding=2)
        self.trunk = nn.Sequential(
            conv(16, 32, 2), conv(32, 32, 1), conv(32, 64, 2), conv(64, 64, 1), conv(64, 64, 2), conv(64, 64, 1)
        )
        self.squeeze = nn.Conv2d(64, 16, 1)
        self.join = nn.Linear(16 * 64 + 3 * 64, FEATURES)
        self.answer = nn.Linear(FEATURES, len(TRUTH) + len(IDENTITY))

    def forward(self, frames_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Frames in [-1, 1] to answers in units of their spread, and features."""
        h = F.silu(self.enter(frames_NCHW.contiguous(memory_format=torch.channels_last)))
        h = self.squeeze(self.trunk(h)).flatten(1)
        # Norms forget how bright a picture is; identity is colour as well.
        colours = F.adaptive_avg_pool2d(frames_NCHW, 8).flatten(1)
        features_NF = F.silu(self.join(torch.cat([h, colours], 1)))
        return self.answer(features_NF), features_NF

    @torch.inference_mode()
    def read(self, frames_NHWC: Tensor, *, batch: int = 32) -> Reading:
        """Read uint8 RGB frames. Raises InputError when they are not ``SIZE`` pixels high and wide."""
        if tuple(frames_NHWC.shape[1:]) != (SIZE, SIZE, 3):
            raise InputError(
                f"the probe reads frames of {SIZE}x{SIZE}x3, got {list(frames_NHWC.shape)}; scale them before"
            )
        answers, features = zip(*(self(_pictures(part)) for part in frames_NHWC.split(batch)), strict=True)
        answer_NE = torch.cat(answers)
        truth_NE = answer_NE[:, : len(TRUTH)] * torch.tensor(TRUTH_SPREAD)
        return Reading(truth_NE, answer_NE[:, len(TRUTH) :].clone(), torch.cat(features).clone())


def _pictures(frames_NHWC: Tensor) -> Tensor:
    return frames_NHWC.movedim(3, 1).float() / 127.5 - 1.0


def load_probe(path: Path = WEIGHTS) -> Probe:
    """A trained probe; the shipped one by default. Raises CheckpointError when the file does not fit."""
    probe = Probe()
    if path == WEIGHTS and path.is_file():
        packaged("portrait/probe.safetensors")
    if not path.is_file():
        raise InputError(f"{path} is not there; train it with: streamdiff train probe --help")
    checkpoint.load_strict(probe, checkpoint.read_safetensors(path), what=str(path))
    return probe.eval().requires_grad_(False)


def identity_of(number: int, member: int, *, num_modes: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Columns `IDENTITY` of a drawn clip, each divided by its spread, from the draws that made it."""
    build = Build.draw(np.random.default_rng(rng.seed_of("drawn clip", seed, number)), num_modes)
    look = Look.draw(np.random.default_rng(rng.seed_of("look", seed, number, member)))
    colours = [look.colours_C3[CLASSES.index(name)] * look.tint_3 for name in _SURFACES] + [look.wall_23.mean(0)]
    screen = np.clip(np.concatenate(colours), 0, 1) ** (1 / 2.2)
    form = [*build.identity_K[:_MODES], build.hair_cm, build.hair_long, build.beard, build.glasses]
    return (np.concatenate([form, screen]) / np.array(_IDENTITY_SPREAD)).astype(np.float32)


class KnownFaces:
    """Frames of drawn clips, plain and through the codec, with what is known of each.

    Args:
        shards: clips written by ``streamdiff train data``.
        num_modes: identity modes of the head that they were drawn with.
        seed, first, looks: as they were drawn.
    """

    def __init__(self, shards: Shards, *, num_modes: int, seed: int = 0, first: int = 0, looks: int = 4) -> None:
        self._shards = shards
        identities: list[np.ndarray[tuple[int], np.dtype[np.float32]]] = []
        truths: list[Tensor] = []
        for path in shards.paths:
            try:
                with safe_open(path, "pt") as file:
                    start = int((file.metadata() or {})["start"])
                    count = int(file.get_slice("frames").get_shape()[0])
                    if "truth" not in file.keys():  # noqa: SIM118
                        raise InputError(f"nobody knows the truth of the clips in {path}; give drawn clips")
                    truths.append(file.get_tensor("truth"))
            except (SafetensorError, OSError, KeyError) as error:
                raise InputError(f"{path} is not a shard of clips ({error}); make it anew") from error
            for i in range(start, start + count):
                identities.append(identity_of(first + i // looks, i % looks, num_modes=num_modes, seed=seed))
        self._identity_NE = torch.from_numpy(np.stack(identities))
        self._truth_NTE = torch.cat(truths)
        self._coded: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._shards)

    @torch.inference_mode()
    def code(self, codec: Codec, num_clips: int) -> None:
        """Keep copies of evenly spread clips as the codec shows them."""
        chosen = np.unique(np.linspace(0, len(self) - 1, min(num_clips, len(self))).astype(int))
        for i in tqdm(chosen.tolist(), unit="clip", desc="codec", disable=None):
            self._coded[i] = through(codec, self._shards.frames(i))

    @property
    def coded(self) -> list[int]:
        """Clips of which there is a copy through the codec."""
        return sorted(self._coded)

    def frames(self, clip: int, *, coded: bool) -> Tensor:
        """All frames ``[T, H, W, 3]`` of a clip."""
        return self._coded[clip] if coded else self._shards.frames(clip)

    def targets(self, clip: int, frame: int | slice) -> tuple[Tensor, Tensor]:
        """Truth in its units, and identity in spreads."""
        return self._truth_NTE[clip, frame], self._identity_NE[clip]

    def batch(self, size: int, *key: int | str) -> tuple[Tensor, Tensor, Tensor]:
        """Frames in [-1, 1], and both targets in spreads; a function of ``key``."""
        generator = np.random.default_rng(rng.seed_of("probe batch", *key))
        coded = self.coded
        frames, truths, identities = [], [], []
        for k in range(size):
            of_codec = k % 2 == 0 and bool(coded)
            clip = coded[int(generator.integers(len(coded)))] if of_codec else int(generator.integers(len(self)))
            t = int(generator.integers(self._truth_NTE.shape[1]))
            frame_HWC = self._coded[clip][t] if of_codec else self._shards.frames(clip, t, 1)[0]
            picture = _pictures(frame_HWC[None])
            if generator.random() < 0.5:
                picture = _worn(picture, generator)
            truth, identity = self.targets(clip, t)
            frames.append(picture)
            truths.append(truth / torch.tensor(TRUTH_SPREAD))
            identities.append(identity)
        return torch.cat(frames), torch.stack(truths), torch.stack(identities)


def _worn(picture_1CHW: Tensor, generator: np.random.Generator) -> Tensor:
    """Slightly blurred and noisy, as a generated frame may be."""
    sigma = float(generator.uniform(0.3, 1.1))
    taps = torch.exp(-0.5 * (torch.arange(-2, 3) / sigma) ** 2)
    taps = (taps / taps.sum()).float()
    padded = F.pad(picture_1CHW, (2, 2, 2, 2), mode="replicate")
    rows = F.conv2d(padded, taps.view(1, 1, 5, 1).expand(3, 1, 5, 1), groups=3)
    blurred = F.conv2d(rows, taps.view(1, 1, 1, 5).expand(3, 1, 1, 5), groups=3)
    noise = generator.standard_normal(tuple(blurred.shape), np.float32) * float(generator.uniform(0, 0.04))
    return blurred + torch.from_numpy(noise)


@torch.inference_mode()
def through(codec: Codec, frames_THWC: Tensor) -> Tensor:
    """Frames (1 + a multiple of four of them) as they come back from the codec; uint8."""
    mean, _ = codec.posterior(from_rgb8(frames_THWC[None]))
    return to_rgb8(codec.decode(mean))[0]


def probe_loss(answer_NE: Tensor, truth_NE: Tensor, identity_NE: Tensor) -> tuple[Tensor, Tensor]:
    """Smooth L1 of what is seen and of who it is. A badge behind a hand is not asked for."""
    # Square up to one spread: what is rarely anything but zero, as a blink, would stay there under L1.
    error_NE = F.smooth_l1_loss(answer_NE[:, : len(TRUTH)], truth_NE, reduction="none", beta=1.0)
    weight_NE = torch.tensor([_WEIGHT.get(name, 1.0) for name in TRUTH]).expand_as(error_NE).clone()
    hand, badge = TRUTH.index("hand"), TRUTH.index("badge")
    weight_NE[:, badge] *= (truth_NE[:, hand] * TRUTH_SPREAD[hand] < 0.1).float()
    seen = (error_NE * weight_NE).mean()
    return seen, F.smooth_l1_loss(answer_NE[:, len(TRUTH) :], identity_NE, beta=0.3)


class ProbeTask:
    """What `streamdiff.training.loop` runs."""

    def __init__(self, probe: Probe, faces: KnownFaces, *, batch: int, lr: float, seed: int) -> None:
        self.parts = {"probe": Part(module=probe, lr=lr, average=0.0)}
        self._probe, self._faces, self._batch, self._seed = probe, faces, batch, seed

    def gradients(self, step: int) -> Mapping[str, float]:
        frames, truth, identity = self._faces.batch(self._batch, self._seed, step)
        answer, _ = self._probe(frames)
        seen, who = probe_loss(answer, truth, identity)
        (seen + _IDENTITY_WEIGHT * who).backward()
        return {"loss": float(seen.detach()), "identity": float(who.detach())}


def judge(probe: Probe, faces: KnownFaces, *, coded: bool, every: int = 6) -> dict[str, float]:
    """Held-out errors: per column of the truth, the mean absolute error and the correlation; of people, the rest.

    ``opening_cm within`` is the correlation inside a clip, averaged: what sync is measured with.
    ``same person`` and ``other person`` are mean distances of identity readings (root mean square, in spreads) between
    moments of one clip, and between clips; ``verified`` is the share of pairs in which the former is the smaller.
    """
    clips = faces.coded if coded else list(range(len(faces)))
    read, known, people = [], [], []
    for clip in clips:
        frames = faces.frames(clip, coded=coded)[::every]
        reading = probe.read(frames)
        truth, _ = faces.targets(clip, slice(None, None, every))
        read.append(reading.truth_NE)
        known.append(truth)
        people.append(reading.identity_NE)
    found, expected = torch.cat(read), torch.cat(known)
    shown = expected[:, TRUTH.index("hand")] < 0.1
    facts: dict[str, float] = {}
    for e, name in enumerate(TRUTH):
        rows = shown if name == "badge" else torch.ones_like(shown)
        a, b = found[rows, e], expected[rows, e]
        facts[f"{name} error"] = float((a - b).abs().mean())
        facts[f"{name} correlation"] = float(torch.corrcoef(torch.stack([a, b]))[0, 1])
    inside = [torch.corrcoef(torch.stack([a[:, 0], b[:, 0]]))[0, 1] for a, b in zip(read, known, strict=True)]
    facts[f"{TRUTH[0]} within"] = float(torch.stack(inside).nanmean())
    half = [len(p) // 2 for p in people]
    early = torch.stack([p[:h].mean(0) for p, h in zip(people, half, strict=True)])
    late = torch.stack([p[h:].mean(0) for p, h in zip(people, half, strict=True)])
    distance = (early[:, None] - late[None]).square().mean(2).sqrt()
    same, other = distance.diagonal(), distance[~torch.eye(len(distance), dtype=torch.bool)]
    facts["same person"], facts["other person"] = float(same.mean()), float(other.mean())
    facts["verified"] = float((same[:, None] < other[None]).float().mean())
    return facts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``streamdiff train probe``."""
    add_training_arguments(parser, data="drawn clips", batch=48, lr=2e-3)
    add = parser.add_argument
    add("--head", type=Path, required=True, metavar="FILE", help="ict_facekit.npz, the head that the clips show")
    add("--codec", type=Path, metavar="FILE", help="show half of the frames as this codec does")
    add(
        "--coded-clips",
        type=Whole(0, 1_000_000),
        default=120,
        metavar="N",
        help="clips to send through the codec (default: 120)",
    )
    add("--held", type=Path, metavar="DIR", help="clips to judge by, drawn with --first 1000000")


def run(args: argparse.Namespace) -> int:
    """Train the probe, and judge it by clips that were held out."""
    config = preset_of(args)
    faces, held = _faces_of(args, config)
    probe = Probe()
    _initialise(probe, seed=args.seed)
    if args.init is not None:
        load_weights(probe, args.init)
    task = ProbeTask(probe, faces, batch=args.batch, lr=args.lr, seed=args.seed)

    def finish(trainer: Trainer) -> list[Path]:
        path = args.out / "probe.safetensors"
        save_average(trainer, "probe", path, dtype=torch.float16)
        if held is not None:
            trained = load_probe(path)
            facts = {"plain": judge(trained, held, coded=False)}
            if args.codec is not None:
                facts["codec"] = judge(trained, held, coded=True)
            with replacing(args.out / "held_out.json") as part:
                part.write_text(json.dumps(facts, indent=1) + "\n")
            sys.stdout.write(json.dumps(facts) + "\n")
        return [path]

    facts = {"seed": args.seed, "batch": args.batch, "lr": args.lr, "clips": len(faces), "coded": len(faces.coded)}
    return conduct("probe", task, args, plan_of(args, budget="12min"), facts=facts, finish=finish)


def _faces_of(args: argparse.Namespace, config: EngineConfig) -> tuple[KnownFaces, KnownFaces | None]:
    """Clips to learn from, and those that are held out; both through the codec where one is given."""
    num_modes = len(HeadModel.load(args.head).identity_KV3)
    faces = KnownFaces(Shards(args.data), num_modes=num_modes)
    held = KnownFaces(Shards(args.held), num_modes=num_modes, first=1_000_000) if args.held is not None else None
    if args.codec is not None:
        codec = load_codec(args.codec, config.vae)
        faces.code(codec, args.coded_clips)
        if held is not None:
            held.code(codec, 24)
    return faces, held


def _initialise(probe: Probe, *, seed: int) -> None:
    """Kaiming-normal weights keyed by name, so that the order of construction does not matter."""
    with torch.no_grad():
        for name, parameter in probe.named_parameters():
            if parameter.ndim > 1:
                fan_in = math.prod(parameter.shape[1:])
                gain = 0.3 if name == "answer.weight" else 1.4
                drawn = rng.normal(tuple(parameter.shape), "probe", seed, name)
                parameter.copy_(drawn * gain / math.sqrt(fan_in))
