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


@pytest.mark.heavy
@pytest.mark.parametrize("name", modules())
def test_doctests_of(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"needs an extra: {error}")
    failed, _ = doctest.testmod(module)
    assert failed == 0
