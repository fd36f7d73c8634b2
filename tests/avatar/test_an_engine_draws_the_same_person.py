"""An engine is a person compiled ahead: one file, no fitting, and the frames of the bundle it came from."""

from __future__ import annotations

import argparse
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from streamdiff.avatar.bundle import IdentityBundle
from streamdiff.avatar.compiled import CompiledRenderer, compile_bundle
from streamdiff.avatar.kinematics import arkit64
from streamdiff.avatar.render import WarpRenderer
from streamdiff.cli import avatar as commands
from streamdiff.errors import BackendError, CheckpointError, ConfigError, InputError
from tests.avatar.drawn_face import drawn_bundle


@pytest.fixture(scope="module")
def bundle() -> IdentityBundle:
    return drawn_bundle()


@pytest.fixture(scope="module")
def engine(bundle: IdentityBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "drawn.engine"
    compile_bundle(bundle, path)
    return path


def motion(num_frames: int) -> np.ndarray:
    spec, rng = arkit64(), np.random.default_rng(0)
    return spec.clamp(rng.uniform(-0.3, 0.6, (num_frames, spec.num_coefs)).astype(np.float32))


def test_an_engine_gives_the_bits_of_its_bundle(bundle: IdentityBundle, engine: Path) -> None:
    motion_AE = motion(6)
    drawn = CompiledRenderer(engine).render(motion_AE)
    assert torch.equal(drawn, WarpRenderer(bundle).render(motion_AE))
    assert len({frame.numpy().tobytes() for frame in drawn}) == len(motion_AE)


def test_an_engine_says_whose_it_is(bundle: IdentityBundle, engine: Path) -> None:
    opened = CompiledRenderer(engine)
    assert (opened.name, opened.size, opened.style) == (bundle.name, bundle.size, dict(bundle.style))
    assert opened.facts["bundle_sha256"] == bundle.sha256


def test_talk_and_inspect_take_an_engine(engine: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    person = commands.open_person(engine)
    assert isinstance(person.renderer, CompiledRenderer)
    parser = argparse.ArgumentParser()
    commands.register(parser.add_subparsers(required=True))
    args = parser.parse_args(["avatar", "inspect", str(engine)])
    assert args.run(args) == 0
    assert json.loads(capsys.readouterr().out)["name"] == person.name
    args = parser.parse_args(["avatar", "compile", str(engine), "--out", str(tmp_path / "e.mp4")])
    with pytest.raises(ConfigError, match="must end in"):
        args.run(args)


def test_the_wrong_motion_and_the_wrong_file_are_told(engine: Path, tmp_path: Path) -> None:
    opened = CompiledRenderer(engine)
    with pytest.raises(InputError, match=r"\[A, 64\]"):
        opened.render(np.zeros((1, 3), np.float32))
    with pytest.raises(InputError, match="not finite"):
        opened.render(np.full((1, 64), np.nan, np.float32))
    with pytest.raises(InputError, match="no engine at"):
        CompiledRenderer(tmp_path / "none.engine")
    (tmp_path / "text.engine").write_text("hello")
    with pytest.raises(CheckpointError, match="is no engine"):
        CompiledRenderer(tmp_path / "text.engine")


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"format": "x"}, CheckpointError, "format"),
        ({"torch": "1.0"}, CheckpointError, "compiled by torch 1.0"),
        ({"device": "cuda"}, BackendError, "CUDA"),
        ({"native": True}, CheckpointError, "does not load"),
    ],
)
def test_an_engine_of_another_make_is_told(
    engine: Path, tmp_path: Path, changes: dict[str, object], error: type[Exception], match: str
) -> None:
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("CUDA is here")
    altered = tmp_path / "altered.engine"
    with zipfile.ZipFile(engine) as source, zipfile.ZipFile(altered, "w") as target:
        facts = json.loads(source.read("facts.json"))
        target.writestr("facts.json", json.dumps({**facts, **changes}))
        target.writestr("frame.pt2", source.read("frame.pt2"))
    with pytest.raises(error, match=match):
        CompiledRenderer(altered)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_machine_code_draws_within_a_grey_level(bundle: IdentityBundle, tmp_path: Path) -> None:
    compile_bundle(bundle, tmp_path / "n.engine", native=True)
    motion_AE = motion(6)
    drawn = CompiledRenderer(tmp_path / "n.engine").render(motion_AE)
    difference = (drawn.int() - WarpRenderer(bundle).render(motion_AE).int()).abs()
    assert int(difference.max()) <= 1
    assert float((difference > 0).float().mean()) < 1e-3
