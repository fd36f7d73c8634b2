"""Files are written beside the name they will have, and get it when they are whole.

    with Output(path) as output:            # film.part.mp4, locked; film.mp4 stays what it was
        output.write_at(0, data)
                                            # film.mp4

The part lies in the folder of the file, so that giving it its name is one rename. Two runs cannot write one file: the
part is locked, and a lock ends with its process. What a killed run left behind is replaced by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Generator, Iterable
from pathlib import Path
from types import TracebackType

from streamdiff import signals
from streamdiff.errors import InputError

_ATTEMPTS = 10
"""A part may get its name, and the next one its own, between opening and locking."""


def part_of(path: str | Path) -> Path:
    """The name of a file while it is written.

    >>> part_of("out/film.mp4").as_posix()
    'out/film.part.mp4'

    Raises:
        InputError: no name of a file, such as an empty one.
    """
    path = Path(path)
    if not path.name:
        raise InputError(f"{str(path)!r} is no name of a file to write; give one")
    return path.with_name(f"{path.stem}.part{path.suffix}")


def refuse_overwriting(output: str | Path, inputs: Iterable[str | Path | None], *, what: str = "--out") -> None:
    """Raise InputError when ``output``, or the part it begins as, is one of the files that are read."""
    named = Path(output)
    for path in inputs:
        for written in (named, part_of(named)):
            if path is not None and written.exists() and Path(path).exists() and written.samefile(path):
                raise InputError(f"{what} {named} is also an input and would be overwritten; choose another name")


class Output:
    """A file that is being written beside its name; use as a context manager.

    At the end of the block it gets its name. If the block fails, the part is removed, or kept as it is with
    ``keeps_part``: what is useful before it is whole, such as a film. If the block is ended from outside (Ctrl-C,
    SIGTERM), a kept part gets its name unless a file of that name stands there; `where` says how it was.

    Args:
        path: where it goes; a link is followed. What is there is replaced at the end.
        keeps_part: see above.

    Raises:
        InputError: the folder is missing or read-only, the name is a folder, a pipe or a device, or another run is
            writing it.
    """

    def __init__(self, path: str | Path, *, keeps_part: bool = False, truncates: bool = True) -> None:
        self.path = Path(path)
        self._target = Path(os.path.realpath(path))
        self.part = part_of(self._target)
        self._keeps_part, self._is_open = keeps_part, True
        self.where: Path | None = None
        """Where the file is, once it is closed; None when nothing is left of it."""
        mode = _mode_of_what_is_there(self._target, self.path)
        self._fd = _locked(self.part, self.path)
        try:
            if truncates:
                os.ftruncate(self._fd, 0)
            if mode is not None:
                os.fchmod(self._fd, mode)
        except OSError as error:
            self._leave()
            raise _refused(self.path, error) from error

    @property
    def is_open(self) -> bool:
        return self._is_open

    def write_at(self, position: int, data: bytes) -> None:
        """Write all of ``data``; when it returns, the operating system has it. Raises InputError when the disk does not
        take it.
        """
        view = memoryview(data)
        try:
            while view:
                count = os.pwrite(self._fd, view, position)
                view, position = view[count:], position + count
        except OSError as error:
            raise InputError(
                f"cannot write to {self.path}: {error.strerror}; free some space or choose another place"
            ) from error

    def truncate(self, num_bytes: int) -> None:
        """Drop what lies behind; never fails."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, num_bytes)

    def finish(self, *, replaces: bool = True) -> None:
        """Close the file and give it its name; without ``replaces`` only where nothing stands, else the part stays."""
        if not self._is_open:
            return
        with signals.shielded():
            self.where = self.part
            try:
                if replaces or not self._target.exists():
                    self.part.replace(self._target)
                    self.where = self.path
            except OSError as error:
                self.where = self.part if self.part.exists() else None
                raise InputError(
                    f"cannot give {self.part} its name {self.path}: {error.strerror}; choose another place"
                ) from error
            finally:
                self._leave()

    def keep_part(self) -> None:
        """Close the file and leave it under the name of the part."""
        if self._is_open:
            self.where = self.part if self.part.exists() else None
            self._leave()

    def discard(self) -> None:
        """Close the file and remove it."""
        if self._is_open:
            with contextlib.suppress(OSError):
                self.part.unlink()
            self._leave()

    def _leave(self) -> None:
        self._is_open = False
        os.close(self._fd)

    def end(self, error: BaseException | None) -> None:
        """Close the file as it deserves when its block ended with ``error``."""
        if error is None:
            self.finish()
        elif not self._keeps_part:
            self.discard()
        elif not isinstance(error, Exception) or signals.received() is not None:
            self.finish(replaces=False)
        else:
            self.keep_part()

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(error)


@contextlib.contextmanager
def replacing(path: str | Path) -> Generator[Path]:
    """A name beside ``path`` for a library to write to; at the end of the block it becomes ``path``, if all went well.

    Raises InputError, also for an OSError of the block: a full disk, a limit.
    """
    with Output(path, truncates=False) as output:
        try:
            yield output.part
            _sync(output.part)
        except OSError as error:
            raise _refused(Path(path), error) from error


def make_folder(folder: Path) -> None:
    """Make it where it is not there. Raises InputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write into {folder}: {error.strerror}; choose another folder") from error


@contextlib.contextmanager
def alone_in(folder: Path, what: str) -> Generator[None]:
    """Make the folder and hold it: meanwhile a second run that writes ``what`` there is refused with InputError."""
    make_folder(folder)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not _lock(fd):
            raise InputError(f"another run is writing {what} into {folder}; wait for it, or choose another folder")
        yield
    finally:
        os.close(fd)


def _mode_of_what_is_there(target: Path, path: Path) -> int | None:
    try:
        found = target.stat().st_mode
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _refused(path, error) from error
    if stat.S_ISDIR(found):
        raise InputError(f"cannot write {path}: it is a directory; give a file name")
    if not stat.S_ISREG(found):
        raise InputError(f"cannot write {path}: it is a pipe or a device, not a file; give the name of a file")
    if not os.access(target, os.W_OK):
        raise InputError(f"cannot write {path}: it is read-only; choose another name")
    return stat.S_IMODE(found)


def _locked(part: Path, path: Path) -> int:
    """Open and lock the part; its descriptor."""
    if not part.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no directory {part.parent}; create it first")
    # Without waiting for the reader of a pipe, and not through a link: somebody else may have put one there.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    for _ in range(_ATTEMPTS):
        try:
            fd = os.open(part, flags, 0o666)
        except OSError as error:
            raise _refused(path, error) from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise InputError(f"cannot write {path}: {part} is in the way and is no file; remove it")
        if not _lock(fd):
            os.close(fd)
            break
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(fd), os.stat(part, follow_symlinks=False)):
                return fd
        os.close(fd)
    raise InputError(f"cannot write {path}: another run is writing {part.name}; wait for it, or choose another name")


def _lock(fd: int) -> bool:
    """Whether the file is ours now; a file system that knows no locks gives it to everybody."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _sync(part: Path) -> None:
    """On the disk before it gets its name: a rename may outlive a power cut that its bytes do not."""
    fd = os.open(part, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _refused(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot write {path}: {error.strerror or error}; choose another place")
