"""What the command line does with an avatar: ``streamdiff talk`` and ``streamdiff avatar ...``.

`register` adds the commands to an `argparse` parser; each sets ``run``, a function from the parsed arguments to the
exit status. Errors leave as `StreamdiffError`.
"""

from __future__ import annotations

import argparse
import functools
import json
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import numpy as np
import torch
from torch import Tensor

from streamdiff import demo
from streamdiff.arrays import Floats
from streamdiff.avatar.engine import AvatarEngine
from streamdiff.avatar.kinematics import FPS, KinematicSpec, frame_to_osc, json_lines
from streamdiff.avatar.stream import AvatarStream, Renderer
from streamdiff.avatar.style import STYLE_NAMES, style_vector
from streamdiff.avatar.window import load_motion
from streamdiff.errors import ConfigError, InputError
from streamdiff.media import VideoWriter, contact_sheet, read_audio
from streamdiff.stream import Segment, Shown
from streamdiff.tensorfile import printable
from streamdiff.voice import RATE_HZ, open_voice

if TYPE_CHECKING:
    from streamdiff.avatar.bundle import IdentityBundle

_TEXT = "Hello! A moment ago I was only a photograph. Every movement that you see was made on this machine."
_LEAD_FRAMES, _TAIL_FRAMES = 8, 14
_WRITE_FRAMES = FPS
_AUDIO_AHEAD_S = 4.0
_SHEET_FRAMES, _SHEET_COLUMNS = 24, 6
_MARK = "synthetic"
BUNDLE_SUFFIX = ".avatar"


class Fit(Protocol):
    """Makes a bundle from a clip; `streamdiff.training.avatar.fit.fit_bundle`, on a floor above this one."""

    def __call__(
        self, video: str | Path, *, size: int, minutes: float, device: str
    ) -> tuple[IdentityBundle, object]: ...


def register(commands: Any, *, fit: Fit | None = None) -> None:
    """Add ``talk`` and ``avatar`` to the sub-commands of a parser (what ``add_subparsers`` returned).

    ``avatar fit`` exists where ``fit`` is given.
    """
    _add_talk(commands)
    avatar = commands.add_parser("avatar", help="make, fit and look at avatars")
    actions = avatar.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_create(actions)
    if fit is not None:
        _add_fit(actions, fit)
    _add_voice(actions)
    _add_inspect(actions)


def _add_talk(commands: Any) -> None:
    talk = commands.add_parser(
        "talk",
        help="a photo says a text, on this machine",
        description="Make a video of a face that says a text, or a sound file. Needs no GPU.",
    )
    add = talk.add_argument
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
    add("--seed", type=int, default=0, help="of the motion (default: %(default)s)")
    add(
        "--style",
        default="",
        metavar="NAME=X,...",
        help=f"how it moves, 0 is ordinary (default: as the bundle says): {', '.join(STYLE_NAMES)}",
    )
    add("--mark", action="store_true", help=f"write '{_MARK}' into the corner of every frame")
    add("--rig", type=Path, metavar="FILE", help="also write the coefficients, JSON lines with ARKit names")
    add("--osc", metavar="HOST:PORT", help="also send the coefficients by OSC over UDP, in real time")
    add("--motion", type=Path, metavar="FILE", help="weights of the motion model (default: those of the package)")
    add("--no-sheet", action="store_true", help="write no contact sheet (a PNG beside the video)")
    add("--threads", type=int, default=1, help="threads of each stage (default: %(default)s)")
    talk.set_defaults(run=run_talk)


def _add_create(actions: Any) -> None:
    create = actions.add_parser("create", help="make a bundle from one photo")
    create.add_argument("--photo", type=Path, required=True, help="a photo of one person who faces the camera")
    create.add_argument("--out", type=Path, help="the bundle to write (default: PHOTO.avatar)")
    create.add_argument("--size", type=int, choices=(256, 512), default=256, help="pixels along a side")
    create.add_argument("--name", help="of the person (default: the file's)")
    create.set_defaults(run=run_create)


