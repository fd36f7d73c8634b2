"""Wan's umT5 weights under Wan's names become a transformers model that computes what Wan's code computes."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from streamdiff.errors import BackendError, CheckpointError
from streamdiff.models.text import (
    MAX_TOKENS,
    UMT5_FILE,
    UMT5_TOKENIZER,
    UMT5Text,
    umt5_from_official,
    umt5_names,
)

transformers = pytest.importorskip("transformers")
pytest.importorskip("ftfy")

WORDS = ["<pad>", "</s>", "<unk>", "a", "woman", "speaks", "softly", "and", "smiles", ".", "don't"]


def official_weights(
    *, layers: int = 3, dim: int = 24, heads: int = 4, d_kv: int = 8, ffn: int = 40, buckets: int = 32
) -> dict[str, Tensor]:
    """Random tensors under Wan's names (Wan2.2 ``t5.py``), inner width different from the outer one."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 0.3) -> Tensor:
        return scale * torch.randn(*shape, generator=generator)

    weights = {"token_embedding.weight": random(len(WORDS), dim, scale=1.0), "norm.weight": 1 + random(dim)}
    for n in range(layers):
        weights |= {
            f"blocks.{n}.norm1.weight": 1 + random(dim),
            f"blocks.{n}.norm2.weight": 1 + random(dim),
            f"blocks.{n}.attn.q.weight": random(heads * d_kv, dim),
            f"blocks.{n}.attn.k.weight": random(heads * d_kv, dim),
            f"blocks.{n}.attn.v.weight": random(heads * d_kv, dim),
            f"blocks.{n}.attn.o.weight": random(dim, heads * d_kv),
            f"blocks.{n}.pos_embedding.embedding.weight": random(buckets, heads, scale=1.0),
            f"blocks.{n}.ffn.gate.0.weight": random(ffn, dim),
            f"blocks.{n}.ffn.fc1.weight": random(ffn, dim),
            f"blocks.{n}.ffn.fc2.weight": random(dim, ffn),
        }
    return weights


def published_encoder(weights: dict[str, Tensor], ids_P: Tensor, mask_P: Tensor) -> Tensor:
    """The encoder as Wan writes it: padded, masked, a position table of its own in every layer."""
    heads = weights["blocks.0.pos_embedding.embedding.weight"].shape[1]
    P = len(ids_P)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    def bucket(offset: int, num_buckets: int = 32, max_distance: int = 128) -> int:
        half = num_buckets // 2
        base, distance = (half if offset > 0 else 0), abs(offset)
        exact = half // 2
        if distance < exact:
            return base + distance
        far = exact + int(math.log(distance / exact) / math.log(max_distance / exact) * (half - exact))
        return base + min(far, half - 1)

    buckets_PP = torch.tensor([[bucket(k - q) for k in range(P)] for q in range(P)])
    x = weights["token_embedding.weight"][ids_P]
    for n in range(1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))):
        w: Callable[[str], Tensor] = lambda name, n=n: weights[f"blocks.{n}.{name}.weight"]  # noqa: E731
        h = norm(x, w("norm1"))
        q, k, v = (F.linear(h, w(f"attn.{part}")).unflatten(-1, (heads, -1)) for part in "qkv")
        scores = torch.einsum("qnc,knc->nqk", q, k) + w("pos_embedding.embedding")[buckets_PP].permute(2, 0, 1)
        scores = scores.masked_fill(mask_P == 0, torch.finfo(scores.dtype).min).softmax(-1)
        x = x + F.linear(torch.einsum("nqk,knc->qnc", scores, v).flatten(1), w("attn.o"))
        h = norm(x, w("norm2"))
        gated = F.linear(h, w("ffn.fc1")) * F.gelu(F.linear(h, w("ffn.gate.0")), approximate="tanh")
        x = x + F.linear(gated, w("ffn.fc2"))
    return norm(x, weights["norm.weight"])


