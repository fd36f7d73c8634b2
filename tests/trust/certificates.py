"""Certificates of a root and of a signer that it vouches for, made for a test."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True)
class Holder:
    """A certificate and its key, in files."""

    certificate: x509.Certificate
    key: PrivateKey
    chain: Path
    key_file: Path


def named(name: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Test"), x509.NameAttribute(NameOID.COMMON_NAME, name)]
    )


def issue(
    folder: Path, name: str, *, by: Holder | None = None, key: PrivateKey | None = None, begins_days: float = -1
) -> Holder:
    """A certificate: of a root where nobody issues it, else of a signer, with its issuer behind it in the chain."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    issuer, begins = by or None, datetime.now(UTC) + timedelta(days=begins_days)
    usage = [issuer is not None, False, False, False, False, issuer is None, issuer is None, False, False]
    builder = (
        x509.CertificateBuilder(
            subject_name=named(name),
            issuer_name=issuer.certificate.subject if issuer else named(name),
            public_key=key.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=begins,
            not_valid_after=begins + timedelta(days=10),
        )
        .add_extension(x509.BasicConstraints(issuer is None, None), critical=True)
        .add_extension(x509.KeyUsage(*usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    signing = issuer.key if issuer else key
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key())
    builder = builder.add_extension(authority, critical=False)
    if issuer is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
    certificate = builder.sign(signing, hashes.SHA256())
    chain, key_file = folder / f"{name}.pem", folder / f"{name}.key"
    parts = [certificate] if issuer is None else [certificate, issuer.certificate]
    chain.write_bytes(b"".join(part.public_bytes(Encoding.PEM) for part in parts))
    key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return Holder(certificate, key, chain, key_file)
