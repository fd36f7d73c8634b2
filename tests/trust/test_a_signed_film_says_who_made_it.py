"""Content credentials: signed by us, read by the C2PA library; a change is named, and so is who is not trusted."""

from __future__ import annotations

import json
import random
import socket
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from streamdiff.cli.main import main as command
from streamdiff.errors import InputError
from streamdiff.media import VideoWriter
from streamdiff.trust import credentials
from streamdiff.trust.credentials import FilmSigner, State, verify_film
from tests.trust.certificates import Holder, PrivateKey, issue


@pytest.fixture
def root(tmp_path: Path) -> Holder:
    return issue(tmp_path, "root")


@pytest.fixture
def film(tmp_path: Path) -> Path:
    path = tmp_path / "film.mp4"
    draw = torch.Generator().manual_seed(0)
    with VideoWriter(path, width=64, height=64, fps=25, rate_hz=24_000) as writer:
        for _ in range(2):
            frames_THWC = torch.randint(0, 255, (12, 64, 64, 3), dtype=torch.uint8, generator=draw)
            writer.write(frames_THWC, torch.zeros(11_520))
    return path


def sign(film: Path, holder: Holder) -> None:
    FilmSigner(holder.chain, holder.key_file).sign(film, version="1.2.3")


def decoded(film: Path) -> list[np.ndarray]:
    with av.open(str(film)) as container:
        return [f.to_ndarray() for f in container.decode(video=0)]


def test_a_film_is_trusted_by_who_trusts_its_root(tmp_path: Path, root: Holder, film: Path) -> None:
    before = decoded(film)
    assert verify_film(film).state is State.UNSIGNED
    sign(film, issue(tmp_path, "ann", by=root))
    found = verify_film(film, roots=root.chain)
    assert (found.state, found.signer, found.why) == (State.TRUSTED, "ann, Test", ())
    assert "streamdiff" in found.tool
    assert all(np.array_equal(a, b) for a, b in zip(before, decoded(film), strict=True))
    for roots in (None, issue(tmp_path, "other").chain):
        found = verify_film(film, roots=roots)
        assert found.state is State.VALID
        assert any(why.startswith("signingCredential.untrusted") for why in found.why)
    assert sorted(p.suffix for p in tmp_path.iterdir() if "film" in p.name) == [".mp4"]


def test_the_manifest_says_that_a_model_made_it(tmp_path: Path, root: Holder, film: Path) -> None:
    from c2pa import Reader

    sign(film, issue(tmp_path, "ann", by=root))
    with Reader(str(film)) as reader:
        report = json.loads(reader.json())
    manifest = report["manifests"][report["active_manifest"]]
    (actions,) = [a["data"]["actions"] for a in manifest["assertions"] if a["label"].startswith("c2pa.actions")]
    assert [a["action"] for a in actions] == ["c2pa.created"]
    assert actions[0]["digitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert manifest["claim_generator_info"][0]["version"] == "1.2.3"


def test_a_changed_byte_is_named(tmp_path: Path, root: Holder, film: Path) -> None:
    """In pictures and sound, in tables and in the credentials; what C2PA leaves out of its hash is no content."""
    sign(film, issue(tmp_path, "ann", by=root))
    data = film.read_bytes()
    draw, codes = random.Random(3), set[str]()
    first = data.index(b"moov")
    for at in [data.index(b"mdat") + 100, data.index(b"streamdiff"), *draw.sample(range(first, len(data) - 200), 30)]:
        changed = bytearray(data)
        changed[at] ^= 1
        film.write_bytes(changed)
        found = verify_film(film, roots=root.chain)
        assert found.state is State.TAMPERED, at
        codes |= {why.partition(":")[0] for why in found.why}
    assert "assertion.bmffHash.mismatch" in codes


def test_a_film_that_was_cut_or_whose_credentials_were_broken_is_not_whole(
    tmp_path: Path, root: Holder, film: Path
) -> None:
    sign(film, issue(tmp_path, "ann", by=root))
    data = film.read_bytes()
    for kept in (len(data) // 2, len(data) - 1_000):
        film.write_bytes(data[:kept])
        assert verify_film(film, roots=root.chain).state is State.TAMPERED
    film.write_bytes(data + data[-500:])
    assert verify_film(film, roots=root.chain).state is State.TAMPERED


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP384R1()),
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65_537, 2_048),
    ],
    ids=["P-384", "Ed25519", "RSA"],
)
def test_other_keys_sign_as_well(tmp_path: Path, root: Holder, film: Path, key: PrivateKey) -> None:
    sign(film, issue(tmp_path, "ann", by=root, key=key))
    assert verify_film(film, roots=root.chain).state is State.TRUSTED


