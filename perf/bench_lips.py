"""How often the lips close for p, b and m, read from rendered pixels.

    python perf/bench_lips.py                                    # a minute or two; text, sound, sound with noise
    python perf/bench_lips.py --voice heart:speed=1.4
    python perf/bench_lips.py --photo me.jpg --size 512

Sentences full of bilabials are read aloud by a voice whose phonemes have known times; motion is made from the text,
from the sound as it comes (80 ms of look-ahead), and from the sound under noise 15 dB softer than it. Every frame
around a bilabial is drawn, and its lips are read back by MediaPipe's face landmarks, which know nothing of the
motion. Lips count as closed where they come nearer than 0.01 of the distance between the eyes: a shut mouth reads
0.001 to 0.004, vowels 0.05 to 0.15. ``offset`` is from the middle of the phoneme to the middle of the frame of the
narrowest lips; ``open`` is the share of vowels whose lips part (0.03) somewhere within them: a mouth that never opens
closes for every p. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import machine_card

from streamdiff import demo
from streamdiff.arrays import Floats
from streamdiff.avatar.cues import FRAME_SAMPLES, Cues
from streamdiff.avatar.identity import create_bundle
from streamdiff.avatar.kinematics import FPS
from streamdiff.avatar.landmarks import Landmarker, fetch_task
from streamdiff.avatar.motion import MotionStream
from streamdiff.avatar.quality import lip_apertures, read_faces
from streamdiff.avatar.render import WarpRenderer
from streamdiff.avatar.window import load_motion
from streamdiff.voice import Phoneme, open_voice

TEXT = (
    "Bob made a big pot of pumpkin soup for my mother. Maybe people buy more apples in May. The baby bumped him. "
    "Please stop by the museum before Monday. I probably remember a problem with the map. Pam keeps a lamp by her bed. "
    "Number seven became the best member. A simple example may be helpful. Mom and Bobby hope to play the piano. "
    "Perhaps the company will publish a pamphlet about bamboo. My hobby is mopping, and my pup hops about. "
    "Empty cups and open jam jars imply a happy bear."
)
CLOSED, PARTED = 0.01, 0.03
_LEAD = 10


def read_aloud(name: str) -> tuple[Floats, list[Phoneme]]:
    """The text as sound of whole frames, and its phonemes."""
    parts: list[Floats] = []
    phonemes: list[Phoneme] = []
    at_s = 0.0
    for chunk in open_voice(name).speak(TEXT):
        phonemes += [Phoneme(s, at_s + a, at_s + b) for s, a, b in chunk.phonemes or ()]
        parts.append(chunk.samples_S)
        at_s += chunk.duration_s
    sound_S = np.concatenate(parts)
    return np.pad(sound_S, (0, -len(sound_S) % FRAME_SAMPLES)), phonemes


def moved(sound_S: Floats, phonemes: Sequence[Phoneme] | None, *, seed: int) -> torch.Tensor:
    """Motion ``[A, E]``: all at once from a text, frame by frame with two frames of look-ahead from sound."""
    stream = MotionStream(load_motion(), seed=seed, hop=8)
    num_frames = len(sound_S) // FRAME_SAMPLES
    spoken = Cues.sound(sound_S, phonemes, before_S=np.zeros(FRAME_SAMPLES, np.float32))
    cues = Cues.joined([Cues.silence(_LEAD), spoken, Cues.silence(40)])
    known = len(cues) if phonemes is not None else stream.model.config.lengths[0]
    stream.push(cues[0:known])
    frames: list[torch.Tensor] = []
    for n in range(_LEAD + num_frames):
        frames.append(stream.emit())
        stream.push(cues[known + n : known + n + 1])
    return torch.stack(frames[_LEAD:])


def closures(
    motion_AE: torch.Tensor, phonemes: Sequence[Phoneme], draw: WarpRenderer, look: Landmarker
) -> dict[str, Any]:
    """What is read from the pixels of these frames."""
    last = len(motion_AE) - 1

    def frames_of(p: Phoneme, margin: int) -> range:
        return range(max(0, int(p.start_s * FPS) - margin), min(last, int(p.end_s * FPS) + margin) + 1)

    bilabials = [p for p in phonemes if p.symbol and p.symbol in "pbm"]
    vowels = [p for p in phonemes if p.symbol and p.symbol in "ɑæʌɔɛAIOWY"]  # noqa: RUF001
    wanted = sorted({n for p in bilabials for n in frames_of(p, 1)} | {n for p in vowels for n in frames_of(p, 0)})
    pictures = np.concatenate([draw.render(motion_AE[n : n + 1]).cpu().numpy() for n in wanted])
    apart = dict(zip(wanted, lip_apertures(read_faces(pictures, look)), strict=True))
    narrowest = [min((apart[n], n) for n in frames_of(p, 1)) for p in bilabials]
    shut = [(p, n) for p, (gap, n) in zip(bilabials, narrowest, strict=True) if gap < CLOSED]
    offsets_s = [(n + 0.5) / FPS - (p.start_s + p.end_s) / 2 for p, n in shut]
    parted = sum(max(apart[n] for n in frames_of(p, 0)) > PARTED for p in vowels)
    return {
        "bilabials": len(bilabials),
        "closed": round(len(shut) / len(bilabials), 3),
        "offset_ms": round(float(np.median(offsets_s)) * 1e3) if shut else None,
        "vowels": len(vowels),
        "open": round(parted / len(vowels), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voice", default="heart", help="who reads (default: %(default)s)")
    parser.add_argument("--photo", type=Path, help="whose face (default: the demo's)")
    parser.add_argument("--size", type=int, default=256, help="pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    draw = WarpRenderer(create_bundle(args.photo or demo.demo_image(), size=args.size))
    look = Landmarker(fetch_task())
    sound_S, phonemes = read_aloud(args.voice)
    loud = np.abs(sound_S) > 0.01
    noise_S = np.random.default_rng(args.seed).standard_normal(len(sound_S)).astype(np.float32)
    noise_S *= np.sqrt((sound_S[loud] ** 2).mean()) * 10 ** (-15 / 20)
    rows: dict[str, Any] = {
        "bench": "lips",
        "card": machine_card(torch.device("cpu")),
        "voice": args.voice,
        "size": args.size,
    }
    for name, samples_S, known in (
        ("text", sound_S, phonemes),
        ("sound", sound_S, None),
        ("sound, noise 15 dB below", sound_S + noise_S, None),
    ):
        rows[name] = closures(moved(samples_S, known, seed=args.seed), phonemes, draw, look)
        print(f"{name:<26}{json.dumps(rows[name])}", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
