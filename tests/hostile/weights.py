"""Hostile weights: other names, shapes, kinds and numbers, headers that lie, and mutated ones."""

from __future__ import annotations

import json
import pickle
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from streamdiff import presets
from streamdiff.checkpoint import lora_modules
from streamdiff.models import vae
from streamdiff.models.dit import CausalDiT, initialise
from streamdiff.models.tae import TAEConfig, TAEDecoder
from streamdiff.models.vae import VAEDecoder, VAEEncoder
from tests.hostile.case import NOT_FILES, Case, Content, Wants
from tests.hostile.pictures import mutated

DIT, CODEC = "weights/diffusion_pytorch_model.safetensors", "weights/codec.safetensors"
COMMAND = ("generate", "--preset", "tiny", "--steps", "1", "--seconds", "0.1", "--out", "out.mp4")
State = dict[str, Tensor]


def cases() -> Iterator[Case]:
    """Every file of weights, in the place of each that a command reads."""
    for place in PLACES:
        state = states()[place]
        for name, (content, wants) in {**_tensors(state), **_headers(state)}.items():
            yield _case(place, name, content, wants)
        for name, make in NOT_FILES.items():
            yield _case(place, name, make, Wants.REFUSED)
        for seed in range(8):
            head = save(state)
            yield _case(place, f"mutation {seed}", _mutated_head(head, f"{place} {seed}"), Wants.EITHER)
    for name, content in _pickles().items():
        wants = Wants.EITHER if "mutation" in name else Wants.REFUSED
        yield _case("light decoder", f"{name}, as .pth", content, wants, ".pth")


def _case(place: str, name: str, content: Content, wants: Wants, suffix: str = ".safetensors") -> Case:
    file, argv = PLACES[place](suffix)
    others: dict[str, Content] = {DIT: save(states()["DiT"]), CODEC: save(states()["codec"])}
    return Case(f"weights: {place}, {name}", argv, {**others, file: content}, wants)


def _generate(file: str, *argv: str) -> Callable[[str], tuple[str, tuple[str, ...]]]:
    def place(suffix: str) -> tuple[str, tuple[str, ...]]:
        path = str(Path(file).with_suffix(suffix))
        return path, (*COMMAND, "--checkpoint", "weights", *(path if word == file else word for word in argv))

    return place


PLACES: Mapping[str, Callable[[str], tuple[str, tuple[str, ...]]]] = {
    "DiT": _generate(DIT),
    "codec": _generate(CODEC),
    "LoRA": _generate("lora.safetensors", "--lora", "lora.safetensors"),
    "light decoder": _generate("light.safetensors", "--light-decoder", "light.safetensors"),
}


@cache
def states() -> Mapping[str, State]:
    config = presets.tiny()
    dit = CausalDiT(config.dit)
    initialise(dit, seed=1)
    halves = [VAEEncoder(config.vae), VAEDecoder(config.vae)]
    for half in halves:
        vae.initialise(half, seed=1)
    shapes = {name: t.shape for name, t in dit.state_dict().items()}
    lora: State = {}
    for module in lora_modules(config.dit):
        outputs, inputs = shapes[f"{module}.weight"]
        lora[f"{module}.lora_A.weight"], lora[f"{module}.lora_B.weight"] = (
            torch.zeros(2, inputs),
            torch.zeros(outputs, 2),
        )
    light = TAEDecoder(TAEConfig(z_dim=config.vae.z_dim))
    return {
        "DiT": _half(dit.state_dict()),
        "codec": _half({name: t for half in halves for name, t in half.state_dict().items()}),
        "LoRA": _half(lora),
        "light decoder": _half(light.state_dict()),
    }


def _half(state: Mapping[str, Tensor]) -> State:
    return {name: t.half().contiguous() for name, t in state.items()}


