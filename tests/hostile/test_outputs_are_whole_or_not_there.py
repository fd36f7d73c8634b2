"""What a command writes has its name when it is whole; what stood there before stays until then."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from streamdiff.errors import InputError
from streamdiff.media import VideoWriter, contact_sheet
from streamdiff.output import Output, alone_in, part_of, refuse_overwriting, replacing
from streamdiff.trace import JsonLines, span
from tests.generate.processes import environment
from tests.hostile.limits import largest_file
from tests.media.made_files import play

GOOD = {"width": 64, "height": 64, "fps": 25, "rate_hz": 16_000}


def write_chunk(writer: VideoWriter, *, num_frames: int = 12) -> None:
    pictures = torch.randint(0, 256, (num_frames, 64, 64, 3), dtype=torch.uint8)
    writer.write(pictures, torch.zeros(writer.samples_due(num_frames)))


def make_film(path: Path, *, num_chunks: int = 2) -> bytes:
    with VideoWriter(path, **GOOD) as writer:
        for _ in range(num_chunks):
            write_chunk(writer)
    return path.read_bytes()


def is_made_of_whole_boxes(data: bytes) -> bool:
    """Whether boxes (ISO/IEC 14496-12, 4.2), each behind its length, fill the file to its end."""
    at = 0
    while at < len(data) and (length := int.from_bytes(data[at : at + 4], "big")):
        at += length
    return at == len(data)


def cut_short(path: Path, error: type[BaseException]) -> None:
    with VideoWriter(path, **GOOD) as writer:
        write_chunk(writer)
        raise error


def write_until_refused(path: Path) -> None:
    with VideoWriter(path, **GOOD) as writer:
        for _ in range(100):
            write_chunk(writer)


def write_without_room_for_the_end(path: Path) -> None:
    with VideoWriter(path, **GOOD) as writer:
        write_chunk(writer)
        with largest_file(part_of(path).stat().st_size):
            writer.close()


def test_a_film_in_progress_plays_and_the_old_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    old = make_film(path)
    with VideoWriter(path, **GOOD) as writer:
        for count in (12, 24, 36):
            write_chunk(writer)
            assert len(play(part_of(path)).luma_T) == count
            assert path.read_bytes() == old
    assert len(play(path).luma_T) == 36
    assert sorted(tmp_path.iterdir()) == [path]


def test_the_second_of_two_runs_is_refused_and_the_first_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    with VideoWriter(path, **GOOD) as writer:
        write_chunk(writer)
        with pytest.raises(InputError, match=r"another run is writing film\.part\.mp4"):
            VideoWriter(path, **GOOD)
        write_chunk(writer)
    assert len(play(path).luma_T) == 24


def test_an_empty_film_replaces_nothing(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    old = make_film(path)
    for error in (KeyboardInterrupt, SystemExit, RuntimeError):
        with pytest.raises(error), VideoWriter(path, **GOOD):
            raise error
        assert path.read_bytes() == old
        assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("error", "has_old", "where"), [
    (KeyboardInterrupt, False, "film.mp4"), (KeyboardInterrupt, True, "film.part.mp4"),
    (SystemExit, False, "film.mp4"), (RuntimeError, False, "film.part.mp4"), (RuntimeError, True, "film.part.mp4"),
])  # fmt: skip
def test_where_a_film_is_that_was_cut_short(
    tmp_path: Path, error: type[BaseException], has_old: bool, where: str
) -> None:
    path = tmp_path / "film.mp4"
    old = make_film(path) if has_old else None
    with pytest.raises(error) as caught:
        cut_short(path, error)
    assert len(play(tmp_path / where).luma_T) == 12
    assert any(where in note for note in caught.value.__notes__)
    assert old is None or path.read_bytes() == old
    assert len(list(tmp_path.iterdir())) == 1 + has_old


def test_a_chunk_cut_in_two_costs_that_chunk_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception within the sound encoder: it may not be asked for the rest, which would be of another place."""
    path = tmp_path / "film.mp4"
    writer = VideoWriter(path, **GOOD)
    write_chunk(writer)
    send = writer._sound._send  # type: ignore[union-attr]

    def cut(samples_S: object) -> None:
        send(samples_S)  # type: ignore[arg-type]
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(writer._sound, "_send", cut)
    with pytest.raises(KeyboardInterrupt), writer:
        write_chunk(writer)
    film = play(path)
    assert len(film.luma_T) == 12
    assert film.sound_ends_s <= 12 / 25


