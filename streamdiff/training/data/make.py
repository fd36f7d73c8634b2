"""``streamdiff train data``: write clips to disk, drawn or cut from videos."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from streamdiff.avatar.head3d import HeadModel
from streamdiff.errors import ConfigError
from streamdiff.options import SEED, Whole, part
from streamdiff.training.data.clip import PROMPTS, ClipSource
from streamdiff.training.data.drawn import DrawnClips
from streamdiff.training.data.recorded import RecordedClips
from streamdiff.training.data.shards import write_shards
from streamdiff.training.data.speech import Voices, recordings_of


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
    add(
        "--clips", type=Whole(1, 10_000_000), default=960, help="how many clips of 3.9 s to draw (default: %(default)s)"
    )
    add("--size", type=Whole(16, 1024), default=128, help="pixels along a side (default: %(default)s)")
    add("--seed", type=SEED, default=0, help="same seed, same clips (default: %(default)s)")
    add(
        "--first",
        type=Whole(0, 2**31),
        default=0,
        help="number of the first motion; take a far one for clips to judge by",
    )
    add(
        "--part",
        type=part,
        default=(0, 1),
        metavar="K/N",
        help="write every N-th shard beginning with the K-th (default: all)",
    )


def run(args: argparse.Namespace) -> int:
    """Clips to disk, drawn or cut from videos; started again, it goes on."""
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
            HeadModel.load(args.head).whole(),
            voices,
            count=args.clips,
            size=args.size,
            seed=args.seed,
            first=args.first,
        )
    with tqdm(total=len(source) // args.part[1], unit="clip", disable=None) as bar:
        write_shards(source, args.out, part=args.part, progress=bar.update)
    return 0
