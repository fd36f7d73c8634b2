"""The table of recipes: every one loads, says what is wrong, and the table itself needs no torch."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from streamdiff.cli.main import main
from streamdiff.cli.train import AVATAR, RECIPES, VIDEO

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_options_and_a_run(name: str) -> None:
    add_arguments, run = RECIPES[name].load()
    parser = argparse.ArgumentParser(prog=name)
    add_arguments(parser)
    options = {option for action in parser._actions for option in action.option_strings}
    assert "--out" in options
    assert all(action.help for action in parser._actions), "every option says what it is"
    assert callable(run)


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - {"data", "encode", "rig"}))
def test_whatever_learns_is_planned_stopped_and_resumed_alike(name: str) -> None:
    add_arguments, _ = RECIPES[name].load()
    parser = argparse.ArgumentParser(prog=name)
    add_arguments(parser)
    options = {option for action in parser._actions for option in action.option_strings}
    assert {"--budget", "--steps", "--batch", "--lr", "--seed", "--resume", "--device", "--threads"} <= options


def test_an_unknown_recipe_names_those_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "motoin"]) == 2
    said = capsys.readouterr().err
    assert "no recipe 'motoin'" in said
    assert all(name in said for name in (*VIDEO, *AVATAR))


@pytest.mark.processes
def test_the_table_needs_no_torch() -> None:
    code = "import sys, streamdiff.cli.train as t; assert t.RECIPES; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0


def test_motion_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["train", "motion", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*common, "--speech-minutes", "0"]) == 2
    assert "--speech-minutes: must be a positive number" in capsys.readouterr().err
    mouth = ["train", "mouth", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--steps", "1"]
    assert main(mouth) == 2
    assert "give --head ict_facekit.npz" in capsys.readouterr().err
