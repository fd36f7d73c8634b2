"""A prompt becomes embeddings: as many rows as it has tokens, not padded (the DiT pads with zeros).

Axes: B streams (1 here), P prompt tokens, C embedding width.
"""

from __future__ import annotations

import hashlib
import html
import math
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from streamdiff.errors import BackendError, CheckpointError, ConfigError
from streamdiff.tensorfile import is_finite, listed, map_pickled

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

MAX_TOKENS = 512
"""Rows that the published model reads; a longer prompt is cut, its end mark kept."""

UMT5_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
UMT5_TOKENIZER = "google/umt5-xxl"


class TextEncoder(Protocol):
    """Prompt to embeddings; holds weights only."""

    @property
    def text_dim(self) -> int:
        """C, width of an embedding."""
        ...

    def encode(self, prompt: str) -> Tensor:
        """Embeddings [1, P, C] of any text, 1 <= P <= `MAX_TOKENS`; an empty prompt has its end mark."""
        ...


class HashedText:
    """Deterministic embeddings without weights: words that share letters share direction.

    A word is the sum of random signs drawn from the hashes of itself and of its byte 3- and 4-grams (the
    hashing trick, Weinberger et al. 2009), to which its position adds a sinusoid (Vaswani et al. 2017).
    Values have about zero mean and unit variance. Same text, same bits.

    Args:
        text_dim: C.
        max_tokens: rows at most, the end mark included.
    """

    def __init__(self, text_dim: int, *, max_tokens: int = MAX_TOKENS) -> None:
        if text_dim < 1 or max_tokens < 1:
            raise ConfigError(f"text_dim and max_tokens must be positive, got {text_dim} and {max_tokens}")
        self.text_dim = text_dim
        self._max_tokens = max_tokens

    def encode(self, prompt: str) -> Tensor:
        words = _words(prompt)[: self._max_tokens - 1]
        rows = [self._word(word) for word in words] + [_signs(b"\0end", self.text_dim).astype(np.float64)]
        embedding_PC = (np.stack(rows) + _POSITION_SHARE * self._positions(len(rows))) / _SCALE
        return torch.from_numpy(embedding_PC.astype(np.float32))[None]

    def _word(self, word: str) -> npt.NDArray[np.float64]:
        spelled = b"<" + word.encode("utf-8", "surrogatepass") + b">"
        grams = [spelled[i : i + n] for n in (3, 4) for i in range(len(spelled) - n + 1)]
        # Each gram once: the signs of a repeated one would add up instead of averaging out.
        parts = [b"w" + spelled, *(b"g" + gram for gram in dict.fromkeys(grams))]
        total = np.stack([_signs(part, self.text_dim) for part in parts]).sum(axis=0)
        return np.asarray(total, dtype=np.float64) / math.sqrt(len(parts))

    def _positions(self, num_rows: int) -> npt.NDArray[np.float64]:
        channel = np.arange(self.text_dim)
        turns_per_row = 10_000.0 ** (-2 * (channel // 2) / self.text_dim)
        angle = np.arange(num_rows)[:, None] * turns_per_row + (channel % 2) * (math.pi / 2)
        return math.sqrt(2) * np.sin(angle)


_POSITION_SHARE = 0.5
_SCALE = math.sqrt(1 + _POSITION_SHARE**2)
_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+|[^\w\s]")


def _words(prompt: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", prompt).casefold())


def _signs(key: bytes, width: int) -> npt.NDArray[np.int64]:
    """As many signs as asked for, +1 or -1, drawn from the hash of a key."""
    blocks = (width + 511) // 512
    digest = b"".join(
        hashlib.blake2b(key, digest_size=64, salt=index.to_bytes(8, "little")).digest() for index in range(blocks)
    )
    bits = np.unpackbits(np.frombuffer(digest, dtype=np.uint8))[:width]
    return bits.astype(np.int64) * 2 - 1


class UMT5Text:
    """The umT5 encoder that Wan was trained with, run by transformers.

    The published code pads every prompt to 512 tokens, masks the padding, and cuts it off the result;
    encoding it unpadded is the same function. Text is cleaned as published: mojibake repaired (ftfy), HTML
    entities resolved, white space collapsed; case is kept.

    Args:
        model: a UMT5EncoderModel in eval mode; see `load`.
        tokenizer: a transformers tokenizer.
        max_tokens: rows at most, the end mark included.
    """

    def __init__(self, model: UMT5EncoderModel, tokenizer: Any, *, max_tokens: int = MAX_TOKENS) -> None:
        try:
            import ftfy  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise _missing("ftfy") from error
        self._repair = ftfy.fix_text
        self._model = model
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self.text_dim: int = model.config.d_model

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> UMT5Text:
        """Open the published files below a Wan checkpoint directory, without the network.

        Raises:
            CheckpointError: files missing, or tensors that are missing, unexpected or misshapen, each named.
            BackendError: transformers or ftfy is not installed.
        """
        root = Path(directory)
        weights, tokenizer_dir = root / UMT5_FILE, root / UMT5_TOKENIZER
        for path, exists in ((weights, weights.is_file()), (tokenizer_dir, tokenizer_dir.is_dir())):
            if not exists:
                raise CheckpointError(
                    f"{root} has no {path.relative_to(root)}; download the text encoder of Wan2.2-S2V-14B there"
                )
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise _missing("transformers") from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir), local_files_only=True)
        except Exception as error:
            # A stranger's bytes may fail anywhere inside the reader.
            raise CheckpointError(
                f"cannot load the tokenizer in {tokenizer_dir}: {_first_line(error)}; download it again"
            ) from error
        try:
            official = map_pickled(weights)
        except CheckpointError as error:
            raise CheckpointError(f"cannot read {weights}: {error}; download it again") from error
        model: Any = umt5_from_official(official)
        return cls(model.to(device=device, dtype=dtype).requires_grad_(False), tokenizer)

    def encode(self, prompt: str) -> Tensor:
        """Embeddings [1, P, C] in the model's dtype, on its device."""
        ids = self._tokenizer(
            self.clean(prompt), return_tensors="pt", truncation=True, max_length=self._max_tokens
        ).input_ids
        with torch.no_grad():
            return self._model(input_ids=ids.to(self._model.device)).last_hidden_state

    def clean(self, prompt: str) -> str:
        """The text that is tokenised (Wan2.2 ``tokenizers.py``, clean='whitespace')."""
        repaired = html.unescape(html.unescape(self._repair(prompt))).strip()
        return re.sub(r"\s+", " ", repaired).strip()


def umt5_names(num_layers: int) -> dict[str, str]:
    """Official name of every tensor of Wan's umT5 encoder, and what transformers calls it; one to one."""
    names = {
        "token_embedding.weight": "shared.weight",
        "norm.weight": "encoder.final_layer_norm.weight",
    }
    for n in range(num_layers):
        ours, theirs = f"blocks.{n}", f"encoder.block.{n}.layer"
        names[f"{ours}.norm1.weight"] = f"{theirs}.0.layer_norm.weight"
        names[f"{ours}.norm2.weight"] = f"{theirs}.1.layer_norm.weight"
        for part in "qkvo":
            names[f"{ours}.attn.{part}.weight"] = f"{theirs}.0.SelfAttention.{part}.weight"
        names[f"{ours}.pos_embedding.embedding.weight"] = f"{theirs}.0.SelfAttention.relative_attention_bias.weight"
        names[f"{ours}.ffn.gate.0.weight"] = f"{theirs}.1.DenseReluDense.wi_0.weight"
        names[f"{ours}.ffn.fc1.weight"] = f"{theirs}.1.DenseReluDense.wi_1.weight"
        names[f"{ours}.ffn.fc2.weight"] = f"{theirs}.1.DenseReluDense.wo.weight"
    return names


def umt5_from_official(official: Mapping[str, Tensor]) -> UMT5EncoderModel:
    """A transformers model that holds the official tensors themselves; its shape is read off them.

    Raises:
        CheckpointError: naming every tensor that is missing, unexpected or misshapen.
        BackendError: transformers is not installed.
    """
    try:
        from transformers import UMT5Config, UMT5EncoderModel
    except ImportError as error:
        raise _missing("transformers") from error
    try:
        shape = _official_shape(official)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"not an umT5 encoder: {error}; give {UMT5_FILE}") from error
    names = umt5_names(shape["num_layers"])
    settings: dict[str, Any] = {**shape, "feed_forward_proj": "gated-gelu"}
    config = UMT5Config(**settings)
    with torch.device("meta"):
        model = UMT5EncoderModel(config).eval()
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name != "encoder.embed_tokens.weight"
    }
    missing = sorted(set(names) - set(official))
    unexpected = sorted(set(official) - set(names))
    misshapen = [
        f"{name} {list(official[name].shape)}, not {list(expected[theirs])}"
        for name, theirs in names.items()
        if name in official and tuple(official[name].shape) != expected[theirs]
    ]
    if missing or unexpected or misshapen:
        raise CheckpointError(
            f"not an umT5 encoder of {shape['num_layers']} layers: missing {missing}, "
            f"unexpected {unexpected}, misshapen {misshapen}"
        )
    # These tensors are mapped from the file, and this is the first touch that reads them: no second pass over a disk.
    broken = [name for name, tensor in official.items() if not (tensor.is_floating_point() and is_finite(tensor))]
    if broken:
        raise CheckpointError(f"the umT5 encoder holds NaN, infinity or integers ({listed(broken)}); download it again")
    state = {theirs: official[name] for name, theirs in names.items()}
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    # One parameter, not two that share storage: a later cast or move would double a 2 GB table.
    model.encoder.embed_tokens.weight = model.shared.weight
    return model