@pytest.mark.parametrize("num_bytes", [0, 700, 5_000, 40_000])
def test_a_limit_of_bytes_is_one_line_and_what_was_written_plays(tmp_path: Path, num_bytes: int) -> None:
    path = tmp_path / "film.mp4"
    old = make_film(path)
    torch.manual_seed(0)
    with largest_file(num_bytes), pytest.raises(InputError, match="cannot write to"):
        write_until_refused(path)
    assert path.read_bytes() == old
    assert part_of(path).exists() == (num_bytes >= 40_000)
    if part_of(path).exists():
        assert part_of(path).stat().st_size <= num_bytes
        assert len(play(part_of(path)).luma_T) % 12 == 0
        assert is_made_of_whole_boxes(part_of(path).read_bytes())


def test_a_limit_of_bytes_at_the_very_end_leaves_the_part(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    with pytest.raises(InputError) as caught:
        write_without_room_for_the_end(path)
    assert not path.exists()
    assert len(play(part_of(path)).luma_T) == 12
    assert "film.part.mp4" in caught.value.__notes__[0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_device_a_pipe_and_a_folder_are_no_files(tmp_path: Path) -> None:
    device, pipe, folder = (tmp_path / f"{name}.mp4" for name in ("device", "pipe", "folder"))
    device.symlink_to("/dev/full")
    os.mkfifo(pipe)
    folder.mkdir()
    for path, words in ((device, "a pipe or a device"), (pipe, "a pipe or a device"), (folder, "a directory")):
        with pytest.raises(InputError, match=words):
            Output(path)
    os.mkfifo(part_of(tmp_path / "other.mp4"))
    with pytest.raises(InputError, match="in the way"):
        Output(tmp_path / "other.mp4")


def test_a_link_put_in_the_way_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    part_of(tmp_path / "film.mp4").symlink_to(precious)
    with pytest.raises(InputError, match="cannot write"):
        Output(tmp_path / "film.mp4")
    assert precious.read_text() == "mine"


def test_a_link_of_ones_own_is_followed_and_permissions_stay(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    real, link = tmp_path / "elsewhere" / "film.mp4", tmp_path / "film.mp4"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to(real)
    make_film(link)
    assert link.is_symlink()
    assert len(play(real).luma_T) == 24
    assert stat.S_IMODE(real.stat().st_mode) == 0o640


def test_a_folder_that_vanishes_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    output = Output(folder / "film.mp4")
    output.part.unlink()
    folder.rmdir()
    with pytest.raises(InputError, match="cannot give"):
        output.finish()


def _sheet(path: Path) -> None:
    contact_sheet(torch.zeros(1, 64, 64, 3, dtype=torch.uint8), path)


def _library(path: Path) -> None:
    with replacing(path) as part:
        part.write_bytes(bytes(4096))


@pytest.mark.parametrize("write", [_sheet, _library])
def test_what_a_library_writes_is_whole_or_not_there(tmp_path: Path, write: Callable[[Path], None]) -> None:
    path = tmp_path / "file.png"
    path.write_bytes(b"old")
    with largest_file(20), pytest.raises(InputError, match="cannot write"):
        write(path)
    assert path.read_bytes() == b"old"
    assert sorted(tmp_path.iterdir()) == [path]
    write(path)
    assert len(path.read_bytes()) > 20
    assert sorted(tmp_path.iterdir()) == [path]


def test_an_input_is_known_under_any_name(tmp_path: Path) -> None:
    photo, link, part = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.part.png"
    photo.write_bytes(b"photo")
    link.hardlink_to(photo)
    part.hardlink_to(photo)
    for out in (photo, link, tmp_path / "c.png"):
        with pytest.raises(InputError, match="also an input"):
            refuse_overwriting(out, [None, photo])
    refuse_overwriting(tmp_path / "d.png", [None, photo])


def test_one_run_at_a_time_in_a_folder(tmp_path: Path) -> None:
    for _ in range(2):
        with alone_in(tmp_path / "run", "a run"), pytest.raises(InputError, match="another run is writing a run"):
            alone_in(tmp_path / "run", "a run").__enter__()


def test_a_full_disk_ends_a_trace_and_not_what_is_traced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "trace.jsonl"
    with JsonLines(path) as trace, largest_file(1_000):
        for _ in range(100):
            with span(trace, "denoise"):
                pass
    lines = path.read_text().splitlines()
    assert 0 < len(lines) < 20
    assert all(line.endswith("}") for line in lines)
    assert len(caplog.messages) == 1


def test_a_trace_waits_for_no_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"a file alone|No such device"):
        JsonLines(tmp_path / "pipe")


@pytest.mark.processes
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_standard_output_is_one_line() -> None:
    with Path("/dev/full").open("wb") as full:
        program = "from streamdiff.cli import main; main.main = lambda: print('made') or 0; main.entry()"
        command = [sys.executable, "-c", program]
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, env=environment(PYTHONUNBUFFERED=""), timeout=120, check=False
        )
    assert done.returncode == 1
    assert done.stderr.decode().splitlines() == [
        "error: standard output takes no more: No space left on device; what else was written is whole"
    ]
