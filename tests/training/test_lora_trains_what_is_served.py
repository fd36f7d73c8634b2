"""An adapter computes in training what it computes after it was saved, loaded with ``--lora`` and merged."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamdiff import presets
from streamdiff.checkpoint import load_dit, lora_modules
from streamdiff.config import DiTConfig
from streamdiff.errors import CheckpointError, ConfigError
from streamdiff.models.dit import CausalDiT, initialise
from streamdiff.training.lora import adapt, adapted_layers, load_lora_, merge_, save_lora, twin

CONFIG: DiTConfig = dataclasses.replace(presets.tiny().dit, dim=64, ffn_dim=96, num_heads=2, num_layers=3)


def model(seed: int = 0) -> CausalDiT:
    dit = CausalDiT(CONFIG)
    initialise(dit, seed=seed)
    return dit


def velocity(dit: CausalDiT) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    latent_BCTHW = torch.randn(2, CONFIG.in_dim, 2, 8, 8, generator=draw)
    text_BPC = torch.randn(2, 5, CONFIG.text_dim, generator=draw)
    assert CONFIG.audio is not None
    heard_BZEA = torch.randn(2, CONFIG.audio.num_features, CONFIG.audio.feature_dim, 8, generator=draw)
    return dit(
        latent_BCTHW,
        dit.modulation(0.7),
        dit.text_condition(text_BPC),
        dit.frame_rotation(range(2), (8, 8)),
        audio=dit.audio_condition(heard_BZEA),
    )


def trained(dit: CausalDiT, *, rank: int = 4, alpha: float = 64.0) -> CausalDiT:
    """Adapters that have moved, by two real steps of descent."""
    factors = adapt(dit, rank=rank, alpha=alpha, seed=3)
    optimiser = torch.optim.Adam(factors, lr=0.02)
    for _ in range(2):
        optimiser.zero_grad()
        velocity(dit).square().mean().backward()
        optimiser.step()
    return dit


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(model().state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    return tmp_path


def test_a_fresh_adapter_changes_nothing() -> None:
    plain, adapted = model(), model()
    adapt(adapted, rank=4)
    assert torch.equal(velocity(plain), velocity(adapted))


def test_only_the_factors_learn() -> None:
    dit = model()
    before = {name: p.detach().clone() for name, p in dit.named_parameters()}
    trained(dit)
    after = dict(dit.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(layer.lora_B.weight.any() for layer in adapted_layers(dit).values())


@pytest.mark.heavy
@pytest.mark.parametrize("alpha", [64.0, 16.0, 5.0])
def test_the_saved_adapter_is_merged_into_the_same_model(folder: Path, alpha: float) -> None:
    dit = trained(model(), alpha=alpha)
    save_lora(dit, folder / "lora.safetensors")
    served = load_dit(CONFIG, folder, lora=folder / "lora.safetensors", dtype=torch.float32)
    expected = velocity(dit).detach()
    moved = (expected - velocity(model())).abs().max()
    assert moved > 0.05  # the adapter does something that a wrong merge would miss
    torch.testing.assert_close(velocity(served), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(velocity(merge_(dit)), expected, atol=2e-5, rtol=0)
    assert dit.state_dict().keys() == model().state_dict().keys()


def test_merging_in_float64_is_exact_to_its_last_digits() -> None:
    dit = model().double()
    factors = adapt(dit, rank=4, dtype=torch.float64)
    with torch.no_grad():
        for number, factor in enumerate(factors):
            factor.copy_(0.05 * torch.randn(factor.shape, generator=torch.Generator().manual_seed(number)))
    layer = next(iter(adapted_layers(dit).values()))
    x_BD = torch.randn(7, layer.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    expected = layer(x_BD)
    name = next(iter(adapted_layers(dit)))
    merge_(dit)
    torch.testing.assert_close(dit.get_submodule(name)(x_BD), expected, atol=1e-13, rtol=0)


def test_the_file_has_the_published_names_and_shapes(tmp_path: Path) -> None:
    dit = model()
    adapt(dit, rank=4)
    save_lora(dit, tmp_path / "lora.safetensors")
    found = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "lora.safetensors").items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in model().state_dict().items()}
    wanted = {}
    for module in lora_modules(CONFIG):
        out, inside = shapes[f"{module}.weight"]
        wanted[f"base_model.model.{module}.lora_A.weight"] = (4, inside)
        wanted[f"base_model.model.{module}.lora_B.weight"] = (out, 4)
    assert found == wanted


@pytest.mark.heavy
def test_the_14b_model_gets_448_adapters_and_676_million_factors() -> None:
    with torch.device("meta"):
        dit = CausalDiT(presets.live_avatar_14b().dit)
    factors = adapt(dit, rank=128)
    assert len(adapted_layers(dit)) == 448
    # q, k, v, o of 92 attentions at 5120 x 5120; two layers of 40 feed-forwards at 5120 x 13824.
    assert sum(p.numel() for p in factors) == 128 * (92 * 4 * 2 * 5120 + 40 * 2 * (5120 + 13824))


def test_training_goes_on_from_a_saved_adapter(tmp_path: Path) -> None:
    first = trained(model(), alpha=16.0)
    save_lora(first, tmp_path / "lora.safetensors")
    second = model()
    adapt(second, rank=4, alpha=16.0, seed=99)
    load_lora_(second, tmp_path / "lora.safetensors")
    assert torch.equal(velocity(first), velocity(second))


def test_twins_share_one_base_and_nothing_else() -> None:
    base = model()
    student, critic = twin(base), twin(base)
    trained(student)
    adapt(critic, rank=2)
    own = dict(base.named_parameters())
    for other in (student, critic):
        named = dict(other.named_parameters())
        assert all(named[name] is parameter for name, parameter in own.items())
    assert torch.equal(velocity(critic), velocity(base))
    assert not torch.equal(velocity(student), velocity(base))
    # Merging one must not move the base under the others.
    before = velocity(base)
    merge_(student)
    assert torch.equal(velocity(base), before)


def test_wrong_use_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapters to save; call adapt"):
        save_lora(model(), tmp_path / "lora.safetensors")
    with pytest.raises(ConfigError, match="rank >= 1"):
        adapt(model(), rank=0)
    dit = model()
    adapt(dit, rank=2)
    with pytest.raises(ConfigError, match="has adapters already"):
        adapt(dit, rank=2)
    save_lora(dit, tmp_path / "lora.safetensors")
    other = model()
    with pytest.raises(ConfigError, match="no adapters to load into"):
        load_lora_(other, tmp_path / "lora.safetensors")
    adapt(other, rank=3)
    with pytest.raises(CheckpointError, match="has rank 2 but the model was adapted with rank 3"):
        load_lora_(other, tmp_path / "lora.safetensors")
