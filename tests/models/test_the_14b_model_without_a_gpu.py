"""The published 14B model, counted on the meta device: names, shapes, bytes and operations."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from streamdiff import presets
from streamdiff.config import EngineConfig
from streamdiff.memory import LayerMemory
from streamdiff.models import cost
from streamdiff.models.dit import CausalDiT
from streamdiff.rope import Rotation


@pytest.fixture(scope="module")
def dit() -> CausalDiT:
    with torch.device("meta"):
        return CausalDiT(presets.live_avatar_14b().dit)


def attention_names(prefix: str) -> set[str]:
    linears = {f"{prefix}.{p}.{kind}" for p in "qkvo" for kind in ("weight", "bias")}
    return linears | {f"{prefix}.norm_q.weight", f"{prefix}.norm_k.weight"}


def pair(prefix: str) -> set[str]:
    return {f"{prefix}.weight", f"{prefix}.bias"}


def trunk_names(num_layers: int) -> set[str]:
    """The names of plain Wan, spelled out independently of the module."""
    names = pair("patch_embedding") | pair("head.head") | {"head.modulation"} | pair("time_projection.1")
    for part in ("text_embedding", "time_embedding"):
        names |= pair(f"{part}.0") | pair(f"{part}.2")
    for n in range(num_layers):
        block = f"blocks.{n}"
        names |= {f"{block}.modulation"} | pair(f"{block}.norm3") | pair(f"{block}.ffn.0") | pair(f"{block}.ffn.2")
        names |= attention_names(f"{block}.self_attn") | attention_names(f"{block}.cross_attn")
    return names


def speech_names(num_injectors: int) -> set[str]:
    names = pair("cond_encoder") | {"trainable_cond_mask.weight", "casual_audio_encoder.weights"}
    encoder = "casual_audio_encoder.encoder"
    names |= {f"{encoder}.padding_tokens"} | pair(f"{encoder}.final_linear")
    for conv in ("conv1_local", "conv1_global", "conv2", "conv3"):
        names |= pair(f"{encoder}.{conv}.conv")
    for proj in ("proj", "proj_2x", "proj_4x"):
        names |= pair(f"frame_packer.{proj}")
    for j in range(num_injectors):
        names |= attention_names(f"audio_injector.injector.{j}")
        names |= pair(f"audio_injector.injector_adain_layers.{j}.linear")
    return names


def test_it_has_the_published_tensors(dit: CausalDiT) -> None:
    names = set(dit.state_dict())
    assert names == trunk_names(40) | speech_names(12)
    assert len(names) == 1260
    assert len(trunk_names(40)) == 1095


def test_its_shapes_are_the_published_ones(dit: CausalDiT) -> None:
    shapes = {name: tuple(t.shape) for name, t in dit.state_dict().items()}
    assert shapes["patch_embedding.weight"] == (5120, 16, 1, 2, 2)
    assert shapes["blocks.39.ffn.0.weight"] == (13824, 5120)
    assert shapes["blocks.0.modulation"] == (1, 6, 5120)
    assert shapes["time_projection.1.weight"] == (30720, 5120)
    assert shapes["head.head.weight"] == (64, 5120)
    assert shapes["casual_audio_encoder.weights"] == (1, 25, 1, 1)
    assert shapes["casual_audio_encoder.encoder.conv1_local.conv.weight"] == (5120, 1024, 3)
    assert shapes["casual_audio_encoder.encoder.conv1_global.conv.weight"] == (1280, 1024, 3)
    assert shapes["audio_injector.injector_adain_layers.11.linear.weight"] == (10240, 5120)
    assert shapes["frame_packer.proj_4x.weight"] == (5120, 16, 4, 8, 8)
    assert shapes["trainable_cond_mask.weight"] == (3, 5120)


def test_it_has_16_3_billion_parameters(dit: CausalDiT) -> None:
    counted = sum(p.numel() for p in dit.parameters())
    assert counted == cost.dit_parameters(presets.live_avatar_14b().dit)
    assert round(counted / 1e9, 3) == 16.296


def test_plain_wan_is_the_same_trunk() -> None:
    with torch.device("meta"):
        trunk = CausalDiT(presets.wan_t2v_14b_dit())
    assert set(trunk.state_dict()) == trunk_names(40)
    assert sum(p.numel() for p in trunk.parameters()) == cost.dit_parameters(presets.wan_t2v_14b_dit())


def forward_flops(config: EngineConfig, dit: CausalDiT) -> int:
    """Operations that torch itself counts in one chunk-step with a full window."""
    latent_h, latent_w = config.latent_hw
    L, M = config.chunk_tokens, cost.sink_tokens(config) + config.memory.window_chunks * config.chunk_tokens
    heads = (config.dit.num_heads, config.dit.head_dim)
    audio = config.dit.audio
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        text = dit.text_condition(torch.zeros(1, 7, config.dit.text_dim))
        modulation = dit.modulation(0.5)
        before = counter.get_total_flops()
        heard = None
        if audio is not None:
            shape = (1, audio.num_features, audio.feature_dim, config.video_frames_per_chunk)
            heard = dit.audio_condition(torch.zeros(shape))
        buffer = torch.zeros(1, M, *heads)
        layer = LayerMemory(buffer[:, :L], buffer[:, :L], buffer, buffer)
        turn = Rotation(torch.zeros(L, heads[1] // 2), torch.zeros(L, heads[1] // 2))
        latent = torch.zeros(1, 16, config.frames_per_chunk, latent_h, latent_w)
        dit(latent, modulation, text, turn, audio=heard, memory=[layer] * config.dit.num_layers)
        return counter.get_total_flops() - before


@pytest.mark.heavy
def test_its_operations_are_the_closed_form(dit: CausalDiT) -> None:
    config = presets.live_avatar_14b()
    counted = forward_flops(config, dit)
    predicted = cost.step_flops(config)
    assert counted == pytest.approx(predicted.total, rel=0.01)
    assert predicted.linear / 1e12 == pytest.approx(75.7, rel=0.01)
    assert predicted.self_attention / 1e12 == pytest.approx(39.7, rel=0.01)
    assert predicted.audio / 1e12 == pytest.approx(4.0, rel=0.02)


@pytest.mark.heavy
@pytest.mark.parametrize(("height", "width"), [(512, 512), (256, 384)])
def test_other_sizes_follow_the_same_form(dit: CausalDiT, height: int, width: int) -> None:
    config = dataclasses.replace(presets.live_avatar_14b(), height=height, width=width)
    assert forward_flops(config, dit) == pytest.approx(cost.step_flops(config).total, rel=0.01)


def test_a_rank_needs_the_published_memory() -> None:
    config = presets.live_avatar_14b()
    need = cost.rank_bytes(config, num_steps=1, bytes_per_value=2)
    gib = 1024**3
    # The encoder of sound, 95.1 million parameters, is served in float32: half a per cent more.
    assert need.weights == pytest.approx(2 * (cost.dit_parameters(config.dit) + 95.1e6), rel=1e-3)
    # 12,672 tokens of ring and 2,640 of sink in 40 layers: 9.67 and 2.01 GiB.
    assert need.history / gib == pytest.approx(9.67 + 2.01, rel=0.01)
    assert need.pristine_sink / gib == pytest.approx(2.01, rel=0.01)
