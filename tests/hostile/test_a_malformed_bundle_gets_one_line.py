"""A bundle from a stranger is data: whatever is wrong with it is said in one line, quickly and in little memory.

A valid bundle is taken apart into header, facts and tensors; each mutation changes one of them, writes the rest as it
was and, so that not only the hash is tested, gives the result the hash that its content has. What loads must also draw.
"""

from __future__ import annotations

import functools
import json
import math
import os
import resource
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from streamdiff.avatar.bundle import FORMAT, IdentityBundle
from streamdiff.avatar.kinematics import arkit64
from streamdiff.avatar.render import WarpRenderer
from streamdiff.errors import StreamdiffError
from tests.hostile.bundles import Parts, base

SECONDS, BYTES = 10.0, 500 << 20


Mutation = Callable[[Parts], None]


def _facts() -> Iterator[tuple[str, Mutation]]:
    """Every fact missing, of other kinds, out of range; and facts that nobody knows."""
    numbers: list[tuple[str | int, ...]] = [("style", "smile")]
    numbers += [("placement", name) for name in ("pixels_per_cm", "roll", "yaw", "pitch", "eye_distance")]
    numbers += [("placement", "stomion", 0), ("placement", "pivot", 2), ("placement", "gain", 1)]
    numbers += [("placement", "look", name) for name in ("light_x", "light_y", "ambient", "gloss")]
    numbers += [("placement", "look", name, 0) for name in ("shape", "teeth", "flesh")]
    texts: list[tuple[str | int, ...]] = [("name",), ("source_sha256",)]
    tables: list[tuple[str | int, ...]] = [("placement",), ("style",), ("placement", "look")]
    lists: list[tuple[str | int, ...]] = [("placement", "stomion"), ("placement", "pivot"), ("placement", "gain")]
    lists += [("placement", "look", "shape"), ("placement", "look", "teeth")]
    strange: dict[str, Any] = {
        "none": None,
        "true": True,
        "word": "one",
        "nan": math.nan,
        "infinite": math.inf,
        "minus infinite": -math.inf,
        "1e30": 1e30,
        "-1e30": -1e30,
        "googol": 10**400,
        "list": [1.0],
        "table": {"a": 1},
    }
    for path in numbers:
        for what, value in strange.items():
            yield f"{'.'.join(map(str, path))} is {what}", functools.partial(_set, path=path, value=value)
    for path in [*texts, *tables, *lists]:
        for what in ("none", "true", "1e30", "list"):
            yield f"{'.'.join(map(str, path))} is {what}", functools.partial(_set, path=path, value=strange[what])
    for path in lists:
        yield f"{'.'.join(map(str, path))} is empty", functools.partial(_set, path=path, value=[])
        yield f"{'.'.join(map(str, path))} is long", functools.partial(_set, path=path, value=[0.5] * 100_000)
    for path in [*numbers[1:6], *texts, *tables, *lists]:
        yield f"{'.'.join(map(str, path))} is missing", functools.partial(_drop, path=path)
    for path in (("more",), ("placement", "more"), ("placement", "look", "more"), ("style", "more")):
        yield f"{'.'.join(path)} is more", functools.partial(_set, path=path, value=1.0)
    yield "a name of a megabyte", functools.partial(_set, path=("name",), value="n" * 900_000)
    for what, text in {
        "no JSON": "{",
        "a list": "[]",
        "deep": "[" * 100_000,
        "twice": '{"name": "a", "name": "b"}',
        "nothing": "",
        "null": "null",
        "long number": '{"name": ' + "9" * 100_000 + "}",
    }.items():
        yield f"facts are {what}", functools.partial(_replace_facts, text=text)


def _set(parts: Parts, *, path: tuple[str | int, ...], value: Any) -> None:
    where, key = parts.place(*path)
    where[key] = value


def _drop(parts: Parts, *, path: tuple[str | int, ...]) -> None:
    where, key = parts.place(*path)
    del where[key]


def _replace_facts(parts: Parts, *, text: str) -> None:
    parts.facts = text


