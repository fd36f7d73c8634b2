"""Bundles that were made from photos, kept for the next run: the same photo is worked on once.

They lie in ``bundles`` in the user's cache folder, 16 at most, the one used longest ago goes first. A name there is the
hash of all that a bundle depends on: the photo's bytes, the size of the frames, the code and the files that make it,
libraries, and the processor. So nothing there is ever out of date, and what is read is checked as any bundle is: one
that does not pass is made anew. Removing the folder is safe at any time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from streamdiff.avatar.bundle import BUNDLE_SUFFIX, IdentityBundle
from streamdiff.avatar.fetch import cache_folder
from streamdiff.errors import CheckpointError, StreamdiffError
from streamdiff.tensorfile import read_bytes

logger = logging.getLogger(__name__)

MOST_BUNDLES = 16
"""Of 7 to 9 MB each."""
_MAX_PHOTO_BYTES = 64 << 20
"""Larger photos are read and not kept."""
_PACKAGE = Path(__file__).parents[1]


def kept_bundle(
    photo: str | Path, size: int, make: Callable[[], IdentityBundle], *, folder: Path | None = None
) -> IdentityBundle:
    """The bundle of a photo, from the cache if it is there, else made by ``make`` and kept.

    Args:
        photo: the file; its name becomes the bundle's.
        size: side of the frames, pixels.
        make: makes the bundle of this photo, without the cache; what it raises is raised.
        folder: of the cache; None: ``~/.cache/streamdiff/bundles``.

    A cache that cannot be read or written is done without: this raises nothing that ``make`` does not.
    """
    try:
        data = read_bytes(Path(photo), _MAX_PHOTO_BYTES)
    except CheckpointError:
        return make()  # which says what is wrong with the photo, or reads it though it is large
    digest = hashlib.sha256(data).hexdigest()
    folder = cache_folder() / "bundles" if folder is None else folder
    path = folder / f"{_key(digest, size)}{BUNDLE_SUFFIX}"
    if (bundle := _read(path)) is not None and (bundle.source_sha256, bundle.size) == (digest, size):
        return replace(bundle, name=Path(photo).stem)
    bundle = make()
    if bundle.source_sha256 == digest:  # the photo is still the one that was hashed
        _write(path, bundle)
    return bundle


def _key(photo_sha256: str, size: int) -> str:
    return hashlib.sha256(json.dumps([photo_sha256, size, torch.get_num_threads(), maker()]).encode()).hexdigest()


@functools.cache
def maker() -> str:
    """The hash of what makes bundles here: code, packaged files, libraries, processor."""
    digest = hashlib.sha256()
    for path in (*sorted(_PACKAGE.glob("avatar/*.py")), _PACKAGE / "media/picture.py", _PACKAGE / "weights/SHA256SUMS"):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    facts = [torch.__version__, np.__version__, metadata.version("pillow"), torch.backends.cpu.get_cpu_capability()]
    digest.update(json.dumps([*facts, platform.machine()]).encode())
    return digest.hexdigest()


def _read(path: Path) -> IdentityBundle | None:
    if not path.is_file():
        return None
    try:
        bundle = IdentityBundle.load(path)
    except CheckpointError as error:
        logger.info("a kept bundle is made anew: %s", error)
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return bundle


def _write(path: Path, bundle: IdentityBundle) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace(bundle, name="avatar").save(path)
        _forget(path.parent)
    except (OSError, StreamdiffError) as error:
        logger.info("a bundle is not kept: %s", error)


def _forget(folder: Path) -> None:
    """Remove the bundles used longest ago, beyond the number that is kept."""
    found = sorted(folder.glob(f"*{BUNDLE_SUFFIX}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found[MOST_BUNDLES:]:
        path.unlink(missing_ok=True)
