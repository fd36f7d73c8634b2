"""Multi-GPU, pipeline-parallel streaming diffusion for live avatars.

    from streamdiff import AvatarEngine, Engine, presets

Names are imported when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamdiff import presets
    from streamdiff.avatar.engine import AvatarEngine
    from streamdiff.engine import Engine, Weights
    from streamdiff.session import Session
    from streamdiff.stream import Interrupted, Shown, Stream

__version__ = "0.1.0"
__all__ = ["AvatarEngine", "Engine", "Interrupted", "Session", "Shown", "Stream", "Weights", "__version__", "presets"]

_HOMES = {
    "AvatarEngine": "avatar.engine",
    "Engine": "engine",
    "Interrupted": "stream",
    "Session": "session",
    "Shown": "stream",
    "Stream": "stream",
    "Weights": "engine",
}


def __getattr__(name: str) -> object:
    if name == "presets":
        return importlib.import_module("streamdiff.presets")
    if name in _HOMES:
        return getattr(importlib.import_module(f"streamdiff.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'streamdiff' has no attribute {name!r}")