def _official_shape(official: Mapping[str, Tensor]) -> dict[str, int]:
    needed = ("token_embedding", "blocks.0.attn.q", "blocks.0.ffn.fc1", "blocks.0.pos_embedding.embedding")
    absent = [name for name in needed if f"{name}.weight" not in official]
    if absent:
        raise CheckpointError(f"not an umT5 encoder: it has no {', '.join(absent)}; give {UMT5_FILE}")
    embedding, query, hidden, position = (official[f"{name}.weight"] for name in needed)
    if {value.ndim for value in (embedding, query, hidden, position)} != {2}:
        raise ValueError("its weights are no matrices")
    num_heads = position.shape[1]
    num_layers = 1 + max(int(name.split(".")[1]) for name in official if name.startswith("blocks."))
    if num_layers > len(official):
        raise ValueError(f"it has {len(official)} tensors for {num_layers} layers")
    return {
        "vocab_size": embedding.shape[0],
        "d_model": embedding.shape[1],
        "d_kv": query.shape[0] // num_heads,
        "d_ff": hidden.shape[0],
        "num_heads": num_heads,
        "num_layers": num_layers,
        "relative_attention_num_buckets": position.shape[0],
    }


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _missing(package: str) -> BackendError:
    return BackendError(f"umT5 needs {package}, which is not installed; pip install 'streamdiff[encoders]'")