def _tensors(state: State) -> Mapping[str, tuple[Content, Wants]]:
    """One thing that is wrong with one tensor, and a few that are not."""
    name = next(n for n, t in sorted(state.items()) if t.ndim > 1)
    whole = state[name]
    found: dict[str, Tensor | None] = {
        "one is missing": None,
        "one is flat": whole.flatten(),
        "one has another shape": whole.new_zeros((3, *whole.shape)),
        "one is a number": torch.tensor(1.0),
        "one is empty": whole.new_zeros((0, *whole.shape[1:])),
    }
    for kind in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64,
                 torch.float8_e4m3fn):  # fmt: skip
        found[f"one is {kind}"] = torch.ones(whole.shape).to(kind)
    cases: dict[str, tuple[Content, Wants]] = {"whole": (save(state), Wants.MADE)}
    for why, tensor in found.items():
        changed = {n: t for n, t in state.items() if n != name} | ({} if tensor is None else {name: tensor})
        cases[why] = (save(changed), Wants.REFUSED)
    for value in (float("nan"), float("inf"), float("-inf")):
        broken = whole.clone()
        broken.view(-1)[-1] = value
        cases[f"one holds one {value}"] = (save({**state, name: broken}), Wants.REFUSED)
        cases[f"all hold {value}"] = (save({n: torch.full_like(t, value) for n, t in state.items()}), Wants.REFUSED)
    cases["in float64"] = (save({n: t.double() for n, t in state.items()}), Wants.MADE)
    cases["one too many"] = (save({**state, "stranger": torch.zeros(1)}), Wants.REFUSED)
    cases["a thousand too many"] = (save({**state, **{f"s{n}": torch.zeros(1) for n in range(1000)}}), Wants.REFUSED)
    cases["a name that a terminal obeys"] = (save({**state, "\x1b[2J\nred": torch.zeros(1)}), Wants.REFUSED)
    cases["none"] = (save({}), Wants.REFUSED)
    return cases


def _headers(state: State) -> Mapping[str, tuple[Content, Wants]]:
    """A header that lies about what follows."""
    data = save(state)
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    name = next(n for n in header if n != "__metadata__")

    def with_(**facts: Any) -> bytes:
        return _written({**header, name: {**header[name], **facts}}, body)

    found: dict[str, bytes] = {
        "cut in the header": data[: size // 2],
        "cut in the weights": data[: len(data) // 2],
        "cut by a byte": data[:-1],
        "a byte too many": data + b"\0",
        "a header of 2**63 bytes": struct.pack("<Q", 2**63) + data[8:],
        "a header of no bytes": struct.pack("<Q", 0) + data[8:],
        "a header that is a list": _written([], body),  # type: ignore[arg-type]
        "a header of deep lists": struct.pack("<Q", 200_000) + b"[" * 200_000 + body,
        "offsets past the end": with_(data_offsets=[0, len(body) + 4]),
        "offsets that are negative": with_(data_offsets=[-4, 4]),
        "offsets that fall": with_(data_offsets=[8, 0]),
        "offsets of 2**63": with_(data_offsets=[2**63, 2**63 + 4]),
        "offsets of words": with_(data_offsets=["0", "4"]),
        "a shape that overflows": with_(shape=[2**32, 2**32]),
        "a shape that is negative": with_(shape=[-1]),
        "a shape of 1,000 axes": with_(shape=[1] * 1000),
        "a kind that nobody knows": with_(dtype="F128"),
        "a kind that is a number": with_(dtype=7),
        "metadata of numbers": _written({**header, "__metadata__": {"a": 1}}, body),
        "pickle": pickle.dumps({"weights": [1.0]}),
    }
    return {name: (content, Wants.REFUSED) for name, content in found.items()}


def _written(header: Mapping[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _mutated_head(data: bytes, seed: str) -> bytes:
    size = 8 + struct.unpack("<Q", data[:8])[0]
    return mutated(data[:size], seed) + data[size:]


def _pickles() -> Mapping[str, Content]:
    import io

    state = states()["light decoder"]
    draw = random.Random(3)

    def pth(value: object, zipped: bool = True) -> bytes:
        out = io.BytesIO()
        torch.save(value, out, _use_new_zipfile_serialization=zipped)
        return out.getvalue()

    whole = pth(state)
    name = sorted(state)[0]
    found: dict[str, bytes] = {
        "a list": pth([1, 2]),
        "a number": pth(1),
        "names that are numbers": pth(dict(enumerate(state.values()))),
        "nested": pth({"state_dict": state}),
        "a sparse tensor": pth({**state, name: torch.eye(3).to_sparse()}),
        "a word among them": pth({**state, name: "word"}),
        "the old format": pth(state, False),
        "an empty dictionary": pth({}),
        "NaN": pth({**state, name: torch.full_like(state[name], torch.nan)}),
        "integers": pth({n: t.int() for n, t in state.items()}),
        "half of it": whole[: len(whole) // 2],
        "a protocol of pickle alone": pickle.dumps({"a": 1}),
    }
    for number in range(10):
        found[f"mutation {number}"] = _flipped(whole, draw)
    return found


def _flipped(data: bytes, draw: random.Random) -> bytes:
    """The pickle at the front and the table at the end are where mutations count."""
    found = bytearray(data)
    for _ in range(6):
        at = draw.randrange(400) if draw.random() < 0.5 else len(found) - 1 - draw.randrange(400)
        found[at] ^= 1 << draw.randrange(8)
    return bytes(found)
