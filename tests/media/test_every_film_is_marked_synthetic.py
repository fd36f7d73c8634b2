"""No film leaves without saying that a model made it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from streamdiff.media import SYNTHETIC_MARK, VideoWriter
from streamdiff.output import part_of
from tests.media.made_files import play


@pytest.mark.parametrize("close", [True, False])
def test_comment_and_description_carry_the_mark(tmp_path: Path, close: bool) -> None:
    path = tmp_path / "film.mp4"
    own = {"title": "Ünïcode 👩", "comment": "seed 7", "streamdiff_preset": "tiny"}
    writer = VideoWriter(path, width=64, height=64, fps=25, rate_hz=None, metadata=own)
    writer.write(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
    if close:
        writer.close()
    metadata = play(path if close else part_of(path)).metadata
    assert metadata["description"] == SYNTHETIC_MARK
    assert metadata["comment"] == f"{SYNTHETIC_MARK} seed 7"
    assert metadata["title"] == "Ünïcode 👩"
    assert metadata["streamdiff_preset"] == "tiny"
    writer.close()
