"""Ed25519 keys (RFC 8032) and signed statements in DSSE envelopes.

A private key is a PEM file (PKCS #8) or one of OpenSSH's, without a password; public keys are OpenSSH's lines,
``ssh-ed25519 BASE64 NAME``, one a line, as in ``authorized_keys``. The envelope is DSSE 1.0
(https://github.com/secure-systems-lab/dsse): the kind of a statement is signed with it, so that a signature for one
kind is none for another.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from streamdiff.errors import BackendError, InputError
from streamdiff.facts import parse_json, printable

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_MOST_KEY_BYTES = 1 << 20
_MOST_KEYS = 10_000
MOST_ENVELOPE = 16_384
"""Characters of one envelope."""
_SSH_KIND = b"\x00\x00\x00\x0bssh-ed25519\x00\x00\x00\x20"


def need_cryptography() -> None:
    """Raise `BackendError` where signatures cannot be made or checked."""
    try:
        import cryptography
    except ImportError:
        raise BackendError("signatures need cryptography; pip install 'streamdiff[trust]'") from None
    del cryptography


@dataclass(frozen=True, slots=True)
class PublicKey:
    """Whom a signature belongs to."""

    raw: bytes
    """32 bytes."""
    name: str = ""
    """As its owner calls it; says nothing by itself."""

    @property
    def fingerprint(self) -> str:
        """As ``ssh-keygen -l`` shows it: ``SHA256:...``."""
        digest = hashlib.sha256(_SSH_KIND + self.raw).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")

    @property
    def line(self) -> str:
        """As it stands in a file of trusted keys."""
        return f"ssh-ed25519 {base64.b64encode(_SSH_KIND + self.raw).decode()} {printable(self.name, 200)}".rstrip()


@dataclass(frozen=True, slots=True)
class Statement:
    """What was signed, by whom. It was verified: there is no other way to one."""

    kind: str
    payload: bytes
    key: PublicKey


class SigningKey:
    """A private key that was read from a file."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public = PublicKey(private.public_key().public_bytes_raw())

    def seal(self, kind: str, payload: bytes) -> str:
        """The payload in an envelope, as one line of JSON."""
        return _envelope(kind, payload, self.public.raw, self._private.sign(_to_sign(kind, payload)))


def make_key(path: str | Path, name: str = "") -> PublicKey:
    """Write a new private key to ``path`` (readable by its owner only) and its public half to ``path.pub``.

    Raises:
        InputError: either file is there already, or cannot be written.
    """
    need_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.generate()
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = Path(path)
    public = PublicKey(private.public_key().public_bytes_raw(), name or path.stem)
    beside = path.with_name(path.name + ".pub")
    for file, data, mode in ((path, pem, 0o600), (beside, f"{public.line}\n".encode(), 0o644)):
        try:
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as out:
                out.write(data)
        except FileExistsError:
            raise InputError(f"{file} is there already; a key is never overwritten, choose another name") from None
        except OSError as error:
            raise InputError(f"cannot write {file}: {error.strerror}; choose another place") from error
    return public


def read_key(path: str | Path) -> SigningKey:
    """A private key. InputError: no Ed25519 key, or one with a password."""
    need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    data = read_small(path, "a private key")
    ssh = b"OPENSSH PRIVATE KEY" in data[:200]
    load = serialization.load_ssh_private_key if ssh else serialization.load_pem_private_key
    try:
        private = load(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        private = None
    if not isinstance(private, Ed25519PrivateKey):
        raise InputError(
            f"{printable(path, 300)} holds no Ed25519 private key without a password; "
            "make one with: streamdiff avatar key FILE"
        )
    return SigningKey(private)


def read_public_keys(path: str | Path) -> tuple[PublicKey, ...]:
    """The keys of a file, one a line; ``#`` begins a comment.

    Raises:
        InputError: no such file, no key in it, or a line that is none.
    """
    found: list[PublicKey] = []
    for number, line in enumerate(read_small(path, "public keys").decode("utf-8", "replace").splitlines(), 1):
        words = line.split("#")[0].split(maxsplit=2)
        if not words:
            continue
        blob = _decoded(words[1]) if words[0] == "ssh-ed25519" and len(words) > 1 else None
        if blob is None or len(blob) != len(_SSH_KIND) + 32 or not blob.startswith(_SSH_KIND):
            raise InputError(
                f"{printable(path, 300)}: line {number} is no public key; one looks like: ssh-ed25519 AAAA... NAME"
            )
        found.append(PublicKey(blob[len(_SSH_KIND) :], words[2].strip() if len(words) > 2 else ""))
    if not 0 < len(found) <= _MOST_KEYS:
        raise InputError(f"{printable(path, 300)} holds {len(found)} public keys; give 1 to {_MOST_KEYS}, one a line")
    return tuple(found)


def unseal(envelope: str) -> Statement:
    """Verify an envelope against the key that it names. Whether to trust that key is another question.

    Raises:
        InputError: no envelope, or its signature does not belong to its words.
    """
    need_cryptography()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    kind, payload, raw, signature = _parts(envelope)
    try:
        Ed25519PublicKey.from_public_bytes(raw).verify(signature, _to_sign(kind, payload))
    except (InvalidSignature, ValueError):
        raise InputError("its signature does not belong to its words: one of them was altered") from None
    return Statement(kind, payload, PublicKey(raw))


def _to_sign(kind: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding."""
    name = kind.encode()
    return b"DSSEv1 %d %b %d %b" % (len(name), name, len(payload), payload)


def _envelope(kind: str, payload: bytes, raw: bytes, signature: bytes) -> str:
    text, key, sig = (base64.b64encode(part).decode() for part in (payload, raw, signature))
    envelope = {"payloadType": kind, "payload": text, "signatures": [{"keyid": f"ed25519:{key}", "sig": sig}]}
    return json.dumps(envelope, separators=(",", ":"))


def _parts(envelope: str) -> tuple[str, bytes, bytes, bytes]:
    """Kind, payload, key and signature. One text only has these parts, so that no other passes for it."""
    if len(envelope) > MOST_ENVELOPE:
        _no_envelope()
    try:
        values = parse_json(envelope)
    except ValueError:
        _no_envelope()
    match values:
        case {"payloadType": str(kind), "payload": str(text), "signatures": [{"keyid": str(key), "sig": str(sig)}]}:
            decoded = [_decoded(part) for part in (text, key.removeprefix("ed25519:"), sig)]
        case _:
            _no_envelope()
    body, raw, mark = (part or b"" for part in decoded)
    if len(raw) != 32 or len(mark) != 64 or _envelope(kind, body, raw, mark) != envelope:
        _no_envelope()
    return kind, body, raw, mark


def _no_envelope() -> NoReturn:
    raise InputError("it is no signed statement")


def _decoded(text: str) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return None


def read_small(path: str | Path, what: str, most_bytes: int = _MOST_KEY_BYTES) -> bytes:
    """A regular file of bounded size. InputError: it is none, with ``what`` it should have been."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{printable(path, 300)} is no file; give one that holds {what}")
    try:
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
    except OSError as error:
        raise InputError(f"cannot read {printable(path, 300)}: {error.strerror}") from error
    if len(data) > most_bytes:
        raise InputError(f"{printable(path, 300)} is larger than any file with {what}")
    return data
