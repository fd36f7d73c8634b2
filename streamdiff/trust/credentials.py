"""Content credentials (C2PA 2) of finished films: who made one, that a model made it, and that nobody changed it since.

The manifest lies in the MP4, and frames and sound stay as they are. Nothing is fetched from anywhere: no time stamp is
asked for when signing, no remote manifest or revocation when verifying.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamdiff.errors import BackendError, InputError
from streamdiff.facts import parse_json, printable
from streamdiff.output import replacing
from streamdiff.trust.keys import read_small

if TYPE_CHECKING:
    from c2pa import C2paSignerInfo
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes

_KIND = "video/mp4"
_MADE_BY_A_MODEL = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's word for what a trained model has made."""
_OFFLINE = {"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}}
_MOST_PEM_BYTES = 1 << 20
_CURVES = {"secp256r1": b"es256", "secp384r1": b"es384", "secp521r1": b"es512"}


class State(StrEnum):
    """What the credentials of a film are worth."""

    TRUSTED = "trusted"
    """Whole, and signed by somebody whose root is trusted."""
    VALID = "valid"
    """Whole since somebody signed it; who that is, nobody vouches for."""
    TAMPERED = "tampered"
    """Not what was signed."""
    UNSIGNED = "unsigned"
    """There are no credentials: they were never there, or were taken out."""


@dataclass(frozen=True, slots=True)
class FilmVerdict:
    """What was found in a film."""

    state: State
    signer: str = ""
    """Name in the certificate; says nothing unless the state is trusted."""
    tool: str = ""
    why: tuple[str, ...] = ()
    """C2PA's codes of what is wrong, with a word to each."""


class FilmSigner:
    """A certificate chain and its private key, checked before anything slow begins.

    Args:
        chain: PEM, the signer's certificate first, then those up to the root (which may be left out).
        key: PEM, its private key: ECDSA (P-256, P-384, P-521), Ed25519 or RSA, without a password.

    Raises:
        InputError: they do not belong together, or C2PA does not take such a certificate. BackendError: no c2pa-python.
    """

    def __init__(self, chain: str | Path, key: str | Path) -> None:
        _need_c2pa()
        chain_pem = read_small(chain, "a certificate chain", _MOST_PEM_BYTES)
        key_pem = read_small(key, "a private key", _MOST_PEM_BYTES)
        self._info = _signer_info(chain_pem, key_pem, Path(chain), Path(key))

    def sign(self, film: str | Path, *, version: str) -> None:
        """Sign a finished MP4, in its place: it is written anew beside its name and renamed.

        Raises:
            InputError: it cannot be signed; the film stays as it was.
        """
        from c2pa import Builder, C2paError, Signer

        film = Path(film)
        manifest = json.dumps(_manifest(film.name, version))
        with replacing(film) as part:
            try:
                with (
                    Signer.from_info(self._info) as signer,
                    Builder(manifest) as builder,
                    film.open("rb") as source,
                    part.open("w+b") as signed,
                ):
                    builder.sign(signer, _KIND, source, signed)
            except C2paError as error:
                raise InputError(
                    f"{printable(film, 300)} is there, but not signed: {printable(error, 300)}; C2PA wants a "
                    "certificate with the key usage digitalSignature and an extended one such as emailProtection"
                ) from error


def verify_film(film: str | Path, *, roots: str | Path | None = None) -> FilmVerdict:
    """Check the credentials of a film, which may come from anybody.

    Args:
        film: an MP4.
        roots: PEM, certificates of the roots that are trusted; None: nobody is.

    Raises:
        InputError: there is no such file, or no such roots. BackendError: no c2pa-python.
    """
    _need_c2pa()
    from c2pa import C2paError, Context, Reader, Settings

    film = Path(film)
    if not film.is_file() or not _is_mp4(film):
        raise InputError(f"{printable(film, 300)} is no MP4; give a film")
    settings: dict[str, Any] = dict(_OFFLINE)
    if roots is not None:
        pem = read_small(roots, "certificates", _MOST_PEM_BYTES)
        _certificates(pem, Path(roots))
        settings["trust"] = {"user_anchors": pem.decode("ascii", "replace")}
    context = Context(settings=Settings.from_dict(settings))
    try:
        with film.open("rb") as file, Reader(_KIND, file, context=context) as reader:
            return _verdict(parse_json(reader.json()))
    except C2paError as error:
        if str(error).startswith("ManifestNotFound"):
            return FilmVerdict(State.UNSIGNED)
        return FilmVerdict(State.TAMPERED, why=(f"its credentials cannot be read: {printable(error, 200)}",))
    except OSError as error:
        raise InputError(f"cannot read {printable(film, 300)}: {error.strerror}") from error


def _is_mp4(film: Path) -> bool:
    try:
        with film.open("rb") as file:
            return file.read(8)[4:] == b"ftyp"
    except OSError as error:
        raise InputError(f"cannot read {printable(film, 300)}: {error.strerror}") from error


def _verdict(report: Mapping[str, Any]) -> FilmVerdict:
    manifest = report.get("manifests", {}).get(report.get("active_manifest"), {})
    signed = manifest.get("signature_info", {})
    signer = ", ".join(printable(signed[name]) for name in ("common_name", "issuer") if signed.get(name))
    tool = " ".join(printable(i.get("name", "")) for i in manifest.get("claim_generator_info", [])[:2])
    faults = [
        f"{printable(status.get('code', ''))}: {printable(status.get('explanation', ''), 200)}"
        for status in report.get("validation_status", [])[:8]
    ]
    state = {"Trusted": State.TRUSTED, "Valid": State.VALID}.get(report.get("validation_state", ""), State.TAMPERED)
    return FilmVerdict(state, signer, tool, tuple(faults))


def _manifest(title: str, version: str) -> dict[str, Any]:
    made = {"action": "c2pa.created", "digitalSourceType": _MADE_BY_A_MODEL}
    return {
        "claim_generator_info": [{"name": "streamdiff", "version": version}],
        "format": _KIND,
        "title": title,
        "assertions": [{"label": "c2pa.actions", "data": {"actions": [made]}}],
    }


def _signer_info(chain_pem: bytes, key_pem: bytes, chain: Path, key: Path) -> C2paSignerInfo:
    from c2pa import C2paSignerInfo
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    leaf = _certificates(chain_pem, chain)[0]
    try:
        private = load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise InputError(f"{printable(key, 300)} holds no private key in PEM without a password") from None
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if private.public_key().public_bytes(*form) != leaf.public_key().public_bytes(*form):
        raise InputError(
            f"{printable(key, 300)} is not the key of the first certificate in {printable(chain, 300)}; "
            "the signer's certificate comes first"
        )
    now = datetime.now(UTC)
    if not leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
        raise InputError(
            f"the certificate in {printable(chain, 300)} is valid from {leaf.not_valid_before_utc:%Y-%m-%d} to "
            f"{leaf.not_valid_after_utc:%Y-%m-%d}, not now"
        )
    if leaf.issuer == leaf.subject:
        raise InputError(
            f"the first certificate in {printable(chain, 300)} signs itself; C2PA wants one that a root issued"
        )
    return C2paSignerInfo(_algorithm(leaf.public_key()), chain_pem, key_pem, None)


def _algorithm(public: CertificatePublicKeyTypes) -> bytes:
    """C2PA's name for the signatures of such a key."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    match public:
        case ec.EllipticCurvePublicKey() if public.curve.name in _CURVES:
            return _CURVES[public.curve.name]
        case ed25519.Ed25519PublicKey():
            return b"ed25519"
        case rsa.RSAPublicKey():
            return b"ps256"
        case _:
            raise InputError(
                "films are signed with ECDSA (P-256, P-384, P-521), Ed25519 or RSA keys, not with this one"
            )


def _certificates(pem: bytes, path: Path) -> list[x509.Certificate]:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise InputError(f"{printable(path, 300)} holds no certificate in PEM") from None


def _need_c2pa() -> None:
    try:
        import c2pa
        import cryptography
    except ImportError as error:
        raise BackendError(f"content credentials need {error.name}; pip install 'streamdiff[trust]'") from None
    del c2pa, cryptography