def test_who_cannot_sign_is_told_before_the_film_is_made(tmp_path: Path, root: Holder) -> None:
    ann, bob = issue(tmp_path, "ann", by=root), issue(tmp_path, "bob", by=root)
    stale, early = issue(tmp_path, "stale", by=root, begins_days=-20), issue(tmp_path, "early", by=root, begins_days=5)
    other = issue(tmp_path, "curve", by=root, key=ec.generate_private_key(ec.SECP256K1()))
    text = tmp_path / "text"
    text.write_text("no key")
    for chain, key, why in (
        (ann.chain, bob.key_file, "is not the key of the first certificate"),
        (stale.chain, stale.key_file, "not now"),
        (early.chain, early.key_file, "not now"),
        (root.chain, root.key_file, "signs itself"),
        (other.chain, other.key_file, "films are signed with"),
        (text, ann.key_file, "holds no certificate"),
        (ann.chain, text, "holds no private key"),
        (tmp_path / "none", ann.key_file, "is no file"),
    ):
        with pytest.raises(InputError, match=why):
            FilmSigner(chain, key)


def test_a_film_that_cannot_be_signed_stays_as_it_was(tmp_path: Path, root: Holder, film: Path) -> None:
    signer = FilmSigner(*(lambda h: (h.chain, h.key_file))(issue(tmp_path, "ann", by=root)))
    film.write_bytes(b"\0\0\0\x18ftypisom" + b"x" * 100)
    before = film.read_bytes()
    with pytest.raises(InputError, match="is there, but not signed"):
        signer.sign(film, version="1")
    assert film.read_bytes() == before
    assert sorted(p.suffix for p in tmp_path.iterdir() if "film" in p.name) == [".mp4"]


def test_verifying_a_strangers_film_reaches_no_network(tmp_path: Path, root: Holder, film: Path) -> None:
    from c2pa import Builder, Signer

    signer = FilmSigner(*(lambda h: (h.chain, h.key_file))(issue(tmp_path, "ann", by=root)))
    remote = tmp_path / "remote.mp4"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        with Builder(json.dumps(credentials._manifest("film", "1"))) as builder:
            builder.set_no_embed()
            builder.set_remote_url(f"http://127.0.0.1:{listening.getsockname()[1]}/manifest.c2pa")
            with Signer.from_info(signer._info) as by, film.open("rb") as source, remote.open("w+b") as out:
                builder.sign(by, "video/mp4", source, out)
        listening.setblocking(False)
        assert b"/manifest.c2pa" in remote.read_bytes()
        assert verify_film(remote).state in (State.UNSIGNED, State.TAMPERED)
        with pytest.raises(BlockingIOError):
            listening.accept()


def test_the_command_has_a_status_for_each_case(
    tmp_path: Path, root: Holder, film: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trust = ["--trust", str(root.chain)]
    assert command(["verify", str(film), *trust]) == 4
    sign(film, issue(tmp_path, "ann", by=root))
    assert command(["verify", str(film), *trust]) == 0
    assert command(["verify", str(film)]) == 3
    assert "trusted: signed by ann, Test, made with streamdiff" in capsys.readouterr().out
    data = bytearray(film.read_bytes())
    data[data.index(b"mdat") + 50] ^= 1
    film.write_bytes(data)
    assert command(["verify", str(film), *trust]) == 1
    assert "tampered" in capsys.readouterr().out
    assert command(["verify", str(root.chain)]) == 2
    assert command(["verify", str(film), "--trust", str(film)]) == 2
    assert command(["verify", str(tmp_path / "none.mp4")]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("what", [["talk", "Hello.", "--no-sheet"], ["generate", "--seconds", "1"]])
def test_a_command_signs_what_it_has_made(tmp_path: Path, root: Holder, what: list[str]) -> None:
    ann, out = issue(tmp_path, "ann", by=root), tmp_path / "out.mp4"
    assert command([*what, "--out", str(out), "--sign", str(ann.chain), str(ann.key_file)]) == 0
    assert verify_film(out, roots=root.chain).state is State.TRUSTED
    assert len(decoded(out)) >= 12
    assert command([*what, "--out", str(out), "--sign", str(ann.chain), str(root.key_file)]) == 2
