"""A checkpoint or LoRA that does not fit is refused, and every tensor concerned is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from streamdiff import presets
from streamdiff.checkpoint import load_dit, load_strict, load_vae, lora_modules, official_dit_name, read_lora
from streamdiff.config import AudioInjectionConfig, DiTConfig
from streamdiff.errors import CheckpointError
from streamdiff.models.dit import CausalDiT, initialise
from streamdiff.models.vae import VAEDecoder, VAEEncoder
from streamdiff.tensorfile import FiniteCheck, is_finite

CONFIG = DiTConfig(
    dim=32,
    ffn_dim=48,
    num_heads=2,
    num_layers=2,
    text_dim=8,
    text_len=4,
    freq_dim=16,
    audio=AudioInjectionConfig(feature_dim=6, num_features=3, num_tokens=2, inject_layers=(1,)),
)
RANK = 4


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    dit = CausalDiT(CONFIG)
    initialise(dit, seed=3)
    return {name: t.clone() for name, t in dit.state_dict().items()}


def save_checkpoint(folder: Path, weights: dict[str, Tensor]) -> Path:
    names = sorted(weights)
    half = len(names) // 2
    for i, part in enumerate((names[:half], names[half:])):
        shard = folder / f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        save_file({name: weights[name].contiguous() for name in part}, shard)
    return folder


def lora_tensors(prefix: str = "base_model.model.", middle: str = ".default") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in CausalDiT(CONFIG).state_dict().items()}
    tensors: dict[str, Tensor] = {}
    for module in lora_modules(CONFIG):
        outputs, inputs = shapes[f"{module}.weight"]
        tensors[f"{prefix}{module}.lora_A{middle}.weight"] = torch.randn(RANK, inputs, generator=generator)
        tensors[f"{prefix}{module}.lora_B{middle}.weight"] = torch.randn(outputs, RANK, generator=generator)
    return tensors


def test_the_published_lora_has_448_modules() -> None:
    modules = lora_modules(presets.live_avatar_14b().dit)
    assert len(modules) == len(set(modules)) == 448


def test_a_checkpoint_in_shards_loads_bit_for_bit(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    dit = load_dit(CONFIG, save_checkpoint(tmp_path, weights), dtype=torch.float32)
    assert all(torch.equal(t, weights[name]) for name, t in dit.state_dict().items())


def test_diffusers_names_load_too(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    backwards = {
        "blocks.0.self_attn.q.weight": "blocks.0.attn1.to_q.weight",
        "head.modulation": "scale_shift_table",
    }
    assert all(official_dit_name(theirs) == ours for ours, theirs in backwards.items())
    renamed = {backwards.get(name, name): t for name, t in weights.items()}
    dit = load_dit(CONFIG, save_checkpoint(tmp_path, renamed), dtype=torch.float32)
    assert torch.equal(dit.state_dict()["head.modulation"], weights["head.modulation"])


def test_every_misfit_is_named(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    wrong = dict(weights)
    del wrong["head.head.bias"]
    wrong["blocks.9.stranger"] = torch.zeros(1)
    wrong["patch_embedding.bias"] = torch.zeros(7)
    with pytest.raises(CheckpointError) as caught:
        load_dit(CONFIG, save_checkpoint(tmp_path, wrong))
    message = str(caught.value)
    assert "1 missing: head.head.bias" in message
    assert "1 unexpected: blocks.9.stranger" in message
    assert "patch_embedding.bias is [7], must be [32]" in message


@pytest.mark.parametrize("kind", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_weights_are_real_numbers(tmp_path: Path, weights: dict[str, Tensor], kind: torch.dtype) -> None:
    other = {**weights, "head.head.bias": weights["head.head.bias"].to(kind)}
    with pytest.raises(CheckpointError, match=r"head.head.bias holds .*floating-point"):
        load_dit(CONFIG, save_checkpoint(tmp_path, other))
    with pytest.raises(CheckpointError, match=r"head.head.bias holds .*floating-point"):
        load_strict(CausalDiT(CONFIG), other, what="weights")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_finite(
    tmp_path: Path, weights: dict[str, Tensor], stored: torch.dtype, dtype: torch.dtype, value: float
) -> None:
    broken = {name: t.to(stored, copy=True) for name, t in weights.items()}
    load_dit(CONFIG, save_checkpoint(tmp_path, broken), dtype=dtype)
    broken["blocks.1.ffn.0.weight"].view(-1)[-1] = value
    broken["head.modulation"].view(-1)[0] = value
    with pytest.raises(CheckpointError, match=r"NaN or infinity \(blocks.1.ffn.0.weight, head.modulation\)"):
        load_dit(CONFIG, save_checkpoint(tmp_path, broken), dtype=dtype)
    with pytest.raises(CheckpointError, match=r"NaN or infinity \(blocks.1.ffn.0.weight, head.modulation\)"):
        load_strict(CausalDiT(CONFIG).to(dtype), broken, what="weights")


def test_what_does_not_fit_into_half_precision_is_not_finite(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    large = {**weights, "head.head.bias": torch.full_like(weights["head.head.bias"], 3.4e38)}
    load_dit(CONFIG, save_checkpoint(tmp_path, large), dtype=torch.float32)
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        load_dit(CONFIG, tmp_path, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_place_of_a_large_tensor_is_looked_at(dtype: torch.dtype) -> None:
    """The largest and the smallest numbers of a kind are finite."""
    source = torch.randn(3, 300_001, dtype=torch.float64).to(dtype)
    limits = torch.finfo(dtype)
    source[0, :4] = torch.tensor([limits.max, limits.min, limits.tiny, -0.0], dtype=dtype)
    assert is_finite(source)
    for at in (0, 1, 262_143, 262_144, 524_288, 600_002, 900_002):
        for value in (torch.nan, -torch.nan, torch.inf, -torch.inf):
            broken = source.clone()
            broken.view(-1)[at] = value
            assert not is_finite(broken)
            assert not is_finite(broken.T), "what does not lie in one piece is looked at as well"


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [0, 1, 7, 300_001])
def test_what_is_copied_block_by_block_is_the_same_and_looked_at_everywhere(dtype: torch.dtype, size: int) -> None:
    """Blocks hold 131,072 numbers or more; of weights below two and of larger ones, in one piece and in columns."""
    for largest in (0.1, 100.0):
        source = (largest * torch.randn(size, 2, dtype=torch.float64)).clamp(-largest, largest).to(dtype)
        target, turned, other = torch.full_like(source, 7), torch.full_like(source, 7), source.float() * 0 + 7
        with FiniteCheck() as check:
            check.copy("same", target, source)
            check.copy("columns", turned, source.T.contiguous().T)
            check.copy("other", other, source)
            assert check.broken() == []
        assert torch.equal(target, source)
        assert torch.equal(turned, source)
        assert torch.equal(other, source.float())
        for at in {0, 262_143, 262_144, 524_287, 2 * size - 1} if size else ():
            for value in (torch.nan, -torch.nan, torch.inf, -torch.inf):
                broken = source.clone()
                broken.view(-1)[min(at, 2 * size - 1)] = value
                with FiniteCheck() as check:
                    for name, into in (("same", target), ("columns", turned.T.contiguous().T), ("other", other)):
                        check.copy(name, into, broken)
                    check.copy("fine", target, source)
                    assert sorted(check.broken()) == ["columns", "other", "same"]


def test_a_lora_is_finite_and_of_matrices(tmp_path: Path) -> None:
    name = "base_model.model.blocks.1.ffn.0.lora_A.default.weight"
    for value, why in ((torch.zeros(RANK), "no matrices"), (torch.zeros(()), "no matrices")):
        save_file({**lora_tensors(), name: value}, tmp_path / "lora.safetensors")
        with pytest.raises(CheckpointError, match=why):
            read_lora(tmp_path / "lora.safetensors", CONFIG)
    broken = lora_tensors()
    broken[name][0, 0] = torch.nan
    save_file(broken, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        read_lora(tmp_path / "lora.safetensors", CONFIG)
    empty = {n: t[:0] if "lora_A" in n else t[:, :0] for n, t in lora_tensors().items()}
    save_file({n: t.contiguous() for n, t in empty.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=r"ranks \[0\]"):
        read_lora(tmp_path / "lora.safetensors", CONFIG)


def test_a_codec_holds_its_two_halves_and_nothing_else(tmp_path: Path) -> None:
    config = presets.tiny().vae
    halves = (VAEEncoder(config), VAEDecoder(config))
    tensors = {name: t.clone() for half in halves for name, t in half.state_dict().items()}
    path = tmp_path / "codec.safetensors"
    for half in halves:
        save_file(tensors, path)
        load_vae(half, path)
        save_file({**tensors, "stranger": torch.zeros(1)}, path)
        with pytest.raises(CheckpointError, match="unexpected: stranger"):
            load_vae(half, path)
        save_file({**tensors, "decoder.stranger": torch.zeros(1), "encoder.stranger": torch.zeros(1)}, path)
        with pytest.raises(CheckpointError, match=r"unexpected: (en|de)coder.stranger"):
            load_vae(half, path)


def test_a_missing_folder_and_an_empty_one_say_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        load_dit(CONFIG, tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no diffusion_pytorch_model"):
        load_dit(CONFIG, tmp_path)


def test_a_broken_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(CheckpointError, match=r"cannot read .* as safetensors"):
        load_dit(CONFIG, tmp_path)


@pytest.mark.parametrize(("prefix", "middle"), [("base_model.model.", ".default"), ("", ""), ("diffusion_model.", "")])
def test_a_lora_is_merged_at_half_its_product(
    tmp_path: Path, weights: dict[str, Tensor], prefix: str, middle: str
) -> None:
    save_checkpoint(tmp_path, weights)
    tensors = lora_tensors(prefix, middle)
    lora = tmp_path / "lora.safetensors"
    save_file(tensors, lora)
    assert read_lora(lora, CONFIG, alpha=RANK / 2).scale == 0.5
    # The published scale is alpha 64 over rank 128; here the same alpha over rank 4.
    merged = load_dit(CONFIG, tmp_path, lora=lora, dtype=torch.float32).state_dict()
    adapted = {f"{module}.weight" for module in lora_modules(CONFIG)}
    for name, weight in weights.items():
        if name not in adapted:
            assert torch.equal(merged[name], weight)
            continue
        module = name.removesuffix(".weight")
        down, up = (tensors[f"{prefix}{module}.lora_{f}{middle}.weight"] for f in "AB")
        assert torch.allclose(merged[name], weight + 64 / RANK * up @ down, rtol=1e-5, atol=1e-4)


def test_a_lora_with_wrong_keys_does_not_load_silently(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    save_checkpoint(tmp_path, weights)
    tensors = lora_tensors()
    tensors["transformer.blocks.0.extra.lora_A.weight"] = tensors.pop(
        "base_model.model.blocks.0.self_attn.q.lora_A.default.weight"
    )
    tensors["alpha"] = torch.zeros(1)
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_dit(CONFIG, tmp_path, lora=tmp_path / "lora.safetensors")
    message = str(caught.value)
    assert "blocks.0.extra" in message
    assert "1 modules with only one factor" in message or "2 modules with only one factor" in message
    assert "1 tensors that are no LoRA factor: alpha" in message


def test_a_lora_of_another_model_is_refused(tmp_path: Path) -> None:
    tensors = lora_tensors()
    name = "base_model.model.blocks.1.ffn.0.lora_A.default.weight"
    tensors[name] = torch.zeros(RANK, 5)
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=r"1 misshapen modules \(blocks.1.ffn.0\)"):
        read_lora(tmp_path / "lora.safetensors", CONFIG)
