"""Sessions as files: what was shown, with its sound, an MP4 for each.

A thread per session encodes and writes, a second at a time; the pump hands over frames and waits for nobody. A film
ends with its session, or before it: when the disk is nearly full, refuses, or is too slow. The session then goes on,
and its client is told. A film is written beside its name and gets it when it is whole (`output`); what a failure cut
short stays ``NAME.part.mp4``, which plays.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import shutil
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from streamdiff.errors import InputError, StreamdiffError
from streamdiff.facts import printable
from streamdiff.media import VideoWriter
from streamdiff.output import Output, make_folder
from streamdiff.serve.calls import Call
from streamdiff.serve.protocol import Ending
from streamdiff.serve.pump import Beat

logger = logging.getLogger(__name__)

LEAST_FREE_BYTES = 1 << 30
"""Space on the disk that films leave free."""
MOST_WAITING = 75
"""Frames that may wait for one film: three seconds."""
_WRITE_FRAMES = 25
_NAP_S = 0.5
_END_S = 30.0


class Recorder:
    """Films of calls; `watch` each call. Use as a context manager: leaving it waits until all films have ended.

    Args:
        folder: where they go, as ``TIME-SESSION.mp4``; made where it is not there.
        may: whether an avatar may be filmed.
        finish: told of every whole film, in its thread; to sign it, perhaps.
        least_free: bytes that are left free on the disk.
        most_waiting: frames that may wait for one film; a disk that is slower ends it.

    Raises:
        InputError: nothing can be written there.
    """

    def __init__(
        self,
        folder: Path,
        *,
        may: Callable[[str], bool] = lambda _: True,
        finish: Callable[[Path], None] = lambda _: None,
        least_free: int = LEAST_FREE_BYTES,
        most_waiting: int = MOST_WAITING,
    ) -> None:
        self.folder = folder
        self._may, self._finish, self._least_free, self._most_waiting = may, finish, least_free, most_waiting
        self._films: list[_Film] = []
        make_folder(folder)
        Output(folder / "probe.mp4").discard()

    def watch(self, call: Call) -> None:
        """Film this call to its end, if its avatar may be filmed."""
        self._films = [film for film in self._films if film.thread.is_alive()]
        if not self._may(call.avatar):
            return
        path = self.folder / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{call.log_id}.mp4"
        film = _Film(call, path, self._finish, self._least_free, self._most_waiting)
        self._films.append(film)
        call.is_recorded = True
        call.pump.attach(film)
        film.thread.start()

    def close(self) -> None:
        """Wait until all films have ended, for a bounded time; their calls have."""
        until_s = time.monotonic() + _END_S
        for film in self._films:
            film.thread.join(timeout=max(0.0, until_s - time.monotonic()))

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Film:
    """A sink of a call's pump, and the thread that writes what it is given."""

    is_encoded = False

    def __init__(
        self, call: Call, path: Path, finish: Callable[[Path], None], least_free: int, most_waiting: int
    ) -> None:
        self._call, self._path, self._finish, self._least_free = call, path, finish, least_free
        self._loop = asyncio.get_running_loop()
        self._beats: queue.Queue[Beat] = queue.Queue(most_waiting)
        self._ended = threading.Event()
        self._why = ""
        self.thread = threading.Thread(target=self._run, name="record", daemon=True)

    def put(self, beat: Beat) -> None:
        """Of `Sink`."""
        try:
            self._beats.put_nowait(beat)
        except queue.Full:
            self._why = self._why or "the disk takes films too slowly"

    def end(self, reason: Ending) -> None:
        """Of `Sink`."""
        del reason
        self._ended.set()

    def _run(self) -> None:
        """Write until the call has ended, or nothing more can be written."""
        try:
            self._write()
            if self._why:
                raise InputError(self._why)
        except StreamdiffError as error:
            self._tell(str(error))
        except Exception:
            logger.exception("session %s: its recording failed", self._call.log_id)
            self._tell("it failed; see the server's log")

    def _write(self) -> None:
        pump = self._call.pump
        with VideoWriter(
            self._path,
            width=pump.width,
            height=pump.height,
            fps=pump.fps,
            rate_hz=pump.rate_hz,
            metadata={"title": "streamdiff serve", "artist": printable(self._call.avatar)},
        ) as writer:
            rest_S = np.zeros(0, np.float32)
            while (beats := self._next()) and not self._is_full():
                frames_THWC = torch.from_numpy(np.concatenate([beat.shown.frames_THWC for beat in beats]))
                rest_S = np.concatenate([rest_S, *(beat.shown.sound_S for beat in beats)])
                due = writer.samples_due(len(beats))
                writer.write(frames_THWC, torch.from_numpy(_padded(rest_S[:due], due)))
                rest_S = rest_S[due:]
        if writer.num_frames:
            self._finish(self._path)
            logger.info("session %s: recorded %.1f s", self._call.log_id, writer.duration_s)

    def _next(self) -> list[Beat]:
        """A second of frames, or all that there will be; empty: the film ends."""
        beats: list[Beat] = []
        while len(beats) < _WRITE_FRAMES and not self._why:
            try:
                beats.append(self._beats.get(timeout=_NAP_S))
            except queue.Empty:
                if self._ended.is_set():
                    break
        return beats

    def _is_full(self) -> bool:
        """Whether the disk has no room for more; the film ends then."""
        free = shutil.disk_usage(self._path.parent).free
        if free < self._least_free:
            self._why = f"only {free >> 20} MiB are free on the disk"
        return bool(self._why)

    def _tell(self, why: str) -> None:
        """The film ends before its session."""
        logger.error("session %s: its recording ended: %s", self._call.log_id, why)

        def tell() -> None:
            self._call.pump.detach(self)
            self._call.is_recorded = False
            self._call.problem("recording", f"the recording has ended: {why}")

        try:
            self._loop.call_soon_threadsafe(tell)
        except RuntimeError:
            return  # the loop has ended, and everybody with it


def _padded(sound_S: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    return np.concatenate([sound_S, np.zeros(size - len(sound_S), np.float32)])
