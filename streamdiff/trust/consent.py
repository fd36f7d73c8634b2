"""Consent: a signed record inside a bundle that says who may be shown, for what, until when.

A record names the bundle by the hash of its content, so that it fits no other one. Whether it holds is decided with the
public keys that an operator trusts, a clock, and a list of what was withdrawn; the file itself is believed nothing.

A list of withdrawals is text, one per line: a record's id, ``bundle SHA256``, ``key SHA256:...`` (a fingerprint) or
``user NAME``; ``#`` begins a comment.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

from streamdiff.errors import BackendError, InputError
from streamdiff.facts import Facts, parse_json, printable
from streamdiff.trust.keys import PublicKey, SigningKey, Statement, read_small, unseal

CONSENT = "application/vnd.streamdiff.consent+json"
SIGNATURE = "application/vnd.streamdiff.signature+json"
SCOPES = ("film", "live")
"""What a person may agree to: films of it (``talk``), conversations with it (``serve``)."""
MOST_STATEMENTS = 16
_VERSION = 1
_MOST_WORDS = 300
_LEEWAY = timedelta(minutes=5)
_MOST_LIST_BYTES = 4 << 20


class ConsentError(InputError):
    """Nobody who is trusted agrees to what is asked for, or not any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Consent:
    """A person agrees to be shown."""

    bundle_sha256: str
    """Hash of the content of the bundle, `IdentityBundle.sha256`."""
    subject: str
    """Who is shown."""
    granted_by: str
    """Who agrees: the same person, or somebody who may speak for them."""
    scope: str
    """Words of `SCOPES`, with spaces between."""
    issued: datetime
    expires: datetime
    id: str
    """Names this record in a list of withdrawals."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.scope.split()) - set(SCOPES))
        if unknown or not self.scope.split():
            raise InputError(f"a scope is made of {' '.join(SCOPES)}, got {printable(self.scope)!r}")
        if self.expires <= self.issued:
            raise InputError(f"a consent that expires at {_text(self.expires)} ends before it begins")
        if not self.subject.strip() or not self.granted_by.strip():
            raise InputError("a consent names whom it is about and who gives it")

    @property
    def payload(self) -> bytes:
        """What is signed."""
        times = {"issued": _text(self.issued), "expires": _text(self.expires)}
        return json.dumps({"version": _VERSION, **asdict(self), **times}, sort_keys=True).encode()


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """What is not to be believed, or let in, any more."""

    records: frozenset[str] = frozenset()
    bundles: frozenset[str] = frozenset()
    keys: frozenset[str] = frozenset()
    users: frozenset[str] = frozenset()


def grant(
    key: SigningKey,
    bundle_sha256: str,
    *,
    subject: str,
    granted_by: str = "",
    scope: str = " ".join(SCOPES),
    expires: datetime,
    now: datetime | None = None,
) -> str:
    """A signed consent, as an envelope to put into the bundle. InputError: a record that could never hold."""
    consent = Consent(
        bundle_sha256=bundle_sha256,
        subject=subject[:_MOST_WORDS],
        granted_by=(granted_by or subject)[:_MOST_WORDS],
        scope=scope,
        issued=_whole(now or datetime.now(UTC)),
        expires=_whole(expires),
        id=secrets.token_hex(8),
    )
    return key.seal(CONSENT, consent.payload)


def sign(key: SigningKey, bundle_sha256: str, *, name: str = "", now: datetime | None = None) -> str:
    """A maker's signature: this key's owner made, or vouches for, this bundle."""
    facts = {
        "version": _VERSION,
        "bundle_sha256": bundle_sha256,
        "name": name[:_MOST_WORDS],
        "issued": _text(_whole(now or datetime.now(UTC))),
    }
    return key.seal(SIGNATURE, json.dumps(facts, sort_keys=True).encode())


def check_consent(
    statements: Sequence[str],
    bundle_sha256: str,
    *,
    trusted: Iterable[PublicKey],
    scope: str,
    withdrawn: Withdrawn | None = None,
    now: datetime | None = None,
) -> Consent:
    """The first consent among ``statements`` that holds for this bundle and this scope, now.

    Raises:
        ConsentError: none does; says why not.
    """
    known = {key.raw for key in trusted}
    faults: list[str] = []
    for envelope in statements[:MOST_STATEMENTS]:
        try:
            statement = unseal(envelope)
            if statement.kind != CONSENT:
                continue
            consent = _read_consent(statement)
            _check(consent, statement.key, bundle_sha256, known, withdrawn or Withdrawn(), now or datetime.now(UTC))
            if scope not in consent.scope.split():
                raise ConsentError(f"it is for {consent.scope}, not for {scope}")
        except InputError as error:
            faults.append(str(error))
        else:
            return consent
    if not faults:
        raise ConsentError("it holds no record of consent; make one with: streamdiff avatar consent")
    raise ConsentError("its consent does not hold: " + "; ".join(faults[:4]))


def describe(
    statements: Sequence[str], bundle_sha256: str, *, trusted: Iterable[PublicKey] = (), now: datetime | None = None
) -> list[dict[str, Any]]:
    """Every statement in a bundle for people to read: what it says, who signed it, whether it holds and why not."""
    known = {key.raw: key.name for key in trusted}
    return [_described(envelope, bundle_sha256, known, now or datetime.now(UTC)) for envelope in statements]


def read_withdrawn(path: str | Path) -> Withdrawn:
    """A list of withdrawals. InputError: it cannot be read, or a line of it is not understood."""
    data = read_small(path, "a list of withdrawals", _MOST_LIST_BYTES)
    found: dict[str, set[str]] = {kind: set() for kind in ("record", "bundle", "key", "user")}
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        if not (text := line.split("#")[0].strip()):
            continue
        kind, _, value = text.partition(" ") if " " in text else ("record", "", text)
        if kind not in found or not value.strip():
            raise InputError(
                f"{printable(path, 300)}: line {number} is neither a record's id nor bundle, key or user and a value"
            )
        found[kind].add(value.strip())
    return Withdrawn(*(frozenset(found[kind]) for kind in ("record", "bundle", "key", "user")))


def _described(envelope: str, sha256: str, known: dict[bytes, str], now: datetime) -> dict[str, Any]:
    try:
        statement = unseal(envelope)
    except BackendError as error:
        return {"holds": None, "why": f"not checked: {error}"}
    except InputError as error:
        return {"holds": False, "why": str(error)}
    facts: dict[str, Any] = {"kind": statement.kind.partition(".streamdiff.")[2].partition("+")[0] or "unknown"}
    facts |= {"key": statement.key.fingerprint, "trusted": statement.key.raw in known}
    if known.get(statement.key.raw):
        facts["key_name"] = printable(known[statement.key.raw])
    try:
        if statement.kind == CONSENT:
            consent = _read_consent(statement)
            facts |= {name: printable(getattr(consent, name)) for name in ("subject", "granted_by", "scope", "id")}
            facts["expires"] = _text(consent.expires)
            _check(consent, statement.key, sha256, {statement.key.raw}, Withdrawn(), now)
        elif statement.kind == SIGNATURE:
            signed = _facts(statement)
            facts |= {"name": printable(signed.words("name", _MOST_WORDS))}
            _check_bundle(signed.words("bundle_sha256", 64), sha256)
    except InputError as error:
        return {**facts, "holds": False, "why": str(error)}
    return {**facts, "holds": True}


def _check(
    consent: Consent, key: PublicKey, sha256: str, known: set[bytes], withdrawn: Withdrawn, now: datetime
) -> None:
    """Raise `ConsentError` unless the record holds for this bundle now, and its key is known."""
    _check_bundle(consent.bundle_sha256, sha256)
    if key.raw not in known:
        raise ConsentError(f"it is signed by {key.fingerprint}, which is not trusted here")
    if consent.expires <= now:
        raise ConsentError(f"it expired at {_text(consent.expires)}")
    if consent.issued > now + _LEEWAY:
        raise ConsentError(f"it begins at {_text(consent.issued)}, which is in the future")
    lists = ((consent.id, withdrawn.records), (sha256, withdrawn.bundles), (key.fingerprint, withdrawn.keys))
    if any(value in listed for value, listed in lists):
        raise ConsentError("it was withdrawn")


def _check_bundle(named: str, sha256: str) -> None:
    if named != sha256:
        raise ConsentError(f"it belongs to another bundle ({printable(named, 16)}), this one is {sha256[:16]}")


def _read_consent(statement: Statement) -> Consent:
    facts = _facts(statement)
    words = ("bundle_sha256", "subject", "granted_by", "scope", "id")
    facts.only((*words, "version", "issued", "expires"))
    issued, expires = (_time(facts.words(name, 40)) for name in ("issued", "expires"))
    return Consent(**{name: facts.words(name, _MOST_WORDS) for name in words}, issued=issued, expires=expires)


def _facts(statement: Statement) -> Facts:
    try:
        facts = Facts(parse_json(statement.payload), _fail)
    except ValueError as error:
        raise InputError(f"its words are no JSON ({error})") from None
    facts.whole("version", _VERSION, _VERSION)
    return facts


def _fail(why: str) -> NoReturn:
    raise InputError(f"its words make no statement: {why}")


def _time(text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise InputError(f"{printable(text)!r} is no time") from None
    if time.tzinfo is None:
        raise InputError(f"{printable(text)!r} names no time zone")
    return time.astimezone(UTC)


def _text(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _whole(time: datetime) -> datetime:
    return time.astimezone(UTC).replace(microsecond=0)
