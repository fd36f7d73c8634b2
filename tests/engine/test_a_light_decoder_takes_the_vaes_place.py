"""A published light decoder can be given instead of the VAE's; a file that is none is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from streamdiff.engine import Engine, Weights
from streamdiff.errors import CheckpointError
from streamdiff.models.tae import TAEConfig, TAEDecoder, initialise
from streamdiff.pipeline.run import run_local
from streamdiff.pipeline.schedule import plan
from tests.engine.stream_case import eventful_packets, same, small_config


@pytest.fixture(scope="module")
def published_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the names and shapes of taew2_1, encoder included."""
    decoder = TAEDecoder(TAEConfig())
    initialise(decoder, seed=2)
    path = tmp_path_factory.mktemp("tae") / "taew2_1.pth"
    torch.save({**decoder.state_dict(), "encoder.0.weight": torch.zeros(64, 3, 3, 3)}, path)
    return path


@pytest.mark.slow
def test_it_decodes_the_same_latents_on_its_own_rank(published_file: Path) -> None:
    torch.set_num_threads(1)
    config = small_config(1)
    films = []
    for num_ranks in (1, 2):
        engine = Engine(config, weights=Weights(light_decoder=published_file))
        schedule = plan(num_steps=1, num_ranks=num_ranks, refresh_chunk=config.refresh_chunk)
        stages = [engine.stage(role, seed=7) for role in schedule.roles]
        films.append(list(run_local(schedule, stages, eventful_packets(engine), deadline_s=60)))
    assert same(*films)
    assert films[0][0].frames_THWC is not None
    assert films[0][0].frames_THWC.shape == (12, 64, 64, 3)


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"decoder.1.weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="missing"):
        Engine(small_config(1), weights=Weights(light_decoder=path)).decoder()
    with pytest.raises(CheckpointError, match="there is no such file"):
        Engine(small_config(1), weights=Weights(light_decoder=tmp_path / "none.pth")).decoder()
