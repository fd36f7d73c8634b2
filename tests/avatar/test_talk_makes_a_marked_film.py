"""``streamdiff talk`` writes a film of the face that speaks, marked as synthetic, and says what it cannot do."""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import socket
import wave
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from streamdiff.avatar import film
from streamdiff.avatar.engine import AvatarEngine
from streamdiff.avatar.kinematics import arkit64, read_json_lines
from streamdiff.avatar.window import save_motion
from streamdiff.cli import talk
from streamdiff.cli.main import parser
from streamdiff.errors import ConfigError, InputError, StreamdiffError
from streamdiff.media import SYNTHETIC_MARK
from streamdiff.output import Output
from tests.avatar.tiny_avatar import Bars, Tones, tiny_motion

Run = Callable[[Sequence[str]], int]


class LargeBars(Bars):
    """Bars of 64 pixels."""

    size = 64

    def render(self, motion_AE: torch.Tensor | np.ndarray) -> torch.Tensor:
        return super().render(motion_AE).repeat(1, 4, 4, 1)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    def load(_person: Path | None, *, voice: str | None, style: dict[str, float], **_: object) -> AvatarEngine:
        voiced = Tones() if voice is not None else None
        return AvatarEngine(LargeBars(), voice=voiced, motion=tiny_motion(), style={"smile": 0.5, **style}, name="bars")

    monkeypatch.setattr(AvatarEngine, "load", load)
    monkeypatch.setattr(talk.signals, "handle", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    save_motion(tiny_motion(), tmp_path / "motion.safetensors")

    def call(argv: Sequence[str]) -> int:
        words = ["talk", "--motion", str(tmp_path / "motion.safetensors"), *argv]
        args = parser(words).parse_args(words)
        return args.run(args)

    return call


def write_wav(path: Path, seconds: float, rate_hz: int = 16_000) -> np.ndarray:
    sound_S = (8000 * np.sin(np.arange(int(seconds * rate_hz)) * 0.1)).astype(np.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate_hz)
        file.writeframes(sound_S.tobytes())
    return sound_S


def film_of(path: Path) -> tuple[int, float, dict[str, str], np.ndarray]:
    """Frames, seconds of sound, tags, and the last picture."""
    with av.open(str(path)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with av.open(str(path)) as container:
        samples = sum(frame.samples for frame in container.decode(audio=0))
        return len(pictures), samples / 24_000, dict(container.metadata), pictures[-1]


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(talk).failed == 0


def test_a_text_becomes_a_film_and_a_sheet(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "film.mp4"
    text = "Hello there, my friend."
    assert run([text, "--out", str(out)]) == 0
    frames, sound_s, tags, _ = film_of(out)
    spoken = -(-len(text) * 60 // 40)
    assert frames == spoken + 8 + 14
    assert sound_s == pytest.approx(frames / 25, abs=0.1)
    assert tags["comment"].startswith(SYNTHETIC_MARK)
    with Image.open(out.with_suffix(".png")) as sheet:
        assert sheet.width > sheet.height > 64
    said = capsys.readouterr().out
    assert "film.mp4" in said
    assert "first sound after" in said


def test_the_same_command_makes_the_same_bytes(run: Run, tmp_path: Path) -> None:
    films = []
    for name in ("one.mp4", "two.mp4"):
        run(["Hello there. How are you?", "--out", str(tmp_path / name), "--seed", "3"])
        films.append((tmp_path / name).read_bytes())
    assert films[0] == films[1]


@pytest.mark.heavy
def test_a_sound_file_becomes_a_film(run: Run, tmp_path: Path) -> None:
    write_wav(tmp_path / "voice.wav", 6.3)
    out = tmp_path / "film.mp4"
    assert run(["--audio", str(tmp_path / "voice.wav"), "--out", str(out), "--no-sheet"]) == 0
    assert film_of(out)[0] == -(-63 * 25 // 10) + 8 + 14
    assert not out.with_suffix(".png").exists()


@pytest.mark.parametrize(("options", "keep"), [([], True), (["--no-cache"], False)])
def test_what_is_made_of_a_photo_is_kept_unless_one_says_no(
    options: list[str], keep: bool, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    load = AvatarEngine.load

    def noting(person: Path | None, **settings: object) -> AvatarEngine:
        asked.append(bool(settings["keep"]))
        return load(person, **settings)

    monkeypatch.setattr(AvatarEngine, "load", noting)
    run(["Hello.", "--out", str(tmp_path / "film.mp4"), "--no-sheet", *options])
    assert asked == [keep]


def test_text_is_read_while_it_is_written(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("First line here.\nSecond line.\n"))
    assert run(["-", "--out", str(tmp_path / "film.mp4")]) == 0
    assert film_of(tmp_path / "film.mp4")[0] > 30


def test_the_mark_can_be_seen(run: Run, tmp_path: Path) -> None:
    pictures = {}
    for name, options in (("plain", []), ("marked", ["--mark"])):
        run(["Hello.", "--out", str(tmp_path / f"{name}.mp4"), *options])
        pictures[name] = film_of(tmp_path / f"{name}.mp4")[3].astype(int)
    difference = np.abs(pictures["plain"] - pictures["marked"]).max(axis=2)
    assert difference[48:, :].max() > 60
    assert difference[:32].mean() < 6


def test_coefficients_leave_by_name(run: Run, tmp_path: Path) -> None:
    rig = tmp_path / "rig.jsonl"
    run(["Hello there.", "--out", str(tmp_path / "film.mp4"), "--rig", str(rig)])
    lines = rig.read_text().splitlines()
    motion_AE = read_json_lines(lines, arkit64())
    assert len(motion_AE) == film_of(tmp_path / "film.mp4")[0]
    assert json.loads(lines[1])["coefs"]["jawOpen"] >= 0


@pytest.mark.heavy
def test_coefficients_leave_by_osc_vmc_and_live_link_at_once(run: Run, tmp_path: Path) -> None:
    options = {"osc": ["--osc", ""], "vmc": ["--rig", "vmc:"], "livelink": ["--rig", "livelink:"]}
    packets, places = {}, ["--rig", str(tmp_path / "rig.jsonl")]
    with contextlib.ExitStack() as stack:
        listeners = {name: stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for name in options}
        for name, (option, prefix) in options.items():
            listeners[name].bind(("127.0.0.1", 0))
            listeners[name].settimeout(5)
            places += [option, f"{prefix}127.0.0.1:{listeners[name].getsockname()[1]}"]
        run(["Hi.", "--out", str(tmp_path / "film.mp4"), *places])
        packets = {name: listener.recv(65536) for name, listener in listeners.items()}
    assert packets["osc"].startswith(b"#bundle\0")
    assert b"/face/jawOpen\0" in packets["osc"]
    assert b"/VMC/Ext/OK\0" in packets["vmc"]
    assert packets["livelink"][0] == 6
    assert len((tmp_path / "rig.jsonl").read_text().splitlines()) == film_of(tmp_path / "film.mp4")[0] + 1


@pytest.mark.parametrize(
    ("argv", "error", "says"),
    [
        (["", "--out", "a.mp4"], InputError, "nothing to say"),
        (["😀", "--out", "a.mp4"], InputError, "nothing to say"),
        (["Hello", "--audio", "x.wav"], ConfigError, "not both"),
        (["--audio", "nowhere.wav"], InputError, "no such file"),
        (["Hello", "--out", "film.avi"], ConfigError, "must end in .mp4"),
        (["Hello", "--style", "wild=1"], ConfigError, "no style 'wild'"),
        (["Hello", "--style", "smile"], ConfigError, "smile=1"),
        (["Hello", "--osc", "nowhere"], ConfigError, "127.0.0.1:9000"),
        (["Hello", "--threads", "0"], ConfigError, r"1\.\.1024"),
        (["Hello", "--rig", "/nowhere/rig.jsonl"], InputError, "cannot write"),
        (["Hello", "--rig", "vmc:127.0.0.1:0"], ConfigError, "vmc:127.0.0.1:39539"),
        (["Hello", "--rig", "a.jsonl", "--rig", "a.jsonl"], ConfigError, "another output"),
    ],
)
def test_what_cannot_be_done_is_said(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    error: type[StreamdiffError],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=says):
        run(argv)


def test_a_broken_sound_file_is_said(run: Run, tmp_path: Path) -> None:
    (tmp_path / "broken.wav").write_bytes(b"RIFF" + bytes(40))
    (tmp_path / "empty.wav").write_bytes(b"")
    for name in ("broken.wav", "empty.wav"):
        with pytest.raises(InputError, match="cannot read sound"):
            run(["--audio", str(tmp_path / name), "--out", str(tmp_path / "a.mp4")])


class SavedBundle:
    """Stands for an identity bundle that can be saved."""

    name, size, sha256 = "somebody", 256, "0" * 64

    def save(self, path: Path) -> Path:
        with Output(path) as file:
            file.write_at(0, b"bundle")
        return path


def test_a_clip_is_fitted_and_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []

    def fit(video: str | Path, *, size: int, minutes: float, device: str) -> tuple[SavedBundle, str]:
        asked.append((video, size, minutes, device))
        return SavedBundle(), "fitted well"

    monkeypatch.setattr("streamdiff.training.avatar.fit.fit_bundle", fit)
    words = ["avatar", "fit", "--video", str(tmp_path / "clip.mp4"), "--minutes", "2"]
    args = parser(words).parse_args(words)
    assert args.run(args) == 0
    assert asked == [(tmp_path / "clip.mp4", 256, 2.0, "cpu")]
    assert (tmp_path / "clip.avatar").is_file()
    assert "fitted well" in capsys.readouterr().out
    args = parser(words).parse_args(["avatar", "fit", "--video", "clip.mp4", "--out", "/nowhere/a.avatar"])
    with pytest.raises(InputError, match="cannot write"):
        args.run(args)


def test_a_sheet_is_spread_over_the_whole_film() -> None:
    sheet = film.Sheet(6)
    for value in range(1000):
        sheet.add(torch.full((1, 1, 3), value % 256, dtype=torch.uint8))
        assert len(sheet._kept) <= 13
    assert len(sheet) == 6
    assert sheet.frames_THWC().shape == (6, 1, 1, 3)
