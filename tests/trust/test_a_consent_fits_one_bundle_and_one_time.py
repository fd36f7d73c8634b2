"""A record of consent holds for one bundle, one time and trusted keys; whatever else is refused in a sentence."""

from __future__ import annotations

import base64
import dataclasses
import json
import random
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from streamdiff.avatar.bundle import IdentityBundle, with_look
from streamdiff.cli.main import main
from streamdiff.errors import CheckpointError, InputError, StreamdiffError
from streamdiff.trust import keys as keys_module
from streamdiff.trust.consent import (
    CONSENT,
    MOST_STATEMENTS,
    ConsentError,
    Withdrawn,
    check_consent,
    describe,
    grant,
    read_withdrawn,
    sign,
)
from streamdiff.trust.keys import PublicKey, SigningKey, make_key, read_key, read_public_keys, unseal
from tests.avatar.drawn_face import drawn_bundle

NOW = datetime(2030, 5, 1, 12, tzinfo=UTC)
SHA = "ab" * 32


@pytest.fixture
def key(tmp_path: Path) -> SigningKey:
    make_key(tmp_path / "ann")
    return read_key(tmp_path / "ann")


def granted(key: SigningKey, *, sha256: str = SHA, days: float = 10, scope: str = "live") -> str:
    return grant(key, sha256, subject="Ann Lee", scope=scope, expires=NOW + timedelta(days=days), now=NOW)


def check(envelope: str, key: SigningKey, *, sha256: str = SHA, now: datetime = NOW, **options: object) -> str:
    return check_consent(
        [envelope],
        sha256,
        trusted=[key.public],
        scope="live",
        now=now,
        **options,  # type: ignore[arg-type]
    ).subject


def test_a_consent_holds_for_its_bundle_until_it_expires(key: SigningKey) -> None:
    envelope = granted(key)
    assert check(envelope, key) == "Ann Lee"
    assert check(envelope, key, now=NOW + timedelta(days=10, seconds=-1)) == "Ann Lee"
    with pytest.raises(ConsentError, match="expired at 2030-05-11T12:00:00Z"):
        check(envelope, key, now=NOW + timedelta(days=10))
    with pytest.raises(ConsentError, match="in the future"):
        check(envelope, key, now=NOW - timedelta(minutes=6))
    with pytest.raises(ConsentError, match="belongs to another bundle"):
        check(envelope, key, sha256="cd" * 32)
    with pytest.raises(ConsentError, match="for film, not for live"):
        check(granted(key, scope="film"), key)


def test_who_is_not_trusted_cannot_consent(key: SigningKey, tmp_path: Path) -> None:
    make_key(tmp_path / "eve")
    with pytest.raises(ConsentError, match="is not trusted here"):
        check(granted(read_key(tmp_path / "eve")), key)


def test_a_signature_is_no_consent(key: SigningKey) -> None:
    with pytest.raises(ConsentError, match="holds no record of consent"):
        check(sign(key, SHA, name="ann"), key)
    statement = unseal(granted(key))
    forged = json.loads(granted(key)) | {"payloadType": "application/vnd.streamdiff.signature+json"}
    assert statement.kind == CONSENT
    with pytest.raises(InputError, match="does not belong to its words"):
        unseal(json.dumps(forged, separators=(",", ":")))


def test_what_was_withdrawn_does_not_hold(key: SigningKey, tmp_path: Path) -> None:
    envelope = granted(key)
    record = json.loads(unseal(envelope).payload)["id"]
    listed = tmp_path / "withdrawn.txt"
    for line in (record, f"bundle {SHA}", f"key {key.public.fingerprint}  # stolen"):
        listed.write_text(f"# withdrawn\n\n{line}\n")
        with pytest.raises(ConsentError, match="withdrawn"):
            check(envelope, key, withdrawn=read_withdrawn(listed))
    listed.write_text("user ann\nfeed\n")
    assert read_withdrawn(listed) == Withdrawn(records=frozenset({"feed"}), users=frozenset({"ann"}))
    assert check(envelope, key, withdrawn=read_withdrawn(listed)) == "Ann Lee"


