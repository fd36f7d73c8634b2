"""A fuzzer that knows formats runs for a moment here, and for long before a release; what it found is read again."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from safetensors.torch import load

from streamdiff.avatar.bundle import IdentityBundle
from tests.hostile import fuzz
from tests.hostile.bundles import Parts, rehashed
from tests.hostile.case import run
from tests.hostile.formats import FORMATS, Part, replaced
from tests.hostile.jail import Jail
from tests.hostile.kinds import KINDS, Good, Kind
from tests.hostile.mutations import changed_json, mutated

CASES = 12
"""Of each kind."""
NO_LONGER_THE_SAME = ("ebml", "zip", "tensors")
"""Formats in which one content may be written in several ways."""
CHEAP = ("pictures", "sounds", "motions", "voices", "heads", "lines")


@pytest.fixture(scope="module")
def jail() -> Iterator[Jail]:
    with Jail() as jail:
        yield jail


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", KINDS)
def test_mutants_are_refused_in_one_line_or_something_sensible_comes_of_them(kind: str, jail: Jail) -> None:
    ended, faults = fuzz.fuzz(kind, range(CASES), jail)
    assert faults == {}
    assert ended.total() == CASES
    assert ended["refused"] or kind == "texts", "nothing was wrong with any; but any text can be said"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_what_was_found_once_is_found_no_more(jail: Jail, tmp_path: Path) -> None:
    cases = [mutant.case for mutant in fuzz.kept()]
    assert {case.name: fault for case in cases if (fault := run(jail, case, tmp_path / "case"))} == {}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_reader_that_breaks_is_noticed_and_its_file_is_kept(
    jail: Jail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Kind(lambda: [Good("a/file.bin", "bytes", b"good" * 9)], lambda file: [("read", "nothing known", file)])
    monkeypatch.setattr(fuzz, "KINDS", {"broken": broken})
    monkeypatch.setattr(fuzz, "FOUND", tmp_path)
    ended, faults = fuzz.fuzz("broken", range(3), jail, keep=tmp_path)
    assert ended == {"wrong": 3}
    assert all("KeyError: 'nothing known'" in fault for fault in faults.values())
    assert [mutant.case.files["a/file.bin"] for mutant in fuzz.kept()] == [
        fuzz.mutant("broken", 0, number).data for number in range(3)
    ]


@pytest.mark.heavy
@pytest.mark.parametrize("kind", CHEAP)
def test_a_number_is_the_same_file_again_and_another_is_another(kind: str) -> None:
    first = [fuzz.mutant(kind, 0, number) for number in range(20)]
    again = [fuzz.mutant(kind, 0, number) for number in range(20)]
    assert [(m.data, m.case.argv) for m in first] == [(m.data, m.case.argv) for m in again]
    assert len({m.data for m in first}) > 10
    assert [m.data for m in first] != [fuzz.mutant(kind, 1, number).data for number in range(20)]


@pytest.mark.heavy
@pytest.mark.parametrize("kind", CHEAP)
def test_good_files_are_the_same_when_they_are_put_together_again(kind: str) -> None:
    for good in KINDS[kind].good():
        if good.format not in FORMATS:
            continue  # bytes without structure
        split, join = FORMATS[good.format].split, FORMATS[good.format].join
        parts = split(good.data)
        assert len(parts) > 1 or parts[0].inner or good.format == "lines", f"{good.name} has no parts"
        assert join(parts) == good.data or good.format in NO_LONGER_THE_SAME, good.name
        assert split(join(parts)) == parts, good.name


def test_an_inner_part_is_reached_by_its_number() -> None:
    parts = (
        Part(b"a", b"1"),
        Part(b"b", b"", (Part(b"c", b"2"), Part(b"d", b"", (Part(b"e", b"3"),)))),
        Part(b"f", b"4"),
    )
    names: list[bytes] = []

    def noted(part: Part) -> tuple[Part, ...]:
        names.append(part.name)
        return ()

    left = [replaced(parts, at, noted) for at in range(6)]
    assert b"".join(names) == b"abcdef"
    assert left[0] == parts[1:]
    assert left[4][1].inner[1].inner == ()


@pytest.mark.heavy
def test_a_changed_bundle_has_the_hash_of_what_it_holds(tmp_path: Path) -> None:
    """So that a change of a fact or of a tensor reaches what looks at facts and tensors."""
    path, whole = tmp_path / "face.avatar", Parts().written()
    parts = FORMATS["tensors"].split(whole)
    facts = json.loads(parts[0].body)
    facts["facts"] = facts["facts"].replace('"smile": 1.0', '"smile": 2.0')
    changed = FORMATS["tensors"].join([Part(b"", json.dumps(facts).encode()), *parts[1:]])
    path.write_bytes(changed)
    with pytest.raises(ValueError, match="altered"):
        IdentityBundle.load(path)
    path.write_bytes(rehashed(changed))
    assert IdentityBundle.load(path).style["smile"] == 2.0
    assert set(load(rehashed(whole))) == set(load(whole))


def test_every_kind_of_change_is_made() -> None:
    """Values of a table are changed, dropped, doubled and replaced by other kinds, also in texts that hold JSON."""
    draw, table = random.Random(0), {"a": 1.0, "b": [1, 2], "c": {"d": "word"}, "e": '{"f": 1}'}
    found = [changed_json(table, draw) for _ in range(600)]
    tables = [each for each in found if isinstance(each, dict)]
    assert any(not isinstance(each, dict) for each in found)
    assert any(len(each) < 4 for each in tables)
    assert any(len(each) > 4 for each in tables)
    assert any(isinstance(each.get("c"), dict) and each["c"].get("d") != "word" for each in tables)
    assert any(_says(each.get("e")) not in (None, {"f": 1}) for each in tables)
    assert all(table[name] == value for name, value in {"a": 1.0, "e": '{"f": 1}'}.items()), "the original was changed"


def _says(text: object) -> Mapping[str, object] | None:
    try:
        return json.loads(text) if isinstance(text, str) else None
    except ValueError:
        return None


def test_what_is_no_file_of_its_format_is_changed_all_the_same() -> None:
    for format_ in FORMATS:
        found = {mutated(b"no such file, by far" * 3, format_, random.Random(seed)) for seed in range(30)}
        assert len(found) > 20, format_
