"""Whatever is wrong is said in one line, what, why and what to do, with exit status 2; nothing is written."""

from __future__ import annotations

import struct
import sys
import wave
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from streamdiff.cli.main import main
from streamdiff.generate import engine_for
from tests.generate.processes import Ranks, write_inputs


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, str]:
    flags = write_inputs(tmp_path, seconds=0.5)
    return {**dict(zip(flags[::2], flags[1::2], strict=True)), "--out": str(tmp_path / "film.mp4")}


def complaint(flags: dict[str, str], capsys: pytest.CaptureFixture[str]) -> str:
    arguments = ["generate", *(part for pair in flags.items() for part in pair)]
    status = main(arguments)
    captured = capsys.readouterr()
    assert status == 2, captured.err
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    assert not Path(flags["--out"]).exists()
    return lines[0]


@pytest.mark.parametrize("flag", ["--image", "--audio"])
def test_no_such_file(inputs: dict[str, str], capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert "nowhere" in complaint({**inputs, flag: "nowhere/at.all"}, capsys)


@pytest.mark.parametrize("flag", ["--image", "--audio"])
def test_not_what_it_should_be(
    inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    path = tmp_path / "words.txt"
    path.write_text("neither picture nor sound " * 50)
    assert "words.txt" in complaint({**inputs, flag: str(path)}, capsys)


@pytest.mark.parametrize("flag", ["--image", "--audio"])
def test_an_empty_file_and_a_folder(
    inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    empty = tmp_path / "empty.bin"
    empty.touch()
    complaint({**inputs, flag: str(empty)}, capsys)
    complaint({**inputs, flag: str(tmp_path)}, capsys)


def test_a_voice_without_samples(inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "silent.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", "not compressed"))
    assert "silent.wav" in complaint({**inputs, "--audio": str(path)}, capsys)


def test_a_voice_of_nan(inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "nan.wav"
    body = struct.pack("<f", float("nan")) * 8000
    header = (
        b"RIFF"
        + struct.pack("<I", 36 + len(body))
        + b"WAVEfmt "
        + struct.pack("<IHHIIHH", 16, 3, 1, 16000, 64000, 4, 32)
    )
    path.write_bytes(header + b"data" + struct.pack("<I", len(body)) + body)
    complaint({**inputs, "--audio": str(path)}, capsys)


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--size", "130x128", "multiples of 32"),
        ("--size", "0x0", "positive multiples"),
        ("--size", "large", "384x704"),
        ("--size", "16x16", "try 32x32"),
        ("--steps", "0", "1..50"),
        ("--steps", "1000", "1..50"),
        ("--seconds", "-1", "positive"),
        ("--seconds", "nan", "positive"),
        ("--partition", "2,1", "4"),
        ("--partition", "2;2", "2,1,1"),
        ("--partition", "2,2", "2 ranks"),
        ("--device", "abacus", "cpu"),
        ("--attention", "the-best", "sdpa"),
        ("--threads", "0", "1..1024"),
        ("--checkpoint", "nowhere", "nowhere"),
        ("--lora", "nowhere.safetensors", "cannot read nowhere.safetensors"),
        ("--preset", "live_avatar_14b", "--checkpoint"),
        ("--out", "no/such/folder/film.mp4", "no/such/folder"),
        ("--out", "film.gif", ".mp4"),
        ("--deadline", "0", "positive"),
        ("--deadline", "nan", "positive"),
        ("--startup", "-1", "positive"),
        ("--size", "\u00b2x\u00b2", "384x704"),
        ("--partition", "\u00b2", "2,1,1"),
        ("--device", "meta", "cpu"),
        ("--prompt", "\udcff", "UTF-8"),
        ("--ranks", "3", "--plan"),
        ("--light-decoder", "nowhere.pth", "nowhere.pth"),
        ("--precision", "fp8", "use the precision of the weights"),
        ("--attention", "sdpa-flash", "it needs a CUDA device"),
    ],
)
def test_values_that_cannot_work(
    inputs: dict[str, str], capsys: pytest.CaptureFixture[str], flag: str, value: str, words: str
) -> None:
    assert words in complaint({**inputs, flag: value}, capsys)


def test_an_input_is_never_overwritten(
    inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    voice = tmp_path / "voice.mp4"
    voice.write_bytes(Path(inputs["--audio"]).read_bytes())
    before = voice.read_bytes()
    arguments = {**inputs, "--audio": str(voice), "--out": str(voice)}
    assert main(["generate", *(part for pair in arguments.items() for part in pair)]) == 2
    assert "overwritten" in capsys.readouterr().err
    assert voice.read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk(inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film = tmp_path / "full.mp4"
    film.symlink_to("/dev/full")
    arguments = {**inputs, "--out": str(film), "--steps": "1"}
    assert main(["generate", *(part for pair in arguments.items() for part in pair)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_the_same_steps_are_the_same_grid() -> None:
    from streamdiff.cli.generate import job_from
    from streamdiff.cli.main import parser

    flags = ["generate", "--image", "a", "--audio", "b"]
    default, four = (job_from(parser().parse_args([*flags, *more]), None) for more in ([], ["--steps", "4"]))
    assert default.config == four.config


def test_a_cuda_device_that_is_not_there(inputs: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "doctor" in complaint({**inputs, "--device": "cuda:0"}, capsys)


def test_the_wrong_checkpoint(inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"stranger": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    line = complaint({**inputs, "--checkpoint": str(tmp_path)}, capsys)
    assert "stranger" in line
    assert "missing" in line


@pytest.mark.slow
def test_too_many_ranks(inputs: dict[str, str]) -> None:
    ranks = Ranks.start(1, [part for pair in inputs.items() for part in pair], world_size=9)
    ((status, stderr),) = ranks.end([0], within_s=120).values()
    assert status == 2
    assert "9 ranks are too many for 4 steps" in stderr
    assert len(stderr.strip().splitlines()) == 1


def test_too_little_memory(
    inputs: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamdiff.generate.available_bytes", lambda device: 1_000_000)
    assert "GiB" in complaint(inputs, capsys)


@pytest.mark.parametrize(("flag", "value"), [("--seconds", "soon"), ("--precision", "int3"), ("--nothing", "3")])
def test_a_malformed_flag_is_one_line_too(
    inputs: dict[str, str], capsys: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    line = complaint({**inputs, flag: value}, capsys)
    assert flag in line
    assert "streamdiff generate --help" in line or flag == "--nothing"


def test_what_the_flags_of_the_step_say_is_what_the_engine_gets() -> None:
    from streamdiff.cli.generate import job_from
    from streamdiff.cli.main import parser
    from streamdiff.models.served.options import Precision

    flags = ["generate", "--image", "a", "--audio", "b"]
    plain, chosen = (
        job_from(parser().parse_args([*flags, *more]), None)
        for more in ([], ["--precision", "fp8", "--attention", "auto"])
    )
    assert (plain.options.precision, plain.options.attention) == (Precision.WEIGHTS, None)
    assert (chosen.options.precision, chosen.options.attention) == (Precision.FP8, "auto")
    assert engine_for(chosen).options == chosen.options


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_machine_says_how_much_memory_it_has() -> None:
    from streamdiff.estimate import available_bytes

    have = available_bytes("cpu")
    assert have is not None
    assert 2**26 < have < 2**50
