"""``streamdiff avatar key|sign|consent``: who made a bundle, and who agrees to be shown."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamdiff.errors import ConfigError, InputError
from streamdiff.facts import printable
from streamdiff.options import Number

if TYPE_CHECKING:
    from streamdiff.avatar.bundle import IdentityBundle

_MOST_DAYS = 3_660.0


def add_actions(actions: Any) -> None:
    """The actions of ``streamdiff avatar`` that sign."""
    key = actions.add_parser("key", help="make a pair of keys to sign with: FILE, and FILE.pub for others")
    key.add_argument("file", type=Path, metavar="FILE", help="the private key to write; keep it to yourself")
    key.add_argument("--name", default="", help="whose key it is (default: the file's name)")
    key.set_defaults(run=run_key)
    sign = actions.add_parser("sign", help="sign a bundle: whoever has your public key sees that it is yours")
    sign.add_argument("bundle", type=Path, metavar="FILE", help="a bundle; it is written anew")
    sign.add_argument("--key", type=Path, required=True, metavar="KEYFILE", help="your private key")
    sign.add_argument("--name", default="", help="who signs")
    sign.set_defaults(run=run_sign)
    consent = actions.add_parser("consent", help="put a signed record of consent into a bundle")
    consent.add_argument("bundle", type=Path, metavar="FILE", help="a bundle; it is written anew")
    consent.add_argument("--key", type=Path, required=True, metavar="KEYFILE", help="private key of who grants it")
    consent.add_argument("--subject", required=True, metavar="WHO", help="the person who is shown")
    add_consent_arguments(consent)
    consent.set_defaults(run=run_consent)


def add_consent_arguments(parser: argparse.ArgumentParser) -> None:
    """What a consent is made of besides key and person."""
    parser.add_argument("--granted-by", default="", metavar="WHO", help="who agrees, if not the person in the picture")
    parser.add_argument("--scope", default="film live", help='for what: "film", "live" (default: "%(default)s")')
    parser.add_argument(
        "--days", type=Number(0, 36_525, above=True), default=365.0, help="how long it lasts (default: %(default)g)"
    )


def run_key(args: argparse.Namespace) -> int:
    """``streamdiff avatar key``."""
    from streamdiff.trust.keys import make_key

    public = make_key(args.file, args.name)
    sys.stdout.write(f"{args.file}: keep it; {args.file}.pub: give it to whoever should trust you\n{public.line}\n")
    sys.stdout.write(f"{public.fingerprint}\n")
    return 0


def run_sign(args: argparse.Namespace) -> int:
    """``streamdiff avatar sign``."""
    from streamdiff.avatar.bundle import IdentityBundle

    _rewrite(signed(IdentityBundle.load(args.bundle), args.key, args.name), args.bundle)
    return 0


def run_consent(args: argparse.Namespace) -> int:
    """``streamdiff avatar consent``."""
    from streamdiff.avatar.bundle import IdentityBundle

    _rewrite(consented(IdentityBundle.load(args.bundle), args.key, args.subject, args), args.bundle)
    return 0


def signed(bundle: IdentityBundle, key: Path, name: str) -> IdentityBundle:
    """The bundle with a maker's signature."""
    from streamdiff.trust.consent import sign
    from streamdiff.trust.keys import read_key

    return _with(bundle, sign(read_key(key), bundle.sha256, name=name))


def consented(bundle: IdentityBundle, key: Path, subject: str, args: argparse.Namespace) -> IdentityBundle:
    """The bundle with a record of consent, of the options that `add_consent_arguments` added."""
    from streamdiff.trust.consent import grant
    from streamdiff.trust.keys import read_key

    if not 0 < args.days <= _MOST_DAYS:
        raise ConfigError(f"--days must lie in 0..{_MOST_DAYS:g}, got {args.days:g}")
    scope = " ".join(args.scope.replace(",", " ").split())
    expires = datetime.now(UTC) + timedelta(days=args.days)
    envelope = grant(
        read_key(key), bundle.sha256, subject=subject, granted_by=args.granted_by, scope=scope, expires=expires
    )
    return _with(bundle, envelope)


def _with(bundle: IdentityBundle, envelope: str) -> IdentityBundle:
    from streamdiff.trust.consent import MOST_STATEMENTS

    if len(bundle.statements) >= MOST_STATEMENTS:
        raise InputError(f"the bundle holds {len(bundle.statements)} statements, no more fit in; make it anew")
    return replace(bundle, statements=(*bundle.statements, envelope))


def _rewrite(bundle: IdentityBundle, path: Path) -> None:
    from streamdiff.trust.consent import describe

    try:
        bundle.save(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another place") from error
    said = describe(bundle.statements, bundle.sha256)[-1]
    shown = ", ".join(f"{name} {said[name]}" for name in ("subject", "scope", "expires", "id", "key") if name in said)
    sys.stdout.write(f"{printable(path, 300)}: {said['kind']}: {shown}\n")
