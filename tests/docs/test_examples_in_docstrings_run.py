"""Every example in a docstring is true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import streamdiff
import streamdiff_kernels


def modules() -> list[str]:
    found = []
    for package in (streamdiff, streamdiff_kernels):
        names = [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
        found += [name for name in names if ".triton" not in name]
    return found


def marks(name: str) -> list[pytest.MarkDecorator]:
    """What importing a module asks for: adapters take seconds, for they import whole frameworks."""
    slow = [pytest.mark.slow] if name.startswith("streamdiff.adapters.") else []
    return [*slow, pytest.mark.processes] if imports_sockets(name) else slow


@pytest.mark.heavy
def imports_sockets(name: str) -> bool:
    """Whether a library that the module imports looks for C libraries with a process of its own."""
    return name.startswith("streamdiff.serve")


@pytest.mark.parametrize("name", [pytest.param(n, marks=marks(n)) for n in modules()])
def test_doctests_of(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"needs an extra: {error}")
    failed, _ = doctest.testmod(module)
    assert failed == 0
