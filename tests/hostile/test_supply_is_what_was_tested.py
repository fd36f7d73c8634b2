"""What comes with the package, or from an index of packages, is compared with what was tested before it is used."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from streamdiff import checkpoint, packaged, presets
from streamdiff.avatar import fetch, landmarks, quality
from streamdiff.avatar.render import _bundled_mouth
from streamdiff.avatar.rig import load_rig
from streamdiff.avatar.seal import load_seals
from streamdiff.avatar.window import weights_path
from streamdiff.cli import machine
from streamdiff.cli.main import main
from streamdiff.conversation import recogniser
from streamdiff.errors import CheckpointError, InputError

SHIPPED = sorted(p.relative_to(packaged.FOLDER).as_posix() for p in packaged.FOLDER.rglob("*.*") if p.suffix != ".md")


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the shipped weights, which are used instead."""
    folder = tmp_path / "weights"
    shutil.copytree(packaged.FOLDER, folder)
    for module in (packaged, checkpoint.shipped.__globals__):
        if isinstance(module, dict):
            monkeypatch.setitem(module, "FOLDER", folder)
        else:
            monkeypatch.setattr(module, "FOLDER", folder)
    return folder


def test_every_weight_of_the_package_is_known() -> None:
    assert len(SHIPPED) == 8
    assert all(packaged.packaged(name).is_file() for name in SHIPPED)


USERS: dict[str, Callable[[], object]] = {
    "landmark_rig.safetensors": load_rig.__wrapped__,
    "motion_arkit64.safetensors": weights_path,
    "mouth_decoder.safetensors": _bundled_mouth.__wrapped__,
    "seal_detector.safetensors": load_seals.__wrapped__,
    "portrait/codec.safetensors": lambda: checkpoint.shipped(presets.portrait()),
    "portrait/diffusion_pytorch_model.safetensors": lambda: checkpoint.shipped(presets.portrait()),
    "portrait/face.png": lambda: checkpoint.shipped_face(presets.portrait()),
}


@pytest.mark.parametrize("name", USERS)
def test_one_changed_bit_is_refused(copy: Path, name: str) -> None:
    USERS[name]()
    path = copy / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} is not the file that was shipped"):
        USERS[name]()


def test_a_missing_or_unlisted_file_is_refused(copy: Path) -> None:
    (copy / "other.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is not the file that was shipped"):
        packaged.packaged("other.safetensors")
    with pytest.raises(CheckpointError, match="is missing"):
        packaged.packaged("nowhere.safetensors")


def test_only_wheels_are_fetched_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source package would run its own code while it is downloaded."""
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "", "no network")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(InputError, match="no network"), fetch.downloaded("thing==1.0", "a thing"):
        pass
    (command,) = asked
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[command.index("--only-binary") + 1] == ":all:"


def test_a_download_is_announced(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def run(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        assert caplog.messages, "before it was announced"
        return subprocess.CompletedProcess([], 1, "", "no network")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(InputError), fetch.downloaded("thing==1.0", "a thing"):
        pass
    assert "downloading a thing from PyPI, once: thing==1.0" in caplog.messages[0]


def test_a_download_can_be_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One line then says where the file belongs and how it gets there; pip is not asked."""
    monkeypatch.setattr(fetch, "_is_refused", False)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("asked pip"))
    monkeypatch.setattr(landmarks, "_beside_the_package", lambda: None)
    for value, is_refused in (("0", False), ("", False), ("1", True)):
        monkeypatch.setenv("STREAMDIFF_OFFLINE", value)
        machine.set_environment()
        assert fetch._is_refused == is_refused
    with pytest.raises(InputError, match=r"face landmarker.*is not there.*`streamdiff avatar fetch`") as caught:
        landmarks.fetch_task(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_needed_can_be_fetched_when_somebody_installs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(landmarks, "fetch_task", lambda: Path("cache/face_landmarker.task"))
    monkeypatch.setattr(recogniser, "fetch_moonshine", lambda: Path("cache/moonshine-tiny-en"))
    assert main(["avatar", "fetch"]) == 0
    assert capsys.readouterr().out == "cache/face_landmarker.task: the face landmarker\n"
    assert main(["avatar", "fetch", "--listening"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["cache/moonshine-tiny-en: the recogniser"]


@contextmanager
def _other_files(*_: object, **__: object) -> Generator[zipfile.ZipFile]:
    """A wheel with files of the right names."""

    class Other(zipfile.ZipFile):
        def read(self, name: object, pwd: object = None) -> bytes:
            return b"something else"

    out = io.BytesIO()
    zipfile.ZipFile(out, "w").close()
    yield Other(out)


@pytest.mark.parametrize(
    ("module", "call"),
    [
        (recogniser, recogniser.fetch_moonshine),
        (quality, quality._fetch_recogniser),
        (quality, quality._fetch_embedder),
    ],
    ids=["moonshine", "whisper", "embedder"],
)
def test_other_files_of_the_right_names_are_not_kept(
    module: ModuleType, call: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "downloaded", _other_files)
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path)
    with pytest.raises(InputError, match="tested"):
        call()
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".ort", ".dat")]


