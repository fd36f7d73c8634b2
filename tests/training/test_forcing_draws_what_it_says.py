"""What a step draws: keyed by its number, in the shares that are asked for, and clips as they lie on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from streamdiff.errors import ConfigError, InputError
from streamdiff.models.text import HashedText
from streamdiff.rope import sink_position
from streamdiff.training.forcing import Draws, ForcingConfig, draw
from streamdiff.training.latents import LatentClips
from tests.training.forcing_case import NUM_FRAMES, PROMPTS, clip_tensors, small_config, write_clips

CONFIG = small_config()
ENCODER = HashedText(CONFIG.dit.text_dim, max_tokens=CONFIG.dit.text_len)
MANY = 4000


def drawn(settings: ForcingConfig, *key: int | str, clips: int = MANY) -> Draws:
    return draw(settings, CONFIG, (clips, 1, settings.num_chunks * CONFIG.frames_per_chunk, 1, 1), *key)


def test_a_step_draws_the_same_again_and_another_step_does_not() -> None:
    settings = ForcingConfig(num_chunks=3)
    first, again, other = drawn(settings, 1, 7, clips=5), drawn(settings, 1, 7, clips=5), drawn(settings, 1, 8, clips=5)
    for name in Draws.__slots__:
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.noise_BCTHW, other.noise_BCTHW)
    assert not torch.equal(first.sigma_Bn, other.sigma_Bn)


def test_shares_are_those_asked_for() -> None:
    settings = ForcingConfig(num_chunks=3)
    draws = drawn(settings, 0)

    def share(of: torch.Tensor) -> float:
        return float(of.float().mean())

    one_level = (draws.sigma_Bn == draws.sigma_Bn[:, :1]).all(1)
    assert share(one_level) == pytest.approx(settings.shared, abs=0.03)
    served = torch.tensor(CONFIG.sigmas[:-1])
    assert share((draws.sigma_Bn[..., None] == served).any(-1)) == pytest.approx(settings.served, abs=0.03)
    assert share(draws.sees_sink_B) == pytest.approx(1 - settings.no_sink, abs=0.03)
    assert share(draws.adaptive_B >= 0) == pytest.approx(settings.adaptive_sink, abs=0.03)
    assert share(draws.hears_B) == pytest.approx(1 - settings.no_audio, abs=0.03)
    assert share(draws.reads_B) == pytest.approx(1 - settings.no_text, abs=0.03)
    free = draws.sigma_Bn[~(draws.sigma_Bn[..., None] == served).any(-1)]
    # The median of a uniform level, shifted by 3.
    assert float(free.median()) == pytest.approx(0.75, abs=0.02)
    assert 0 <= float(free.min()) < 0.02
    assert 0.98 < float(free.max()) <= 1


def test_the_sink_leads_as_it_is_served() -> None:
    memory = CONFIG.memory
    rolling = drawn(ForcingConfig(num_chunks=3, stream_start=0.0), 0).lead_Bn
    assert set(rolling.flatten().tolist()) == set(range(memory.sink_lead_min, memory.sink_lead_max + 1))
    starting = drawn(ForcingConfig(num_chunks=3, stream_start=1.0), 0).lead_Bn
    for chunk in range(3):
        first = chunk * CONFIG.frames_per_chunk
        possible = {
            sink_position(first, lead=lead, origin=memory.sink_position) - first
            for lead in range(memory.sink_lead_min, memory.sink_lead_max + 1)
        }
        assert set(starting[:, chunk].tolist()) == possible


def test_sparse_clips_have_one_level() -> None:
    draws = drawn(ForcingConfig(num_chunks=4, sparse=True), 0)
    assert bool((draws.sigma_Bn == draws.sigma_Bn[:, :1]).all())
    assert ForcingConfig(num_chunks=4, sparse=True).layout(CONFIG).visible[3] == (0, 2, 3)


def test_sound_and_latents_of_a_clip_stay_together(tmp_path: Path) -> None:
    tensors = clip_tensors(CONFIG, 12)
    clip_n = torch.arange(12.0)
    tensors["latent"] = (
        (100 * clip_n[:, None] + torch.arange(NUM_FRAMES))[:, None, :, None, None]
        .expand(12, 4, -1, 4, 4)
        .contiguous()
        .half()
    )
    factor = CONFIG.vae.temporal_factor
    heard = 100 * clip_n[:, None] + torch.arange(NUM_FRAMES * factor) // factor
    tensors["audio"] = heard[:, None, None].expand(12, 2, 8, -1).contiguous().half()
    tensors["reference"] = clip_n[:, None, None, None].expand(12, 4, 4, 4).contiguous().half()
    save_file(tensors, tmp_path / "latents.safetensors", metadata={"prompts": json.dumps(PROMPTS)})
    clips = LatentClips(tmp_path, CONFIG, ENCODER, held_out=2)
    starts: set[int] = set()
    seen: set[int] = set()
    for step in range(40):
        batch = clips.batch(3, 3, seed=5, step=step)
        assert batch.latent_BCTHW.shape == (3, 4, 6, 4, 4)
        latent_BT, heard_BA = batch.latent_BCTHW[:, 0, :, 0, 0].float(), batch.audio_BZEA[:, 0, 0].float()
        assert torch.equal(latent_BT.repeat_interleave(factor, 1), heard_BA)
        assert torch.equal(latent_BT.diff(dim=1), torch.ones(3, 5))
        number_B = (latent_BT[:, 0] // 100).long()
        assert torch.equal(batch.reference_BCTHW[:, 0, 0, 0, 0].long(), number_B)
        assert batch.elsewhere_BCTHW is not None
        assert torch.equal(batch.elsewhere_BCTHW[:, 0, 0, 0, 0].long() // 100, number_B)
        for number, text_PC in zip(number_B.tolist(), batch.text_BPC, strict=True):
            own = ENCODER.encode(PROMPTS[number % 2])[0]
            assert torch.equal(text_PC[: len(own)], own)
            assert not text_PC[len(own) :].any()
        starts |= set((latent_BT[:, 0] % 100).long().tolist())
        seen |= set(number_B.tolist())
    assert starts == {0, 1, 2}
    assert seen == set(range(10))
    assert (clips.held_out_batch(3).latent_BCTHW[:, 0, 0, 0, 0] // 100).tolist() == [10, 11]


def test_steps_draw_clips_by_their_number(tmp_path: Path) -> None:
    clips = LatentClips(write_clips(tmp_path, CONFIG), CONFIG, ENCODER)
    first, again, other = (clips.batch(8, 2, seed=0, step=step).latent_BCTHW for step in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_files_that_cannot_be_learned_from_say_why(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"latents.safetensors is not there; write it with `streamdiff train encode"):
        LatentClips(tmp_path, CONFIG, ENCODER)
    path = tmp_path / "latents.safetensors"
    path.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="no file of encoded clips"):
        LatentClips(tmp_path, CONFIG, ENCODER)
    save_file(clip_tensors(CONFIG, 4), path)
    with pytest.raises(InputError, match="no file of encoded clips"):
        LatentClips(tmp_path, CONFIG, ENCODER)
    write_clips(tmp_path, CONFIG, preset="portrait")
    with pytest.raises(InputError, match="give --preset portrait"):
        LatentClips(tmp_path, CONFIG, ENCODER)
    about = {"prompts": json.dumps(PROMPTS)}
    tensors = clip_tensors(CONFIG, 4)
    save_file({**tensors, "audio": tensors["audio"][..., :-1].contiguous()}, path, metadata=about)
    with pytest.raises(InputError, match=r"audio is \[4, 2, 8, 31\] but the preset 'small' wants \[4, 2, 8, 32\]"):
        LatentClips(tmp_path, CONFIG, ENCODER)
    save_file({n: t for n, t in tensors.items() if n != "audio"}, path, metadata=about)
    with pytest.raises(InputError, match="no tensor 'audio'"):
        LatentClips(tmp_path, CONFIG, ENCODER)
    save_file({**tensors, "prompt": torch.full((4,), 2)}, path, metadata=about)
    with pytest.raises(InputError, match="names a prompt beyond its list of 2"):
        LatentClips(tmp_path, CONFIG, ENCODER)
    save_file(tensors, path, metadata=about)
    with pytest.raises(InputError, match="too few to hold 4 of them out"):
        LatentClips(tmp_path, CONFIG, ENCODER, held_out=4)
    with pytest.raises(InputError, match="at most --chunks 4"):
        LatentClips(tmp_path, CONFIG, ENCODER).batch(1, 5, seed=0, step=0)
    with pytest.raises(ConfigError, match="shares lie in"):
        ForcingConfig(no_sink=1.5)
