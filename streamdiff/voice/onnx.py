"""Networks in ONNX files, run by onnxruntime on few threads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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


def onnx_session(model: bytes, num_threads: int) -> Any:
    onnxruntime = required_package("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Spinning threads steal the core that the renderer needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
