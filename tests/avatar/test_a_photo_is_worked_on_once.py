"""What was made of a photo is kept, taken for that photo alone, checked when it is read, and bounded in number."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from streamdiff.avatar import identity, kept
from streamdiff.avatar.bundle import IdentityBundle
from streamdiff.avatar.kept import kept_bundle
from streamdiff.errors import InputError
from tests.avatar.drawn_face import drawn_bundle

SIZE = drawn_bundle().size


class Maker:
    """Makes the drawn face of any photo, and counts."""

    def __init__(self, photo: Path) -> None:
        self.photo, self.calls = photo, 0

    def __call__(self) -> IdentityBundle:
        self.calls += 1
        digest = hashlib.sha256(self.photo.read_bytes()).hexdigest()
        return dataclasses.replace(drawn_bundle(), name=self.photo.stem, source_sha256=digest)


def photo_of(path: Path, level: int = 0) -> Path:
    Image.fromarray(np.full((40, 40, 3), level, np.uint8)).save(path)
    return path


def test_the_second_time_it_is_read_and_is_the_same_to_the_bit(tmp_path: Path) -> None:
    make = Maker(photo_of(tmp_path / "ann.png"))
    made = kept_bundle(make.photo, SIZE, make, folder=tmp_path / "kept")
    again = kept_bundle(make.photo, SIZE, make, folder=tmp_path / "kept")
    assert make.calls == 1
    assert again.sha256 == made.sha256
    assert again is not made


def test_the_same_photo_under_another_name_is_another_name_of_the_same_face(tmp_path: Path) -> None:
    one, two = Maker(photo_of(tmp_path / "ann.png")), Maker(photo_of(tmp_path / "Zoë\n*.png"))
    kept_bundle(one.photo, SIZE, one, folder=tmp_path / "kept")
    found = kept_bundle(two.photo, SIZE, two, folder=tmp_path / "kept")
    assert (found.name, two.calls) == ("Zoë\n*", 0)


@pytest.mark.parametrize("what", ["photo", "size", "maker", "threads"])
def test_anything_else_that_a_bundle_depends_on_makes_it_anew(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Maker(photo_of(tmp_path / "ann.png"))
    kept_bundle(make.photo, SIZE, make, folder=tmp_path / "kept")
    size = SIZE
    match what:
        case "photo":
            photo_of(make.photo, 1)
        case "size":
            size = 512
        case "maker":
            monkeypatch.setattr(kept, "maker", lambda: "another")
        case _:
            monkeypatch.setattr(kept.torch, "get_num_threads", lambda: 7)
    kept_bundle(make.photo, size, make, folder=tmp_path / "kept")
    assert make.calls == 2


def test_the_maker_is_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line changed in any module of the avatar is another maker."""
    for folder, pattern in (("avatar", "*.py"), ("media", "picture.py"), ("weights", "SHA256SUMS")):
        (tmp_path / folder).mkdir()
        for path in (kept._PACKAGE / folder).glob(pattern):
            (tmp_path / folder / path.name).write_bytes(path.read_bytes())
    before = kept.maker()
    monkeypatch.setattr(kept, "_PACKAGE", tmp_path)
    assert kept.maker.__wrapped__() == before
    with (tmp_path / "avatar" / "fields.py").open("a") as file:
        file.write("# changed\n")
    assert kept.maker.__wrapped__() != before