def test_a_list_that_is_not_understood_is_refused(tmp_path: Path) -> None:
    listed = tmp_path / "withdrawn.txt"
    with pytest.raises(InputError, match="is no file"):
        read_withdrawn(listed)
    listed.write_text("user ann\nbundel 12\n")
    with pytest.raises(InputError, match="line 2"):
        read_withdrawn(listed)


def test_no_character_of_an_envelope_can_be_changed(key: SigningKey) -> None:
    envelope = granted(key)
    for at in range(len(envelope)):
        for other in ("A", "B", " ", '"', chr(ord(envelope[at]) ^ 1)):
            if other != envelope[at]:
                with pytest.raises(ConsentError):
                    check(envelope[:at] + other + envelope[at + 1 :], key)
    with pytest.raises(ConsentError):
        check(envelope + " ", key)


def test_what_is_signed_is_what_the_standard_says() -> None:
    signed = keys_module._to_sign("http://example.com/HelloWorld", b"hello world")
    assert signed == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xff", b"[]", b"{}", b'{"version": 2}', b'{"version": 1}', b'{"version": 1, "version": 1}', b"[" * 9000],
)
def test_a_signed_statement_that_says_nothing_sensible_is_refused(key: SigningKey, payload: bytes) -> None:
    with pytest.raises(ConsentError, match="does not hold"):
        check(key.seal(CONSENT, payload), key)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"scope": "live dance"}, "a scope is made of"),
        ({"scope": ""}, "a scope is made of"),
        ({"expires": "2020-01-01T00:00:00Z"}, "ends before it begins"),
        ({"expires": "tomorrow"}, "is no time"),
        ({"issued": "2030-05-01T12:00:00"}, "names no time zone"),
        ({"subject": " "}, "names whom it is about"),
        ({"subject": 3}, "must be a text"),
        ({"extra": "x"}, "extra is not known"),
    ],
)
def test_a_signed_record_with_a_wrong_fact_is_refused(key: SigningKey, changes: dict[str, object], why: str) -> None:
    facts = json.loads(unseal(granted(key)).payload) | changes
    with pytest.raises(ConsentError, match=why):
        check(key.seal(CONSENT, json.dumps(facts).encode()), key)


def test_a_bundle_carries_its_statements_and_its_content_stays_the_same(key: SigningKey, tmp_path: Path) -> None:
    plain = drawn_bundle()
    both = (granted(key, sha256=plain.sha256), sign(key, plain.sha256, name="studio"))
    bundle = dataclasses.replace(plain, statements=both)
    loaded = IdentityBundle.load(bundle.save(tmp_path / "a.avatar"))
    assert (loaded.statements, loaded.sha256) == (both, plain.sha256)
    told = loaded.inspect([key.public])["statements"]
    assert [(s["kind"], s["trusted"]) for s in told] == [("consent", True), ("signature", True)]
    moved = dataclasses.replace(with_look(plain, gloss=0.5), statements=both)
    told = IdentityBundle.load(moved.save(tmp_path / "b.avatar")).inspect()["statements"]
    assert [s["holds"] for s in told] == [False, False]
    assert all("another bundle" in s["why"] for s in told)


@pytest.mark.heavy
def test_no_byte_of_a_signed_bundle_can_be_changed(key: SigningKey, tmp_path: Path) -> None:
    """A change is refused; in the file's own layout, spaces between names for one, it may also change nothing."""
    plain = drawn_bundle()
    path = dataclasses.replace(plain, statements=(granted(key, sha256=plain.sha256),)).save(tmp_path / "a.avatar")
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    draw = random.Random(7)
    refused = 0
    places = [*draw.sample(range(header), 60), *draw.sample(range(header, len(data)), 12)]
    for at in places:
        changed = bytearray(data)
        changed[at] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            bundle = IdentityBundle.load(path)
            check(bundle.statements[0] if bundle.statements else "", key, sha256=bundle.sha256)
        except StreamdiffError:
            refused += 1
        else:
            assert at < header
            assert bundle.sha256 == plain.sha256
    assert refused >= 0.9 * len(places)


