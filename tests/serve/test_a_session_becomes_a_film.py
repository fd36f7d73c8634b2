"""With a recorder, what a session shows becomes a film; what goes wrong with the film never ends the session."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pytest

from streamdiff.errors import InputError
from streamdiff.media import VideoWriter
from streamdiff.media.video import SYNTHETIC_MARK
from streamdiff.output import Output, part_of
from streamdiff.serve.calls import Call, Calls
from streamdiff.serve.leases import Leases, Terms
from streamdiff.serve.protocol import Ending, Event, Problem, Ready
from streamdiff.serve.pump import Beat
from streamdiff.serve.record import Recorder
from tests.serve.scripted import FPS, Stage

SIDE = 64
PATIENT = 1_000_000
"""Frames that may wait where nothing keeps to the clock."""
RATE_HZ = 24_000


class Shown:
    """Keeps what left the pump."""

    is_encoded = False

    def __init__(self) -> None:
        self.beats: list[Beat] = []

    def put(self, beat: Beat) -> None:
        self.beats.append(beat)

    def end(self, reason: Ending) -> None:
        del reason

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not holds():
                await asyncio.sleep(0.01)


class Film(NamedTuple):
    frames_THWC: np.ndarray
    sound_S: np.ndarray
    tags: dict[str, str]


def read(path: Path) -> Film:
    with av.open(str(path)) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
        tags = dict(film.metadata)
    with av.open(str(path)) as film:
        sound_S = np.concatenate([frame.to_ndarray()[0] for frame in film.decode(audio=0)])
    return Film(np.stack(frames), sound_S, tags)


def record(
    scene: Callable[[Calls, Call, Shown], Awaitable[None]], recorder: Recorder, *, avatar: str = "", **options: Any
) -> Shown:
    """Play a scene in a recorded call, which is then ended; what was shown of it."""
    shown = Shown()
    mark = options.pop("mark", "")

    async def main() -> None:
        async with Calls(
            Leases(Terms(capacity=1)), Stage(side=SIDE, **options), mark=mark, watch=recorder.watch
        ) as calls:
            call = await calls.open("ann", avatar=avatar)
            call.pump.attach(shown)
            await asyncio.wait_for(scene(calls, call, shown), 60)
            await calls.end(call, Ending.LEFT)

    with recorder:
        asyncio.run(main())
    return shown


async def speak_and_be_interrupted(calls: Calls, call: Call, shown: Shown) -> None:
    del calls
    await shown.until(lambda: len(shown.beats) >= 5)
    call.session.say("word " * 500)
    await shown.until(lambda: sum(beat.segment > 0 for beat in shown.beats) >= 12)
    call.interrupt()
    num = len(shown.beats)
    await shown.until(lambda: len(shown.beats) >= num + 30)


@pytest.mark.heavy
@pytest.mark.parametrize("mark", ["", "AI"])
def test_a_film_holds_every_frame_that_was_shown_with_its_sound(tmp_path: Path, mark: str) -> None:
    finished: list[Path] = []
    recorder = Recorder(tmp_path / "films", finish=finished.append, most_waiting=PATIENT)
    shown = record(speak_and_be_interrupted, recorder, mark=mark, live=False)
    [path] = (tmp_path / "films").iterdir()
    assert finished == [path]
    film = read(path)
    expected_THWC = np.concatenate([beat.shown.frames_THWC for beat in shown.beats])
    expected_S = np.concatenate([beat.shown.sound_S for beat in shown.beats])
    assert len(film.frames_THWC) == len(shown.beats)
    # Whatever the codec does to them, frames that are grey alike stay so, and letters stay where they were.
    assert np.abs(film.frames_THWC.mean((1, 2, 3)) - expected_THWC.mean((1, 2, 3))).max() < 4
    if mark:
        corner = np.abs(film.frames_THWC[0].astype(int) - film.frames_THWC[0, 0, 0]).max()
        assert corner > 100
    assert len(expected_S) == len(shown.beats) * RATE_HZ // FPS
    loud, wanted = (np.abs(s_S[: len(expected_S)].reshape(-1, 960)).max(1) > 0.1 for s_S in (film.sound_S, expected_S))
    assert wanted.sum() >= 12
    assert (loud != wanted).sum() <= 2  # a codec smears an edge
    assert film.tags["comment"].startswith(SYNTHETIC_MARK)


@pytest.mark.heavy
def test_a_disk_that_is_nearly_full_ends_the_film_and_not_the_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def usage(path: Path) -> Any:
        asked.append(path)
        return type("Usage", (), {"free": 2 << 30 if len(asked) < 2 else 1 << 20})

    monkeypatch.setattr(shutil, "disk_usage", usage)
    events: list[Event] = []

    async def scene(calls: Calls, call: Call, shown: Shown) -> None:
        call.subscribe(events.append)
        await shown.until(lambda: any(isinstance(event, Problem) for event in events))
        num = len(shown.beats)
        await shown.until(lambda: len(shown.beats) >= num + 5)
        assert not call.ready.recorded
        assert calls.all == (call,)

    record(scene, Recorder(tmp_path, least_free=1 << 30, most_waiting=PATIENT), live=False)
    assert isinstance(events[0], Ready)
    assert events[0].recorded
    [problem] = [event for event in events if isinstance(event, Problem)]
    assert problem.code == "recording"
    assert "only 1 MiB are free" in problem.text
    [path] = tmp_path.iterdir()
    assert len(read(path).frames_THWC) == 25


@pytest.mark.heavy
def test_a_disk_that_refuses_leaves_what_plays_and_the_session_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_at = Output.write_at
    positions: list[int] = []

    def refuse(output: Output, position: int, data: bytes) -> None:
        positions.append(position)
        if position and len(positions) > 4:  # two each for the header and the first second
            raise InputError(f"cannot write to {output.path}: No space left on device")
        write_at(output, position, data)

    monkeypatch.setattr(Output, "write_at", refuse)
    events: list[Event] = []

    async def scene(calls: Calls, call: Call, shown: Shown) -> None:
        del calls
        call.subscribe(events.append)
        await shown.until(lambda: any(isinstance(event, Problem) for event in events))
        num = len(shown.beats)
        await shown.until(lambda: len(shown.beats) >= num + 5)

    record(scene, Recorder(tmp_path, most_waiting=PATIENT), live=False)
    [problem] = [event for event in events if isinstance(event, Problem)]
    assert "No space left" in problem.text
    [path] = tmp_path.iterdir()
    assert path.name.endswith(".part.mp4")
    assert len(read(path).frames_THWC) == 25


def test_a_disk_that_is_too_slow_loses_the_film_and_nobody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, write = threading.Event(), VideoWriter.write

    def slowly(writer: VideoWriter, *args: Any) -> None:
        assert may_write.wait(60)
        write(writer, *args)

    monkeypatch.setattr(VideoWriter, "write", slowly)
    events: list[Event] = []

    async def scene(calls: Calls, call: Call, shown: Shown) -> None:
        del calls
        call.subscribe(events.append)
        await shown.until(lambda: len(shown.beats) >= 150)
        may_write.set()
        await shown.until(lambda: any(isinstance(event, Problem) for event in events))

    record(scene, Recorder(tmp_path), live=False)
    [problem] = [event for event in events if isinstance(event, Problem)]
    assert "too slowly" in problem.text


def test_who_may_not_be_filmed_is_not(tmp_path: Path) -> None:
    async def scene(calls: Calls, call: Call, shown: Shown) -> None:
        del calls
        await shown.until(lambda: len(shown.beats) >= 3)
        assert not call.ready.recorded

    record(scene, Recorder(tmp_path, may=lambda avatar: avatar != "brought"), avatar="brought")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_takes_no_film_is_said_before_anybody_comes(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write into"):
        Recorder(tmp_path / "file")
    Recorder(tmp_path / "films").close()
    assert not list((tmp_path / "films").iterdir())
    assert part_of(tmp_path / "films" / "probe.mp4").name == "probe.part.mp4"
