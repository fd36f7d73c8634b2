"""The README's pictures of a face that talks: what `streamdiff talk` shows, small enough for a page.

    python perf/avatar_pictures.py                    writes perf/results/pictures/{text,sound,mouth}.jpg

The photograph and the recorded voice are those of the demo. ``text``: frames of a spoken text, evenly spread and cut to
the head; ``sound``: the same of a recording, whose words nobody wrote down; ``mouth``: what single coefficients do, at
512x512, cut to the mouth.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from streamdiff import demo
from streamdiff.avatar.bundle import IdentityBundle
from streamdiff.avatar.engine import AvatarEngine
from streamdiff.avatar.film import Sheet
from streamdiff.avatar.identity import create_bundle
from streamdiff.avatar.kinematics import arkit64
from streamdiff.avatar.render import WarpRenderer
from streamdiff.avatar.stream import AvatarStream
from streamdiff.media import read_audio
from streamdiff.voice import RATE_HZ, HibariVoice

TEXT = "Good morning. My name is on the map, and before we move, maybe I should tell you about five very big boats."
SHAPES: tuple[tuple[str, Mapping[str, float]], ...] = (
    ("at rest", {}),
    ("m, p, b", {"mouthPress": 0.4, "mouthRollLower": 0.3, "mouthRollUpper": 0.2}),
    ("f, v", {"jawOpen": 0.09, "mouthRollLower": 0.55, "mouthUpperUp": 0.24}),
    ("s", {"jawOpen": 0.06, "mouthLowerDown": 0.28, "mouthUpperUp": 0.12, "mouthStretch": 0.2}),
    ("ee", {"jawOpen": 0.17, "mouthLowerDown": 0.24, "mouthUpperUp": 0.12, "mouthStretch": 0.3, "mouthSmile": 0.28}),
    ("oo", {"jawOpen": 0.14, "mouthFunnel": 0.3, "mouthPucker": 0.72}),
    ("aa", {"jawOpen": 0.64, "mouthLowerDown": 0.3}),
    ("wide", {"jawOpen": 1.0}),
)
COLUMNS, CELL = 8, 130


def coefficients(shape: Mapping[str, float]) -> np.ndarray:
    """A frame from shapes, both sides alike."""
    spec, both = arkit64(), {}
    for name, value in shape.items():
        both |= {name: value} if spec.has(name) else {name + "Left": value, name + "Right": value}
    return spec.frame(both)


def spread_frames(stream: AvatarStream, *, sound_S: np.ndarray | None) -> list[Image.Image]:
    """Two rows of frames of what is said."""
    sheet = Sheet(2 * COLUMNS)
    stream.next()
    segment = stream.say(TEXT) if sound_S is None else stream.push_audio(sound_S, RATE_HZ, last=True)
    while not segment.done:
        frame = stream.next()
        if frame.state == "speaking":
            sheet.add(torch.from_numpy(frame.frames_THWC[0]))
    return [Image.fromarray(picture.numpy()) for picture in sheet.frames_THWC()]


def cut_out(picture: Image.Image, bundle: IdentityBundle, *, up: float, down: float) -> Image.Image:
    """A square around the head, from ``up`` above the lips to ``down`` below them, in distances between the eyes."""
    (x, y), unit = bundle.placement.stomion, bundle.placement.eye_distance
    half = (up + down) / 2
    return picture.crop((int(x - half * unit), int(y - up * unit), int(x + half * unit), int(y + down * unit)))


def mouths(bundle: IdentityBundle) -> list[Image.Image]:
    frames = WarpRenderer(bundle).render(np.stack([coefficients(shape) for _, shape in SHAPES]))
    cut = [cut_out(Image.fromarray(frame.numpy()), bundle, up=0.41, down=0.69) for frame in frames]
    labelled = []
    for picture, (label, _) in zip(cut, SHAPES, strict=True):
        cell = picture.resize((CELL, CELL), Image.Resampling.LANCZOS)
        ImageDraw.Draw(cell).text((4, CELL - 14), label, fill="white", stroke_width=2, stroke_fill="black")
        labelled.append(cell)
    return labelled


def tiled(pictures: list[Image.Image]) -> Image.Image:
    rows = -(-len(pictures) // COLUMNS)
    whole = Image.new("RGB", (COLUMNS * (CELL + 2) - 2, rows * (CELL + 2) - 2), "white")
    for number, picture in enumerate(pictures):
        row, column = divmod(number, COLUMNS)
        cell = picture.resize((CELL, CELL), Image.Resampling.LANCZOS)
        whole.paste(cell, (column * (CELL + 2), row * (CELL + 2)))
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "pictures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    photo = demo.demo_image()
    bundle = create_bundle(photo)
    engine = AvatarEngine(WarpRenderer(bundle), voice=HibariVoice())
    sound_S = torch.cat(list(read_audio(demo.demo_audio(), RATE_HZ)))[: 6 * RATE_HZ].numpy()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, said_S in (("text", None), ("sound", sound_S)):
        with engine.stream(seed=1) as stream:
            frames = spread_frames(stream, sound_S=said_S)
        heads = [cut_out(frame, bundle, up=2.0, down=0.9) for frame in frames]
        tiled(heads).save(args.out / f"{name}.jpg", quality=82)
    tiled(mouths(create_bundle(photo, 512))).save(args.out / "mouth.jpg", quality=85)


if __name__ == "__main__":
    main()