def _add_fit(actions: Any, fit: Fit) -> None:
    parser = actions.add_parser(
        "fit",
        help="make a bundle from a clip of one person: the face, the mouth, and the manner",
        description="Learn a person's mouth and manner from a clip of about a minute. The same engine plays the "
        "bundle; it costs no more than one made from a photo.",
    )
    parser.add_argument("--video", type=Path, required=True, help="one person, mostly facing the camera, speaking")
    parser.add_argument("--out", type=Path, help="the bundle to write (default: CLIP.avatar)")
    parser.add_argument("--size", type=int, choices=(256, 512), default=256, help="pixels along a side")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="of training (default: %(default)s)")
    parser.set_defaults(run=functools.partial(run_fit, fit=fit))


def _add_voice(actions: Any) -> None:
    parser = actions.add_parser(
        "voice",
        help="give a Kokoro voice the timbre of a recording",
        description="Search the mixtures of known voices for the one that sounds like a recording. Only the timbre "
        "half of the style is fitted; rhythm and melody stay those of the voice it begins with. Ask the speaker first.",
    )
    parser.add_argument("--recording", type=Path, required=True, help="ten seconds or more of one speaker")
    parser.add_argument("--model", type=Path, required=True, help="Kokoro-82M as ONNX")
    parser.add_argument("--voices", type=Path, required=True, help="known voices, an .npz of [510, 1, 256] each")
    parser.add_argument("--encoder", type=Path, required=True, help="pretrained.pt of Resemblyzer 0.1.4")
    parser.add_argument("--base", metavar="NAME", help="the voice that gives the prosody (default: the first)")
    parser.add_argument("--rounds", type=int, default=6, help="of search, 12 sentences each (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="the voice to write (.npz)")
    parser.set_defaults(run=run_voice)


def _add_inspect(actions: Any) -> None:
    inspect = actions.add_parser("inspect", help="say what a bundle holds, as JSON")
    inspect.add_argument("bundle", type=Path, metavar="FILE", help="a bundle")
    inspect.set_defaults(run=run_inspect)


def open_bundle(path: Path | None, *, size: int = 256) -> IdentityBundle:
    """A bundle from a bundle file or a photo; None: the photo of the demo."""
    from streamdiff.avatar.bundle import IdentityBundle
    from streamdiff.avatar.identity import create_bundle

    path = path if path is not None else demo.demo_image()
    if path.suffix == BUNDLE_SUFFIX:
        return IdentityBundle.load(path)
    return create_bundle(path, size)


@dataclass(frozen=True)
class Person:
    """Who is to be seen, and how this person moves."""

    renderer: Renderer
    name: str
    style: Mapping[str, float]


def open_person(path: Path | None, *, size: int = 256) -> Person:
    """The person of a bundle or a photo; None: of the photo of the demo."""
    from streamdiff.avatar.render import WarpRenderer

    bundle = open_bundle(path, size=size)
    return Person(WarpRenderer(bundle), bundle.name, bundle.style)


def run_create(args: argparse.Namespace) -> int:
    """``streamdiff avatar create``."""
    from streamdiff.avatar.identity import create_bundle

    out = args.out or args.photo.with_suffix(BUNDLE_SUFFIX)
    _check_suffix(out, BUNDLE_SUFFIX)
    _save(create_bundle(args.photo, args.size, name=args.name), out)
    return 0


def run_fit(args: argparse.Namespace, *, fit: Fit) -> int:
    """``streamdiff avatar fit``."""
    out = args.out or args.video.with_suffix(BUNDLE_SUFFIX)
    _check_suffix(out, BUNDLE_SUFFIX)
    torch.set_num_threads(1)
    bundle, report = fit(args.video, size=args.size, minutes=args.minutes, device=args.device)
    _save(bundle, out)
    _write(str(report))
    return 0


def _save(bundle: IdentityBundle, out: Path) -> None:
    try:
        bundle.save(out)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error}; choose another place") from error
    _write(f"{out}: {printable(bundle.name)}, {bundle.size}x{bundle.size}, sha256 {bundle.sha256[:16]}")


