"""Weights, voices, heads and lines of motion from a stranger: what is wrong is said in one line, early and cheaply."""

from __future__ import annotations

import functools
import io
import json
import math
import resource
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamdiff.avatar import kinematics
from streamdiff.avatar.head3d import HeadModel
from streamdiff.avatar.kinematics import arkit64
from streamdiff.avatar.liveportrait import FILES, load_networks
from streamdiff.avatar.style import style_vector
from streamdiff.avatar.window import load_motion, save_motion
from streamdiff.errors import CheckpointError, ConfigError, StreamdiffError
from streamdiff.voice import KokoroVoice
from streamdiff.voice.encoder import GE2EEncoder
from streamdiff.voice.kokoro import kokoro_names, kokoro_styles
from tests.avatar.tiny_avatar import tiny_motion

SECONDS, BYTES = 10.0, 500 << 20


def refused(read: Callable[[Path], object], path: Path, *, match: str | None = None) -> None:
    """One printable line, quickly, in little memory; nothing of the kind that cannot be told from luck."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    with pytest.raises(StreamdiffError, match=match) as caught:
        read(path)
    line = str(caught.value)
    assert line.isprintable(), repr(line)
    assert 0 < len(line) < 2000
    assert time.process_time() - began < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES


@functools.cache
def _motion_file(tmp: str) -> bytes:
    path = Path(tmp) / "base.safetensors"
    save_motion(tiny_motion(), path)
    return path.read_bytes()


def _motion(
    tmp_path: Path,
    change: Callable[[dict[str, Any], bytearray], None] | None = None,
    metadata: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """The tiny model's file with changed metadata, config, header or numbers."""
    data = _motion_file(str(tmp_path))
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    if config is not None:
        whole = {**json.loads(header["__metadata__"]["config"]), **config}
        header["__metadata__"]["config"] = json.dumps({k: v for k, v in whole.items() if v is not ...})
    for name, value in (metadata or {}).items():
        header["__metadata__"][name] = value
        if value is ...:
            del header["__metadata__"][name]
    if change is not None:
        change(header, body)
    text = json.dumps(header).encode()
    path = tmp_path / "changed.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def test_the_unchanged_model_loads(tmp_path: Path) -> None:
    assert load_motion(_motion(tmp_path)).config == tiny_motion().config


CONFIGS: dict[str, dict[str, Any]] = {
    "wide": {"dim": 8192, "num_layers": 128, "hidden": 65536},
    "wider": {"dim": 10**9},
    "endless": {"num_layers": 10**12},
    "negative": {"dim": -32},
    "nothing": {"num_heads": 0},
    "a word": {"dim": "32"},
    "a fraction": {"dim": 32.5},
    "true": {"num_layers": True},
    "none": {"hidden": None},
    "missing": {"hidden": ...},
    "more": {"more": 1},
    "another layout": {"spec": "\x1b[31mred"},
    "a wider layout": {"spec": "full256"},
    "no lengths": {"lengths": []},
    "falling lengths": {"lengths": [8, 3]},
    "half lengths": {"lengths": [3.5, 8]},
    "long lengths": {"lengths": [10**6]},
    "sigmas of words": {"sigmas": ["1", "0"]},
    "rising sigmas": {"sigmas": [0.0, 1.0]},
    "many sigmas": {"sigmas": list(np.linspace(1, 0, 10_000))},
    "history": {"history": 10**9},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_is_not_made_from_what_a_config_claims(name: str, tmp_path: Path) -> None:
    refused(load_motion, _motion(tmp_path, config=CONFIGS[name]), match="cannot be read as a motion model")


@pytest.mark.parametrize("name", ["config", "phones", "format"])
@pytest.mark.parametrize("value", [..., "", "{", "[]", "null", "[" * 50_000, '{"dim": NaN}', "\x1b]0;owned\x07"])
def test_metadata_that_say_something_else_are_refused(name: str, value: Any, tmp_path: Path) -> None:
    refused(load_motion, _motion(tmp_path, metadata={name: value}))


def _poke(name: str, raw: bytes) -> Callable[[dict[str, Any], bytearray], None]:
    def change(header: dict[str, Any], body: bytearray) -> None:
        at = header[name]["data_offsets"][0]
        body[at : at + len(raw)] = raw

    return change


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("enter.weight", np.float16(np.nan).tobytes()),
        ("leave.bias", np.float16(np.inf).tobytes()),
        ("std_E", np.float32(0).tobytes()),
        ("std_E", np.float32(-1).tobytes()),
        ("mean_E", np.float32(1e30).tobytes()),
        ("mean_E", np.float32(np.nan).tobytes()),
    ],
)
def test_numbers_that_no_model_has_are_refused(name: str, raw: bytes, tmp_path: Path) -> None:
    refused(load_motion, _motion(tmp_path, _poke(name, raw)), match=f"{name} holds values")


