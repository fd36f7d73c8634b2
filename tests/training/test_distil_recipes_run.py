"""The recipes for few steps: what a command writes, who learns when, that a stopped run goes on with the same bits."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from streamdiff import presets, rng
from streamdiff.cli.train import run as run_train
from streamdiff.config import EngineConfig
from streamdiff.errors import ConfigError, InputError
from streamdiff.models.dit import CausalDiT
from streamdiff.models.text import HashedText
from streamdiff.training import consistency, lora, matching, recipe
from streamdiff.training.forcing import ForcingConfig, random_dit
from streamdiff.training.latents import LatentClips
from streamdiff.training.loop import Plan, Trainer

FULL = presets.portrait()
assert FULL.dit.audio is not None
HEARD = dataclasses.replace(FULL.dit.audio, inject_layers=(0,))
CONFIG: EngineConfig = dataclasses.replace(
    FULL, dit=dataclasses.replace(FULL.dit, dim=48, ffn_dim=64, num_heads=2, num_layers=2, audio=HEARD)
)
NUM_CHUNKS, BATCH = 3, 2


@pytest.fixture(autouse=True)
def small_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, "portrait", lambda: CONFIG)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Five clips of eleven latent frames of anything."""
    audio = CONFIG.dit.audio
    assert audio is not None
    H, W = CONFIG.latent_hw
    shapes = {
        "latent": (5, CONFIG.dit.in_dim, 11, H, W),
        "reference": (5, CONFIG.dit.in_dim, H, W),
        "audio": (5, audio.num_features, audio.feature_dim, 11 * CONFIG.vae.temporal_factor),
    }
    tensors = {name: rng.normal(shape, "clips", name).half() for name, shape in shapes.items()}
    tensors["prompt"] = torch.tensor([0, 1, 0, 1, 0])
    folder = tmp_path / "latents"
    folder.mkdir()
    about = {"prompts": json.dumps(["a person talks", "a person nods"]), "config": "portrait"}
    save_file(tensors, folder / "latents.safetensors", metadata=about)
    return folder


def teacher() -> CausalDiT:
    """Random, and its head not silent: a model that says nothing teaches nothing."""
    dit = random_dit(CONFIG, seed=1)
    with torch.no_grad():
        dit.head.head.weight.copy_(0.1 * rng.normal(tuple(dit.head.head.weight.shape), "head"))
    return dit


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_file(teacher().state_dict(), tmp_path / "teacher.safetensors")
    return tmp_path / "teacher.safetensors"


def clips_of(folder: Path) -> LatentClips:
    return LatentClips(folder, CONFIG, HashedText(CONFIG.dit.text_dim, max_tokens=CONFIG.dit.text_len), held_out=1)


def matching_task(folder: Path, **settings: object) -> matching.MatchingTask:
    chosen = matching.MatchingConfig(num_chunks=NUM_CHUNKS, student_every=2, **settings)  # type: ignore[arg-type]
    return matching.MatchingTask(
        teacher(), teacher(), teacher(), clips_of(folder), CONFIG, chosen, batch=BATCH, lr=1e-3, seed=4
    )


def consistency_task(folder: Path) -> consistency.ConsistencyTask:
    draws = ForcingConfig(num_chunks=NUM_CHUNKS, shared=1.0)
    settings = consistency.ConsistencyConfig(guidance=0.5)
    return consistency.ConsistencyTask(
        teacher(), clips_of(folder), CONFIG, settings, draws, batch=BATCH, lr=1e-3, seed=4
    )


def train(recipe: str, *arguments: object) -> int:
    return run_train(argparse.Namespace(recipe=recipe, arguments=[str(a) for a in arguments]))


@pytest.mark.heavy
@pytest.mark.parametrize("make", [matching_task, consistency_task], ids=["distil", "consistency"])
def test_a_stopped_run_ends_with_the_same_bits(make, data: Path, tmp_path: Path) -> None:
    straight = Trainer(make(data), tmp_path / "straight", Plan(steps=5))
    straight.train()

    def stop(step: int, _total: int | None, _numbers: Mapping[str, float]) -> None:
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    first = Trainer(make(data), tmp_path / "stopped", Plan(steps=5))
    assert first.train(on_step=stop).step == 2
    second = Trainer(make(data), tmp_path / "stopped", Plan(steps=5), resume=True)
    second.train()
    kept, again = (load_file(trainer.checkpoint) for trainer in (straight, second))
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def _weights(dit: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in dit.named_parameters()}


@pytest.mark.heavy
def test_the_critic_learns_in_every_step_and_the_student_in_every_second(data: Path, tmp_path: Path) -> None:
    task = matching_task(data)
    teaches = _weights(task._teacher)
    seen = [(_weights(task.student), _weights(task.critic))]

    def note(*_: object) -> None:
        seen.append((_weights(task.student), _weights(task.critic)))

    Trainer(task, tmp_path / "run", Plan(steps=4)).train(on_step=note)

    def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
        return any(not torch.equal(before[name], after[name]) for name in before)

    assert [moved(a[0], b[0]) for a, b in itertools.pairwise(seen)] == [True, False, True, False]
    assert [moved(a[1], b[1]) for a, b in itertools.pairwise(seen)] == [True] * 4
    assert not moved(teaches, _weights(task._teacher))