def word_tokenizer() -> Any:
    """One token per word, an end mark behind them: the behaviour of the real tokenizer that matters here."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def test_every_name_has_one_counterpart_of_the_same_shape() -> None:
    weights = official_weights()
    names = umt5_names(3)
    model = umt5_from_official(weights)
    theirs = {name: tensor for name, tensor in model.state_dict().items() if "embed_tokens" not in name}
    assert set(names) == set(weights)
    assert len(set(names.values())) == len(names)
    assert set(names.values()) == set(theirs)
    for ours, other in names.items():
        assert theirs[other].data_ptr() == weights[ours].data_ptr(), "assigned, not copied"
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_the_published_size_is_read_off_the_tensors() -> None:
    with torch.device("meta"):
        weights = {name: torch.empty(tensor.shape, dtype=torch.bfloat16) for name, tensor in _xxl_shapes().items()}
    model = umt5_from_official(weights)
    assert len(umt5_names(24)) == 242
    assert sum(p.numel() for p in model.parameters()) == 5_680_910_336
    assert (model.config.num_layers, model.config.d_model, model.config.num_heads) == (24, 4096, 64)


def _xxl_shapes() -> dict[str, Tensor]:
    with torch.device("meta"):
        one = {name: torch.empty(0) for name in umt5_names(24)}
        for name in one:
            if name == "token_embedding.weight":
                one[name] = torch.empty(256_384, 4096)
            elif "norm" in name:
                one[name] = torch.empty(4096)
            elif "pos_embedding" in name:
                one[name] = torch.empty(32, 64)
            elif ".attn." in name:
                one[name] = torch.empty(4096, 4096)
            else:
                one[name] = torch.empty(4096, 10_240) if "fc2" in name else torch.empty(10_240, 4096)
    return one


@pytest.mark.heavy
@pytest.mark.parametrize("num_tokens", [1, 2, 9, 200])
def test_the_numbers_are_those_of_the_published_code(num_tokens: int) -> None:
    weights = official_weights()
    model = umt5_from_official(weights)
    ids_P = torch.arange(num_tokens) % len(WORDS)
    padded_P = F.pad(ids_P, (0, 37))
    mask_P = (torch.arange(len(padded_P)) < num_tokens).long()
    expected_PC = published_encoder(weights, padded_P, mask_P)[:num_tokens]
    with torch.no_grad():
        got_PC = model(input_ids=ids_P[None]).last_hidden_state[0]
    assert float((got_PC - expected_PC).abs().max()) <= 2e-5 * float(expected_PC.abs().max())


def test_prompts_are_trimmed_to_their_tokens() -> None:
    encoder = UMT5Text(umt5_from_official(official_weights()).eval(), word_tokenizer())
    assert encoder.text_dim == 24
    assert encoder.encode("a woman speaks").shape == (1, 4, 24)
    assert encoder.encode("").shape == (1, 1, 24)
    long = encoder.encode("woman " * 2000)
    assert long.shape == (1, MAX_TOKENS, 24)
    assert not encoder.encode("a").requires_grad


def test_text_is_cleaned_as_published() -> None:
    encoder = UMT5Text(umt5_from_official(official_weights()).eval(), word_tokenizer())
    assert encoder.clean("  A \n\t Woman\u3000speaks  ") == "A Woman speaks"
    assert encoder.clean("don\u00e2\u20ac\u2122t") == "don't"
    assert encoder.clean("&amp;lt;b&amp;gt;") == "<b>"
    assert torch.equal(encoder.encode(" a  woman\n"), encoder.encode("a woman"))


def test_a_published_directory_loads(tmp_path: Path) -> None:
    weights = official_weights()
    torch.save(weights, tmp_path / UMT5_FILE)
    word_tokenizer().save_pretrained(tmp_path / UMT5_TOKENIZER)
    loaded = UMT5Text.load(tmp_path, dtype=torch.float32)
    direct = UMT5Text(umt5_from_official(weights).eval(), word_tokenizer())
    assert torch.equal(loaded.encode("a woman smiles ."), direct.encode("a woman smiles ."))
    assert UMT5Text.load(tmp_path).encode("a").dtype == torch.bfloat16


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    weights = official_weights()
    del weights["blocks.1.ffn.fc1.weight"]
    weights["blocks.2.attn.k.weight"] = torch.zeros(3, 3)
    weights["decoder.stray"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        umt5_from_official(weights)
    for name in ("blocks.1.ffn.fc1.weight", "blocks.2.attn.k.weight [3, 3]", "decoder.stray"):
        assert name in str(caught.value)
    with pytest.raises(CheckpointError, match="it has no token_embedding"):
        umt5_from_official({"something": torch.zeros(1)})


def test_missing_files_and_packages_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=f"has no {UMT5_FILE}"):
        UMT5Text.load(tmp_path)
    (tmp_path / UMT5_FILE).write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match=f"has no {UMT5_TOKENIZER}"):
        UMT5Text.load(tmp_path)
    word_tokenizer().save_pretrained(tmp_path / UMT5_TOKENIZER)
    with pytest.raises(CheckpointError, match="cannot read") as caught:
        UMT5Text.load(tmp_path)
    assert "\n" not in str(caught.value)
    for package in ("transformers", "ftfy"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(BackendError, match=rf"{package}.*pip install 'streamdiff\[encoders\]'"):
                UMT5Text.load(tmp_path) if package == "transformers" else UMT5Text(None, None)  # type: ignore[arg-type]