def test_another_recogniser_in_the_cache_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "whisper-base").mkdir()
    (tmp_path / "whisper-base" / "model.bin").write_bytes(b"something else")
    monkeypatch.setattr(quality, "downloaded", _other_files)
    monkeypatch.setattr(quality, "cache_folder", lambda: tmp_path)
    with pytest.raises(InputError, match="tested"):
        quality._fetch_recogniser()


def test_another_file_in_the_cache_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in recogniser._SHA256:
        (tmp_path / name).write_bytes(b"something else")
    monkeypatch.setattr(recogniser, "downloaded", _other_files)
    with pytest.raises(InputError, match="tested"):
        recogniser.fetch_moonshine(tmp_path)


ROOT = Path(__file__).resolve().parents[2]
LOCK = (ROOT / "launch" / "tested.txt").read_text(encoding="ascii").splitlines()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_lock_names_versions_and_hashes_and_no_place() -> None:
    assert LOCK[0].startswith("# Made by launch/lock.sh for Python 3.")
    assert len(LOCK) > 50
    assert [line for line in LOCK[1:] if not re.fullmatch(r"[a-z0-9.-]+==[^ ]+ --hash=sha256:[0-9a-f]{64}", line)] == []


def test_the_bill_of_materials_is_that_of_the_lock() -> None:
    """CycloneDX: every package with its version and the SHA-256 of a wheel; torch, whose build may differ, without."""
    bill = json.loads((ROOT / "launch" / "sbom.json").read_text(encoding="utf-8"))
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    main = bill["metadata"]["component"]
    assert (main["name"], main["version"]) == (PROJECT["name"], PROJECT["version"])
    assert main["licenses"][0]["license"]["id"] == PROJECT["license"]
    found = {part["name"]: (part["version"], part["purl"], *_hashes(part)) for part in bill["components"]}
    locked = {}
    for line in LOCK[1:]:
        package, _, digest = line.partition(" --hash=sha256:")
        name, _, version = package.partition("==")
        locked[name] = (version, f"pkg:pypi/{name}@{version}", digest)
    assert len(found) == len(bill["components"])
    torch = found.pop("torch")
    assert f"tested_torch={torch[0]}\n" in (ROOT / "launch" / "environment.sh").read_text(encoding="utf-8")
    assert found == locked, "run: bash launch/lock.sh --sbom"


def _hashes(part: dict[str, Any]) -> list[str]:
    hashes = [one for at in part.get("externalReferences", ()) for one in at.get("hashes", ())]
    return [one["content"] for one in hashes if one["alg"] == "SHA-256"]


def test_the_lock_has_what_the_project_asks_for() -> None:
    names = {re.sub(r"[_.]", "-", line.partition("==")[0]) for line in LOCK[1:]}
    extras = ("avatar", "demo", "encoders", "listen", "think", "serve", "trust")
    wanted = [*PROJECT["dependencies"], *(one for extra in extras for one in PROJECT["optional-dependencies"][extra])]
    found = {re.match(r"[A-Za-z0-9._-]+", one)[0].lower() for one in wanted}  # type: ignore[index]
    assert found - names == {"torch"}, "run launch/lock.sh"