@pytest.mark.parametrize(
    "statements", ["x", "{}", "[1]", json.dumps(["x"] * (MOST_STATEMENTS + 1)), '["' + "x" * 17_000 + '"]']
)
def test_statements_that_are_none_are_refused_with_the_file(statements: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = drawn_bundle().save(tmp_path / "a.avatar")
    metadata = json.loads(path.read_bytes()[8:][: int.from_bytes(path.read_bytes()[:8], "little")])["__metadata__"]
    save_file(load_file(path), path, metadata | {"statements": statements})
    with pytest.raises(CheckpointError, match="its statements are no"):
        IdentityBundle.load(path)


def test_a_key_is_for_its_owner_and_is_never_overwritten(tmp_path: Path) -> None:
    public = make_key(tmp_path / "ann", "Ann Lee")
    assert stat.S_IMODE((tmp_path / "ann").stat().st_mode) == 0o600
    assert read_public_keys(tmp_path / "ann.pub") == (public,)
    assert read_key(tmp_path / "ann").public.raw == public.raw
    before = (tmp_path / "ann").read_bytes()
    with pytest.raises(InputError, match="never overwritten"):
        make_key(tmp_path / "ann")
    assert (tmp_path / "ann").read_bytes() == before


def test_fingerprints_are_those_of_openssh() -> None:
    """``ssh-keygen -lf`` of OpenSSH 9.2 says so of this key."""
    line = "AAAAC3NzaC1lZDI1NTE5AAAAIEUsU0Pln1WrsE0fkLFHKHw6a0PsZtCsjy8bk8SLT6oJ"
    public = PublicKey(base64.b64decode(line)[-32:], "Ann")
    assert public.fingerprint == "SHA256:QKc0dWC7Be6ByHIQckAer4sYloT496eSOpoNoQvOulg"
    assert public.line == f"ssh-ed25519 {line} Ann"


def test_files_that_hold_no_keys_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    with pytest.raises(InputError, match="is no file"):
        read_key(file)
    for text, why in (("", "holds 0 public keys"), ("ssh-rsa AAAA\n", "line 1"), ("ssh-ed25519 AAAA\n", "line 1")):
        file.write_text(text)
        with pytest.raises(InputError, match=why):
            read_public_keys(file)
        with pytest.raises(InputError, match="no Ed25519 private key"):
            read_key(file)


def test_a_password_or_another_kind_of_key_is_refused(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    file = tmp_path / "key"
    locked = serialization.BestAvailableEncryption(b"secret")
    for private, lock in (
        (ec.generate_private_key(ec.SECP256R1()), None),
        (ed25519.Ed25519PrivateKey.generate(), locked),
    ):
        file.write_bytes(
            private.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock or serialization.NoEncryption()
            )
        )
        with pytest.raises(InputError, match="no Ed25519 private key without a password"):
            read_key(file)


def test_the_commands_make_a_key_a_consent_and_a_signature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, key = str(drawn_bundle().save(tmp_path / "a.avatar")), str(tmp_path / "k")
    assert main(["avatar", "key", key, "--name", "Ann"]) == 0
    assert main(["avatar", "consent", bundle, "--key", key, "--subject", "Ann Lee", "--scope", "live"]) == 0
    assert main(["avatar", "sign", bundle, "--key", key]) == 0
    capsys.readouterr()
    assert main(["avatar", "inspect", bundle, "--trust", key + ".pub"]) == 0
    told = json.loads(capsys.readouterr().out)["statements"]
    assert [(s["kind"], s["holds"], s["trusted"]) for s in told] == [("consent", True, True), ("signature", True, True)]
    assert (told[0]["subject"], told[0]["scope"], told[0]["key_name"]) == ("Ann Lee", "live", "Ann")
    for days in ("0", "nan", "1e9"):
        assert main(["avatar", "consent", bundle, "--key", key, "--subject", "x", "--days", days]) == 2
        assert "--days: must be" in capsys.readouterr().err
    assert main(["avatar", "create", "--photo", "x.jpg", "--consent", "Ann"]) == 2
    assert "--consent needs --key" in capsys.readouterr().err


def test_statements_are_not_checked_where_cryptography_is_missing(
    key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    envelope = granted(key)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    (told,) = describe([envelope], SHA)
    assert told["holds"] is None
    assert "streamdiff[trust]" in told["why"]


def test_a_consent_that_could_never_hold_is_not_made(key: SigningKey) -> None:
    with pytest.raises(InputError, match="ends before it begins"):
        granted(key, days=-1)
    with pytest.raises(InputError, match="a scope is made of"):
        granted(key, scope="live dance")
