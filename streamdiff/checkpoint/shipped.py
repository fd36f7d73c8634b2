"""The weights that come with a preset."""

from __future__ import annotations

from pathlib import Path

from streamdiff import presets
from streamdiff.config import EngineConfig
from streamdiff.packaged import FOLDER, packaged

_CHECKED = (".safetensors", ".png")


def shipped(config: EngineConfig) -> Path | None:
    """The folder of the weights that come with a preset; None when it has none, or its models were changed.

    Raises CheckpointError when the files are not those that were shipped.
    """
    folder = FOLDER / config.name
    if config.name not in presets.PRESETS or not any(folder.glob("diffusion_pytorch_model*.safetensors")):
        return None
    original = presets.preset(config.name)
    if (original.dit, original.vae) != (config.dit, config.vae):
        return None
    for path in folder.iterdir():
        if path.suffix in _CHECKED:
            packaged(f"{config.name}/{path.name}")
    return folder


def shipped_face(config: EngineConfig) -> Path | None:
    """A face that the weights of a preset come with; None when they come without, or there are none."""
    folder = shipped(config)
    face = None if folder is None else folder / "face.png"
    return face if face is not None and face.is_file() else None
