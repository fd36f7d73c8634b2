"""The portrait preset is trained: its weights are found, they draw a face, and ranks do not change a bit of it."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from streamdiff import checkpoint, presets
from streamdiff.engine import Engine, Weights
from streamdiff.errors import ConfigError
from streamdiff.media import read_image

_RATE_HZ = 16_000


def _speech(seconds: float) -> Tensor:
    """Bursts of a tone, as loud as speech."""
    clock = torch.arange(int(seconds * _RATE_HZ)) / _RATE_HZ
    return 0.08 * torch.sin(2 * torch.pi * 400 * clock) * (torch.sin(2 * torch.pi * 2 * clock) > 0)


def _film(engine: Engine, num_ranks: int) -> Tensor:
    """Frames ``[T, H, W, 3]`` of 1.9 s of sound."""
    face = checkpoint.shipped_face(engine.config)
    assert face is not None
    image = read_image(face, engine.config.height, engine.config.width)

    async def collect() -> list[Tensor]:
        frames: list[Tensor] = []
        prompt = "A person is talking to the camera."
        async with engine.open(image, prompt, num_ranks=num_ranks, seed=5, stream=0, live=False) as session:
            session.push_audio(_speech(1.9))
            session.finish()
            async for shown in session:
                frames.append(torch.from_numpy(shown.frames_THWC))
        return frames

    return torch.cat(asyncio.run(collect()))


def test_weights_are_found_for_the_preset_and_for_nothing_else(tmp_path: Path) -> None:
    config = presets.portrait()
    folder = checkpoint.shipped(config)
    assert folder is not None
    assert Engine(config).weights.folder == folder
    assert Engine(config).encoder_folder is None
    fewer_steps = dataclasses.replace(config, sigmas=(1.0, 0.75, 0.0))
    assert checkpoint.shipped(fewer_steps) == folder
    wider = dataclasses.replace(config, dit=dataclasses.replace(config.dit, dim=384))
    assert checkpoint.shipped(wider) is None
    assert checkpoint.shipped(presets.tiny()) is None
    assert Engine(config, weights=Weights(folder=tmp_path)).weights.folder == tmp_path


def test_weights_stay_within_their_budget() -> None:
    folder = checkpoint.shipped(presets.portrait())
    assert folder is not None
    assert sum(path.stat().st_size for path in folder.parent.rglob("*.safetensors")) < 40e6


@pytest.mark.heavy
def test_it_draws_the_face_it_was_shown() -> None:
    engine = Engine(presets.portrait())
    film = _film(engine, 1).float()
    face = checkpoint.shipped_face(engine.config)
    assert face is not None
    photo = read_image(face, 128, 128).float()
    # Measured: 11 grey levels; with random weights 66; photographs of thirteen other heads are 29 to 67 off.
    assert (film - photo).abs().mean() < 20
    assert film.diff(dim=0).abs().mean() > 0.3, "a picture that stands still does not talk"
    assert np.isfinite(film.numpy()).all()


@pytest.mark.heavy
@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_ranks_change_nothing(num_ranks: int) -> None:
    engine = Engine(presets.portrait())
    assert torch.equal(_film(engine, num_ranks), _film(engine, 1))


def test_an_adapter_needs_something_to_adapt(tmp_path: Path) -> None:
    adapter = Weights(lora=tmp_path / "adapter.safetensors")
    with pytest.raises(ConfigError, match="give --checkpoint"):
        Engine(presets.tiny(), weights=adapter)
    assert Engine(presets.portrait(), weights=adapter).weights.folder is not None