def _tensors() -> Iterator[tuple[str, Mutation]]:
    """Every tensor missing, of another kind or shape, and with values that are not finite or far out."""
    for name, (kind, shape, _) in base().tensors.items():
        if name.startswith("decoder.") and not name.startswith(("decoder.enter.0", "decoder.low_C")):
            continue
        yield f"{name} is missing", functools.partial(_without, name=name)
        yield f"{name} is empty", functools.partial(_reshaped, name=name, shape=(0,))
        yield f"{name} is flat", functools.partial(_reshaped, name=name, shape=(math.prod(shape),))
        yield f"{name} is doubled", functools.partial(_doubled, name=name)
        yield f"{name} is of another kind", functools.partial(_other_kind, name=name)
        if kind.startswith("F"):
            for value in (math.nan, math.inf, -6e4):
                yield f"{name} holds {value}", functools.partial(_holding, name=name, value=value)
        yield f"{name} is all zero", functools.partial(_zero, name=name)
    yield "one more tensor", functools.partial(_more, name="more")
    yield "one more of the decoder", functools.partial(_more, name="decoder.more")
    yield "a decoder of one", _one_of_decoder
    yield "a reference of 8192", functools.partial(_referred, shape=(3, 8192, 8192), honest=False)
    yield "a reference of 2^20 by 1", functools.partial(_referred, shape=(3, 1, 1 << 20))
    yield "a reference of 1 by 2^20", functools.partial(_referred, shape=(3, 1 << 20, 1))
    yield "a reference of 6000", functools.partial(_referred, shape=(1, 3000, 3000))
    yield "a reference of 0", functools.partial(_referred, shape=(3, 0, 0))
    for x, y in ((-50.0, 100.0), (300.0, 100.0), (128.0, 128.0)):
        yield f"a mouth at {x:g}, {y:g}", functools.partial(_mouth_at, x=x, y=y)


def _without(parts: Parts, *, name: str) -> None:
    del parts.tensors[name]


def _reshaped(parts: Parts, *, name: str, shape: tuple[int, ...]) -> None:
    array = parts.array(name)
    parts.put(name, array.reshape(-1)[: math.prod(shape)].reshape(shape))


def _doubled(parts: Parts, *, name: str) -> None:
    array = parts.array(name)
    parts.put(name, np.concatenate([array, array]))


def _other_kind(parts: Parts, *, name: str) -> None:
    array = parts.array(name)
    parts.put(name, array.astype("<f8" if array.dtype.kind == "u" else "<i4"))


