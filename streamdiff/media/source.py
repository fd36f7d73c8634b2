"""Files that strangers give: regular ones only, of named formats, so that opening and reading them ends."""

from __future__ import annotations

import os
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

import av
from av.container import InputContainer
from av.error import FFmpegError

from streamdiff.errors import InputError
from streamdiff.facts import printable

_CONTAINERS = (
    "aac", "ac3", "aiff", "amr", "asf", "au", "avi", "caf", "eac3", "flac", "flv", "matroska", "mov", "mp3", "mpeg",
    "mpegts", "ogg", "w64", "wav", "wv",
)  # fmt: skip
"""Names that FFmpeg gives to files that hold their own sound and pictures. Playlists, scripts, session descriptions,
sequences of pictures and devices are not among them: they would open other files, or the network."""
_MAX_FILM_PIXELS = 16_777_216
_PATIENCE_S = 20.0


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, without waiting for anybody.

    Raises:
        InputError: a folder, a pipe, a device or nothing; says why, but not which file.
    """
    try:
        # Opening a pipe that nobody writes to would wait; without waiting, what was opened is what is looked at.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise InputError("there is no such file; check the path") from None
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else str(error)) or "it cannot be opened"
        raise InputError(f"{why[0].lower()}{why[1:]}; check the path") from None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    with suppress(OSError):
        os.close(descriptor)
    raise InputError("it is not a file; check the path")


@contextmanager
def open_media(source: str | Path | BinaryIO) -> Generator[InputContainer]:
    """Open a file of sound or film.

    Raises:
        InputError: no regular file, empty, or of no known container; says why, but not which file.
    """
    name: str | BinaryIO
    if isinstance(source, str | Path):
        with open_regular(Path(source)) as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise InputError("the file is empty; give one with speech in it")
        name = f"file:{source}"  # or a file called concat:a|b would be a script
    else:
        name = source
    options = {
        "protocol_whitelist": "file",
        "format_whitelist": ",".join(_CONTAINERS),
        "max_pixels": str(_MAX_FILM_PIXELS),
    }
    try:
        opened = av.open(name, "r", options=options, metadata_errors="replace", timeout=_PATIENCE_S)
    except (FFmpegError, OSError, ValueError) as error:
        why = printable(reason(error))
        raise InputError(f"it is not a sound or video file that is known ({why}); convert it to WAV or MP4") from error
    with opened as container:
        for stream in container.streams.video:
            # PyAV says that there is always one; there is none where nothing here decodes it.
            context = cast("av.VideoCodecContext | None", stream.codec_context)
            if context is not None:
                context.options = {"max_pixels": str(_MAX_FILM_PIXELS)}
        yield container


def reason(error: Exception) -> str:
    """FFmpeg's words for what went wrong, without the name of a file."""
    return str(getattr(error, "strerror", None) or error).lower()
