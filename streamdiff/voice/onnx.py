"""Networks in ONNX files, run by onnxruntime on few threads."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from streamdiff.errors import CheckpointError
from streamdiff.tensorfile import read_bytes
from streamdiff.voice.packages import required_package


def onnx_with_outputs(model: bytes, names: Iterable[str]) -> bytes:
    """The same ONNX model with further values of its graph as outputs.

    Protocol buffers merge a message field that occurs twice, so a few bytes at the end do it: field 7 of
    the model is the graph, field 12 of the graph an output, field 1 of the output its name.
    """
    for name in names:
        output = _field(12, _field(1, name.encode()))
        model = model + _field(7, output)
    return model


def _field(number: int, payload: bytes) -> bytes:
    size, length = bytearray(), len(payload)
    while length > 127:
        size.append(length & 127 | 128)
        length >>= 7
    size.append(length)
    return bytes([number << 3 | 2]) + bytes(size) + payload


_MAX_MODEL_BYTES = 1 << 30
_EXTERNAL = bytes([1 << 3 | 2, len(b"location")]) + b"location" + bytes([2 << 3 | 2])
"""How a tensor of a model says that its numbers lie in another file (field 1 of an entry is its key, 2 its value)."""


def read_model(path: str | Path) -> bytes:
    """An ONNX file from a stranger: bounded, and whole in itself; `CheckpointError` says why not."""
    try:
        model = read_bytes(Path(path), _MAX_MODEL_BYTES)
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be read as an ONNX model: {error}; check the path") from error
    if _EXTERNAL in model:
        raise CheckpointError(f"{path} takes weights from other files, which is refused; export it as one file")
    return model


def run_within(session: Any, feed: dict[str, Any], limit_s: float) -> list[Any]:
    """All outputs of a network; one that runs longer than ``limit_s`` is stopped and raises onnxruntime's error."""
    options = required_package("onnxruntime").RunOptions()
    timer = threading.Timer(limit_s, setattr, (options, "terminate", True))
    timer.daemon = True
    timer.start()
    try:
        return session.run(None, feed, options)
    finally:
        timer.cancel()


def onnx_session(model: bytes, num_threads: int) -> Any:
    onnxruntime = required_package("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Spinning threads steal the core that the renderer needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
