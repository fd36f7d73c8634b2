"""Hostile options: every option of every command, with what is no number, no file and no word."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping

from streamdiff.options import Number, Whole
from tests.hostile.case import Case, Content, Wants
from tests.hostile.commands import commands, options

_NUMBERS = ("nan", "-inf", "1e999", "-1", "0", "1e15", "99999999999999999999", "\u0661\u0662", "1_000", "", "x" * 5000)
_WORDS = (
    "",
    "x" * 5000,
    "red\x1b[31m\n",
    "\udcff",
    "\u00b2x\u00b2",
    "nan",
    "-1",
    "../../../../dev/zero",
    "%s%n",
    "/dev/null/x",
)
_BASES: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("generate",): ("--seconds", "0.1", "--out", "out.mp4"),
    ("talk",): ("--audio", "nothing.wav", "--out", "out.mp4", "--no-sheet"),
    ("serve",): ("--mint", "somebody", "--token-key", "key"),
    ("avatar", "create"): ("--photo", "nothing.png"),
    ("avatar", "fit"): ("--video", "nothing.mp4"),
    ("avatar", "voice"): ("--recording", "no.wav", "--model", "no.onnx", "--voices", "no.npz", "--encoder", "no.pt",
                          "--out", "out.npz"),
    ("train", "data"): ("--head", "nothing.npz", "--out", "out"),
}  # fmt: skip
_FILES: Mapping[str, Content] = {"key": b"k" * 40}
_PER_OPTION = 2
WORKERS = {
    ("doctor",),
    ("line",),
    ("train", "motion"),
    ("train", "motion-consistency"),
    ("train", "rig"),
    ("train", "mouth"),
    ("train", "seals"),
}
"""Commands that begin to work whatever folder they are given; their numbers are those of the others."""


def cases() -> Iterator[Case]:
    """Each option with a few values, others each time; and the values that have once gone wrong."""
    number = 0
    for words, parser in commands():
        if words in WORKERS:
            continue
        for action in options(parser):
            hostile = _NUMBERS if isinstance(action.type, Whole | Number) else _WORDS
            for _ in range(_PER_OPTION):
                number += 1
                value = hostile[number % len(hostile)]
                name = f"option: {' '.join(words)} {action.option_strings[0]} {value[:8]!r} {number}"
                yield Case(
                    name, (*words, *_base(words, parser), f"{action.option_strings[0]}={value}"), _FILES, most_s=1.0
                )
    for words in SEEN:
        yield Case(f"option: {words[:60]!r}", _argv(words), _FILES, Wants.REFUSED)


def _base(words: tuple[str, ...], parser: argparse.ArgumentParser) -> tuple[str, ...]:
    """What a command cannot do without, so that it gets as far as the option."""
    if words in _BASES:
        return _BASES[words]
    needed: list[str] = []
    for action in parser._actions:
        if action.required:
            needed += [*action.option_strings[:1], "out" if "--out" in action.option_strings else "nothing"]
    return tuple(needed)


def _argv(words: str) -> tuple[str, ...]:
    return tuple(words.split(" "))


SEEN = (
    "generate --seconds 1e15",
    "generate --steps 0",
    "generate --steps -1",
    "generate --size 0x0",
    "generate --size -4x4",
    "generate --size 100000x100000",
    "generate --size 65504x65504",
    "generate --size \u0661\u0662\u0668x\u0661\u0662\u0668",
    "generate --partition 9999999999999999999,1",
    "generate --device cuda:99999999999",
    "generate --attention \x1b[31m",
    "generate --threads 1000000",
    "line --seats 0",
    "line --name ../elsewhere --preset tiny --device cpu",
    "line --device cuda:99999999999",
    "talk Yes. --style smile=inf",
    "talk Yes. --style smile=1e30",
    "talk Yes. --style smile=nan",
    "talk Yes. --style smile=-inf",
    "talk Yes. --style smile",
    "talk Yes. --style =1",
    "talk Yes. --style smile=1,smile=1e9",
    "talk Yes. --voice heart:speed=nan",
    "talk Yes. --voice heart:speed=1e-300",
    "talk Yes. --voice heart:pitch=-1",
    "talk Yes. --voice heart:tract=1e9",
    "talk Yes. --voice heart:tract=0",
    "talk Yes. --voice heart:volume=1",
    "talk Yes. --voice ../../etc/passwd",
    "talk Yes. --voice kokoro:",
    "talk Yes. --voice kokoro:none.onnx:none.npz",
    "talk Yes. --osc 127.0.0.1:\u00b2",
    "talk Yes. --osc 127.0.0.1:\u0661\u0662",
    "talk Yes. --osc 127.0.0.1:99999999",
    "talk Yes. --osc :9000",
    "talk Yes. --rig ",
    "talk Yes. --out ",
    "avatar create --photo none.png --out ",
    "talk Yes. --size 0",
    "talk Yes. --size -4",
    "talk Yes. --size 100000",
    "talk Yes. --threads 100000000",
    "train data --head none.npz --out out --part \u0661/\u0662",
    "train data --head none.npz --out out --part 0/0",
    "train data --head none.npz --out out --part 1/1",
    "train data --head none.npz --out out --part 0/99999999999999999",
    "train data --head none.npz --out out --size 0",
    "train data --head none.npz --out out --size -4",
    "train data --head none.npz --out out --size 100000",
    "train data --head none.npz --out out --clips 0",
    "train forcing --data none --out out --budget nan",
    "train forcing --data none --out out --budget 0s",
    "train forcing --data none --out out --budget=-5s",
    "train forcing --data none --out out --budget 1e9h",
    "train forcing --data none --out out --budget 99999999h",
    "train forcing --data none --out out --steps 0",
    "train forcing --data none --out out --steps -1",
    "train forcing --data none --out out --batch 1000000",
    "train forcing --data none --out out --lr nan",
    "train forcing --data none --out out --lr inf",
    "train motion --data none --out out --speech-minutes inf",
    "train seals --out out --minutes 0",
    "train seals --out out --minutes 1e9",
    "train seals --out out --steps 0",
    "serve --port 65536",
    "serve --port \u0668\u0660\u0660\u0660",
    "serve --capacity 0",
    "serve --idle nan",
    "serve --lifetime inf",
    "serve --linger -1",
    "serve --drain nan",
    "avatar fit --video none.mp4 --minutes nan",
    "avatar create --photo none.png --size 0",
    "nothing",
    "train",
    "train nothing",
    "avatar",
    "\x1b[31m",
)
"""Each has once ended in a traceback, run on, or been accepted in silence; or is its neighbour."""
