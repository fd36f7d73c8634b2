"""Files that strangers give: regular ones only, so that opening and reading them ends."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from streamdiff.errors import InputError


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
