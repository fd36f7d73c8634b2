"""The loss is the velocity's error under the conditions that were drawn, and it falls; the command does all of it."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from streamdiff import presets
from streamdiff.cli.main import main
from streamdiff.errors import ConfigError
from streamdiff.models.dit import initialise
from streamdiff.models.text import HashedText
from streamdiff.training import forcing, samples, sequence
from streamdiff.training.codec import Codec
from streamdiff.training.forcing import Draws, ForcingConfig, ForcingTask, draw, forcing_loss, random_dit
from streamdiff.training.latents import Batch, LatentClips
from streamdiff.training.loop import CHECKPOINT, Plan, Trainer
from tests.training.forcing_case import small_config, write_clips

CONFIG = small_config()
ENCODER = HashedText(CONFIG.dit.text_dim, max_tokens=CONFIG.dit.text_len)


def clips_in(folder: Path) -> LatentClips:
    return LatentClips(write_clips(folder, CONFIG), CONFIG, ENCODER, held_out=2)


def test_errors_count_where_a_portrait_has_its_mouth(tmp_path: Path) -> None:
    clips = clips_in(tmp_path)
    batch = clips.batch(4, 3, seed=0, step=0).to("cpu")
    settings = ForcingConfig(num_chunks=3)
    draws, dit = draw(settings, CONFIG, tuple(batch.latent_BCTHW.shape), 2), random_dit(CONFIG, seed=0)
    H, W = CONFIG.latent_hw

    def loss(weight: torch.Tensor | None) -> torch.Tensor:
        layout = settings.layout(CONFIG)
        return forcing_loss(dit, batch, draws, layout, clips.empty_text_1PC, weight=weight)

    parts = [torch.zeros(H, W).index_put((torch.tensor(y), torch.tensor(x)), torch.tensor(1.0 * H * W))
             for y in range(H) for x in range(W)]  # fmt: skip
    torch.testing.assert_close(torch.stack([loss(part) for part in parts]).mean(0), loss(None))
    weight = forcing.error_weights(ForcingConfig(portrait=1.0), (8, 8), None)
    assert weight is not None
    weight_HW = weight[0, 0]
    torch.testing.assert_close(weight_HW.mean(), torch.tensor(1.0))
    assert divmod(int(weight_HW.argmax()), 8) in ((4, 3), (4, 4), (5, 3), (5, 4))
    assert weight_HW.max() > 5 * weight_HW[0, 0]


def test_errors_count_where_they_are_seen() -> None:
    assert forcing.error_weights(ForcingConfig(), (8, 8), torch.ones(3)) is None
    with pytest.raises(ConfigError, match="encode the clips again"):
        forcing.error_weights(ForcingConfig(visible=0.5), (8, 8), None)
    weight = forcing.error_weights(ForcingConfig(visible=0.5), (2, 2), torch.tensor([0.5, 1.0, 1.5]))
    assert weight is not None
    torch.testing.assert_close(weight, torch.tensor([0.5, 1.0, 1.5]).view(3, 1, 1, 1).expand(3, 1, 2, 2))


def test_the_loss_is_what_each_clip_would_have_alone(tmp_path: Path) -> None:
    """Every clip once more by itself, chunk after chunk, its conditions chosen by hand."""
    clips = clips_in(tmp_path)
    settings = ForcingConfig(num_chunks=3, no_sink=0.4, adaptive_sink=0.5, no_audio=0.4, no_text=0.4)
    batch = clips.batch(6, 3, seed=0, step=0).to("cpu")
    assert batch.elsewhere_BCTHW is not None
    draws = draw(settings, CONFIG, tuple(batch.latent_BCTHW.shape), 2)
    for kind in (draws.sees_sink_B, draws.adaptive_B >= 0, draws.hears_B, draws.reads_B):
        assert 0 < int(kind.sum()) < 6
    dit = random_dit(CONFIG, seed=0)
    initialise(dit, seed=1)
    layout = settings.layout(CONFIG)
    loss_Bn = forcing_loss(dit, batch, draws, layout, clips.empty_text_1PC)
    T = CONFIG.frames_per_chunk
    for b in range(6):
        own = slice(b, b + 1)
        text = dit.text_condition(batch.text_BPC[own] if draws.reads_B[b] else ENCODER.encode(""))
        shown = batch.elsewhere_BCTHW[own] if draws.adaptive_B[b] >= 0 else batch.reference_BCTHW[own]
        sink = sequence.remember_sink(dit, shown, text) if draws.sees_sink_B[b] else None
        heard = batch.audio_BZEA[own] if draws.hears_B[b] else torch.zeros_like(batch.audio_BZEA[own])
        memories: list[sequence.Remembered] = []
        for chunk in range(3):
            frames = slice(chunk * T, chunk * T + T)
            data, noise = batch.latent_BCTHW[own, :, frames], draws.noise_BCTHW[own, :, frames]
            sigma = draws.sigma_Bn[b, chunk]
            velocity, memory = sequence.chunk_velocity(
                dit,
                (1 - sigma) * data + sigma * noise,
                sigma.view(1),
                text,
                sequence.hear(dit, heard.chunk(3, dim=3)[chunk], 1),
                first_frame=chunk * T,
                history=[(c * T, memories[c]) for c in layout.visible[chunk] if c != chunk],
                sink=sink,
                lead_B=draws.lead_Bn[own, chunk],
            )
            memories.append(memory)
            alone = (velocity - (noise - data)).square().mean()
            torch.testing.assert_close(loss_Bn[b, chunk], alone, rtol=1e-4, atol=1e-5)


def test_without_other_moments_the_sink_is_one_of_the_clip() -> None:
    latent = torch.arange(6.0).view(1, 1, 6, 1, 1).expand(3, 4, 6, 4, 4)
    batch = Batch(latent, torch.full((3, 4, 1, 4, 4), -1.0), torch.zeros(0), torch.zeros(0))
    sink = forcing.sink_of(batch, torch.tensor([-1, 0, 4]))
    assert sink[:, 0, 0, 0, 0].tolist() == [-1.0, 0.0, 4.0]
    assert sink.shape == (3, 4, 1, 4, 4)


def test_a_model_that_has_learned_nothing_says_nothing(tmp_path: Path) -> None:
    batch = clips_in(tmp_path).batch(4, 2, seed=0, step=0).to("cpu")
    dit = random_dit(CONFIG, seed=0)
    settings = ForcingConfig(num_chunks=2)
    draws = draw(settings, CONFIG, tuple(batch.latent_BCTHW.shape), 0)
    loss_Bn = forcing_loss(dit, batch, draws, settings.layout(CONFIG), ENCODER.encode(""))
    wanted = draws.noise_BCTHW - batch.latent_BCTHW
    bias = dit.head.head.bias.square().mean().item()
    assert loss_Bn.mean().item() == pytest.approx(wanted.square().mean().item(), abs=0.05 + bias)


@pytest.mark.slow
def test_it_learns_what_the_sound_says(tmp_path: Path) -> None:
    clips = clips_in(tmp_path / "clips")
    settings = ForcingConfig(num_chunks=3)
    task = ForcingTask(random_dit(CONFIG, seed=0), clips, CONFIG, settings, batch=8, lr=4e-3, seed=0)
    before = task.held_out_loss()
    trainer = Trainer(task, tmp_path / "run", Plan(steps=80, warmup_steps=5))
    trainer.train()
    with trainer.averaged("dit"):
        after = task.held_out_loss()
    assert after < 0.75 * before
    # The same model, deaf, is worse: it is the sound that it learned from.
    batch = clips.held_out_batch(3).to("cpu")
    deaf = dataclasses.replace(batch, audio_BZEA=torch.zeros_like(batch.audio_BZEA))
    draws = draw(dataclasses.replace(settings, no_audio=0.0), CONFIG, tuple(batch.latent_BCTHW.shape), 1)
    losses = [_mean_loss(task, each, draws, settings) for each in (batch, deaf)]
    assert losses[0] < 0.9 * losses[1]


@torch.no_grad()
def _mean_loss(task: ForcingTask, batch: Batch, draws: Draws, settings: ForcingConfig) -> float:
    return forcing_loss(task.dit, batch, draws, settings.layout(CONFIG), ENCODER.encode("")).mean().item()


@pytest.fixture
def small_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, "small", small_config)


def train(*arguments: str) -> int:
    return main(
        ["train", "forcing", "--preset", "small", "--batch", "4", "--chunks", "2", "--held-out", "2", *arguments]
    )


@pytest.mark.heavy
def test_the_command_trains_stops_and_goes_on(
    tmp_path: Path, small_preset: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(write_clips(tmp_path / "clips", CONFIG))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train("--data", data, "--out", str(whole), "--steps", "5") == 0
    assert "dit.safetensors: after 5 steps" in capsys.readouterr().out

    gradients = ForcingTask.gradients

    def interrupted(task: ForcingTask, step: int) -> object:
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return gradients(task, step)

    with monkeypatch.context() as patch:
        patch.setattr(ForcingTask, "gradients", interrupted)
        assert train("--data", data, "--out", str(broken), "--steps", "5") == 130
    said = capsys.readouterr().err
    assert "stopped after step 3 of 5" in said
    assert "--resume" in said
    assert train("--data", data, "--out", str(broken), "--steps", "5") == 2
    assert "add --resume" in capsys.readouterr().err
    assert train("--data", data, "--out", str(broken), "--steps", "5", "--resume") == 0
    for name in (CHECKPOINT, "dit.safetensors"):
        one, other = load_file(whole / name), load_file(broken / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    with safe_open(whole / "dit.safetensors", framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
    assert facts["preset"] == "small"
    assert facts["steps"] == "5"
    log = [json.loads(line) for line in (broken / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry["numbers"]] == list(range(5))
    assert any("held_out" in entry["numbers"] for entry in log)
    # What was trained can be begun with.
    weights = str(whole / "dit.safetensors")
    assert train("--data", data, "--out", str(tmp_path / "more"), "--steps", "1", "--init", weights, "--bf16") == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "0"], "--steps: must be a whole number in 1.."),
        (["--steps", "5", "--budget", "1min"], "give one of them"),
        (["--budget", "soon"], "--budget: must look like 10min, 2h or 90s, from 1s to 8784h, got 'soon'"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:N"),
        (["--threads", "0"], "--threads: must be a whole number in 1..1024"),
        (["--batch", "0"], "--batch: must be a whole number in 1.."),
        (["--init", "nowhere.safetensors"], "nowhere.safetensors is not there"),
        (["--data", "nowhere"], "latents.safetensors is not there"),
        (["--steps", "1", "--chunks", "9"], "at most --chunks 4"),
    ],
)
def test_wrong_arguments_get_one_line(
    tmp_path: Path, small_preset: None, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    data = write_clips(tmp_path / "clips", CONFIG)
    assert train("--data", str(data), "--out", str(tmp_path / "run"), *arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert said in lines[-1]


def test_an_unknown_recipe_gets_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "alchemy"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "there is no recipe 'alchemy'; choose from data, codec, encode, forcing, consistency, distil" in error


def test_samples_show_clips_that_were_held_out(tmp_path: Path) -> None:
    batch = clips_in(tmp_path).held_out_batch(2).to("cpu")
    dit = random_dit(CONFIG, seed=0)
    before = {name: t.clone() for name, t in dit.state_dict().items()}
    made = samples.serve(dit, CONFIG, batch)
    assert made.shape == batch.latent_BCTHW.shape
    assert bool(made.isfinite().all())
    codec = Codec(CONFIG.vae)
    initialise(codec, seed=0)
    samples.draw_samples(dit, codec, CONFIG, batch, tmp_path / "samples.png")
    with Image.open(tmp_path / "samples.png") as picture:
        # Two clips, each above its own sample, twelve frames of 32 pixels and gaps of 4.
        assert picture.size == (12 * 36 - 4, 4 * 36 - 4)
    # The copy that was served left the one that learns alone.
    assert all(torch.equal(t, before[name]) for name, t in dit.state_dict().items())
    assert all(p.requires_grad for p in dit.parameters())