@pytest.mark.heavy
def test_every_weight_that_a_clip_reaches_gets_a_gradient(data: Path) -> None:
    """Through prompt, sound and sink too, in bfloat16 as in float32."""
    missing: list[set[str]] = []
    for bf16 in (False, True):
        task = matching_task(data)
        task._bf16 = bf16
        task.gradients(0)
        for dit in (task.student, task.critic):
            missing.append({name for name, p in dit.named_parameters() if p.grad is None or not p.grad.any()})
    # The pose input is absent from this data; motion tokens too.
    assert all(names <= {"cond_encoder.weight"} for names in missing), missing


def test_bf16_gives_nearly_the_gradients_of_float32(data: Path) -> None:
    found = []
    for bf16 in (False, True):
        task = matching_task(data)
        task._bf16 = bf16
        task.gradients(0)
        found.append(torch.cat([p.grad.flatten() for p in task.student.parameters() if p.grad is not None]))
    assert torch.cosine_similarity(found[0], found[1], dim=0) > 0.95


@pytest.mark.heavy
def test_regression_adds_its_gradient_to_the_students(data: Path) -> None:
    found = []
    for weight in (0.0, 0.5, 1.0):
        task = matching_task(data, regression=weight)
        numbers = task.gradients(0)
        assert ("distance" in numbers) == (weight > 0)
        found.append([p.grad.clone() for p in task.student.parameters() if p.grad is not None])
    for none, half, whole in zip(*found, strict=True):
        torch.testing.assert_close(half - none, 0.5 * (whole - none), atol=1e-5, rtol=1e-3)
    assert max((whole - none).abs().max() for none, _, whole in zip(*found, strict=True)) > 1e-3


def test_exits_are_drawn_evenly_and_by_name(data: Path) -> None:
    task = matching_task(data)
    drawn = [task.exit_step(step) for step in range(400)]
    assert drawn == [task.exit_step(step) for step in range(400)]
    counts = [drawn.count(step) for step in range(CONFIG.num_steps)]
    assert sum(counts) == 400
    assert min(counts) > 70


def test_consistency_follows_its_own_average(data: Path, tmp_path: Path) -> None:
    task = consistency_task(data)
    start = _weights(task.followed.model)
    Trainer(task, tmp_path / "run", Plan(steps=3)).train()
    task.followed.follow(3)
    name = "blocks.0.ffn.0.weight"
    average = dict(task.followed.average.named_buffers())[name]
    learned = dict(task.followed.model.named_parameters())[name]
    assert not torch.equal(average, start[name])
    assert (average - start[name]).norm() < (learned - start[name]).norm()
    sigma_B, next_B = task.levels(1000, 0)
    assert (sigma_B > next_B).all()
    for served in CONFIG.sigmas[:-1]:
        assert (sigma_B - served).abs().min() < 1e-6


@pytest.mark.heavy
def test_the_commands_write_weights_that_load(data: Path, weights: Path, tmp_path: Path) -> None:
    common = ("--data", data, "--batch", BATCH, "--chunks", NUM_CHUNKS, "--steps", 2, "--held-out", 1)
    assert train("consistency", *common, "--out", tmp_path / "cd", "--init", weights) == 0
    after = tmp_path / "cd" / "dit.safetensors"
    student = ("--teacher", weights, "--init", after, "--out", tmp_path / "dmd", "--levels", 2, "--student-every", 2)
    assert train("distil", *common, *student) == 0
    dit = CausalDiT(CONFIG.dit)
    for path in (after, tmp_path / "dmd" / "dit.safetensors"):
        recipe.load_weights(dit, path)
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
        assert facts["steps"] == "2"
    assert "(1.0, 0.75, 0.0)" in facts["sigmas"]
    assert not torch.equal(load_file(after)["head.head.weight"], load_file(weights)["head.head.weight"])


@pytest.mark.heavy
def test_chunks_of_one_frame_sparse_with_adapters(data: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "lora"
    options = ("--data", data, "--batch", 1, "--chunks", 5, "--steps", 2, "--held-out", 1, "--out", out)
    special = ("--frames-per-chunk", 1, "--sparse", "--no-renoise", "--lora", 3, "--student-every", 1)
    assert train("distil", *options, *special, "--teacher", weights) == 0
    merged = CausalDiT(CONFIG.dit)
    recipe.load_weights(merged, out / "dit.safetensors")
    adapted = teacher()
    lora.adapt(adapted, rank=3)
    lora.load_lora_(adapted, out / "lora.safetensors")
    factors = load_file(out / "lora.safetensors")
    assert any(factors[name].any() for name in factors if "lora_B" in name)
    expected = lora.merge_(copy.deepcopy(adapted)).state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0, msg=name)


def test_wrong_calls_get_one_line(data: Path, weights: Path, tmp_path: Path) -> None:
    common = ("--data", data, "--out", tmp_path / "run", "--steps", 1, "--held-out", 1)
    with pytest.raises(ConfigError, match="begins with a trained model; give --init"):
        train("consistency", *common)
    with pytest.raises(InputError, match="is not there"):
        train("distil", *common, "--teacher", tmp_path / "nowhere.safetensors")
    with pytest.raises(ConfigError, match="--guidance: must be a number"):
        train("distil", *common, "--teacher", weights, "--guidance", -1)
    with pytest.raises(ConfigError, match="--chunks: must be a whole number"):
        train("distil", *common, "--teacher", weights, "--chunks", 0)
    with pytest.raises(InputError, match="at most --chunks 3"):
        train("distil", *common, "--teacher", weights, "--chunks", 9)
