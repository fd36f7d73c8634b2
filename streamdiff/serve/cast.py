"""Who can be seen: the avatars of this server, and those that its users bring as photographs.

A photograph is read and turned into an avatar by a process of its own, for a bounded time: a file that breaks a decoder
breaks nothing else. What users bring is theirs: its name cannot be guessed, it is listed to nobody, and it is forgotten
when it has not been used for an hour.
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
import secrets
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from streamdiff.errors import InputError
from streamdiff.serve.leases import Refused
from streamdiff.serve.pump import Source

logger = logging.getLogger(__name__)

MAX_UPLOAD_BYTES = 10_000_000
MAX_UPLOAD_PIXELS = 24_000_000
_UPLOAD_S = 90.0
_KEPT_S = 3_600.0
_MAX_BROUGHT = 16
_FORMATS = ("JPEG", "PNG", "WEBP")


class Engine(Protocol):
    """What makes sessions of one avatar; `avatar.engine.AvatarEngine` is one."""

    def open(self) -> AbstractAsyncContextManager[Source]:
        """A session, not opened yet."""
        ...


class Busy(Refused):
    """Another photograph is being read."""

    code = "busy"


@dataclass(slots=True)
class _Brought:
    """An avatar that a user has brought."""

    path: Path
    user: str
    used_s: float
    engine: Engine | None = None


class Cast:
    """The avatars of one server. Use as a context manager: what users brought is deleted at the end.

    Args:
        engines: the server's own, by name; the first is shown unless another is asked for.
        load: makes the engine of a bundle file; None: users cannot bring photographs.
        prefix: stands in the names of what users bring; see `Leases.prefix`.
    """

    def __init__(
        self, engines: Mapping[str, Engine], *, load: Callable[[Path], Engine] | None = None, prefix: str = ""
    ) -> None:
        self._prefix = prefix
        self._engines = dict(engines)
        self._load = load
        self._brought: dict[str, _Brought] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="streamdiff-serve-")
        self._one = asyncio.Semaphore(1)
        self._loading = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """Avatars that everybody may see."""
        return tuple(self._engines)

    @property
    def takes_photos(self) -> bool:
        """Whether users can bring photographs."""
        return self._load is not None

    def open(self, avatar: str) -> AbstractAsyncContextManager[Source]:
        """A session of that avatar (empty: the first); an `Opener` for `Calls`.

        Raises:
            InputError: there is none of that name.
        """
        brought = self._brought.get(avatar)
        if brought is not None and self._load is not None:
            brought.used_s = time.monotonic()
            with self._loading:
                brought.engine = brought.engine or self._load(brought.path)
            return brought.engine.open()
        engine = self._engines.get(avatar or next(iter(self._engines)))
        if engine is None:
            raise InputError(f"there is no avatar {avatar[:40]!r}; known: {', '.join(self._engines)}")
        return engine.open()

    def owner(self, avatar: str) -> str | None:
        """Who brought this avatar; None: it is the server's own, or there is none."""
        brought = self._brought.get(avatar)
        return None if brought is None else brought.user

    async def bring(self, photo: bytes, user: str) -> str:
        """Make an avatar of a photograph; its name.

        Raises:
            InputError: no photograph of a face, or one too large. Busy: another is being read.
        """
        if self._load is None:
            raise InputError("this server takes no photographs")
        check_photo(photo)
        if self._one.locked():
            raise Busy("another photograph is being read; try again in a moment", retry_after_s=10)
        async with self._one:
            self._forget_old()
            name = "brought-" + self._prefix + secrets.token_urlsafe(12)
            source, bundle = self._path(name, ".photo"), self._path(name, ".avatar")
            source.write_bytes(photo)
            try:
                await _create(source, bundle)
            finally:
                source.unlink()
            self._brought[name] = _Brought(bundle, user, time.monotonic())
            return name

    def __enter__(self) -> Cast:
        return self

    def __exit__(self, *exc: object) -> None:
        self._folder.cleanup()

    def _path(self, name: str, suffix: str) -> Path:
        return Path(self._folder.name) / (name + suffix)

    def _forget_old(self) -> None:
        """Delete what nobody has used for an hour, and the oldest when there are too many."""
        now_s = time.monotonic()
        by_age = sorted(self._brought, key=lambda name: self._brought[name].used_s)
        for k, name in enumerate(by_age):
            if now_s - self._brought[name].used_s > _KEPT_S or len(by_age) - k >= _MAX_BROUGHT:
                self._brought.pop(name).path.unlink(missing_ok=True)


def check_photo(photo: bytes) -> None:
    """Look at the head of a file, not at its pixels.

    Raises:
        InputError: no JPEG, PNG or WebP, or more bytes or pixels than are read.
    """
    if len(photo) > MAX_UPLOAD_BYTES:
        raise InputError(f"a photograph may have {MAX_UPLOAD_BYTES // 10**6} MB, this one has {len(photo) / 1e6:.1f}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with Image.open(io.BytesIO(photo), formats=_FORMATS) as image:
                width, height = image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Warning):
        raise InputError("this is no photograph that can be read; give a JPEG, PNG or WebP") from None
    if width * height > MAX_UPLOAD_PIXELS or min(width, height) < 64:
        raise InputError(
            f"a photograph must have 64 pixels a side and at most {MAX_UPLOAD_PIXELS // 10**6} megapixels, "
            f"this one has {width}x{height}"
        )


async def _create(photo: Path, bundle: Path) -> None:
    """Run `streamdiff avatar create` on a photograph in a process of its own.

    Raises:
        InputError: what it says is wrong with the photograph; or it took too long.
    """
    command = [sys.executable, "-m", "streamdiff", "avatar", "create", "--photo", str(photo), "--out", str(bundle)]
    process = await asyncio.create_subprocess_exec(
        *command,
        "--name",
        "visitor",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(_UPLOAD_S):
            _, said = await process.communicate()
    except TimeoutError:
        raise InputError(f"the photograph could not be read in {_UPLOAD_S:.0f} s; try a smaller one") from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if process.returncode or not bundle.is_file():
        lines = said.decode("utf-8", "replace").strip().splitlines()
        last = lines[-1].removeprefix("error: ") if lines else "it could not be read"
        why = last.replace(str(photo), "the photograph")[:300]
        logger.info("a photograph was refused: %s", why)
        raise InputError(f"no avatar came of this photograph: {why}")
