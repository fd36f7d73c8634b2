"""The weights that come with the package, which are compared with their SHA-256 before they are used.

``weights/SHA256SUMS`` is what ``sha256sum`` writes; make it anew when weights change:
``cd streamdiff/weights && sha256sum *.safetensors */*.safetensors */*.png > SHA256SUMS``.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from streamdiff.errors import CheckpointError

FOLDER = Path(__file__).parent / "weights"
_SUMS = "SHA256SUMS"


def packaged(name: str) -> Path:
    """The file of this name below ``weights/``. Raises CheckpointError when it is not the one that was shipped."""
    path = FOLDER / name
    try:
        found = path.stat()
        digest = _sha256(path, found.st_mtime_ns, found.st_size)
    except OSError as error:
        raise CheckpointError(f"{path} is missing ({error.strerror}); install streamdiff again") from error
    if _sums(FOLDER).get(name) != digest:
        raise CheckpointError(f"{path} is not the file that was shipped: its SHA-256 differs; install streamdiff again")
    return path


@functools.cache
def _sha256(path: Path, _changed_ns: int, _num_bytes: int) -> str:
    """Once for every state of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def _sums(folder: Path) -> dict[str, str]:
    try:
        lines = (folder / _SUMS).read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeError) as error:
        raise CheckpointError(f"{folder / _SUMS} cannot be read ({error}); install streamdiff again") from error
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