@pytest.mark.parametrize("damage", ["byte", "cut", "empty", "folder"])
def test_a_kept_bundle_that_was_altered_is_made_anew(damage: str, tmp_path: Path) -> None:
    make = Maker(photo_of(tmp_path / "ann.png"))
    kept_bundle(make.photo, SIZE, make, folder=tmp_path / "kept")
    (path,) = (tmp_path / "kept").iterdir()
    data = bytearray(path.read_bytes())
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes({"byte": data, "cut": data[: len(data) // 2], "empty": b""}[damage])
    found = kept_bundle(make.photo, SIZE, make, folder=tmp_path / "kept")
    assert make.calls == 2
    assert found.sha256 == make().sha256
    if damage != "folder":
        calls = make.calls
        kept_bundle(make.photo, SIZE, make, folder=tmp_path / "kept")
        assert make.calls == calls, "what was damaged is whole again"


def test_a_bundle_of_another_photo_under_this_name_is_not_taken(tmp_path: Path) -> None:
    ann, bob = Maker(photo_of(tmp_path / "ann.png", 0)), Maker(photo_of(tmp_path / "bob.png", 9))
    kept_bundle(ann.photo, SIZE, ann, folder=tmp_path / "kept")
    (of_ann,) = (tmp_path / "kept").iterdir()
    kept_bundle(bob.photo, SIZE, bob, folder=tmp_path / "kept")
    (of_bob,) = set((tmp_path / "kept").iterdir()) - {of_ann}
    of_bob.write_bytes(of_ann.read_bytes())
    assert kept_bundle(bob.photo, SIZE, bob, folder=tmp_path / "kept").source_sha256 == bob().source_sha256


def test_a_photo_that_changes_meanwhile_is_not_kept(tmp_path: Path) -> None:
    make = Maker(photo_of(tmp_path / "ann.png"))

    def meanwhile() -> IdentityBundle:
        photo_of(make.photo, 1)
        return make()

    kept_bundle(make.photo, SIZE, meanwhile, folder=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_the_one_used_longest_ago_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MOST_BUNDLES", 2)
    folder = tmp_path / "kept"
    makers = [Maker(photo_of(tmp_path / f"{n}.png", n)) for n in range(3)]
    for age, make in enumerate(makers[:2]):
        before = set(folder.glob("*"))
        kept_bundle(make.photo, SIZE, make, folder=folder)
        (new,) = set(folder.glob("*")) - before
        os.utime(new, (1000 + age, 1000 + age))
    kept_bundle(makers[0].photo, SIZE, makers[0], folder=folder)  # used: now the younger one
    kept_bundle(makers[2].photo, SIZE, makers[2], folder=folder)
    assert len(list(folder.iterdir())) == 2
    for make in (makers[0], makers[2], makers[1]):
        kept_bundle(make.photo, SIZE, make, folder=folder)
    assert [make.calls for make in makers] == [1, 2, 1]


def test_a_place_that_takes_nothing_is_done_without(tmp_path: Path) -> None:
    make = Maker(photo_of(tmp_path / "ann.png"))
    expected = make().sha256
    (tmp_path / "kept").write_text("no folder")
    for calls in (2, 3):
        assert kept_bundle(make.photo, SIZE, make, folder=tmp_path / "kept").sha256 == expected
        assert make.calls == calls


def test_the_folder_is_its_owners_alone(tmp_path: Path) -> None:
    make = Maker(photo_of(tmp_path / "ann.png"))
    kept_bundle(make.photo, SIZE, make, folder=tmp_path / "kept")
    assert (tmp_path / "kept").stat().st_mode & 0o077 == 0


def test_only_who_asks_for_it_keeps_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Maker(photo_of(tmp_path / "ann.png"))
    monkeypatch.setattr(identity, "create_bundle", lambda _path, _size: make())
    monkeypatch.setattr(kept, "cache_folder", lambda: tmp_path / "cache")
    identity.open_bundle(make.photo)
    assert not (tmp_path / "cache").exists()
    for _ in range(2):
        identity.open_bundle(make.photo, keep=True)
    assert make.calls == 2
    assert len(list((tmp_path / "cache" / "bundles").iterdir())) == 1


def test_what_is_wrong_with_a_photo_is_said_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "cache_folder", lambda: tmp_path / "cache")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    for name in ("broken.jpg", "missing.jpg", "."):
        said = []
        for keep in (False, True):
            with pytest.raises(InputError) as caught:
                identity.open_bundle(tmp_path / name, keep=keep)
            said.append(str(caught.value))
        assert said[0] == said[1]
    assert not (tmp_path / "cache").exists()