def run_voice(args: argparse.Namespace) -> int:
    """``streamdiff avatar voice``."""
    from streamdiff.voice.encoder import GE2EEncoder
    from streamdiff.voice.timbre import fit_voice

    _check_suffix(args.out, ".npz")
    if args.rounds < 1:
        raise ConfigError(f"--rounds must be at least 1, got {args.rounds}")
    sound_S = torch.cat([torch.zeros(0), *read_audio(args.recording, RATE_HZ)]).numpy()
    styles_P256, score = fit_voice(
        args.model,
        args.voices,
        sound_S,
        RATE_HZ,
        GE2EEncoder(args.encoder),
        base=args.base,
        num_rounds=args.rounds,
    )
    arrays: dict[str, Any] = {args.out.stem: styles_P256[:, None]}
    try:
        np.savez(args.out, **arrays)
    except OSError as error:
        raise InputError(f"cannot write {args.out}: {error}; choose another place") from error
    _write(f"{args.out}: similarity to the recording {score:.3f}; speak with --voice kokoro:{args.model}:{args.out}")
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    """``streamdiff avatar inspect``."""
    from streamdiff.avatar.bundle import IdentityBundle

    _write(json.dumps(IdentityBundle.load(args.bundle).inspect(), indent=1))
    return 0


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


def run_talk(args: argparse.Namespace) -> int:
    """``streamdiff talk``."""
    if args.text is not None and args.audio is not None:
        raise ConfigError("give a text or --audio, not both")
    if args.threads < 1:
        raise ConfigError(f"--threads must be at least 1, got {args.threads}")
    _check_suffix(args.out, ".mp4")
    style, host = style_from(args.style), _host(args.osc)
    torch.set_num_threads(args.threads)
    # Opened first: what is wrong with a sound file is said before anything is made.
    sound = None if args.audio is None else _seconds(read_audio(args.audio, RATE_HZ))
    person = open_person(args.avatar, size=args.size)
    renderer = person.renderer
    voice = open_voice(args.voice) if sound is None else None
    style = {**person.style, **style}
    engine = AvatarEngine(renderer, voice=voice, motion=load_motion(args.motion), style=style)
    began_s = time.monotonic()
    with ExitStack() as stack:
        stream = stack.enter_context(engine.stream(seed=args.seed, realtime=host is not None))
        frames = _spoken(stream, args.text, sound)
        tags = {"title": "streamdiff talk", "artist": printable(person.name)}
        writer = stack.enter_context(
            VideoWriter(args.out, width=renderer.size, height=renderer.size, fps=FPS, rate_hz=RATE_HZ, metadata=tags)
        )
        rig = None if args.rig is None else stack.enter_context(_open_text(args.rig))
        sheet = Sheet(_SHEET_FRAMES)
        film = _Film(writer, renderer.size if args.mark else None)
        spoken: Segment | None = None
        wire = None if host is None else stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        spec = stream.spec
        if rig is not None:
            rig.writelines(line + "\n" for line in json_lines(np.zeros((0, spec.num_coefs), np.float32), spec))
        for frame, segment in frames:
            spoken = segment or spoken
            film.add(frame)
            if rig is not None:
                rig.write(_rig_line(frame, spec) + "\n")
            if wire is not None and host is not None:
                assert frame.motion_AE is not None
                wire.sendto(frame_to_osc(frame.motion_AE[0], spec), host)
            if frame.state == "speaking":
                sheet.add(torch.from_numpy(frame.frames_THWC[0]))
        film.finish()
    took_s = time.monotonic() - began_s
    _write(
        f"{args.out}: {writer.num_frames} frames, {writer.duration_s:.2f} s at {renderer.size}x{renderer.size}, "
        f"{writer.num_frames / took_s:.0f} frames/s; {_latency(spoken)}"
    )
    if not args.no_sheet and len(sheet):
        path = args.out.with_suffix(".png")
        contact_sheet(sheet.frames_THWC(), path, columns=_SHEET_COLUMNS)
        _write(f"{path}: contact sheet")
    return 0


def _spoken(
    stream: AvatarStream, text: str | None, sound: Iterator[Tensor] | None
) -> Iterator[tuple[Shown, Segment | None]]:
    """A breath of idling, the words, and a breath after them. Raises what the voice failed with."""
    frames = stream.frames()
    for _ in range(_LEAD_FRAMES):
        yield next(frames), None
    if sound is None:
        segment = stream.say(sys.stdin if text == "-" else text if text is not None else _TEXT)
        while not segment.done:
            yield next(frames), segment
    else:
        segment = None
        block_S = next(sound, None)
        while block_S is not None or segment is None or not segment.done:
            while block_S is not None and (segment is None or segment.queued_s < _AUDIO_AHEAD_S):
                following_S = next(sound, None)
                segment = stream.push_audio(block_S.numpy(), RATE_HZ, last=following_S is None)
                block_S = following_S
            assert segment is not None
            yield next(frames), segment
    if segment.error is not None:
        raise segment.error
    for _ in range(_TAIL_FRAMES):
        yield next(frames), segment


