"""One hostile input of one command, and what may come of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import av
from av.error import FFmpegError

from tests.hostile.jail import Ending, Jail

Content = bytes | Callable[[Path], object]
"""Bytes of a file, or what makes it at a path."""


class Wants(Enum):
    """What a command makes of an input."""

    REFUSED = "refused"
    MADE = "made"
    EITHER = "either"


@dataclass(frozen=True, slots=True)
class Case:
    """A command line, the files that it names, and what may come of it."""

    name: str
    argv: Sequence[str]
    files: Mapping[str, Content] = field(default_factory=dict[str, Content])
    wants: Wants = Wants.EITHER
    says: str = ""
    """Words of the refusal."""
    stdin: str | None = None
    most_s: float = float("inf")
    """Length of a film that is made."""

    def run(self, jail: Jail, folder: Path) -> Ending:
        """Write the files and run the command among them."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                content(path)
        return jail.run(self.argv, folder, stdin=None if self.stdin is None else folder / self.stdin)

    def fault(self, ending: Ending, folder: Path) -> str:
        """What is wrong with this end, or nothing."""
        if found := ending.fault():
            return found
        if ending.status == 2 and self.wants is Wants.MADE:
            return f"is refused: {ending.err[-400:]}"
        if ending.status == 0 and self.wants is Wants.REFUSED:
            return f"is accepted: {ending.out[-300:]} {ending.err[-300:]}"
        if ending.status == 2 and self.says not in ending.err:
            return f"is refused in other words than {self.says!r}: {ending.err[-400:]}"
        # A film that breaks off plays as far as it came; anything else is whole or not there.
        made = [path for path in folder.glob("out*") if path.is_file()]
        if ending.status == 2 and (rest := [path.name for path in made if path.suffix != ".mp4"]):
            return f"leaves {rest[0]} behind"
        if ending.status == 2:
            return ""
        return "".join(_film_fault(path, self.most_s) for path in made if path.suffix == ".mp4")


def _film_fault(path: Path, most_s: float) -> str:
    try:
        with av.open(str(path)) as container:
            frames = sum(1 for _ in container.decode(video=0))
            rate = float(container.streams.video[0].average_rate or 25)
    except (FFmpegError, IndexError) as error:
        return f"the film does not play: {error}"
    if not frames:
        return "the film has no frames"
    return f"the film lasts {frames / rate:.1f} s, more than {most_s} s" if frames / rate > most_s else ""


def run(jail: Jail, case: Case, folder: Path) -> str:
    """Run a case in an empty folder, which is removed; what is wrong, or nothing."""
    return run_with_status(jail, case, folder)[1]


def run_with_status(jail: Jail, case: Case, folder: Path) -> tuple[int, str]:
    """As `run`, with the exit status before it."""
    folder.mkdir()
    try:
        ending = case.run(jail, folder)
        return ending.status, case.fault(ending, folder)
    finally:
        shutil.rmtree(folder)


def sparse(size: int, head: bytes = b"") -> Callable[[Path], object]:
    """A file that claims ``size`` bytes and begins with ``head``."""

    def make(path: Path) -> None:
        path.write_bytes(head)
        os.truncate(path, size)

    return make


NOT_FILES: Mapping[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "a folder": Path.mkdir,
    "a pipe": lambda path: os.mkfifo(path),
    "endless zeros": lambda path: path.symlink_to("/dev/zero"),
    "endless noise": lambda path: path.symlink_to("/dev/urandom"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "empty": Path.touch,
    "one byte": lambda path: path.write_bytes(b"\0"),
    "words": lambda path: path.write_bytes(b"neither picture nor sound\n" * 100),
    "20 GB of nothing": sparse(20 << 30),
}
"""What may lie where a file is expected."""
NAMES = (
    "x" * 300,
    "y" * 5000,
    "/".join(["d"] * 2000),
    "red\x1b[31m",
    "two\nlines",
    "-",
    "\udcff",
    " ",
    "tcp:127.0.0.1:1",
)
"""Names that are odd."""