def _rename(header: dict[str, Any], body: bytearray) -> None:
    header["\x1b[2Jenter.weight"] = header.pop("enter.weight")


def _integer(header: dict[str, Any], body: bytearray) -> None:
    header["enter.weight"]["dtype"] = "I16"


def _turned(header: dict[str, Any], body: bytearray) -> None:
    header["enter.weight"]["shape"].reverse()


@pytest.mark.parametrize("change", [_rename, _integer, _turned])
def test_tensors_of_other_names_kinds_and_shapes_are_refused(
    change: Callable[[dict[str, Any], bytearray], None], tmp_path: Path
) -> None:
    refused(load_motion, _motion(tmp_path, change), match=r"enter\.weight")


def _pth(content: object, *, zipped: bool = True) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=zipped)
    return out.getvalue()


def _encoder() -> dict[str, torch.Tensor]:
    lstm, linear = torch.nn.LSTM(40, 256, 3, batch_first=True), torch.nn.Linear(256, 256)
    state = {f"lstm.{k}": v for k, v in lstm.state_dict().items()}
    return state | {f"linear.{k}": v for k, v in linear.state_dict().items()}


def _swollen() -> bytes:
    """A few bytes that say of themselves that they unpack to two gigabytes."""
    out, size = io.BytesIO(), 123_457
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(size))
    data = out.getvalue()
    assert data.count(struct.pack("<L", size)) == 2
    return data.replace(struct.pack("<L", size), struct.pack("<L", 1 << 31))


def _pths() -> Iterator[tuple[str, Callable[[], bytes]]]:
    good = _encoder
    changed: dict[str, Callable[[], object]] = {
        "a tensor": lambda: torch.zeros(3),
        "a list": lambda: [torch.zeros(3)],
        "a number": lambda: 3,
        "none": lambda: None,
        "numbered tensors": lambda: {0: torch.zeros(3)},
        "no state": lambda: {"other": good()},
        "a state of none": lambda: {"model_state": None},
        "a state of a list": lambda: {"model_state": [1]},
        "a numbered state": lambda: {"model_state": {1: torch.zeros(1)}},
        "an empty state": lambda: {"model_state": {}},
        "words for weights": lambda: {"model_state": good() | {"linear.bias": "words"}},
        "lists for weights": lambda: {"model_state": good() | {"linear.bias": [0.0] * 256}},
        "NaN": lambda: {"model_state": good() | {"linear.bias": torch.full((256,), math.nan)}},
        "infinity": lambda: {"model_state": good() | {"linear.bias": torch.full((256,), math.inf)}},
        "integers": lambda: {"model_state": good() | {"linear.bias": torch.zeros(256, dtype=torch.int64)}},
        "complex": lambda: {"model_state": good() | {"linear.bias": torch.zeros(256, dtype=torch.complex64)}},
        "sparse": lambda: {"model_state": good() | {"linear.bias": torch.zeros(256).to_sparse()}},
        "meta": lambda: {"model_state": good() | {"linear.bias": torch.zeros(256, device="meta")}},
        "a huge view": lambda: {"model_state": good() | {"linear.bias": torch.zeros(1).expand(1 << 40)}},
        "one dimension more": lambda: {"model_state": good() | {"linear.bias": torch.zeros(256, 1)}},
        "one tensor more": lambda: {"model_state": good() | {"linear.\x1b[2J": torch.zeros(1)}},
        "one tensor less": lambda: {"model_state": {k: v for k, v in good().items() if k != "linear.bias"}},
    }
    for name, make in changed.items():
        for zipped in (True, False):
            yield f"{name}, {'new' if zipped else 'old'}", lambda make=make, zipped=zipped: _pth(make(), zipped=zipped)
    for share in (0.0, 0.1, 0.5, 0.99):
        for zipped in (True, False):
            yield (
                f"cut at {share:g}, {'new' if zipped else 'old'}",
                lambda share=share, zipped=zipped: (d := _pth({"model_state": good()}, zipped=zipped))[
                    : int(len(d) * share)
                ],
            )
    yield "a bomb", _swollen
    yield "words", lambda: b"hello" * 100


