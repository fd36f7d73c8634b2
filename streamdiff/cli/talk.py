"""``streamdiff talk``: a photo says a text."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import json
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np

from streamdiff import signals
from streamdiff.avatar.style import STYLE_NAMES, style_vector
from streamdiff.cli.avatar import check_suffix
from streamdiff.cli.verify import add_sign_argument, sign, signer_from
from streamdiff.errors import ConfigError, InputError
from streamdiff.facts import printable
from streamdiff.options import SEED, THREADS
from streamdiff.output import Output, refuse_overwriting

if TYPE_CHECKING:
    from torch import Tensor

    from streamdiff.avatar.kinematics import KinematicSpec
    from streamdiff.avatar.stream import AvatarStream
    from streamdiff.media import VideoWriter
    from streamdiff.stream import Segment, Shown

DESCRIPTION = "Make a video of a face that says a text, or a sound file. Needs no GPU."
_TEXT = "Hello! A moment ago I was only a photograph. Every movement that you see was made on this machine."
_SHEET_FRAMES, _SHEET_COLUMNS = 24, 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``streamdiff talk``."""
    add = parser.add_argument
    add("text", nargs="?", metavar="TEXT", help="what to say; '-' reads it from standard input while it is written")
    add("--audio", type=Path, metavar="FILE", help="speak with this sound instead of a text")
    add(
        "--avatar",
        type=Path,
        metavar="FILE",
        help="a photo, or a bundle of `streamdiff avatar` (default: the demo's)",
    )
    add("--voice", default="heart", help="heart[:pitch=0.8,tract=0.9,speed=1.1] or kokoro:MODEL:VOICES[:NAME]")
    add("--out", type=Path, default=Path("talk.mp4"), help="the MP4 to write (default: %(default)s)")
    add("--size", type=int, choices=(256, 512), default=256, help="pixels along a side, for a photo")
    add("--seed", type=SEED, default=0, help="of the motion (default: %(default)s)")
    add(
        "--style",
        default="",
        metavar="NAME=X,...",
        help=f"how it moves, 0 is ordinary (default: as the bundle says): {', '.join(STYLE_NAMES)}",
    )
    add("--mark", action="store_true", help="write 'synthetic' into the corner of every frame")
    add_sign_argument(parser)
    add(
        "--rig",
        action="append",
        default=[],
        metavar="WHERE",
        help="also move another rig; several times: several. FILE: the coefficients, JSON lines with ARKit names. "
        "osc:HOST:PORT, vmc:HOST[:PORT] (VRM avatars), livelink:HOST[:PORT] (Unreal, MetaHuman): UDP, in real time",
    )
    add("--osc", action="append", dest="rig", type="osc:{}".format, metavar="HOST:PORT", help="as --rig osc:HOST:PORT")
    add("--motion", type=Path, metavar="FILE", help="weights of the motion model (default: those of the package)")
    add("--no-cache", action="store_true", help="work on the photo anew, and keep nothing of it for the next time")
    add("--no-sheet", action="store_true", help="write no contact sheet (a PNG beside the video)")
    add("--threads", type=THREADS, default=1, help="threads of each stage (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """``streamdiff talk``."""
    if args.text is not None and args.audio is not None:
        raise ConfigError("give a text or --audio, not both")
    check_suffix(args.out, ".mp4")
    _check_outputs(args)
    style, rigs, signer = style_from(args.style), _rigs(args.rig), signer_from(args)
    import torch

    from streamdiff.avatar.engine import AvatarEngine
    from streamdiff.avatar.film import in_seconds
    from streamdiff.avatar.kinematics import FPS
    from streamdiff.media import VideoWriter, read_audio
    from streamdiff.voice import RATE_HZ

    signals.handle()
    torch.set_num_threads(args.threads)
    # Opened first: what is wrong with a sound file is said before anything is made.
    sound = None if args.audio is None else in_seconds(read_audio(args.audio, RATE_HZ))
    engine = AvatarEngine.load(
        args.avatar,
        size=args.size,
        voice=args.voice if sound is None else None,
        motion=args.motion,
        style=style,
        keep=not args.no_cache,
    )
    size, began_s = engine.size[0], time.monotonic()
    with ExitStack() as stack:
        stream = stack.enter_context(engine.stream(seed=args.seed, stream=0, realtime=bool(rigs)))
        tags = {"title": "streamdiff talk", "artist": printable(engine.name)}
        writer = stack.enter_context(
            VideoWriter(args.out, width=size, height=size, fps=FPS, rate_hz=RATE_HZ, metadata=tags)
        )
        text = written(sys.stdin) if args.text == "-" else _TEXT if args.text is None else args.text
        said = _film(args, stream, writer, text, sound, rigs, stack)
    took_s = time.monotonic() - began_s
    sign(signer, args.out)
    print(
        f"{args.out}: {writer.num_frames} frames, {writer.duration_s:.2f} s at {size}x{size}, "
        f"{writer.num_frames / took_s:.0f} frames/s; {_latency(said)}"
    )
    return 0


def _film(
    args: argparse.Namespace,
    stream: AvatarStream,
    writer: VideoWriter,
    text: str | Iterable[str],
    sound: Iterator[Tensor] | None,
    rigs: Sequence[tuple[str, tuple[str, int]]],
    stack: ExitStack,
) -> Segment | None:
    """Show all that is said to the film, the rig's file, the wire and the contact sheet; what was said."""
    import torch

    from streamdiff.avatar.film import Film, Sheet, spoken
    from streamdiff.avatar.kinematics import json_lines
    from streamdiff.avatar.mocap import MotionSender
    from streamdiff.media import contact_sheet

    spec = stream.spec
    files = [stack.enter_context(_open_text(path)) for path in _rig_files(args.rig)]
    senders = [stack.enter_context(MotionSender(kind, address, spec)) for kind, address in rigs]
    sheet, film = Sheet(_SHEET_FRAMES), Film(writer, stream.size[0] if args.mark else None)
    said: Segment | None = None
    for file in files:
        file.writelines(line + "\n" for line in json_lines(np.zeros((0, spec.num_coefs), np.float32), spec))
    for frame, segment in spoken(stream, text, sound):
        said = segment or said
        film.add(frame)
        for file in files:
            file.write(_rig_line(frame, spec) + "\n")
        for sender in senders:
            sender.send(frame)
        if not frame.is_silence:
            sheet.add(torch.from_numpy(frame.frames_THWC[0]))
    film.finish()
    if not args.no_sheet and len(sheet):
        path = args.out.with_suffix(".png")
        contact_sheet(sheet.frames_THWC(), path, columns=_SHEET_COLUMNS)
        print(f"{path}: contact sheet")
    return said


_PIECE, _WORDLESS = 4096, 200_000


def written(stream: TextIO) -> Iterator[str]:
    """What is being written to a stream, as it comes and not line by line; bytes that are no UTF-8 become U+FFFD.

    Raises:
        InputError: 200,000 characters without a letter or a digit.
    """
    wordless: int | None = 0
    for piece in _pieces(stream):
        if wordless is not None:
            wordless = None if any(map(str.isalnum, piece)) else wordless + len(piece)
        if wordless is not None and wordless > _WORDLESS:
            raise InputError(f"standard input begins with {_WORDLESS} characters that are no words; give some text")
        yield piece


def _pieces(stream: TextIO) -> Iterator[str]:
    raw = getattr(stream, "buffer", None)
    if raw is None:
        yield from iter(lambda: stream.read(_PIECE), "")
        return
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    while piece := raw.read1(_PIECE):
        yield decoder.decode(piece)
    yield decoder.decode(b"", final=True)


def style_from(text: str) -> dict[str, float]:
    """``smile=1,head_y=-0.5`` as a dictionary.

    >>> style_from("smile=1, nod=-0.5")
    {'smile': 1.0, 'nod': -0.5}
    """
    style: dict[str, float] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = pair.partition("=")
        try:
            style[name.strip()] = float(value)
        except ValueError:
            raise ConfigError(f"--style looks like smile=1,head_y=-0.5, got {pair!r}") from None
    style_vector(style)
    return style


def _rig_line(frame: Shown, spec: KinematicSpec) -> str:
    assert frame.motion_AE is not None
    coefs = {name: round(value, 6) for name, value in spec.named(frame.motion_AE[0]).items()}
    return json.dumps({"frame": frame.index, "time_s": round(float(frame.pts), 6), "coefs": coefs})


def _latency(segment: Segment | None) -> str:
    if segment is None or segment.voice_ms is None or segment.video_ms is None:
        return "nothing was said"
    return f"first sound after {segment.voice_ms:.0f} ms, first speaking frame after {segment.video_ms:.0f} ms"


def _rigs(places: Sequence[str]) -> list[tuple[str, tuple[str, int]]]:
    """Kinds and addresses of the rigs that are reached over the network."""
    from streamdiff.avatar.mocap import rig_address

    return [rig for rig in map(rig_address, places) if rig is not None]


def _rig_files(places: Sequence[str]) -> list[Path]:
    from streamdiff.avatar.mocap import PORTS

    return [Path(place) for place in places if place.partition(":")[0] not in PORTS]


def _check_outputs(args: argparse.Namespace) -> None:
    """What is written must not be what is read, nor be written twice."""
    inputs = (args.avatar, args.audio, args.motion)
    refuse_overwriting(args.out, inputs)
    for rig in _rig_files(args.rig):
        refuse_overwriting(rig, inputs, what="--rig")
    sheet = None if args.no_sheet else args.out.with_suffix(".png")
    if sheet is not None:
        refuse_overwriting(sheet, inputs, what="the contact sheet of --out")
    outputs = [args.out, sheet]
    for rig in _rig_files(args.rig):
        if rig in outputs:
            raise ConfigError(f"--rig {rig} is also the name of another output; choose another one")
        outputs.append(rig)


@contextlib.contextmanager
def _open_text(path: Path) -> Generator[TextIO]:
    with Output(path, keeps_part=True) as output:
        file = output.part.open("w", encoding="utf-8")
        try:
            yield file
        finally:
            try:
                file.close()
            except OSError as error:
                raise InputError(f"cannot write {path}: {error.strerror}; free some space") from error
