"""Whatever is read from a file is data: no reader of the package can be made to run code from one."""

from __future__ import annotations

import ast
import io
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import streamdiff
from streamdiff.avatar.bundle import IdentityBundle
from streamdiff.avatar.head3d import HeadModel
from streamdiff.avatar.landmarks import Landmarker
from streamdiff.avatar.liveportrait import FILES, load_networks
from streamdiff.avatar.window import load_motion
from streamdiff.errors import StreamdiffError
from streamdiff.voice.encoder import GE2EEncoder
from streamdiff.voice.kokoro import kokoro_styles

PACKAGE = Path(streamdiff.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py")) + sorted((PACKAGE.parent / "kernels").rglob("*.py"))


def _calls() -> Iterator[tuple[str, str, ast.Call]]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield f"{path.relative_to(PACKAGE.parent)}:{node.lineno}", ast.unparse(node.func), node


def _is(call: ast.Call, name: str, value: bool) -> bool:
    return any(k.arg == name and isinstance(k.value, ast.Constant) and k.value.value is value for k in call.keywords)


@pytest.mark.heavy
def test_torch_load_takes_weights_only() -> None:
    loads = [(where, call) for where, name, call in _calls() if name == "torch.load"]
    assert loads, "nothing is searched"
    assert [where for where, call in loads if not _is(call, "weights_only", True)] == []


@pytest.mark.heavy
def test_numpy_load_takes_no_pickles() -> None:
    loads = [(where, call) for where, name, call in _calls() if name in ("np.load", "numpy.load")]
    assert loads, "nothing is searched"
    assert [
        where
        for where, call in loads
        if any(k.arg == "allow_pickle" for k in call.keywords) and not _is(call, "allow_pickle", False)
    ] == []


@pytest.mark.heavy
def test_nothing_unpickles_or_evaluates() -> None:
    readers = {"eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads"}
    readers |= {"shelve.open", "torch.export.load", "torch.jit.load", "aoti_load_package", "torch.classes.load_library"}
    readers |= {"torch.ops.load_library", "yaml.load", "joblib.load", "dill.load", "torch.package.PackageImporter"}
    assert [(where, name) for where, name, _ in _calls() if name in readers] == []


class _Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.target,)


def _pth(bomb: _Bomb, *, zipped: bool) -> bytes:
    out = io.BytesIO()
    torch.save({"model_state": bomb, "retarget_shoulder": bomb}, out, _use_new_zipfile_serialization=zipped)
    return out.getvalue()


def _npz(bomb: _Bomb) -> bytes:
    out = io.BytesIO()
    array = np.array([bomb], dtype=object)
    names = ("af", "neutral", "faces", "expression_names", "expression", "identity")
    np.savez(out, **dict.fromkeys(names, array))  # type: ignore[arg-type]
    return out.getvalue()


def _zipped_pickle(bomb: _Bomb) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in ("archive/data.pkl", "data.pkl", "face_detector.tflite"):
            archive.writestr(name, pickle.dumps(bomb))
        archive.writestr("archive/version", "3\n")
    return out.getvalue()


def _liveportrait(path: Path) -> None:
    for name in FILES.values():
        (path.parent / name).write_bytes(path.read_bytes())
    load_networks(path.parent)


READERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bundle": (IdentityBundle.load, "me.avatar"),
    "engine": (IdentityBundle.load, "me.engine"),
    "motion": (load_motion, "motion.safetensors"),
    "head": (HeadModel.load, "head.npz"),
    "styles": (kokoro_styles, "voices.npz"),
    "style": (kokoro_styles, "voice.bin"),
    "speaker encoder": (GE2EEncoder, "pretrained.pt"),
    "landmarker": (Landmarker, "face_landmarker.task"),
    "liveportrait": (_liveportrait, "any.pth"),
}
BOMBS: dict[str, Callable[[_Bomb], bytes]] = {
    "pickle": pickle.dumps,
    "zipped pickle": _zipped_pickle,
    "pth": lambda bomb: _pth(bomb, zipped=True),
    "old pth": lambda bomb: _pth(bomb, zipped=False),
    "npz": _npz,
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("reader", READERS)
def test_a_bomb_does_not_go_off(reader: str, bomb: str, tmp_path: Path) -> None:
    target = tmp_path / "owned"
    read, name = READERS[reader]
    path = tmp_path / name
    path.write_bytes(BOMBS[bomb](_Bomb(target)))
    with pytest.raises(StreamdiffError) as caught:
        read(path)
    assert not target.exists()
    assert len(str(caught.value).splitlines()) == 1


def test_the_bombs_are_real(tmp_path: Path) -> None:
    for number, bomb in enumerate((pickle.dumps, lambda b: _pth(b, zipped=True), lambda b: _pth(b, zipped=False))):
        target = tmp_path / str(number)
        data = bomb(_Bomb(target))
        torch.load(io.BytesIO(data), weights_only=False) if number else pickle.loads(data)
        assert target.exists()