PTHS = dict(_pths())


def test_a_small_file_may_not_unpack_to_a_large_one(tmp_path: Path) -> None:
    path = tmp_path / "pretrained.pt"
    path.write_bytes(_swollen())
    refused(GE2EEncoder, path, match="unpacks to more than 268435456 bytes")


@pytest.mark.parametrize("name", PTHS)
def test_weights_that_torch_saved_are_told_by_their_tensors(name: str, tmp_path: Path) -> None:
    path = tmp_path / "pretrained.pt"
    path.write_bytes(PTHS[name]())
    refused(GE2EEncoder, path, match="pretrained")


@pytest.mark.parametrize("name", PTHS)
def test_liveportrait_takes_none_of_them_either(name: str, tmp_path: Path) -> None:
    for file in FILES.values():
        (tmp_path / file).write_bytes(PTHS[name]())
    refused(load_networks, tmp_path)


def _voices() -> Iterator[tuple[str, dict[str, Any] | bytes]]:
    table = np.zeros((510, 1, 256), np.float32)
    yield "none", {}
    yield "integers", {"af": table.astype(np.int32)}
    yield "complex", {"af": table.astype(np.complex64)}
    yield "words", {"af": np.array(["a" * 256])}
    yield "narrow", {"af": table[..., :100]}
    yield "empty", {"af": table[:0]}
    yield "a number", {"af": np.float32(1)}
    yield "four axes", {"af": table[None]}
    yield "NaN", {"af": np.where(np.arange(256) == 7, np.nan, table).astype(np.float32)}
    yield "infinite", {"af": np.where(np.arange(256) == 7, np.inf, table).astype(np.float32)}
    yield "far out", {"af": table + 1e30}
    yield "1,500 voices", {f"v{i}": np.zeros((1, 256), np.float32) for i in range(1500)}
    yield "no zip", b"hello"
    yield "a cut zip", b"PK\3\4" + bytes(100)
    yield "a bomb", _swollen()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("af.npy", b"not an array")
    yield "no array", out.getvalue()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 256), }"
        header += b" " * (-len(header) - 11 % 64) + b"\n"
        archive.writestr("af.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64))
    yield "an array of a terabyte", out.getvalue()


VOICES = dict(_voices())


@pytest.mark.parametrize("name", VOICES)
def test_styles_of_a_voice_are_finite_tables(name: str, tmp_path: Path) -> None:
    path, content = tmp_path / "voices.npz", VOICES[name]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    for read in (kokoro_styles, kokoro_names):
        refused(read, path, match="not a file of Kokoro styles")


def test_a_voice_nobody_knows_is_named_without_its_escapes(tmp_path: Path) -> None:
    path = tmp_path / "voices.npz"
    np.savez(path, **{"\x1b[31mred": np.zeros((1, 256), np.float32)})  # type: ignore[arg-type]
    refused(lambda path: kokoro_styles(path, "\x1b[2Jme"), path, match=r"no voice '\\+x1b\[2Jme'.*\\x1b\[31mred")


def _onnx(path: Path) -> object:
    styles = path.with_name("voices.npz")
    np.savez(styles, af=np.zeros((510, 1, 256), np.float32))
    return KokoroVoice(path, styles)


@pytest.mark.heavy
def test_a_model_of_a_voice_is_whole_and_reads_what_kokoro_reads(tmp_path: Path) -> None:
    from hibari.voices import voice_path

    path, heart = tmp_path / "model.onnx", Path(voice_path("heart")).read_bytes()
    path.write_bytes(heart)
    refused(_onnx, path, match="reads .*ids.*, not tokens, style and speed")
    path.write_bytes(heart[: len(heart) // 2])
    refused(_onnx, path, match="cannot be loaded")
    path.write_bytes(b"/" * 2_000_000)
    refused(_onnx, path, match="cannot be loaded")
    path.write_bytes(heart + b"\x0a\x08location\x12\x0b/etc/passwd")
    refused(_onnx, path, match="takes weights from other files")


LINES: dict[str, str] = {
    "not JSON": "{",
    "a list": "[]",
    "a number": "3",
    "deep": "[" * 60_000,
    "no coefs": "{}",
    "coefs of a list": '{"coefs": []}',
    "a word": '{"coefs": {"jawOpen": "wide"}}',
    "none": '{"coefs": {"jawOpen": null}}',
    "true": '{"coefs": {"jawOpen": true}}',
    "a list of one": '{"coefs": {"jawOpen": [0.1]}}',
    "NaN": '{"coefs": {"jawOpen": NaN}}',
    "infinite": '{"coefs": {"jawOpen": 1e999}}',
    "far out": '{"coefs": {"jawOpen": 1e30}}',
    "googol": '{"coefs": {"jawOpen": 1' + "0" * 400 + "}}",
    "digits": '{"coefs": {"jawOpen": ' + "9" * 9000 + "}}",
    "no such name": '{"coefs": {"\x7f\\u001b[2J": 1}}',
    "twice": '{"coefs": {"jawOpen": 1, "jawOpen": 0}}',
    "long": '{"coefs": {}}' + " " * 70_000,
}


@pytest.mark.parametrize("name", LINES)
def test_a_line_of_motion_holds_finite_numbers_by_name(name: str, tmp_path: Path) -> None:
    spec = arkit64()
    header = next(kinematics.json_lines(np.zeros((0, 64), np.float32), spec))
    refused(lambda _: kinematics.read_json_lines([header, LINES[name]], spec), tmp_path, match="line 2 of the motion")


@pytest.mark.parametrize("change", [{"format": "other"}, {"spec": "lp70"}, {"spec": None}, {"format": 3}])
def test_another_layout_is_not_taken_for_this_one(change: dict[str, Any], tmp_path: Path) -> None:
    spec = arkit64()
    header = json.loads(next(kinematics.json_lines(np.zeros((0, 64), np.float32), spec)))
    line = json.dumps(header | change)
    refused(lambda _: kinematics.read_json_lines([line], spec), tmp_path, match="line 1 of the motion")


def _head() -> dict[str, Any]:
    return {
        "neutral": np.zeros((5, 3), np.float32),
        "faces": np.array([[0, 1, 2, 3], [0, 1, 4, -1]], np.int32),
        "expression_names": np.array(["jawOpen"]),
        "expression": np.zeros((1, 5, 3), np.float32),
        "identity": np.zeros((2, 5, 3), np.float32),
    }


HEADS: dict[str, dict[str, Any]] = {
    "no points": {"neutral": np.zeros((0, 3), np.float32)},
    "points of two": {"neutral": np.zeros((5, 2), np.float32)},
    "NaN": {"neutral": np.full((5, 3), np.nan, np.float32)},
    "a point too far": {"faces": np.array([[0, 1, 2, 5]], np.int32)},
    "a point before": {"faces": np.array([[-1, 1, 2, 3]], np.int32)},
    "triangles": {"faces": np.array([[0, 1, 2]], np.int32)},
    "faces of floats": {"faces": np.zeros((1, 4), np.float32)},
    "names of numbers": {"expression_names": np.zeros(1)},
    "two names": {"expression_names": np.array(["jawOpen", "jawLeft"])},
    "shapes of another head": {"expression": np.zeros((1, 6, 3), np.float32)},
    "modes of another head": {"identity": np.zeros((2, 6, 3), np.float32)},
    "modes of words": {"identity": np.array(["a"])},
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_names_its_own_points(name: str, tmp_path: Path) -> None:
    path = tmp_path / "head.npz"
    np.savez(path, **_head())
    assert HeadModel.load(path).triangles_R3.tolist() == [[0, 1, 2], [0, 1, 4], [0, 2, 3]]
    np.savez(path, **(_head() | HEADS[name]))
    refused(HeadModel.load, path, match="not a packed ICT-FaceKit head")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, 3.01, -3.01])
def test_a_style_lies_within_three_of_ordinary(value: float) -> None:
    with pytest.raises(ConfigError, match=r"style smile must lie in -3\.\.3"):
        style_vector({"smile": value})
    assert np.abs(style_vector({"smile": 3.0, "nod": -3.0})).max() == 3


def test_a_bound_is_a_bound_of_the_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamdiff.avatar.window._MAX_BYTES", 1000)
    with pytest.raises(CheckpointError, match="larger than 1000 bytes"):
        load_motion(_motion(tmp_path))
