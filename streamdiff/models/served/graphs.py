"""CUDA graphs: GPU work captured once and replayed without its Python.

A graph is a recording of addresses. What it reads must lie where it lay, what it computes appears where it did; a value
that Python had in hand, such as a length, is frozen in it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

_T = TypeVar("_T")
_capturing = threading.Lock()
"""A capture synchronises the device when it begins, which would break another that has begun."""


class Graphs(Protocol):
    """Captures what a function does to tensors of fixed address, for replay."""

    def capture(self, function: Callable[[], _T]) -> tuple[_T, Callable[[], None]]:
        """Capture: the function's result, and a call that replays it in place."""
        ...


class CudaGraphs:
    """All graphs of one rank. They share one pool of memory, because they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], _T]) -> tuple[_T, Callable[[], None]]:
        device = self._stream.device
        with _capturing, torch.cuda.device(device):
            # Kernels are compiled and libraries pick their algorithms outside the capture.
            self._stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self._stream):
                for _ in range(2):
                    function()
            torch.cuda.current_stream(device).wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other ranks may be threads of this process, and go on allocating meanwhile.
            mode = "thread_local"
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=mode):
                result = function()
        return result, graph.replay