def _holding(parts: Parts, *, name: str, value: float) -> None:
    array = parts.array(name)
    array.reshape(-1)[array.size // 2] = value
    parts.put(name, array)


def _zero(parts: Parts, *, name: str) -> None:
    parts.put(name, np.zeros_like(parts.array(name)))


def _more(parts: Parts, *, name: str) -> None:
    parts.put(name, np.zeros(4, "<f4"))


def _one_of_decoder(parts: Parts) -> None:
    for name in [name for name in parts.tensors if name.startswith("decoder.")][1:]:
        del parts.tensors[name]


def _referred(parts: Parts, *, shape: tuple[int, ...], honest: bool = True) -> None:
    parts.tensors["reference_3HW"] = ("U8", list(shape), bytes(math.prod(shape)) if honest else b"")


def _mouth_at(parts: Parts, *, x: float, y: float) -> None:
    points = parts.array("landmarks_J3")
    points[[61, 78, 13, 14, 308, 82, 87, 312, 317], :2] = (x, y)
    points[[191, 80, 81, 311, 310, 415, 95, 88, 178, 402, 318, 324], :2] = (x, y)
    parts.put("landmarks_J3", points)


def _headers() -> Iterator[tuple[str, Mutation]]:
    """The header's own entries, and its metadata."""
    name = "pose_2GG"
    for what, entry in {
        "null": None,
        "a list": [],
        "without a kind": {"shape": [2, 128, 128], "data_offsets": [0, 65536]},
        "of kind F999": {"dtype": "F999", "shape": [2, 128, 128], "data_offsets": [0, 65536]},
        "of kind 3": {"dtype": 3, "shape": [2, 128, 128], "data_offsets": [0, 65536]},
        "of shape words": {"dtype": "F16", "shape": "2", "data_offsets": [0, 65536]},
        "of negative shape": {"dtype": "F16", "shape": [-2, -128, 128], "data_offsets": [0, 65536]},
        "of a huge shape": {"dtype": "F16", "shape": [2, 1 << 39, 128], "data_offsets": [0, 65536]},
        "of an endless shape": {"dtype": "F16", "shape": [10**30], "data_offsets": [0, 65536]},
        "of true shape": {"dtype": "F16", "shape": [True, 128, 128], "data_offsets": [0, 65536]},
        "over another": {"dtype": "F16", "shape": [2, 128, 128], "data_offsets": [0, 65536]},
        "past the end": {"dtype": "F16", "shape": [2, 128, 128], "data_offsets": [1 << 40, (1 << 40) + 65536]},
        "backwards": {"dtype": "F16", "shape": [2, 128, 128], "data_offsets": [65536, 0]},
        "of one offset": {"dtype": "F16", "shape": [2, 128, 128], "data_offsets": [0]},
        "of no offsets": {"dtype": "F16", "shape": [2, 128, 128]},
    }.items():
        yield f"an entry {what}", functools.partial(_entry, name=name, entry=entry)
    yield "metadata are a list", functools.partial(_metadata, value=[])
    yield "metadata are null", functools.partial(_metadata, value=None)
    yield "metadata are missing", functools.partial(_metadata, value=...)
    yield "metadata hold a number", functools.partial(_metadata, value={"format": FORMAT, "version": 1})
    yield "another format", functools.partial(_metadata, value={"format": "\x1b]0;owned\x07", "version": "1"})
    yield "another version", functools.partial(_metadata, value={"format": FORMAT, "version": "2"})
    yield "another hash", functools.partial(_metadata, value={"format": FORMAT, "version": "1", "sha256": "0" * 64})
    yield "no hash", _unsigned
    yield "a tensor named by escapes", functools.partial(_more, name="\x1b[2J\x1b]0;owned\x07\r\nred")
    yield "a tensor named at length", functools.partial(_more, name="n" * 100_000)
    yield "12,000 tensors", _many
    yield "an empty tensor named twice by case", functools.partial(_more, name="POSE_2GG")


def _entry(parts: Parts, *, name: str, entry: Any) -> None:
    parts.header[name] = entry


def _metadata(parts: Parts, *, value: Any) -> None:
    parts.metadata = value


def _unsigned(parts: Parts) -> None:
    parts.signed = False


def _many(parts: Parts) -> None:
    for number in range(12_000):
        parts.tensors[f"t{number}"] = ("U8", [0], b"")


def _raw() -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    """Bytes: cut, prolonged, overwritten; lengths that lie; other kinds of file."""
    for share in (0.0, 0.001, 0.3, 0.9, 0.9999):
        yield f"cut at {share:g}", lambda data, share=share: data[: int(len(data) * share)]
    for size in (7, 8, 9, 64):
        yield f"cut to {size} bytes", lambda data, size=size: data[:size]
    yield "a byte more", lambda data: data + b"\0"
    yield "twice", lambda data: data * 2
    for length in (0, 1, 1 << 20, (1 << 20) + 1, 1 << 40, (1 << 64) - 1):
        yield f"a header of {length}", lambda data, length=length: struct.pack("<Q", length) + data[8:]
    yield "a zip", lambda data: b"PK\3\4" + data
    yield "a pickle", lambda data: b"cposix\nsystem\n(S'exit 1'\ntR."
    yield "words", lambda data: b"not a bundle" * 100
    yield "zeros", lambda data: bytes(1 << 20)
    yield "a deep header", lambda data: struct.pack("<Q", 1 << 19) + b"[" * (1 << 19)
    yield "a header in Latin-1", lambda data: struct.pack("<Q", 4) + b"{\xe9\xe8}"
    yield "more than 64 MiB", lambda data: data + bytes(64 << 20)
    for seed in range(40):
        yield f"bytes at random {seed}", functools.partial(_scattered, seed=seed)


def _scattered(data: bytes, *, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    header = 8 + int.from_bytes(data[:8], "little")
    out = bytearray(data)
    # The header is a thousandth of the file: half of the changes go there.
    for at in (rng.integers(0, header if seed % 2 else len(data)) for _ in range(1 + seed % 5)):
        out[int(at)] = int(rng.integers(0, 256))
    return bytes(out)


CASES = [*_facts(), *_tensors(), *_headers()]
RAW = list(_raw())


def judge(path: Path) -> None:
    """Loaded and drawn, or refused in one plain line; quickly and in little memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    try:
        bundle = IdentityBundle.load(path)
        json.dumps(bundle.inspect())
        frame = WarpRenderer(bundle).render(arkit64().rest_E[None])
        assert frame.shape == (1, bundle.size, bundle.size, 3)
    except StreamdiffError as error:
        line = str(error)
        assert line
        assert len(line.splitlines()) == 1, line
        assert line.isprintable(), repr(line)
        assert len(line) < 2000, line[:200]
        assert path.name in line
    assert time.process_time() - began < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES


def test_there_are_enough_cases() -> None:
    assert len(CASES) + len(RAW) >= 150
    names = [name for name, _ in CASES]
    assert len(set(names)) == len(names)


def test_the_unchanged_bundle_loads(tmp_path: Path) -> None:
    path = tmp_path / "base.avatar"
    path.write_bytes(Parts().written())
    bundle = IdentityBundle.load(path)
    assert bundle.style == {"smile": 1.0, "nod": -0.5}
    assert bundle.idle_AE is not None
    assert set(load_file(path)) == set(bundle.tensors())


@pytest.mark.slow
@pytest.mark.parametrize("mutate", [pytest.param(mutate, id=name) for name, mutate in CASES])
def test_a_changed_part_gives_one_line(mutate: Mutation, tmp_path: Path) -> None:
    parts = Parts()
    mutate(parts)
    path = tmp_path / "changed.avatar"
    path.write_bytes(parts.written())
    judge(path)


@pytest.mark.heavy
@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in RAW])
def test_changed_bytes_give_one_line(change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "changed.avatar"
    path.write_bytes(change(Parts().written()))
    judge(path)


REFUSED = (
    ("placement.pixels_per_cm is nan", "NaN is no number"),
    ("style.smile is 1e30", r"style\.smile must be a number in -3\.\.3, got 1e\+30"),
    ("landmarks_J3 holds nan", "landmarks_J3 holds values that are not finite"),
    ("a reference of 8192", "no square of 256 or 512 pixels"),
    ("upper_K2GG is of another kind", "upper_K2GG holds int32, not float16"),
    ("decoder.enter.0.weight is missing", r"decoder\.enter\.0\.weight is missing"),
    ("one more tensor", "more is not known"),
    ("style.more is more", r"style\.more is not known"),
    ("placement.more is more", r"placement\.more is not known"),
    ("another hash", "altered"),
    ("no hash", "altered"),
    ("facts are deep", "nested too deep"),
    ("12,000 tensors", "no table of tensors"),
)


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "reason"), REFUSED)
def test_the_line_says_what_is_wrong(name: str, reason: str, tmp_path: Path) -> None:
    parts = Parts()
    dict(CASES)[name](parts)
    path = tmp_path / "changed.avatar"
    path.write_bytes(parts.written())
    with pytest.raises(StreamdiffError, match=reason):
        IdentityBundle.load(path)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("more than 64 MiB", "it is larger than 67108864 bytes"),
        ("a header of 1048577", "its header has 1048577 bytes, more than 1048576"),
        ("a zip", "it is not a safetensors file"),
    ],
)
def test_the_line_says_what_is_wrong_with_the_bytes(name: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "changed.avatar"
    path.write_bytes(dict(RAW)[name](Parts().written()))
    with pytest.raises(StreamdiffError, match=reason):
        IdentityBundle.load(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "pipe.avatar"
    os.mkfifo(path)
    with pytest.raises(StreamdiffError, match="no regular file"):
        IdentityBundle.load(path)
