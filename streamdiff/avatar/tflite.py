"""Run a TFLite graph with torch.

The graphs of the face landmarker need some twenty operations; no second framework has to be installed. Layout is
TFLite's own: batch, height, width, channels.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from streamdiff.errors import CheckpointError


class _Table:
    """A table of a flatbuffer: fields by number (https://flatbuffers.dev/internals)."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at
        self.vtable = at - struct.unpack_from("<i", data, at)[0]
        self.vtable_bytes = struct.unpack_from("<H", data, self.vtable)[0]

    @staticmethod
    def root(data: bytes) -> _Table:
        return _Table(data, struct.unpack_from("<I", data, 0)[0])

    def _field(self, number: int) -> int:
        slot = 4 + 2 * number
        if slot >= self.vtable_bytes:
            return 0
        offset = struct.unpack_from("<H", self.data, self.vtable + slot)[0]
        return self.at + offset if offset else 0

    def scalar(self, number: int, kind: str = "i", default: int = 0) -> int:
        at = self._field(number)
        return struct.unpack_from(f"<{kind}", self.data, at)[0] if at else default

    def _follow(self, at: int) -> int:
        return at + struct.unpack_from("<I", self.data, at)[0]

    def table(self, number: int) -> _Table | None:
        at = self._field(number)
        return _Table(self.data, self._follow(at)) if at else None

    def tables(self, number: int) -> list[_Table]:
        at = self._field(number)
        if not at:
            return []
        start = self._follow(at)
        count = struct.unpack_from("<I", self.data, start)[0]
        return [_Table(self.data, self._follow(start + 4 + 4 * i)) for i in range(count)]

    def array(self, number: int, dtype: str) -> NDArray[Any]:
        at = self._field(number)
        if not at:
            return np.zeros(0, dtype)
        start = self._follow(at)
        count = struct.unpack_from("<I", self.data, start)[0]
        return np.frombuffer(self.data, dtype, count, start + 4)


_DTYPES = {0: "<f4", 1: "<f2", 2: "<i4", 4: "<i8"}
_Values = dict[int, Tensor]
_Op = Callable[[_Values], None]


class Graph:
    """A TFLite graph, run by torch in its own layout (batch, height, width, channels).

    Knows what the three graphs of the face landmarker use and raises `CheckpointError` for anything else.
    """

    def __init__(self, data: bytes) -> None:
        if data[4:8] != b"TFL3":
            raise CheckpointError("not a TFLite graph: the mark TFL3 is missing")
        model = _Table.root(data)
        codes = [max(code.scalar(0, "b"), code.scalar(3)) for code in model.tables(1)]
        graph = model.tables(2)[0]
        buffers = model.tables(4)
        self._constants: _Values = {}
        tensors = graph.tables(0)
        self._shape_of = [tensor.array(0, "<i4").tolist() for tensor in tensors]
        for number, tensor in enumerate(tensors):
            raw = buffers[tensor.scalar(2, "I")].array(0, "u1")
            if raw.size:
                kind = tensor.scalar(1, "b")
                if kind not in _DTYPES:
                    raise CheckpointError(f"tensor {number} of the graph has the unknown type {kind}")
                values = raw.view(_DTYPES[kind]).reshape(tensor.array(0, "<i4"))
                self._constants[number] = torch.from_numpy(values.copy())
        self._inputs = graph.array(1, "<i4").tolist()
        self._outputs = graph.array(2, "<i4").tolist()
        self._ops = [
            op
            for operator in graph.tables(3)
            if (op := self._compile(codes[operator.scalar(0, "I")], operator)) is not None
        ]

    @torch.inference_mode()
    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The graph's outputs for its inputs, in the graph's order."""
        values = dict(self._constants)
        values.update(zip(self._inputs, inputs, strict=True))
        for op in self._ops:
            op(values)
        return [values[number] for number in self._outputs]

    def _compile(self, code: int, operator: _Table) -> _Op | None:
        inputs = operator.array(1, "<i4").tolist()
        (output,) = operator.array(2, "<i4").tolist()
        options = operator.table(4)
        known = self._constants

        def option(number: int, kind: str = "i", default: int = 0) -> int:
            return options.scalar(number, kind, default) if options else default

        if code == 6:  # DEQUANTIZE of half-precision weights happens once, here
            known[output] = known[inputs[0]].float()
            return None
        if code in (3, 4):  # CONV_2D, DEPTHWISE_CONV_2D
            deep = code == 4
            return _convolution(
                inputs,
                output,
                known[inputs[1]],
                known[inputs[2]] if len(inputs) > 2 else None,
                depthwise=deep,
                same=option(0, "b") == 0,
                stride=(option(2), option(1)),
                activation=option(4 if deep else 3, "b"),
            )
        if code == 17:  # MAX_POOL_2D
            return _max_pool(
                inputs[0],
                output,
                same=option(0, "b") == 0,
                stride=(option(2), option(1)),
                size=(option(4), option(3)),
            )
        if code == 45:  # STRIDED_SLICE
            return _strided_slice(inputs, output, known, [option(n) for n in range(5)])
        if code == 22:  # RESHAPE: batches of one, so that the declared shape is the shape
            shape = self._shape_of[output]

            def reshape(values: _Values) -> None:
                values[output] = values[inputs[0]].reshape(shape)

            return reshape
        function = _function(code, inputs, known, option)
        if function is None:
            raise CheckpointError(f"the graph uses TFLite operation {code}, which is not known here")

        def run(values: _Values) -> None:
            values[output] = function(*(values[number] for number in inputs))

        return run


def _function(code: int, inputs: list[int], known: _Values, option: Callable[..., int]) -> Callable[..., Tensor] | None:
    """The torch meaning of an operation that needs nothing but its inputs."""

    if code in (0, 18, 41, 42):  # ADD, MUL, SUB, DIV
        pair = {0: torch.add, 18: torch.mul, 41: torch.sub, 42: torch.div}[code]
        kind = option(0, "b")

        def arithmetic(a: Tensor, b: Tensor) -> Tensor:
            return _activate(pair(a, b), kind)

        return arithmetic
    if code in (2, 34, 39):  # CONCATENATION, PAD, TRANSPOSE
        return _moving(code, inputs, known, option)
    if code in (40, 74):  # MEAN, SUM
        axes, keep = known[inputs[1]].flatten().tolist(), bool(option(0, "b"))
        total = torch.mean if code == 40 else torch.sum

        def reduce(x: Tensor, _: Tensor) -> Tensor:
            return total(x, axes, keepdim=keep)

        return reduce
    return {
        14: torch.sigmoid,
        19: torch.relu,
        54: _prelu,
        59: torch.neg,
        75: torch.sqrt,
        76: torch.rsqrt,
        99: _squared_difference,
    }.get(code)


def _moving(code: int, inputs: list[int], known: _Values, option: Callable[..., int]) -> Callable[..., Tensor]:
    """An operation that only moves numbers: join (2), pad (34), transpose (39)."""
    if code == 2:
        axis = option(0)

        def join(*parts: Tensor) -> Tensor:
            return torch.cat(parts, axis)

        return join
    if code == 34:
        pads = [amount for sides in reversed(known[inputs[1]].tolist()) for amount in sides]

        def pad(x: Tensor, _: Tensor) -> Tensor:
            return functional.pad(x, pads)

        return pad
    order = known[inputs[1]].flatten().tolist()

    def transpose(x: Tensor, _: Tensor) -> Tensor:
        return x.permute(order)

    return transpose


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x > 0, x, x * slope)


def _squared_difference(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square()


def _activate(x: Tensor, kind: int) -> Tensor:
    if kind == 0:
        return x
    if kind == 1:
        return x.relu()
    if kind == 3:
        return x.clamp(0, 6)
    raise CheckpointError(f"the graph uses TFLite activation {kind}, which is not known here")


def _same_padding(size: int, window: int, stride: int) -> tuple[int, int]:
    total = max((math.ceil(size / stride) - 1) * stride + window - size, 0)
    return total // 2, total - total // 2


def _pad_same(x_nchw: Tensor, window: tuple[int, int], stride: tuple[int, int], value: float) -> Tensor:
    top, bottom = _same_padding(x_nchw.shape[2], window[0], stride[0])
    left, right = _same_padding(x_nchw.shape[3], window[1], stride[1])
    if top == bottom == left == right == 0:
        return x_nchw
    return functional.pad(x_nchw, (left, right, top, bottom), value=value)


def _convolution(
    inputs: list[int],
    output: int,
    weight: Tensor,
    bias: Tensor | None,
    *,
    depthwise: bool,
    same: bool,
    stride: tuple[int, int],
    activation: int,
) -> _Op:
    # TFLite: [out, h, w, in], or [1, h, w, channels] when each channel has its own filter.
    kernel = weight.permute(3, 0, 1, 2) if depthwise else weight.permute(0, 3, 1, 2)
    kernel = kernel.contiguous(memory_format=torch.channels_last)
    groups = kernel.shape[0] if depthwise else 1
    size = (kernel.shape[2], kernel.shape[3])
    source = inputs[0]

    def run(values: _Values) -> None:
        x = values[source].permute(0, 3, 1, 2)
        if same:
            x = _pad_same(x, size, stride, 0.0)
        out = functional.conv2d(x, kernel, bias, stride=stride, groups=groups)
        values[output] = _activate(out, activation).permute(0, 2, 3, 1)

    return run


def _max_pool(source: int, output: int, *, same: bool, stride: tuple[int, int], size: tuple[int, int]) -> _Op:
    def run(values: _Values) -> None:
        x = values[source].permute(0, 3, 1, 2)
        if same:
            x = _pad_same(x, size, stride, -math.inf)
        values[output] = functional.max_pool2d(x, size, stride).permute(0, 2, 3, 1)

    return run


def _strided_slice(inputs: list[int], output: int, known: _Values, masks: list[int]) -> _Op:
    begin, end, steps = (known[number].flatten().tolist() for number in inputs[1:4])
    begin_mask, end_mask, ellipsis, new_axis, shrink = masks
    if ellipsis or new_axis or any(step < 1 for step in steps):
        raise CheckpointError("the graph slices in a way that is not known here")
    index: list[slice | int] = []
    for axis, (first, last, step) in enumerate(zip(begin, end, steps, strict=True)):
        bit = 1 << axis
        if shrink & bit:
            index.append(first)
        else:
            index.append(slice(None if begin_mask & bit else first, None if end_mask & bit else last, step))
    where = tuple(index)

    def run(values: _Values) -> None:
        values[output] = values[inputs[0]][where]

    return run
