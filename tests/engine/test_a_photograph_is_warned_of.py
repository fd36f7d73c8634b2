"""A small model knows drawn heads only; who brings a photograph is told what will be seen, and where to go."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from streamdiff import demo, presets
from streamdiff.checkpoint import shipped_face
from streamdiff.engine import Engine
from streamdiff.media import read_image

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(presets.portrait())


def photographs(count: int = 12) -> list[np.ndarray]:
    """One photograph as twelve would be taken: other cuts, mirrored, in grey, darker, warmer, turned."""
    photo = Image.open(demo.demo_image()).convert("RGB")
    rng = np.random.default_rng(0)
    taken = []
    for number in range(count):
        side = int(rng.uniform(0.6, 1.0) * min(photo.size))
        left, top = (int(rng.uniform(0, room - side)) for room in photo.size)
        cut = photo.crop((left, top, left + side, top + side)).rotate(rng.uniform(-8, 8)).resize((128, 128))
        pixels_HWC = np.asarray(cut, np.float64) * rng.uniform(0.7, 1.1) * rng.uniform(0.85, 1.15, 3)
        if number % 4 == 3:
            pixels_HWC = np.repeat(pixels_HWC.mean(-1, keepdims=True), 3, -1)
        taken.append(pixels_HWC[:, :: -1 if number % 2 else 1].clip(0, 255).astype(np.uint8))
    return taken


@pytest.mark.parametrize("number", range(12))
def test_a_photograph(engine: Engine, number: int, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("matplotlib", reason="the demo's photograph comes with it")
    engine.encode_reference(torch.from_numpy(photographs()[number].copy()))
    assert "streamdiff talk --image" in caplog.text


def test_the_drawn_head_that_comes_along_is_not(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    face = shipped_face(engine.config)
    assert face is not None
    engine.encode_reference(read_image(face, engine.config.height, engine.config.width))
    assert not caplog.text


def test_a_model_without_a_codec_of_its_own_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    config = presets.tiny()
    Engine(config).encode_reference(torch.randint(0, 255, (config.height, config.width, 3), dtype=torch.uint8))
    assert not caplog.text
