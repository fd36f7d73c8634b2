"""The format ``.engine``, which could run code, is refused wherever a person is named; the file is not even opened."""

from __future__ import annotations

import builtins
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamdiff.avatar.bundle import IdentityBundle
from streamdiff.avatar.identity import create_bundle, open_bundle
from streamdiff.cli.main import parser
from streamdiff.errors import CheckpointError, ConfigError


def _command(*argv: str) -> Callable[[Path], Any]:
    def run(path: Path) -> Any:
        words = [word.format(path) for word in argv]
        args = parser(words).parse_args(words)
        return args.run(args)

    return run


@pytest.mark.parametrize(
    "take",
    [
        pytest.param(IdentityBundle.load, id="load"),
        pytest.param(create_bundle, id="create_bundle"),
        pytest.param(open_bundle, id="open_bundle"),
        pytest.param(_command("avatar", "inspect", "{}"), id="inspect"),
        pytest.param(_command("avatar", "create", "--photo", "{}"), id="create"),
        pytest.param(_command("talk", "Hello.", "--avatar", "{}"), id="talk"),
    ],
)
def test_an_engine_is_refused_and_never_opened(
    take: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "Me.ENGINE"
    path.write_bytes(b"PK")
    opened: list[object] = []
    real = io.open

    def spying(file: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(file)
        return real(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", spying)
    monkeypatch.setattr(io, "open", spying)
    with pytest.raises(
        CheckpointError, match=r"\.engine was removed.*could run code.*make the \.avatar from the photo"
    ):
        take(path)
    assert not [file for file in opened if str(file).endswith("ENGINE")]


def test_there_is_no_command_that_makes_one() -> None:
    with pytest.raises(ConfigError, match="compile"):
        _command("avatar", "compile", "{}")(Path("me.avatar"))
