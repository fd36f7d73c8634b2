"""The current CUDA device, which belongs to a thread: every thread begins with device 0, whatever its rank computes on.

What is allocated, recorded or launched without a device goes to the current one. Calls here name theirs; libraries
under us (NCCL, pinned memory, graphs) look at the current one, so whoever starts a thread or enters a stage sets it.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch


def use_device(device: torch.device) -> None:
    """Make a CUDA device the current one of this thread, for good; nothing happens for other devices."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """`use_device` for a ``with`` block."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
