"""A bundle in pieces, to change one of them and write the rest as it was, with the hash that its content then has."""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from streamdiff.avatar.bundle import FORMAT
from streamdiff.avatar.kinematics import arkit64
from streamdiff.avatar.mouth import LowerFaceDecoder
from tests.avatar.drawn_face import drawn_bundle
from tests.hostile.formats import FORMATS, Part

KINDS = {"U8": "u1", "I8": "i1", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "BOOL": "?"}
_TORCH_KINDS = {"U8": "uint8", "I8": "int8", "I32": "int32", "I64": "int64", "BOOL": "bool"}
_TORCH_KINDS |= {"F16": "float16", "F32": "float32", "F64": "float64", "BF16": "bfloat16", "I16": "int16"}
Tensors = Mapping[str, tuple[str, list[int], bytes]]
"""Kind, shape and bytes by name."""


def sha256_of(facts: str, tensors: Tensors) -> str:
    """What `IdentityBundle.sha256` says of the same content, computed apart from it."""
    digest = hashlib.sha256(facts.encode("utf-8", "surrogatepass"))
    for name, (kind, shape, data) in sorted(tensors.items()):
        digest.update(f"{name} {tuple(shape)} torch.{_TORCH_KINDS.get(kind, kind)}\n".encode("utf-8", "surrogatepass"))
        digest.update(data)
    return digest.hexdigest()


class Parts:
    """A bundle's file in pieces that can be changed one by one."""

    def __init__(self) -> None:
        whole = base()
        self.tensors = {name: (kind, list(shape), data) for name, (kind, shape, data) in whole.tensors.items()}
        self.facts: Any = json.loads(whole.facts)
        self.metadata: Any = {"format": FORMAT, "version": "1"}
        self.header: dict[str, Any] = {}
        """Replaces entries of the header as it is written."""
        self.signed = True

    def place(self, *path: str | int) -> tuple[Any, str | int]:
        """The container of a fact and its key."""
        where = self.facts
        for key in path[:-1]:
            where = where[key]
        return where, path[-1]

    def array(self, name: str) -> np.ndarray:
        kind, shape, data = self.tensors[name]
        return np.frombuffer(data, KINDS[kind]).reshape(shape).copy()

    def put(self, name: str, array: np.ndarray, kind: str | None = None) -> None:
        kind = kind or next(k for k, v in KINDS.items() if np.dtype(v) == array.dtype)
        self.tensors[name] = (kind, list(array.shape), array.tobytes())

    def written(self) -> bytes:
        facts = self.facts if isinstance(self.facts, str) else json.dumps(self.facts, sort_keys=True)
        header: dict[str, Any] = {}
        at = 0
        for name, (kind, shape, data) in self.tensors.items():
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + len(data)]}
            at += len(data)
        if isinstance(self.metadata, dict):
            signature = {"sha256": sha256_of(facts, self.tensors)} if self.signed else {}
            header["__metadata__"] = {"facts": facts, **signature, **self.metadata}
        else:
            header["__metadata__"] = self.metadata
        header |= self.header
        text = json.dumps({k: v for k, v in header.items() if v is not ...}).encode()
        return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in self.tensors.values())


class Base:
    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            decoder = {name: value.half() for name, value in LowerFaceDecoder().state_dict().items()}
        bundle = drawn_bundle()
        idle_AE = torch.from_numpy(np.tile(arkit64().rest_E, (3, 1)))
        tensors = {**bundle.tensors(), **{f"decoder.{n}": v for n, v in decoder.items()}, "idle_AE": idle_AE}
        kinds = {torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32"}
        self.tensors = {
            name: (kinds[value.dtype], tuple(value.shape), value.contiguous().numpy().tobytes())
            for name, value in tensors.items()
        }
        facts = json.loads(bundle._facts())
        facts["style"] = {"smile": 1.0, "nod": -0.5}
        self.facts = json.dumps(facts)


@functools.cache
def base() -> Base:
    return Base()


def rehashed(data: bytes) -> bytes:
    """A bundle with the hash of what it holds now; as it is, where it is too broken for that."""
    try:
        parts = FORMATS["tensors"].split(data)
        metadata = json.loads(parts[0].body)
        abouts = [(json.loads(part.name), part.body) for part in parts[1:]]
        tensors = {about["name"]: (about["dtype"], about["shape"], body) for about, body in abouts}
        metadata["sha256"] = sha256_of(metadata["facts"], tensors)
        return FORMATS["tensors"].join([Part(b"", json.dumps(metadata).encode()), *parts[1:]])
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, IndexError):
        return data