def _seconds(sound: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same sound in blocks of a second."""
    held: list[Tensor] = []
    for block_S in sound:
        held.append(block_S)
        if sum(map(len, held)) >= RATE_HZ:
            yield torch.cat(held)
            held = []
    yield torch.cat([*held, torch.zeros(0)])


class _Film:
    """Frames on their way into a file, a second at a time."""

    def __init__(self, writer: VideoWriter, marked_size: int | None) -> None:
        self._writer = writer
        self._mark = None if marked_size is None else mark_of(marked_size)
        self._pictures: list[Tensor] = []
        self._sounds: list[Floats] = []

    def add(self, frame: Shown) -> None:
        picture = torch.from_numpy(frame.frames_THWC[0])
        self._pictures.append(picture if self._mark is None else marked(picture, self._mark))
        self._sounds.append(frame.sound_S)
        if len(self._pictures) == _WRITE_FRAMES:
            self.finish()

    def finish(self) -> None:
        if self._pictures:
            sound_S = torch.from_numpy(np.concatenate(self._sounds))
            self._writer.write(torch.stack(self._pictures), sound_S)
        self._pictures, self._sounds = [], []


class Sheet:
    """Evenly spread frames of a film whose length nobody knows yet; holds at most twice ``count``."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: list[Tensor] = []
        self._stride = 1
        self._seen = 0

    def add(self, picture_HW3: Tensor) -> None:
        """Look at one more frame."""
        if self._seen % self._stride == 0:
            self._kept.append(picture_HW3.cpu())
        self._seen += 1
        if len(self._kept) > 2 * self._count:
            self._kept, self._stride = self._kept[::2], 2 * self._stride

    def __len__(self) -> int:
        return min(self._count, len(self._kept))

    def frames_THWC(self) -> Tensor:  # noqa: N802
        """The chosen frames."""
        chosen = np.linspace(0, len(self._kept) - 1, len(self)).round().astype(int).tolist()
        return torch.stack([self._kept[i] for i in chosen])


def mark_of(size: int) -> Tensor:
    """The visible mark for a frame of this size: how white each pixel becomes, ``[H, W]`` 0..1."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("L", (size, size))
    font = ImageFont.load_default(max(10, size // 20))
    ImageDraw.Draw(image).text((size // 40, size - size // 40), _MARK, fill=190, font=font, anchor="ls")
    return torch.from_numpy(np.asarray(image).copy()).float() / 255


def marked(picture_HW3: Tensor, mark_HW: Tensor) -> Tensor:
    """A frame with the mark on it; the input is left as it was."""
    strength = mark_HW[..., None]
    return (picture_HW3.float() * (1 - strength) + 255 * strength).round().to(torch.uint8)


def _rig_line(frame: Shown, spec: KinematicSpec) -> str:
    assert frame.motion_AE is not None
    coefs = {name: round(value, 6) for name, value in spec.named(frame.motion_AE[0]).items()}
    return json.dumps({"frame": frame.index, "time_s": round(float(frame.pts), 6), "coefs": coefs})


def _latency(segment: Segment | None) -> str:
    if segment is None or segment.voice_ms is None or segment.video_ms is None:
        return "nothing was said"
    return f"first sound after {segment.voice_ms:.0f} ms, first speaking frame after {segment.video_ms:.0f} ms"


def _host(text: str | None) -> tuple[str, int] | None:
    if text is None:
        return None
    name, _, port = text.rpartition(":")
    if not name or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--osc looks like 127.0.0.1:9000, got {text!r}")
    return name, int(port)


def _check_suffix(path: Path, suffix: str) -> None:
    if path.suffix != suffix:
        raise ConfigError(f"{path} must end in {suffix}; try {path.with_suffix(suffix)}")


def _open_text(path: Path) -> TextIO:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another place") from error


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
