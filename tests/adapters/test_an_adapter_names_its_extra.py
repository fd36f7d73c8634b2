"""An adapter whose framework is not installed says what to install."""

from __future__ import annotations

import importlib
import sys

import pytest

from streamdiff.errors import BackendError


@pytest.mark.parametrize("name", ["livekit", "pipecat"])
def test_the_extra_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = [module for module in sys.modules if module.startswith(f"{name}.")]
    for module in (name, *loaded):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"streamdiff.adapters.{name}", raising=False)
    with pytest.raises(BackendError, match=rf"pip install 'streamdiff\[{name}\]'"):
        importlib.import_module(f"streamdiff.adapters.{name}")
