"""Packages that a voice needs and that are installed with an extra."""

from __future__ import annotations

from types import ModuleType

from streamdiff.errors import BackendError


def required_package(name: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BackendError(
            f"the voice needs the package {name.partition('.')[0]!r}, which is not installed; "
            "run: pip install 'streamdiff[avatar]'"
        ) from error
